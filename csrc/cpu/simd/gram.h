// F F^T of a slice of feature positions, upper triangle of tiles only.
//
// Channels are the packed rows, positions the depth. Positions are packed a block at a time into a scratch that fits in
// cache, because channels lie a power of two bytes apart in memory and would evict each other if they were read in place.
#pragma once

#include "../kernels.h"
#include "transpose.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class T>
inline int64_t channel_panels(int64_t channels) {
  return (channels + kPanelRows<T> - 1) / kPanelRows<T>;
}

template <class T>
int64_t gram_scratch(int64_t channels) {
  return channel_panels<T>(channels) * kPanelRows<T> * kDepthBlock;
}

template <class S>
void gram(const FeatureSlice& f, typename ComputeOf<S>::type* packed, typename ComputeOf<S>::type* tiles) {
  using T = typename ComputeOf<S>::type;
  constexpr int64_t NR = kPanelRows<T>, W = kLanes<T>;
  const int64_t panels = channel_panels<T>(f.channels);
  const S* data = static_cast<const S*>(f.data);
  for (int64_t position = f.begin; position < f.end; position += kDepthBlock) {
    const int64_t depth = f.end - position < kDepthBlock ? f.end - position : kDepthBlock;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * NR, count = f.channels - first < NR ? f.channels - first : NR;
      const S* origin = data + first * f.channel_stride + position * f.position_stride;
      T* panel = packed + first * kDepthBlock;
      if (f.position_stride == 1) {
        pack_panel<T, S>([&](int64_t r) { return origin + r * f.channel_stride; }, count, depth, panel,
                         [](int64_t, int64_t, auto v) { return v; });
      } else {  // channels adjacent (channels_last): already interleaved as a panel is
        for (int64_t k = 0; k < depth; ++k) {
          const S* in = origin + k * f.position_stride;
          T* out = panel + k * NR;
          int64_t c = 0;
          for (; c + W <= count; c += W) store(out + c, load_widened<T>(in + c));
          for (; c < count; ++c) out[c] = widen(in[c]);
          for (; c < NR; ++c) out[c] = 0;
        }
      }
    }
    T* tile = tiles;
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t j = i; j < panels; ++j, tile += NR * NR)
        tile_product(packed + i * NR * kDepthBlock, packed + j * NR * kDepthBlock, depth, tile, position > f.begin);
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
