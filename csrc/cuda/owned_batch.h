// A batch as kernels take it, from torch's tensors.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "../common/layout.h"
#include "batch_hard.h"
#include "storage_of.h"

namespace deepsim::cuda {

using OptionalTensor = std::optional<at::Tensor>;

inline Rows rows_of(const at::Tensor& x) { return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0)}; }

// A batch and the tensors that its pointers point into.
struct OwnedBatch {
  at::Tensor x, ref, labels, ref_labels, anchor_norms, reference_norms, flags;
  Batch view;
};

inline OwnedBatch own(const at::Tensor& x, const OptionalTensor& ref, Distance distance) {
  OwnedBatch b;
  b.x = with_adjacent_columns(x);
  b.ref = ref ? with_adjacent_columns(*ref) : b.x;
  b.flags = at::zeros({int64_t(sizeof(Flags) / sizeof(int32_t))}, x.options().dtype(at::kInt));
  b.view = {};
  b.view.storage = storage_of(x.scalar_type());
  b.view.distance = distance;
  b.view.self_form = !ref;
  b.view.anchors = rows_of(b.x);
  b.view.references = rows_of(b.ref);
  b.view.flags = reinterpret_cast<Flags*>(b.flags.mutable_data_ptr<int32_t>());
  if (distance == Distance::cosine) {
    const auto options = x.options().dtype(at::kDouble);
    b.anchor_norms = at::empty({b.x.size(0)}, options);
    b.reference_norms = ref ? at::empty({b.ref.size(0)}, options) : b.anchor_norms;
    b.view.anchor_norm = b.anchor_norms.mutable_data_ptr<double>();
    b.view.reference_norm = b.reference_norms.mutable_data_ptr<double>();
  }
  return b;
}

inline OwnedBatch own(const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref, const OptionalTensor& ref_labels,
                      Distance distance) {
  OwnedBatch b = own(x, ref, distance);
  b.labels = labels.contiguous();
  b.ref_labels = ref ? ref_labels->contiguous() : b.labels;
  b.view.labels = b.labels.const_data_ptr<int64_t>();
  b.view.reference_labels = b.ref_labels.const_data_ptr<int64_t>();
  return b;
}

// Where the centre of a batch is to be left, and the tensors that it stands in.
struct OwnedCentre {
  at::Tensor sums, mean;

  Centre make(const OwnedBatch& b) {
    const int slices = centre_slices(std::max(b.x.size(0), b.ref.size(0)));
    sums = at::empty({b.view.self_form ? 1 : 2, slices, b.x.size(1)}, b.x.options().dtype(at::kDouble));
    mean = at::empty({b.x.size(1)}, b.x.options().dtype(at::kFloat));
    return {slices, sums.mutable_data_ptr<double>(), mean.mutable_data_ptr<float>()};
  }
};

}  // namespace deepsim::cuda
