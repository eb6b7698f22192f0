// The CPU kernels of dfs_engine::conv2d*: the core that the caller names multiplies (winograd.cpp, depthwise.cpp,
// gemm.cpp or ATen's), and around it are the slice, layouts, dtypes and the bias gradient.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "common.h"
#include "depthwise.h"
#include "gemm.h"
#include "winograd.h"

namespace dfs_engine {

namespace {

at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

at::Tensor aten_conv2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const auto dtype = compute_dtype(input.scalar_type());
  const auto wide_bias = bias.has_value() ? std::optional<at::Tensor>(bias->to(dtype)) : bias;
  return at::conv2d(input.to(dtype), weight.to(dtype), wide_bias, stride, padding, dilation, groups)
      .to(input.scalar_type());
}

at::Tensor conv2d_cpu(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, c10::string_view kernel) {
  if (kernel == "aten" || input.numel() == 0) {
    return aten_conv2d(input, weight, bias, stride, padding, dilation, groups);
  }
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(
        input.size(2 + axis) + 2 * padding[axis] > dilation[axis] * (weight.size(2 + axis) - 1),
        "conv2d: Kernel size can't be greater than actual input size, got weight ", weight.sizes(), ", input ",
        input.sizes(), ", padding ", padding, " and dilation ", dilation);
  }
  if (kernel == "winograd") {
    check_winograd("conv2d", input.scalar_type(), weight.sizes(), stride, padding, dilation, groups);
    const bool channels_last = is_channels_last(input) || is_channels_last(weight);
    const auto float_bias = bias.has_value() ? std::optional<at::Tensor>(bias->to(at::kFloat).contiguous()) : bias;
    const auto image = dense(input, winograd_dtype(input.scalar_type()), true);
    const auto result = winograd_conv2d(image, weight.to(at::kFloat), float_bias, padding, /*flipped=*/false);
    return dense(result, input.scalar_type(), channels_last);
  }
  TORCH_CHECK(kernel == "depthwise", "conv2d: expected kernel aten, winograd or depthwise, got ", kernel);
  check_depthwise("conv2d", input.scalar_type(), weight.sizes(), groups);
  return depthwise_conv2d(with_adjacent_channels(input), weight, bias, stride, padding, dilation);
}

at::Tensor aten_grad_input(
    const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t start, int64_t stop,
    bool channels_last) {
  const auto dtype = compute_dtype(grad_output.scalar_type());
  // One group: exactly the slice. Several: all channels of the groups at hand, then the slice.
  const bool single = groups == 1;
  const auto columns = single ? weight.narrow(1, start, stop - start) : weight;
  const int64_t channels = single ? stop - start : input_size[1];
  // Only its shape and layout matter; narrowing the real input would copy it.
  const auto shape_of_input = at::empty(
      {input_size[0], channels, input_size[2], input_size[3]},
      grad_output.options().dtype(dtype).memory_format(memory_format(channels_last)));
  const auto gradient = std::get<0>(at::convolution_backward(
      dense(grad_output, dtype, channels_last), shape_of_input, dense(columns, dtype, channels_last), std::nullopt,
      stride, padding, dilation,
      /*transposed=*/false,
      /*output_padding=*/{0, 0}, groups, {true, false, false}));
  const auto slice = single ? gradient : gradient.narrow(1, start, stop - start);
  return dense(slice, grad_output.scalar_type(), channels_last);
}

at::Tensor conv2d_grad_input_cpu(
    const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t start, int64_t stop, bool channels_last,
    c10::string_view kernel) {
  TORCH_CHECK(
      0 <= start && start <= stop && stop <= input_size[1],
      "conv2d_grad_input: expected 0 <= start <= stop <= in_channels=", input_size[1], ", got start=", start,
      ", stop=", stop);
  if (input_size[0] == 0 || start == stop) {
    return at::zeros(
        {input_size[0], stop - start, input_size[2], input_size[3]},
        grad_output.options().memory_format(memory_format(channels_last)));
  }
  if (kernel == "aten" || grad_output.numel() == 0) {
    return aten_grad_input(
        grad_output, weight, input_size, stride, padding, dilation, groups, start, stop, channels_last);
  }
  const auto dtype = grad_output.scalar_type();
  if (kernel == "winograd") {
    check_winograd("conv2d_grad_input", dtype, weight.sizes(), stride, padding, dilation, groups);
    // The gradient is a convolution of grad_output with the turned weight, padded by what the kernel leaves over.
    const auto columns = weight.narrow(1, start, stop - start).transpose(0, 1).to(at::kFloat);
    const auto image = dense(grad_output, winograd_dtype(dtype), true);
    const auto gradient =
        winograd_conv2d(image, columns, std::nullopt, {2 - padding[0], 2 - padding[1]}, /*flipped=*/true);
    return dense(gradient, dtype, channels_last);
  }
  TORCH_CHECK(kernel == "depthwise", "conv2d_grad_input: expected kernel aten, winograd or depthwise, got ", kernel);
  check_depthwise("conv2d_grad_input", dtype, weight.sizes(), groups);
  const auto gradient = depthwise_grad_input(
      with_adjacent_channels(grad_output), weight, input_size, stride, padding, dilation, start, stop);
  return dense(gradient, dtype, channels_last);
}

