/* choosing.h: the next token from logits. */
#ifndef QC_CHOOSING_H_
#define QC_CHOOSING_H_

#include "qc_model.h"

typedef struct choosing_entry {
  float weight;
  int32_t token;
} choosing_entry;

/* Return the token, or -1 if a logit is NaN. `candidates` has room for `count` of them. */
int32_t choose(const float *logits, int32_t count, qcm_sampling *sampling,
               choosing_entry *candidates);

#endif /* QC_CHOOSING_H_ */
