// Losses of given pairs and triplets of rows (given_pairs.h) from their distances. No torch header: it is for device code too.
#pragma once

#include <cstdint>

#include "given_pairs.h"
#include "host_device.h"
#include "triplet_loss.h"

namespace deepsim {

constexpr int triplet_pairs(bool swap) { return swap ? 3 : 2; }

// A formula takes the distances of row t, as they are before they are rounded, and returns its loss; slopes: the loss's derivatives by
// these distances.

// max(0, d_ap - d_an + margin) or log(1 + exp(d_ap - d_an)); with the swap, d_an is the smaller of d_an and d_pn.
struct GivenTriplet {
  static constexpr int kSets = 3;
  TripletLoss<double> loss;
  bool swap;

  DEEPSIM_HOST_DEVICE double operator()(int64_t, const double (&d)[kMostGivenPairs], double (&slopes)[kMostGivenPairs]) const {
    // Both share the slope where they are equal.
    const double of_pn = !swap || d[1] < d[2] ? 0 : d[1] == d[2] ? 0.5 : 1;
    const double nearer = of_pn > 0 ? d[2] : d[1];
    slopes[0] = loss.derivative(d[0], nearer);
    slopes[1] = -slopes[0] * (1 - of_pn);
    slopes[2] = -slopes[0] * of_pn;
    return loss.value(d[0], nearer);
  }
};

// y d^2 + (1 - y) max(0, margin - d)^2; NaN for a y beyond [0, 1].
template <class T>
struct GivenContrast {
  static constexpr int kSets = 2;
  const T* y;
  double margin;

  DEEPSIM_HOST_DEVICE double operator()(int64_t t, const double (&d)[kMostGivenPairs], double (&slopes)[kMostGivenPairs]) const {
    const double similar = y[t] >= 0 && y[t] <= 1 ? double(y[t]) : __builtin_nan("");
    const double gap = d[0] < margin ? margin - d[0] : 0;
    slopes[0] = 2 * (similar * d[0] - (1 - similar) * gap);
    return similar * d[0] * d[0] + (1 - similar) * gap * gap;
  }
};

}  // namespace deepsim
