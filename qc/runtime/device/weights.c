/* See weights.h. Nothing of the file is used before it has been compared with the program. */
#define _GNU_SOURCE /* madvise */
#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "failing.h"
#include "program.h"

enum { FORMAT = 1, LINE = 64, LANES = 16, KIND_TENSOR = 0, KIND_TEXT = 1, KIND_CODE = 2,
       LARGEST_PAGE = 65536 /* of any system: madvise wants whole pages */,
       POPULATE_READ = 22 /* MADV_POPULATE_READ; older headers lack the name */ };

typedef struct header {
  char magic[8]; /* "QCWEIGHT" */
  uint32_t format, entries;
  uint64_t bytes; /* of the file */
  uint8_t identity[32];
  uint64_t checksum; /* of header and entries, with zero in this place */
} header;

typedef struct entry {
  uint64_t offset, bytes, checksum;
  uint32_t kind, zero;
} entry;

_Static_assert(sizeof(header) == 64, "the header has 64 bytes");
_Static_assert(sizeof(entry) == 32, "an entry has 32 bytes");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are mapped as they are");

/* In 16 lanes of 32 bits the sum of the words, and the sum of these sums: as fast as memory, and any
 * single changed word changes it. The tail is padded with zeros; lanes are mixed as FNV-1a does. */
static uint64_t checksum(const uint8_t *bytes, size_t size) {
  uint32_t sum[LANES] = {0}, sums[LANES] = {0}, words[LANES];
  size_t whole = size / LINE * LINE;
  for (size_t at = 0; at < whole; at += LINE) {
    memcpy(words, bytes + at, LINE);
    for (int lane = 0; lane < LANES; lane++) {
      sum[lane] += words[lane];
      sums[lane] += sum[lane];
    }
  }
  if (whole < size) {
    memset(words, 0, LINE);
    memcpy(words, bytes + whole, size - whole);
    for (int lane = 0; lane < LANES; lane++) {
      sum[lane] += words[lane];
      sums[lane] += sum[lane];
    }
  }
  uint64_t mixed = 0xcbf29ce484222325u ^ size;
  for (int lane = 0; lane < LANES; lane++)
    mixed = (mixed ^ ((uint64_t)sums[lane] << 32 | sum[lane])) * 0x100000001b3u;
  return mixed;
}

static const entry *entries_of(const weights_file *file) {
  return (const entry *)(const void *)(file->bytes + sizeof(header));
}

const void *weights_tensor(const weights_file *file, uint32_t at) {
  return file->bytes + entries_of(file)[at].offset;
}

/* What the threads of a check share. */
typedef struct checking {
  const weights_file *file;
  uint32_t count;
  atomic_uint next, damaged; /* damaged: 1 + the number of an entry */
} checking;

typedef struct qc_group qc_group;
int TVMBackendParallelLaunch(int (*task)(int, qc_group *, void *), void *closure, int count);

/* Map the pages of an entry at once: a fault for each would take longer. Every thread maps what it is
 * going to read; a system that cannot (Linux before 5.14) takes the faults. */
static void populate(const weights_file *file, uint64_t offset, uint64_t size) {
  uint64_t from = offset & ~(uint64_t)(LARGEST_PAGE - 1);
  madvise((void *)(uintptr_t)(file->bytes + from), (size_t)(offset - from + size), POPULATE_READ);
}

static int check_entries(int task, qc_group *group, void *closure) {
  (void)task, (void)group;
  checking *all = closure;
  const entry *entries = entries_of(all->file);
  for (uint32_t at; (at = atomic_fetch_add(&all->next, 1)) < all->count;) {
    populate(all->file, entries[at].offset, entries[at].bytes);
    if (checksum(all->file->bytes + entries[at].offset, entries[at].bytes) != entries[at].checksum)
      atomic_store(&all->damaged, at + 1);
  }
  return 0;
}

static qcm_status check_header(const weights_file *file) {
  header head;
  if (file->size < sizeof head)
    return fail(QCM_BAD_FILE, "the weights have %zu bytes, fewer than a header", file->size);
  memcpy(&head, file->bytes, sizeof head);
  if (memcmp(head.magic, "QCWEIGHT", sizeof head.magic))
    return fail(QCM_BAD_FILE, "this is no file of weights: it does not start with QCWEIGHT");
  if (head.format != FORMAT)
    return fail(QCM_FOREIGN_FILE, "the weights have format %u; this library reads format %d",
                head.format, FORMAT);
  if (head.bytes != file->size)
    return fail(QCM_BAD_FILE, "the weights have %zu bytes and should have %llu: they are %s",
                file->size, (unsigned long long)head.bytes,
                file->size < head.bytes ? "truncated" : "damaged");
  const uint32_t needed = program.weights + program.codes;
  if (head.entries < needed || head.entries > needed + 1 ||
      sizeof head + (uint64_t)head.entries * sizeof(entry) > file->size)
    return fail(QCM_FOREIGN_FILE, "the weights hold %u tensors; this model has %u", head.entries,
                needed);
  return QCM_OK;
}

