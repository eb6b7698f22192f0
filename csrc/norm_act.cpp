// The fused producer of a feature: ReLU and batch normalisation in either order, a residual or a 2x2 max pool, and the exit's global
// average, on a convolution's output. One pass for the statistics, one that writes the feature; backward: one pass of reductions over the shared channels
// only (the exit's gradient is one number per image and channel, so its sums need no pixels), one that writes grad_z.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
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
  int64_t out_height() const { return pool ? height / 2 : height; }
  int64_t out_width() const { return pool ? width / 2 : width; }
  int64_t out_pixels() const { return out_height() * out_width(); }
};

struct Affine {  // per channel; scale = gamma * inverse_std
  const float *mean, *inverse_std, *scale, *beta;
};

// What the kernels normalise with. A mean that is large beside the deviation needs more digits than a float has, so they work
// with its float part, and their x_hat is too large by `rest`: `beta` makes up for it in y, the callers in their sums.
struct Normalisation {
  std::vector<float> mean, rest, scale, beta;
  const float* inverse_std;

  Normalisation(const double* exact_mean, const float* inverse, const float* gamma, const float* shift, int64_t channels)
      : mean(channels), rest(channels), scale(channels), beta(channels), inverse_std(inverse) {
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = static_cast<float>(exact_mean[c]);
      rest[c] = static_cast<float>((exact_mean[c] - mean[c]) * inverse[c]);
      scale[c] = gamma[c] * inverse[c];
      beta[c] = shift[c] - rest[c] * gamma[c];
    }
  }

  Affine affine() const { return {mean.data(), inverse_std, scale.data(), beta.data()}; }
};

// What reaches one image in the backward.
template <typename T>
struct Incoming {
  const T* shared;  // gradient of the first `shared_channels` channels, its pixels `stride` numbers apart
  int64_t shared_channels, stride;
  const float* exit;  // per channel, of each of its output pixels
  const T* feature;   // not read without a residual
};

template <typename T>
struct Kernels {
  void (*block_statistics)(const T*, int64_t, int64_t, double*, double*);
  void (*normalise_rows)(const T*, const T*, const Shape&, const Affine&, int64_t, int64_t, T*, double*);
  void (*reduce_rows)(
      const T*, const Incoming<T>&, const Shape&, const Affine&, int64_t, int64_t, double*, double*);
  void (*gradient_rows)(
      const T*, const Incoming<T>&, const Shape&, const Affine&, const float*, const float*, int64_t, int64_t, T*, T*);
  void (*gradient_pixels)(
      const T*, const Shape&, const Affine&, const float*, const float*, int64_t, int64_t, T*);
};

#define INNER_LOOPS "norm_act.inc"
#include "kernels/for_each_instruction_set.inc"

template <typename T>
Kernels<T> kernels(bool relu_first, End end) { return DFS_DISPATCH(kernels<T>(relu_first, end)); }

// As the kernels can do it: a residual goes with the ReLU behind it and without a pool.
End end_of(bool pool, bool residual, bool relu_first) {
  TORCH_CHECK(!residual || !(pool || relu_first), "norm_act: expected residual with relu_first=False and pool=False");
  return residual ? End::residual : pool ? End::pool : End::plain;
}

// Output rows that one task works on: enough to amortise it, few enough to spread a small batch over the threads. Depends on
// the shape alone, so that sums over tasks have one order.
int64_t rows_per_task(const Shape& s) {
  return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, s.out_width() * s.channels));
}

// Without a pool, and where nobody asks for averages of an image, images do not matter: one long one, in rows long enough to
// amortise what is done once a row.
Shape shape_of(const at::Tensor& z, bool pool, bool averages) {
  const Shape s{z.size(0), z.size(1), z.size(2), z.size(3), pool};
  if (pool || averages || z.numel() == 0) return s;
  const int64_t width = s.pixels() <= 256 ? s.pixels() : s.width;
  return {1, s.channels, s.images * s.pixels() / width, width, pool};
}

// How far apart its pixels are, where that is one number; 0 where it is not.
int64_t pixel_stride(const at::Tensor& images) {
  const auto stride = images.strides();
  const bool even = images.numel() > 0 && stride[1] == 1 && stride[3] >= images.size(1) && stride[2] == images.size(3) * stride[3] &&
      stride[0] == images.size(2) * stride[2];
  return even ? stride[3] : 0;
}

