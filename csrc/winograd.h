// 3x3, stride 1 convolutions by Winograd's F(4x4, 3x3): a quarter of the multiplications, in float, on images in float
// or bfloat16.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace dfs_engine {

// Refuses, in the name of an op, what these kernels do not compute: convolutions other than 3x3 ones of stride 1.
void check_winograd(
    const char* op, at::ScalarType dtype, at::IntArrayRef weight_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups);

// The dtype in which these kernels read and write images of `dtype`.
at::ScalarType winograd_dtype(at::ScalarType dtype);

// Convolution of a channels_last input of a `winograd_dtype` with a float weight (out, in, 3, 3) of any strides and a
// contiguous float bias. `flipped`: correlate with the weight turned by 180 degrees (the gradient of the input).
at::Tensor winograd_conv2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef padding,
    bool flipped);

// What winograd_conv_act takes in place of a weight (out, in, 3, 3), in the order of this machine's kernels: of use in
// this process alone.
at::Tensor winograd_weight(const at::Tensor& weight);

// What follows a convolution: bias, residual, ReLU, y * scale + shift, 2x2 max pool, in this order. Vectors are float,
// contiguous; the residual is like the output. With a residual there is neither scale nor pool, with a pool a scale;
// scale and shift come together.
struct ConvEnding {
  std::optional<at::Tensor> bias, scale, shift, residual;
  bool relu, pool, averages;
};

// The convolution of a channels_last input of a `winograd_dtype`, and its averages over the pixels, (images, channels),
// or, without `averages`, (0, channels).
std::tuple<at::Tensor, at::Tensor> winograd_conv_act(
    const at::Tensor& input, const at::Tensor& weights, int64_t out_channels, const ConvEnding& ending,
    at::IntArrayRef padding);

// Gradient (out, in, 3, 3) of the weight, in float, from channels_last tensors of a `winograd_dtype`. The same for any
// number of threads.
at::Tensor winograd_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef padding);

}  // namespace dfs_engine
