/* See session.h: steps are launches of kernels on a GPU. One piece of its memory holds what a session
 * works on; what changes with every token lies at the start of it, so that all launches for one token
 * are a graph that stays valid. */
#include <stdlib.h>
#include <string.h>

#include "cuda_driver.h"
#include "cuda_program.h"
#include "failing.h"
#include "session.h"

enum {
  ALIGNMENT = 256, /* of everything in the GPU's memory */
  LINE = 64,
  SLOT = 16, /* bytes from one moving size to the next: kernels count on such addresses */
  HIDDEN = 2, /* pointers to scratch memory behind the arguments, which no kernel uses */
  STATIC_SHARED = 48 * 1024, /* beyond it a kernel must be allowed to have what it asks for */
  FIRST_TO_OVERLAP = 90, /* from then on code is for one architecture, too */
  NAME_BYTES = 256
};

typedef struct kernel {
  cuda_function_handle function;
  const cuda_binary *binary;
} kernel;

struct machine {
  int device;
  bool overlaps; /* the code waits by itself for the launches in front */
  cuda_context_handle context;
  cuda_module_handle *modules; /* one a kernel */
  kernel *kernels;
  cuda_address memory, *weights;
};

typedef struct cuda_session {
  qcm_session shown;
  cuda_stream_handle stream;
  cuda_ready_handle step; /* all of a call with one token */
  cuda_address memory;
  char *input, *output; /* of this machine, copied from and to `memory` */
  size_t input_bytes, output_bytes;
  cuda_address *tensors; /* where values start, for each plan */
  int64_t *sizes;
  uint64_t *slots; /* the arguments of all steps */
  void **arguments; /* their addresses; HIDDEN more for each step */
  uint64_t nothing;
} cuda_session;

static size_t rounded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* ---- Models: code and weights on the GPU ------------------------------------------------------ */

qcm_status machine_check(void) { return cuda_driver_check(); }

static int fact(int device, int attribute) {
  int value = 0;
  driver.cuDeviceGetAttribute(&value, attribute, device);
  return value;
}

/* Code for this GPU: its own architecture's, an older one's of the same generation, or text. */
static bool fits(const cuda_binary *binary, int here, int most_shared) {
  int built = binary->architecture;
  if ((int64_t)binary->shared > most_shared || built > here) return false;
  return binary->is_ptx || built == here || (built < FIRST_TO_OVERLAP && built / 10 == here / 10);
}

static const cuda_binary *choose_binary(const cuda_kernel *one, int here, int most_shared) {
  const cuda_binary *best = NULL;
  for (int i = 0; i < one->binaries; i++) {
    const cuda_binary *binary = &cuda_binaries[one->first + i];
    if (!fits(binary, here, most_shared)) continue;
    if (!best || binary->is_ptx < best->is_ptx ||
        (binary->is_ptx == best->is_ptx && binary->architecture > best->architecture))
      best = binary;
  }
  return best;
}

static qcm_status choose_code(machine *opened) {
  int here = 10 * fact(opened->device, CUDA_CAPABILITY_MAJOR) +
             fact(opened->device, CUDA_CAPABILITY_MINOR);
  int most_shared = fact(opened->device, CUDA_MOST_SHARED);
  opened->overlaps = cuda.overlaps && driver.cuLaunchKernelEx;
  for (uint32_t i = 0; i < cuda.kernels; i++) {
    const cuda_binary *binary = choose_binary(&cuda_kernels[i], here, most_shared);
    if (!binary) {
      char name[NAME_BYTES] = "?";
      driver.cuDeviceGetName(name, sizeof name, opened->device);
      return fail(QCM_NO_GPU, "this model was built for %s; the GPU here (%s) is sm_%d",
                  program.target, name, here);
    }
    opened->kernels[i].binary = binary;
    opened->overlaps &= !binary->is_ptx && binary->architecture >= FIRST_TO_OVERLAP;
  }
  return QCM_OK;
}

