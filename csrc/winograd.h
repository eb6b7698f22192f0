// 3x3, stride 1 convolutions by Winograd's F(4x4, 3x3): a quarter of the multiplications, in float, on images in float or
// bfloat16.
#pragma once

#include <ATen/ATen.h>
#include <optional>
#include <string>

namespace dfs_engine {

// The dtype in which these kernels read and write images of `dtype`; none where they leave them to oneDNN.
std::optional<at::ScalarType> winograd_dtype(at::ScalarType dtype);

// Whether Winograd computes this convolution of images of `dtype`.
bool winograd_applies(
    at::ScalarType dtype,
    int64_t in_channels,
    int64_t out_channels,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups);

// Whether it does so faster than oneDNN, for outputs of so many images and pixels; or what set_winograd says.
bool winograd_pays(at::ScalarType dtype, int64_t in_channels, int64_t out_channels, int64_t images, int64_t height, int64_t width);

// The same for the gradient of the weight.
bool winograd_pays_in_grad_weight(int64_t in_channels, int64_t out_channels);

// Convolution of a channels_last input of a `winograd_dtype` with a float weight (out, in, 3, 3) of any strides and a contiguous
// float bias.
// `flipped`: correlate with the weight turned by 180 degrees (the gradient of the input).
at::Tensor winograd_conv2d(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef padding,
    bool flipped);

// Gradient (out, in, 3, 3) of the weight, in float, from channels_last tensors of a `winograd_dtype`. The same for any number
// of threads.
at::Tensor winograd_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef padding);

// For the process: wherever it applies, nowhere, or (none) where it pays; returns what it was.
std::optional<bool> set_winograd(std::optional<bool> enabled);

// Whether bfloat16 images are convolved here even where the CPU multiplies bfloat16 itself; returns what it was.
bool set_half_winograd(bool enabled);

// The instruction set in use: "avx512", "avx2" or "baseline".
std::string instruction_set();

}  // namespace dfs_engine
