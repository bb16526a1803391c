/* See text.h. A pattern is a program of a backtracking matcher. It has no jump backwards: repetition
 * is of single characters, by one instruction, so a match visits each instruction at most once on its
 * way and the stack holds at most one frame an instruction. */
#include "text.h"

enum { MOST_FRAMES = 256, MOST_CODE = 512, LAST_SPLIT = 4 };

typedef enum operation {
  FOUND,      /* the end of a pattern, or of what is looked ahead for */
  REPEAT,     /* a: class, b: least, c: most; as many as there are, then fewer */
  HOLD,       /* the same, never fewer */
  FORK,       /* go on; if that fails, at a */
  GO,         /* to a */
  AHEAD,      /* what follows must match up to FOUND; go on at a where it began */
  NOT_AHEAD,  /* what follows must not match up to FOUND; go on at a */
  TEXT_END,   /* nothing follows */
  OPERATIONS
} operation;

typedef struct instruction {
  uint32_t operation, a, b, c;
} instruction;

typedef struct character_class {
  uint32_t first, ranges, ascii[4];
} character_class;

typedef struct frame {
  uint32_t instruction;
  size_t least, at; /* go on here; from `at` back to `least`, character by character */
} frame;

bool patterns_are_consistent(const text_tables *tables) {
  const text_span *s = tables->sections;
  const instruction *code = s[TEXT_CODE].at;
  const character_class *classes = s[TEXT_CLASSES].at;
  const uint32_t(*splits)[2] = s[TEXT_SPLITS].at, count = s[TEXT_CODE].count;
  for (uint32_t i = 0; i < s[TEXT_SPLITS].count; i++)
    if (splits[i][0] >= count || splits[i][1] > LAST_SPLIT) return false;
  for (uint32_t i = 0; i < s[TEXT_CLASSES].count; i++)
    if ((uint64_t)classes[i].first + classes[i].ranges > s[TEXT_RANGES].count) return false;
  for (uint32_t i = 0; i < count; i++) {
    const instruction *one = &code[i];
    bool repeats = one->operation == REPEAT || one->operation == HOLD;
    bool jumps = one->operation == FORK || one->operation == GO || one->operation == AHEAD ||
                 one->operation == NOT_AHEAD;
    if (one->operation >= OPERATIONS || (repeats && one->a >= s[TEXT_CLASSES].count) ||
        (jumps && (one->a <= i || one->a >= count)))
      return false;
  }
  return count <= MOST_CODE && (count == 0 || code[count - 1].operation == FOUND);
}

uint32_t character_at(const uint8_t *text, size_t size, size_t at, size_t *bytes) {
  static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  uint8_t lead = text[at];
  *bytes = 1;
  if (lead < 0x80) return lead;
  size_t count = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 0;
  if (!count || lead > 0xf4 || size - at < count) return 0xfffd;
  uint32_t character = lead & (0x7fu >> count);
  for (size_t i = 1; i < count; i++) {
    if ((text[at + i] & 0xc0) != 0x80) return 0xfffd;
    character = character << 6 | (text[at + i] & 0x3f);
  }
  if (character < least[count] || character > 0x10ffff || (character >> 11) == 0x1b) return 0xfffd;
  *bytes = count;
  return character;
}

static bool belongs(const text_tables *tables, uint32_t class, uint32_t character) {
  const character_class *one = (const character_class *)tables->sections[TEXT_CLASSES].at + class;
  if (character < 128) return one->ascii[character / 32] >> (character % 32) & 1;
  const uint32_t(*ranges)[2] = tables->sections[TEXT_RANGES].at;
  uint32_t low = one->first, high = one->first + one->ranges;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (ranges[middle][1] < character)
      low = middle + 1;
    else
      high = middle;
  }
  return low < one->first + one->ranges && ranges[low][0] <= character;
}

static size_t before(const uint8_t *text, size_t least, size_t at) {
  size_t back = at - 1;
  while (back > least && at - back < 4 && (text[back] & 0xc0) == 0x80) back--;
  size_t bytes; /* wrong bytes are characters of one byte */
  character_at(text, at, back, &bytes);
  return back + bytes == at ? back : at - 1;
}

/* Run from an instruction to FOUND; return whether it got there, and where. */
static bool run(const text_tables *tables, uint32_t pc, const uint8_t *text, size_t size, size_t at,
                size_t *end) {
  const instruction *code = tables->sections[TEXT_CODE].at;
  frame frames[MOST_FRAMES];
  int depth = 0;
  for (;;) {
    const instruction *one = &code[pc];
    bool fits = true;
    switch ((operation)one->operation) {
      case FOUND: *end = at; return true;
      case REPEAT:
      case HOLD: {
        size_t least = at, bytes;
        uint32_t count = 0;
        while (count < one->c && at < size &&
               belongs(tables, one->a, character_at(text, size, at, &bytes))) {
          at += bytes;
          if (++count == one->b) least = at;
        }
        fits = count >= one->b;
        if (fits && one->operation == REPEAT && at > least && depth < MOST_FRAMES)
          frames[depth++] = (frame){pc + 1, least, at};
        pc++;
        break;
      }
      case FORK:
        if (depth < MOST_FRAMES) frames[depth++] = (frame){one->a, at, at};
        pc++;
        break;
      case GO: pc = one->a; break;
      case AHEAD:
      case NOT_AHEAD: {
        size_t unused;
        fits = run(tables, pc + 1, text, size, at, &unused) == (one->operation == AHEAD);
        pc = one->a;
        break;
      }
      case TEXT_END:
        fits = at == size;
        pc++;
        break;
      case OPERATIONS: fits = false;
    }
    if (fits) continue;
    if (!depth) return false;
    frame *last = &frames[depth - 1];
    pc = last->instruction;
    if (last->at > last->least) { /* a repetition gives one character back */
      at = last->at = before(text, last->least, last->at);
      if (at == last->least) depth--;
    } else {
      at = last->at;
      depth--;
    }
  }
}

size_t pattern_match(const text_tables *tables, uint32_t instruction, const uint8_t *text,
                     size_t size, size_t at) {
  size_t end;
  return run(tables, instruction, text, size, at, &end) ? end : at;
}
