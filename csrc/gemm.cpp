// Blocked matrix product: B packed into panels that fit in L1, A block by block into L2, MR x NR sums in registers.

#include "gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "common.h"
#include "instruction_set.h"

namespace dfs_engine {

namespace {

struct Kernels {
  int64_t rows, columns;  // MR, NR
  void (*pack_rows)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*pack_columns)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*copy_columns)(const float*, int64_t, float*);
  void (*multiply_tile)(const float*, const float*, int64_t, float*, int64_t, int64_t, int64_t, bool, const float*);
};

#define INNER_LOOPS "gemm.inc"
#include "kernels/for_each_instruction_set.inc"

const Kernels& kernels() { return DFS_DISPATCH(kernels); }

constexpr int64_t kDepth = 320;       // at most: a panel of B is 20 KB (AVX-512: 40 KB)
constexpr int64_t kRowPanels = 16;    // a block of A: 120 KB in L2
constexpr int64_t kPacked = 1 << 20;  // floats of B that are packed at a time

// How a product is cut: the depth into chunks, of which some are packed at a time, and the result into blocks of rows
// by strips of panels, one of which is a task.
struct Blocking {
  int64_t chunk, chunks_at_once, block, blocks, panels_per_strip, strips;

  Blocking(const Kernels& k, int64_t rows, int64_t depth, int64_t panels) {
    // Chunks of equal depth: a short one would read and write C for little.
    chunk = ceil_div(depth, ceil_div(depth, kDepth));
    chunks_at_once = std::clamp<int64_t>(kPacked / (panels * k.columns * chunk), 1, ceil_div(depth, chunk));
    // Blocks of equal size, as many for each thread; of few, each is cut into strips of columns.
    const int64_t threads = at::get_num_threads();
    const int64_t wanted_blocks = ceil_div(ceil_div(rows, kRowPanels * k.rows), threads) * threads;
    block = ceil_div(ceil_div(rows, wanted_blocks), k.rows) * k.rows;
    blocks = ceil_div(rows, block);
    panels_per_strip = ceil_div(panels, std::min(panels, std::max<int64_t>(1, 4 * threads / blocks)));
    strips = ceil_div(panels, panels_per_strip);
  }
};

struct Left {  // (rows, depth)
  const float* data;
  int64_t row_stride, depth_stride, rows, depth;
};

struct Columns {
  int64_t first, count;
};

// out (rows, width) = [bias +] A B, B given by panels: `columns_of(panel)` are those of the result, at most NR, and
// `pack(panel, first, depth, to)` writes its rows [first, first + depth) as [depth][NR], zeros after its columns.
template <typename ColumnsOf, typename Pack>
void multiply(
    const Left& left, int64_t panels, const ColumnsOf& columns_of, const Pack& pack, const float* bias, float* out,
    int64_t width) {
  const Kernels& k = kernels();
  const Blocking cut(k, left.rows, left.depth, panels);
  const int64_t depth_at_once = cut.chunks_at_once * cut.chunk;
  auto packed = at::empty({panels * k.columns * std::min(left.depth, depth_at_once)}, at::kFloat);
  float* packed_columns = packed.mutable_data_ptr<float>();
  for (int64_t start = 0; start < left.depth; start += depth_at_once) {
    const int64_t stop = std::min(left.depth, start + depth_at_once);
    // Chunk-major: [chunk][panel][depth of the chunk][NR].
    const auto place = [&](int64_t first, int64_t panel, int64_t depth) {
      return packed_columns + ((first - start) * panels + panel * depth) * k.columns;
    };
    at::parallel_for(0, ceil_div(stop - start, cut.chunk) * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = start + item / panels * cut.chunk, panel = item % panels;
        const int64_t depth = std::min(cut.chunk, stop - first);
        pack(panel, first, depth, place(first, panel, depth));
      }
    });
    at::parallel_for(0, cut.blocks * cut.strips, 1, [&](int64_t begin, int64_t end) {
      auto packed_block = at::empty({cut.block * cut.chunk}, at::kFloat);
      float* packed_rows = packed_block.mutable_data_ptr<float>();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first_row = task / cut.strips * cut.block, rows = std::min(cut.block, left.rows - first_row);
        const int64_t first_panel = task % cut.strips * cut.panels_per_strip;
        const int64_t last_panel = std::min(panels, first_panel + cut.panels_per_strip);
        for (int64_t first = start; first < stop; first += cut.chunk) {
          const int64_t depth = std::min(cut.chunk, stop - first);
          const float* from = left.data + first_row * left.row_stride + first * left.depth_stride;
          k.pack_rows(from, left.row_stride, left.depth_stride, rows, depth, packed_rows);
          for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const auto [column, count] = columns_of(panel);
            const float *factors = place(first, panel, depth), *shift = bias == nullptr ? nullptr : bias + column;
            for (int64_t row = 0; row < rows; row += k.rows) {
              k.multiply_tile(
                  packed_rows + row * depth, factors, depth, out + (first_row + row) * width + column, width,
                  std::min(k.rows, rows - row), count, first == 0, shift);
            }
          }
        }
      }
    });
  }
}

}  // namespace

