/* session.h: what model.c asks of the machine that runs the steps of a program. One file answers in
 * each package: native_session.c on the CPU, cuda_session.c on a GPU. */
#ifndef QC_SESSION_H_
#define QC_SESSION_H_

#include <stdbool.h>

#include "choosing.h"
#include "program.h"
#include "qc_model.h"
#include "text.h"
#include "weights.h"

typedef struct machine machine; /* what a model needs besides its weights in memory */

struct qcm_model {
  weights_file weights;
  text_tables text; /* all zero without a tokenizer */
  machine *machine;
};

/* What every session starts with. */
struct qcm_session {
  const qcm_model *model;
  int64_t context, length;
  bool has_logits;
  void *tokens; /* of a call, `program.chunk` at most */
  const float *logits;
  choosing_entry *candidates; /* vocabulary of them, for qcm_choose */
};

/* Whether this machine can run the program, before anything is read. */
qcm_status machine_check(void);

/* Take over a model whose weights are checked; undo that, also if it has failed. */
qcm_status machine_open(qcm_model *model);
void machine_close(qcm_model *model);

/* Sessions of `context` tokens; `session_bytes` is 0 without memory to find out. */
size_t session_bytes(int64_t context);
qcm_status session_start(const qcm_model *model, int64_t context, qcm_session **session);
void session_end(qcm_session *session);

/* Run all steps with `count` tokens, which lie in session->tokens. */
qcm_status session_run(qcm_session *session, int64_t count);

/* ---- What model.c does for all machines ---- */

/* The sizes of a call of one row whose last logits are wanted. */
void find_sizes(int64_t context, int64_t past, int64_t tokens, int64_t *sizes);
int64_t state_bytes(const program_state *state, const int64_t *sizes);

/* Name number `at` of names that are each ended by a zero. */
const char *name_at(const char *names, uint32_t at);

#endif /* QC_SESSION_H_ */
