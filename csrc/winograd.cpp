// Winograd's minimal filtering F(4x4, 3x3) with the points 0, +-2/3, +-3/2, infinity.
//
// A 6x6 tile of the input yields a 4x4 tile of the output with 36 multiplications per channel pair instead of 144:
//   Y = A^T [ (G g G^T) * (B^T d B) ] A,   dg = G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G.
// The products are 36 matrix products over channels. The usual points 0, +-1, +-2 lose twice as many digits: measured
// RMS error against float64 1.9e-6, here 0.9e-6 (direct convolution 0.2e-6).

#include "winograd.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common.h"
#include "instruction_set.h"

namespace dfs_engine {

namespace {

constexpr float kA = 2.0f / 3, kB = 3.0f / 2;
constexpr float kA2 = 4.0f / 9, kB2 = 9.0f / 4;
constexpr float kA2B2 = 1, kA2PlusB2 = 97.0f / 36;
// 1 / product of the differences to the other finite points.
constexpr float kG0 = 1, kGA = 1 / (2 * kA2 * (kA2 - kB2)), kGB = 1 / (2 * kB2 * (kB2 - kA2));

struct Image {  // channels_last, float or bfloat16, strides in elements
  void* data;
  int64_t height, width, channels, row_stride, pixel_stride;
};

struct Weight {
  const float* data;
  int64_t out_channels, in_channels, out_stride, in_stride, row_stride, column_stride;
};

struct GradWeight {  // (out, in, 3, 3), contiguous
  float* data;
  int64_t in_channels;
};

// Transformed tiles, of which channel c is in panel c / VL, lane c % VL: [36][panels][tiles][VL].
struct Panels {
  at::Tensor memory;
  float* data;
  int64_t xi_stride, panel_stride;

  Panels(int64_t panels, int64_t tiles, int64_t vector)
      : memory(at::empty({36, panels, tiles, vector}, at::kFloat)),
        data(memory.mutable_data_ptr<float>()),
        xi_stride(panels * tiles * vector),
        panel_stride(tiles * vector) {}
  float* of(int64_t xi, int64_t panel = 0) const { return data + xi * xi_stride + panel * panel_stride; }
};

// What follows a convolution before it is written: nothing but the bias (plain); a ReLU (act); a residual and a ReLU;
// a ReLU and a normalisation (affine); these and a 2x2 max pool.
enum class Tail { plain, act, residual, affine, pool };

// Per channel, in float; floor: 0 with a ReLU, else -infinity.
struct Ending {
  const float *bias, *scale, *shift;
  float floor;
};

struct Kernels {
  int64_t vector, vectors, rows;  // VL, NV, MR
  void (*transform_input)(const Image&, int64_t, int64_t, const Panels&, int64_t);
  void (*transform_grad_output)(const Image&, int64_t, int64_t, const Panels&, int64_t);
  void (*transform_output)(const Panels&, int64_t, const Ending&, const Image&, const void*, int64_t, int64_t, float*);
  void (*weight_panel)(const Weight&, int64_t, float*, int64_t);
  void (*multiply)(const float*, int64_t, const float*, int64_t, int64_t, float*);
  void (*accumulate)(const float*, const float*, int64_t, int64_t, int64_t, bool, float*);
  void (*grad_weight_panel)(const float*, int64_t, int64_t, const GradWeight&, int64_t, int64_t);

  int64_t pair() const { return vector * vectors; }
};

#define INNER_LOOPS "winograd.inc"
#include "kernels/for_each_instruction_set.inc"

Kernels kernels(at::ScalarType of_images, Tail tail = Tail::plain) {
  return dispatch_float_or_bfloat16(
      of_images, "winograd", [&]<typename T>() { return DFS_DISPATCH(kernels<T>(tail)); });
}

// The tiles of a batch of images, in the order of memory.
struct Tiling {
  int64_t rows, columns, images;