// Calls work(task, image, first row, last row) for every task, in parallel; returns nothing. Tasks of an image are consecutive.
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

// Mean and biased variance per channel of what is normalised, by Chan's pairwise update of block statistics in double.
template <typename T>
void statistics(const Kernels<T>& k, const T* z, const Shape& s, std::vector<double>& mean, std::vector<double>& variance) {
  const int64_t pixels = s.images * s.pixels(), channels = s.channels;
  const int64_t per_block = std::max<int64_t>(64, 8192 / channels), blocks = ceil_div(pixels, per_block);
  std::vector<double> means(blocks * channels), deviations(blocks * channels);
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * per_block, count = std::min(per_block, pixels - first);
      k.block_statistics(
          z + first * channels, count, channels, &means[block * channels], &deviations[block * channels]);
    }
  });
  mean.assign(channels, 0);
  variance.assign(channels, 0);
  double seen = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const double count = std::min(per_block, pixels - block * per_block), share = count / (seen + count);
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = means[block * channels + c] - mean[c];
      mean[c] += delta * share;
      variance[c] += deviations[block * channels + c] + delta * delta * (seen * share);
    }
    seen += count;
  }
  for (auto& value : variance) value /= seen;
}

// (feature, average, average of x_hat over the pixels, mean, inverse_std, biased variance, share of the pixels that averages count);
// mean double, the other last ones float. ReLU last: only the pixels that it let through count, in both averages. Without
// `averages` those three are empty, (0, C).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_cpu(
    const at::Tensor& z_any,
    const at::Tensor& gamma,
    const at::Tensor& beta,
    const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var,
    double eps,
    bool pool,
    bool relu_first,
    bool averages) {
  TORCH_CHECK(
      z_any.scalar_type() == at::kFloat || z_any.scalar_type() == at::kBFloat16,
      "norm_act: expected float32 or bfloat16, got ", z_any.scalar_type());
  const End end = end_of(pool, residual.has_value(), relu_first);
  const auto z = dense(z_any, z_any.scalar_type(), /*channels_last=*/true);
  const auto added = residual.has_value() ? dense(*residual, z.scalar_type(), /*channels_last=*/true) : z;
  TORCH_CHECK(added.sizes() == z.sizes(), "norm_act: expected residual of z's shape ", z.sizes(), ", got ", added.sizes());
  const Shape s = shape_of(z, pool, averages);
  const auto options = z.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const int64_t shrink = pool ? 2 : 1, averaged = averages ? s.images : 0;
  auto feature = at::empty(
      {z.size(0), s.channels, z.size(2) / shrink, z.size(3) / shrink}, z.options().memory_format(at::MemoryFormat::ChannelsLast));
  auto average_hat = at::empty({averaged, s.channels}, options), passed = at::empty({averaged, s.channels}, options);
  auto average = at::empty({averaged, s.channels}, options);
  auto mean = at::empty({s.channels}, options.dtype(at::kDouble)), inverse_std = at::empty({s.channels}, options);
  auto variance = at::empty({s.channels}, options);
  const auto weight = gamma.to(at::kFloat).contiguous(), shift = beta.to(at::kFloat).contiguous();
  const bool training = !running_mean.has_value();
  if (!training) {
    mean.copy_(*running_mean);
    variance.copy_(*running_var);
  }
  if (z.numel() == 0) {
    return {feature, average.to(z.scalar_type()), average_hat, mean.zero_(), inverse_std.zero_(), variance.zero_(), passed};
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto k = kernels<T>(relu_first, end);
    const T* from = z.const_data_ptr<T>();
    if (training) {
      std::vector<double> means, variances;
      statistics(k, from, s, means, variances);
      std::copy(means.begin(), means.end(), mean.mutable_data_ptr<double>());
      std::copy(variances.begin(), variances.end(), variance.mutable_data_ptr<float>());
      float* inverse = inverse_std.mutable_data_ptr<float>();
      for (int64_t c = 0; c < s.channels; ++c) inverse[c] = static_cast<float>(1 / std::sqrt(variances[c] + eps));
    } else {
      inverse_std.copy_((variance + eps).rsqrt());
    }
    const Normalisation normalisation(
        mean.const_data_ptr<double>(), inverse_std.const_data_ptr<float>(), weight.const_data_ptr<float>(),
        shift.const_data_ptr<float>(), s.channels);
    const Affine affine = normalisation.affine();
    constexpr int64_t kinds = 3;  // of sums; see normalise_rows
    std::vector<double> sums(averages ? num_tasks(s) * kinds * s.channels : 0, 0);
    const T* beside = added.const_data_ptr<T>();
    T* to = feature.mutable_data_ptr<T>();
    for_each_task(s, [&](int64_t task, int64_t image, int64_t first, int64_t last) {
      const int64_t start = image * s.pixels() * s.channels;
      k.normalise_rows(
          from + start, beside + start, s, affine, first, last, to + image * s.out_pixels() * s.channels,
          averages ? &sums[task * kinds * s.channels] : nullptr);
    });
    if (!averages) return;
    float *hats = average_hat.mutable_data_ptr<float>(), *shares = passed.mutable_data_ptr<float>();
    float* averages = average.mutable_data_ptr<float>();
    const int64_t per_image = num_tasks(s) / s.images;
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t c = 0; c < s.channels; ++c) {
        double hat = 0, count = 0, total = 0;
        for (int64_t task = 0; task < per_image; ++task) {
          const double* of_task = &sums[(n * per_image + task) * kinds * s.channels];
          hat += of_task[c];
          count += of_task[s.channels + c];
          total += of_task[2 * s.channels + c];
        }
        hats[n * s.channels + c] = static_cast<float>((hat - normalisation.rest[c] * count) / s.out_pixels());
        shares[n * s.channels + c] = static_cast<float>(count / s.out_pixels());
        averages[n * s.channels + c] = static_cast<float>(total / s.out_pixels());
      }
    }
  };
  z.scalar_type() == at::kFloat ? run(float{}) : run(c10::BFloat16{});
  return {feature, average.to(z.scalar_type()), average_hat, mean, inverse_std, variance, passed};
}

