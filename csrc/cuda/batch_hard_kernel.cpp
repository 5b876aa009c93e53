// Batch-hard triplet loss on CUDA, the torch side: memory and what the launches in batch_hard.cu are to work on.
#include "../batch_hard.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../common/checks.h"
#include "../common/stage.h"
#include "backend.h"
#include "mined_triplets.h"
#include "sorted.h"

namespace deepsim::cuda {
namespace {

// Up to so many differences (anchors x references x columns) they are all searched, in two launches; beyond, tiles are faster in spite
// of the six launches more of packing, sorting and centring. Measured on an H200 when there were ten (benchmarks/results/gpu.md, forward
// in ms, direct and by wgmma): 2^29 differences, N=2048 D=128: 0.083 and 0.165; 2^30, N=4096 D=64: 0.163 and 0.127; 2^31, N=2048 D=512:
// 0.276 and 0.184.
constexpr int64_t kMostDirectDifferences = int64_t(1) << 29;
constexpr int64_t kFewestDirectRows = 1024;

enum class Mining { direct, mma, wgmma };

// DEEPSIM_CUDA_MINING=direct, mma or wgmma asks for one of them, to test it or to measure it.
std::string wanted_mining() {
  const char* variable = std::getenv("DEEPSIM_CUDA_MINING");
  const std::string wanted = variable ? variable : "";
  TORCH_CHECK_VALUE(wanted.empty() || wanted == "direct" || wanted == "mma" || wanted == "wgmma",
                    "DEEPSIM_CUDA_MINING must be direct, mma or wgmma, got ", wanted);
  TORCH_CHECK_VALUE(wanted != "wgmma" || can_use_wgmma(),
                    "DEEPSIM_CUDA_MINING is wgmma, which needs a GPU of compute capability 9.0 and a build for 9.0a");
  return wanted;
}

bool tiles_by_wgmma() { return wanted_mining() != "mma" && can_use_wgmma(); }

Mining mining_for(const at::Tensor& anchors, const at::Tensor& references) {
  if (anchors.scalar_type() == at::kDouble) return Mining::direct;
  const std::string wanted = wanted_mining();
  // Few anchors take as long as a tile of them.
  const int64_t rows = std::max(anchors.size(0), kFewestDirectRows);
  const bool small = rows * anchors.size(1) <= kMostDirectDifferences / references.size(0);
  if (wanted == "direct" || (wanted.empty() && small)) return Mining::direct;
  return tiles_by_wgmma() ? Mining::wgmma : Mining::mma;
}

// A packed set and the tensors that its pointers point into: 16 bytes a row and the operand, beside the sort's 16 (28 while it sorts).
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

// Searches all differences of a batch and calls finish(what was found) while its memory is there.
template <class Finish>
void search_direct(const OwnedBatch& b, const Batch& batch, void* stream, Finish finish) {
  const int64_t anchors = batch.anchors.count;
  const int splits = direct_splits(anchors, batch.references.count);
  const at::ScalarType type = compute_type(b.x.scalar_type());
  const at::Tensor values = at::empty({2 * splits * anchors}, b.x.options().dtype(type));
  const at::Tensor indices = at::empty({2 * splits * anchors}, b.x.options().dtype(at::kInt));
  const DirectFound found{splits, values.mutable_data_ptr(), indices.mutable_data_ptr<int32_t>()};
  {
    const Stage stage("tiles");
    mine_direct(batch, found, stream);
  }
  finish(found);
}

template <class Make>
void mine_and_finish_direct(const OwnedBatch& b, Make make, const LossOptions& options, void* stream) {
  search_direct(b, b.view, stream, [&](const DirectFound& found) {
    const Stage stage("recompute");
    finish_direct(b.view, found, make(), options, stream);
  });
}

// The best of packed rows, and the tensor that they stand in.
struct OwnedKeys {
  at::Tensor keys;
  Keys view = {};

