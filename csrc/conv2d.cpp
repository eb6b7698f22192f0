// The CPU kernels of dfs_engine::conv2d*: which core multiplies (winograd.cpp, depthwise.cpp, gemm.cpp or oneDNN), and around it
// the slice, layouts, dtypes and the bias gradient.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <atomic>

#include "common.h"
#include "depthwise.h"
#include "gemm.h"
#include "winograd.h"

namespace dfs_engine {

namespace {

// Whether weight gradients run by this project's product, rather than oneDNN's.
std::atomic<bool> own_grad_weight{false};  // until dfs_engine.runtime.calibration finds it the faster one here

at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

at::Tensor conv2d_cpu(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups) {
  const auto dtype = compute_dtype(input.scalar_type());
  const bool narrow = dtype != input.scalar_type();
  const auto wide_bias = bias.has_value() && narrow ? std::optional<at::Tensor>(bias->to(dtype)) : bias;
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  // An image smaller than the kernel is an error, which is for ATen to word.
  const auto fits = [&](int axis) {
    return input.size(2 + axis) + 2 * padding[axis] > dilation[axis] * (weight.size(2 + axis) - 1);
  };
  const bool has_output = fits(0) && fits(1);
  if (input.numel() > 0 && has_output &&
      winograd_applies(
          input.scalar_type(), input.size(1), weight.size(0), weight.sizes().slice(2), stride, padding, dilation, groups) &&
      winograd_pays(
          input.scalar_type(), input.size(1), weight.size(0), input.size(0), input.size(2) + 2 * padding[0] - 2,
          input.size(3) + 2 * padding[1] - 2)) {
    const auto float_bias = bias.has_value() ? std::optional<at::Tensor>(bias->to(at::kFloat).contiguous()) : bias;
    const auto image = dense(input, *winograd_dtype(input.scalar_type()), true);
    const auto result = winograd_conv2d(image, weight.to(at::kFloat), float_bias, padding, /*flipped=*/false);
    return dense(result, input.scalar_type(), channels_last);
  }
  if (input.numel() > 0 && has_output && has_adjacent_channels(input) &&
      depthwise_applies(input.scalar_type(), weight.sizes(), groups)) {
    return depthwise_conv2d(input, weight, bias, stride, padding, dilation);
  }
  const auto output = at::conv2d(
      narrow ? input.to(dtype) : input, narrow ? weight.to(dtype) : weight, wide_bias, stride, padding, dilation, groups);
  return narrow ? output.to(input.scalar_type()) : output;
}

at::Tensor conv2d_grad_input_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& weight,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    int64_t start,
    int64_t stop,
    bool channels_last) {
  TORCH_CHECK(
      0 <= start && start <= stop && stop <= input_size[1],
      "conv2d_grad_input: expected 0 <= start <= stop <= in_channels=", input_size[1], ", got start=", start, ", stop=", stop);
  const auto format = memory_format(channels_last);
  const auto result_options = grad_output.options();
  if (input_size[0] == 0 || start == stop) {
    return at::zeros({input_size[0], stop - start, input_size[2], input_size[3]}, result_options.memory_format(format));
  }
  const auto dtype = compute_dtype(grad_output.scalar_type());
  // One group: exactly the slice. Several: all channels of the groups at hand, then the slice.
  const bool single = groups == 1;
  if (winograd_applies(
          grad_output.scalar_type(), weight.size(0), stop - start, weight.sizes().slice(2), stride, padding, dilation,
          groups) &&
      winograd_pays(grad_output.scalar_type(), weight.size(0), stop - start, input_size[0], input_size[2], input_size[3])) {
    // The gradient is a convolution of grad_output with the turned weight, padded by what the kernel leaves over.
    const auto columns = weight.narrow(1, start, stop - start).transpose(0, 1).to(at::kFloat);
    const auto gradient = winograd_conv2d(
        dense(grad_output, *winograd_dtype(grad_output.scalar_type()), true), columns, std::nullopt, {2 - padding[0], 2 - padding[1]}, /*flipped=*/true);
    return dense(gradient, grad_output.scalar_type(), channels_last);
  }
  if (channels_last && grad_output.numel() > 0 && depthwise_applies(grad_output.scalar_type(), weight.sizes(), groups)) {
    const auto gradient = has_adjacent_channels(grad_output) ? grad_output : dense(grad_output, grad_output.scalar_type(), true);
    return depthwise_grad_input(gradient, weight, input_size, stride, padding, dilation, start, stop);
  }
  const auto columns = single ? weight.narrow(1, start, stop - start) : weight;
  const int64_t channels = single ? stop - start : input_size[1];
  // Only its shape and layout matter; narrowing the real input would copy it.
  const auto shape_of_input =
      at::empty({input_size[0], channels, input_size[2], input_size[3]}, result_options.dtype(dtype).memory_format(format));
  const auto gradient = std::get<0>(at::convolution_backward(
      dense(grad_output, dtype, channels_last),
      shape_of_input,
      dense(columns, dtype, channels_last),
      std::nullopt,
      stride,
      padding,
      dilation,
      /*transposed=*/false,
      /*output_padding=*/{0, 0},
      groups,
      {true, false, false}));
  const auto slice = single ? gradient : gradient.narrow(1, start, stop - start);
  return dense(slice, grad_output.scalar_type(), channels_last);
}

std::tuple<at::Tensor, at::Tensor> conv2d_grad_weight_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    at::IntArrayRef weight_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    bool bias,
    bool weight_channels_last,
    std::optional<at::ScalarType> result_dtype) {
  const auto result = result_dtype.value_or(grad_output.scalar_type());
  const auto options = grad_output.options().dtype(result);
  const auto weight_format = memory_format(weight_channels_last);
  auto grad_bias = bias ? at::zeros({weight_size[0]}, options) : at::empty({0}, options);
  if (grad_output.numel() == 0) {
    return {at::zeros(weight_size, options.memory_format(weight_format)), grad_bias};
  }
  const bool winograd = winograd_applies(
      grad_output.scalar_type(), input.size(1), weight_size[0], weight_size.slice(2), stride, padding, dilation, groups) &&
      winograd_pays_in_grad_weight(input.size(1), weight_size[0]);
  const bool depthwise = has_adjacent_channels(input) && depthwise_applies(input.scalar_type(), weight_size, groups);
  const auto dtype = winograd ? *winograd_dtype(grad_output.scalar_type())
      : depthwise             ? grad_output.scalar_type()
                              : compute_dtype(grad_output.scalar_type());
  // With few channels the panels would be mostly empty, and one tap reads too little to pay for packing.
  const bool own = !winograd && own_grad_weight && dtype == at::kFloat && groups == 1 && weight_size[0] >= 16 &&
      weight_size[1] >= 16 && weight_size[2] * weight_size[3] > 1;
  // With fewer channels than its block of 8, oneDNN on AVX2 writes past its workspace here (uxlfoundation/oneDNN#6035).
  const bool spoilt = groups == 1 && input.size(1) < 8 && weight_size[2] * weight_size[3] == 1 && stride[0] * stride[1] > 1;
  const bool channels_last =
      !spoilt && (winograd || own || depthwise || is_channels_last(input) || is_channels_last(grad_output));
  const auto output_gradient = dense(grad_output, dtype, channels_last);
  const auto dense_input = depthwise ? input : dense(input, dtype, channels_last);
  const auto gradient = winograd ? winograd_grad_weight(output_gradient, dense_input, padding)
      : depthwise ? depthwise_grad_weight(output_gradient, dense_input, weight_size, stride, padding, dilation)
      : own ? gemm_grad_weight(output_gradient, dense_input, weight_size, stride, padding, dilation)
      : std::get<1>(at::convolution_backward(
            output_gradient,
            dense_input,
            at::empty(weight_size, options.dtype(dtype).memory_format(weight_format)),
            std::nullopt,
            stride,
            padding,
            dilation,
            /*transposed=*/false,
            /*output_padding=*/{0, 0},
            groups,
            {false, true, false}));
  if (bias) {
    // Through convolution_backward's mask it would cost a second weight gradient.
    grad_bias = channels_last
        ? column_sum(output_gradient.permute({0, 2, 3, 1}).reshape({-1, weight_size[0]}))
        : output_gradient.sum({0, 2, 3}, /*keepdim=*/false, result);
    grad_bias = grad_bias.to(result);
  }
  return {dense(gradient, result, weight_channels_last), grad_bias};
}

}  // namespace

bool set_own_grad_weight(bool enabled) { return own_grad_weight.exchange(enabled); }

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("conv2d", conv2d_cpu);
  m.impl("conv2d_grad_input", conv2d_grad_input_cpu);
  m.impl("conv2d_grad_weight", conv2d_grad_weight_cpu);
}

}  // namespace dfs_engine
