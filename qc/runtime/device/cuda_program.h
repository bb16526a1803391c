/* cuda_program.h: what the program.c of a GPU tells cuda_session.c, beside program.h: the kernels, in
 * machine code for several GPUs, and how each step launches one. */
#ifndef QC_CUDA_PROGRAM_H_
#define QC_CUDA_PROGRAM_H_

#include "program.h"

typedef struct cuda_binary {
  uint16_t architecture; /* 90: machine code for 9.0 */
  uint16_t is_ptx;       /* text, which a driver translates for that architecture and later ones */
  uint32_t shared;       /* memory of a block, in bytes */
  uint32_t code;         /* number among the codes in the weights file */
} cuda_binary;

typedef struct cuda_kernel {
  const char *function;
  uint16_t threads; /* of a block */
  uint16_t binaries, first;
} cuda_kernel;

typedef enum cuda_kind {
  CUDA_ADDRESS, /* number: of a tensor */
  CUDA_I32,     /* number: of a size */
  CUDA_I64,
  CUDA_MOVING /* the address of an i32 that changes from call to call. number: of it */
} cuda_kind;

typedef struct cuda_argument {
  uint16_t kind, number;
} cuda_argument;

typedef struct cuda_step {
  uint16_t kernel, count; /* count: of its arguments */
  uint32_t first;         /* of its arguments */
  uint32_t origin;        /* number of the name of the layer */
  uint16_t grid[3];       /* sizes */
  uint16_t ranges, first_range;
  uint16_t waits_late; /* with one token: it may wait for the launches in front behind its work */
} cuda_step;

/* A step belongs to a call if the size lies in [low, high]. */
typedef struct cuda_range {
  uint16_t size;
  int64_t low, high;
} cuda_range;

typedef struct cuda_facts {
  uint32_t kernels, binaries, moving;
  uint32_t overlaps; /* from sm_90 on, kernels wait by themselves for the launches in front */
} cuda_facts;

extern const cuda_facts cuda;
extern const cuda_binary cuda_binaries[];
extern const cuda_kernel cuda_kernels[];
extern const cuda_argument cuda_arguments[];
extern const cuda_step cuda_steps[];
extern const cuda_range cuda_ranges[];
extern const uint16_t cuda_moving[]; /* sizes */

#endif /* QC_CUDA_PROGRAM_H_ */
