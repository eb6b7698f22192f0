// The fused producer of a feature: ReLU and batch normalisation in either order, a residual or a 2x2 max pool, and the
// exit's global average, on a convolution's output. One pass for the statistics, one that writes the feature; backward:
// one pass of reductions over the shared channels only (the exit's gradient is one number per image and channel, so its
// sums need no pixels), one that writes grad_z.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"
#include "instruction_set.h"

namespace dfs_engine {

namespace {

enum class End { plain, pool, residual };  // what follows the normalisation

struct Shape {
  int64_t images, channels, height, width;
  bool pool;

  int64_t row() const { return width * channels; }
  int64_t pixels() const { return height * width; }
  int64_t numbers() const { return pixels() * channels; }
  int64_t out_height() const { return pool ? height / 2 : height; }
  int64_t out_width() const { return pool ? width / 2 : width; }
  int64_t out_pixels() const { return out_height() * out_width(); }
};

struct Affine {  // per channel; scale = gamma * inverse_std
  const float *mean, *inverse_std, *scale, *beta;
};

// What flows back through the statistics, per channel: grad_z = scale * (grad_y - offset - x_hat * slope).
struct ThroughStatistics {
  const float *offset, *slope;
};

// What the kernels normalise with. A mean that is large beside the deviation needs more digits than a float has, so
// they work with its float part, and their x_hat is too large by `rest`: `beta` makes up for it in y, the callers in
// their sums.
struct Normalisation {
  std::vector<float> mean, rest, scale, beta;
  const float* inverse_std;

  Normalisation(
      const at::Tensor& exact_mean, const at::Tensor& inverse, const at::Tensor& gamma, const at::Tensor& shift)
      : mean(gamma.numel()), rest(mean), scale(mean), beta(mean), inverse_std(inverse.const_data_ptr<float>()) {
    const auto weight = gamma.to(at::kFloat).contiguous(), bias = shift.to(at::kFloat).contiguous();
    const double* exact = exact_mean.const_data_ptr<double>();
    const float *weights = weight.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
    for (size_t c = 0; c < mean.size(); ++c) {
      mean[c] = static_cast<float>(exact[c]);
      rest[c] = static_cast<float>((exact[c] - mean[c]) * inverse_std[c]);
      scale[c] = weights[c] * inverse_std[c];
      beta[c] = biases[c] - rest[c] * weights[c];
    }
  }

  Affine affine() const { return {mean.data(), inverse_std, scale.data(), beta.data()}; }
};

// What reaches an image in the backward, or the first of several.
template <typename T>
struct Incoming {
  const T* shared;  // gradient of the first `shared_channels` channels, its pixels `stride` numbers apart
  int64_t shared_channels, stride;
  const float* exit;  // per channel, of each of its output pixels
  const T* feature;   // not read without a residual

  Incoming of_image(const Shape& s, int64_t n) const {
    return {
        shared + n * s.out_pixels() * stride, shared_channels, stride, exit + n * s.channels,
        feature + n * s.numbers()};
  }
};

template <typename T>
struct Kernels {
  void (*block_statistics)(const T*, int64_t, int64_t, double*, double*);
  void (*normalise_rows)(const T*, const T*, const Shape&, const Affine&, int64_t, int64_t, T*, double*);
  void (*reduce_rows)(const T*, const Incoming<T>&, const Shape&, const Affine&, int64_t, int64_t, double*, double*);
  void (*gradient_rows)(
      const T*, const Incoming<T>&, const Shape&, const Affine&, const ThroughStatistics&, int64_t, int64_t, T*, T*);
  void (*gradient_pixels)(const T*, const Shape&, const Affine&, const ThroughStatistics&, int64_t, int64_t, T*);
};

#define INNER_LOOPS "norm_act.inc"
#include "kernels/for_each_instruction_set.inc"

template <typename T>
Kernels<T> kernels(bool relu_first, End end) {
  return DFS_DISPATCH(kernels<T>(relu_first, end));
}

// As the kernels can do it: a residual goes with the ReLU behind it and without a pool.
End end_of(bool pool, bool residual, bool relu_first) {
  TORCH_CHECK(!residual || !(pool || relu_first), "norm_act: expected residual with relu_first=False and pool=False");
  return residual ? End::residual : pool ? End::pool : End::plain;
}

// Output rows that one task works on: enough to amortise it, few enough to spread a small batch over the threads.
// Depends on the shape alone, so that sums over tasks have one order.
int64_t rows_per_task(const Shape& s) {
  return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, s.out_width() * s.channels));
}

// Without a pool, and where nobody asks for averages of an image, images do not matter: one long one, in rows long
// enough to amortise what is done once a row.
Shape shape_of(const at::Tensor& z, bool pool, bool averages) {
  const Shape s{z.size(0), z.size(1), z.size(2), z.size(3), pool};
  if (pool || averages || z.numel() == 0) return s;
  const int64_t width = s.pixels() <= 256 ? s.pixels() : s.width;
  return {1, s.channels, s.images * s.pixels() / width, width, pool};
}

