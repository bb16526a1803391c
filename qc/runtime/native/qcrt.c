/* See qcrt.h. In three parts: the thread pool, the workspaces, and running a list of steps. */
#define _GNU_SOURCE /* sched_getaffinity, syscall */
#include "qcrt.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define QC_EXPORT __attribute__((visibility("default")))
/* Hidden: a kernel of this library must find these functions, and not TVM's or another model's. */
#define QC_FOR_KERNELS __attribute__((visibility("hidden")))

_Static_assert(sizeof(qc_any) == 16, "TVMFFIAny has 16 bytes");
_Static_assert(offsetof(qc_any, value) == 8, "the value of a TVMFFIAny is its second half");
_Static_assert(sizeof(void *) != 8 || sizeof(qc_tensor) == 48, "DLTensor has 48 bytes");
_Static_assert(sizeof(void *) != 8 || sizeof(qc_step) == 24, "qc_step has 24 bytes");

enum {
  QC_LINE = 64,           /* bytes: a cache line, the widest vector and TVM's alignment */
  QC_MAX_THREADS = 1024,  /* far above any useful count; bounds a mistaken request */
  QC_ERROR_BYTES = 1024,
  QC_SPINS_A_LOOK = 64,   /* pauses between two looks at the clock, or two yields */
  QC_TASKS_A_THREAD = 8,  /* of a launch, where that does not make more than... */
  QC_MANY_TASKS = 32,     /* claims of one counter, one after another */
  QC_SHARES = 16,         /* where in a word of tickets the share of a claim is */
  QC_MOST_TASKS = 0xffff,
};

/* Nanoseconds that a thread spins before it sleeps. The gap between two kernels is well below what a
 * worker spins; the gap between two tokens usually is. A sleeping thread takes about 50 us to wake. */
static const int64_t QC_WORKER_SPINS = 300 * 1000, QC_LAUNCHER_SPINS = 100 * 1000;

static inline void qc_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#else
  atomic_signal_fence(memory_order_seq_cst);
#endif
}

static int64_t qc_nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- Temporary memory of kernels: one stack of blocks for every thread ------------------------- */

/* Stands in front of every block. A block is freed by marking it; the memory returns when it and all
 * blocks above it are marked, so frees out of order are correct and frees in order cost nothing. */
typedef struct qc_block {
  _Alignas(QC_LINE) struct qc_block *below; /* in the same chunk, or NULL */
  struct qc_chunk *chunk;
  bool free;
} qc_block;

/* A piece of memory that blocks are cut from. Chunks never move while blocks live in them. */
typedef struct qc_chunk {
  _Alignas(QC_LINE) struct qc_chunk *below;
  qc_block *top; /* the last block, or NULL */
  size_t capacity, used;
} qc_chunk;

static _Thread_local qc_chunk *qc_workspace;
/* Frees the workspace of a thread that ends. */
static pthread_key_t qc_workspace_key;
static bool qc_workspace_key_made;

static size_t qc_round_up(size_t bytes) { return (bytes + QC_LINE - 1) / QC_LINE * QC_LINE; }

static void qc_free_chunks(void *chunks) {
  for (qc_chunk *chunk = chunks, *below; chunk; chunk = below) {
    below = chunk->below;
    free(chunk);
  }
}

static void qc_set_workspace(qc_chunk *chunk) {
  qc_workspace = chunk;
  if (qc_workspace_key_made) pthread_setspecific(qc_workspace_key, chunk);
}

