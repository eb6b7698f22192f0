// What the kernels share: compute dtypes and the bias gradient.
#pragma once

#include <ATen/ATen.h>
#include <tuple>

namespace dfs_engine {

// The dtype to compute in: half precision without hardware support runs 5 to 30 times slower in oneDNN than float.
at::ScalarType compute_dtype(at::ScalarType dtype);

// `tensor` in `dtype`, dense; channels_last if asked for and 4-D, else contiguous. No copy where it is so already.
at::Tensor dense(const at::Tensor& tensor, at::ScalarType dtype, bool channels_last);

inline bool is_channels_last(const at::Tensor& tensor) {
  return tensor.is_contiguous(at::MemoryFormat::ChannelsLast) && !tensor.is_contiguous();
}

// Sums of a dense (rows, columns) matrix over its rows, in float at least. The blocks are fixed and reduced in order, so that the
// result does not depend on the number of threads.
at::Tensor column_sum(const at::Tensor& matrix);

}  // namespace dfs_engine
