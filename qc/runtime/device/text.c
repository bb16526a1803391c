/* See text.h: the tables, the way from text to pieces, and decoding. */
#include "text.h"

#include <stdlib.h>
#include <string.h>

#include "failing.h"

enum { FORMAT = 2, MOST_SPLITS = 16, MOST_BYTES = 1 << 26 /* of a text, edited */ };

/* Kinds of edits. With EDIT_LATER they come after added tokens have been cut out. */
enum { EDIT_PREPEND, EDIT_REPLACE, EDIT_PREPEND_UNLESS, EDIT_PREPEND_FIRST, EDIT_COMPOSE,
       EDIT_LATER = 256 };

/* What happens to the matches of a pattern. */
enum { SPLIT_ISOLATED, SPLIT_REMOVED, SPLIT_KEPT, SPLIT_WITH_PREVIOUS, SPLIT_WITH_NEXT };

typedef struct text_header {
  uint32_t format, vocabulary, flags;
  int32_t unknown;
  uint32_t sections[TEXT_SECTIONS][2]; /* start in bytes, elements */
} text_header;

typedef struct added_token {
  uint32_t start, size, token, flags;
} added_token;

typedef struct edit {
  uint32_t kind, first, first_size, second, second_size;
} edit;

/* Bytes of an element of each section. */
static const uint8_t ELEMENT[TEXT_SECTIONS] = {
    [TEXT_PIECE_ENDS] = 4,  [TEXT_PIECES] = 1,      [TEXT_FLAGS] = 1,  [TEXT_MERGE_ENDS] = 4,
    [TEXT_MERGES] = 12,     [TEXT_STARTS] = 8,      [TEXT_BYTES] = 4,  [TEXT_ADDED] = 16,
    [TEXT_ADDED_BYTES] = 1, [TEXT_ADDED_FIRST] = 4, [TEXT_EDITS] = 20, [TEXT_EDIT_BYTES] = 1,
    [TEXT_SPLITS] = 8,      [TEXT_CODE] = 16,       [TEXT_CLASSES] = 24, [TEXT_RANGES] = 8,
    [TEXT_SORTED] = 4,      [TEXT_BEFORE] = 4,      [TEXT_AFTER] = 4,
    [TEXT_DECOMPOSED] = 24, [TEXT_COMPOSED] = 12,   [TEXT_COMBINING] = 12,
};

/* ---- Opening --------------------------------------------------------------------------------- */

static bool rises(text_span ends, uint32_t last) {
  const uint32_t *at = ends.at;
  for (uint32_t i = 0; i + 1 < ends.count; i++)
    if (at[i] > at[i + 1]) return false;
  return ends.count && at[0] == 0 && at[ends.count - 1] == last;
}

static bool tokens_exist(text_span tokens, uint32_t vocabulary) {
  const uint32_t *at = tokens.at;
  for (uint32_t i = 0; i < tokens.count; i++)
    if (at[i] >= vocabulary) return false;
  return true;
}

static bool merges_are_consistent(const text_tables *tables) {
  const text_span *s = tables->sections;
  const uint32_t(*merges)[3] = s[TEXT_MERGES].at, (*starts)[2] = s[TEXT_STARTS].at;
  for (uint32_t i = 0; i < s[TEXT_MERGES].count; i++)
    if (merges[i][0] >= tables->vocabulary || merges[i][2] >= tables->vocabulary) return false;
  for (uint32_t i = 0; i < s[TEXT_STARTS].count; i++)
    if (starts[i][1] >= tables->vocabulary) return false;
  return s[TEXT_MERGE_ENDS].count == tables->vocabulary + 1 &&
         rises(s[TEXT_MERGE_ENDS], s[TEXT_MERGES].count);
}

static bool added_are_consistent(const text_tables *tables) {
  const text_span *s = tables->sections;
  const added_token *added = s[TEXT_ADDED].at;
  for (uint32_t i = 0; i < s[TEXT_ADDED].count; i++)
    if (added[i].token >= tables->vocabulary || added[i].size == 0 ||
        (uint64_t)added[i].start + added[i].size > s[TEXT_ADDED_BYTES].count)
      return false;
  return s[TEXT_ADDED_FIRST].count == 257 && rises(s[TEXT_ADDED_FIRST], s[TEXT_ADDED].count);
}