static qc_chunk *qc_push_chunk(size_t capacity) {
  qc_chunk *chunk = aligned_alloc(QC_LINE, sizeof(qc_chunk) + qc_round_up(capacity));
  if (!chunk) return NULL;
  *chunk = (qc_chunk){.below = qc_workspace, .capacity = capacity};
  qc_set_workspace(chunk);
  return chunk;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

QC_FOR_KERNELS void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes,
                                              int dtype_code, int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  qc_chunk *chunk = qc_workspace;
  if (bytes <= SIZE_MAX / 4) {
    size_t needed = sizeof(qc_block) + qc_round_up(bytes ? (size_t)bytes : 1);
    if (!chunk || chunk->capacity - chunk->used < needed) {
      size_t doubled = chunk ? 2 * chunk->capacity : 64 * 1024;
      size_t capacity = needed > doubled ? needed : doubled;
      if (chunk && !chunk->top) { /* empty: replace it, so that one chunk remains in the end */
        qc_set_workspace(chunk->below);
        free(chunk);
      }
      chunk = qc_push_chunk(capacity);
    }
    if (chunk) {
      qc_block *block = (qc_block *)((char *)(chunk + 1) + chunk->used);
      *block = (qc_block){.below = chunk->top, .chunk = chunk};
      chunk->top = block;
      chunk->used += needed;
      return block + 1;
    }
  }
  const char *parts[] = {"a kernel found no memory for its workspace"};
  TVMFFIErrorSetRaisedFromCStrParts("MemoryError", parts, 1);
  return NULL;
}

QC_FOR_KERNELS int TVMBackendFreeWorkspace(int device_type, int device_id, void *pointer) {
  (void)device_type, (void)device_id;
  if (!pointer) return 0;
  qc_block *block = (qc_block *)pointer - 1;
  qc_chunk *chunk = block->chunk;
  block->free = true;
  while (chunk->top && chunk->top->free) {
    chunk->used = (size_t)((char *)chunk->top - (char *)(chunk + 1));
    chunk->top = chunk->top->below;
  }
  /* The topmost chunk is the largest: the empty ones below it are not needed again. */
  while (qc_workspace && !qc_workspace->top && qc_workspace->below && !qc_workspace->below->top) {
    qc_chunk *small = qc_workspace->below;
    qc_workspace->below = small->below;
    free(small);
  }
  return 0;
}

/* ---- Threads --------------------------------------------------------------------------------- */

/* TVMParallelGroupEnv. */
typedef struct qc_group {
  void *sync; /* the qc_pool where the tasks run at the same time, or NULL */
  int32_t num_task;
} qc_group;

/* FTVMParallelLambda: run part `task_id` of `group->num_task`. */
typedef int (*qc_task)(int task_id, qc_group *group, void *closure);

/* A launch is cut into more tasks than there are threads, and whoever is free claims the next one: a
 * thread that the system has taken its CPU from, or whose CPU is slower for a while, holds up the task
 * that it is in, and not its whole share. */
typedef struct qc_pool {
  /* Held through a run, a change of the thread count and a fork: whoever holds it owns every plain
   * field below, and hands the fields of a launch to the workers through `tickets`. */
  pthread_mutex_t run_lock;
  int wanted; /* threads, the launching one included; 0: not yet known */
  int count;  /* of workers that run; 0 before the first launch */
  pthread_t *workers;
  bool crowded; /* more threads than CPUs: waiting threads sleep at once */
  uint32_t launches;

  /* The launch at hand: written before `tickets`, read by who has claimed one of its tasks. The next
   * launch comes after the last of them is done. */
  qc_task task;
  void *closure;
  qc_group group;

  /* The number of the launch, above the share of what is left that a claim takes (1 / that), above the
   * count of its tasks that nobody has claimed: one word, so that a thread that was away for some
   * launches cannot claim a task that it has not seen. */
  _Alignas(QC_LINE) _Atomic uint64_t tickets;
  /* Tasks of the launch that are not done. Decremented and read in an order that passes on what the
   * tasks wrote to the launching thread, which may sleep on it. */
  _Alignas(QC_LINE) atomic_uint unfinished;
  atomic_int launcher_sleeps;
  /* Raised once a launch, for those who sleep. A worker counts itself in `sleepers` and then looks at
   * `generation` again; a launch raises `generation` and then looks at `sleepers`. Both orders are
   * seq_cst, so at least one of the two sees the other: a worker never sleeps through a launch, and no
   * system call is made while all workers spin. */
  _Alignas(QC_LINE) atomic_uint generation;
  atomic_int sleepers;
  atomic_bool stopping;
  /* Set when a task fails; lets the others leave a barrier that will never fill. */
  atomic_int failed;
  /* The barrier: `arrived` counts, the last one to arrive resets it and raises `phase`. */
  _Alignas(QC_LINE) atomic_int arrived;
  _Alignas(QC_LINE) atomic_uint phase;

  /* The first error of a run; `error_taken` is exchanged to 1 by the thread that may write it. */
  _Alignas(QC_LINE) atomic_int error_taken;
  char error[QC_ERROR_BYTES];
} qc_pool;

