#include "batch_hard.h"

#include <torch/library.h>

#include <cmath>

#include "common/checks.h"

namespace deepsim {

Distance distance_from(const char* function, std::string_view name) {
  if (name == "euclidean") return Distance::euclidean;
  if (name == "sqeuclidean") return Distance::sqeuclidean;
  if (name == "cosine") return Distance::cosine;
  TORCH_CHECK_VALUE(false, function, ": distance must be one of 'euclidean', 'sqeuclidean', 'cosine', got '", name, "'");
}

Reduction reduction_from(const char* function, std::string_view name) {
  if (name == "mean") return Reduction::mean;
  if (name == "mean_nonzero") return Reduction::mean_nonzero;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  TORCH_CHECK_VALUE(false, function, ": reduction must be one of 'mean', 'mean_nonzero', 'sum', 'none', got '", name, "'");
}

// Rows are numbered in int32, and the gradient keeps two uses of each.
constexpr int64_t kMostRows = int64_t(1) << 30;

void check_rows(const char* function, const char* argument, const at::Tensor& x) {
  check_floating(function, argument, x, 2);
  TORCH_CHECK_VALUE(x.size(1) >= 1, function, ": ", argument, " must have at least one column, got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.size(0) < kMostRows, function, ": ", argument, " must have fewer than 2^30 rows, got ", x.size(0));
}

namespace {

void check_set(const char* function, const char* embeddings_name, const char* labels_name, const at::Tensor& embeddings,
               const at::Tensor& labels) {
  check_rows(function, embeddings_name, embeddings);
  check_like(function, labels_name, labels, at::kLong, embeddings.device(), {embeddings.size(0)});
}

}  // namespace

void check_batch(const char* function, const at::Tensor& embeddings, const at::Tensor& labels,
                 const std::optional<at::Tensor>& ref_embeddings, const std::optional<at::Tensor>& ref_labels) {
  check_set(function, "embeddings", "labels", embeddings, labels);
  TORCH_CHECK_VALUE(ref_embeddings.has_value() == ref_labels.has_value(), function,
                    ": ref_embeddings and ref_labels must be given together");
  if (!ref_embeddings) return;
  check_set(function, "ref_embeddings", "ref_labels", *ref_embeddings, *ref_labels);
  check_like(function, "ref_embeddings", *ref_embeddings, embeddings.scalar_type(), embeddings.device(),
             {ref_embeddings->size(0), embeddings.size(1)});
}

void check_center(const char* function, const at::Tensor& center, const at::Tensor& embeddings) {
  check_like(function, "center", center, at::kDouble, embeddings.device(), {embeddings.size(1)});
}

void check_backward(const at::Tensor& grad_loss, const at::Tensor& embeddings, const std::optional<at::Tensor>& ref_embeddings,
                    const at::Tensor& positives, const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an,
                    Reduction reduction) {
  constexpr const char* function = "batch_hard_triplet_loss_backward";
  check_rows(function, "embeddings", embeddings);
  const at::Device device = embeddings.device();
  if (ref_embeddings) {
    check_rows(function, "ref_embeddings", *ref_embeddings);
    check_like(function, "ref_embeddings", *ref_embeddings, embeddings.scalar_type(), device,
               {ref_embeddings->size(0), embeddings.size(1)});
  }
  const int64_t anchors = embeddings.size(0);
  const at::ScalarType type = compute_type(embeddings.scalar_type());
  check_like(function, "positives", positives, at::kInt, device, {anchors});
  check_like(function, "negatives", negatives, at::kInt, device, {anchors});
  check_like(function, "d_ap", d_ap, type, device, {anchors});
  check_like(function, "d_an", d_an, type, device, {anchors});
  if (reduction == Reduction::none) {
    check_like(function, "grad_loss", grad_loss, type, device, {anchors});
  } else {
    check_like(function, "grad_loss", grad_loss, type, device, {});
  }
}

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Per anchor the row of its hardest positive and negative, int32; both -1 where it lacks either.
  m.def(
      "batch_hard_mine(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, str distance)"
      " -> (Tensor positives, Tensor negatives)");
  // Of every row, and of every row of a reference set among the embeddings: the largest |a - b|^2 / 2 to a positive and the smallest to
  // a negative, [2, N] as tiles of distances between rows less `center` have them (cosine distance: 1 - cos), and the rows they are
  // to, int32. Where there is none -inf (inf) and -1; with a NaN or inf in the embeddings NaN and -1. And half the squared norms
  // that tiles subtract from, which tell what digits are lost (common/choose_again.h): of rows less `center`, on CUDA of 16-bit rows as
  // they are; 0 where distances are sums of differences.
  m.def(
      "batch_hard_extremes(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, Tensor center, str distance)"
      " -> (Tensor half_squares, Tensor indices, Tensor half_norms, Tensor ref_half_squares, Tensor ref_indices)");
  m.def(
      "batch_hard_triplet_loss(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, float margin,"
      " bool soft, str distance, str reduction)"
      " -> (Tensor loss, Tensor d_ap, Tensor d_an, Tensor positives, Tensor negatives)");
  // grad_ref_embeddings has no rows where with_ref_gradient is false, and where ref_embeddings is None: grad_embeddings then holds both
  // parts.
  m.def(
      "batch_hard_triplet_loss_backward(Tensor grad_loss, Tensor embeddings, Tensor? ref_embeddings, Tensor positives,"
      " Tensor negatives, Tensor d_ap, Tensor d_an, float margin, bool soft, str distance, str reduction, bool with_ref_gradient)"
      " -> (Tensor grad_embeddings, Tensor grad_ref_embeddings)");
}

}  // namespace deepsim
