// The CPU kernels of dfs_engine::linear*: the product that the caller names, ATen's, oneDNN's or gemm.cpp's.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "common.h"
#include "gemm.h"

namespace dfs_engine {

namespace {

at::Tensor as_matrix(const at::Tensor& tensor, at::ScalarType dtype) {
  return dense(tensor.reshape({-1, tensor.size(-1)}), dtype, /*channels_last=*/false);
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// oneDNN's product behind public operators: a 1x1 convolution of one image, whose pixels are the rows. No data moves.
at::Tensor as_image(const at::Tensor& rows) {
  return rows.as_strided({1, rows.size(1), rows.size(0), 1}, {rows.numel(), 1, rows.size(1), rows.size(1)});
}

at::Tensor as_rows(const at::Tensor& image) {
  return image.permute({0, 2, 3, 1}).reshape({image.size(2), image.size(1)});
}

at::Tensor onednn_linear(const at::Tensor& rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return as_rows(at::conv2d(as_image(rows), weight.unsqueeze(-1).unsqueeze(-1), bias));
}

// rows (R, out) times columns (out, C).
at::Tensor onednn_grad_input(const at::Tensor& rows, const at::Tensor& columns) {
  const auto image = as_image(rows);
  // Only the shape of the input matters.
  const auto input =
      at::empty({1, columns.size(1), rows.size(0), 1}, image.options().memory_format(at::MemoryFormat::ChannelsLast));
  return as_rows(
      std::get<0>(at::convolution_backward(
          image, input, columns.unsqueeze(-1).unsqueeze(-1), std::nullopt, {1, 1}, {0, 0}, {1, 1}, /*transposed=*/false,
          /*output_padding=*/{0, 0}, 1, {true, false, false})));
}

at::Tensor linear_cpu(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::string_view kernel) {
  const auto given = input.scalar_type(), dtype = compute_dtype(given);
  const auto wide_bias = bias.has_value() ? std::optional<at::Tensor>(bias->to(dtype)) : bias;
  if (kernel == "aten" || input.numel() == 0) return at::linear(input.to(dtype), weight.to(dtype), wide_bias).to(given);
  const auto sizes = with_last(input.sizes(), weight.size(0));
  const auto rows = as_matrix(input, dtype);
  if (kernel == "onednn") return onednn_linear(rows, weight.to(dtype), wide_bias).to(given).view(sizes);
  TORCH_CHECK(kernel == "gemm", "linear: expected kernel aten, onednn or gemm, got ", kernel);
  check_gemm("linear", given);
  return gemm(rows, weight.to(dtype).t(), wide_bias).to(given).view(sizes);
}

at::Tensor linear_grad_input_cpu(
    const at::Tensor& grad_output, const at::Tensor& weight, int64_t start, int64_t stop, c10::string_view kernel) {
  TORCH_CHECK(
      0 <= start && start <= stop && stop <= weight.size(1),
      "linear_grad_input: expected 0 <= start <= stop <= in_features=", weight.size(1), ", got start=", start,
      ", stop=", stop);
  const auto sizes = with_last(grad_output.sizes(), stop - start);
  if (grad_output.numel() == 0 || start == stop) {
    return at::zeros(sizes, grad_output.options());
  }
  const auto given = grad_output.scalar_type(), dtype = compute_dtype(given);
  // The columns stay where they are: the GEMM takes their leading dimension.
  const auto columns = weight.narrow(1, start, stop - start).to(dtype);
  const auto rows = as_matrix(grad_output, dtype);
  if (kernel == "aten") return rows.mm(columns).to(given).view(sizes);
  if (kernel == "onednn") return onednn_grad_input(rows, columns).to(given).view(sizes);
  TORCH_CHECK(kernel == "gemm", "linear_grad_input: expected kernel aten, onednn or gemm, got ", kernel);
  check_gemm("linear_grad_input", given);
  return gemm(rows, columns).to(given).view(sizes);
}

std::tuple<at::Tensor, at::Tensor> linear_grad_weight_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, bool bias, std::optional<at::ScalarType> result_dtype,
    c10::string_view kernel) {
  const auto given = grad_output.scalar_type(), dtype = compute_dtype(given), result = result_dtype.value_or(given);
  const auto options = grad_output.options().dtype(result);
  const auto outputs = grad_output.size(-1), inputs = input.size(-1);
  if (grad_output.numel() == 0 || inputs == 0) {
    const auto rows = grad_output.numel() / std::max<int64_t>(outputs, 1);
    const auto grad_bias = grad_output.reshape({rows, outputs}).sum(0, /*keepdim=*/false, result);
    return {at::zeros({outputs, inputs}, options), bias ? grad_bias : at::empty({0}, options)};
  }
  TORCH_CHECK(kernel == "aten" || kernel == "gemm", "linear_grad_weight: expected kernel aten or gemm, got ", kernel);
  if (kernel == "gemm") check_gemm("linear_grad_weight", given);
  const auto rows = as_matrix(grad_output, dtype), data = as_matrix(input, dtype);
  const auto grad_weight = kernel == "gemm" ? gemm(rows.t(), data) : rows.t().mm(data);
  return {grad_weight.to(result), bias ? column_sum(rows).to(result) : at::empty({0}, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("linear.kernel", linear_cpu);
  m.impl("linear_grad_input.kernel", linear_grad_input_cpu);
  m.impl("linear_grad_weight.kernel", linear_grad_weight_cpu);
}

}  // namespace dfs_engine