/* The checksum of the header, computed with a zero in its place. */
static qcm_status check_sum_of_header(const weights_file *file) {
  header head;
  memcpy(&head, file->bytes, sizeof head);
  uint64_t stored = head.checksum;
  head.checksum = 0;
  uint64_t found = checksum((const uint8_t *)&head, sizeof head);
  found ^= 3 * checksum(file->bytes + sizeof head, head.entries * sizeof(entry));
  if (found != stored) return fail(QCM_BAD_FILE, "the header of the weights is damaged");
  if (memcmp(head.identity, program.identity, sizeof head.identity))
    return fail(QCM_FOREIGN_FILE,
                "the weights are of another model or target than this library (%s)",
                program.target);
  return QCM_OK;
}

static qcm_status check_places(weights_file *file, uint32_t count) {
  const entry *entries = entries_of(file);
  const uint64_t from = sizeof(header) + (uint64_t)count * sizeof(entry);
  for (uint32_t at = 0; at < count; at++) {
    const entry *one = &entries[at];
    int is_text = at == program.weights + program.codes;
    uint32_t kind = is_text ? KIND_TEXT : at < program.weights ? KIND_TENSOR : KIND_CODE;
    if (one->offset % LINE || one->offset < from || one->offset > file->size ||
        one->bytes > file->size - one->offset)
      return fail(QCM_BAD_FILE, "tensor %u lies outside of the weights", at);
    if (one->kind != kind ||
        (!is_text && one->bytes != program_weight_bytes[at]))
      return fail(QCM_FOREIGN_FILE, "tensor %u has %llu bytes; this model needs %llu", at,
                  (unsigned long long)one->bytes,
                  is_text ? 0 : (unsigned long long)program_weight_bytes[at]);
    if (is_text) file->text = file->bytes + one->offset, file->text_size = one->bytes;
  }
  return QCM_OK;
}

static qcm_status check(weights_file *file, uint32_t flags) {
  qcm_status status = check_header(file);
  if (!status) status = check_sum_of_header(file);
  if (status) return status;
  uint32_t count = ((const header *)(const void *)file->bytes)->entries;
  status = check_places(file, count);
  if (status) return status;
  checking all = {.file = file, .count = count};
  /* Text tables are walked by what they say, and code is run: these are always checked. */
  if (flags & QCM_TRUST) all.next = program.weights;
  if (all.next < count) TVMBackendParallelLaunch(check_entries, &all, 0);
  if (all.damaged == 0) return QCM_OK;
  if (all.damaged - 1 == program.weights + program.codes)
    return fail(QCM_BAD_FILE, "the tokenizer in the weights is damaged");
  return fail(QCM_BAD_FILE, "%s %u of the weights is damaged: its checksum differs",
              all.damaged > program.weights ? "code" : "tensor", all.damaged - 1);
}

qcm_status weights_open(const char *path, uint32_t flags, weights_file *file) {
  *file = (weights_file){0};
  int descriptor = open(path, O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return fail(QCM_NO_FILE, "cannot open %s: %s", path, strerror(errno));
  struct stat facts;
  if (fstat(descriptor, &facts) || !S_ISREG(facts.st_mode) || facts.st_size <= 0 ||
      (uint64_t)facts.st_size > SIZE_MAX / 2) {
    close(descriptor);
    return fail(QCM_BAD_FILE, "%s is empty, or no file", path);
  }
  void *bytes = mmap(NULL, (size_t)facts.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  int reason = errno;
  close(descriptor);
  if (bytes == MAP_FAILED) return fail(QCM_NO_FILE, "cannot map %s: %s", path, strerror(reason));
  *file = (weights_file){.bytes = bytes, .size = (size_t)facts.st_size};
  qcm_status status = check(file, flags);
  if (status) weights_close(file);
  return status;
}

void weights_close(weights_file *file) {
  if (file->bytes) munmap((void *)(uintptr_t)file->bytes, file->size);
  *file = (weights_file){0};
}
