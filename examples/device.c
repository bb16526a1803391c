/* Continue a prompt with a package of qc build:
 *     cc device.c libmodel.a -lpthread -lm -o device && ./device weights.qcw "Once upon a time" */
#include <stdio.h>
#include <string.h>

#include "qc_model.h"

int main(int count, char **words) {
  if (count < 3) return 2;
  qcm_model *model;
  qcm_session *session;
  int32_t tokens[1024], token;
  size_t length, bytes;
  if (qcm_open(words[1], QCM_ABI_VERSION, QCM_CHECK, &model) ||
      qcm_encode(model, words[2], strlen(words[2]), 1, tokens, 1024, &length) ||
      qcm_start(model, 1024, &session) ||
      qcm_prefill(session, tokens, (int64_t)length)) {
    fprintf(stderr, "%s\n", qcm_error());
    return 1;
  }
  qcm_sampling greedy = {0};
  qcm_decoder decoder = {.started = 1}; /* the text goes on, so it may start with a space */
  char text[4096]; /* at least qcm_longest_piece(model) */
  for (int i = 0; i < 32 && !qcm_choose(session, &greedy, &token); i++) {
    if (qcm_is_end(model, token) ||
        qcm_decode(model, &decoder, token, text, sizeof text, &bytes))
      break;
    fwrite(text, 1, bytes, stdout);
    if (qcm_step(session, token)) break;
  }
  if (!qcm_decode(model, &decoder, -1, text, sizeof text, &bytes)) fwrite(text, 1, bytes, stdout);
  qcm_end(session);
  qcm_close(model);
  return 0;
}
