// The triplet loss of one triplet an anchor on the CPU, batch-hard or by other strategies: mine, measure the chosen pairs, gather the
// gradient.
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../batch_hard.h"
#include "../common/stage.h"
#include "../common/triplet_loss.h"
#include "capability.h"
#include "huge_pages.h"
#include "mined.h"
#include "rows.h"

namespace deepsim::cpu {
namespace {

// loss, d_ap, d_an, positives, negatives
using LossResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The number of anchors that the sum of losses is divided by.
template <class T>
T divisor(Reduction reduction, const TripletLoss<T>& loss, const int32_t* positives, const T* d_ap, const T* d_an, int64_t n) {
  if (reduction == Reduction::sum || reduction == Reduction::none) return T(1);
  int64_t count = 0;
  for (int64_t a = 0; a < n; ++a)
    count += positives[a] >= 0 && (reduction == Reduction::mean || loss.value(d_ap[a], d_an[a]) > 0);
  return T(std::max<int64_t>(1, count));
}

template <class T>
LossResult batch_hard_forward(const Kernels<T>& kernels, const at::Tensor& x, const OptionalTensor& ref, const Mined& mined,
                              const TripletLoss<T>& loss, Distance distance, Reduction reduction) {
  const Stage stage("recompute");
  const int64_t n = x.size(0);
  const auto options = x.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor d_ap = at::empty({n}, options), d_an = at::empty({n}, options);
  T *ap = d_ap.mutable_data_ptr<T>(), *an = d_an.mutable_data_ptr<T>();
  const int32_t *positives = mined.positives.const_data_ptr<int32_t>(), *negatives = mined.negatives.const_data_ptr<int32_t>();
  if (mined.finite) {
    at::parallel_for(0, n, row_grain(x.size(1)), [&](int64_t begin, int64_t end) {
      kernels.triplet_distances(rows_of(x), rows_of(ref ? *ref : x), positives, negatives, distance, begin, end, ap, an);
    });
  } else {
    d_ap.fill_(std::numeric_limits<double>::quiet_NaN());
    d_an.fill_(std::numeric_limits<double>::quiet_NaN());
  }

  const auto anchor_loss = [&](int64_t a) { return positives[a] >= 0 || !mined.finite ? loss.value(ap[a], an[a]) : T(0); };
  at::Tensor result;
  if (reduction == Reduction::none) {
    result = at::empty({n}, options);
    T* out = result.mutable_data_ptr<T>();
    for (int64_t a = 0; a < n; ++a) out[a] = anchor_loss(a);
  } else {
    double sum = mined.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
    for (int64_t a = 0; a < n; ++a) sum += anchor_loss(a);
    result = at::empty({}, options);
    *result.mutable_data_ptr<T>() = T(sum / divisor(reduction, loss, positives, ap, an, n));
  }
  return {result, d_ap, d_an, mined.positives, mined.negatives};
}

// mine(x, labels, ref, ref_labels, distance) -> Mined
template <class Mine>
LossResult triplet_loss(const char* function, Mine mine, const at::Tensor& embeddings, const at::Tensor& labels,
                        const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels, double margin, bool soft,
                        std::string_view distance, std::string_view reduction) {
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const Reduction r = reduction_from(function, reduction);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  const Mined mined = mine(x, labels, ref, ref_labels, d);
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    return batch_hard_forward<T>(kernels, x, ref, mined, {T(margin), soft}, d, r);
  });
}

LossResult batch_hard_triplet_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                                   const OptionalTensor& ref_labels, double margin, bool soft, std::string_view distance,
                                   std::string_view reduction) {
  return triplet_loss("batch_hard_triplet_loss", mine_batch_hard, embeddings, labels, ref_embeddings, ref_labels, margin, soft,
                      distance, reduction);
}

LossResult mined_triplet_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                              const OptionalTensor& ref_labels, std::string_view positive, std::string_view negative, double margin,
                              bool soft, std::string_view distance, std::string_view reduction) {
  constexpr const char* function = "mined_triplet_loss";
  const Strategies strategies = strategies_from(function, positive, negative);
  const auto mine = [strategies](const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                                 const OptionalTensor& ref_labels, Distance distance) {
    return mine_triplets(x, labels, ref, ref_labels, strategies, distance);
  };
  return triplet_loss(function, mine, embeddings, labels, ref_embeddings, ref_labels, margin, soft, distance, reduction);
}

// Who chose each reference row, in ascending order of the anchors.
struct Uses {
  std::vector<int64_t> begin;
  std::vector<int32_t> uses;
};

