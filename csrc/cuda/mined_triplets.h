// One triplet an anchor, as ops return it: the tensors that the last kernel of mining fills.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

#include "../common/checks.h"
#include "owned_batch.h"

namespace deepsim::cuda {

// loss, d_ap, d_an, positives, negatives
using MinedLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct MinedTriplets {
  at::Tensor positives, negatives;  // int32 [anchors]
  at::Tensor loss, d_ap, d_an;      // in the type of the arithmetic; only where a loss is asked for
  at::Tensor parts;                 // of a loss that is one number
  Triplets view = {};

  explicit MinedTriplets(const OwnedBatch& b)
      : positives(at::empty({b.x.size(0)}, b.x.options().dtype(at::kInt))), negatives(at::empty_like(positives)) {
    view.positives = positives.mutable_data_ptr<int32_t>();
    view.negatives = negatives.mutable_data_ptr<int32_t>();
  }
  MinedTriplets(const OwnedBatch& b, Reduction reduction) : MinedTriplets(b) {
    const auto options = b.x.options().dtype(compute_type(b.x.scalar_type()));
    d_ap = at::empty({b.x.size(0)}, options);
    d_an = at::empty_like(d_ap);
    loss = reduction == Reduction::none ? at::empty_like(d_ap) : at::empty({}, options);
    view.d_ap = d_ap.mutable_data_ptr();
    view.d_an = d_an.mutable_data_ptr();
    view.loss = loss.mutable_data_ptr();
    if (reduction == Reduction::none) return;
    parts = at::empty({loss_parts(b.x.size(0)) * int64_t(sizeof(LossPart))}, b.x.options().dtype(at::kByte));
    view.parts = reinterpret_cast<LossPart*>(parts.mutable_data_ptr<uint8_t>());
  }

  MinedLoss result() const { return {loss, d_ap, d_an, positives, negatives}; }
};

}  // namespace deepsim::cuda