static qcm_status load_code(machine *opened, const weights_file *file) {
  for (uint32_t i = 0; i < cuda.kernels; i++) {
    kernel *one = &opened->kernels[i];
    const void *image = weights_tensor(file, program.weights + one->binary->code);
    int error = driver.cuModuleLoadData(&opened->modules[i], image);
    if (!error)
      error = driver.cuModuleGetFunction(&one->function, opened->modules[i],
                                         cuda_kernels[i].function);
    if (!error && one->binary->shared > STATIC_SHARED)
      error = driver.cuFuncSetAttribute(one->function, CUDA_DYNAMIC_SHARED,
                                        (int)one->binary->shared);
    if (error) return cuda_failed(error, "load a kernel");
  }
  return QCM_OK;
}

static qcm_status load_weights(machine *opened, const weights_file *file) {
  size_t bytes = 0;
  for (uint32_t i = 0; i < program.weights; i++) bytes += rounded(program_weight_bytes[i]);
  int error = driver.cuMemAlloc_v2(&opened->memory, bytes ? bytes : 1);
  cuda_address at = opened->memory;
  for (uint32_t i = 0; i < program.weights && !error; i++) {
    opened->weights[i] = at;
    at += rounded(program_weight_bytes[i]);
    if (program_weight_bytes[i])
      error = driver.cuMemcpyHtoD_v2(opened->weights[i], weights_tensor(file, i),
                                     program_weight_bytes[i]);
  }
  return error ? cuda_failed(error, "take the weights") : QCM_OK;
}

qcm_status machine_open(qcm_model *model) {
  machine *opened = model->machine = calloc(1, sizeof *opened);
  if (!opened) return fail(QCM_NO_MEMORY, "no memory for a model");
  opened->modules = calloc(cuda.kernels, sizeof *opened->modules);
  opened->kernels = calloc(cuda.kernels, sizeof *opened->kernels);
  opened->weights = calloc(program.weights + 1, sizeof *opened->weights);
  if (!opened->modules || !opened->kernels || !opened->weights)
    return fail(QCM_NO_MEMORY, "no memory for a model");
  int error = driver.cuDeviceGet(&opened->device, 0);
  if (!error) error = driver.cuDevicePrimaryCtxRetain(&opened->context, opened->device);
  if (error) {
    opened->context = NULL;
    return cuda_failed(error, "start");
  }
  error = driver.cuCtxPushCurrent_v2(opened->context);
  if (error) return cuda_failed(error, "be used by this thread");
  qcm_status status = choose_code(opened);
  if (!status) status = load_code(opened, &model->weights);
  if (!status) status = load_weights(opened, &model->weights);
  driver.cuCtxPopCurrent_v2(&(cuda_context_handle){0});
  return status;
}

void machine_close(qcm_model *model) {
  machine *opened = model->machine;
  if (!opened) return;
  if (opened->context && !driver.cuCtxPushCurrent_v2(opened->context)) {
    for (uint32_t i = 0; i < cuda.kernels; i++)
      if (opened->modules[i]) driver.cuModuleUnload(opened->modules[i]);
    if (opened->memory) driver.cuMemFree_v2(opened->memory);
    driver.cuCtxPopCurrent_v2(&(cuda_context_handle){0});
  }
  if (opened->context) driver.cuDevicePrimaryCtxRelease_v2(opened->device);
  free(opened->modules);
  free(opened->kernels);
  free(opened->weights);
  free(opened);
}

/* ---- Sessions --------------------------------------------------------------------------------- */

/* Where the parts of a session lie in the GPU's memory, from its start. */
typedef struct places {
  size_t tokens, logits, arena, states, end;
} places;

