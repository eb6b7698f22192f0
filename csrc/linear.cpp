// The CPU kernels of dfs_engine::linear*.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

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

// Which product runs, rather than ATen's, until dfs_engine.runtime.calibration finds the fastest one here.
std::atomic<bool> own_gemm{false};
std::atomic<bool> onednn_linear{false};  // in forward and grad_input; before own_gemm

// Float, and large enough to pay for packing.
bool uses_own(at::ScalarType dtype, int64_t rows, int64_t depth, int64_t columns) {
  return own_gemm && dtype == at::kFloat && rows >= 32 && depth >= 32 && columns >= 16 && rows * depth * columns >= (1 << 20);
}

// Float, and so many rows that what it does to the weights first, whatever their number, does not count. On one thread ATen
// takes such a convolution elsewhere.
bool uses_onednn(at::ScalarType dtype, int64_t rows, int64_t depth, int64_t columns) {
  return onednn_linear && dtype == at::kFloat && rows >= 1024 && depth >= 192 && columns >= 192 && at::get_num_threads() > 1;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return uses_own(a.scalar_type(), a.size(0), a.size(1), b.size(1)) ? gemm(a, b) : a.mm(b);
}

// oneDNN's product behind public operators: a 1x1 convolution of one image, whose pixels are the rows. No data moves.
at::Tensor as_image(const at::Tensor& rows) {
  return rows.as_strided({1, rows.size(1), rows.size(0), 1}, {rows.numel(), 1, rows.size(1), rows.size(1)});
}

at::Tensor as_rows(const at::Tensor& image) { return image.permute({0, 2, 3, 1}).reshape({image.size(2), image.size(1)}); }

at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dtype = compute_dtype(input.scalar_type());
  const auto wide_bias = bias.has_value() ? std::optional<at::Tensor>(bias->to(dtype)) : bias;
  const auto rows = input.numel() / std::max<int64_t>(1, input.size(-1));
  if (uses_onednn(dtype, rows, weight.size(1), weight.size(0))) {
    const auto output = at::conv2d(as_image(as_matrix(input, dtype)), weight.to(dtype).unsqueeze(-1).unsqueeze(-1), wide_bias);
    return as_rows(output).to(input.scalar_type()).view(with_last(input.sizes(), weight.size(0)));
  }
  if (uses_own(dtype, rows, weight.size(1), weight.size(0))) {
    const auto output = gemm(as_matrix(input, dtype), weight.to(dtype).t(), wide_bias);
    return output.to(input.scalar_type()).view(with_last(input.sizes(), weight.size(0)));
  }
  return at::linear(input.to(dtype), weight.to(dtype), wide_bias).to(input.scalar_type());
}

at::Tensor linear_grad_input_cpu(const at::Tensor& grad_output, const at::Tensor& weight, int64_t start, int64_t stop) {
  TORCH_CHECK(
      0 <= start && start <= stop && stop <= weight.size(1),
      "linear_grad_input: expected 0 <= start <= stop <= in_features=", weight.size(1), ", got start=", start, ", stop=", stop);
  const auto sizes = with_last(grad_output.sizes(), stop - start);
  if (grad_output.numel() == 0 || start == stop) {
    return at::zeros(sizes, grad_output.options());
  }
  const auto dtype = compute_dtype(grad_output.scalar_type());
  // The columns stay where they are: the GEMM takes their leading dimension.
  const auto columns = weight.narrow(1, start, stop - start).to(dtype);
  const auto rows = as_matrix(grad_output, dtype);
  if (uses_onednn(dtype, rows.size(0), rows.size(1), columns.size(1))) {
    const auto image = as_image(rows);
    // Only the shape of the input matters.
    const auto input = at::empty({1, columns.size(1), rows.size(0), 1}, image.options().memory_format(at::MemoryFormat::ChannelsLast));
    const auto gradient = std::get<0>(at::convolution_backward(
        image, input, columns.unsqueeze(-1).unsqueeze(-1), std::nullopt, {1, 1}, {0, 0}, {1, 1}, false, {0, 0}, 1, {true, false, false}));
    return as_rows(gradient).to(grad_output.scalar_type()).view(sizes);
  }
  return product(rows, columns).to(grad_output.scalar_type()).view(sizes);
}

std::tuple<at::Tensor, at::Tensor> linear_grad_weight_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, bool bias, std::optional<at::ScalarType> result_dtype) {
  const auto result = result_dtype.value_or(grad_output.scalar_type());
  const auto options = grad_output.options().dtype(result);
  const auto outputs = grad_output.size(-1), inputs = input.size(-1);
  if (grad_output.numel() == 0 || inputs == 0) {
    const auto rows = grad_output.numel() / std::max<int64_t>(outputs, 1);
    const auto grad_bias = grad_output.reshape({rows, outputs}).sum(0, /*keepdim=*/false, result);
    return {at::zeros({outputs, inputs}, options), bias ? grad_bias : at::empty({0}, options)};
  }
  const auto dtype = compute_dtype(grad_output.scalar_type());
  const auto rows = as_matrix(grad_output, dtype);
  const auto grad_weight = product(rows.t(), as_matrix(input, dtype)).to(result);
  return {grad_weight, bias ? column_sum(rows).to(result) : at::empty({0}, options)};
}

}  // namespace

bool set_own_gemm(bool enabled) { return own_gemm.exchange(enabled); }

bool set_onednn_linear(bool enabled) { return onednn_linear.exchange(enabled); }

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("linear", linear_cpu);
  m.impl("linear_grad_input", linear_grad_input_cpu);
  m.impl("linear_grad_weight", linear_grad_weight_cpu);
}

}  // namespace dfs_engine