  OwnedKeys() = default;
  explicit OwnedKeys(const at::Tensor& x) : keys(at::empty({2, padded_rows(x.size(0))}, x.options().dtype(at::kLong))) {
    view.positive = reinterpret_cast<unsigned long long*>(keys.mutable_data_ptr<int64_t>());
    view.negative = view.positive + keys.size(1);
  }
};

// Searches the tiles of a batch and calls finish(what was found) while its memory is there. `centre`: float [D], or none to find one.
// With `both_sides` references are searched for as well.
template <class Finish>
void search_tiles(const OwnedBatch& b, bool by_wgmma, const OptionalTensor& centre, bool both_sides, void* stream, Finish finish) {
  const bool centred = b.view.storage == Storage::float32, self_form = b.view.self_form;
  TileMining m = {};
  m.by_wgmma = by_wgmma;
  m.single_pass = tf32_allowed(b.x);
  const int64_t depth = b.x.size(1), row_bytes = operand_row_bytes(b.view.storage, depth, m.single_pass);
  OwnedSet anchors = own_set(b.x, b.labels, row_bytes, stream);
  OwnedSet references = self_form ? anchors : own_set(b.ref, b.ref_labels, row_bytes, stream);
  m.anchors = anchors.view;
  m.references = references.view;
  const OwnedKeys anchor_keys(b.x), reference_keys = self_form ? anchor_keys : both_sides ? OwnedKeys(b.ref) : OwnedKeys();
  m.anchor_keys = anchor_keys.view;
  m.reference_keys = reference_keys.view;
  OwnedCentre own_centre;
  if (centred) m.centre = centre ? Centre{0, nullptr, centre->mutable_data_ptr<float>()} : own_centre.make(b);
  {
    const Stage stage("pack");
    pack_tiles(b.view, m, stream);
  }
  for (OwnedSet* set : {&anchors, &references}) {
    set->order.reset();
    set->sorted_labels.reset();
  }
  own_centre = {};
  {
    const Stage stage("tiles");
    mine_tiles(b.view, m, stream);
  }
  finish(m);
}

template <class Make>
void mine_and_finish_tiles(const OwnedBatch& b, bool by_wgmma, Make make, const LossOptions& options, void* stream) {
  search_tiles(b, by_wgmma, std::nullopt, false, stream, [&](const TileMining& mining) {
    const Stage stage("recompute");
    finish_tiles(b.view, mining, make(), options, stream);
  });
}

// make() allocates the results: only once what packing needs is no longer there.
template <class Make>
void mine_and_finish(const OwnedBatch& b, Make make, const LossOptions& options) {
  void* stream = current_stream(b.x);
  const int64_t anchors = b.x.size(0), references = b.ref.size(0);
  const bool empty = anchors == 0 || references == 0;
  if (b.view.distance == Distance::cosine || empty) row_norms(b.view, stream);
  if (empty) return finish_direct(b.view, {0, nullptr, nullptr}, make(), options, stream);  // nobody to choose
  const Mining mining = mining_for(b.x, b.ref);
  if (mining == Mining::direct) {
    mine_and_finish_direct(b, make, options, stream);
  } else {
    mine_and_finish_tiles(b, mining == Mining::wgmma, make, options, stream);
  }
}

std::tuple<at::Tensor, at::Tensor> batch_hard_mine(const at::Tensor& embeddings, const at::Tensor& labels,
                                                   const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                                   std::string_view distance) {
  constexpr const char* function = "batch_hard_mine";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, distance_from(function, distance));
  std::optional<MinedTriplets> mined;
  mine_and_finish(b, [&] { return mined.emplace(b).view; }, {0, false, Reduction::none});
  return {mined->positives, mined->negatives};
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
  std::optional<MinedTriplets> mined;
  mine_and_finish(b, [&] { return mined.emplace(b, options.reduction).view; }, options);
  return mined->result();
}

// What the op returns of one side.
struct SideExtremes {
  at::Tensor half_squares, indices;
  Extremes view = {};

  SideExtremes(const at::Tensor& x, int64_t rows)
      : half_squares(at::empty({2, rows}, x.options().dtype(compute_type(x.scalar_type())))),
        indices(at::empty({2, rows}, x.options().dtype(at::kInt))) {
    view.half_squares = half_squares.mutable_data_ptr();
    view.indices = indices.mutable_data_ptr<int32_t>();
  }
};

// Which way is taken does not depend on the block, so that a pair is worth the same in all: by tiles, but for float64, which has none,
// and where DEEPSIM_CUDA_MINING=direct.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_hard_extremes(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    const at::Tensor& center, std::string_view distance) {
  constexpr const char* function = "batch_hard_extremes";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  check_center(function, center, embeddings);
  const Distance d = distance_from(function, distance);
  const c10::DeviceGuard guard(embeddings.device());
  void* stream = current_stream(embeddings);
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  SideExtremes anchors(b.x, b.x.size(0)), references(b.x, ref_embeddings ? b.ref.size(0) : 0);
  // Of rows as tiles have them: 16-bit ones are not moved to the centre. 0 where nothing is subtracted from them.
  const at::Tensor half_norms = at::zeros({b.x.size(0)}, anchors.half_squares.options());

