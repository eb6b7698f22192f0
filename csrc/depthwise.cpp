#include "depthwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common.h"
#include "instruction_set.h"

namespace dfs_engine {

namespace {

// One tap of the filter over one row of the output: which row it reads, from which offset for each output pixel.
template <typename T>
struct Tap {
  const T* row;
  const int64_t* source;
  const float* weight;  // what a convolution multiplies with
  double* sum;          // where a weight gradient adds
};

template <typename T>
struct Kernels {
  void (*gather_row)(const Tap<T>*, int64_t, const float*, int64_t, int64_t, T*);
  void (*reduce_row)(const Tap<T>*, int64_t, const T*, int64_t, int64_t, int64_t, float*);
};

#define INNER_LOOPS "depthwise.inc"
#include "kernels/for_each_instruction_set.inc"

template <typename T>
Kernels<T> kernels() {
  return DFS_DISPATCH(kernels<T>());
}

constexpr int64_t kTaskElements = 1 << 14;  // what one task writes or reads, about

// An image tensor whose channels are adjacent.
template <typename T>
struct Images {
  const T* data;
  int64_t image, row, pixel;  // strides

  explicit Images(const at::Tensor& t)
      : data(t.const_data_ptr<T>()), image(t.stride(0)), row(t.stride(2)), pixel(t.stride(3)) {}

  const T* row_of(int64_t index, int64_t y) const { return data + index * image + y * row; }
};

// What a filter does along one axis. For output position p and tap t the convolution reads
// p * stride - padding + t * dilation; its adjoint reads, for position p of the input,
// (p + padding - t * dilation) / stride where that divides.
class Axis {
 public:
  Axis(int64_t taps, int64_t outputs, int64_t inputs, int64_t stride, int64_t padding, int64_t dilation, bool adjoint)
      : taps_(taps), outputs_(outputs), sources_(taps * outputs) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t p = 0; p < outputs; ++p) {
        const int64_t position = adjoint ? p + padding - tap * dilation : p * stride - padding + tap * dilation;
        const int64_t source = adjoint ? position / stride : position;
        const bool exists = position >= 0 && source < inputs && (!adjoint || position % stride == 0);
        sources_[tap * outputs + p] = exists ? source : -1;
      }
    }
  }

  int64_t taps() const { return taps_; }
  int64_t outputs() const { return outputs_; }
  int64_t source(int64_t tap, int64_t p) const { return sources_[tap * outputs_ + p]; }
  const int64_t* sources(int64_t tap) const { return sources_.data() + tap * outputs_; }

  // Positions become offsets in memory.
  Axis scaled(int64_t by) const {
    Axis copy = *this;
    for (auto& source : copy.sources_) source *= source < 0 ? 1 : by;
    return copy;
  }

 private:
  int64_t taps_, outputs_;
  std::vector<int64_t> sources_;
};

struct Filter {
  Axis y, x;

  Filter(
      at::IntArrayRef kernel, at::IntArrayRef output, at::IntArrayRef input, at::IntArrayRef stride,
      at::IntArrayRef padding, at::IntArrayRef dilation, bool adjoint = false)
      : y(kernel[0], output[0], input[0], stride[0], padding[0], dilation[0], adjoint),
        x(kernel[1], output[1], input[1], stride[1], padding[1], dilation[1], adjoint) {}
};

// The taps that row `y` of an image's output needs, with their weights or sums, both (taps, channels).
template <typename T>
void taps_of_row(
    const Filter& filter, const Axis& offsets, const Images<T>& images, int64_t index, int64_t y, int64_t channels,
    const float* weights, double* sums, std::vector<Tap<T>>& taps) {
  taps.clear();
  for (int64_t ky = 0; ky < filter.y.taps(); ++ky) {
    const int64_t source = filter.y.source(ky, y);
    if (source < 0) continue;
    for (int64_t kx = 0; kx < filter.x.taps(); ++kx) {
      const int64_t offset = (ky * filter.x.taps() + kx) * channels;
      taps.push_back(
          {images.row_of(index, source), offsets.sources(kx), weights == nullptr ? nullptr : weights + offset,
           sums == nullptr ? nullptr : sums + offset});
    }
  }
}

