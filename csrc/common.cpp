#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <vector>

#include "instruction_set.h"
#ifdef DFS_X86
#include <cpuid.h>
#endif

namespace dfs_engine {

namespace {

// oneDNN computes bfloat16 on every CPU with AVX-512. Where that lacks AVX512_BF16 it emulates, at a quarter of the
// speed that it has in float.
bool is_bfloat16_emulated() {
#ifdef DFS_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_avx512_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  return best_cpu_level() == CpuLevel::avx512 && !has_avx512_bf16;
#else
  return false;
#endif
}

bool ask(const char* op) { return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<bool()>().call(); }

constexpr int64_t kRowsPerBlock = 512;

template <typename scalar_t>
void sum_blocks(const scalar_t* matrix, int64_t rows, int64_t columns, at::opmath_type<scalar_t>* partial) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t blocks = ceil_div(rows, kRowsPerBlock);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      acc_t* sums = partial + block * columns;
      std::fill(sums, sums + columns, acc_t(0));
      const int64_t last = std::min(rows, (block + 1) * kRowsPerBlock);
      for (int64_t row = block * kRowsPerBlock; row < last; ++row) {
        const scalar_t* values = matrix + row * columns;
        for (int64_t column = 0; column < columns; ++column) {
          sums[column] += static_cast<acc_t>(values[column]);
        }
      }
    }
  });
}

}  // namespace

at::ScalarType compute_dtype(at::ScalarType dtype) {
  static const bool native_bf16 = ask("mkldnn::_is_mkldnn_bf16_supported") && !is_bfloat16_emulated();
  static const bool native_fp16 = ask("mkldnn::_is_mkldnn_fp16_supported");
  const bool emulated = (dtype == at::kBFloat16 && !native_bf16) || (dtype == at::kHalf && !native_fp16);
  return emulated ? at::kFloat : dtype;
}

std::vector<std::string> emulated_dtypes() {
  std::vector<std::string> names;
  if (compute_dtype(at::kBFloat16) == at::kFloat) names.emplace_back("bfloat16");
  if (compute_dtype(at::kHalf) == at::kFloat) names.emplace_back("float16");
  return names;
}

at::Tensor dense(const at::Tensor& tensor, at::ScalarType dtype, bool channels_last) {
  const auto format =
      channels_last && tensor.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return tensor.to(tensor.options().dtype(dtype), /*non_blocking=*/false, /*copy=*/false, format).contiguous(format);
}

at::Tensor column_sum(const at::Tensor& matrix) {
  TORCH_INTERNAL_ASSERT(matrix.dim() == 2 && matrix.is_contiguous());
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const int64_t blocks = ceil_div(rows, kRowsPerBlock);
  const auto acc = at::toOpMathType(matrix.scalar_type());
  auto partial = at::empty({blocks, columns}, matrix.options().dtype(acc));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, matrix.scalar_type(), "dfs_engine::column_sum", [&] {
    sum_blocks<scalar_t>(
        matrix.const_data_ptr<scalar_t>(), rows, columns, partial.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return partial.sum(0);
}

}  // namespace dfs_engine
