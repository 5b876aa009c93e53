// Distances of listed pairs on CUDA: which kernels run, on how many blocks.
#include "dispatch.cuh"
#include "pair_distances.cuh"

namespace deepsim::cuda {

void measure_pairs(const Batch& batch, const ListedPairs& pairs, void* distances, void* stream) {
  if (pairs.count == 0) return;
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    launch(pair_distances_kernel<S>, blocks_for(pairs.count, kRowWarps), kRowThreads, 0, stream, batch, pairs,
           static_cast<Compute<S>*>(distances));
  });
}

void pair_gradient(const PairGradient& g, void* stream) {
  const Rows& rows = g.batch.anchors;
  if (rows.count == 0) return;
  dispatch(g.batch.storage, [&](auto s) {
    const int64_t blocks = blocks_for(rows.count, kRowWarps) * blocks_for(rows.depth, kGradientColumns);
    launch(pair_gradient_kernel<decltype(s)>, blocks, kRowThreads, sizeof(GradientShared), stream, g);
  });
}

}  // namespace deepsim::cuda
