/* See processor.h. On x86 the CPU is asked itself, and whether the system keeps the registers; on ARM
 * Linux says. This file is compiled for the oldest CPU of its architecture. */
#include "processor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

enum { EBX, ECX, EDX, EAX };

/* What of XCR0 the system must have enabled: SSE and AVX state; opmask and ZMM state; tiles. */
enum { PLAIN = 0, AVX = 0x6, AVX512 = 0xe6, TILES = 0x60000 };

typedef struct known {
  const char *name;
  uint32_t leaf, subleaf;
  uint8_t word, bit;
  uint32_t state;
} known;

/* Intel's manual, volume 2, CPUID. */
static const known KNOWN[] = {
    {"pni", 1, 0, ECX, 0, PLAIN},
    {"ssse3", 1, 0, ECX, 9, PLAIN},
    {"fma", 1, 0, ECX, 12, AVX},
    {"sse4_1", 1, 0, ECX, 19, PLAIN},
    {"sse4_2", 1, 0, ECX, 20, PLAIN},
    {"movbe", 1, 0, ECX, 22, PLAIN},
    {"popcnt", 1, 0, ECX, 23, PLAIN},
    {"avx", 1, 0, ECX, 28, AVX},
    {"f16c", 1, 0, ECX, 29, AVX},
    {"abm", 0x80000001, 0, ECX, 5, PLAIN},
    {"bmi1", 7, 0, EBX, 3, PLAIN},
    {"avx2", 7, 0, EBX, 5, AVX},
    {"bmi2", 7, 0, EBX, 8, PLAIN},
    {"avx512f", 7, 0, EBX, 16, AVX512},
    {"avx512dq", 7, 0, EBX, 17, AVX512},
    {"avx512ifma", 7, 0, EBX, 21, AVX512},
    {"avx512cd", 7, 0, EBX, 28, AVX512},
    {"avx512bw", 7, 0, EBX, 30, AVX512},
    {"avx512vl", 7, 0, EBX, 31, AVX512},
    {"avx512vbmi", 7, 0, ECX, 1, AVX512},
    {"avx512_vbmi2", 7, 0, ECX, 6, AVX512},
    {"gfni", 7, 0, ECX, 8, PLAIN},
    {"vaes", 7, 0, ECX, 9, AVX},
    {"vpclmulqdq", 7, 0, ECX, 10, AVX},
    {"avx512_vnni", 7, 0, ECX, 11, AVX512},
    {"avx512_bitalg", 7, 0, ECX, 12, AVX512},
    {"avx512_vpopcntdq", 7, 0, ECX, 14, AVX512},
    {"amx_bf16", 7, 0, EDX, 22, TILES},
    {"avx512_fp16", 7, 0, EDX, 23, AVX512},
    {"amx_tile", 7, 0, EDX, 24, TILES},
    {"amx_int8", 7, 0, EDX, 25, TILES},
    {"avx_vnni", 7, 1, EAX, 4, AVX},
    {"avx512_bf16", 7, 1, EAX, 5, AVX512},
};

static uint32_t enabled_state(void) {
  uint32_t words[4], low, high;
  if (!__get_cpuid(1, &words[EAX], &words[EBX], &words[ECX], &words[EDX])) return 0;
  if (!(words[ECX] >> 27 & 1)) return 0; /* OSXSAVE */
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

static bool has(const char *name) {
  for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
    const known *one = &KNOWN[i];
    if (strcmp(one->name, name)) continue;
    uint32_t words[4];
    return (enabled_state() & one->state) == one->state &&
           __get_cpuid_count(one->leaf, one->subleaf, &words[EAX], &words[EBX], &words[ECX],
                             &words[EDX]) &&
           words[one->word] >> one->bit & 1;
  }
  return false;
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

typedef struct known {
  const char *name;
  unsigned long word;
  uint8_t bit;
} known;

/* Linux, arch/arm64/include/uapi/asm/hwcap.h. */
static const known KNOWN[] = {
    {"asimd", AT_HWCAP, 1},    {"fphp", AT_HWCAP, 9},   {"asimdhp", AT_HWCAP, 10},
    {"asimddp", AT_HWCAP, 20}, {"i8mm", AT_HWCAP2, 13},
};

static bool has(const char *name) {
  for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
    if (!strcmp(KNOWN[i].name, name)) return getauxval(KNOWN[i].word) >> KNOWN[i].bit & 1;
  return false;
}

#else
#error "qc builds packages for x86-64 and AArch64"
#endif

const char *processor_lacks(const char *const *needed) {
  for (; *needed; needed++)
    if (!has(*needed)) return *needed;
  return NULL;
}
