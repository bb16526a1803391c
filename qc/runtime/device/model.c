/* See qc_model.h. A session is one piece of memory: the tables that kernels are called with, the
 * input, the logits, the arena of scratch values, keys and values. */
#define _GNU_SOURCE /* MAP_ANONYMOUS, MADV_HUGEPAGE */
#include "qc_model.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "choosing.h"
#include "failing.h"
#include "program.h"
#include "qcrt.h"
#include "text.h"
#include "weights.h"

enum { LINE = 64, CONTEXT_MULTIPLE = 64, HUGE_PAGE = 2 * 1024 * 1024, ERROR_BYTES = 1024,
       ALL_THREADS = 1 << 20 /* tasks, of which as many come as there are threads, at once */ };

typedef struct qc_group qc_group;
int TVMBackendParallelLaunch(int (*task)(int, qc_group *, void *), void *closure, int count);
int TVMBackendParallelBarrier(int task, qc_group *group);
void *TVMBackendAllocWorkspace(int device, int id, uint64_t bytes, int code, int bits);
int TVMBackendFreeWorkspace(int device, int id, void *pointer);

static _Thread_local char this_error[ERROR_BYTES];

qcm_status fail(qcm_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(this_error, sizeof this_error, format, arguments);
  va_end(arguments);
  return status;
}

const char *qcm_error(void) { return this_error; }

uint32_t qcm_abi_version(void) { return QCM_ABI_VERSION; }

int qcm_set_threads(int count) { return qc_set_threads(count); }

/* ---- Models ---------------------------------------------------------------------------------- */

struct qcm_model {
  weights_file weights;
  text_tables text; /* all zero without a tokenizer */
};

qcm_status qcm_open(const char *path, uint32_t abi, uint32_t flags, qcm_model **model) {
  if (!path || !model) return fail(QCM_BAD_CALL, "qcm_open needs a path and a place for the model");
  *model = NULL;
  if (abi != QCM_ABI_VERSION)
    return fail(QCM_BAD_VERSION, "the program was compiled for version %u of qc_model.h; this "
                "library has version %d", abi, QCM_ABI_VERSION);
  if (flags & ~(uint32_t)QCM_TRUST) return fail(QCM_BAD_CALL, "qcm_open has no flags %#x", flags);
  const char *lacking = program_lacks();
  if (lacking)
    return fail(QCM_BAD_CPU, "this model was built for %s; this CPU has no %s", program.target,
                lacking);
  if (program.tiles && qc_request_tiles())
    return fail(QCM_BAD_CPU, "the system refuses AMX tiles to this process");
  qcm_model *opened = calloc(1, sizeof *opened);
  if (!opened) return fail(QCM_NO_MEMORY, "no memory for a model");
  qcm_status status = weights_open(path, flags, &opened->weights);
  if (!status && opened->weights.text)
    status = text_open(opened->weights.text, opened->weights.text_size, program.below, &opened->text);
  if (status) {
    qcm_close(opened);
    return status;
  }
  *model = opened;
  return QCM_OK;
}

void qcm_close(qcm_model *model) {
  if (!model) return;
  weights_close(&model->weights);
  free(model);
}

qcm_facts qcm_describe(const qcm_model *model) {
  (void)model;
  return (qcm_facts){program.vocabulary, program.begin, program.context, program.chunk,
                     program.target};
}

int qcm_is_end(const qcm_model *model, int32_t token) {
  (void)model;
  for (uint32_t i = 0; i < program.ends; i++)
    if (program_ends[i] == token) return 1;
  return 0;
}

/* ---- Sessions -------------------------------------------------------------------------------- */

/* What the kernels of one plan are called with. */
typedef struct tables {
  qc_tensor *tensors;
  char **bases; /* of tensors, before their offsets */
  qc_any *arguments;
  qc_step *steps;
} tables;

struct qcm_session {
  const qcm_model *model;
  size_t bytes; /* of this mapping */
  int64_t context, length;
  bool has_logits;
  tables plans[PLANS];
  int64_t *sizes, *shapes;
  void *tokens, *logits;
  choosing_entry *candidates; /* vocabulary of them, for qcm_choose */
  char *arena, *states;
};

static size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

static int64_t rounded(int64_t context) {
  return (context + CONTEXT_MULTIPLE - 1) / CONTEXT_MULTIPLE * CONTEXT_MULTIPLE;
}

static int64_t state_bytes(const program_state *state, const int64_t *sizes) {
  int64_t bytes = state->bytes;
  for (int i = 0; i < state->ndim; i++) bytes *= sizes[program_dims[state->shape + i]];
  return bytes;
}

static void find_sizes(int64_t context, int64_t past, int64_t tokens, int64_t *sizes) {
  int64_t symbols[PROGRAM_SYMBOLS] = {[SYMBOL_BATCH] = 1, [SYMBOL_SEQ] = tokens,
                                      [SYMBOL_PAST] = past, [SYMBOL_CONTEXT] = rounded(context),
                                      [SYMBOL_KEEP] = 1};
  program_sizes(symbols, sizes);
}

