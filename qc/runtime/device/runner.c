/* runner: continue a prompt with a model, streaming the text.
 *
 *   runner weights.qcw PROMPT [-n TOKENS] [--threads N] [--context TOKENS] [--temperature T]
 *          [--top-k K] [--top-p P] [--seed S] [--ids] [--trust] [--stats]
 *
 * With --ids, PROMPT is token ids between spaces and so is the output. */
#define _GNU_SOURCE /* clock_gettime */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "qc_model.h"

typedef struct options {
  const char *weights, *prompt;
  long tokens, threads, context;
  int ids, trust, stats;
  qcm_sampling sampling;
} options;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int refuse(const char *what) {
  fprintf(stderr, "runner: %s\n", what);
  return 1;
}

static int read_options(int count, char **words, options *found) {
  *found = (options){.tokens = 128};
  for (int i = 1; i < count; i++) {
    const char *word = words[i];
    if (!strcmp(word, "--ids")) found->ids = 1;
    else if (!strcmp(word, "--trust")) found->trust = 1;
    else if (!strcmp(word, "--stats")) found->stats = 1;
    else if (!strncmp(word, "-", 1) && word[1] && i + 1 < count && found->weights) {
      const char *value = words[++i];
      if (!strcmp(word, "-n")) found->tokens = atol(value);
      else if (!strcmp(word, "--threads")) found->threads = atol(value);
      else if (!strcmp(word, "--context")) found->context = atol(value);
      else if (!strcmp(word, "--temperature")) found->sampling.temperature = strtof(value, NULL);
      else if (!strcmp(word, "--top-k")) found->sampling.top_k = (int32_t)atol(value);
      else if (!strcmp(word, "--top-p")) found->sampling.top_p = strtof(value, NULL);
      else if (!strcmp(word, "--seed")) found->sampling.seed = strtoull(value, NULL, 10);
      else return 0;
    } else if (!found->weights) found->weights = word;
    else if (!found->prompt) found->prompt = word;
    else return 0;
  }
  return found->weights && found->prompt && found->tokens >= 0;
}

/* The tokens of the prompt, to be freed; NULL with a message. */
static int32_t *read_prompt(const qcm_model *model, const options *given, size_t *count) {
  size_t room = strlen(given->prompt) + 16;
  int32_t *tokens = malloc(room * sizeof *tokens);
  if (!tokens) return NULL;
  *count = 0;
  if (given->ids) {
    const char *at = given->prompt;
    for (char *end; *count < room; at = end) {
      long token = strtol(at, &end, 10);
      if (end == at) break;
      tokens[(*count)++] = (int32_t)token;
    }
    return tokens;
  }
  if (!qcm_encode(model, given->prompt, strlen(given->prompt), 1, tokens, room, count)) return tokens;
  free(tokens);
  return NULL;
}

static qcm_status generate(const qcm_model *model, qcm_session *session, options *given,
                           const int32_t *prompt, size_t count, char *text, double *times) {
  qcm_status status = qcm_prefill(session, prompt, (int64_t)count);
  qcm_decoder decoder = {.started = 1};
  times[0] = seconds();
  long made = 0;
  for (; made < given->tokens && !status; made++) {
    int32_t token;
    status = qcm_choose(session, &given->sampling, &token);
    if (status || qcm_is_end(model, token)) break;
    size_t bytes = 0;
    if (given->ids) bytes = (size_t)sprintf(text, "%d ", token);
    else status = qcm_decode(model, &decoder, token, text, qcm_longest_piece(model), &bytes);
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
    if (made + 1 < given->tokens && !status) status = qcm_step(session, token);
  }
  size_t rest = 0; /* of a character that was not finished */
  if (!given->ids && !status) qcm_decode(model, &decoder, -1, text, qcm_longest_piece(model), &rest);
  fwrite(text, 1, rest, stdout);
  putchar('\n');
  times[1] = seconds();
  if (given->stats)
    fprintf(stderr, "%ld tokens, %.3f ms each\n", made,
            made > 1 ? 1e3 * (times[1] - times[0]) / (double)(made - 1) : 0.0);
  return status;
}

int main(int count, char **words) {
  options given;
  if (!read_options(count, words, &given))
    return refuse("usage: runner weights.qcw PROMPT [-n TOKENS] [--threads N] [--context TOKENS] "
                  "[--temperature T] [--top-k K] [--top-p P] [--seed S] [--ids] [--trust] [--stats]");
  double start = seconds(), times[2];
  if (given.threads) qcm_set_threads((int)given.threads);
  qcm_model *model;
  qcm_session *session = NULL;
  if (qcm_open(given.weights, QCM_ABI_VERSION, given.trust ? QCM_TRUST : QCM_CHECK, &model))
    return refuse(qcm_error());
  size_t prompt_tokens;
  int32_t *prompt = read_prompt(model, &given, &prompt_tokens);
  char *text = malloc(qcm_longest_piece(model) + 16);
  int failed = !prompt || !text || qcm_start(model, given.context, &session);
  double opened = seconds();
  if (!failed)
    failed = generate(model, session, &given, prompt, prompt_tokens, text, times) != QCM_OK;
  if (failed) refuse(qcm_error());
  if (!failed && given.stats)
    fprintf(stderr, "open %.1f ms, prefill of %zu tokens %.1f ms, session %.1f MB\n",
            1e3 * (opened - start), prompt_tokens, 1e3 * (times[0] - opened),
            1e-6 * (double)qcm_memory(model, given.context));
  qcm_end(session);
  qcm_close(model);
  free(prompt);
  free(text);
  return failed;
}