static places lay_out(const int64_t *sizes) {
  places found = {.tokens = rounded(cuda.moving * SLOT)};
  found.logits = found.tokens + rounded((size_t)program.chunk * program.token_bits / 8);
  found.arena = found.logits + rounded((size_t)program.vocabulary * program.logit_bits / 8);
  uint32_t most = program.arena[PLAN_STEP] > program.arena[PLAN_PREFILL]
                      ? program.arena[PLAN_STEP]
                      : program.arena[PLAN_PREFILL];
  found.states = found.end = found.arena + rounded((size_t)most * LINE);
  for (uint32_t i = 0; i < program.states; i++)
    found.end += rounded((size_t)state_bytes(&program_states[i], sizes));
  return found;
}

size_t session_bytes(int64_t context) {
  int64_t *sizes = malloc(program.sizes * sizeof *sizes);
  if (!sizes) return 0;
  find_sizes(context, 0, 1, sizes);
  size_t bytes = lay_out(sizes).end;
  free(sizes);
  return bytes;
}

static void find_states(const cuda_session *session, cuda_address at, cuda_address *states) {
  for (uint32_t i = 0; i < program.states; i++) {
    states[i] = at;
    at += rounded((size_t)state_bytes(&program_states[i], session->sizes));
  }
}

static void fill_tensors(cuda_session *session, const places *at, const cuda_address *states) {
  for (uint32_t i = 0; i < PLANS * program.tensors; i++) {
    const program_tensor *tensor = &program_tensors[i % program.tensors];
    uint32_t number = tensor->at[i / program.tensors];
    cuda_address *into = &session->tensors[i];
    switch ((program_memory)tensor->memory) {
      case MEMORY_WEIGHT: *into = session->shown.model->machine->weights[number]; break;
      case MEMORY_STATE: *into = states[number]; break;
      case MEMORY_ARENA: *into = session->memory + at->arena + (size_t)number * LINE; break;
      case MEMORY_TOKENS: *into = session->memory + at->tokens; break;
      case MEMORY_LOGITS: *into = session->memory + at->logits; break;
    }
  }
}

static uint64_t argument_value(const cuda_session *session, int plan, const cuda_argument *one) {
  if (one->kind == CUDA_MOVING) return session->memory + (cuda_address)one->number * SLOT;
  if (one->kind != CUDA_ADDRESS) return (uint64_t)session->sizes[one->number]; /* little-endian */
  const program_tensor *tensor = &program_tensors[one->number];
  return session->tensors[(uint32_t)plan * program.tensors + one->number] +
         (uint64_t)(session->sizes[tensor->offset] * tensor->dtype_bits / 8);
}

/* Bring what changes with every call to its sizes. */
static void bind_moving(cuda_session *session, int64_t tokens) {
  find_sizes(session->shown.context, session->shown.length, tokens, session->sizes);
  for (uint32_t i = 0; i < cuda.moving; i++) {
    int32_t size = (int32_t)session->sizes[cuda_moving[i]];
    memcpy(session->input + (size_t)i * SLOT, &size, sizeof size);
  }
}

/* Bring everything to a call's sizes. */
static void bind(cuda_session *session, int plan, int64_t tokens) {
  bind_moving(session, tokens);
  for (uint32_t i = 0; i < program.arguments; i++)
    session->slots[i] = argument_value(session, plan, &cuda_arguments[i]);
}

static bool belongs(const cuda_session *session, const cuda_step *step) {
  for (int i = 0; i < step->ranges; i++) {
    const cuda_range *range = &cuda_ranges[step->first_range + i];
    int64_t size = session->sizes[range->size];
    if (size < range->low || size > range->high) return false;
  }
  for (int axis = 0; axis < 3; axis++)
    if (!session->sizes[step->grid[axis]]) return false;
  return true;
}

