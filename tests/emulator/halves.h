// 16-bit floating-point numbers in plain C++, for the emulator and for programs that check kernels from the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace halves {

template <class To, class From>
To with_bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t bits_of(float f) { return with_bits_of<uint32_t>(f); }
inline uint64_t bits_of(double d) { return with_bits_of<uint64_t>(d); }
inline float float_of(uint32_t u) { return with_bits_of<float>(u); }

// 2^exponent, of a double's normal numbers.
inline double power_of_two(int exponent) { return with_bits_of<double>(uint64_t(exponent + 1023) << 52); }

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline float from_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To nearest, ties to even.
inline uint16_t to_bfloat16(float v) {
  const uint32_t u = bits_of(v);
  return v != v ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float v) {
  const uint16_t sign = uint16_t(bits_of(v) >> 16 & 0x8000u);
  const float magnitude = std::fabs(v);
  if (v != v) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | uint16_t(std::nearbyint(magnitude * 0x1p24f));  // a multiple of 2^-24
  const uint32_t u = bits_of(magnitude);
  return sign | uint16_t((u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13);
}

}  // namespace halves
