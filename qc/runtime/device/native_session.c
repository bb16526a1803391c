/* See session.h: steps are calls of kernels on the CPU. A session is one piece of memory: the tables
 * that kernels are called with, the input, the logits, the arena of scratch values, keys and values. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#include <stdlib.h>
#include <sys/mman.h>

#include "failing.h"
#include "qcrt.h"
#include "session.h"

enum { LINE = 64,
       ALL_THREADS = 1 << 20 /* tasks, of which as many come as there are threads, at once */ };

typedef struct qc_group qc_group;
int TVMBackendParallelLaunch(int (*task)(int, qc_group *, void *), void *closure, int count);
int TVMBackendParallelBarrier(int task, qc_group *group);
void *TVMBackendAllocWorkspace(int device, int id, uint64_t bytes, int code, int bits);
int TVMBackendFreeWorkspace(int device, int id, void *pointer);

qcm_status machine_check(void) {
  const char *lacking = program_lacks();
  if (lacking)
    return fail(QCM_BAD_CPU, "this model was built for %s; this CPU has no %s", program.target,
                lacking);
  if (program.tiles && qc_request_tiles())
    return fail(QCM_BAD_CPU, "the system refuses AMX tiles to this process");
  return QCM_OK;
}

qcm_status machine_open(qcm_model *model) {
  (void)model; /* weights are read where they are mapped */
  return QCM_OK;
}

void machine_close(qcm_model *model) { (void)model; }

/* What the kernels of one plan are called with. */
typedef struct tables {
  qc_tensor *tensors;
  char **bases; /* of tensors, before their offsets */
  qc_any *arguments;
  qc_step *steps;
} tables;

typedef struct native_session {
  qcm_session shown;
  size_t bytes; /* of this mapping */
  tables plans[PLANS];
  int64_t *sizes, *shapes;
  char *arena, *states;
} native_session;

static size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

/* Take `bytes` from *at, which may be a plain count: NULL plus bytes. */
static void *take(char **at, size_t bytes) {
  char *taken = *at;
  *at += lines(bytes);
  return taken;
}

/* Lay a session out from `start` on; return the end. */
static char *lay_out(native_session *session, char *start, const int64_t *sizes) {
  char *at = start;
  take(&at, sizeof *session);
  session->sizes = take(&at, program.sizes * sizeof(int64_t));
  session->shapes = take(&at, program.dims * sizeof(int64_t));
  for (int plan = 0; plan < PLANS; plan++) {
    tables *into = &session->plans[plan];
    into->tensors = take(&at, program.tensors * sizeof(qc_tensor));
    into->bases = take(&at, program.tensors * sizeof(char *));
    into->arguments = take(&at, program.arguments * sizeof(qc_any));
    into->steps = take(&at, program.steps * sizeof(qc_step));
  }
  session->shown.tokens = take(&at, (size_t)program.chunk * program.token_bits / 8);
  session->shown.logits = take(&at, (size_t)program.vocabulary * program.logit_bits / 8);
  session->shown.candidates = take(&at, (size_t)program.vocabulary * sizeof(choosing_entry));
  uint32_t most = program.arena[PLAN_STEP] > program.arena[PLAN_PREFILL]
                      ? program.arena[PLAN_STEP]
                      : program.arena[PLAN_PREFILL];
  session->arena = take(&at, (size_t)most * LINE);
  session->states = at;
  for (uint32_t i = 0; i < program.states; i++)
    take(&at, (size_t)state_bytes(&program_states[i], sizes));
  return at;
}

size_t session_bytes(int64_t context) {
  int64_t *sizes = malloc(program.sizes * sizeof *sizes);
  if (!sizes) return 0;
  native_session measured;
  find_sizes(context, 0, 1, sizes);
  size_t bytes = (size_t)(lay_out(&measured, (char *)LINE, sizes) - (char *)LINE);
  free(sizes);
  return bytes;
}

static char *base_of(const native_session *session, const program_tensor *tensor, int plan,
                     char *const *states) {
  uint32_t at = tensor->at[plan];
  switch ((program_memory)tensor->memory) {
    case MEMORY_WEIGHT:
      return (char *)(uintptr_t)weights_tensor(&session->shown.model->weights, at);
    case MEMORY_STATE: return states[at];
    case MEMORY_ARENA: return session->arena + (size_t)at * LINE;
    case MEMORY_TOKENS: return session->shown.tokens;
    case MEMORY_LOGITS: break;
  }
  return (char *)(uintptr_t)session->shown.logits;
}