/* Put a launch on the stream. `beside`: it may begin before the one in front has ended. */
static int launch(cuda_session *session, const cuda_step *step, void **arguments, bool beside) {
  const kernel *one = &session->shown.model->machine->kernels[step->kernel];
  cuda_attribute wanted = {.kind = CUDA_BESIDE, .value = {1}};
  cuda_configuration how = {.block = {cuda_kernels[step->kernel].threads, 1, 1},
                            .shared = one->binary->shared, .stream = session->stream,
                            .attributes = &wanted, .count = 1};
  for (int axis = 0; axis < 3; axis++) how.grid[axis] = (unsigned)session->sizes[step->grid[axis]];
  if (beside) return driver.cuLaunchKernelEx(&how, one->function, arguments, NULL);
  return driver.cuLaunchKernel(one->function, how.grid[0], how.grid[1], how.grid[2], how.block[0],
                               1, 1, how.shared, how.stream, arguments, NULL);
}

/* Put a call on the stream: its input, its launches, its logits. `in_line`: each begins while the one in
 * front of it ends. */
static qcm_status enqueue(cuda_session *session, bool in_line) {
  if (driver.cuMemcpyHtoDAsync_v2(session->memory, session->input, session->input_bytes,
                                  session->stream))
    return fail(QCM_FAILED, "the GPU did not take the tokens");
  bool is_first = true;
  void **arguments = session->arguments;
  for (uint32_t i = 0; i < program.steps; i++) {
    const cuda_step *step = &cuda_steps[i];
    void **own = arguments;
    arguments += step->count + HIDDEN;
    if (!belongs(session, step)) continue;
    bool beside = in_line && !is_first;
    uint64_t *late = &session->slots[step->first + step->count - 1];
    if (beside && step->waits_late) *late = 1;
    int error = launch(session, step, own, beside);
    if (beside && step->waits_late) *late = 0;
    if (error) {
      const char *reason = NULL;
      driver.cuGetErrorString(error, &reason);
      return fail(QCM_FAILED, "kernel %s failed at %s: %s (error %d)",
                  name_at(program_names, step->kernel), name_at(program_origins, step->origin),
                  reason ? reason : "unknown error", error);
    }
    is_first = false;
  }
  if (driver.cuMemcpyDtoHAsync_v2(session->output,
                                  session->memory + session->input_bytes, session->output_bytes,
                                  session->stream))
    return fail(QCM_FAILED, "the GPU did not give the logits");
  return QCM_OK;
}

static qcm_status finish(cuda_session *session) {
  int error = driver.cuStreamSynchronize(session->stream);
  return error ? cuda_failed(error, "run the model") : QCM_OK;
}

/* Run a token once, so that all code is loaded, and record what it takes. */
static qcm_status record_step(cuda_session *session) {
  bind(session, PLAN_STEP, 1);
  qcm_status status = enqueue(session, false);
  if (!status) status = finish(session);
  if (status) return status;
  int error = driver.cuStreamBeginCapture_v2(session->stream, CUDA_THREAD_LOCAL);
  if (error) return cuda_failed(error, "record a call");
  status = enqueue(session, session->shown.model->machine->overlaps);
  cuda_graph_handle graph = NULL;
  error = driver.cuStreamEndCapture(session->stream, &graph);
  if (!status && !error) error = driver.cuGraphInstantiateWithFlags(&session->step, graph, 0);
  if (graph) driver.cuGraphDestroy(graph);
  return status ? status : error ? cuda_failed(error, "record a call") : QCM_OK;
}

