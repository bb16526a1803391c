/* weights.h: weights.qcw, mapped and checked. All numbers are little-endian.
 *
 *   header   64 bytes, see weights.c
 *   entries  one for each tensor of the program, in its order, then one for each code of a GPU, then
 *            perhaps the text tables
 *   content  each entry at a multiple of 64 bytes
 */
#ifndef QC_WEIGHTS_H_
#define QC_WEIGHTS_H_

#include <stddef.h>
#include <stdint.h>

#include "qc_model.h"

typedef struct weights_file {
  const uint8_t *bytes; /* the mapping */
  size_t size;
  const uint8_t *text; /* the text tables, or NULL */
  size_t text_size;
} weights_file;

/* Map and check a file. It must hold the tensors of the program. */
qcm_status weights_open(const char *path, uint32_t flags, weights_file *file);
void weights_close(weights_file *file);

/* The bytes of tensor number `at`, or of the codes behind them. */
const void *weights_tensor(const weights_file *file, uint32_t at);

#endif /* QC_WEIGHTS_H_ */