/* Take `bytes` from *at, which may be a plain count: NULL plus bytes. */
static void *take(char **at, size_t bytes) {
  char *taken = *at;
  *at += lines(bytes);
  return taken;
}

/* Lay a session out from `start` on; return the end. */
static char *lay_out(qcm_session *session, char *start, const int64_t *sizes) {
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
  session->tokens = take(&at, (size_t)program.chunk * program.token_bits / 8);
  session->logits = take(&at, (size_t)program.vocabulary * program.logit_bits / 8);
  session->candidates = take(&at, (size_t)program.vocabulary * sizeof(choosing_entry));
  uint32_t most = program.arena[PLAN_STEP] > program.arena[PLAN_PREFILL]
                      ? program.arena[PLAN_STEP]
                      : program.arena[PLAN_PREFILL];
  session->arena = take(&at, (size_t)most * LINE);
  session->states = at;
  for (uint32_t i = 0; i < program.states; i++)
    take(&at, (size_t)state_bytes(&program_states[i], sizes));
  return at;
}

static int64_t bounded(int64_t context) {
  return context == 0 || context > program.context ? program.context : context;
}

size_t qcm_memory(const qcm_model *model, int64_t context) {
  (void)model;
  int64_t *sizes = malloc(program.sizes * sizeof *sizes);
  if (!sizes || context < 0) {
    free(sizes);
    return 0;
  }
  qcm_session measured;
  find_sizes(bounded(context), 0, 1, sizes);
  size_t bytes = (size_t)(lay_out(&measured, (char *)LINE, sizes) - (char *)LINE);
  free(sizes);
  return bytes;
}

static char *base_of(const qcm_session *session, const program_tensor *tensor, int plan,
                     char *const *states) {
  uint32_t at = tensor->at[plan];
  switch ((program_memory)tensor->memory) {
    case MEMORY_WEIGHT:
      return (char *)(uintptr_t)weights_tensor(&session->model->weights, at);
    case MEMORY_STATE: return states[at];
    case MEMORY_ARENA: return session->arena + (size_t)at * LINE;
    case MEMORY_TOKENS: return session->tokens;
    case MEMORY_LOGITS: break;
  }
  return session->logits;
}

