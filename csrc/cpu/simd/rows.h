// Passes over embedding rows: column sums, norms and packing.
#pragma once

#include "../kernels.h"
#include "transpose.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class S>
DEEPSIM_INLINE const S* row_of(const Rows& x, int64_t i) {
  return static_cast<const S*>(x.data) + i * x.stride;
}

template <class S>
void column_sums(const Rows& x, const double* row_scale, int64_t begin, int64_t end, double* sums) {
  for (int64_t k = begin; k < end; ++k) sums[k] = 0;
  for (int64_t i = 0; i < x.count; ++i) {
    const S* row = row_of<S>(x, i);
    const double scale = row_scale ? row_scale[i] : 1.0;
    for (int64_t k = begin; k < end; ++k) sums[k] += double(widen(row[k])) * scale;
  }
}

// Sum over k of term(k) in eight interleaved chains: a fixed order that vectorises.
template <class Term>
DEEPSIM_INLINE double sum_of(int64_t n, Term term) {
  double chain[8] = {};
  int64_t k = 0;
  for (; k + 8 <= n; k += 8)
    for (int l = 0; l < 8; ++l) chain[l] += term(k + l);
  for (; k < n; ++k) chain[k & 7] += term(k);
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

template <class S>
void inverse_norms(const Rows& x, int64_t begin, int64_t end, double* scale) {
  for (int64_t i = begin; i < end; ++i) {
    const S* row = row_of<S>(x, i);
    const double square = sum_of(x.depth, [row](int64_t k) { return double(widen(row[k])) * double(widen(row[k])); });
    scale[i] = square == 0 ? 0.0 : square < __builtin_inf() ? 1 / __builtin_sqrt(square) : __builtin_nan("");
  }
}

template <class S>
void pack(const Rows& x, const Packing& packing, int64_t panel_begin, int64_t panel_end,
          const PackedRows<typename ComputeOf<S>::type>& out) {
  using T = typename ComputeOf<S>::type;
  constexpr int64_t NR = kPanelRows<T>, W = kLanes<T>;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = p * NR, count = x.count - first < NR ? x.count - first : NR;
    T* panel = out.panels + p * x.depth * NR;
    const int32_t* order = packing.order + first;
    // The mean is rounded to T first: any shift does, as long as it is the same for every row.
    const auto shifted = [&](int64_t r, int64_t k, auto v) {
      if constexpr (sizeof v == sizeof(T)) {
        const double scale = packing.row_scale ? packing.row_scale[order[r]] : 1.0;
        return T(T(v * scale) - T(packing.center[k]));
      } else {
        T center[W];
        for (int64_t l = 0; l < W; ++l) center[l] = T(packing.center[k + l]);
        if (packing.row_scale) {
          const double scale = packing.row_scale[order[r]];
          for (int64_t l = 0; l < W; ++l) v[l] = T(double(v[l]) * scale);
        }
        return v - load(center);
      }
    };
    pack_panel<T, S>([&](int64_t r) { return row_of<S>(x, order[r]); }, count, x.depth, panel, shifted);
    for (int64_t r = 0; r < NR; ++r) {
      double square = 0;
      for (int64_t k = 0; k < x.depth; ++k) square += double(panel[k * NR + r]) * double(panel[k * NR + r]);
      out.half_norm[first + r] = r < count ? T(square / 2) : T(__builtin_inf());
      out.original[first + r] = r < count ? order[r] : INT32_MAX;
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
