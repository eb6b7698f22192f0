// The CPU kernel of dfs_engine::dropout. The mask is a function of a seed and of an element's place: nothing is kept
// for the backward, which is the same call on the gradient, and every number of threads gives the same. ATen draws its
// numbers one by one, on one thread, where the CPU is not Intel's.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "instruction_set.h"

namespace dfs_engine {

namespace {

#define INNER_LOOPS "dropout.inc"
#include "kernels/for_each_instruction_set.inc"

constexpr int64_t kTask = 1 << 14;  // elements; a multiple of 64

at::Tensor dropout_cpu(const at::Tensor& input, const at::Tensor& seed, double p) {
  TORCH_CHECK(0 <= p && p < 1, "dropout: expected 0 <= p < 1, got ", p);
  TORCH_CHECK(
      seed.scalar_type() == at::kLong && seed.numel() == 1, "dropout: expected one int64 as seed, got ", seed.sizes());
  const auto from = input.contiguous();
  auto output = at::empty(from.sizes(), from.options().memory_format(at::MemoryFormat::Contiguous));
  const uint64_t key = static_cast<uint64_t>(seed.item<int64_t>());
  const auto threshold = static_cast<uint32_t>(std::min(std::llround(p * 4294967296.0), 4294967295LL));
  const auto scale = static_cast<float>(1 / (1 - p));
  dispatch_float_or_bfloat16(input.scalar_type(), "dropout", [&]<typename T>() {
    const T* source = from.const_data_ptr<T>();
    T* target = output.mutable_data_ptr<T>();
    const int64_t count = from.numel();
    at::parallel_for(0, ceil_div(count, kTask), 1, [&](int64_t begin, int64_t end) {
      DFS_DISPATCH(drop<T>(source, key, threshold, scale, begin * kTask, std::min(count, end * kTask), target));
    });
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) { m.impl("dropout", dropout_cpu); }

}  // namespace dfs_engine
