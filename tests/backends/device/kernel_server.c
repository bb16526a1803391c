/* Run kernels for a test on another machine: requests on standard input, results on standard output.
 *
 * A request is u32 kernel, u32 count, and for each argument u32 {kind, code, bits, dimensions}, i64 sizes
 * and the bytes; an integer has kind 0 and its value as its only size. The answer is i32 status and the
 * bytes of all arrays again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcrt.h"

extern const qc_kernel kernels[];

typedef struct description {
  uint32_t kind, code, bits, dimensions;
} description;

static int receive(void *into, size_t bytes) { return fread(into, 1, bytes, stdin) == bytes; }

int main(void) {
  uint32_t head[2];
  while (receive(head, sizeof head)) {
    qc_any *arguments = calloc(head[1], sizeof *arguments);
    qc_tensor *tensors = calloc(head[1], sizeof *tensors);
    size_t *sizes = calloc(head[1], sizeof *sizes);
    for (uint32_t i = 0; i < head[1]; i++) {
      description one;
      if (!receive(&one, sizeof one)) return 2;
      int64_t *shape = calloc(one.dimensions + 1, sizeof *shape);
      if (!receive(shape, one.dimensions * sizeof *shape)) return 2;
      if (!one.kind) {
        arguments[i] = (qc_any){.type_index = QC_INTEGER, .value.integer = shape[0]};
        continue;
      }
      sizes[i] = one.bits / 8;
      for (uint32_t d = 0; d < one.dimensions; d++) sizes[i] *= (size_t)shape[d];
      void *data = aligned_alloc(64, (sizes[i] + 127) / 64 * 64);
      if (!receive(data, sizes[i])) return 2;
      tensors[i] = (qc_tensor){.data = data, .device_type = 1, .ndim = (int32_t)one.dimensions,
                               .dtype_code = (uint8_t)one.code, .dtype_bits = (uint8_t)one.bits,
                               .dtype_lanes = 1, .shape = shape};
      arguments[i] = (qc_any){.type_index = QC_TENSOR, .value.pointer = &tensors[i]};
    }
    qc_step step = {kernels[head[0]], arguments, (int32_t)head[1], 0};
    int32_t status = qc_run(&step, 1) >= 0;
    if (status) fprintf(stderr, "%s\n", qc_last_error());
    fwrite(&status, sizeof status, 1, stdout);
    for (uint32_t i = 0; i < head[1]; i++)
      if (arguments[i].type_index == QC_TENSOR) {
        fwrite(tensors[i].data, 1, sizes[i], stdout);
        free(tensors[i].data);
        free(tensors[i].shape);
      }
    fflush(stdout);
    free(arguments), free(tensors), free(sizes);
  }
  return 0;
}
