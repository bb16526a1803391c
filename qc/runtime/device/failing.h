/* failing.h: statuses and their sentences. */
#ifndef QC_FAILING_H_
#define QC_FAILING_H_

#include "qc_model.h"

/* Keep the sentence for qcm_error() on this thread; return `status`. */
__attribute__((format(printf, 2, 3))) qcm_status fail(qcm_status status, const char *format, ...);

#endif /* QC_FAILING_H_ */
