// Gram matrix and style loss on the CPU: slices of positions, upper-triangle tiles, one fixed-order sum fused with the loss.
#include "../gram.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/checks.h"
#include "../common/layout.h"
#include "capability.h"
#include "huge_pages.h"

namespace deepsim::cpu {
namespace {

// Slices are cut by shape alone, so that sums come out the same for any number of threads: few enough that their partial
// tiles cost little beside the products, many enough to share out.
int64_t slices_of(int64_t batch, int64_t positions) {
  constexpr int64_t kLong = 512, kShort = 128, kFew = 4, kMost = 64;
  const int64_t slices = std::max(positions / kLong, std::min(kFew, positions / kShort));
  return std::clamp<int64_t>(slices, 1, std::max<int64_t>(1, kMost / batch));
}

// How many of the items that take `work` multiplications each are worth waking a thread for.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 262144 / std::max<int64_t>(1, work)); }

// Tiles of every slice of every sample as Kernels::gram leaves them, [B][slices][tiles][panel_rows][panel_rows], not yet added up.
template <class T>
struct PartialTiles {
  int64_t slices, panels, tiles, tile_size;
  at::Tensor buffer;
};

// Positions [begin, end) of sample b, from a tensor with an adjacent axis.
FeatureSlice feature_slice(const at::Tensor& features, int64_t b, int64_t begin, int64_t end) {
  const bool adjacent_positions = features.stride(2) == 1 || features.size(2) == 1;
  return {static_cast<const char*>(features.const_data_ptr()) + b * features.stride(0) * features.element_size(),
          features.size(1),
          begin,
          end,
          adjacent_positions ? features.stride(1) : 1,
          adjacent_positions ? 1 : features.stride(2)};
}

template <class T>
PartialTiles<T> partial_tiles(const Kernels<T>& kernels, const at::Tensor& features) {
  const int64_t batch = features.size(0), channels = features.size(1), positions = features.size(2);
  PartialTiles<T> p;
  p.slices = slices_of(batch, positions);
  p.panels = (channels + kernels.panel_rows - 1) / kernels.panel_rows;
  p.tiles = p.panels * (p.panels + 1) / 2;
  p.tile_size = kernels.panel_rows * kernels.panel_rows;
  p.buffer = at::empty({batch * p.slices * p.tiles * p.tile_size}, features.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* tiles = p.buffer.template mutable_data_ptr<T>();
  at::parallel_for(0, batch * p.slices, grain(p.tiles * p.tile_size * (positions / p.slices)), [&](int64_t begin, int64_t end) {
    std::vector<T> packed(kernels.gram_scratch(channels));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.slices, s = item % p.slices;
      const FeatureSlice slice = feature_slice(features, b, positions * s / p.slices, positions * (s + 1) / p.slices);
      kernels.gram(slice, packed.data(), tiles + item * p.tiles * p.tile_size);
    }
  });
  return p;
}

// Adds up the slices of every tile in order and hands the rows of the full matrix, a tile's width at a time and those below
// the diagonal too, to `run(sample, row, first column, products, count)`; returns the sum of what it returns, in a fixed order.
template <class T, class Run>
double reduce_tiles(const Kernels<T>& kernels, const PartialTiles<T>& p, int64_t batch, int64_t channels, Run run) {
  const int64_t width = kernels.panel_rows;
  std::vector<double> sums(batch * p.tiles);
  const T* tiles = p.buffer.template const_data_ptr<T>();
  at::parallel_for(0, batch * p.tiles, grain(p.tile_size * (p.slices + 8)), [&](int64_t begin, int64_t end) {
    std::vector<T> total(p.tile_size), transposed(p.tile_size);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.tiles, tile = item % p.tiles;
      int64_t i = 0, j = tile;
      for (; j >= p.panels - i; ++i) j -= p.panels - i;
      j += i;
      if (i < j && j + 1 == p.panels) std::swap(i, j);  // the rows of such a tile are those of the last panel
      const int64_t first_row = i * width, rows = std::min(width, channels - first_row);
      const int64_t first_column = j * width, columns = std::min(width, channels - first_column);
      const auto first_of = [&](int64_t r) { return i == j ? r : 0; };
      for (int64_t s = 0; s < p.slices; ++s) {
        const T* part = tiles + ((b * p.slices + s) * p.tiles + tile) * p.tile_size;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t e = r * width + first_of(r); e < (r + 1) * width; ++e) total[e] = s == 0 ? part[e] : total[e] + part[e];
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = first_of(r); c < columns; ++c) transposed[c * width + r] = total[r * width + c];
      if (i == j)
        for (int64_t r = 0; r < rows; ++r) std::copy_n(&transposed[r * width], r, &total[r * width]);
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += run(b, first_row + r, first_column, &total[r * width], columns);
      if (i != j)
        for (int64_t c = 0; c < columns; ++c) sum += run(b, first_column + c, first_row, &transposed[c * width], rows);
      sums[item] = sum;
    }
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

at::Tensor gram_matrix(const at::Tensor& features, std::string_view normalize, double divisor) {
  constexpr const char* function = "gram_matrix";
  check_features(function, features);
  const double scale = gram_scale(function, features, normalize, divisor);
  const at::Tensor f = with_adjacent_axis(features);
  const int64_t batch = f.size(0), channels = f.size(1);
  return dispatch(f.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    at::Tensor gram = at::empty({batch, channels, channels}, f.options().dtype(c10::CppTypeToScalarType<T>::value));
    T* out = gram.template mutable_data_ptr<T>();
    const auto run = [&](int64_t b, int64_t row, int64_t column, const T* products, int64_t count) {
      T* to = out + (b * channels + row) * channels + column;
      for (int64_t k = 0; k < count; ++k) to[k] = T(scale) * products[k];
      return 0.0;
    };
    reduce_tiles(kernels, partial_tiles(kernels, f), batch, channels, run);
    return gram;
  });
}

// One layer: fills its residual and returns its sum of distances, without the factor.
template <class T>
double style_layer(const Kernels<T>& kernels, const StyleLayer& layer, const at::Tensor& target, bool absolute, T* residual) {
  const at::Tensor a = target.contiguous();
  const int64_t batch = layer.features.size(0), channels = layer.features.size(1);
  const int64_t target_stride = a.size(0) == 1 ? 0 : channels * channels;
  const T scale = T(layer.scale), *goal = a.template const_data_ptr<T>();
  const auto run = [&](int64_t b, int64_t row, int64_t column, const T* products, int64_t count) {
    const int64_t offset = row * channels + column;
    T* to = residual + b * channels * channels + offset;
    const T* from = goal + b * target_stride + offset;
    for (int64_t k = 0; k < count; ++k) to[k] = scale * products[k] - from[k];
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += absolute ? std::abs(double(to[k])) : double(to[k]) * double(to[k]);
    return sum;
  };
  return reduce_tiles(kernels, partial_tiles(kernels, layer.features), batch, channels, run);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> style_loss(at::TensorList features, at::TensorList target, at::ArrayRef<double> weights,
                                                          std::string_view normalize, double divisor, std::string_view reduction,
                                                          std::string_view distance) {
  constexpr const char* function = "style_loss";
  const StyleLayers layers = style_layers(function, features, {weights, normalize, divisor, reduction, distance});
  check_targets(function, target, features);
  const int64_t count = int64_t(features.size());
  return dispatch(features[0].scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const auto options = features[0].options().dtype(c10::CppTypeToScalarType<T>::value);
    at::Tensor loss = at::empty({}, options), losses = at::empty({count}, options);
    at::Tensor residuals = at::empty({layers.residual_size()}, options);
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const StyleLayer& layer = layers.layers[i];
      const bool absolute = layers.distance == StyleDistance::l1;
      double sum = layer.factor *
                   style_layer(kernels, layer, target[i], absolute, residuals.template mutable_data_ptr<T>() + layer.first);
      if (layers.distance == StyleDistance::frobenius) sum = std::sqrt(sum);
      losses.template mutable_data_ptr<T>()[i] = T(sum);
      total += layer.weight * sum;
    }
    *loss.template mutable_data_ptr<T>() = T(total);
    return std::make_tuple(loss, losses, residuals);
  });
}

// value(g) + value(g^T) of every sample of g [batch, channels, channels], packed as Kernels::gram_gradient reads it. A square of g is
// copied out transposed first: its rows lie a power of two bytes apart and would evict each other if they were read down a column
// each time.
template <class T, class Value>
at::Tensor packed_symmetric(const Kernels<T>& kernels, const T* from, int64_t batch, int64_t channels, Value value) {
  constexpr int64_t kMostRows = 64;
  const int64_t width = kernels.panel_rows, panels = (channels + width - 1) / width;
  TORCH_INTERNAL_ASSERT(width <= kMostRows);
  at::Tensor result = at::zeros({batch, panels, channels, width}, c10::CppTypeToScalarType<T>::value);
  T* to = result.mutable_data_ptr<T>();
  at::parallel_for(0, batch * panels, grain(8 * width * channels), [&](int64_t begin, int64_t end) {
    T transposed[kMostRows][kMostRows];
    for (int64_t item = begin; item < end; ++item) {
      const T* sample = from + item / panels * channels * channels;
      const int64_t first = item % panels * width, rows = std::min(width, channels - first);
      for (int64_t column = 0; column < channels; column += width) {
        const int64_t columns = std::min(width, channels - column);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) transposed[c][r] = sample[(first + r) * channels + column + c];
        for (int64_t c = 0; c < columns; ++c) {
          const T* row = sample + (column + c) * channels + first;
          T* out = to + (item * channels + column + c) * width;
          for (int64_t r = 0; r < rows; ++r) out[r] = value(row[r]) + value(transposed[c][r]);
        }
      }
    }
  });
  return result;
}

