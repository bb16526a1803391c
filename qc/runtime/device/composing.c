/* See text.h: canonical composition of characters (NFC; Unicode Standard Annex 15). A text is taken
 * apart to characters with their combining classes, ordered, and put together again. */
#include "text.h"

#include <string.h>

enum {
  SYLLABLES = 0xac00, LEADING = 0x1100, VOWELS = 0x1161, TRAILING = 0x11a7, /* of Hangul */
  LEADING_COUNT = 19, VOWEL_COUNT = 21, TRAILING_COUNT = 28,
  SYLLABLE_COUNT = LEADING_COUNT * VOWEL_COUNT * TRAILING_COUNT,
  END = 0x110000,       /* behind the last character: a byte of none is END + byte */
  CLASS = 24,           /* bits of a character, below its class */
  CHANGED_FROM = 0x300, /* what has only characters below this is composed already */
  SHORT_RUN = 16,       /* of combining characters, sorted by insertion */
};

typedef struct decomposition {
  uint32_t character, size, parts[4];
} decomposition;

typedef struct composition {
  uint32_t first, second, character;
} composition;

typedef struct combining {
  uint32_t low, high, class;
} combining;

static uint32_t bare(uint32_t entry) { return entry & ((1u << CLASS) - 1); }

static size_t utf8_bytes(uint32_t character) {
  return character < 0x80 ? 1 : character < 0x800 ? 2 : character < 0x10000 ? 3 : 4;
}

bool compositions_are_consistent(const text_tables *tables) {
  const text_span *s = tables->sections;
  const decomposition *apart = s[TEXT_DECOMPOSED].at;
  for (uint32_t i = 0; i < s[TEXT_DECOMPOSED].count; i++) {
    size_t from = apart[i].character < END ? utf8_bytes(apart[i].character) : 0, to = 0;
    if (apart[i].size < 1 || apart[i].size > 4 || 2 * apart[i].size > 3 * from) return false;
    for (uint32_t part = 0; part < apart[i].size; part++) {
      if (apart[i].parts[part] >= END) return false;
      to += utf8_bytes(apart[i].parts[part]);
    }
    if (to > COMPOSING_GROWTH * from) return false;
  }
  const composition *whole = s[TEXT_COMPOSED].at;
  for (uint32_t i = 0; i < s[TEXT_COMPOSED].count; i++)
    if (whole[i].first >= END || whole[i].second >= END || whole[i].character >= END ||
        utf8_bytes(whole[i].character) > utf8_bytes(whole[i].first) + utf8_bytes(whole[i].second))
      return false;
  const combining *classes = s[TEXT_COMBINING].at;
  for (uint32_t i = 0; i < s[TEXT_COMBINING].count; i++)
    if (classes[i].class > 255) return false;
  return true;
}

/* Return a character with its class. */
static uint32_t classed(const text_tables *tables, uint32_t character) {
  const combining *classes = tables->sections[TEXT_COMBINING].at;
  uint32_t low = 0, high = tables->sections[TEXT_COMBINING].count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (character < classes[middle].low) high = middle;
    else if (character > classes[middle].high) low = middle + 1;
    else return classes[middle].class << CLASS | character;
  }
  return character;
}

/* Write the parts of a character; return the end. */
static uint32_t *take_apart(const text_tables *tables, uint32_t character, uint32_t *to) {
  if (character - SYLLABLES < SYLLABLE_COUNT) {
    uint32_t number = character - SYLLABLES, trailing = number % TRAILING_COUNT;
    *to++ = LEADING + number / (VOWEL_COUNT * TRAILING_COUNT);
    *to++ = VOWELS + number / TRAILING_COUNT % VOWEL_COUNT;
    if (trailing) *to++ = TRAILING + trailing;
    return to;
  }
  const decomposition *rows = tables->sections[TEXT_DECOMPOSED].at;
  uint32_t low = 0, high = tables->sections[TEXT_DECOMPOSED].count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (character < rows[middle].character) high = middle;
    else if (character > rows[middle].character) low = middle + 1;
    else {
      for (uint32_t i = 0; i < rows[middle].size; i++) *to++ = classed(tables, rows[middle].parts[i]);
      return to;
    }
  }
  *to++ = classed(tables, character);
  return to;
}

