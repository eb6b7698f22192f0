// What the kernels share: dtypes and the bias gradient.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>

#include <string>
#include <vector>

namespace dfs_engine {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The dtype to compute in: half precision without hardware support runs 5 to 30 times slower in oneDNN than float.
at::ScalarType compute_dtype(at::ScalarType dtype);

// The half-precision dtypes that this CPU has no instructions for, by torch's names.
std::vector<std::string> emulated_dtypes();

// `tensor` in `dtype`, dense; channels_last if asked for and 4-D, else contiguous. No copy where it is so already.
at::Tensor dense(const at::Tensor& tensor, at::ScalarType dtype, bool channels_last);

// work<T>() for the C++ type of `dtype`, which is one of those that the kernels of `op` read and write.
template <typename Work>
auto dispatch_float_or_bfloat16(at::ScalarType dtype, const char* op, const Work& work) {
  const bool is_float = dtype == at::kFloat;
  TORCH_CHECK(is_float || dtype == at::kBFloat16, op, ": expected float32 or bfloat16, got ", dtype);
  return is_float ? work.template operator()<float>() : work.template operator()<c10::BFloat16>();
}

inline bool is_channels_last(const at::Tensor& tensor) {
  return tensor.is_contiguous(at::MemoryFormat::ChannelsLast) && !tensor.is_contiguous();
}

// Sums of a dense (rows, columns) matrix over its rows, in float at least. The blocks are fixed and reduced in order,
// so that the result does not depend on the number of threads.
at::Tensor column_sum(const at::Tensor& matrix);

}  // namespace dfs_engine