// How far apart its pixels are, where that is one number; 0 where it is not.
int64_t pixel_stride(const at::Tensor& images) {
  const auto stride = images.strides();
  const bool even = images.numel() > 0 && stride[1] == 1 && stride[3] >= images.size(1) &&
      stride[2] == images.size(3) * stride[3] && stride[0] == images.size(2) * stride[2];
  return even ? stride[3] : 0;
}

// Calls work(task, image, first row, last row) for every task, in parallel; returns nothing. Tasks of an image are
// consecutive.
template <typename Work>
void for_each_task(const Shape& s, const Work& work) {
  const int64_t rows = rows_per_task(s), per_image = ceil_div(s.out_height(), rows);
  at::parallel_for(0, s.images * per_image, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % per_image * rows;
      work(task, task / per_image, first, std::min(s.out_height(), first + rows));
    }
  });
}

int64_t num_tasks(const Shape& s) { return s.images * ceil_div(s.out_height(), rows_per_task(s)); }

// Mean, inverse deviation and biased variance per channel of what is normalised, by Chan's pairwise update of block
// statistics in double.
template <typename T>
void statistics(
    const Kernels<T>& k, const T* z, const Shape& s, double eps, at::Tensor& mean, at::Tensor& inverse_std,
    at::Tensor& variance) {
  const int64_t pixels = s.images * s.pixels(), channels = s.channels;
  const int64_t per_block = std::max<int64_t>(64, 8192 / channels), blocks = ceil_div(pixels, per_block);
  std::vector<double> means(blocks * channels), deviations(blocks * channels), squares(channels, 0);
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * per_block, count = std::min(per_block, pixels - first);
      k.block_statistics(
          z + first * channels, count, channels, &means[block * channels], &deviations[block * channels]);
    }
  });
  double* center = mean.mutable_data_ptr<double>();
  std::fill(center, center + channels, 0);
  double seen = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const double count = std::min(per_block, pixels - block * per_block), share = count / (seen + count);
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = means[block * channels + c] - center[c];
      center[c] += delta * share;
      squares[c] += deviations[block * channels + c] + delta * delta * (seen * share);
    }
    seen += count;
  }
  float *inverse = inverse_std.mutable_data_ptr<float>(), *biased = variance.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    biased[c] = static_cast<float>(squares[c] / seen);
    inverse[c] = static_cast<float>(1 / std::sqrt(squares[c] / seen + eps));
  }
}

constexpr int64_t kSums = 3;  // of normalise_rows

// Writes the feature; returns the sums of each task over its pixels, (tasks, kSums, channels), if they are wanted.
template <typename T>
std::vector<double> normalise(
    const Kernels<T>& k, const T* z, const T* residual, const Shape& s, const Affine& affine, bool averages,
    T* feature) {
  std::vector<double> sums(averages ? num_tasks(s) * kSums * s.channels : 0, 0);
  for_each_task(s, [&](int64_t task, int64_t image, int64_t first, int64_t last) {
    const int64_t start = image * s.numbers();
    k.normalise_rows(
        z + start, residual + start, s, affine, first, last, feature + image * s.out_pixels() * s.channels,
        averages ? &sums[task * kSums * s.channels] : nullptr);
  });
  return sums;
}

// From these sums what norm_act returns per image and channel.
void average_images(
    const std::vector<double>& sums, const Shape& s, const std::vector<float>& rest, at::Tensor& average,
    at::Tensor& average_hat, at::Tensor& passed) {
  const int64_t per_image = num_tasks(s) / s.images;
  float *averages = average.mutable_data_ptr<float>(), *hats = average_hat.mutable_data_ptr<float>();
  float* shares = passed.mutable_data_ptr<float>();
  for (int64_t n = 0, index = 0; n < s.images; ++n) {
    for (int64_t c = 0; c < s.channels; ++c, ++index) {
      double hat = 0, count = 0, total = 0;
      for (int64_t task = n * per_image; task < (n + 1) * per_image; ++task) {
        const double* of_task = &sums[task * kSums * s.channels + c];
        hat += of_task[0];
        count += of_task[s.channels];
        total += of_task[2 * s.channels];
      }
      hats[index] = static_cast<float>((hat - rest[c] * count) / s.out_pixels());
      shares[index] = static_cast<float>(count / s.out_pixels());
      averages[index] = static_cast<float>(total / s.out_pixels());
    }
  }
}

