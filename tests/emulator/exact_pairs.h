// Pairs of rows, one coordinate after another in double.
#pragma once

#include <cmath>

#include "csrc/common/distance.h"

namespace {

using deepsim::Distance;

// The derivative of a distance d of x and y, coordinate k, by x.
double slope_of(Distance distance, const double* x, const double* y, int64_t depth, double d, int64_t k) {
  if (distance == Distance::sqeuclidean) return 2 * (x[k] - y[k]);
  if (distance == Distance::euclidean) return d == 0 ? 0 : (x[k] - y[k]) / d;
  double xx = 0, yy = 0;
  for (int64_t i = 0; i < depth; ++i) xx += x[i] * x[i], yy += y[i] * y[i];
  return xx == 0 || yy == 0 ? 0 : (1 - d) * x[k] / xx - y[k] / std::sqrt(xx * yy);
}

double distance_of(Distance distance, const double* x, const double* y, int64_t depth) {
  double square = 0, xx = 0, yy = 0, xy = 0;
  for (int64_t i = 0; i < depth; ++i) {
    square += (x[i] - y[i]) * (x[i] - y[i]);
    xx += x[i] * x[i], yy += y[i] * y[i], xy += x[i] * y[i];
  }
  if (distance == Distance::cosine) return xx == 0 || yy == 0 ? 1 : 1 - xy / std::sqrt(xx * yy);
  return distance == Distance::euclidean ? std::sqrt(square) : square;
}

}  // namespace
