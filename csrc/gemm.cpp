// Blocked matrix product: B packed once into panels that fit in L1, A packed block by block into L2, MR x NR sums in registers.

#include "gemm.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>

#include "instruction_set.h"

namespace dfs_engine {

namespace {

struct Kernels {
  int64_t rows, columns;  // MR, NR
  void (*pack_rows)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*pack_columns)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*multiply_tile)(
      const float*, const float*, int64_t, float*, int64_t, int64_t, int64_t, bool, const float*);
};

namespace baseline {
constexpr int VL = 4, NV = 2, NR = NV * VL, MR = 6;
#include "vector.inc"
#include "gemm_kernels.inc"
}  // namespace baseline

#ifdef DFS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int VL = 8, NV = 2, NR = NV * VL, MR = 6;
#include "vector.inc"
#include "gemm_kernels.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int VL = 16, NV = 2, NR = NV * VL, MR = 12;
#include "vector.inc"
#include "gemm_kernels.inc"
}  // namespace avx512
#pragma GCC pop_options
#endif

const Kernels& kernels() { return DFS_DISPATCH(kernels); }

constexpr int64_t kDepth = 320;    // a panel of B: 20 KB in L1
constexpr int64_t kRowPanels = 16;  // a block of A: 120 KB in L2

}  // namespace

at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  const Kernels& k = kernels();
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  auto result = at::empty({rows, columns}, a.options().memory_format(at::MemoryFormat::Contiguous));
  const auto shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  const float* offsets = bias.has_value() ? shift.const_data_ptr<float>() : nullptr;
  const float* left = a.const_data_ptr<float>();
  const float* right = b.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();

  const int64_t panels = ceil_div(columns, k.columns), chunks = ceil_div(depth, kDepth);
  auto packed = at::empty({panels * k.columns * depth}, result.options());
  float* packed_columns = packed.mutable_data_ptr<float>();
  // Chunk-major: [chunk][panel][depth of the chunk][NR].
  at::parallel_for(0, chunks * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / panels * kDepth, panel = item % panels, size = std::min(kDepth, depth - first);
      k.pack_columns(
          right + first * b.stride(0) + panel * k.columns * b.stride(1), b.stride(0), b.stride(1), size,
          columns - panel * k.columns, packed_columns + first * panels * k.columns + panel * k.columns * size);
    }
  });

  // Enough tasks to share out evenly, each with as much of B as possible.
  const int64_t block = kRowPanels * k.rows, blocks = ceil_div(rows, block);
  const int64_t wanted = std::max<int64_t>(1, 4 * at::get_num_threads() / std::max<int64_t>(1, blocks));
  const int64_t per_task = ceil_div(panels, std::min(wanted, panels)), strips = ceil_div(panels, per_task);
  at::parallel_for(0, blocks * strips, 1, [&](int64_t begin, int64_t end) {
    auto packed_block = at::empty({block * std::min(kDepth, depth)}, result.options());
    float* packed_rows = packed_block.mutable_data_ptr<float>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / strips * block, num_rows = std::min(block, rows - first_row);
      const int64_t first_panel = task % strips * per_task, last_panel = std::min(panels, first_panel + per_task);
      for (int64_t first = 0; first < depth; first += kDepth) {
        const int64_t size = std::min(kDepth, depth - first);
        k.pack_rows(left + first_row * a.stride(0) + first * a.stride(1), a.stride(0), a.stride(1), num_rows, size, packed_rows);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t column = panel * k.columns;
          const float* factors = packed_columns + first * panels * k.columns + column * size;
          for (int64_t row = 0; row < num_rows; row += k.rows) {
            k.multiply_tile(
                packed_rows + row * size, factors, size, out + (first_row + row) * columns + column, columns,
                std::min(k.rows, num_rows - row), std::min(k.columns, columns - column), first == 0,
                offsets == nullptr ? nullptr : offsets + column);
          }
        }
      }
    }
  });
  return result;
}

}  // namespace dfs_engine