  Tiling(int64_t num_images, int64_t height, int64_t width)
      : rows(ceil_div(height, 4)), columns(ceil_div(width, 4)), images(num_images) {}
  int64_t count() const { return images * rows * columns; }
  int64_t image(int64_t tile) const { return tile / (rows * columns); }
  int64_t y(int64_t tile) const { return tile / columns % rows * 4; }
  int64_t x(int64_t tile) const { return tile % columns * 4; }
};

// Image n of a channels_last tensor.
Image image_of(const at::Tensor& tensor, int64_t n) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  const auto bytes = n * stride[0] * static_cast<int64_t>(tensor.element_size());
  return {data + bytes, size[2], size[3], size[1], stride[2], stride[3]};
}

at::Tensor transform_weights(const Kernels& k, const at::Tensor& weight, bool flipped) {
  const auto size = weight.sizes(), stride = weight.strides();
  Weight view{weight.const_data_ptr<float>(), size[0], size[1], stride[0], stride[1], stride[2], stride[3]};
  if (flipped) {
    view.data += 2 * view.row_stride + 2 * view.column_stride;
    view.row_stride = -view.row_stride;
    view.column_stride = -view.column_stride;
  }
  const int64_t rows = ceil_div(view.in_channels, k.vector) * k.vector;
  const int64_t pairs = ceil_div(view.out_channels, k.pair());
  const int64_t pair_size = rows * k.pair();
  auto result = at::empty({36, pairs, rows, k.pair()}, at::kFloat);
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      k.weight_panel(view, pair * k.pair(), out + pair * pair_size, pairs * pair_size);
    }
  });
  return result;
}

// `sums` of accumulate, [36][pairs][out channels rounded up][pair], to the gradient of the weight.
at::Tensor transform_grad_weights(const Kernels& k, const at::Tensor& sums, int64_t out_channels, int64_t in_channels) {
  auto result = at::empty({out_channels, in_channels, 3, 3}, at::kFloat);
  const GradWeight out{result.mutable_data_ptr<float>(), in_channels};
  const float* totals = sums.const_data_ptr<float>();
  at::parallel_for(0, out_channels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t pair = 0; pair < sums.size(1); ++pair) {
      k.grad_weight_panel(totals + pair * sums.stride(1), sums.stride(0), pair * k.pair(), out, begin, end);
    }
  });
  return result;
}

std::vector<int64_t> output_size(const at::Tensor& input, int64_t out_channels, at::IntArrayRef padding) {
  return {input.size(0), out_channels, input.size(2) + 2 * padding[0] - 2, input.size(3) + 2 * padding[1] - 2};
}

// Writes the convolution of `input` by transformed weights into `output`, and what each tile adds up to, (tiles, out
// channels), into `sums`, if any. `residual`: memory like the output's. `is_staged`: for large weights; the result is
// the same, bit for bit.
void convolve(
    const Kernels& k, const at::Tensor& input, const at::Tensor& weights, const Ending& ending, const void* residual,
    at::IntArrayRef padding, const Tiling& tiling, const at::Tensor& output, float* sums, bool is_staged) {
  if (tiling.count() == 0) return;
  const float* factors = weights.const_data_ptr<float>();
  const int64_t in_panels = ceil_div(input.size(1), k.vector), pairs = weights.size(1), out_panels = pairs * k.vectors;
  const int64_t out_channels = output.size(1);
  const auto transform_input = [&](int64_t tile, const Panels& panels, int64_t place) {
    const int64_t y = tiling.y(tile) - padding[0], x = tiling.x(tile) - padding[1];
    k.transform_input(image_of(input, tiling.image(tile)), y, x, panels, place);
  };
  const auto transform_output = [&](int64_t tile, const Panels& panels, int64_t place) {
    const int64_t n = tiling.image(tile), start = n * output.stride(0) * static_cast<int64_t>(output.element_size());
    k.transform_output(
        panels, place, ending, image_of(output, n),
        residual == nullptr ? nullptr : static_cast<const char*>(residual) + start, tiling.y(tile), tiling.x(tile),
        sums == nullptr ? nullptr : sums + tile * out_channels);
  };
  // Of a last block that is not full the rest holds anything: products of tiles are apart, and those are never read.
  const int64_t floats_per_tile = 36 * k.vector * (in_panels + out_panels);
  if (is_staged) {
    // All threads transform tiles, then share out the products, then transform back: many tiles to one reading of the
    // weights.
    const int64_t limit = std::max<int64_t>(8, (1 << 20) / floats_per_tile / k.rows) * k.rows;
    const int64_t chunk = std::min(limit, ceil_div(tiling.count(), k.rows) * k.rows);
    const Panels data(in_panels, chunk, k.vector), products(out_panels, chunk, k.vector);
    for (int64_t first = 0; first < tiling.count(); first += chunk) {
      const int64_t num_tiles = std::min(chunk, tiling.count() - first);
      at::parallel_for(0, num_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t place = begin; place < end; ++place) transform_input(first + place, data, place);
      });
      at::parallel_for(0, 36 * pairs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t xi = item / pairs, pair = item % pairs;
          k.multiply(
              data.of(xi), in_panels, factors + item * weights.stride(1), 1, chunk, products.of(xi, pair * k.vectors));
        }
      });
      at::parallel_for(0, num_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t place = begin; place < end; ++place) transform_output(first + place, products, place);
      });
    }
    return;
  }
  // A block of tiles whose transforms fit in about half a megabyte, at least two rows of the kernel's registers.
  int64_t block = std::max<int64_t>(2, (1 << 17) / floats_per_tile / k.rows) * k.rows;
  block = std::min(block, ceil_div(ceil_div(tiling.count(), at::get_num_threads()), k.rows) * k.rows);
  at::parallel_for(0, ceil_div(tiling.count(), block), 1, [&](int64_t begin, int64_t end) {
    const Panels data(in_panels, block, k.vector), products(out_panels, block, k.vector);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * block, last = std::min(tiling.count(), first + block);
      for (int64_t tile = first; tile < last; ++tile) transform_input(tile, data, tile - first);
      for (int64_t xi = 0; xi < 36; ++xi) {
        k.multiply(data.of(xi), in_panels, factors + xi * weights.stride(0), pairs, block, products.of(xi));
      }
      for (int64_t tile = first; tile < last; ++tile) transform_output(tile, products, tile - first);
    }
  });
}

