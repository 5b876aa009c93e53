// Gram matrix and style loss: what every backend's kernel checks and agrees on.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace deepsim {

enum class StyleDistance { l2, l1 };  // sum of squares, sum of absolute values of G - target

StyleDistance style_distance_from(const char* function, std::string_view name);

// The scale in G = scale F F^T: 1 / divisor over 1 ("none"), N ("hw"), C N ("chw") or B C N ("bchw").
double gram_scale(const char* function, const at::Tensor& features, std::string_view normalize, double divisor);

// What the sum of distances is multiplied by: 1 / (B C^2) ("mean"), 1 ("sum") or 1 / (4 C^2 N^2) ("gatys").
double style_factor(const char* function, const at::Tensor& features, std::string_view reduction);

// Throw unless features is a non-empty [B, C, N]; and target [1 or B, C, C], grad_gram [B, C, C] in the Gram's dtype fit it.
void check_features(const char* function, const at::Tensor& features);
void check_target(const char* function, const at::Tensor& target, const at::Tensor& features);
void check_grad_gram(const char* function, const at::Tensor& grad_gram, const at::Tensor& features);

}  // namespace deepsim
