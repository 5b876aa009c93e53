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
void column_sums(const Rows& x, const double* norm, int64_t begin, int64_t end, double* sums) {
  for (int64_t k = 0; k < x.depth; ++k) sums[k] = 0;
  for (int64_t i = begin; i < end; ++i) {
    const S* row = row_of<S>(x, i);
    const double scale = norm ? (norm[i] == 0 ? 0.0 : 1 / norm[i]) : 1.0;
    for (int64_t k = 0; k < x.depth; ++k) sums[k] += double(widen(row[k])) * scale;
  }
}

// Sum over k of term(k) in interleaved chains: a fixed order that vectorises, and enough of them to hide the latency of additions.
template <class Term>
DEEPSIM_INLINE double sum_of(int64_t n, Term term) {
  constexpr int kChains = 32;
  double chain[kChains] = {};
  int64_t k = 0;
  for (; k + kChains <= n; k += kChains)
    for (int l = 0; l < kChains; ++l) chain[l] += term(k + l);
  for (; k < n; ++k) chain[k % kChains] += term(k);
  for (int width = kChains / 2; width >= 8; width /= 2)
    for (int l = 0; l < width; ++l) chain[l] += chain[l + width];
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

// |row|^2
template <class S>
DEEPSIM_INLINE double square_of(const S* row, int64_t depth) {
  return sum_of(depth, [row](int64_t k) { return double(widen(row[k])) * double(widen(row[k])); });
}

template <class S>
void norms(const Rows& x, int64_t begin, int64_t end, double* norm) {
  for (int64_t i = begin; i < end; ++i) {
    const double square = square_of(row_of<S>(x, i), x.depth);
    norm[i] = square < __builtin_inf() ? __builtin_sqrt(square) : __builtin_nan("");
  }
}

template <class S>
void pack(const Rows& x, const Packing<typename ComputeOf<S>::type>& packing, int64_t panel_begin, int64_t panel_end,
          const PackedRows<typename ComputeOf<S>::type>& out) {
  using T = typename ComputeOf<S>::type;
  constexpr int64_t NR = kPanelRows<T>, W = kLanes<T>;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = p * NR, count = x.count - first < NR ? x.count - first : NR;
    T* panel = out.panels + p * x.depth * NR;
    const int32_t* order = packing.order + first;
    const auto shifted = [&](int64_t r, int64_t k, auto v) {
      if constexpr (sizeof v == sizeof(T)) {
        const double norm = packing.norm ? packing.norm[order[r]] : 1.0;
        return T((norm == 0 ? T(0) : T(v / norm)) - packing.center[k]);
      } else {
        if (packing.norm) {
          const double norm = packing.norm[order[r]];
          for (int64_t l = 0; l < W; ++l) v[l] = norm == 0 ? T(0) : T(double(v[l]) / norm);
        }
        return v - load(packing.center + k);
      }
    };
    pack_panel<T, S>([&](int64_t r) { return row_of<S>(x, order[r]); }, count, x.depth, panel, shifted);
    double square[NR] = {};
    for (int64_t k = 0; k < x.depth; ++k)
      for (int64_t r = 0; r < NR; ++r) square[r] += double(panel[k * NR + r]) * double(panel[k * NR + r]);
    for (int64_t r = 0; r < NR; ++r) {
      out.half_norm[first + r] = r < count ? T(square[r] / 2) : T(__builtin_inf());
      out.original[first + r] = r < count ? order[r] : INT32_MAX;
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