// M F for every sample, M as packed_symmetric leaves it, in the dtype and memory format of `features`.
template <class T>
at::Tensor symmetric_times(const Kernels<T>& kernels, const at::Tensor& matrix, const at::Tensor& features) {
  const at::Tensor f = with_adjacent_axis(features);
  const int64_t batch = f.size(0), channels = f.size(1), positions = f.size(2);
  at::Tensor grad = in_huge_pages(at::empty_like(features)), out = with_adjacent_axis(grad);
  // Positions at a time: 512 KiB of float32, to stay in L2, but rarely more than there are cores to share them.
  const int64_t width = kernels.panel_rows;
  const int64_t step = std::clamp<int64_t>(std::min(131072 / (channels * width), positions / (16 * width)), 1, 64) * width;
  const int64_t blocks = (positions + step - 1) / step;
  at::parallel_for(0, batch * blocks, grain(channels * channels * step), [&](int64_t begin, int64_t end) {
    std::vector<T> packed(channels * step);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, block = item % blocks;
      const FeatureSlice slice = feature_slice(f, b, block * step, std::min(positions, (block + 1) * step));
      const FeatureSlice to = feature_slice(out, b, 0, positions);
      kernels.gram_gradient(slice, matrix.template const_data_ptr<T>() + b * matrix.stride(0), packed.data(),
                            {const_cast<void*>(to.data), to.channel_stride, to.position_stride});
    }
  });
  if (!out.is_same(grad)) grad.copy_(out);
  return grad;
}

