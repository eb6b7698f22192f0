// Depthwise convolutions, one filter per channel, on channels_last images: they move memory and multiply little, so
// that what counts is to read each tensor as it lies, a slice of channels included, and to write each element once.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace dfs_engine {

// Refuses, in the name of an op, what these kernels do not compute: a convolution with a weight (out, in / groups, kH,
// kW).
void check_depthwise(const char* op, at::ScalarType dtype, at::IntArrayRef weight_size, int64_t groups);

// Images as they can read them: channels_last, or a slice of the channels of such a tensor. No copy where they are so.
at::Tensor with_adjacent_channels(const at::Tensor& images);

at::Tensor depthwise_conv2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation);

// Channels [start, stop) of the input's gradient, channels_last.
at::Tensor depthwise_grad_input(
    const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t start, int64_t stop);

// (C, 1, kH, kW), in float. Sums in double over fixed blocks: the result does not depend on the number of threads.
at::Tensor depthwise_grad_weight(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation);

}  // namespace dfs_engine
