/* Byte-pair encoding: merge the pair of lowest rank, the leftmost of equals, until none is left
 * (Sennrich et al. 2016, arXiv:1508.07909). Pairs wait in a heap, so that long pieces take n log n. */
#include <string.h>

#include "text.h"

/* Symbols of a piece, a list that loses members by merging. */
typedef struct symbol {
  int32_t token; /* -1: merged into the one before it */
  uint32_t before, after;
} symbol;

/* A pair that could be merged when it was found. */
typedef struct pair {
  uint32_t rank, at; /* at: its left symbol */
  int32_t left, right, result;
} pair;

typedef struct merge {
  uint32_t right, rank, result;
} merge;

enum { NONE = 0xffffffffu };

void put_token(token_sink *sink, int32_t token) {
  if (sink->count < sink->room) sink->tokens[sink->count] = token;
  sink->count++;
}

/* A piece of n bytes has at most n symbols, n - 1 pairs, and at most two new pairs a merge. */
size_t merging_bytes(size_t size) { return (size + 1) * (sizeof(symbol) + 3 * sizeof(pair)); }

static const merge *find_merge(const text_tables *tables, int32_t left, int32_t right) {
  const uint32_t *ends = tables->sections[TEXT_MERGE_ENDS].at;
  const merge *merges = tables->sections[TEXT_MERGES].at;
  uint32_t low = ends[left], high = ends[left + 1], end = high;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (merges[middle].right < (uint32_t)right)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && merges[low].right == (uint32_t)right ? &merges[low] : NULL;
}

static bool comes_first(const pair *a, const pair *b) {
  return a->rank < b->rank || (a->rank == b->rank && a->at < b->at);
}

static void push(pair *heap, size_t *count, pair added) {
  size_t at = (*count)++;
  while (at && comes_first(&added, &heap[(at - 1) / 2])) {
    heap[at] = heap[(at - 1) / 2];
    at = (at - 1) / 2;
  }
  heap[at] = added;
}

static pair pop(pair *heap, size_t *count) {
  pair first = heap[0], last = heap[--*count];
  size_t at = 0;
  for (size_t child; (child = 2 * at + 1) < *count; at = child) {
    if (child + 1 < *count && comes_first(&heap[child + 1], &heap[child])) child++;
    if (!comes_first(&heap[child], &last)) break;
    heap[at] = heap[child];
  }
  heap[at] = last;
  return first;
}

static void consider(const text_tables *tables, const symbol *symbols, uint32_t left, pair *heap,
                     size_t *count) {
  if (left == NONE || symbols[left].after == NONE) return;
  int32_t first = symbols[left].token, second = symbols[symbols[left].after].token;
  const merge *found = find_merge(tables, first, second);
  if (found) push(heap, count, (pair){found->rank, left, first, second, (int32_t)found->result});
}

/* The token of a byte or a character, or -1. */
static int32_t start_of(const text_tables *tables, uint32_t character) {
  const uint32_t(*starts)[2] = tables->sections[TEXT_STARTS].at;
  uint32_t low = 0, high = tables->sections[TEXT_STARTS].count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (starts[middle][0] < character)
      low = middle + 1;
    else
      high = middle;
  }
  bool is_there = low < tables->sections[TEXT_STARTS].count && starts[low][0] == character;
  return is_there ? (int32_t)starts[low][1] : -1;
}

static void add_symbol(symbol *symbols, uint32_t *count, int32_t token) {
  uint32_t at = (*count)++;
  symbols[at] = (symbol){token, at ? at - 1 : NONE, NONE};
  if (at) symbols[at - 1].after = at;
}

static uint32_t first_symbols(const text_tables *tables, const uint8_t *piece, size_t size,
                              symbol *symbols) {
  uint32_t count = 0;
  const int32_t *bytes_of = tables->sections[TEXT_BYTES].at;
  bool has_bytes = tables->sections[TEXT_BYTES].count == 256, was_unknown = false;
  for (size_t at = 0, bytes = 1; at < size; at += bytes) {
    bool is_byte = tables->flags & TEXT_BYTE_LEVEL;
    uint32_t character = is_byte ? piece[at] : character_at(piece, size, at, &bytes);
    int32_t token = start_of(tables, character);
    if (token >= 0) {
      add_symbol(symbols, &count, token);
      was_unknown = false;
    } else if (has_bytes) {
      for (size_t i = 0; i < bytes; i++) add_symbol(symbols, &count, bytes_of[piece[at + i]]);
      was_unknown = false;
    } else if (tables->unknown >= 0) {
      if (!was_unknown || !(tables->flags & TEXT_FUSE_UNKNOWN))
        add_symbol(symbols, &count, tables->unknown);
      was_unknown = true;
    }
  }
  return count;
}

/* The token that is a whole piece, or -1. */
static int32_t whole_piece(const text_tables *tables, const uint8_t *piece, size_t size) {
  const uint32_t *sorted = tables->sections[TEXT_SORTED].at;
  const uint32_t *ends = tables->sections[TEXT_PIECE_ENDS].at;
  const uint8_t *pieces = tables->sections[TEXT_PIECES].at;
  uint32_t low = 0, high = tables->sections[TEXT_SORTED].count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2, token = sorted[middle];
    size_t length = ends[token + 1] - ends[token];
    int order = memcmp(pieces + ends[token], piece, length < size ? length : size);
    if (order == 0 && length == size) return (int32_t)token;
    if (order < 0 || (order == 0 && length < size))
      low = middle + 1;
    else
      high = middle;
  }
  return -1;
}

void merge_piece(const text_tables *tables, const uint8_t *piece, size_t size, void *memory,
                 token_sink *sink) {
  if (tables->flags & TEXT_WHOLE_PIECES) {
    int32_t token = whole_piece(tables, piece, size);
    if (token >= 0) {
      put_token(sink, token);
      return;
    }
  }
  pair *heap = memory;
  symbol *symbols = (symbol *)(void *)(heap + 3 * (size + 1));
  uint32_t count = first_symbols(tables, piece, size, symbols);
  size_t pairs = 0;
  for (uint32_t at = 0; at + 1 < count; at++) consider(tables, symbols, at, heap, &pairs);
  while (pairs) {
    pair best = pop(heap, &pairs);
    symbol *left = &symbols[best.at];
    if (left->token != best.left || left->after == NONE ||
        symbols[left->after].token != best.right)
      continue; /* one of the two has been merged with another */
    symbol *right = &symbols[left->after];
    left->token = best.result;
    right->token = -1;
    left->after = right->after;
    if (left->after != NONE) symbols[left->after].before = best.at;
    consider(tables, symbols, left->before, heap, &pairs);
    consider(tables, symbols, best.at, heap, &pairs);
  }
  for (uint32_t at = 0; count && at != NONE; at = symbols[at].after)
    put_token(sink, symbols[at].token);
}
