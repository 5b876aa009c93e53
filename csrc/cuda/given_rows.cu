// Losses of given pairs and triplets on CUDA: which kernels run, on how many blocks.
#include "dispatch.cuh"
#include "given_rows.cuh"

namespace deepsim::cuda {
namespace {

template <class S, class Formula>
void given_losses(const GivenRows& rows, const Formula& formula, const GivenLosses& out, void* stream) {
  launch(given_losses_kernel<S, Formula>, loss_parts(rows.sets[0].count), kRowThreads, sizeof(LossShared), stream, rows, formula, out);
}

}  // namespace

void triplet_losses(const GivenRows& rows, const GivenTriplet& formula, const GivenLosses& out, void* stream) {
  dispatch(rows.storage, [&](auto s) { given_losses<decltype(s)>(rows, formula, out, stream); });
}

void contrastive_losses(const GivenRows& rows, const void* y, double margin, const GivenLosses& out, void* stream) {
  dispatch(rows.storage, [&](auto s) {
    using T = Compute<decltype(s)>;
    given_losses<decltype(s)>(rows, GivenContrast<T>{static_cast<const T*>(y), margin}, out, stream);
  });
}

void given_gradient(const GivenGradient& g, void* stream) {
  const int64_t rows = g.rows.sets[0].count;
  if (rows == 0) return;
  dispatch(g.rows.storage, [&](auto s) {
    using S = decltype(s);
    const auto kernel = g.rows.set_count == 2 ? given_gradient_kernel<S, 2> : given_gradient_kernel<S, 3>;
    launch(kernel, blocks_for(rows, kRowWarps), kRowThreads, 0, stream, g);
  });
}

}  // namespace deepsim::cuda