  // The batch as the references see it.
  Batch swapped = b.view;
  std::swap(swapped.anchors, swapped.references);
  std::swap(swapped.labels, swapped.reference_labels);
  std::swap(swapped.anchor_norm, swapped.reference_norm);
  const bool empty = b.x.size(0) == 0 || b.ref.size(0) == 0;
  if (d == Distance::cosine || empty) row_norms(b.view, stream);
  if (empty || b.view.storage == Storage::float64 || wanted_mining() == "direct") {
    const auto search = [&](const Batch& batch, const SideExtremes& side) {
      const auto finish = [&](const DirectFound& found) { extremes_of_direct(batch, found, side.view, stream); };
      empty ? finish({0, nullptr, nullptr}) : search_direct(b, batch, stream, finish);
    };
    search(b.view, anchors);
    if (ref_embeddings) search(swapped, references);
  } else {
    // A centre of cosine distance that is zero says that some row of all blocks has no direction.
    if (d == Distance::cosine) b.flags.select(0, offsetof(Flags, zero_row) / sizeof(int32_t)).bitwise_or_(center.eq(0).all());
    anchors.view.half_norms = half_norms.mutable_data_ptr<float>();
    search_tiles(b, tiles_by_wgmma(), center.to(at::kFloat).contiguous(), true, stream, [&](const TileMining& mining) {
      extremes_of_tiles(b.view, mining, false, anchors.view, stream);
      if (ref_embeddings) extremes_of_tiles(b.view, mining, true, references.view, stream);
    });
  }
  return {anchors.half_squares, anchors.indices, half_norms, references.half_squares, references.indices};
}

std::tuple<at::Tensor, at::Tensor> batch_hard_triplet_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& embeddings, const OptionalTensor& ref_embeddings, const at::Tensor& positives,
    const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an, double margin, bool soft, std::string_view distance,
    std::string_view reduction, bool with_ref_gradient) {
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
  const at::Tensor g = grad_loss.contiguous();
  at::Tensor choices = at::empty({2 * b.x.size(0)}, p.options());
  LossGradient view = {};
  view.batch = b.view;
  view.positives = p.const_data_ptr<int32_t>();
  view.negatives = q.const_data_ptr<int32_t>();
  view.d_ap = ap.const_data_ptr();
  view.d_an = an.const_data_ptr();
  view.grad_loss = g.const_data_ptr();
  view.choices = choices.mutable_data_ptr<int32_t>();
  lay_choices(view, options, stream);
  const auto [sorted_choices, order] = sorted<int32_t>(choices, stream);
  choices.reset();
  const at::Tensor first_choice = at::empty({b.ref.size(0) + 1}, p.options());
  const at::Tensor coefficients = at::empty({b.x.size(0)}, ap.options());
  view.sorted_choices = sorted_choices.const_data_ptr<int32_t>();
  view.choice_order = order.const_data_ptr<int64_t>();
  view.first_choice = first_choice.mutable_data_ptr<int32_t>();
  view.coefficients = coefficients.mutable_data_ptr();
  // Only now: sorting needs some memory of its own for a while.
  at::Tensor grad = at::empty(b.x.sizes(), b.x.options());
  const bool of_references = ref_embeddings && with_ref_gradient;
  at::Tensor grad_ref = at::empty({of_references ? b.ref.size(0) : 0, b.x.size(1)}, b.x.options());
  view.grad = grad.mutable_data_ptr();
  view.grad_references = of_references ? grad_ref.mutable_data_ptr() : nullptr;
  triplet_gradient(view, options, stream);
  return {grad, grad_ref};
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("batch_hard_mine", batch_hard_mine);
  m.impl("batch_hard_extremes", batch_hard_extremes);
  m.impl("batch_hard_triplet_loss", batch_hard_triplet_loss);
  m.impl("batch_hard_triplet_loss_backward", batch_hard_triplet_loss_backward);
}

}  // namespace deepsim::cuda