void check_gemm(const char* op, at::ScalarType dtype, int64_t groups) {
  TORCH_CHECK(
      groups == 1 && compute_dtype(dtype) == at::kFloat, op,
      ": the kernel gemm computes one group in float, got groups=", groups, " and ", dtype);
}

at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  const Kernels& k = kernels();
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  auto result = at::empty({rows, columns}, at::kFloat);
  const auto shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  const float* right = b.const_data_ptr<float>();
  const auto columns_of = [&](int64_t panel) {
    return Columns{panel * k.columns, std::min(k.columns, columns - panel * k.columns)};
  };
  const auto pack = [&](int64_t panel, int64_t first, int64_t size, float* to) {
    const auto [column, count] = columns_of(panel);
    k.pack_columns(right + first * b.stride(0) + column * b.stride(1), b.stride(0), b.stride(1), size, count, to);
  };
  multiply(
      {a.const_data_ptr<float>(), a.stride(0), a.stride(1), rows, depth}, ceil_div(columns, k.columns), columns_of,
      pack, bias.has_value() ? shift.const_data_ptr<float>() : nullptr, result.mutable_data_ptr<float>(), columns);
  return result;
}

at::Tensor gemm_grad_weight(
    const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Kernels& k = kernels();
  const int64_t out_channels = weight_size[0], channels = weight_size[1], taps = weight_size[2] * weight_size[3];
  const int64_t height = input.size(2), width = input.size(3);
  const int64_t out_height = grad_output.size(2), out_width = grad_output.size(3);
  const int64_t pixels = grad_output.size(0) * out_height * out_width;
  auto result = at::empty({out_channels, weight_size[2], weight_size[3], channels}, at::kFloat);
  const float* image = input.const_data_ptr<float>();
  // Panels of channels, tap by tap: a row is what one output pixel reads there.
  const int64_t per_tap = ceil_div(channels, k.columns);
  const auto columns_of = [&](int64_t panel) {
    const int64_t channel = panel % per_tap * k.columns;
    return Columns{panel / per_tap * channels + channel, std::min(k.columns, channels - channel)};
  };
  const auto pack = [&](int64_t panel, int64_t first, int64_t size, float* to) {
    const int64_t tap = panel / per_tap, channel = panel % per_tap * k.columns, count = columns_of(panel).count;
    const int64_t down = tap / weight_size[3] * dilation[0] - padding[0];
    const int64_t right = tap % weight_size[3] * dilation[1] - padding[1];
    int64_t column = first % out_width, row = first / out_width % out_height, number = first / out_width / out_height;
    for (int64_t pixel = 0; pixel < size; ++pixel, to += k.columns) {
      const int64_t y = row * stride[0] + down, x = column * stride[1] + right;
      const bool is_inside = 0 <= y && y < height && 0 <= x && x < width;
      const float* from = image + ((number * height + y) * width + x) * channels + channel;
      k.copy_columns(is_inside ? from : nullptr, count, to);
      if (++column == out_width) {
        column = 0;
        if (++row == out_height) row = 0, ++number;
      }
    }
  };
  multiply(
      {grad_output.const_data_ptr<float>(), 1, out_channels, out_channels, pixels}, taps * per_tap, columns_of, pack,
      nullptr, result.mutable_data_ptr<float>(), taps * channels);
  return result.permute({0, 3, 1, 2});
}

}  // namespace dfs_engine