static qc_pool qc_the_pool = {.run_lock = PTHREAD_MUTEX_INITIALIZER};

/* What the calling thread is doing, so that a launch knows whether it holds the lock. */
typedef enum qc_role { QC_OUTSIDE = 0, QC_RUNNING, QC_IN_TASK } qc_role;
static _Thread_local qc_role qc_this_role;
static _Thread_local char qc_this_error[QC_ERROR_BYTES];

static long qc_futex(atomic_uint *word, int operation, uint32_t value) {
  return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* Spin until `word` is no longer `value`, or for some time; say whether it changed. Spinning does not
 * yield: on a busy machine the system would give the CPU away for milliseconds, at every launch. */
static bool qc_spin(qc_pool *pool, atomic_uint *word, uint32_t value, int64_t nanoseconds) {
  int64_t deadline = 0;
  while (!pool->crowded) {
    for (int i = 0; i < QC_SPINS_A_LOOK; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != value) return true;
      qc_pause();
    }
    int64_t now = qc_nanoseconds();
    if (!deadline) deadline = now + nanoseconds;
    if (now >= deadline) break;
  }
  return false;
}

/* Wait for a launch after `seen`: spin for a while, then sleep. */
static void qc_await_launch(qc_pool *pool, uint32_t seen) {
  if (qc_spin(pool, &pool->generation, seen, QC_WORKER_SPINS)) return;
  atomic_fetch_add_explicit(&pool->sleepers, 1, memory_order_seq_cst);
  /* The kernel compares again, under its own lock, so a launch from here on wakes us or is seen. */
  while (atomic_load_explicit(&pool->generation, memory_order_seq_cst) == seen)
    qc_futex(&pool->generation, FUTEX_WAIT, seen);
  atomic_fetch_sub_explicit(&pool->sleepers, 1, memory_order_relaxed);
}

static void qc_raise_generation(qc_pool *pool) {
  atomic_fetch_add_explicit(&pool->generation, 1, memory_order_seq_cst);
  if (atomic_load_explicit(&pool->sleepers, memory_order_seq_cst))
    qc_futex(&pool->generation, FUTEX_WAKE, INT32_MAX);
}

/* Claim tasks of the launch at hand: fewer and fewer, since each claim moves a cache line between
 * CPUs, and the last ones make up for who is late. Return how many, from `first` on; 0 where none is
 * left. */
static uint32_t qc_claim(qc_pool *pool, int *first) {
  uint64_t tickets = atomic_load_explicit(&pool->tickets, memory_order_acquire);
  for (uint32_t left, count; (left = tickets & QC_MOST_TASKS);) {
    count = left / (tickets >> QC_SHARES & QC_MOST_TASKS);
    if (!count) count = 1;
    if (atomic_compare_exchange_weak_explicit(&pool->tickets, &tickets, tickets - count,
                                              memory_order_acquire, memory_order_acquire)) {
      *first = pool->group.num_task - (int)left;
      return count;
    }
  }
  return 0;
}

static void qc_do_task(qc_pool *pool, int task_id) {
  qc_role before = qc_this_role;
  qc_this_role = QC_IN_TASK;
  if (pool->task(task_id, &pool->group, pool->closure))
    atomic_store_explicit(&pool->failed, 1, memory_order_release);
  qc_this_role = before;
}