at::Tensor gram_matrix_backward(const at::Tensor& grad_gram, const at::Tensor& features, std::string_view normalize,
                                double divisor) {
  constexpr const char* function = "gram_matrix_backward";
  check_features(function, features);
  check_grad_gram(function, grad_gram, features);
  const double scale = gram_scale(function, features, normalize, divisor);
  const at::Tensor g = grad_gram.contiguous();
  return dispatch(features.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const auto scaled = [&](T x) { return T(scale) * x; };
    const at::Tensor matrix =
        packed_symmetric(kernels, g.template const_data_ptr<T>(), features.size(0), features.size(1), scaled);
    return symmetric_times(kernels, matrix, features);
  });
}

std::vector<at::Tensor> style_loss_backward(const at::Tensor& grad_loss, const at::Tensor& losses, const at::Tensor& residuals,
                                            at::TensorList features, const c10::List<bool>& wanted, at::ArrayRef<double> weights,
                                            std::string_view normalize, double divisor, std::string_view reduction,
                                            std::string_view distance) {
  constexpr const char* function = "style_loss_backward";
  const StyleLayers layers = style_layers(function, features, {weights, normalize, divisor, reduction, distance});
  check_style_gradient(function, grad_loss, losses, residuals, wanted, layers);
  const at::Tensor loss_of = losses.contiguous(), residual_of = residuals.contiguous();
  return dispatch(features[0].scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    std::vector<at::Tensor> grads;
    for (size_t i = 0; i < features.size(); ++i) {
      const StyleLayer& layer = layers.layers[i];
      if (!wanted[i]) {
        grads.push_back(at::empty({0}, features[i].options()));
        continue;
      }
      const T* residual = residual_of.template const_data_ptr<T>() + layer.first;
      const int64_t batch = layer.features.size(0), channels = layer.features.size(1);
      // Everything the product is multiplied by, before it is rounded.
      const double incoming = double(*grad_loss.template const_data_ptr<T>()) * layer.weight * layer.scale * layer.factor;
      const auto times = [&](auto value) {
        grads.push_back(symmetric_times(kernels, packed_symmetric(kernels, residual, batch, channels, value), features[i]));
      };
      if (layers.distance == StyleDistance::l1) {
        times([c = T(incoming)](T r) { return r != r ? r : c * T((r > 0) - (r < 0)); });
      } else {
        const double root = double(loss_of.template const_data_ptr<T>()[i]);
        const double c = layers.distance == StyleDistance::l2 ? 2 * incoming : root == 0 ? 0 : incoming / root;
        times([c = T(c)](T r) { return c * r; });
      }
    }
    return grads;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("gram_matrix", gram_matrix);
  m.impl("gram_matrix_backward", gram_matrix_backward);
  m.impl("style_loss", style_loss);
  m.impl("style_loss_backward", style_loss_backward);
}

}  // namespace deepsim::cpu