/* Write what stays the same for all calls. `states` has room for the addresses of all states. */
static void fill_tables(native_session *session, int plan, char **states) {
  tables *into = &session->plans[plan];
  char *state = session->states;
  for (uint32_t i = 0; i < program.states; i++) {
    states[i] = state;
    state += lines((size_t)state_bytes(&program_states[i], session->sizes));
  }
  for (uint32_t i = 0; i < program.tensors; i++) {
    const program_tensor *tensor = &program_tensors[i];
    into->bases[i] = base_of(session, tensor, plan, states);
    into->tensors[i] = (qc_tensor){.device_type = 1,
                                   .ndim = tensor->ndim,
                                   .dtype_code = tensor->dtype_code,
                                   .dtype_bits = tensor->dtype_bits,
                                   .dtype_lanes = 1,
                                   .shape = session->shapes + tensor->shape};
  }
  for (uint32_t i = 0; i < program.arguments; i++) {
    const program_argument *argument = &program_arguments[i];
    into->arguments[i] = (qc_any){.type_index = argument->type};
    if (argument->type == QC_TENSOR)
      into->arguments[i].value.pointer = &into->tensors[argument->number];
  }
  for (uint32_t i = 0; i < program.steps; i++)
    into->steps[i] = (qc_step){.function = program_kernels[program_steps[i].kernel],
                               .args = into->arguments + program_steps[i].first,
                               .nargs = (int32_t)program_steps[i].count};
}

/* Reserve the workspace of a thread. It waits for the others, so that each has one task. */
static int touch_workspace(int task, qc_group *group, void *closure) {
  (void)closure;
  if (TVMBackendParallelBarrier(task, group)) return -1;
  void *workspace = TVMBackendAllocWorkspace(1, 0, program.workspace, 1, 8);
  return workspace ? TVMBackendFreeWorkspace(1, 0, workspace) : -1;
}

qcm_status session_start(const qcm_model *model, int64_t context, qcm_session **session) {
  size_t bytes = session_bytes(context);
  void *memory = bytes ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                       : MAP_FAILED;
  char **states = malloc((program.states + 1) * sizeof *states);
  if (memory == MAP_FAILED || !states) {
    if (memory != MAP_FAILED) munmap(memory, bytes);
    free(states);
    return fail(QCM_NO_MEMORY, "no memory for a session of %zu bytes (%lld tokens)", bytes,
                (long long)context);
  }
  native_session *started = memory;
  int64_t *sizes = (int64_t *)(void *)((char *)memory + lines(sizeof *started)); /* as lay_out does */
  find_sizes(context, 0, 1, sizes);
  lay_out(started, memory, sizes);
  started->shown.model = model;
  started->bytes = bytes;
  started->shown.context = context;
  for (int plan = 0; plan < PLANS; plan++) fill_tables(started, plan, states);
  free(states);
  if (program.workspace && TVMBackendParallelLaunch(touch_workspace, NULL, ALL_THREADS)) {
    session_end(&started->shown);
    return fail(QCM_NO_MEMORY, "no memory for the workspaces of %u bytes a thread",
                program.workspace);
  }
  *session = &started->shown;
  return QCM_OK;
}

void session_end(qcm_session *session) { munmap(session, ((native_session *)session)->bytes); }

/* Bring the tables of a plan to a call's sizes. */
static void bind(native_session *session, int plan, int64_t tokens) {
  tables *into = &session->plans[plan];
  find_sizes(session->shown.context, session->shown.length, tokens, session->sizes);
  for (uint32_t i = 0; i < program.dims; i++) session->shapes[i] = session->sizes[program_dims[i]];
  for (uint32_t i = 0; i < program.tensors; i++) {
    const program_tensor *tensor = &program_tensors[i];
    into->tensors[i].data = into->bases[i] + session->sizes[tensor->offset] * tensor->dtype_bits / 8;
  }
  for (uint32_t i = 0; i < program.arguments; i++)
    if (program_arguments[i].type == QC_INTEGER)
      into->arguments[i].value.integer = session->sizes[program_arguments[i].number];
}

qcm_status session_run(qcm_session *session, int64_t count) {
  native_session *own = (native_session *)session;
  int plan = count == 1 ? PLAN_STEP : PLAN_PREFILL;
  bind(own, plan, count);
  int64_t failed = qc_run(own->plans[plan].steps, program.steps);
  if (failed >= 0)
    return fail(QCM_FAILED, "kernel %s failed at %s: %s",
                name_at(program_names, program_steps[failed].kernel),
                name_at(program_origins, program_steps[failed].origin), qc_last_error());
  return QCM_OK;
}