/* Do tasks of the launch at hand until none is left to claim. */
static void qc_help(qc_pool *pool) {
  int first;
  for (uint32_t count; (count = qc_claim(pool, &first));) {
    for (uint32_t i = 0; i < count; i++) qc_do_task(pool, first + (int)i);
    /* seq_cst as in qc_raise_generation: the last one sees that the launcher sleeps, or it sees 0 */
    if (atomic_fetch_sub_explicit(&pool->unfinished, count, memory_order_seq_cst) == count &&
        atomic_load_explicit(&pool->launcher_sleeps, memory_order_seq_cst))
      qc_futex(&pool->unfinished, FUTEX_WAKE, 1);
  }
}

/* Wait until all tasks are done: those that others have claimed. */
static void qc_await_tasks(qc_pool *pool) {
  for (uint32_t left; (left = atomic_load_explicit(&pool->unfinished, memory_order_acquire));) {
    if (qc_spin(pool, &pool->unfinished, left, QC_LAUNCHER_SPINS)) continue;
    atomic_store_explicit(&pool->launcher_sleeps, 1, memory_order_seq_cst);
    while ((left = atomic_load_explicit(&pool->unfinished, memory_order_seq_cst)))
      qc_futex(&pool->unfinished, FUTEX_WAIT, left);
    atomic_store_explicit(&pool->launcher_sleeps, 0, memory_order_relaxed);
  }
}

static void *qc_work(void *argument) {
  qc_pool *pool = argument;
  for (;;) {
    uint32_t seen = atomic_load_explicit(&pool->generation, memory_order_acquire);
    if (atomic_load_explicit(&pool->stopping, memory_order_relaxed)) return NULL;
    qc_help(pool);
    qc_await_launch(pool, seen);
  }
}

static int qc_available_cpus(void) {
  /* The mask of a machine may be wider than cpu_set_t; the kernel says EINVAL until it fits. */
  for (size_t cpus = CPU_SETSIZE; cpus <= 1u << 20; cpus *= 2) {
    cpu_set_t *mask = CPU_ALLOC(cpus);
    if (!mask) break;
    int failed = sched_getaffinity(0, CPU_ALLOC_SIZE(cpus), mask);
    int found = failed ? 0 : CPU_COUNT_S(CPU_ALLOC_SIZE(cpus), mask);
    int reason = errno;
    CPU_FREE(mask);
    if (!failed) return found > 0 ? found : 1;
    if (reason != EINVAL) break;
  }
  return 1;
}

static int qc_wanted_threads(qc_pool *pool) {
  if (pool->wanted < 1) pool->wanted = qc_available_cpus();
  if (pool->wanted > QC_MAX_THREADS) pool->wanted = QC_MAX_THREADS;
  return pool->wanted;
}

/* Start the workers unless they run. A machine that gives fewer threads gives a slower run. */
static void qc_start_workers(qc_pool *pool) {
  int workers = qc_wanted_threads(pool) - 1;
  if (pool->count || workers < 1) return;
  pool->workers = calloc((size_t)workers, sizeof(pthread_t));
  if (!pool->workers) return;
  pool->crowded = workers + 1 > qc_available_cpus();
  sigset_t all, before; /* signals are for the threads of the host program */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool->count < workers) {
    if (pthread_create(&pool->workers[pool->count], NULL, qc_work, pool)) break;
    pool->count++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pool->wanted = pool->count + 1;
}

static void qc_stop_workers(qc_pool *pool) {
  atomic_store_explicit(&pool->stopping, true, memory_order_relaxed);
  qc_raise_generation(pool);
  for (int i = 0; i < pool->count; i++) pthread_join(pool->workers[i], NULL);
  atomic_store_explicit(&pool->stopping, false, memory_order_relaxed);
  free(pool->workers);
  pool->workers = NULL;
  pool->count = 0;
}

