// Batch-hard triplet loss on CUDA, the torch side: memory and what the launches in batch_hard.cu are to work on.
#include "../batch_hard.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "../common/stage.h"
#include "backend.h"
#include "mined_triplets.h"

namespace deepsim::cuda {
namespace {

// Up to so many differences (anchors x references x columns) they are all searched, in two launches; beyond, tiles are faster in spite
// of the ten launches more of packing, sorting and centring. Measured on an H200 (benchmarks/results/gpu.md, forward in ms, direct and
// by wgmma): 2^29 differences, N=2048 D=128: 0.083 and 0.165; 2^30, N=4096 D=64: 0.163 and 0.127; 2^31, N=2048 D=512: 0.276 and 0.184.
constexpr int64_t kMostDirectDifferences = int64_t(1) << 29;
constexpr int64_t kFewestDirectRows = 1024;

enum class Mining { direct, mma, wgmma };

// DEEPSIM_CUDA_MINING=direct, mma or wgmma asks for one of them, to test it or to measure it.
Mining mining_for(const at::Tensor& anchors, const at::Tensor& references) {
  if (anchors.scalar_type() == at::kDouble) return Mining::direct;
  const char* variable = std::getenv("DEEPSIM_CUDA_MINING");
  const std::string wanted = variable ? variable : "";
  TORCH_CHECK_VALUE(wanted.empty() || wanted == "direct" || wanted == "mma" || wanted == "wgmma",
                    "DEEPSIM_CUDA_MINING must be direct, mma or wgmma, got ", wanted);
  TORCH_CHECK_VALUE(wanted != "wgmma" || can_use_wgmma(),
                    "DEEPSIM_CUDA_MINING is wgmma, which needs a GPU of compute capability 9.0 and a build for 9.0a");
  // Few anchors take as long as a tile of them.
  const int64_t rows = std::max(anchors.size(0), kFewestDirectRows);
  const bool small = rows * anchors.size(1) <= kMostDirectDifferences / references.size(0);
  if (wanted == "direct" || (wanted.empty() && small)) return Mining::direct;
  return wanted == "wgmma" || (wanted.empty() && can_use_wgmma()) ? Mining::wgmma : Mining::mma;
}

// The numbers in ascending order, and where each of them stood (int64); stable.
template <class T>
std::tuple<at::Tensor, at::Tensor> sorted(const at::Tensor& numbers, void* stream) {
  const int64_t count = numbers.size(0);
  if (count == 0 || count > kMostRanked) return at::sort(numbers, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor ranks = at::zeros({count}, numbers.options().dtype(at::kInt)), values = at::empty_like(numbers);
  const at::Tensor order = at::empty({count}, numbers.options().dtype(at::kLong));
  sort_by_rank(numbers.const_data_ptr<T>(), count, ranks.mutable_data_ptr<int32_t>(), values.mutable_data_ptr<T>(),
               order.mutable_data_ptr<int64_t>(), stream);
  return {values, order};
}

// A packed set and the tensors that its pointers point into: 16 bytes a row and the operand, beside the sort's 16.
struct OwnedSet {
  at::Tensor sorted_labels, order, operand, half_norm, scale, label_id, original;
  PackedSet view;
};

OwnedSet own_set(const at::Tensor& x, const at::Tensor& labels, int64_t row_bytes, void* stream) {
  const Stage stage("sort");
  OwnedSet s;
  std::tie(s.sorted_labels, s.order) = sorted<int64_t>(labels, stream);
  const int64_t rows = padded_rows(x.size(0));
  const auto f = x.options().dtype(at::kFloat), i = x.options().dtype(at::kInt);
  s.operand = at::empty({rows * row_bytes}, x.options().dtype(at::kByte));
  s.half_norm = at::empty({rows}, f);
  s.scale = at::empty({rows}, f);
  s.label_id = at::empty({rows}, i);
  s.original = at::empty({rows}, i);
  s.view = {s.order.const_data_ptr<int64_t>(),     s.sorted_labels.const_data_ptr<int64_t>(),
            s.operand.mutable_data_ptr<uint8_t>(), s.half_norm.mutable_data_ptr<float>(),
            s.scale.mutable_data_ptr<float>(),     s.label_id.mutable_data_ptr<int32_t>(),
            s.original.mutable_data_ptr<int32_t>()};
  return s;
}

void mine_and_finish_direct(const OwnedBatch& b, const Triplets& out, const LossOptions& options, void* stream) {
  const int64_t anchors = b.x.size(0), references = b.ref.size(0);
  const int splits = direct_splits(anchors, references);
  const at::ScalarType type = compute_type(b.x.scalar_type());
  const at::Tensor values = at::empty({2 * splits * anchors}, b.x.options().dtype(type));
  const at::Tensor indices = at::empty({2 * splits * anchors}, b.x.options().dtype(at::kInt));
  const DirectFound found{splits, values.mutable_data_ptr(), indices.mutable_data_ptr<int32_t>()};
  {
    const Stage stage("tiles");
    mine_direct(b.view, found, stream);
  }
  const Stage stage("recompute");
  finish_direct(b.view, found, out, options, stream);
}

void mine_and_finish_tiles(const OwnedBatch& b, bool by_wgmma, const Triplets& out, const LossOptions& options, void* stream) {
  const bool centred = b.view.storage == Storage::float32;
  TileMining m = {};
  m.by_wgmma = by_wgmma;
  m.single_pass = tf32_allowed(b.x);
  const int64_t depth = b.x.size(1), row_bytes = operand_row_bytes(b.view.storage, depth, m.single_pass);
  OwnedSet anchors = own_set(b.x, b.labels, row_bytes, stream);
  OwnedSet references = b.view.self_form ? anchors : own_set(b.ref, b.ref_labels, row_bytes, stream);
  m.anchors = anchors.view;
  m.references = references.view;
  OwnedCentre centre;
  if (centred) m.centre = centre.make(b);
  {
    const Stage stage("pack");
    pack_tiles(b.view, m, stream);
  }
  for (OwnedSet* set : {&anchors, &references}) {
    set->order.reset();
    set->sorted_labels.reset();
  }
  const at::Tensor keys = at::zeros({2, padded_rows(b.x.size(0))}, b.x.options().dtype(at::kLong));
  m.positive = reinterpret_cast<unsigned long long*>(keys.mutable_data_ptr<int64_t>());
  m.negative = m.positive + keys.size(1);
  {
    const Stage stage("tiles");
    mine_tiles(b.view, m, stream);
  }
  const Stage stage("recompute");
  finish_tiles(b.view, m, out, options, stream);
}

void mine_and_finish(const OwnedBatch& b, const Triplets& out, const LossOptions& options) {
  void* stream = current_stream(b.x);
  const int64_t anchors = b.x.size(0), references = b.ref.size(0);
  const bool empty = anchors == 0 || references == 0;
  if (b.view.distance == Distance::cosine || empty) row_norms(b.view, stream);
  if (empty) return finish_direct(b.view, {0, nullptr, nullptr}, out, options, stream);  // nobody to choose
  const Mining mining = mining_for(b.x, b.ref);
  if (mining == Mining::direct) {
    mine_and_finish_direct(b, out, options, stream);
  } else {
    mine_and_finish_tiles(b, mining == Mining::wgmma, out, options, stream);
  }
}

std::tuple<at::Tensor, at::Tensor> batch_hard_mine(const at::Tensor& embeddings, const at::Tensor& labels,
                                                   const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                                   std::string_view distance) {
  constexpr const char* function = "batch_hard_mine";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, distance_from(function, distance));
  const MinedTriplets mined(b);
  mine_and_finish(b, mined.view, {0, false, Reduction::none});
  return {mined.positives, mined.negatives};
}

MinedLoss batch_hard_triplet_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                                  const OptionalTensor& ref_labels, double margin, bool soft, std::string_view distance,
                                  std::string_view reduction) {
  constexpr const char* function = "batch_hard_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const LossOptions options{margin, soft, reduction_from(function, reduction)};
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  const MinedTriplets mined(b, options.reduction);
  mine_and_finish(b, mined.view, options);
  return mined.result();
}

std::tuple<at::Tensor, at::Tensor> batch_hard_triplet_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& embeddings, const OptionalTensor& ref_embeddings, const at::Tensor& positives,
    const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an, double margin, bool soft, std::string_view distance,
    std::string_view reduction) {
  constexpr const char* function = "batch_hard_triplet_loss_backward";
  const Distance d = distance_from(function, distance);
  const LossOptions options{margin, soft, reduction_from(function, reduction)};
  check_backward(grad_loss, embeddings, ref_embeddings, positives, negatives, d_ap, d_an, options.reduction);
  const Stage stage("backward");
  const c10::DeviceGuard guard(embeddings.device());
  void* stream = current_stream(embeddings);
  const OwnedBatch b = own(embeddings, ref_embeddings, d);
  if (d == Distance::cosine) {
    row_norms(b.view, stream);
    b.flags.zero_();  // whatever they found, the distances that were saved say it
  }
  const at::Tensor p = positives.contiguous(), q = negatives.contiguous(), ap = d_ap.contiguous(), an = d_an.contiguous();
  const at::Tensor g = grad_loss.contiguous(), count = at::zeros({1}, embeddings.options().dtype(at::kLong));
  const auto [choices, order] = sorted<int32_t>(at::cat({p, q}), stream);
  const at::Tensor first_choice = at::empty({b.ref.size(0) + 1}, p.options());
  const at::Tensor coefficients = at::empty({b.x.size(0)}, ap.options());
  LossGradient view = {};
  view.batch = b.view;
  view.positives = p.const_data_ptr<int32_t>();
  view.negatives = q.const_data_ptr<int32_t>();
  view.d_ap = ap.const_data_ptr();
  view.d_an = an.const_data_ptr();
  view.grad_loss = g.const_data_ptr();
  view.count = reinterpret_cast<unsigned long long*>(count.mutable_data_ptr<int64_t>());
  view.sorted_choices = choices.const_data_ptr<int32_t>();
  view.choice_order = order.const_data_ptr<int64_t>();
  view.first_choice = first_choice.mutable_data_ptr<int32_t>();
  view.coefficients = coefficients.mutable_data_ptr();
  // Only now: sorting needs some memory of its own for a while.
  at::Tensor grad = at::empty(b.x.sizes(), b.x.options());
  at::Tensor grad_ref = at::empty({ref_embeddings ? b.ref.size(0) : 0, b.x.size(1)}, b.x.options());
  view.grad = grad.mutable_data_ptr();
  view.grad_references = grad_ref.mutable_data_ptr();
  triplet_gradient(view, options, stream);
  return {grad, grad_ref};
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("batch_hard_mine", batch_hard_mine);
  m.impl("batch_hard_triplet_loss", batch_hard_triplet_loss);
  m.impl("batch_hard_triplet_loss_backward", batch_hard_triplet_loss_backward);
}

}  // namespace deepsim::cuda
