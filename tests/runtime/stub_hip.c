/* A HIP runtime for the launcher's tests: the stub of CUDA's driver under HIP's names, with the prototypes
   of AMD's own header, which the compiler compares. Blocks are whole waves of 64 threads. */
#define __HIP_PLATFORM_AMD__
#include <hip/hip_runtime_api.h>
#include <stddef.h>

#include "stub_cuda.c"

#define DO(call) return (hipError_t)(call)
#define AT(pointer) ((uint64_t)(pointer))

static char architecture[256] = "gfx942:sramecc+:xnack-";
void stub_set_architecture(const char *name) { snprintf(architecture, sizeof architecture, "%s", name); }
_Static_assert(offsetof(hipDeviceProp_t, gcnArchName) == 1160 && sizeof(hipDeviceProp_t) == 1472, "hip.py");
_Static_assert(hipDeviceAttributeMaxSharedMemoryPerBlock == 74, "hip.py");
_Static_assert(hipStreamNonBlocking == 1 && (int)hipErrorOutOfMemory == NO_MEMORY, "driver.py");
_Static_assert(hipStreamCaptureModeThreadLocal == 1 && hipStreamSetCaptureDependencies == 1, "driver.py");

hipError_t hipInit(unsigned flags) { DO(cuInit(flags)); }
hipError_t hipGetDeviceCount(int *n) { DO(cuDeviceGetCount(n)); }
hipError_t hipDeviceGetName(char *name, int size, hipDevice_t d) { DO(cuDeviceGetName(name, size, d)); }
hipError_t hipDeviceGetAttribute(int *v, hipDeviceAttribute_t what, int d) {
  *v = what == hipDeviceAttributeMaxSharedMemoryPerBlock ? 65536 : -1;
  return d ? hipErrorInvalidValue : hipSuccess;
}
hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600 *p, int d) {
  memset(p, 0xFF, sizeof *p);
  memcpy(p->gcnArchName, architecture, sizeof p->gcnArchName);
  return d ? hipErrorInvalidValue : hipSuccess;
}
hipError_t hipSetDevice(int d) { return d ? hipErrorInvalidValue : hipSuccess; }
const char *hipGetErrorString(hipError_t e) { return e == hipErrorOutOfMemory ? "out of memory" : "stub error"; }
hipError_t hipMalloc(void **p, size_t n) { DO(cuMemAlloc_v2((uint64_t *)p, n)); }
hipError_t hipFree(void *p) { DO(cuMemFree_v2(AT(p))); }
hipError_t hipHostMalloc(void **p, size_t n, unsigned f) { DO(f ? INVALID : cuMemHostAlloc(p, n, f)); }
hipError_t hipHostFree(void *p) { DO(cuMemFreeHost(p)); }
hipError_t hipMemcpyHtoD(hipDeviceptr_t d, const void *h, size_t n) { DO(cuMemcpyHtoD_v2(AT(d), (void *)h, n)); }
hipError_t hipMemcpyDtoH(void *h, hipDeviceptr_t d, size_t n) { DO(cuMemcpyDtoH_v2(h, AT(d), n)); }
hipError_t hipMemcpyHtoDAsync(hipDeviceptr_t d, const void *h, size_t n, hipStream_t s) { DO(cuMemcpyHtoDAsync_v2(AT(d), (void *)h, n, s)); }
hipError_t hipMemcpyDtoHAsync(void *h, hipDeviceptr_t d, size_t n, hipStream_t s) { DO(cuMemcpyDtoHAsync_v2(h, AT(d), n, s)); }
hipError_t hipMemcpyDtoDAsync(hipDeviceptr_t to, hipDeviceptr_t from, size_t n, hipStream_t s) { DO(cuMemcpyDtoDAsync_v2(AT(to), AT(from), n, s)); }
hipError_t hipMemsetD8Async(hipDeviceptr_t d, unsigned char v, size_t n, hipStream_t s) { DO(cuMemsetD8Async(AT(d), v, n, s)); }
hipError_t hipModuleLoadData(hipModule_t *m, const void *image) { DO(cuModuleLoadData((void **)m, image)); }
hipError_t hipModuleGetFunction(hipFunction_t *f, hipModule_t m, const char *name) { DO(cuModuleGetFunction((void **)f, m, name)); }
hipError_t hipModuleLaunchKernel(hipFunction_t f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                 unsigned shared, hipStream_t s, void **args, void **extra) {
  if (bx % 64) return hipErrorInvalidValue;
  DO(cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, s, args, extra));
}
hipError_t hipStreamCreateWithFlags(hipStream_t *s, unsigned f) { DO(f == hipStreamNonBlocking ? cuStreamCreate((void **)s, f) : INVALID); }
hipError_t hipStreamSynchronize(hipStream_t s) { DO(cuStreamSynchronize(s)); }
hipError_t hipStreamBeginCapture(hipStream_t s, hipStreamCaptureMode m) { DO(cuStreamBeginCapture_v2(s, m)); }
hipError_t hipStreamEndCapture(hipStream_t s, hipGraph_t *g) { DO(cuStreamEndCapture(s, (void **)g)); }
hipError_t hipStreamGetCaptureInfo_v2(hipStream_t s, hipStreamCaptureStatus *status, unsigned long long *id, hipGraph_t *g,
                                      const hipGraphNode_t **nodes, size_t *n) {
  uint64_t number;
  int state;
  CUresult error = cuStreamGetCaptureInfo_v2(s, &state, &number, (void **)g, (void ***)nodes, n);
  *status = (hipStreamCaptureStatus)state;
  *id = number;
  DO(error);
}
hipError_t hipStreamUpdateCaptureDependencies(hipStream_t s, hipGraphNode_t *nodes, size_t n, unsigned flags) { DO(cuStreamUpdateCaptureDependencies(s, (void **)nodes, n, flags)); }
hipError_t hipGraphInstantiateWithFlags(hipGraphExec_t *e, hipGraph_t g, unsigned long long f) { DO(cuGraphInstantiateWithFlags((void **)e, g, f)); }
hipError_t hipGraphLaunch(hipGraphExec_t e, hipStream_t s) { DO(cuGraphLaunch(e, s)); }
hipError_t hipGraphDestroy(hipGraph_t g) { DO(cuGraphDestroy(g)); }
hipError_t hipGraphExecDestroy(hipGraphExec_t e) { DO(cuGraphExecDestroy(e)); }
hipError_t hipEventCreateWithFlags(hipEvent_t *e, unsigned f) { DO(cuEventCreate((void **)e, f)); }
hipError_t hipEventRecord(hipEvent_t e, hipStream_t s) { DO(cuEventRecord(e, s)); }
hipError_t hipEventElapsedTime(float *ms, hipEvent_t a, hipEvent_t b) { DO(cuEventElapsedTime(ms, a, b)); }
hipError_t hipEventDestroy(hipEvent_t e) { DO(cuEventDestroy_v2(e)); }
