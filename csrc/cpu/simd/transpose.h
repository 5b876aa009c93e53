// Square transpose in registers, and the packing of rows into panels on top of it.
#pragma once

#include <utility>  // integer_sequence: types only, no code

#include "half.h"
#include "tile_product.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// Lanes of a and b, numbered through, in the order given.
template <int... kLane, class V>
DEEPSIM_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else  // GCC has the other only from 12 on
  using Lanes = decltype(a < b);
  return __builtin_shuffle(a, b, Lanes{kLane...});
#endif
}

// Exchanges the off-diagonal kHalf x kHalf blocks of every 2 kHalf x 2 kHalf block pair held in a and b.
template <int kHalf, class V, int... kLane>
DEEPSIM_INLINE void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int W = sizeof...(kLane);
  const V low = shuffle<((kLane & kHalf) ? W + kLane - kHalf : kLane)...>(a, b);
  b = shuffle<((kLane & kHalf) ? W + kLane : kLane + kHalf)...>(a, b);
  a = low;
}

template <int kHalf, class T>
DEEPSIM_INLINE void transpose(Vec<T>* rows) {
  constexpr int W = kLanes<T>;
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      if (!(r & kHalf)) exchange<kHalf>(rows[r], rows[r + kHalf], std::make_integer_sequence<int, W>());
    transpose<kHalf / 2, T>(rows);
  }
}

template <class T, class S>
DEEPSIM_INLINE Vec<T> load_widened(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load(reinterpret_cast<const T*>(p));
  } else {
    T wide[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) wide[l] = widen(p[l]);
    return load(wide);
  }
}

// panel[k][r] = map(row r's element k) for kPanelRows rows of `depth` adjacent elements. `map(r, k, v)` sees whole registers,
// elements k, k + 1, ... of row r; `map(r, k, x)` the rest one by one. Rows from `count` on are filled with zeros.
template <class T, class S, class RowPointer, class Map>
DEEPSIM_INLINE void pack_panel(RowPointer row, int64_t count, int64_t depth, T* panel, Map map) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  for (int64_t first = 0; first < NR; first += W) {
    int64_t k = 0;
    for (; k + W <= depth; k += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l)
        block[l] = first + l < count ? map(first + l, k, load_widened<T>(row(first + l) + k)) : Vec<T>{};
      transpose<W / 2, T>(block);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(panel + (k + l) * NR + first, block[l]);
    }
    for (; k < depth; ++k)
      for (int l = 0; l < W; ++l)
        panel[k * NR + first + l] = first + l < count ? map(first + l, k, widen(row(first + l)[k])) : T(0);
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