/* Write what stays the same for all calls. `states` has room for the addresses of all states. */
static void fill_tables(qcm_session *session, int plan, char **states) {
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

qcm_status qcm_start(const qcm_model *model, int64_t context, qcm_session **session) {
  if (!model || !session || context < 0)
    return fail(QCM_BAD_CALL, "qcm_start needs a model, a context of 0 or more, and a place");
  *session = NULL;
  size_t bytes = qcm_memory(model, context);
  void *memory = bytes ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                       : MAP_FAILED;
  char **states = malloc((program.states + 1) * sizeof *states);
  if (memory == MAP_FAILED || !states) {
    if (memory != MAP_FAILED) munmap(memory, bytes);
    free(states);
    return fail(QCM_NO_MEMORY, "no memory for a session of %zu bytes (%lld tokens)", bytes,
                (long long)bounded(context));
  }
  qcm_session *started = memory;
  int64_t *sizes = (int64_t *)(void *)((char *)memory + lines(sizeof *started)); /* as lay_out does */
  find_sizes(bounded(context), 0, 1, sizes);
  lay_out(started, memory, sizes);
  started->model = model;
  started->bytes = bytes;
  started->context = bounded(context);
  for (int plan = 0; plan < PLANS; plan++) fill_tables(started, plan, states);
  free(states);
  if (program.workspace && TVMBackendParallelLaunch(touch_workspace, NULL, ALL_THREADS)) {
    qcm_end(started);
    return fail(QCM_NO_MEMORY, "no memory for the workspaces of %u bytes a thread",
                program.workspace);
  }
  *session = started;
  return QCM_OK;
}

void qcm_end(qcm_session *session) {
  if (session) munmap(session, session->bytes);
}

/* Bring the tables of a plan to a call's sizes. */
static void bind(qcm_session *session, int plan, int64_t tokens) {
  tables *into = &session->plans[plan];
  find_sizes(session->context, session->length, tokens, session->sizes);
  for (uint32_t i = 0; i < program.dims; i++) session->shapes[i] = session->sizes[program_dims[i]];
  for (uint32_t i = 0; i < program.tensors; i++) {
    const program_tensor *tensor = &program_tensors[i];
    into->tensors[i].data = into->bases[i] + session->sizes[tensor->offset] * tensor->dtype_bits / 8;
  }
  for (uint32_t i = 0; i < program.arguments; i++)
    if (program_arguments[i].type == QC_INTEGER)
      into->arguments[i].value.integer = session->sizes[program_arguments[i].number];
}

static void write_tokens(qcm_session *session, const int32_t *tokens, int64_t count) {
  if (program.token_bits == 32) {
    memcpy(session->tokens, tokens, (size_t)count * sizeof *tokens);
    return;
  }
  int64_t *wide = session->tokens;
  for (int64_t i = 0; i < count; i++) wide[i] = tokens[i];
}

/* Name number `at` of names that are each ended by a zero. */
static const char *name_at(const char *names, uint32_t at) {
  while (at--) names += strlen(names) + 1;
  return names;
}

static qcm_status run(qcm_session *session, const int32_t *tokens, int64_t count) {
  int plan = count == 1 ? PLAN_STEP : PLAN_PREFILL;
  write_tokens(session, tokens, count);
  bind(session, plan, count);
  int64_t failed = qc_run(session->plans[plan].steps, program.steps);
  if (failed >= 0)
    return fail(QCM_FAILED, "kernel %s failed at %s: %s",
                name_at(program_names, program_steps[failed].kernel),
                name_at(program_origins, program_steps[failed].origin), qc_last_error());
  session->length += count;
  session->has_logits = true;
  return QCM_OK;
}

qcm_status qcm_prefill(qcm_session *session, const int32_t *tokens, int64_t count) {
  if (!session || !tokens || count < 1)
    return fail(QCM_BAD_CALL, "qcm_prefill needs a session and at least one token");
  for (int64_t i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= program.below)
      return fail(QCM_BAD_CALL, "token %d is not in the vocabulary of %d", tokens[i], program.below);
  if (count > session->context - session->length)
    return fail(QCM_CONTEXT_FULL, "%lld tokens and %lld more do not fit a context of %lld",
                (long long)session->length, (long long)count, (long long)session->context);
  for (int64_t at = 0; at < count; at += program.chunk) {
    int64_t here = count - at < program.chunk ? count - at : program.chunk;
    qcm_status status = run(session, tokens + at, here);
    if (status) return status;
  }
  return QCM_OK;
}

qcm_status qcm_step(qcm_session *session, int32_t token) { return qcm_prefill(session, &token, 1); }

const float *qcm_logits(const qcm_session *session) {
  return session && session->has_logits ? session->logits : NULL;
}

int64_t qcm_length(const qcm_session *session) { return session ? session->length : 0; }

qcm_status qcm_rewind(qcm_session *session, int64_t count) {
  if (!session || count < 0 || count > session->length)
    return fail(QCM_BAD_CALL, "cannot go back to %lld tokens: the session holds %lld",
                (long long)count, (long long)qcm_length(session));
  session->length = count;
  session->has_logits = false;
  return QCM_OK;
}

qcm_status qcm_choose(qcm_session *session, qcm_sampling *sampling, int32_t *token) {
  if (!session || !session->has_logits || !token)
    return fail(QCM_BAD_CALL, "qcm_choose needs a session that has logits");
  qcm_sampling greedy = {0};
  if (!sampling) sampling = &greedy;
  if (!(sampling->temperature >= 0 && sampling->temperature <= 1e30f) || sampling->top_k < 0 ||
      !(sampling->top_p >= 0 && sampling->top_p <= 1))
    return fail(QCM_BAD_CALL, "temperature and top_k must be 0 or more, top_p from 0 to 1");
  *token = choose(session->logits, program.vocabulary, sampling, session->candidates);
  if (*token < 0) return fail(QCM_FAILED, "the model computed logits that are not numbers (NaN)");
  return QCM_OK;
}

/* ---- Text ------------------------------------------------------------------------------------ */

static qcm_status text_of(const qcm_model *model, const text_tables **text) {
  if (!model) return fail(QCM_BAD_CALL, "no model was given");
  if (!model->weights.text)
    return fail(QCM_NO_TEXT, "this package has no tokenizer: give it token ids");
  *text = &model->text;
  return QCM_OK;
}

qcm_status qcm_encode(const qcm_model *model, const char *text, size_t bytes, int special,
                      int32_t *tokens, size_t room, size_t *count) {
  const text_tables *tables = NULL;
  qcm_status status = text_of(model, &tables);
  if (status) return status;
  if ((!text && bytes) || !count || (!tokens && room))
    return fail(QCM_BAD_CALL, "qcm_encode needs a text, room for tokens and a place for the count");
  return text_encode(tables, text, bytes, special, tokens, room, count);
}

qcm_status qcm_decode(const qcm_model *model, qcm_decoder *decoder, int32_t token, char *text,
                      size_t room, size_t *bytes) {
  const text_tables *tables = NULL;
  qcm_status status = text_of(model, &tables);
  if (status) return status;
  if (!decoder || !text || !bytes || room < tables->longest || token < -1 || token >= program.below)
    return fail(QCM_BAD_CALL, "qcm_decode needs a decoder, room for %zu bytes, and a token",
                tables->longest);
  *bytes = text_decode(tables, decoder, token, text);
  return QCM_OK;
}

size_t qcm_longest_piece(const qcm_model *model) {
  return model && model->weights.text ? model->text.longest : 0;
}
