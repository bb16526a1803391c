/* Kernels of the toy language model in toy.py, written by hand against the interface of TVM. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "qcrt.h"

#define KERNEL(name) \
  int __tvm_ffi_##name(void *self, const qc_any *args, int32_t nargs, qc_any *result)
#define TENSOR(i) ((const qc_tensor *)args[i].value.pointer)
#define DATA(type, i) ((type *)TENSOR(i)->data)
#define SIZE(i, d) (TENSOR(i)->shape[d])

typedef struct group {
  void *sync;
  int32_t num_task;
} group;
int TVMBackendParallelLaunch(int (*task)(int, group *, void *), void *closure, int num_task);
int TVMBackendParallelBarrier(int task_id, group *env);
void *TVMBackendAllocWorkspace(int type, int id, uint64_t bytes, int code, int bits);
int TVMBackendFreeWorkspace(int type, int id, void *pointer);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

static int fail(const char *why) {
  const char *parts[] = {"toy: ", why};
  TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
  return -1;
}

/* (tokens i64[batch, seq], table f32[V, D], x f32[batch, seq, D]) */
KERNEL(embed) {
  if (nargs != 3 || args[0].type_index != 7 || TENSOR(2)->ndim != 3) return fail("bad arguments");
  int64_t count = SIZE(0, 0) * SIZE(0, 1), width = SIZE(1, 1);
  for (int64_t i = 0; i < count; i++)
    memcpy(DATA(float, 2) + i * width, DATA(float, 1) + DATA(int64_t, 0)[i] * width, 4 * width);
  return 0;
}

/* (x f32[batch, seq, D], state f32[batch, context, D], past): put x behind the past. */
KERNEL(append) {
  int64_t seq = SIZE(0, 1), width = SIZE(0, 2), past = args[2].value.integer;
  if (past + seq > SIZE(1, 1)) return fail("the state is too small");
  for (int64_t b = 0; b < SIZE(0, 0); b++)
    memcpy(DATA(float, 1) + (b * SIZE(1, 1) + past) * width, DATA(float, 0) + b * seq * width,
           4 * seq * width);
  return 0;
}

/* (x, shifted f32[D]): copy the first row of x there; the pointer already depends on the past. */
KERNEL(copy_row) {
  memcpy(DATA(float, 1), DATA(float, 0), 4 * SIZE(0, 2));
  return 0;
}

typedef struct mix_arguments {
  const qc_tensor *state, *y;
  int64_t past;
} mix_arguments;

static int mix_part(int task_id, group *env, void *closure) {
  const mix_arguments *a = closure;
  int64_t seq = a->y->shape[1], width = a->y->shape[2], rows = a->y->shape[0] * seq;
  float *sum = TVMBackendAllocWorkspace(1, 0, 4 * width, 2, 32);
  if (!sum || (uintptr_t)sum % 64) return fail("bad workspace");
  for (int64_t row = task_id; row < rows; row += env->num_task) {
    int64_t b = row / seq, last = a->past + row % seq;
    memset(sum, 0, 4 * width);
    for (int64_t p = 0; p <= last; p++)
      for (int64_t d = 0; d < width; d++)
        sum[d] += ((float *)a->state->data)[(b * a->state->shape[1] + p) * width + d];
    for (int64_t d = 0; d < width; d++)
      ((float *)a->y->data)[row * width + d] = sum[d] / (float)(last + 1);
  }
  return TVMBackendFreeWorkspace(1, 0, sum);
}

/* (state, y f32[batch, seq, D], past): y[i] = mean of the state up to position past + i. */
KERNEL(mix) {
  mix_arguments closure = {TENSOR(0), TENSOR(1), args[2].value.integer};
  return TVMBackendParallelLaunch(mix_part, &closure, 0);
}

/* (y, table, logits f32[batch, keep, V]) for the last `keep` positions */
KERNEL(head) {
  int64_t seq = SIZE(0, 1), width = SIZE(0, 2), keep = SIZE(2, 1), words = SIZE(1, 0);
  for (int64_t b = 0; b < SIZE(0, 0); b++)
    for (int64_t k = 0; k < keep; k++)
      for (int64_t w = 0; w < words; w++) {
        float sum = 0;
        for (int64_t d = 0; d < width; d++)
          sum += DATA(float, 0)[(b * seq + seq - keep + k) * width + d] *
                 DATA(float, 1)[w * width + d];
        DATA(float, 2)[(b * keep + k) * words + w] = sum;
      }
  return 0;
}

/* (x, y): y = x + 1 */
KERNEL(increment) {
  int64_t count = 1;
  for (int d = 0; d < TENSOR(0)->ndim; d++) count *= SIZE(0, d);
  for (int64_t i = 0; i < count; i++) DATA(float, 1)[i] = DATA(float, 0)[i] + 1;
  return 0;
}

enum { TOGETHER = 1 << 20 }; /* tasks: as many as run at the same time */

static int refuse_part(int task_id, group *env, void *closure) {
  (void)closure;
  if (task_id == env->num_task - 1) return fail("the last task refuses");
  return TVMBackendParallelBarrier(task_id, env); /* never filled: must not hang */
}

/* (): fails in one task while the others wait at a barrier */
KERNEL(refuse) { return TVMBackendParallelLaunch(refuse_part, 0, TOGETHER); }

static int waiting_part(int task_id, group *env, void *closure) {
  (void)closure;
  return TVMBackendParallelBarrier(task_id, env);
}

/* (): waits at a barrier without having asked for tasks that run together */
KERNEL(wait_alone) { return TVMBackendParallelLaunch(waiting_part, 0, 0); }

typedef struct rounds_arguments {
  float *cells;
  int64_t count, rounds;
} rounds_arguments;

static int rounds_part(int task_id, group *env, void *closure) {
  const rounds_arguments *a = closure;
  int64_t n = a->count;
  for (int64_t r = 0; r < a->rounds; r++) {
    const float *from = a->cells + (r % 2) * n;
    float *to = a->cells + (1 - r % 2) * n;
    for (int64_t i = task_id; i < n; i += env->num_task) to[i] = from[(i + 1) % n] + 1;
    if (TVMBackendParallelBarrier(task_id, env)) return -1;
  }
  return 0;
}

/* (cells f32[2, n], rounds): each round rotates and adds 1, so a missed barrier shows */
KERNEL(rounds) {
  rounds_arguments closure = {DATA(float, 0), SIZE(0, 1), args[1].value.integer};
  return TVMBackendParallelLaunch(rounds_part, &closure, TOGETHER);
}

/* (pattern i64[n]): allocate n blocks of growing size and free them in the order of the pattern */
KERNEL(workspaces) {
  int64_t n = SIZE(0, 0);
  unsigned char *blocks[64];
  for (int64_t i = 0; i < n; i++) {
    uint64_t bytes = (uint64_t)1 << (i % 20);
    blocks[i] = TVMBackendAllocWorkspace(1, 0, bytes, 0, 8);
    if (!blocks[i] || (uintptr_t)blocks[i] % 64) return fail("bad workspace");
    memset(blocks[i], (int)i, bytes);
  }
  for (int64_t i = 0; i < n; i++) {
    int64_t at = DATA(int64_t, 0)[i];
    uint64_t bytes = (uint64_t)1 << (at % 20);
    if (blocks[at][0] != at || blocks[at][bytes - 1] != at) return fail("blocks overlap");
    TVMBackendFreeWorkspace(1, 0, blocks[at]);
  }
  if (TVMBackendAllocWorkspace(1, 0, ~(uint64_t)0 / 2, 0, 8)) return fail("a huge block was given");
  return 0;
}