// Convolution or, with a filter of adjoint axes, its transpose: writes every element of `output`, dense channels_last.
template <typename T>
void gather(
    const at::Tensor& input, const at::Tensor& weight, const float* bias, const Filter& filter, at::Tensor& output) {
  const auto k = kernels<T>();
  const Images<T> images(input);
  const Axis offsets = filter.x.scaled(images.pixel);
  const int64_t channels = output.size(1), height = output.size(2), width = output.size(3);
  const auto by_tap = weight.reshape({channels, -1}).t().to(at::kFloat).contiguous();
  const float* weights = by_tap.const_data_ptr<float>();
  T* to = output.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width * channels));
  at::parallel_for(0, output.size(0) * height, grain, [&](int64_t begin, int64_t end) {
    std::vector<Tap<T>> taps;
    for (int64_t row = begin; row < end; ++row) {
      taps_of_row(filter, offsets, images, row / height, row % height, channels, weights, nullptr, taps);
      k.gather_row(taps.data(), taps.size(), bias, width, channels, to + row * width * channels);
    }
  });
}

template <typename T>
at::Tensor reduce(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, const Filter& filter) {
  const auto k = kernels<T>();
  const Images<T> images(input), gradients(grad_output);
  const Axis offsets = filter.x.scaled(images.pixel);
  const int64_t channels = weight_size[0], num_taps = filter.y.taps() * filter.x.taps();
  const int64_t height = grad_output.size(2), width = grad_output.size(3), rows = grad_output.size(0) * height;
  // A few large blocks: each has sums of its own.
  const int64_t per_block =
      std::max(ceil_div(rows, 32), std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width * channels)));
  const int64_t blocks = ceil_div(rows, per_block);
  auto sums = at::zeros({blocks, num_taps, channels}, at::kDouble);
  double* to = sums.mutable_data_ptr<double>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tap<T>> taps;
    std::vector<float> row_sums(num_taps * channels);
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t row = block * per_block; row < std::min(rows, (block + 1) * per_block); ++row) {
        const int64_t index = row / height, y = row % height;
        taps_of_row<T>(filter, offsets, images, index, y, channels, nullptr, to + block * num_taps * channels, taps);
        k.reduce_row(
            taps.data(), taps.size(), gradients.row_of(index, y), gradients.pixel, width, channels, row_sums.data());
      }
    }
  });
  return sums.sum(0).t().to(at::kFloat).reshape(weight_size);
}

}  // namespace

void check_depthwise(const char* op, at::ScalarType dtype, at::IntArrayRef weight_size, int64_t groups) {
  TORCH_CHECK(
      (dtype == at::kFloat || dtype == at::kBFloat16) && groups == weight_size[0] && weight_size[1] == 1, op,
      ": the kernel depthwise computes one filter per channel in float32 and bfloat16, got a weight of size ",
      weight_size, ", groups=", groups, " and ", dtype);
}

at::Tensor with_adjacent_channels(const at::Tensor& images) {
  const auto stride = images.strides();
  const bool adjacent =
      stride[1] == 1 && stride[3] >= images.size(1) && stride[2] >= stride[3] && stride[0] >= stride[2];
  return adjacent ? images : dense(images, images.scalar_type(), /*channels_last=*/true);
}

at::Tensor depthwise_conv2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto kernel = weight.sizes().slice(2), size = input.sizes().slice(2);
  std::vector<int64_t> out_size;
  for (int axis = 0; axis < 2; ++axis) {
    out_size.push_back((size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1);
  }
  auto output = at::empty(
      {input.size(0), weight.size(0), out_size[0], out_size[1]},
      input.options().memory_format(at::MemoryFormat::ChannelsLast));
  const auto float_bias = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* shift = bias.has_value() ? float_bias.const_data_ptr<float>() : nullptr;
  const Filter filter(kernel, out_size, size, stride, padding, dilation);
  dispatch_float_or_bfloat16(
      input.scalar_type(), "depthwise_conv2d", [&]<typename T>() { gather<T>(input, weight, shift, filter, output); });
  return output;
}

at::Tensor depthwise_grad_input(
    const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t start, int64_t stop) {
  const auto gradient = grad_output.narrow(1, start, stop - start);
  const auto filters = weight.narrow(0, start, stop - start);
  auto grad_input = at::empty(
      {input_size[0], stop - start, input_size[2], input_size[3]},
      gradient.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Filter filter(
      weight.sizes().slice(2), input_size.slice(2), gradient.sizes().slice(2), stride, padding, dilation,
      /*adjoint=*/true);
  dispatch_float_or_bfloat16(gradient.scalar_type(), "depthwise_grad_input", [&]<typename T>() {
    gather<T>(gradient, filters, nullptr, filter, grad_input);
  });
  return grad_input;
}

at::Tensor depthwise_grad_weight(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Filter filter(
      weight_size.slice(2), grad_output.sizes().slice(2), input.sizes().slice(2), stride, padding, dilation);
  return dispatch_float_or_bfloat16(input.scalar_type(), "depthwise_grad_weight", [&]<typename T>() {
    return reduce<T>(grad_output, input, weight_size, filter);
  });
}

}  // namespace dfs_engine
