// One SIMD register as a GCC/Clang vector extension, so that arithmetic, comparison and selection are plain operators.
//
// Included only by the capability files (portable.cpp, avx2.cpp, avx512.cpp), which set DEEPSIM_CAPABILITY and
// DEEPSIM_VECTOR_BYTES first. Nothing here, nor in the other simd/ headers, may include a C++ standard or torch header
// with code in it: an inline function compiled for AVX-512 here could be the copy that the linker keeps for everyone.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>  // types only, no code

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

// Integers as wide as T; what a comparison of Vec<T> gives.
template <class T>
using Lanes = decltype(Vec<T>{} < Vec<T>{});
template <class T>
using UnsignedLanes = typename VecOf<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>::type;

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

// int32 numbers to lanes as wide as T, and back.
template <class T>
DEEPSIM_INLINE Lanes<T> load_lanes(const int32_t* p) {
  typedef int32_t Narrow __attribute__((vector_size(4 * kLanes<T>)));
  Narrow v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Lanes<T>);
}

template <class T>
DEEPSIM_INLINE void store_lanes(int32_t* p, Lanes<T> lanes) {
  typedef int32_t Narrow __attribute__((vector_size(4 * kLanes<T>)));
  const Narrow v = __builtin_convertvector(lanes, Narrow);
  __builtin_memcpy(p, &v, sizeof v);
}

// gather: lane l is base[index[l]].
// bits_le, bits_lt: bit l of the result says whether a[l] <= b[l] (a[l] < b[l]); false where either is NaN.
// count_lt: adds 1 to the lanes of `count` for which that is so, and returns the bits.
#if DEEPSIM_VECTOR_BYTES == 64
DEEPSIM_INLINE Vec<float> gather(const float* base, Lanes<float> index) {
  return (Vec<float>)_mm512_i32gather_ps((__m512i)index, base, 4);
}
DEEPSIM_INLINE Vec<double> gather(const double* base, Lanes<double> index) {
  return (Vec<double>)_mm512_i64gather_pd((__m512i)index, base, 8);
}
DEEPSIM_INLINE uint32_t bits_le(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
}
DEEPSIM_INLINE uint32_t bits_le(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
}
DEEPSIM_INLINE uint32_t bits_lt(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
}
DEEPSIM_INLINE uint32_t bits_lt(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ);
}
DEEPSIM_INLINE uint32_t count_lt(Vec<float>& count, Vec<float> a, Vec<float> b) {
  const __mmask16 less = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
  count = (Vec<float>)_mm512_mask_add_ps((__m512)count, less, (__m512)count, _mm512_set1_ps(1));
  return less;
}
DEEPSIM_INLINE uint32_t count_lt(Vec<double>& count, Vec<double> a, Vec<double> b) {
  const __mmask8 less = _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ);
  count = (Vec<double>)_mm512_mask_add_pd((__m512d)count, less, (__m512d)count, _mm512_set1_pd(1));
  return less;
}
DEEPSIM_INLINE Vec<float> square_root(Vec<float> a) { return (Vec<float>)_mm512_sqrt_ps((__m512)a); }
DEEPSIM_INLINE Vec<double> square_root(Vec<double> a) { return (Vec<double>)_mm512_sqrt_pd((__m512d)a); }
#elif DEEPSIM_VECTOR_BYTES == 32
DEEPSIM_INLINE Vec<float> gather(const float* base, Lanes<float> index) {
  return (Vec<float>)_mm256_i32gather_ps(base, (__m256i)index, 4);
}
DEEPSIM_INLINE Vec<double> gather(const double* base, Lanes<double> index) {
  return (Vec<double>)_mm256_i64gather_pd(base, (__m256i)index, 8);
}
DEEPSIM_INLINE uint32_t bits_le(Vec<float> a, Vec<float> b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
}
DEEPSIM_INLINE uint32_t bits_le(Vec<double> a, Vec<double> b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LE_OQ)));
}
DEEPSIM_INLINE uint32_t bits_lt(Vec<float> a, Vec<float> b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)));
}
DEEPSIM_INLINE uint32_t bits_lt(Vec<double> a, Vec<double> b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LT_OQ)));
}
DEEPSIM_INLINE uint32_t count_lt(Vec<float>& count, Vec<float> a, Vec<float> b) {
  const __m256 less = _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ);
  count += (Vec<float>)_mm256_and_ps(less, _mm256_set1_ps(1));
  return uint32_t(_mm256_movemask_ps(less));
}
DEEPSIM_INLINE uint32_t count_lt(Vec<double>& count, Vec<double> a, Vec<double> b) {
  const __m256d less = _mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LT_OQ);
  count += (Vec<double>)_mm256_and_pd(less, _mm256_set1_pd(1));
  return uint32_t(_mm256_movemask_pd(less));
}
DEEPSIM_INLINE Vec<float> square_root(Vec<float> a) { return (Vec<float>)_mm256_sqrt_ps((__m256)a); }
DEEPSIM_INLINE Vec<double> square_root(Vec<double> a) { return (Vec<double>)_mm256_sqrt_pd((__m256d)a); }
#else
template <class T>
DEEPSIM_INLINE Vec<T> gather(const T* base, Lanes<T> index) {
  Vec<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = base[index[l]];
  return v;
}
template <class V>
DEEPSIM_INLINE uint32_t bits_le(V a, V b) {
  uint32_t bits = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) bits |= uint32_t(a[l] <= b[l]) << l;
  return bits;
}
template <class V>
DEEPSIM_INLINE uint32_t bits_lt(V a, V b) {
  uint32_t bits = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) bits |= uint32_t(a[l] < b[l]) << l;
  return bits;
}
template <class V>
DEEPSIM_INLINE uint32_t count_lt(V& count, V a, V b) {
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) count[l] += a[l] < b[l];
  return bits_lt(a, b);
}
template <class V>
DEEPSIM_INLINE V square_root(V a) {
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) a[l] = sizeof(a[0]) == 4 ? __builtin_sqrtf(a[l]) : __builtin_sqrt(a[l]);
  return a;
}
#endif

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
