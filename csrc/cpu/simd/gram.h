// F F^T of a slice of feature positions, upper triangle of tiles only; and its gradient, a symmetric matrix times F.
//
// For the Gram matrix channels are the packed rows, positions the depth. Positions are packed a block at a time into a scratch that fits in
// cache, because channels lie a power of two bytes apart in memory and would evict each other if they were read in place.
#pragma once

#include "../kernels.h"
#include "transpose.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class T>
inline int64_t channel_panels(int64_t channels) {
  return (channels + kPanelRows<T> - 1) / kPanelRows<T>;
}

// How many positions are packed at a time. With few channels what is packed stays in L1 or close to it; with many, every tile is best
// taken through several blocks of the depth while it is in L1: as many as fit in half of a 2 MiB L2, up to four.
template <class T>
inline int64_t packed_positions(int64_t channels) {
  constexpr int64_t kFewChannels = 128, kMostBytes = int64_t(1) << 20, kMostBlocks = 4;
  if (channels <= kFewChannels) return kDepthBlock;
  const int64_t blocks = kMostBytes / (channel_panels<T>(channels) * kPanelRows<T> * kDepthBlock * int64_t(sizeof(T)));
  return (blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks) * kDepthBlock;
}

template <class T>
int64_t gram_scratch(int64_t channels) {
  return channel_panels<T>(channels) * kPanelRows<T> * packed_positions<T>(channels);
}

// One row of a panel from adjacent elements, filled up with zeros.
template <class S, class T>
DEEPSIM_INLINE void widen_row(const S* in, int64_t count, T* out) {
  constexpr int64_t NR = kPanelRows<T>, W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= count; c += W) store(out + c, load_widened<T>(in + c));
  for (; c < count; ++c) out[c] = widen(in[c]);
  for (; c < NR; ++c) out[c] = 0;
}

template <class S>
void gram(const FeatureSlice& f, typename ComputeOf<S>::type* packed, typename ComputeOf<S>::type* tiles) {
  using T = typename ComputeOf<S>::type;
  constexpr int64_t NR = kPanelRows<T>;
  const int64_t panels = channel_panels<T>(f.channels), most = packed_positions<T>(f.channels);
  const S* data = static_cast<const S*>(f.data);
  const auto rows_of = [&](int64_t p) { return f.channels - p * NR < NR ? f.channels - p * NR : NR; };
  for (int64_t position = f.begin; position < f.end; position += most) {
    const int64_t depth = f.end - position < most ? f.end - position : most;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * NR, count = rows_of(p);
      const S* origin = data + first * f.channel_stride + position * f.position_stride;
      T* panel = packed + first * most;
      if (f.position_stride == 1) {
        pack_panel<T, S>([&](int64_t r) { return origin + r * f.channel_stride; }, count, depth, panel,
                         [](int64_t, int64_t, auto v) { return v; });
      } else {  // channels adjacent (channels_last): already interleaved as a panel is
        for (int64_t k = 0; k < depth; ++k) widen_row(origin + k * f.position_stride, count, panel + k * NR);
      }
    }
    T* tile = tiles;
    for (int64_t i = 0; i < panels; ++i) {
      const T* left = packed + i * NR * most;
      symmetric_tile_product(left, depth, tile, position > f.begin, rows_of(i));
      tile += NR * NR;
      for (int64_t j = i + 1; j < panels; ++j, tile += NR * NR) {
        const T* right = packed + j * NR * most;
        if (j + 1 < panels)
          tile_product(left, right, depth, tile, position > f.begin);
        else
          tile_product(right, left, depth, tile, position > f.begin, rows_of(j));
      }
    }
  }
}

// Here positions are the rows of panels and channels their depth. A tile comes out in the order in which it is written: along
// positions, or along channels where those are adjacent. The whole slice is packed first: so every panel of the matrix is read
// once for all of it, and rows of features, which lie a power of two bytes apart, are read and written in long runs.
template <class S>
void gram_gradient(const FeatureSlice& f, const typename ComputeOf<S>::type* matrix, typename ComputeOf<S>::type* packed,
                   const FeatureOutput& grad) {
  using T = typename ComputeOf<S>::type;
  constexpr int64_t NR = kPanelRows<T>;
  alignas(64) T tile[NR * NR];
  const int64_t panel = f.channels * NR;
  const auto positions_from = [&](int64_t position) { return f.end - position < NR ? f.end - position : NR; };
  if (f.position_stride == 1) {
    for (int64_t k = 0; k < f.channels; ++k) {
      const S* row = static_cast<const S*>(f.data) + k * f.channel_stride;
      T* out = packed + k * NR;
      for (int64_t n = f.begin; n < f.end; n += NR, out += panel) widen_row(row + n, positions_from(n), out);
    }
  } else {
    T* out = packed;
    for (int64_t n = f.begin; n < f.end; n += NR, out += panel) {
      const S* origin = static_cast<const S*>(f.data) + n * f.position_stride;
      pack_panel<T, S>([&](int64_t r) { return origin + r * f.position_stride; }, positions_from(n), f.channels, out,
                       [](int64_t, int64_t, auto v) { return v; });
    }
  }
  for (int64_t first = 0; first < f.channels; first += NR, matrix += panel) {
    const int64_t channels = f.channels - first < NR ? f.channels - first : NR;
    const T* right = packed;
    for (int64_t position = f.begin; position < f.end; position += NR, right += panel) {
      const int64_t positions = positions_from(position);
      S* out = static_cast<S*>(grad.data) + first * grad.channel_stride + position * grad.position_stride;
      if (grad.position_stride == 1) {
        tile_product<T>(matrix, right, f.channels, tile, false, channels);
        for (int64_t r = 0; r < channels; ++r)
          for (int64_t n = 0; n < positions; ++n) narrow(tile[r * NR + n], out + r * grad.channel_stride + n);
      } else {
        tile_product<T>(right, matrix, f.channels, tile, false);
        for (int64_t n = 0; n < positions; ++n)
          for (int64_t r = 0; r < channels; ++r) narrow(tile[n * NR + r], out + n * grad.position_stride + r);
      }
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
