/* cuda_driver.h: the CUDA driver, found when the first model is opened. Names are those of the CUDA
 * Driver API, whose reference says what each call does; the suffixes are the versions that cuda.h
 * has mapped the names to. */
#ifndef QC_CUDA_DRIVER_H_
#define QC_CUDA_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

#include "qc_model.h"

typedef uint64_t cuda_address;
typedef struct cuda_context *cuda_context_handle;
typedef struct cuda_module *cuda_module_handle;
typedef struct cuda_function *cuda_function_handle;
typedef struct cuda_stream *cuda_stream_handle;
typedef struct cuda_graph *cuda_graph_handle;
typedef struct cuda_ready *cuda_ready_handle; /* a graph that can be launched */

/* CUlaunchAttribute, CUlaunchConfig */
typedef struct cuda_attribute {
  int kind, padding;
  uint64_t value[8];
} cuda_attribute;

typedef struct cuda_configuration {
  unsigned grid[3], block[3], shared;
  cuda_stream_handle stream;
  cuda_attribute *attributes;
  unsigned count;
} cuda_configuration;

enum {
  CUDA_OUT_OF_MEMORY = 2,
  CUDA_CAPABILITY_MAJOR = 75,
  CUDA_CAPABILITY_MINOR = 76,
  CUDA_MOST_SHARED = 97,       /* of a block that asks for it */
  CUDA_DYNAMIC_SHARED = 8,     /* CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */
  CUDA_NON_BLOCKING = 1,       /* CU_STREAM_NON_BLOCKING */
  CUDA_THREAD_LOCAL = 1,       /* CU_STREAM_CAPTURE_MODE_THREAD_LOCAL */
  CUDA_BESIDE = 6              /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */
};

/* What is used of the driver: CALL(name, arguments). */
#define CUDA_CALLS(CALL)                                                                          \
  CALL(cuInit, (unsigned))                                                                        \
  CALL(cuDeviceGetCount, (int *))                                                                 \
  CALL(cuDeviceGet, (int *, int))                                                                 \
  CALL(cuDeviceGetName, (char *, int, int))                                                       \
  CALL(cuDeviceGetAttribute, (int *, int, int))                                                   \
  CALL(cuDevicePrimaryCtxRetain, (cuda_context_handle *, int))                                    \
  CALL(cuDevicePrimaryCtxRelease_v2, (int))                                                       \
  CALL(cuCtxPushCurrent_v2, (cuda_context_handle))                                                \
  CALL(cuCtxPopCurrent_v2, (cuda_context_handle *))                                               \
  CALL(cuGetErrorString, (int, const char **))                                                    \
  CALL(cuMemAlloc_v2, (cuda_address *, size_t))                                                   \
  CALL(cuMemFree_v2, (cuda_address))                                                              \
  CALL(cuMemHostAlloc, (void **, size_t, unsigned))                                               \
  CALL(cuMemFreeHost, (void *))                                                                   \
  CALL(cuMemcpyHtoD_v2, (cuda_address, const void *, size_t))                                     \
  CALL(cuMemcpyHtoDAsync_v2, (cuda_address, const void *, size_t, cuda_stream_handle))            \
  CALL(cuMemcpyDtoHAsync_v2, (void *, cuda_address, size_t, cuda_stream_handle))                  \
  CALL(cuMemsetD8Async, (cuda_address, unsigned char, size_t, cuda_stream_handle))                \
  CALL(cuModuleLoadData, (cuda_module_handle *, const void *))                                    \
  CALL(cuModuleUnload, (cuda_module_handle))                                                      \
  CALL(cuModuleGetFunction, (cuda_function_handle *, cuda_module_handle, const char *))           \
  CALL(cuFuncSetAttribute, (cuda_function_handle, int, int))                                      \
  CALL(cuLaunchKernel,                                                                            \
       (cuda_function_handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
        cuda_stream_handle, void **, void **))                                                    \
  CALL(cuStreamCreate, (cuda_stream_handle *, unsigned))                                          \
  CALL(cuStreamDestroy_v2, (cuda_stream_handle))                                                  \
  CALL(cuStreamSynchronize, (cuda_stream_handle))                                                 \
  CALL(cuStreamBeginCapture_v2, (cuda_stream_handle, int))                                        \
  CALL(cuStreamEndCapture, (cuda_stream_handle, cuda_graph_handle *))                             \
  CALL(cuGraphInstantiateWithFlags, (cuda_ready_handle *, cuda_graph_handle, unsigned long long)) \
  CALL(cuGraphDestroy, (cuda_graph_handle))                                                       \
  CALL(cuGraphLaunch, (cuda_ready_handle, cuda_stream_handle))                                    \
  CALL(cuGraphExecDestroy, (cuda_ready_handle))

/* What drivers before CUDA 12 lack, and only GPUs that they do not know are asked to do. */
#define CUDA_CALLS_SINCE_12(CALL)                                                                 \
  CALL(cuLaunchKernelEx,                                                                          \
       (const cuda_configuration *, cuda_function_handle, void **, void **))

typedef struct cuda_driver {
#define CALL(name, arguments) int(*name) arguments;
  CUDA_CALLS(CALL) CUDA_CALLS_SINCE_12(CALL)
#undef CALL
} cuda_driver;

extern cuda_driver driver; /* complete once cuda_driver_check() has returned QCM_OK */

/* Load the driver, once a process; whether it is there and sees a GPU. */
qcm_status cuda_driver_check(void);

/* Keep a sentence of what the driver says of an error. */
qcm_status cuda_failed(int error, const char *what);

#endif /* QC_CUDA_DRIVER_H_ */
