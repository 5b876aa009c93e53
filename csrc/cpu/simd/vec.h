// One SIMD register as a GCC/Clang vector extension, so that arithmetic, comparison and selection are plain operators.
//
// Included only by the capability files (portable.cpp, avx2.cpp, avx512.cpp), which set DEEPSIM_CAPABILITY and
// DEEPSIM_VECTOR_BYTES first. Nothing here, nor in the other simd/ headers, may include a C++ standard or torch header
// with code in it: an inline function compiled for AVX-512 here could be the copy that the linker keeps for everyone.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

#define DEEPSIM_INLINE inline __attribute__((always_inline))

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(DEEPSIM_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline constexpr int kLanes = DEEPSIM_VECTOR_BYTES / sizeof(T);

template <class T>
DEEPSIM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
DEEPSIM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
DEEPSIM_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // not `Vec<T>{} + x`, which would turn -0 into +0
}

// Bit l of the result says whether a[l] <= b[l] (or ==); false where either is NaN.
#if DEEPSIM_VECTOR_BYTES == 64
DEEPSIM_INLINE uint32_t bits_le(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
}
DEEPSIM_INLINE uint32_t bits_le(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
}
#elif DEEPSIM_VECTOR_BYTES == 32
DEEPSIM_INLINE uint32_t bits_le(Vec<float> a, Vec<float> b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
}
DEEPSIM_INLINE uint32_t bits_le(Vec<double> a, Vec<double> b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LE_OQ)));
}
#else
template <class V>
DEEPSIM_INLINE uint32_t bits_le(V a, V b) {
  uint32_t bits = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) bits |= uint32_t(a[l] <= b[l]) << l;
  return bits;
}
#endif

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
