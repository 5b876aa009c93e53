// Gram matrix and style loss: what every backend's kernel checks and agrees on.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "common/style_distance.h"

namespace deepsim {

// Most layers of one call of the ops of many layers.
constexpr size_t kMostLayers = 16;

// The scale in G = scale F F^T: 1 / divisor over 1 ("none"), N ("hw"), C N ("chw") or B C N ("bchw").
double gram_scale(const char* function, const at::Tensor& features, std::string_view normalize, double divisor);

// Options of style_loss, as the op takes them.
struct StyleOptions {
  at::ArrayRef<double> weights;
  std::string_view normalize;
  double divisor;
  std::string_view reduction, distance;
};

// One layer of the style loss: residual = scale * F F^T - target, loss = factor * sum of residual^2 or |residual| (or the root of the
// sum), which counts `weight` times.
struct StyleLayer {
  at::Tensor features;  // [B, C, N], positions or channels adjacent
  double scale, factor, weight;
  int64_t first;  // of its residual [B, C, C] among those of all layers

  int64_t residual_size() const { return features.size(0) * features.size(1) * features.size(1); }
};

struct StyleLayers {
  std::vector<StyleLayer> layers;
  StyleDistance distance;

  int64_t residual_size() const { return layers.back().first + layers.back().residual_size(); }
};

// Checks the features and what is to be done with them, and works out their factors: those of "mean" are 1 / (B C^2), of "sum" 1, of
// "gatys" 1 / (4 C^2 N^2).
StyleLayers style_layers(const char* function, at::TensorList features, const StyleOptions& options);

// Throw unless features is a non-empty [B, C, N]; and target [1 or B, C, C], grad_gram [B, C, C] in the Gram's dtype fit it.
void check_features(const char* function, const at::Tensor& features);
void check_target(const char* function, const at::Tensor& target, const at::Tensor& features);
void check_grad_gram(const char* function, const at::Tensor& grad_gram, const at::Tensor& features);

// Throw unless there are as many targets as layers, each fitting; and unless gradient, losses, residuals and `wanted` fit the layers.
void check_targets(const char* function, at::TensorList target, at::TensorList features);
void check_style_gradient(const char* function, const at::Tensor& grad_loss, const at::Tensor& losses, const at::Tensor& residuals,
                          const c10::List<bool>& wanted, const StyleLayers& layers);

}  // namespace deepsim