// (images, channels) from the sums of their tiles, in a fixed order.
at::Tensor image_averages(const at::Tensor& sums, int64_t images, int64_t pixels) {
  const int64_t channels = sums.size(1), tiles = images == 0 ? 0 : sums.size(0) / images;
  auto result = at::zeros({images, channels}, at::kFloat);
  const float* from = sums.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  at::parallel_for(0, images, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* average = to + n * channels;
      for (int64_t tile = n * tiles; tile < (n + 1) * tiles; ++tile) {
        for (int64_t c = 0; c < channels; ++c) average[c] += from[tile * channels + c];
      }
      for (int64_t c = 0; c < channels; ++c) average[c] /= static_cast<float>(pixels);
    }
  });
  return result;
}

}  // namespace

void check_winograd(
    const char* op, at::ScalarType dtype, at::IntArrayRef weight_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups) {
  const auto all = [](at::IntArrayRef values, int64_t value) {
    return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v == value; });
  };
  TORCH_CHECK(
      dtype != at::kDouble && groups == 1 && all(weight_size.slice(2), 3) && all(stride, 1) && all(dilation, 1) &&
          padding[0] <= 2 && padding[1] <= 2,
      op,
      ": the kernel winograd computes 3x3 convolutions of stride 1, dilation 1, one group and a padding of at most 2 "
      "in ",
      "float32 or less, got a weight of size ", weight_size, ", stride ", stride, ", dilation ", dilation, ", padding ",
      padding, ", groups=", groups, " and ", dtype);
}

at::ScalarType winograd_dtype(at::ScalarType dtype) { return dtype == at::kBFloat16 ? dtype : at::kFloat; }

at::Tensor winograd_conv2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef padding,
    bool flipped) {
  const Kernels k = kernels(input.scalar_type());
  const auto weights = transform_weights(k, weight, flipped);
  const Ending ending{bias.has_value() ? bias->const_data_ptr<float>() : nullptr, nullptr, nullptr, 0};
  const auto size = output_size(input, weight.size(0), padding);
  auto output = at::empty(size, input.options().memory_format(at::MemoryFormat::ChannelsLast));
  convolve(
      k, input, weights, ending, nullptr, padding, {size[0], size[2], size[3]}, output, nullptr, /*is_staged=*/false);
  return output;
}

at::Tensor winograd_weight(const at::Tensor& weight) {
  const auto wide = weight.to(at::kFloat);
  return transform_weights(kernels(at::kFloat), wide, /*flipped=*/false);
}