at::Tensor aten_grad_weight(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, at::MemoryFormat weight_format) {
  return std::get<1>(at::convolution_backward(
      grad_output, input, at::empty(weight_size, grad_output.options().memory_format(weight_format)), std::nullopt,
      stride, padding, dilation,
      /*transposed=*/false,
      /*output_padding=*/{0, 0}, groups, {false, true, false}));
}

// Sums over images and pixels. Through convolution_backward's mask they would cost a second weight gradient.
at::Tensor bias_gradient(const at::Tensor& grad_output, bool channels_last, at::ScalarType dtype) {
  return channels_last ? column_sum(grad_output.permute({0, 2, 3, 1}).reshape({-1, grad_output.size(1)})).to(dtype)
                       : grad_output.sum({0, 2, 3}, /*keepdim=*/false, dtype);
}

std::tuple<at::Tensor, at::Tensor> conv2d_grad_weight_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool bias, bool weight_channels_last,
    std::optional<at::ScalarType> result_dtype, c10::string_view kernel) {
  const auto given = grad_output.scalar_type(), result = result_dtype.value_or(given);
  const auto options = grad_output.options().dtype(result);
  const auto weight_format = memory_format(weight_channels_last);
  if (grad_output.numel() == 0) {
    return {
        at::zeros(weight_size, options.memory_format(weight_format)), at::zeros({bias ? weight_size[0] : 0}, options)};
  }
  // With fewer channels than its block of 8, oneDNN on AVX2 writes past its workspace here (uxlfoundation/oneDNN#6035).
  const bool spoilt =
      groups == 1 && input.size(1) < 8 && weight_size[2] * weight_size[3] == 1 && stride[0] * stride[1] > 1;
  bool channels_last = true;
  at::Tensor output_gradient, gradient;
  if (kernel == "aten") {
    channels_last = !spoilt && (is_channels_last(input) || is_channels_last(grad_output));
    output_gradient = dense(grad_output, compute_dtype(given), channels_last);
    const auto image = dense(input, compute_dtype(given), channels_last);
    gradient = aten_grad_weight(output_gradient, image, weight_size, stride, padding, dilation, groups, weight_format);
  } else if (kernel == "winograd") {
    check_winograd("conv2d_grad_weight", given, weight_size, stride, padding, dilation, groups);
    output_gradient = dense(grad_output, winograd_dtype(given), true);
    gradient = winograd_grad_weight(output_gradient, dense(input, winograd_dtype(given), true), padding);
  } else if (kernel == "gemm") {
    check_gemm("conv2d_grad_weight", given, groups);
    output_gradient = dense(grad_output, at::kFloat, true);
    const auto image = dense(input, at::kFloat, true);
    gradient = gemm_grad_weight(output_gradient, image, weight_size, stride, padding, dilation);
  } else {
    TORCH_CHECK(
        kernel == "depthwise", "conv2d_grad_weight: expected kernel aten, winograd, depthwise or gemm, got ", kernel);
    check_depthwise("conv2d_grad_weight", given, weight_size, groups);
    output_gradient = dense(grad_output, given, true);
    const auto image = with_adjacent_channels(input);
    gradient = depthwise_grad_weight(output_gradient, image, weight_size, stride, padding, dilation);
  }
  return {
      dense(gradient, result, weight_channels_last),
      bias ? bias_gradient(output_gradient, channels_last, result) : at::empty({0}, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("conv2d.kernel", conv2d_cpu);
  m.impl("conv2d_grad_input.kernel", conv2d_grad_input_cpu);
  m.impl("conv2d_grad_weight.kernel", conv2d_grad_weight_cpu);
}

}  // namespace dfs_engine
