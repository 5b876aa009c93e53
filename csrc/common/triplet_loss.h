// The loss of one triplet and its slope, and how losses are reduced. No torch header: it is for device code too.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "host_device.h"

namespace deepsim {

// What becomes of the losses of the anchors: mean over the valid ones, over those above 0, their sum, or all of them.
enum class Reduction { mean, mean_nonzero, sum, none };
// The same of losses of triplets or pairs, of which there are too many to return.
enum class SumReduction { mean, mean_nonzero, sum };

// A margin in T that stays below what stands for "no pair", a distance added to it included; and whether that has changed it.
template <class T>
constexpr T kLargestMargin = std::numeric_limits<T>::max() / 4;

template <class T>
T comparable_margin(double margin) {
  return T(std::min(margin, double(kLargestMargin<T>)));
}
template <class T>
bool is_beyond_comparison(double margin) {
  return margin > double(kLargestMargin<T>);
}

// l = max(0, z) with z = d_ap - d_an + margin, or log(1 + exp(d_ap - d_an)); and its derivative by d_ap.
template <class T>
struct TripletLoss {
  T margin;
  bool soft;

  DEEPSIM_HOST_DEVICE T value(T d_ap, T d_an) const {
    const T z = d_ap - d_an;
    if (soft) return std::log1p(std::exp(-std::abs(z))) + (z < 0 ? T(0) : z);
    return z + margin <= 0 ? T(0) : z + margin;  // NaN stays NaN
  }
  DEEPSIM_HOST_DEVICE T derivative(T d_ap, T d_an) const {
    const T z = d_ap - d_an;
    if (soft) return 1 / (1 + std::exp(-z));
    return z + margin <= 0 ? T(0) : z + margin > 0 ? T(1) : z;
  }
};

}  // namespace deepsim
