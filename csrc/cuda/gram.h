// Gram matrix and style loss on CUDA: what the torch side (gram_kernel.cpp) asks of the launches (gram.cu). Device pointers only;
// nothing here waits for the device.
#pragma once

#include <cstdint>

#include "../common/style_distance.h"
#include "storage.h"

namespace deepsim::cuda {

// Channels on each side of a tile of the Gram matrix.
constexpr int kGramTile = 64;

// [batch, channels, positions] with strides in elements; one of channel_stride and position_stride is 1.
struct Features {
  const void* data;
  int64_t batch, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;
};

// Most layers of one launch; they take 3 of the 4 KiB that kernels may be handed.
constexpr int kMostGramLayers = 16;

// One layer of the forward pass: matrix = scale * F F^T - target.
struct GramLayer {
  Features features;
  void* matrix;           // [batch, channels, channels]
  const void* target;     // null: none
  int64_t target_stride;  // between samples, 0 if they share one
  double scale;
  double factor, weight;  // loss = sum over layers of weight * (factor * the sum of squares or absolute values, or the root of that)

  // Set by plan_gram. Slices of positions are cut by shape alone, and their sums added up in order.
  int64_t slices, tiles;
  int64_t first_sum, first_reduce;  // its first block in each of the two launches
};

struct Gram {
  int count;
  GramLayer layer[kMostGramLayers];
  StyleDistance distance;
  void *loss, *losses;  // the loss, and [count] that of every layer; null: none
  // Room: [sum_blocks][kGramTile][kGramTile] in the type of the arithmetic; [reduce_blocks]; one that is zero at the start.
  void* sums;
  double* partial_losses;
  uint32_t* finished;

  int64_t sum_blocks, reduce_blocks;  // set by plan_gram
};

// Shares the blocks out. To be called before room is made.
void plan_gram(Storage storage, Gram& work);

// `tf32`: one pass of products of 11 bits for float32, as torch's own setting allows; otherwise three, which are as good as
// float32. 16-bit products are exact in one.
void gram(Storage storage, bool tf32, const Gram& work, void* stream);

// One layer of the gradient: grad = (value(g) + value(g^T)) F, with value(x) = scale * x, or scale * sign(x) for l1, and for
// frobenius scale / loss * x, 0 where the loss is 0.
struct GramGradientLayer {
  Features features;
  Features grad;    // where it goes, with strides of its own
  const void* g;    // [batch, channels, channels] in the type of the arithmetic
  void* symmetric;  // room for a matrix like g, aligned to 16 bytes
  float* row_scale;  // room for [batch, channels]; used for 16-bit features only
  double scale;
  const void* loss;  // of the layer; read for frobenius only

  int64_t channel_tiles, position_tiles, first_symmetrise, first_product;  // set by gram_gradient
};

struct GramGradient {
  int count;
  GramGradientLayer layer[kMostGramLayers];
  StyleDistance distance;
  const void* grad_loss;  // one number that everything is multiplied by; null: 1
};

void gram_gradient(Storage storage, bool tf32, GramGradient work, void* stream);

}  // namespace deepsim::cuda