// (feature, average, average of x_hat over the pixels, mean, inverse_std, biased variance, share of the pixels that
// averages count); mean double, the other last ones float. ReLU last: only the pixels that it let through count, in
// both averages. Without `averages` those three are empty, (0, C).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_cpu(
    const at::Tensor& z_any, const at::Tensor& gamma, const at::Tensor& beta, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, double eps, bool pool,
    bool relu_first, bool averages) {
  const End end = end_of(pool, residual.has_value(), relu_first);
  const auto z = dense(z_any, z_any.scalar_type(), /*channels_last=*/true);
  const auto added = residual.has_value() ? dense(*residual, z.scalar_type(), /*channels_last=*/true) : z;
  TORCH_CHECK(
      added.sizes() == z.sizes(), "norm_act: expected residual of z's shape ", z.sizes(), ", got ", added.sizes());
  const Shape s = shape_of(z, pool, averages);
  const int64_t shrink = pool ? 2 : 1, averaged = averages ? s.images : 0;
  auto feature = at::empty(
      {z.size(0), s.channels, z.size(2) / shrink, z.size(3) / shrink},
      z.options().memory_format(at::MemoryFormat::ChannelsLast));
  const auto floats = [](at::IntArrayRef size) { return at::empty(size, at::kFloat); };
  auto average = floats({averaged, s.channels}), average_hat = floats({averaged, s.channels});
  auto passed = floats({averaged, s.channels}), inverse_std = floats({s.channels}), variance = floats({s.channels});
  auto mean = at::empty({s.channels}, at::kDouble);
  dispatch_float_or_bfloat16(z.scalar_type(), "norm_act", [&]<typename T>() {
    if (z.numel() == 0) {
      for (const auto& statistic : {mean, inverse_std, variance}) statistic.zero_();
      return;
    }
    const auto k = kernels<T>(relu_first, end);
    if (running_mean.has_value()) {
      mean.copy_(*running_mean);
      variance.copy_(*running_var);
      inverse_std.copy_((variance + eps).rsqrt());
    } else {
      statistics(k, z.const_data_ptr<T>(), s, eps, mean, inverse_std, variance);
    }
    const Normalisation normalisation(mean, inverse_std, gamma, beta);
    const auto sums = normalise(
        k, z.const_data_ptr<T>(), added.const_data_ptr<T>(), s, normalisation.affine(), averages,
        feature.mutable_data_ptr<T>());
    if (averages) average_images(sums, s, normalisation.rest, average, average_hat, passed);
  });
  return {feature, average.to(z.scalar_type()), average_hat, mean, inverse_std, variance, passed};
}

// What the gradients of beta and gamma are, and what flows back through the statistics: the sums per channel of the
// gradient of y, and of that times x_hat.
struct GradientSums {
  std::vector<double> beta, gamma;
};

// The exit's gradient of each output pixel, per image and channel. Its part of the sums needs no pixels.
std::vector<float> exit_gradient(
    const at::Tensor& grad_average, const at::Tensor& passed, const at::Tensor& average_hat, const Shape& s,
    GradientSums& sums) {
  const auto gradient = grad_average.to(at::kFloat).contiguous();
  const float *grads = gradient.const_data_ptr<float>(), *shares = passed.const_data_ptr<float>();
  const float* hats = average_hat.const_data_ptr<float>();
  std::vector<float> exit(s.images * s.channels);
  for (int64_t n = 0, index = 0; n < s.images; ++n) {
    for (int64_t c = 0; c < s.channels; ++c, ++index) {
      exit[index] = grads[index] / static_cast<float>(s.out_pixels());
      sums.beta[c] += static_cast<double>(grads[index]) * shares[index];
      sums.gamma[c] += static_cast<double>(grads[index]) * hats[index];
    }
  }
  return exit;
}

// Adds what the shared channels' gradient has in the sums.
template <typename T>
void reduce_shared(
    const Kernels<T>& k, const T* z, const Incoming<T>& incoming, const Shape& s, const Normalisation& normalisation,
    GradientSums& totals) {
  const int64_t shared = incoming.shared_channels;
  std::vector<double> sums(num_tasks(s) * shared, 0), products(sums);
  for_each_task(s, [&](int64_t task, int64_t image, int64_t first, int64_t last) {
    k.reduce_rows(
        z + image * s.numbers(), incoming.of_image(s, image), s, normalisation.affine(), first, last,
        sums.data() + task * shared, products.data() + task * shared);
  });
  for (int64_t task = 0; task < num_tasks(s); ++task) {
    for (int64_t c = 0; c < shared; ++c) {
      const double sum = sums[task * shared + c];
      totals.beta[c] += sum;
      totals.gamma[c] += products[task * shared + c] - normalisation.rest[c] * sum;
    }
  }
}

