// Marlin's kernel for int4 in groups of 128 and float16, as a peer of benchmarks.gpu. Its sources come
// with the source distribution of GPTQModel (7.7.0 was used), folder gptqmodel_ext/marlin:
//
//   nvcc -O3 -std=c++17 -arch=sm_90 --expt-relaxed-constexpr -Xcompiler -fPIC -shared
//        -I benchmarks/marlin -I .../gptqmodel_ext/marlin -o libmarlin.so benchmarks/marlin/launch.cu
//
// Tiles by rows are those that GPTQModel takes on GPUs other than an A100.
#include "kernel.h"
#include "marlin_template.h"

constexpr int GROUP = 128;

struct Product {
  const void *x, *codes, *scales;
  void *result, *sums;
  int rows, outputs, channels, *locks;
};

template <int ROW_BLOCKS, int OUTPUT_BLOCKS, int CHANNEL_BLOCKS, bool EIGHT_ROWS>
int launch(const Product& p, cudaStream_t stream) {
  constexpr int threads = 256, group_blocks = GROUP / 16;
  auto kernel = marlin::Marlin<half, vllm::kU4B8.id(), vllm::kFloat16.id(), threads, ROW_BLOCKS,
                               OUTPUT_BLOCKS, CHANNEL_BLOCKS, EIGHT_ROWS, marlin::pipe_stages,
                               group_blocks, false>;
  int device = 0, multiprocessors = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  kernel<<<multiprocessors, threads, shared, stream>>>(
      (const int4*)p.x, (const int4*)p.codes, (int4*)p.result, (int4*)p.sums, nullptr,
      (const int4*)p.scales, nullptr, nullptr, nullptr, p.channels / GROUP, p.rows, p.outputs,
      p.channels, p.channels, p.locks, false, false, true, shared);
  return (int)cudaGetLastError();
}

// Returns CUDA's error code. `sums` holds 64 x 256 float32 a multiprocessor, `locks` zeros.
extern "C" int marlin_product(const void* x, const void* codes, const void* scales, void* result,
                              void* sums, int* locks, int rows, int outputs, int channels,
                              void* stream) {
  Product p{x, codes, scales, result, sums, rows, outputs, channels, locks};
  auto on = (cudaStream_t)stream;
  if (rows <= 8) return launch<1, 8, 8, true>(p, on);
  if (rows <= 16) return launch<1, 8, 8, false>(p, on);
  if (rows <= 32) return launch<2, 16, 4, false>(p, on);
  if (rows <= 48) return launch<3, 16, 4, false>(p, on);
  if (rows <= 64) return launch<4, 16, 4, false>(p, on);
  return -1;
}
