/* See cuda_driver.h. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>

#include "failing.h"

cuda_driver driver;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const char *missing = "no NVIDIA driver is installed"; /* NULL: nothing is */
static bool lacks_call; /* `missing` is its name */

/* The address of a function, which C lets nobody cast to from dlsym's result. */
static void find(void *library, const char *name, void *function, bool is_needed) {
  *(void **)function = dlsym(library, name);
  if (is_needed && !*(void **)function && !lacks_call) missing = name, lacks_call = true;
}

static void load(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return;
  missing = NULL;
#define CALL(name, arguments) find(library, #name, &driver.name, true);
  CUDA_CALLS(CALL)
#undef CALL
#define CALL(name, arguments) find(library, #name, &driver.name, false);
  CUDA_CALLS_SINCE_12(CALL)
#undef CALL
  if (!missing && driver.cuInit(0)) missing = "its NVIDIA driver does not start";
}

qcm_status cuda_driver_check(void) {
  pthread_once(&once, load);
  int count = 0;
  const char *reason = missing;
  if (!reason && (driver.cuDeviceGetCount(&count) || count < 1))
    reason = "its NVIDIA driver sees no GPU";
  if (!reason) return QCM_OK;
  return fail(QCM_NO_GPU, "this model runs on an NVIDIA GPU, and this machine has none (%s%s)",
              lacks_call ? "its driver is too old: it lacks " : "", reason);
}

qcm_status cuda_failed(int error, const char *what) {
  const char *reason = NULL;
  driver.cuGetErrorString(error, &reason);
  return fail(error == CUDA_OUT_OF_MEMORY ? QCM_NO_MEMORY : QCM_FAILED,
              "the GPU could not %s: %s (error %d)", what, reason ? reason : "unknown error", error);
}
