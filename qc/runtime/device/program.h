/* program.h: what the generated program.c tells model.c. Sizes are computed by program_sizes() into a
 * table; everything else refers to places in that table. */
#ifndef QC_PROGRAM_H_
#define QC_PROGRAM_H_

#include "qcrt.h"

enum { PROGRAM_SYMBOLS = 5 };

/* The symbols of sizes, in the order in which program_sizes() takes them. */
enum { SYMBOL_BATCH, SYMBOL_SEQ, SYMBOL_PAST, SYMBOL_CONTEXT, SYMBOL_KEEP };

/* Two plans of the same steps: for one token, and for up to `chunk`. They differ in where scratch
 * values lie in the arena. */
enum { PLAN_STEP, PLAN_PREFILL, PLANS };

typedef enum program_memory {
  MEMORY_WEIGHT, /* at: number of the weight */
  MEMORY_STATE,  /* at: number of the state */
  MEMORY_ARENA,  /* at: offset in the arena, in lines of 64 bytes, by plan */
  MEMORY_TOKENS, /* the input */
  MEMORY_LOGITS  /* the output */
} program_memory;

typedef struct program_tensor {
  uint8_t memory, dtype_code, dtype_bits, ndim;
  uint16_t shape;  /* its sizes are program_dims[shape], ... */
  uint16_t offset; /* a size: elements to skip */
  uint32_t at[PLANS];
} program_tensor;

typedef struct program_argument {
  uint16_t type; /* QC_INTEGER: `number` is a size; QC_TENSOR: a tensor */
  uint16_t number;
} program_argument;

typedef struct program_step {
  uint16_t kernel, count; /* count: of its arguments */
  uint32_t first;         /* of its arguments */
  uint32_t origin;        /* number of the name of the layer */
} program_step;

typedef struct program_state {
  uint16_t shape;
  uint8_t ndim, bytes; /* of an element */
} program_state;

typedef struct program_facts {
  uint8_t identity[32]; /* weights of another identity do not fit */
  const char *target;
  uint32_t sizes, dims, tensors, arguments, steps, weights, states, ends;
  uint32_t codes; /* machine code for GPUs, in the weights file */
  int64_t context, chunk;
  int32_t vocabulary, below, begin;
  uint8_t token_bits, logit_bits, tiles; /* tiles: kernels use AMX */
  uint32_t arena[PLANS]; /* lines of 64 bytes */
  uint32_t workspace;    /* bytes that the kernels of one thread need at a time */
} program_facts;

extern const program_facts program;
extern const uint16_t program_dims[];
extern const program_tensor program_tensors[];
extern const program_argument program_arguments[];
extern const program_step program_steps[];
extern const qc_kernel program_kernels[];
extern const char program_names[], program_origins[]; /* each ended by a zero */
extern const uint64_t program_weight_bytes[]; /* of weights, then of codes */
extern const program_state program_states[];
extern const int32_t program_ends[];

/* Division that rounds down, as in a manifest. */
static inline int64_t quotient(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

void program_sizes(const int64_t symbols[PROGRAM_SYMBOLS], int64_t *sizes);

/* The first instruction set that this CPU lacks, or NULL. */
const char *program_lacks(void);

#endif /* QC_PROGRAM_H_ */
