// Gram matrix and style loss on CUDA: what the torch side (gram_kernel.cpp) asks of the launches (gram.cu). Device pointers only;
// nothing here waits for the device.
#pragma once

#include <cstdint>

#include "storage.h"

namespace deepsim::cuda {

// Channels, or positions, on each side of a tile of products.
constexpr int kGramTile = 64;

// [batch, channels, positions] with strides in elements; one of channel_stride and position_stride is 1.
struct Features {
  const void* data;
  int64_t batch, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;
};

// What the sums of products become: matrix = scale * F F^T - target, and the loss of it.
struct GramResult {
  void* matrix;         // [batch, channels, channels]
  const void* target;   // null: none
  int64_t target_stride;  // between samples, 0 if they share one
  void* loss;           // factor * the sum of squares, or of absolute values; null: none
  double scale, factor;
  bool squared;
};

// Room for sums over slices of positions: [batch][slices][tiles][kGramTile][kGramTile] in the type of the arithmetic. Slices are
// cut by shape alone, and their sums added up in order.
struct GramSpace {
  int slices;
  void* sums;
  double* losses;      // [gram_reduce_blocks]
  uint32_t* finished;  // zero at the start
};

int64_t gram_tiles(int64_t channels);
int gram_slices(int64_t batch, int64_t channels, int64_t positions);
int64_t gram_reduce_blocks(int64_t batch, int64_t channels);

// `tf32`: one pass of products of 11 bits for float32, as torch's own setting allows; otherwise three, which are as good as
// float32. 16-bit products are exact in one.
void gram(Storage storage, bool tf32, const Features& features, const GramSpace& space, const GramResult& out, void* stream);

// grad = scale * (g + g^T) F, g [batch, channels, channels] in the type of the arithmetic, grad with strides of its own in the
// dtype of the features. `symmetric` is room for a matrix like g.
void gram_gradient(Storage storage, bool tf32, const Features& features, const void* g, double scale, void* symmetric,
                   const Features& grad, void* stream);

}  // namespace deepsim::cuda
