/* qcrt: what a compiled qc model needs besides its kernels.
 *
 * This file and qcrt.c are linked into every model.so. They give the kernels (compiled by TVM, or
 * written in C against the same calling convention) threads, barriers, temporary memory and a place
 * for error messages, and give the executor one call that runs a whole list of kernels.
 *
 * Only the qc_* functions below are exported. The TVM* functions that the kernels import are hidden,
 * so each library uses its own, also in a process that has loaded another model or TVM itself.
 *
 * Needs C11 with atomics, POSIX threads and Linux futexes; x86-64 and ARM alike.
 */
#ifndef QCRT_H_
#define QCRT_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The layout and meaning of everything in this header; a change of either raises it. */
#define QC_ABI_VERSION 1

/* One argument of a kernel: TVMFFIAny of tvm-ffi 0.1 (16 bytes). */
typedef struct qc_any {
  int32_t type_index; /* one of qc_type_index */
  uint32_t zero;      /* always 0 */
  union {
    int64_t integer;
    double real;
    void *pointer;
  } value;
} qc_any;

/* The type indices of tvm-ffi that kernels are called with. */
typedef enum qc_type_index { QC_NONE = 0, QC_INTEGER = 1, QC_REAL = 3, QC_TENSOR = 7 } qc_type_index;

/* A tensor argument: DLTensor of DLPack 1 (48 bytes on 64-bit machines). */
typedef struct qc_tensor {
  void *data;
  int32_t device_type; /* 1 = CPU */
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code; /* 0 int, 1 uint, 2 float, 4 bfloat, 6 bool */
  uint8_t dtype_bits;
  uint16_t dtype_lanes; /* 1 */
  int64_t *shape;
  int64_t *strides; /* NULL: compact, row-major */
  uint64_t byte_offset;
} qc_tensor;

/* A compiled kernel (`__tvm_ffi_NAME`): 0 on success, else the error has been raised. */
typedef int (*qc_kernel)(void *self, const qc_any *args, int32_t nargs, qc_any *result);

/* One call of a kernel (24 bytes). */
typedef struct qc_step {
  qc_kernel function;
  const qc_any *args;
  int32_t nargs;
  int32_t zero;
} qc_step;

/* QC_ABI_VERSION of this library. */
int qc_abi_version(void);

/* Run `count` steps in order. Return -1, or the index of the step that failed; see qc_last_error.
 * Callable from any thread; calls of one library run one after another. */
int64_t qc_run(const qc_step *steps, int64_t count);

/* qc_run, adding the duration of step i to seconds[i]. */
int64_t qc_profile(const qc_step *steps, int64_t count, double *seconds);

/* The message of the last qc_run or qc_profile that failed on the calling thread, else "". Valid
 * until that thread's next call. */
const char *qc_last_error(void);

/* Use `count` threads from the next run on, the calling thread included; below 1 means one for every
 * CPU that this process may run on. Return the number that will be used. */
int qc_set_threads(int count);

/* Ask the system for AMX tiles, which Linux gives to a process and its threads only on request. To be
 * called before the first run of kernels that use them. Return 0, or the errno of a refusal. */
int qc_request_tiles(void);

#ifdef __cplusplus
}
#endif

#endif /* QCRT_H_ */