// Writes grad_z and, with a residual, grad_residual.
template <typename T>
void write_gradients(
    const Kernels<T>& k, const T* z, const Incoming<T>& incoming, const Shape& s, const Affine& affine,
    const ThroughStatistics& through, T* grad_z, T* grad_residual) {
  for_each_task(s, [&](int64_t, int64_t image, int64_t first, int64_t last) {
    const int64_t start = image * s.numbers();
    k.gradient_rows(
        z + start, incoming.of_image(s, image), s, affine, through, first, last, grad_z + start, grad_residual + start);
  });
  // What an odd size leaves outside every window.
  const bool odd_height = s.pool && s.height % 2, odd_width = s.pool && s.width % 2;
  at::parallel_for(0, odd_height || odd_width ? s.images : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t last_row = image * s.numbers() + (s.height - 1) * s.row();
      const int64_t last_column = image * s.numbers() + (s.width - 1) * s.channels;
      if (odd_height) k.gradient_pixels(z + last_row, s, affine, through, s.width, s.channels, grad_z + last_row);
      if (odd_width) k.gradient_pixels(z + last_column, s, affine, through, s.height, s.row(), grad_z + last_column);
    }
  });
}

// (grad_z, grad_gamma, grad_beta, grad_residual). grad_shared: (N, shared, H', W'); grad_average: (N, C), zero where
// the exit trains nothing, or none; feature: with a residual, and only then grad_residual is not empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_backward_cpu(
    const at::Tensor& grad_shared_any, const std::optional<at::Tensor>& grad_average, const at::Tensor& z_any,
    const at::Tensor& gamma, const at::Tensor& beta, const std::optional<at::Tensor>& feature,
    const at::Tensor& average_hat, const at::Tensor& mean, const at::Tensor& inverse_std, const at::Tensor& passed,
    bool training, bool pool, bool relu_first) {
  const End end = end_of(pool, feature.has_value(), relu_first);
  const auto z = dense(z_any, z_any.scalar_type(), /*channels_last=*/true);
  const auto made = feature.has_value() ? dense(*feature, z.scalar_type(), /*channels_last=*/true) : z;
  const Shape s = shape_of(z, pool, grad_average.has_value());
  auto grad_z = at::empty_like(z, z.options().memory_format(at::MemoryFormat::ChannelsLast));
  auto grad_residual = end == End::residual ? at::empty_like(grad_z) : at::empty({0}, z.options());
  if (z.numel() == 0) {
    return {grad_z, at::zeros({s.channels}, gamma.options()), at::zeros({s.channels}, beta.options()), grad_residual};
  }
  const bool fits = grad_shared_any.scalar_type() == z.scalar_type() && pixel_stride(grad_shared_any) > 0;
  const auto grad_shared = fits ? grad_shared_any : dense(grad_shared_any, z.scalar_type(), /*channels_last=*/true);
  const int64_t shared = grad_shared.size(1), stride = fits ? pixel_stride(grad_shared) : shared;
  const Normalisation normalisation(mean, inverse_std, gamma, beta);
  GradientSums sums{std::vector<double>(s.channels, 0), std::vector<double>(s.channels, 0)};
  const auto exit = grad_average.has_value() ? exit_gradient(*grad_average, passed, average_hat, s, sums)
                                             : std::vector<float>(s.images * s.channels, 0);
  dispatch_float_or_bfloat16(z.scalar_type(), "norm_act_backward", [&]<typename T>() {
    const auto k = kernels<T>(relu_first, end);
    const T* from = z.const_data_ptr<T>();
    const Incoming<T> incoming{grad_shared.const_data_ptr<T>(), shared, stride, exit.data(), made.const_data_ptr<T>()};
    reduce_shared(k, from, incoming, s, normalisation, sums);
    // In eval mode the statistics are constants, and nothing flows through them.
    std::vector<float> offset(s.channels, 0), slope(s.channels, 0);
    const double count = static_cast<double>(s.images * s.pixels());
    for (int64_t c = 0; training && c < s.channels; ++c) {
      slope[c] = static_cast<float>(sums.gamma[c] / count);
      offset[c] = static_cast<float>((sums.beta[c] - normalisation.rest[c] * sums.gamma[c]) / count);
    }
    T* to = grad_z.mutable_data_ptr<T>();
    T* beside = end == End::residual ? grad_residual.mutable_data_ptr<T>() : to;  // not written to without one
    write_gradients(k, from, incoming, s, normalisation.affine(), {offset.data(), slope.data()}, to, beside);
  });
  const auto as_tensor = [](const std::vector<double>& values, const at::Tensor& like) {
    return at::tensor(at::ArrayRef<double>(values), at::kFloat).to(like.scalar_type());
  };
  return {grad_z, as_tensor(sums.gamma, gamma), as_tensor(sums.beta, beta), grad_residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("norm_act", norm_act_cpu);
  m.impl("norm_act_backward", norm_act_backward_cpu);
}

}  // namespace dfs_engine