Uses uses_of(const int32_t* positives, const int32_t* negatives, int64_t anchors, int64_t references) {
  Uses u{std::vector<int64_t>(references + 1, 0), {}};
  const auto checked = [&](int32_t index) {
    TORCH_CHECK_INDEX(index >= 0 && index < references, "batch_hard_triplet_loss_backward: positives and negatives must be in [0, ",
                      references, ") or both -1, got ", index);
    return index;
  };
  for (int64_t a = 0; a < anchors; ++a) {
    if (positives[a] == -1 && negatives[a] == -1) continue;
    ++u.begin[checked(positives[a]) + 1];
    ++u.begin[checked(negatives[a]) + 1];
  }
  for (int64_t j = 0; j < references; ++j) u.begin[j + 1] += u.begin[j];
  u.uses.resize(u.begin[references]);
  std::vector<int64_t> next(u.begin.begin(), u.begin.end() - 1);
  for (int64_t a = 0; a < anchors; ++a) {
    if (positives[a] < 0) continue;
    u.uses[next[positives[a]]++] = int32_t(2 * a);
    u.uses[next[negatives[a]]++] = int32_t(2 * a + 1);
  }
  return u;
}

template <class T>
std::tuple<at::Tensor, at::Tensor> batch_hard_backward(const Kernels<T>& kernels, const at::Tensor& grad_loss, const at::Tensor& x,
                                                       const OptionalTensor& ref, const at::Tensor& positives,
                                                       const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an,
                                                       const TripletLoss<T>& loss, Distance distance, Reduction reduction,
                                                       bool with_ref_gradient) {
  const Stage stage("backward");
  const int64_t n = x.size(0), depth = x.size(1);
  const int32_t *p = positives.const_data_ptr<int32_t>(), *q = negatives.const_data_ptr<int32_t>();
  const T *ap = d_ap.const_data_ptr<T>(), *an = d_an.const_data_ptr<T>(), *g = grad_loss.const_data_ptr<T>();
  const Uses uses = uses_of(p, q, n, ref ? ref->size(0) : n);

  at::Tensor grad = in_huge_pages(at::empty({n, depth}, x.options()));
  at::Tensor grad_ref = in_huge_pages(at::empty({ref && with_ref_gradient ? ref->size(0) : 0, depth}, x.options()));
  if (std::any_of(ap, ap + n, [](T d) { return std::isnan(d); })) {
    grad.fill_(std::numeric_limits<double>::quiet_NaN());
    grad_ref.fill_(std::numeric_limits<double>::quiet_NaN());
    return {grad, grad_ref};
  }

  std::vector<T> coefficient(n);
  const T scale = 1 / divisor(reduction, loss, p, ap, an, n);
  for (int64_t a = 0; a < n; ++a)
    if (p[a] >= 0) coefficient[a] = g[reduction == Reduction::none ? a : 0] * scale * loss.derivative(ap[a], an[a]);

  const Rows anchors = rows_of(x), references = ref ? rows_of(*ref) : anchors;
  std::vector<double> anchor_scale, reference_scale;
  if (distance == Distance::cosine) {
    anchor_scale = inverse(norms(kernels, anchors));
    if (ref) reference_scale = inverse(norms(kernels, references));
  }
  const double* anchor_scales = anchor_scale.empty() ? nullptr : anchor_scale.data();
  const TripletGradient<T> gradient{anchors,       references, p, q, ap, an, coefficient.data(), anchor_scales,
                                    ref ? (reference_scale.empty() ? nullptr : reference_scale.data()) : anchor_scales,
                                    uses.begin.data(), uses.uses.data(), distance};
  const auto run = [&](auto kernel, at::Tensor& out) {
    void* data = out.mutable_data_ptr();
    at::parallel_for(0, out.size(0), row_grain(depth), [&](int64_t begin, int64_t end) {
      std::vector<T> row(depth);
      kernel(gradient, begin, end, row.data(), data);
    });
  };
  if (ref) {
    run(kernels.anchor_gradient, grad);
    run(kernels.reference_gradient, grad_ref);  // no rows: not wanted
  } else {
    run(kernels.self_gradient, grad);
  }
  return {grad, grad_ref};
}

std::tuple<at::Tensor, at::Tensor> batch_hard_triplet_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& embeddings, const OptionalTensor& ref_embeddings, const at::Tensor& positives,
    const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an, double margin, bool soft, std::string_view distance,
    std::string_view reduction, bool with_ref_gradient) {
  constexpr const char* function = "batch_hard_triplet_loss_backward";
  const Distance d = distance_from(function, distance);
  const Reduction r = reduction_from(function, reduction);
  check_backward(grad_loss, embeddings, ref_embeddings, positives, negatives, d_ap, d_an, r);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    return batch_hard_backward<T>(kernels, grad_loss.contiguous(), x, ref, positives.contiguous(), negatives.contiguous(),
                            d_ap.contiguous(), d_an.contiguous(), {T(margin), soft}, d, r, with_ref_gradient);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("batch_hard_triplet_loss", batch_hard_triplet_loss);
  m.impl("batch_hard_triplet_loss_backward", batch_hard_triplet_loss_backward);
  m.impl("mined_triplet_loss", mined_triplet_loss);
}

}  // namespace deepsim::cpu
