/* What glibc's headers make of errno and pthread_atfork, from what Android's libc has. Linked into
 * libraries for Android, which are compiled with glibc's headers: both systems have the kernel's
 * structures on arm64, and locks and keys that are zero when new. */
#include <stddef.h>

#define HIDDEN __attribute__((visibility("hidden")))

int *__errno(void);
int __register_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *library);

HIDDEN void *__dso_handle = &__dso_handle;

HIDDEN int *__errno_location(void) { return __errno(); }

HIDDEN int pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void)) {
  return __register_atfork(prepare, parent, child, &__dso_handle);
}
