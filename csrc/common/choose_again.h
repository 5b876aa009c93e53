// When batch-hard mining makes an anchor's choice again by differences. No torch header: it is for device code too.
#pragma once

#include "host_device.h"

namespace deepsim {

// Tiles subtract |a|^2 and |b|^2 from twice ab. Where what is left of the chosen pair, half_square = |a - b|^2 / 2, is less than 1/512 of
// the anchor's half_norm = |a|^2 / 2, too many digits are lost to rely on the choice. Other choices are right to 2^-14 of their own
// squared distance in float32 on the CPU. Tensor cores cut sums off: |a - b|^2 of rows as near as that is then up to 8e-3 too large, but by
// nearly as much for all of them, and choices are right to 5e-4.
template <class T>
DEEPSIM_HOST_DEVICE bool has_lost_digits(T half_square, T half_norm) {
  return half_square < half_norm * T(1.0 / 512);
}

}  // namespace deepsim