/* Edits that come later must stand behind the others: edited_bytes() goes through them in order. */
static bool edits_are_consistent(const text_tables *tables) {
  const text_span *s = tables->sections;
  const edit *edits = s[TEXT_EDITS].at;
  uint32_t phase = 0;
  for (uint32_t i = 0; i < s[TEXT_EDITS].count; i++) {
    const edit *one = &edits[i];
    uint32_t kind = one->kind % EDIT_LATER;
    if (kind > EDIT_COMPOSE || one->kind - kind > EDIT_LATER || one->kind - kind < phase ||
        (one->first_size == 0 && kind != EDIT_COMPOSE) ||
        (kind == EDIT_COMPOSE && s[TEXT_COMPOSED].count == 0) ||
        (uint64_t)one->first + one->first_size > s[TEXT_EDIT_BYTES].count ||
        (uint64_t)one->second + one->second_size > s[TEXT_EDIT_BYTES].count)
      return false;
    phase = one->kind - kind;
  }
  return true;
}

static bool is_consistent(const text_tables *tables) {
  const text_span *s = tables->sections;
  uint32_t vocabulary = tables->vocabulary;
  return s[TEXT_PIECE_ENDS].count == vocabulary + 1 && s[TEXT_FLAGS].count == vocabulary &&
         rises(s[TEXT_PIECE_ENDS], s[TEXT_PIECES].count) &&
         (s[TEXT_BYTES].count == 0 || s[TEXT_BYTES].count == 256) &&
         tokens_exist(s[TEXT_BYTES], vocabulary) && tokens_exist(s[TEXT_SORTED], vocabulary) &&
         tokens_exist(s[TEXT_BEFORE], vocabulary) && tokens_exist(s[TEXT_AFTER], vocabulary) &&
         tables->unknown < (int64_t)vocabulary && tables->unknown >= -1 &&
         merges_are_consistent(tables) && added_are_consistent(tables) &&
         edits_are_consistent(tables) && compositions_are_consistent(tables) && s[TEXT_SPLITS].count <= MOST_SPLITS &&
         patterns_are_consistent(tables);
}

qcm_status text_open(const uint8_t *bytes, size_t size, int32_t below, text_tables *tables) {
  const text_header *head = (const void *)bytes;
  if (size < sizeof *head || head->format != FORMAT)
    return fail(QCM_FOREIGN_FILE, "the tokenizer in the weights is of another version");
  *tables = (text_tables){
      .vocabulary = head->vocabulary, .flags = head->flags, .unknown = head->unknown};
  for (int i = 0; i < TEXT_SECTIONS; i++) {
    uint64_t start = head->sections[i][0], count = head->sections[i][1];
    if (start % 4 || start + count * ELEMENT[i] > size)
      return fail(QCM_BAD_FILE, "section %d of the tokenizer lies outside of it", i);
    tables->sections[i] = (text_span){bytes + start, (uint32_t)count};
  }
  if (head->vocabulary > (uint32_t)below || head->vocabulary > INT32_MAX || !is_consistent(tables))
    return fail(QCM_BAD_FILE, "the tokenizer in the weights contradicts itself or the model");
  const uint32_t *ends = tables->sections[TEXT_PIECE_ENDS].at;
  size_t longest = 0;
  for (uint32_t i = 0; i < tables->vocabulary; i++)
    if (ends[i + 1] - ends[i] > longest) longest = ends[i + 1] - ends[i];
  tables->longest = 3 * (longest + 4); /* a wrong byte becomes U+FFFD, of three bytes */
  return QCM_OK;
}

/* ---- Normalizing ----------------------------------------------------------------------------- */

/* Text that is being edited: `bytes` of room. */
typedef struct buffer {
  uint8_t *bytes;
  size_t size;
} buffer;