/* How many tasks: what a kernel asks for, up to the threads, and these run at the same time; where it
 * does not ask, some for every thread, which may run one after another. */
static int qc_count_tasks(int num_task, int threads) {
  if (num_task >= 1) return num_task < threads ? num_task : threads;
  int tasks = threads * QC_TASKS_A_THREAD;
  if (tasks > QC_MANY_TASKS) tasks = QC_MANY_TASKS;
  return threads == 1 ? 1 : tasks < threads ? threads : tasks;
}

static int qc_launch(qc_pool *pool, qc_task task, void *closure, int num_task) {
  qc_start_workers(pool);
  pool->task = task;
  pool->closure = closure;
  pool->group.num_task = qc_count_tasks(num_task, pool->count + 1);
  pool->group.sync = num_task >= 1 ? pool : NULL;
  /* Relaxed: workers see these through `tickets`, and none is inside a launch now. */
  atomic_store_explicit(&pool->failed, 0, memory_order_relaxed);
  atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
  if (pool->group.num_task == 1) {
    qc_do_task(pool, 0);
  } else {
    uint32_t tasks = (uint32_t)pool->group.num_task;
    atomic_store_explicit(&pool->unfinished, tasks, memory_order_relaxed);
    uint32_t shares = pool->group.sync ? QC_MOST_TASKS : (uint32_t)pool->count + 2;
    uint64_t tickets = (uint64_t)++pool->launches << 32 | shares << QC_SHARES | tasks;
    atomic_store_explicit(&pool->tickets, tickets, memory_order_release);
    qc_raise_generation(pool);
    qc_help(pool);
    qc_await_tasks(pool);
  }
  return atomic_load_explicit(&pool->failed, memory_order_relaxed) ? -1 : 0;
}

QC_FOR_KERNELS int TVMBackendParallelLaunch(qc_task task, void *closure, int num_task) {
  qc_pool *pool = &qc_the_pool;
  if (qc_this_role == QC_IN_TASK) { /* nested: this thread does it all */
    qc_group alone = {.num_task = 1};
    return task(0, &alone, closure);
  }
  if (qc_this_role == QC_RUNNING) return qc_launch(pool, task, closure, num_task);
  pthread_mutex_lock(&pool->run_lock); /* a kernel called from C, without qc_run */
  int failed = qc_launch(pool, task, closure, num_task);
  pthread_mutex_unlock(&pool->run_lock);
  return failed;
}

QC_FOR_KERNELS int TVMBackendParallelBarrier(int task_id, qc_group *group) {
  (void)task_id;
  qc_pool *pool = group->sync;
  if (group->num_task == 1) return 0;
  if (!pool) {
    const char *parts[] = {"a kernel waits for tasks that need not run at the same time"};
    TVMFFIErrorSetRaisedFromCStrParts("RuntimeError", parts, 1);
    return -1;
  }
  /* No one can raise `phase` before this task has arrived, so reading it first is not a race. */
  uint32_t phase = atomic_load_explicit(&pool->phase, memory_order_relaxed);
  /* acq_rel: the last task to arrive has seen what the others wrote, and passes it on by `phase`. */
  if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 == group->num_task) {
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->phase, phase + 1, memory_order_release);
    return 0;
  }
  for (int spins = 1; atomic_load_explicit(&pool->phase, memory_order_acquire) == phase; spins++) {
    qc_pause();
    if (spins % QC_SPINS_A_LOOK) continue;
    if (atomic_load_explicit(&pool->failed, memory_order_acquire)) return -1;
    sched_yield();
  }
  return 0;
}

