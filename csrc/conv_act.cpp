// The CPU kernels of dfs_engine::winograd_*: a convolution for evaluation alone, whose weight was transformed before,
// with what follows it.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "common.h"
#include "winograd.h"

namespace dfs_engine {

namespace {

at::Tensor winograd_weight_cpu(const at::Tensor& weight) {
  check_winograd("winograd_weight", weight.scalar_type(), weight.sizes(), {1, 1}, {0, 0}, {1, 1}, 1);
  return winograd_weight(weight);
}

std::optional<at::Tensor> as_float(const std::optional<at::Tensor>& values) {
  return values.has_value() ? std::optional<at::Tensor>(values->to(at::kFloat).contiguous()) : values;
}

std::tuple<at::Tensor, at::Tensor> winograd_conv_act_cpu(
    const at::Tensor& input, const at::Tensor& weights, int64_t out_channels, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const std::optional<at::Tensor>& residual, at::IntArrayRef padding, bool relu, bool pool, bool averages) {
  const auto dtype = input.scalar_type();
  TORCH_CHECK(
      scale.has_value() == shift.has_value() && (!pool || scale.has_value()) &&
          !(residual.has_value() && scale.has_value()),
      "winograd_conv_act: expected scale and shift together, both with a pool, and neither with a residual");
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(
        0 <= padding[axis] && padding[axis] <= 2 && input.size(2 + axis) + 2 * padding[axis] >= (pool ? 4 : 3),
        "winograd_conv_act: expected a padding of at most 2 and images not smaller than the kernel and the pool, got ",
        input.sizes(), ", padding ", padding);
  }
  for (const auto& values : {bias, scale, shift}) {
    TORCH_CHECK(
        !values.has_value() || values->numel() == out_channels, "winograd_conv_act: expected ", out_channels,
        " numbers, got ", values.has_value() ? values->numel() : 0);
  }
  ConvEnding ending{as_float(bias), as_float(scale), as_float(shift), residual, relu, pool, averages};
  if (residual.has_value()) {
    const int64_t height = input.size(2) + 2 * padding[0] - 2, width = input.size(3) + 2 * padding[1] - 2;
    TORCH_CHECK(
        residual->sizes() == at::IntArrayRef({input.size(0), out_channels, height, width}),
        "winograd_conv_act: expected a residual of the output's shape, got ", residual->sizes());
    ending.residual = dense(*residual, dtype, /*channels_last=*/true);
  }
  return winograd_conv_act(dense(input, dtype, /*channels_last=*/true), weights, out_channels, ending, padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("winograd_weight", winograd_weight_cpu);
  m.impl("winograd_conv_act", winograd_conv_act_cpu);
}

}  // namespace dfs_engine