/* Give a new session its memory on the GPU, and its addresses. */
static qcm_status place(cuda_session *started) {
  find_sizes(started->shown.context, 0, 1, started->sizes);
  const places at = lay_out(started->sizes);
  started->input_bytes = at.logits;
  started->output_bytes = (size_t)program.vocabulary * program.logit_bits / 8;
  int error = driver.cuStreamCreate(&started->stream, CUDA_NON_BLOCKING);
  if (!error) error = driver.cuMemAlloc_v2(&started->memory, at.end);
  if (!error) error = driver.cuMemHostAlloc((void **)&started->input, at.logits, 0);
  if (!error) error = driver.cuMemHostAlloc((void **)&started->output, started->output_bytes, 0);
  if (!error) error = driver.cuMemsetD8Async(started->memory, 0, at.end, started->stream);
  if (error) return cuda_failed(error, "give memory to a session");
  memset(started->input, 0, at.logits);
  started->shown.tokens = started->input + at.tokens;
  started->shown.logits = (const float *)(void *)started->output;
  cuda_address *states = malloc((program.states + 1) * sizeof *states);
  if (!states) return fail(QCM_NO_MEMORY, "no memory for a session");
  find_states(started, started->memory + at.states, states);
  fill_tensors(started, &at, states);
  free(states);
  return record_step(started);
}

/* Let every launch find its arguments. */
static void fill_arguments(cuda_session *started) {
  void **into = started->arguments;
  for (uint32_t i = 0; i < program.steps; i++) {
    for (int k = 0; k < cuda_steps[i].count; k++) *into++ = &started->slots[cuda_steps[i].first + k];
    for (int k = 0; k < HIDDEN; k++) *into++ = &started->nothing;
  }
}

qcm_status session_start(const qcm_model *model, int64_t context, qcm_session **session) {
  cuda_session *started = calloc(1, sizeof *started);
  if (!started) return fail(QCM_NO_MEMORY, "no memory for a session");
  started->shown.model = model;
  started->shown.context = context;
  started->tensors = calloc(PLANS * program.tensors, sizeof *started->tensors);
  started->sizes = calloc(program.sizes, sizeof *started->sizes);
  started->slots = calloc(program.arguments, sizeof *started->slots);
  started->arguments =
      calloc(program.arguments + HIDDEN * program.steps, sizeof *started->arguments);
  started->shown.candidates = calloc((size_t)program.vocabulary, sizeof(choosing_entry));
  qcm_status status = QCM_OK;
  if (!started->tensors || !started->sizes || !started->slots || !started->arguments ||
      !started->shown.candidates)
    status = fail(QCM_NO_MEMORY, "no memory for a session of %lld tokens", (long long)context);
  if (!status) {
    fill_arguments(started);
    int error = driver.cuCtxPushCurrent_v2(model->machine->context);
    status = error ? cuda_failed(error, "be used by this thread") : place(started);
    if (!error) driver.cuCtxPopCurrent_v2(&(cuda_context_handle){0});
  }
  if (status) session_end(&started->shown);
  else *session = &started->shown;
  return status;
}

void session_end(qcm_session *session) {
  cuda_session *own = (cuda_session *)session;
  if (!driver.cuCtxPushCurrent_v2(session->model->machine->context)) {
    if (own->step) driver.cuGraphExecDestroy(own->step);
    if (own->stream) driver.cuStreamDestroy_v2(own->stream);
    if (own->memory) driver.cuMemFree_v2(own->memory);
    if (own->input) driver.cuMemFreeHost(own->input);
    if (own->output) driver.cuMemFreeHost(own->output);
    driver.cuCtxPopCurrent_v2(&(cuda_context_handle){0});
  }
  free(own->tensors);
  free(own->sizes);
  free(own->slots);
  free(own->arguments);
  free(own->shown.candidates);
  free(own);
}

qcm_status session_run(qcm_session *session, int64_t count) {
  cuda_session *own = (cuda_session *)session;
  int error = driver.cuCtxPushCurrent_v2(session->model->machine->context);
  if (error) return cuda_failed(error, "be used by this thread");
  qcm_status status = QCM_OK;
  if (count > 1) {
    bind(own, PLAN_PREFILL, count);
    status = enqueue(own, false);
  } else {
    bind_moving(own, 1);
    error = driver.cuGraphLaunch(own->step, own->stream);
    if (error) status = cuda_failed(error, "launch a call");
  }
  if (!status) status = finish(own);
  driver.cuCtxPopCurrent_v2(&(cuda_context_handle){0});
  return status;
}
