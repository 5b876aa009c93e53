// The loss of one triplet and its slope. No torch header: it is for device code too.
#pragma once

#include <cmath>

namespace deepsim {

// l = max(0, z) with z = d_ap - d_an + margin, or log(1 + exp(d_ap - d_an)); and its derivative by d_ap.
template <class T>
struct TripletLoss {
  T margin;
  bool soft;

  T value(T d_ap, T d_an) const {
    const T z = d_ap - d_an;
    if (soft) return std::log1p(std::exp(-std::abs(z))) + (z < 0 ? T(0) : z);
    return z + margin <= 0 ? T(0) : z + margin;  // NaN stays NaN
  }
  T derivative(T d_ap, T d_an) const {
    const T z = d_ap - d_an;
    if (soft) return 1 / (1 + std::exp(-z));
    return z + margin <= 0 ? T(0) : z + margin > 0 ? T(1) : z;
  }
};

}  // namespace deepsim
