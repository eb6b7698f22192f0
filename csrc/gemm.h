// Single-precision matrix product for the linear layers.
#pragma once

#include <ATen/ATen.h>
#include <optional>

namespace dfs_engine {

// a (M, K) times b (K, N), of any strides, plus bias (N): slices and transposes cost nothing. The order of the sums does not
// depend on the number of threads.
at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt);

// Switches this product on or off for the linear layers of the process; returns what it was.
bool set_own_gemm(bool enabled);

}  // namespace dfs_engine