std::tuple<at::Tensor, at::Tensor> winograd_conv_act(
    const at::Tensor& input, const at::Tensor& weights, int64_t out_channels, const ConvEnding& given,
    at::IntArrayRef padding) {
  const Tail tail = given.residual.has_value() ? Tail::residual
      : given.pool                             ? Tail::pool
      : given.scale.has_value()                ? Tail::affine
                                               : Tail::act;
  const Kernels k = kernels(input.scalar_type(), tail);
  TORCH_CHECK(
      weights.dim() == 4 && weights.is_contiguous() && weights.size(0) == 36 && weights.size(3) == k.pair() &&
          weights.size(2) == ceil_div(input.size(1), k.vector) * k.vector &&
          weights.size(1) == ceil_div(out_channels, k.pair()),
      "winograd_conv_act: expected what winograd_weight makes of a weight (", out_channels, ", ", input.size(1),
      ", 3, 3), got ", weights.sizes());
  const auto data = [](const std::optional<at::Tensor>& values) {
    return values.has_value() ? values->const_data_ptr<float>() : nullptr;
  };
  const float floor = given.relu ? 0 : -std::numeric_limits<float>::infinity();
  const Ending ending{data(given.bias), data(given.scale), data(given.shift), floor};
  auto size = output_size(input, out_channels, padding);
  const Tiling tiling(size[0], size[2], size[3]);
  if (given.pool) size = {size[0], size[1], size[2] / 2, size[3] / 2};
  auto output = at::empty(size, input.options().memory_format(at::MemoryFormat::ChannelsLast));
  auto sums = at::empty({given.averages ? tiling.count() : 0, out_channels}, at::kFloat);
  const void* residual = given.residual.has_value() ? given.residual->const_data_ptr() : nullptr;
  // Blocks of tiles read the weights again and again, from beyond the second cache where they are larger than that.
  const bool is_staged = weights.numel() > 1 << 20;
  convolve(
      k, input, weights, ending, residual, padding, tiling, output,
      given.averages ? sums.mutable_data_ptr<float>() : nullptr, is_staged);
  return {output, image_averages(sums, given.averages ? size[0] : 0, size[2] * size[3]).to(input.scalar_type())};
}

at::Tensor winograd_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef padding) {
  const Kernels k = kernels(input.scalar_type());
  const int64_t out_channels = grad_output.size(1), in_channels = input.size(1);
  const int64_t out_panels = ceil_div(out_channels, k.vector), pairs = ceil_div(in_channels, k.pair());
  const int64_t in_panels = pairs * k.vectors;
  const Tiling tiling(grad_output.size(0), grad_output.size(2), grad_output.size(3));

  // Tiles are transformed in chunks of four megabytes by all threads; then the 36 products are shared out among them,
  // so that each sum has one owner and one order.
  const int64_t floats_per_tile = 36 * k.vector * (in_panels + out_panels);
  const int64_t chunk = std::clamp<int64_t>((1 << 20) / floats_per_tile, 32, 1024);
  const Panels data(in_panels, chunk, k.vector), gradients(out_panels, chunk, k.vector);
  // The last pair may have a panel without channels: nobody reads its sums, but denormals in it would cost time.
  const int64_t filled = ceil_div(in_channels, k.vector);
  data.memory.narrow(1, filled, in_panels - filled).zero_();
  auto sums = at::empty({36, pairs, out_panels * k.vector, k.pair()}, at::kFloat);
  float* totals = sums.mutable_data_ptr<float>();
  for (int64_t first = 0; first < tiling.count(); first += chunk) {
    const int64_t num_tiles = std::min(chunk, tiling.count() - first);
    at::parallel_for(0, num_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t n = tiling.image(first + index), y = tiling.y(first + index), x = tiling.x(first + index);
        k.transform_input(image_of(input, n), y - padding[0], x - padding[1], data, index);
        k.transform_grad_output(image_of(grad_output, n), y, x, gradients, index);
      }
    });
    at::parallel_for(0, 36 * pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t xi = item / pairs, panel = item % pairs * k.vectors;
        k.accumulate(
            data.of(xi, panel), gradients.of(xi), out_panels, num_tiles, data.panel_stride, first == 0,
            totals + item * sums.stride(1));
      }
    });
  }
  return transform_grad_weights(k, sums, out_channels, in_channels);
}

}  // namespace dfs_engine
