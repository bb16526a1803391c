/* text.h: the tokenizer of a model, from tables that qc/backends/device/text_tables.py writes.
 *
 * Text becomes tokens in four stages: added tokens are cut out, the rest is normalized, split into
 * pieces by compiled patterns (patterns.c), and each piece is merged by byte-pair encoding (merging.c).
 */
#ifndef QC_TEXT_H_
#define QC_TEXT_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qc_model.h"

/* Sections of the tables, in their order in the file. */
typedef enum text_section {
  TEXT_PIECE_ENDS,   /* u32[vocabulary + 1]: where the bytes of each token start */
  TEXT_PIECES,       /* u8: what each token decodes to */
  TEXT_FLAGS,        /* u8[vocabulary], see TOKEN_* */
  TEXT_MERGE_ENDS,   /* u32[vocabulary + 1]: where the merges with each left token start */
  TEXT_MERGES,       /* {right, rank, result} u32, by right token for each left one */
  TEXT_STARTS,       /* {character or byte, token} u32, rising: what a piece starts out as */
  TEXT_BYTES,        /* i32[256], or empty: tokens of bytes that stand for unknown characters */
  TEXT_ADDED,        /* {start, size, token, flags} u32, longest first for each first byte */
  TEXT_ADDED_BYTES,  /* u8 */
  TEXT_ADDED_FIRST,  /* u32[257]: where the added tokens with each first byte start */
  TEXT_EDITS,        /* {kind, start, size, start, size} u32: the normalizer */
  TEXT_EDIT_BYTES,   /* u8 */
  TEXT_SPLITS,       /* {first instruction, behaviour} u32: patterns, one after the other */
  TEXT_CODE,         /* {operation, a, b, c} u32, see patterns.c */
  TEXT_CLASSES,      /* {first range, ranges, ascii[4]} u32 */
  TEXT_RANGES,       /* {low, high} u32: characters, both included */
  TEXT_SORTED,       /* u32, or empty: tokens by their bytes, for pieces that are tokens whole */
  TEXT_BEFORE,       /* i32: tokens in front of a text */
  TEXT_AFTER,        /* i32 */
  TEXT_DECOMPOSED,   /* {character, parts, part[4]} u32, rising: see composing.c */
  TEXT_COMPOSED,     /* {first, second, character} u32, rising */
  TEXT_COMBINING,    /* {low, high, class} u32, rising: characters, both included */
  TEXT_SECTIONS
} text_section;

/* Flags of tokens. */
enum { TOKEN_SILENT = 1 /* has no text */, TOKEN_BYTE = 2 /* a byte of an unknown character */ };

/* Flags of added tokens. */
enum { ADDED_STRIP_LEFT = 1, ADDED_STRIP_RIGHT = 2, ADDED_NORMALIZED = 4 };

/* Flags of a tokenizer. */
enum {
  TEXT_BYTE_LEVEL = 1,   /* pieces start out as bytes, not as characters */
  TEXT_WHOLE_PIECES = 2, /* a piece that is a token is not merged */
  TEXT_FUSE_UNKNOWN = 4, /* unknown characters side by side are one unknown token */
  TEXT_DROP_SPACE = 8,   /* a decoded text loses one space at its start */
  TEXT_DROP_SPACES = 16  /* all that its first token starts with */
};

typedef struct text_span {
  const void *at;
  uint32_t count; /* of elements */
} text_span;

typedef struct text_tables {
  text_span sections[TEXT_SECTIONS];
  uint32_t vocabulary, flags;
  int32_t unknown; /* a token, or -1 */
  size_t longest;  /* bytes that qcm_decode may write */
} text_tables;

/* Where tokens go: those beyond `room` are counted. */
typedef struct token_sink {
  int32_t *tokens;
  size_t room, count;
} token_sink;

/* Check the tables and find their sections. Tokens must be below `below`. */
qcm_status text_open(const uint8_t *bytes, size_t size, int32_t below, text_tables *tables);

qcm_status text_encode(const text_tables *tables, const char *text, size_t bytes, int special,
                       int32_t *tokens, size_t room, size_t *count);

/* Return the bytes written. */
size_t text_decode(const text_tables *tables, qcm_decoder *decoder, int32_t token, char *text);

/* ---- patterns.c ---- */

/* Whether patterns go forward to their ends, inside of the tables. */
bool patterns_are_consistent(const text_tables *tables);

/* Match the pattern that starts at an instruction against text[at ..]; return the end, or `at`. */
size_t pattern_match(const text_tables *tables, uint32_t instruction, const uint8_t *text,
                     size_t size, size_t at);

/* Read the character at `at`, which is in front of `size`; set its bytes. Wrong bytes count as one
 * character U+FFFD each. */
uint32_t character_at(const uint8_t *text, size_t size, size_t at, size_t *bytes);

/* ---- composing.c ---- */

enum { COMPOSING_GROWTH = 3 /* the most bytes that come of one */ };

bool compositions_are_consistent(const text_tables *tables);

/* Write a text in Unicode's form NFC and return its bytes; `memory` has 3 * size characters. */
size_t compose(const text_tables *tables, const uint8_t *text, size_t size, uint32_t *memory,
               uint8_t *into);

/* ---- merging.c ---- */

/* Memory for pieces of up to `size` bytes: merging_bytes(size). */
size_t merging_bytes(size_t size);
void merge_piece(const text_tables *tables, const uint8_t *piece, size_t size, void *memory,
                 token_sink *sink);

void put_token(token_sink *sink, int32_t token);

#endif /* QC_TEXT_H_ */