/* Order a run of combining characters by class, those of one class as they come. */
static void order(uint32_t *run, size_t size, uint32_t *spare) {
  if (size <= SHORT_RUN) {
    for (size_t i = 1; i < size; i++) {
      uint32_t moved = run[i];
      size_t at = i;
      for (; at && run[at - 1] >> CLASS > moved >> CLASS; at--) run[at] = run[at - 1];
      run[at] = moved;
    }
    return;
  }
  size_t ends[257] = {0};
  for (size_t i = 0; i < size; i++) ends[(run[i] >> CLASS) + 1]++;
  for (int class = 0; class < 256; class++) ends[class + 1] += ends[class];
  memcpy(spare, run, size * sizeof *run);
  for (size_t i = 0; i < size; i++) run[ends[spare[i] >> CLASS]++] = spare[i];
}

static void order_all(uint32_t *characters, size_t count, uint32_t *spare) {
  for (size_t at = 0; at < count;) {
    size_t end = at;
    while (end < count && characters[end] >> CLASS) end++;
    if (end - at > 1) order(characters + at, end - at, spare);
    at = end + 1;
  }
}

/* What two characters are together; 0 if they stay apart. */
static uint32_t together(const text_tables *tables, uint32_t first, uint32_t second) {
  if (first - LEADING < LEADING_COUNT && second - VOWELS < VOWEL_COUNT)
    return SYLLABLES + ((first - LEADING) * VOWEL_COUNT + (second - VOWELS)) * TRAILING_COUNT;
  if (first - SYLLABLES < SYLLABLE_COUNT && (first - SYLLABLES) % TRAILING_COUNT == 0 &&
      second - TRAILING - 1 < TRAILING_COUNT - 1)
    return first + (second - TRAILING);
  const composition *rows = tables->sections[TEXT_COMPOSED].at;
  uint32_t low = 0, high = tables->sections[TEXT_COMPOSED].count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    const composition *row = &rows[middle];
    if (first < row->first || (first == row->first && second < row->second)) high = middle;
    else if (first > row->first || second > row->second) low = middle + 1;
    else return row->character;
  }
  return 0;
}

/* Put characters together in place; return how many are left. */
static size_t put_together(const text_tables *tables, uint32_t *characters, size_t count) {
  size_t written = 0, starter = count; /* none yet */
  uint32_t before = 0;                 /* the class of the last character behind the starter */
  for (size_t i = 0; i < count; i++) {
    uint32_t class = characters[i] >> CLASS, entry = characters[i];
    bool touches = written == starter + 1;
    if (starter < count && (touches || before < class)) {
      uint32_t whole = together(tables, bare(characters[starter]), bare(entry));
      if (whole) {
        characters[starter] = classed(tables, whole);
        continue;
      }
    }
    if (!class) starter = written;
    before = class;
    characters[written++] = entry;
  }
  return written;
}

static uint8_t *put_character(uint32_t character, uint8_t *to) {
  static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
  if (character >= END) {
    *to++ = (uint8_t)(character - END);
    return to;
  }
  size_t bytes = utf8_bytes(character);
  for (size_t i = bytes; i-- > 1; character >>= 6) to[i] = (uint8_t)(0x80 | (character & 0x3f));
  to[0] = (uint8_t)(bytes == 1 ? character : lead[bytes] | character);
  return to + bytes;
}

static bool is_composed(const uint8_t *text, size_t size) {
  for (size_t at = 0; at < size; at++)
    if (text[at] >= 0xc0 + (CHANGED_FROM >> 6)) return false;
  return true;
}

size_t compose(const text_tables *tables, const uint8_t *text, size_t size, uint32_t *memory,
               uint8_t *into) {
  if (is_composed(text, size)) {
    memcpy(into, text, size);
    return size;
  }
  uint32_t *end = memory;
  for (size_t at = 0, bytes; at < size; at += bytes) {
    uint32_t character = character_at(text, size, at, &bytes);
    if (bytes == 1) *end++ = text[at] < 0x80 ? character : (uint32_t)END + text[at];
    else end = take_apart(tables, character, end);
  }
  order_all(memory, (size_t)(end - memory), end);
  size_t count = put_together(tables, memory, (size_t)(end - memory));
  uint8_t *to = into;
  for (size_t i = 0; i < count; i++) to = put_character(bare(memory[i]), to);
  return (size_t)(to - into);
}
