// 16-bit floats in memory, float in registers, converted by plain arithmetic that vectorises on every CPU.
#pragma once

#include "vec.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DEEPSIM_INLINE float float_from_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}
DEEPSIM_INLINE uint32_t bits_from_float(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, sizeof u);
  return u;
}

// The type that arithmetic on S is done in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

DEEPSIM_INLINE float widen(float x) { return x; }
DEEPSIM_INLINE double widen(double x) { return x; }
DEEPSIM_INLINE float widen(BFloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }
DEEPSIM_INLINE float widen(Float16 x) {
  // Exponent and mantissa moved into float's place read as value * 2^-112, subnormals included; a product puts that right.
  const float magnitude = float_from_bits(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;  // inf and NaN keep their mantissa
  return float_from_bits(bits_from_float(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even, as torch does.
DEEPSIM_INLINE void narrow(float x, float* out) { *out = x; }
DEEPSIM_INLINE void narrow(double x, double* out) { *out = x; }
DEEPSIM_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t u = bits_from_float(x);
  out->bits = x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
DEEPSIM_INLINE void narrow(float x, Float16* out) {
  const uint32_t u = bits_from_float(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    h = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves the multiple of 2^-24, rounded, in the low mantissa bits.
    h = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
