// k nearest neighbours: what every backend's kernel checks and agrees on.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "common/distance.h"

namespace deepsim {

// Throws unless queries [Q, D] and the gallery [G, D], if there is one, fit together and have k neighbours to offer.
Distance check_nearest_neighbors(const at::Tensor& queries, const std::optional<at::Tensor>& gallery, int64_t k, std::string_view distance);

}  // namespace deepsim