/* The most bytes that edits make of `size`. */
static size_t edited_bytes(const text_tables *tables, size_t size) {
  const edit *edits = tables->sections[TEXT_EDITS].at;
  for (uint32_t i = 0; i < tables->sections[TEXT_EDITS].count; i++) {
    if (edits[i].kind % EDIT_LATER == EDIT_COMPOSE)
      size *= COMPOSING_GROWTH;
    else if (edits[i].kind % EDIT_LATER != EDIT_REPLACE)
      size += edits[i].first_size + 1;
    else if (edits[i].second_size > edits[i].first_size)
      size += size / edits[i].first_size * (edits[i].second_size - edits[i].first_size);
    if (size > MOST_BYTES) return MOST_BYTES + 1;
  }
  return size;
}

static void exchange(buffer *text, buffer *spare) {
  buffer before = *text;
  *text = *spare;
  *spare = before;
}

static void replace(const edit *one, const uint8_t *bytes, buffer *text, buffer *spare) {
  size_t written = 0;
  for (size_t at = 0; at < text->size;) {
    if (text->size - at >= one->first_size &&
        !memcmp(text->bytes + at, bytes + one->first, one->first_size)) {
      memcpy(spare->bytes + written, bytes + one->second, one->second_size);
      written += one->second_size;
      at += one->first_size;
    } else {
      spare->bytes[written++] = text->bytes[at++];
    }
  }
  spare->size = written;
  exchange(text, spare);
}

/* Apply the edits of a phase. `is_first`: the text starts where the whole text does. */
static void apply_edits(const text_tables *tables, uint32_t phase, bool is_first, buffer *text,
                        buffer *spare, uint32_t *characters) {
  const edit *edits = tables->sections[TEXT_EDITS].at;
  const uint8_t *bytes = tables->sections[TEXT_EDIT_BYTES].at;
  for (uint32_t i = 0; i < tables->sections[TEXT_EDITS].count; i++) {
    const edit *one = &edits[i];
    uint32_t kind = one->kind % EDIT_LATER;
    if (one->kind - kind != phase) continue;
    if (kind == EDIT_REPLACE) {
      replace(one, bytes, text, spare);
      continue;
    }
    if (kind == EDIT_COMPOSE) {
      spare->size = compose(tables, text->bytes, text->size, characters, spare->bytes);
      exchange(text, spare);
      continue;
    }
    bool is_there = text->size >= one->first_size &&
                    !memcmp(text->bytes, bytes + one->first, one->first_size);
    if (text->size == 0 || (kind != EDIT_PREPEND && is_there) ||
        (kind == EDIT_PREPEND_FIRST && !is_first))
      continue;
    memmove(text->bytes + one->first_size, text->bytes, text->size);
    memcpy(text->bytes, bytes + one->first, one->first_size);
    text->size += one->first_size;
  }
}

/* ---- Splitting ------------------------------------------------------------------------------- */

/* What a whole encoding shares. */
typedef struct encoding {
  const text_tables *tables;
  void *memory; /* of merge_piece */
  uint8_t *rooms[4]; /* for edited text */
  uint32_t *characters; /* of compose() */
  token_sink *sink;
} encoding;

static void split(const encoding *all, uint32_t stage, const uint8_t *text, size_t size);

static void give(const encoding *all, uint32_t stage, const uint8_t *text, size_t from, size_t to) {
  if (from < to) split(all, stage, text + from, to - from);
}

/* Cut text by the pattern of one stage, and give each piece to the next. */
static void split(const encoding *all, uint32_t stage, const uint8_t *text, size_t size) {
  const text_tables *tables = all->tables;
  if (stage == tables->sections[TEXT_SPLITS].count) {
    merge_piece(tables, text, size, all->memory, all->sink);
    return;
  }
  const uint32_t *how = (const uint32_t *)tables->sections[TEXT_SPLITS].at + 2 * (size_t)stage;
  size_t done = 0; /* what has been given */
  for (size_t at = 0; at < size;) {
    size_t end = pattern_match(tables, how[0], text, size, at), bytes;
    if (end == at) {
      character_at(text, size, at, &bytes);
      at += bytes;
      continue;
    }
    switch (how[1]) {
      case SPLIT_ISOLATED:
        give(all, stage + 1, text, done, at);
        give(all, stage + 1, text, at, end);
        done = end;
        break;
      case SPLIT_REMOVED:
        give(all, stage + 1, text, done, at);
        done = end;
        break;
      case SPLIT_KEPT:
        give(all, stage + 1, text, at, end);
        done = end;
        break;
      case SPLIT_WITH_PREVIOUS:
        give(all, stage + 1, text, done, end);
        done = end;
        break;
      default:
        give(all, stage + 1, text, done, at);
        done = at;
    }
    at = end;
  }
  if (how[1] != SPLIT_KEPT) give(all, stage + 1, text, done, size);
}

