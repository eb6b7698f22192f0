// Single-precision matrix product, for linear layers and for the weight gradient of convolutions.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace dfs_engine {

// Refuses, in the name of an op, what this product does not compute: several groups, or what is not computed in float.
void check_gemm(const char* op, at::ScalarType dtype, int64_t groups = 1);

// a (M, K) times b (K, N), of any strides, plus bias (N): slices and transposes cost nothing. The order of the sums
// does not depend on the number of threads.
at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt);

// Weight gradient (out, in, kH, kW) of a convolution of one group, its product with the image's pixels as they lie,
// from dense channels_last tensors.
at::Tensor gemm_grad_weight(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation);

}  // namespace dfs_engine