/* A forked child has the forking thread only: it starts its own workers at its first launch. */
static void qc_before_fork(void) { pthread_mutex_lock(&qc_the_pool.run_lock); }
static void qc_after_fork_in_parent(void) { pthread_mutex_unlock(&qc_the_pool.run_lock); }
static void qc_after_fork_in_child(void) {
  qc_pool *pool = &qc_the_pool;
  free(pool->workers);
  pool->workers = NULL;
  pool->count = 0;
  atomic_store_explicit(&pool->sleepers, 0, memory_order_relaxed);
  atomic_store_explicit(&pool->launcher_sleeps, 0, memory_order_relaxed);
  pthread_mutex_unlock(&pool->run_lock);
}

static void qc_prepare_process(void) {
  qc_workspace_key_made = !pthread_key_create(&qc_workspace_key, qc_free_chunks);
  pthread_atfork(qc_before_fork, qc_after_fork_in_parent, qc_after_fork_in_child);
}

static void qc_enter(qc_pool *pool) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, qc_prepare_process);
  pthread_mutex_lock(&pool->run_lock);
}

/* ---- Errors and runs ------------------------------------------------------------------------- */

QC_FOR_KERNELS void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts,
                                                      int32_t count) {
  qc_pool *pool = &qc_the_pool;
  char *text = qc_this_error;
  if (qc_this_role != QC_OUTSIDE) { /* perhaps a worker: keep it where qc_run finds it */
    if (atomic_exchange_explicit(&pool->error_taken, 1, memory_order_relaxed)) return;
    text = pool->error;
  }
  size_t used = (size_t)snprintf(text, QC_ERROR_BYTES, "%s: ", kind);
  for (int32_t i = 0; i < count && used < QC_ERROR_BYTES; i++)
    used += (size_t)snprintf(text + used, QC_ERROR_BYTES - used, "%s", parts[i] ? parts[i] : "");
}

/* Kernels compiled as a "system library" announce their names; steps carry pointers instead. */
QC_FOR_KERNELS int TVMFFIEnvModRegisterSystemLibSymbol(const char *name, void *symbol) {
  (void)name, (void)symbol;
  return 0;
}

static int64_t qc_run_steps(const qc_step *steps, int64_t count, double *seconds) {
  qc_pool *pool = &qc_the_pool;
  qc_this_error[0] = '\0';
  qc_enter(pool);
  qc_this_role = QC_RUNNING;
  pool->error[0] = '\0';
  atomic_store_explicit(&pool->error_taken, 0, memory_order_relaxed);
  int64_t failed = -1;
  for (int64_t i = 0; i < count && failed < 0; i++) {
    int64_t start = seconds ? qc_nanoseconds() : 0;
    qc_any result = {.type_index = QC_NONE};
    if (steps[i].function(NULL, steps[i].args, steps[i].nargs, &result)) failed = i;
    if (seconds) seconds[i] += 1e-9 * (double)(qc_nanoseconds() - start);
  }
  if (failed >= 0) memcpy(qc_this_error, pool->error, QC_ERROR_BYTES);
  qc_this_role = QC_OUTSIDE;
  pthread_mutex_unlock(&pool->run_lock);
  return failed;
}

QC_EXPORT int64_t qc_run(const qc_step *steps, int64_t count) {
  return qc_run_steps(steps, count, NULL);
}

QC_EXPORT int64_t qc_profile(const qc_step *steps, int64_t count, double *seconds) {
  return qc_run_steps(steps, count, seconds);
}

QC_EXPORT const char *qc_last_error(void) { return qc_this_error; }

QC_EXPORT int qc_abi_version(void) { return QC_ABI_VERSION; }

QC_EXPORT int qc_set_threads(int count) {
  qc_pool *pool = &qc_the_pool;
  qc_enter(pool);
  pool->wanted = count;
  int threads = qc_wanted_threads(pool);
  if (pool->count && pool->count + 1 != threads) qc_stop_workers(pool);
  pthread_mutex_unlock(&pool->run_lock);
  return threads;
}

QC_EXPORT int qc_request_tiles(void) {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  /* Linux 5.16 and newer, Documentation/arch/x86/xstate.rst; older headers lack the names. */
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? errno : 0;
#else
  return ENOSYS;
#endif
}
