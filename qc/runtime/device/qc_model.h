/* qc_model.h: run a language model that `qc build` compiled.
 *
 * The library needs libc, libm and POSIX threads (Linux); one for a GPU loads the GPU's driver when the
 * first model is opened. It holds the code of one model; the weights
 * and the tokenizer are in weights.qcw, which is mapped and read in place. A model may be opened any
 * number of times, and have any number of sessions; sessions may be used from several threads, each
 * by one thread at a time. Calls of all sessions share one pool of threads and take turns.
 *
 * Functions return QCM_OK, or a status whose sentence qcm_error() has. Nothing allocates memory once a
 * session has started, but for qcm_encode, which gives it back, and threads that are added later.
 */
#ifndef QC_MODEL_H_
#define QC_MODEL_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by every change that a program compiled against this header would notice. */
#define QCM_ABI_VERSION 1

#if defined(__GNUC__)
#define QCM_API __attribute__((visibility("default")))
#else
#define QCM_API
#endif

typedef struct qcm_model qcm_model;     /* weights and tokenizer: immutable, shared by threads */
typedef struct qcm_session qcm_session; /* one conversation: keys, values, intermediate memory */

typedef enum qcm_status {
  QCM_OK = 0,
  QCM_BAD_CALL = 1,     /* an argument that cannot be: a token outside of the vocabulary, a NULL */
  QCM_BAD_VERSION = 2,  /* compiled against another version of this header */
  QCM_NO_FILE = 3,      /* the weights cannot be opened or mapped */
  QCM_BAD_FILE = 4,     /* the weights are truncated or damaged */
  QCM_FOREIGN_FILE = 5, /* the weights are of another model, target or version */
  QCM_BAD_CPU = 6,      /* this CPU lacks an instruction set that the code uses */
  QCM_NO_MEMORY = 7,
  QCM_CONTEXT_FULL = 8, /* more tokens than the session has room for */
  QCM_NO_TEXT = 9,      /* the package has no tokenizer */
  QCM_FAILED = 10,      /* a kernel failed, or computed NaN */
  QCM_NO_GPU = 11       /* packages for GPUs: no driver, no GPU, or one that the code is not for */
} qcm_status;

/* What qcm_open reads of the weights. */
enum {
  QCM_CHECK = 0, /* everything: each tensor is compared with its checksum */
  QCM_TRUST = 1  /* the header only: opens in no time, for files that were checked before */
};

/* How qcm_choose picks a token. All zero: the most likely one. */
typedef struct qcm_sampling {
  float temperature; /* 0: always the most likely token */
  float top_p;       /* keep the fewest tokens that hold so much probability; 0 or 1: all */
  int32_t top_k;     /* keep so many tokens; 0: all */
  uint32_t zero;
  uint64_t seed; /* changed by each call: the state of the generator */
} qcm_sampling;

/* Open the weights at `path`. `abi` is QCM_ABI_VERSION. */
QCM_API qcm_status qcm_open(const char *path, uint32_t abi, uint32_t flags, qcm_model **model);

/* Close a model whose sessions have all been ended. NULL is allowed. */
QCM_API void qcm_close(qcm_model *model);

/* The limits of a model: vocabulary, longest context, tokens that prefill takes at a time. */
typedef struct qcm_facts {
  int32_t vocabulary;
  int32_t begin; /* the token that text starts with, or -1 */
  int64_t context;
  int64_t chunk;
  const char *target; /* "arm64-dotprod-w4" */
} qcm_facts;
QCM_API qcm_facts qcm_describe(const qcm_model *model);

/* Start a session with room for `context` tokens, 0 for the longest. All of its memory is reserved
 * here: qcm_memory(model, context) bytes, on the GPU where there is one. */
QCM_API qcm_status qcm_start(const qcm_model *model, int64_t context, qcm_session **session);
QCM_API size_t qcm_memory(const qcm_model *model, int64_t context);
QCM_API void qcm_end(qcm_session *session);

/* Append tokens; qcm_logits() are those after the last. */
QCM_API qcm_status qcm_prefill(qcm_session *session, const int32_t *tokens, int64_t count);

/* Append one token: prefill with a count of 1. */
QCM_API qcm_status qcm_step(qcm_session *session, int32_t token);

/* float[vocabulary], valid until the next call with this session; NULL before the first. */
QCM_API const float *qcm_logits(const qcm_session *session);

/* Choose the next token from the logits. Whether it ends the text, qcm_is_end says. */
QCM_API qcm_status qcm_choose(qcm_session *session, qcm_sampling *sampling, int32_t *token);
QCM_API int qcm_is_end(const qcm_model *model, int32_t token);

/* How many tokens the session holds; keep the first `count` of them and forget the others. */
QCM_API int64_t qcm_length(const qcm_session *session);
QCM_API qcm_status qcm_rewind(qcm_session *session, int64_t count);

/* Text to tokens, as the model's own tokenizer does it; `special` adds its begin and end tokens.
 * `*count` becomes the number of tokens; those beyond `room` are counted and not written. */
QCM_API qcm_status qcm_encode(const qcm_model *model, const char *text, size_t bytes, int special,
                              int32_t *tokens, size_t room, size_t *count);

/* A decoder of tokens, to be zeroed before the first token of a text. `started` is 1 where the text goes
 * on after a prompt: some tokenizers drop the space that a text starts with. */
typedef struct qcm_decoder {
  uint8_t pending[4]; /* bytes of an unfinished character */
  uint8_t count;
  uint8_t started;
  uint8_t zero[2];
} qcm_decoder;

/* Write the text that is complete with `token` to `text`, at most `room` bytes of UTF-8 and never half
 * a character, and its size to `*bytes`. -1 for a token ends the text: what is unfinished becomes
 * U+FFFD. QCM_BAD_CALL if `room` is below qcm_longest_piece(). Special tokens have no text. */
QCM_API qcm_status qcm_decode(const qcm_model *model, qcm_decoder *decoder, int32_t token,
                              char *text, size_t room, size_t *bytes);
QCM_API size_t qcm_longest_piece(const qcm_model *model);

/* Use so many threads, the calling one included; below 1: one for each CPU. Return the number. */
QCM_API int qcm_set_threads(int count);

/* What the last call that failed on this thread has to say, else "". */
QCM_API const char *qcm_error(void);

/* QCM_ABI_VERSION of the library. */
QCM_API uint32_t qcm_abi_version(void);

#ifdef __cplusplus
}
#endif

#endif /* QC_MODEL_H_ */