/* ---- Added tokens ---------------------------------------------------------------------------- */

/* Find the longest added token at a place. `wanted`: those of normalized text, or of raw text. */
static const added_token *added_at(const text_tables *tables, const uint8_t *text, size_t size,
                                   size_t at, uint32_t wanted) {
  const uint32_t *first = tables->sections[TEXT_ADDED_FIRST].at;
  const added_token *added = tables->sections[TEXT_ADDED].at;
  const uint8_t *bytes = tables->sections[TEXT_ADDED_BYTES].at;
  for (uint32_t i = first[text[at]]; i < first[text[at] + 1]; i++)
    if ((added[i].flags & ADDED_NORMALIZED) == wanted && added[i].size <= size - at &&
        !memcmp(text + at, bytes + added[i].start, added[i].size))
      return &added[i];
  return NULL;
}

static bool is_space(uint8_t byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

typedef void section_reader(const encoding *all, const uint8_t *text, size_t size, bool is_first);

/* Put the added tokens of a text, and read the sections between them. */
static void cut(const encoding *all, const uint8_t *text, size_t size, bool is_first,
                uint32_t wanted, section_reader *read) {
  size_t done = 0;
  for (size_t at = 0; at < size;) {
    const added_token *found = added_at(all->tables, text, size, at, wanted);
    if (!found) {
      at++;
      continue;
    }
    size_t start = at, end = at + found->size;
    while (found->flags & ADDED_STRIP_LEFT && start > done && is_space(text[start - 1])) start--;
    while (found->flags & ADDED_STRIP_RIGHT && end < size && is_space(text[end])) end++;
    if (done < start) read(all, text + done, start - done, is_first && done == 0);
    put_token(all->sink, (int32_t)found->token);
    at = done = end;
  }
  if (done < size) read(all, text + done, size - done, is_first && done == 0);
}

/* Copy a text to a room and edit it there. */
static buffer edited(const encoding *all, int room, const uint8_t *text, size_t size,
                     uint32_t phase, bool is_first) {
  buffer into = {all->rooms[room], size}, spare = {all->rooms[room + 1], 0};
  memcpy(into.bytes, text, size);
  apply_edits(all->tables, phase, is_first, &into, &spare, all->characters);
  return into;
}

static void read_section(const encoding *all, const uint8_t *text, size_t size, bool is_first) {
  buffer pieces = edited(all, 2, text, size, EDIT_LATER, is_first);
  split(all, 0, pieces.bytes, pieces.size);
}

static void read_raw(const encoding *all, const uint8_t *text, size_t size, bool is_first) {
  buffer normalized = edited(all, 0, text, size, 0, is_first);
  cut(all, normalized.bytes, normalized.size, is_first, ADDED_NORMALIZED, read_section);
}

static void put_all(token_sink *sink, text_span tokens) {
  const int32_t *at = tokens.at;
  for (uint32_t i = 0; i < tokens.count; i++) put_token(sink, at[i]);
}

qcm_status text_encode(const text_tables *tables, const char *text, size_t bytes, int special,
                       int32_t *tokens, size_t room, size_t *count) {
  size_t most = bytes > MOST_BYTES ? bytes : edited_bytes(tables, bytes) + 1;
  if (most > MOST_BYTES) return fail(QCM_BAD_CALL, "a text of %zu bytes is too long", bytes);
  most = (most + 15) / 16 * 16;
  /* 3 characters of 4 bytes for each byte that composing makes COMPOSING_GROWTH of: 4 * most */
  size_t composing = tables->sections[TEXT_COMPOSED].count ? 4 * most : 0;
  uint8_t *memory = malloc(4 * most + composing + merging_bytes(most));
  if (!memory) return fail(QCM_NO_MEMORY, "no memory to encode %zu bytes", bytes);
  token_sink sink = {tokens, room, 0};
  encoding all = {tables,
                  memory + 4 * most + composing,
                  {memory, memory + most, memory + 2 * most, memory + 3 * most},
                  (uint32_t *)(void *)(memory + 4 * most),
                  &sink};
  if (special) put_all(&sink, tables->sections[TEXT_BEFORE]);
  cut(&all, (const uint8_t *)text, bytes, true, 0, read_raw);
  if (special) put_all(&sink, tables->sections[TEXT_AFTER]);
  free(memory);
  *count = sink.count;
  return QCM_OK;
}

/* ---- Decoding -------------------------------------------------------------------------------- */

static char *put_replacement(char *to) {
  memcpy(to, "\xef\xbf\xbd", 3);
  return to + 3;
}

/* How many bytes a character has that starts like this; 0 if none does. */
static int expected(uint8_t lead) {
  return lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

/* Whether `byte` may follow `count` bytes of a character (Unicode 15.0, table 3-7). */
static bool may_follow(const uint8_t *pending, int count, uint8_t byte) {
  uint8_t low = 0x80, high = 0xbf;
  if (count == 1) {
    if (pending[0] == 0xe0) low = 0xa0;
    if (pending[0] == 0xed) high = 0x9f;
    if (pending[0] == 0xf0) low = 0x90;
    if (pending[0] == 0xf4) high = 0x8f;
  }
  return byte >= low && byte <= high;
}

/* What is unfinished: one U+FFFD for it, or for each byte where bytes are tokens of their own. */
static char *give_up(const text_tables *tables, qcm_decoder *decoder, char *to) {
  int marks = tables->flags & TEXT_BYTE_LEVEL ? decoder->count > 0 : decoder->count;
  for (int i = 0; i < marks; i++) to = put_replacement(to);
  decoder->count = 0;
  return to;
}

static char *put_byte(const text_tables *tables, qcm_decoder *decoder, uint8_t byte, char *to) {
  if (decoder->count && !may_follow(decoder->pending, decoder->count, byte))
    to = give_up(tables, decoder, to);
  if (!decoder->count && !expected(byte)) return put_replacement(to);
  decoder->pending[decoder->count++] = byte;
  if (decoder->count == expected(decoder->pending[0])) {
    memcpy(to, decoder->pending, decoder->count);
    to += decoder->count;
    decoder->count = 0;
  }
  return to;
}

size_t text_decode(const text_tables *tables, qcm_decoder *decoder, int32_t token, char *text) {
  if (token < 0) return (size_t)(give_up(tables, decoder, text) - text);
  if ((uint32_t)token >= tables->vocabulary) return 0;
  uint8_t flags = ((const uint8_t *)tables->sections[TEXT_FLAGS].at)[token];
  if (flags & TOKEN_SILENT) return 0;
  const uint32_t *ends = tables->sections[TEXT_PIECE_ENDS].at;
  const uint8_t *piece = (const uint8_t *)tables->sections[TEXT_PIECES].at + ends[token];
  size_t size = ends[token + 1] - ends[token];
  if (!decoder->started && tables->flags & (TEXT_DROP_SPACE | TEXT_DROP_SPACES))
    for (bool more = true; more && size && *piece == ' '; more = tables->flags & TEXT_DROP_SPACES)
      piece++, size--;
  decoder->started = 1;
  char *to = text;
  if (!(tables->flags & TEXT_BYTE_LEVEL) && !(flags & TOKEN_BYTE))
    to = give_up(tables, decoder, to);
  for (size_t i = 0; i < size; i++) to = put_byte(tables, decoder, piece[i], to);
  return (size_t)(to - text);
}
