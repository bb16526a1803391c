/* See qc_model.h: what is the same for all machines. What runs the steps is behind session.h. */
#include "qc_model.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failing.h"
#include "qcrt.h"
#include "session.h"

enum { CONTEXT_MULTIPLE = 64, ERROR_BYTES = 1024 };

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

qcm_status qcm_open(const char *path, uint32_t abi, uint32_t flags, qcm_model **model) {
  if (!path || !model) return fail(QCM_BAD_CALL, "qcm_open needs a path and a place for the model");
  *model = NULL;
  if (abi != QCM_ABI_VERSION)
    return fail(QCM_BAD_VERSION, "the program was compiled for version %u of qc_model.h; this "
                "library has version %d", abi, QCM_ABI_VERSION);
  if (flags & ~(uint32_t)QCM_TRUST) return fail(QCM_BAD_CALL, "qcm_open has no flags %#x", flags);
  qcm_status status = machine_check();
  if (status) return status;
  qcm_model *opened = calloc(1, sizeof *opened);
  if (!opened) return fail(QCM_NO_MEMORY, "no memory for a model");
  status = weights_open(path, flags, &opened->weights);
  if (!status && opened->weights.text)
    status = text_open(opened->weights.text, opened->weights.text_size, program.below, &opened->text);
  if (!status) status = machine_open(opened);
  if (status) {
    qcm_close(opened);
    return status;
  }
  *model = opened;
  return QCM_OK;
}

void qcm_close(qcm_model *model) {
  if (!model) return;
  machine_close(model);
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

static int64_t rounded(int64_t context) {
  return (context + CONTEXT_MULTIPLE - 1) / CONTEXT_MULTIPLE * CONTEXT_MULTIPLE;
}

int64_t state_bytes(const program_state *state, const int64_t *sizes) {
  int64_t bytes = state->bytes;
  for (int i = 0; i < state->ndim; i++) bytes *= sizes[program_dims[state->shape + i]];
  return bytes;
}

void find_sizes(int64_t context, int64_t past, int64_t tokens, int64_t *sizes) {
  int64_t symbols[PROGRAM_SYMBOLS] = {[SYMBOL_BATCH] = 1, [SYMBOL_SEQ] = tokens,
                                      [SYMBOL_PAST] = past, [SYMBOL_CONTEXT] = rounded(context),
                                      [SYMBOL_KEEP] = 1};
  program_sizes(symbols, sizes);
}

static int64_t bounded(int64_t context) {
  return context == 0 || context > program.context ? program.context : context;
}

size_t qcm_memory(const qcm_model *model, int64_t context) {
  (void)model;
  return context < 0 ? 0 : session_bytes(bounded(context));
}

qcm_status qcm_start(const qcm_model *model, int64_t context, qcm_session **session) {
  if (!model || !session || context < 0)
    return fail(QCM_BAD_CALL, "qcm_start needs a model, a context of 0 or more, and a place");
  *session = NULL;
  return session_start(model, bounded(context), session);
}

void qcm_end(qcm_session *session) {
  if (session) session_end(session);
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
const char *name_at(const char *names, uint32_t at) {
  while (at--) names += strlen(names) + 1;
  return names;
}

static qcm_status run(qcm_session *session, const int32_t *tokens, int64_t count) {
  write_tokens(session, tokens, count);
  qcm_status status = session_run(session, count);
  if (status) return status;
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
