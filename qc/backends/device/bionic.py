"""What a library for Android may ask of the system, and stubs to link it with: no NDK is needed."""

from __future__ import annotations

API_LEVEL = 29
"""Android 10, the first whose loader knows thread-local variables of ELF. The youngest function is
aligned_alloc, of level 28."""

LIBC = (
    "__errno", "__register_atfork", "__sched_cpualloc", "__sched_cpucount", "__sched_cpufree",
    "aligned_alloc", "calloc", "clock_gettime", "close", "free", "fstat", "getauxval",
    "madvise", "malloc", "memcmp", "memcpy", "memmove", "memset", "mmap", "munmap", "open",
    "pthread_create", "pthread_join", "pthread_key_create", "pthread_mutex_lock",
    "pthread_mutex_unlock", "pthread_once", "pthread_setspecific", "pthread_sigmask", "realloc",
    "sched_getaffinity", "sched_yield", "sigfillset", "snprintf", "strcmp", "strerror",
    "strlen", "syscall", "vsnprintf",
)  # fmt: skip
LIBM = ("exp", "expf", "fmaf", "log", "logf", "pow", "powf", "sin", "cos", "tanh", "erf")
"""Functions of bionic's libc.map.txt and libm.map.txt for arm64, up to that level. A library that
needs another does not link."""

STUBS = {"libc.so": LIBC, "libm.so": LIBM}
COMPILING = ("-ffixed-x18", "-mno-outline-atomics")
"""Register 18 is the system's (the shadow call stack); the functions of libgcc that choose how
atomics are done ask glibc for the CPU."""
LINKING = ("-nostdlib", "-Wl,-z,nodelete")
"""Without the start files of glibc nothing takes the handlers of fork back: the library stays."""


def stub_source(names: tuple[str, ...]) -> str:
    """Write a library that has functions of these names."""
    return "\n".join(f"void {name}(void) {{}}" for name in names) + "\n"