// (grad_z, grad_gamma, grad_beta, grad_residual). grad_shared: (N, shared, H', W'); grad_average: (N, C), zero where the exit
// trains nothing, or none; feature: with a residual, and only then grad_residual is not empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_backward_cpu(
    const at::Tensor& grad_shared_any,
    const std::optional<at::Tensor>& grad_average_any,
    const at::Tensor& z_any,
    const at::Tensor& gamma,
    const at::Tensor& beta,
    const std::optional<at::Tensor>& feature,
    const at::Tensor& average_hat,
    const at::Tensor& mean,
    const at::Tensor& inverse_std,
    const at::Tensor& passed,
    bool training,
    bool pool,
    bool relu_first) {
  const End end = end_of(pool, feature.has_value(), relu_first);
  const auto z = dense(z_any, z_any.scalar_type(), /*channels_last=*/true);
  const auto made = feature.has_value() ? dense(*feature, z.scalar_type(), /*channels_last=*/true) : z;
  const bool averages = grad_average_any.has_value();
  const Shape s = shape_of(z, pool, averages);
  auto grad_z = at::empty_like(z, z.options().memory_format(at::MemoryFormat::ChannelsLast));
  auto grad_residual = end == End::residual ? at::empty_like(grad_z) : at::empty({0}, z.options());
  const auto weight = gamma.to(at::kFloat).contiguous(), shift = beta.to(at::kFloat).contiguous();
  auto grad_beta = at::zeros({s.channels}, weight.options()), grad_gamma = at::zeros({s.channels}, weight.options());
  if (z.numel() == 0) {
    return {grad_z, grad_gamma.to(gamma.scalar_type()), grad_beta.to(beta.scalar_type()), grad_residual};
  }
  const bool fits = grad_shared_any.scalar_type() == z.scalar_type() && pixel_stride(grad_shared_any) > 0;
  const auto grad_shared = fits ? grad_shared_any : dense(grad_shared_any, z.scalar_type(), /*channels_last=*/true);
  const int64_t shared = grad_shared.size(1), stride = fits ? pixel_stride(grad_shared) : shared;
  const Normalisation normalisation(
      mean.const_data_ptr<double>(), inverse_std.const_data_ptr<float>(), weight.const_data_ptr<float>(),
      shift.const_data_ptr<float>(), s.channels);
  const Affine affine = normalisation.affine();
  // Of each output pixel, per image; without averages one image's zeros.
  std::vector<float> exit(s.images * s.channels, 0);
  std::vector<double> beta_sums(s.channels, 0), gamma_sums(s.channels, 0);
  if (averages) {
    const auto grad_average = grad_average_any->to(at::kFloat).contiguous();
    const float *grads = grad_average.const_data_ptr<float>(), *shares = passed.const_data_ptr<float>();
    const float* hats = average_hat.const_data_ptr<float>();
    for (int64_t n = 0, index = 0; n < s.images; ++n) {
      for (int64_t c = 0; c < s.channels; ++c, ++index) {
        exit[index] = grads[index] / static_cast<float>(s.out_pixels());
        beta_sums[c] += static_cast<double>(grads[index]) * shares[index];
        gamma_sums[c] += static_cast<double>(grads[index]) * hats[index];
      }
    }
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto k = kernels<T>(relu_first, end);
    const T* from = z.const_data_ptr<T>();
    const T* gradient = grad_shared.const_data_ptr<T>();
    const int64_t image_size = s.pixels() * s.channels, gradient_size = s.out_pixels() * stride;
    const auto incoming = [&](int64_t image) -> Incoming<T> {
      return {gradient + image * gradient_size, shared, stride, &exit[image * s.channels],
              made.template const_data_ptr<T>() + image * image_size};
    };
    std::vector<double> sums(num_tasks(s) * shared, 0), products(num_tasks(s) * shared, 0);
    for_each_task(s, [&](int64_t task, int64_t image, int64_t first, int64_t last) {
      k.reduce_rows(
          from + image * image_size, incoming(image), s, affine, first, last, sums.data() + task * shared,
          products.data() + task * shared);
    });
    for (int64_t task = 0; task < num_tasks(s); ++task) {
      for (int64_t c = 0; c < shared; ++c) {
        const double sum = sums[task * shared + c];
        beta_sums[c] += sum;
        gamma_sums[c] += products[task * shared + c] - normalisation.rest[c] * sum;
      }
    }
    std::copy(beta_sums.begin(), beta_sums.end(), grad_beta.mutable_data_ptr<float>());
    std::copy(gamma_sums.begin(), gamma_sums.end(), grad_gamma.mutable_data_ptr<float>());
    // In eval mode the statistics are constants, and nothing flows through them.
    std::vector<float> offset(s.channels, 0), slope(s.channels, 0);
    if (training) {
      const double count = static_cast<double>(s.images * s.pixels());
      for (int64_t c = 0; c < s.channels; ++c) {
        slope[c] = static_cast<float>(gamma_sums[c] / count);
        offset[c] = static_cast<float>((beta_sums[c] - normalisation.rest[c] * gamma_sums[c]) / count);
      }
    }
    const float *constant = offset.data(), *factor = slope.data();
    T* to = grad_z.mutable_data_ptr<T>();
    T* beside = end == End::residual ? grad_residual.mutable_data_ptr<T>() : to;  // not written to without a residual
    for_each_task(s, [&](int64_t, int64_t image, int64_t first, int64_t last) {
      const int64_t start = image * image_size;
      k.gradient_rows(
          from + start, incoming(image), s, affine, constant, factor, first, last, to + start, beside + start);
    });
    if (pool && (s.height % 2 || s.width % 2)) {
      at::parallel_for(0, s.images, 1, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
          const T* source = from + image * image_size;
          T* target = to + image * image_size;
          if (s.height % 2) {
            const int64_t last_row = (s.height - 1) * s.row();
            k.gradient_pixels(source + last_row, s, affine, constant, factor, s.width, s.channels, target + last_row);
          }
          if (s.width % 2) {
            const int64_t last_column = (s.width - 1) * s.channels;
            k.gradient_pixels(
                source + last_column, s, affine, constant, factor, s.height, s.row(), target + last_column);
          }
        }
      });
    }
  };
  z.scalar_type() == at::kFloat ? run(float{}) : run(c10::BFloat16{});
  return {grad_z, grad_gamma.to(gamma.scalar_type()), grad_beta.to(beta.scalar_type()), grad_residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(dfs_engine, CPU, m) {
  m.impl("norm_act", norm_act_cpu);
  m.impl("norm_act_backward", norm_act_backward_cpu);
}

}  // namespace dfs_engine
