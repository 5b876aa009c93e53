// From chosen rows to losses: exact distances of the chosen pairs, the reduced loss, and the gradient gathered row by row.
#pragma once

#include "key.cuh"
#include "loss_sum.cuh"
#include "mine_direct.cuh"
#include "row_gradient.cuh"

namespace deepsim::cuda {

// Blocks on a multiprocessor at least. A warp follows indices from one load to the next: only other warps hide its waiting.
template <class S>
constexpr int kFinishBlocks = sizeof(Compute<S>) == 4 ? 3 : 2;

// ---- what mining found ----

// By anchor, in parts that are to be put together.
template <class T>
struct DirectChoices {
  DirectFound found;
  int64_t anchors;

  __device__ __forceinline__ int64_t anchor(int64_t p) const { return p; }
  __device__ __forceinline__ int32_t positive(int64_t p) const { return best<true>(p, 0).index; }
  __device__ __forceinline__ int32_t negative(int64_t p) const { return best<false>(p, found.splits).index; }
  // By |a - b|^2 / 2.
  __device__ __forceinline__ Best<T, true> farthest(int64_t p) const { return halved(best<true>(p, 0)); }
  __device__ __forceinline__ Best<T, false> nearest(int64_t p) const { return halved(best<false>(p, found.splits)); }

 private:
  template <bool kLargest>
  __device__ __forceinline__ static Best<T, kLargest> halved(Best<T, kLargest> best) {
    best.value /= 2;
    return best;
  }
  template <bool kLargest>
  __device__ __forceinline__ Best<T, kLargest> best(int64_t p, int first) const {
    Best<T, kLargest> best;
    for (int s = first; s < first + found.splits; ++s) {
      best.improve(static_cast<const T*>(found.values)[s * anchors + p], found.indices[s * anchors + p]);
    }
    return best;
  }
};

// By packed position, as keys.
struct TileChoices {
  Keys keys;
  const int32_t* original;

  __device__ __forceinline__ int64_t anchor(int64_t p) const { return original[p]; }
  __device__ __forceinline__ int32_t positive(int64_t p) const { return index_of_key(keys.positive[p]); }
  __device__ __forceinline__ int32_t negative(int64_t p) const { return index_of_key(keys.negative[p]); }
  // By |a - b|^2 / 2.
  __device__ __forceinline__ Best<float, true> farthest(int64_t p) const {
    Best<float, true> best;
    if (keys.positive[p] != 0) best.improve(value_of_key(keys.positive[p]), positive(p));
    return best;
  }
  __device__ __forceinline__ Best<float, false> nearest(int64_t p) const {
    Best<float, false> best;
    if (keys.negative[p] != 0) best.improve(-value_of_key(keys.negative[p]), negative(p));
    return best;
  }
};

// ---- loss ----

// The loss of an anchor, 0 if it is not valid. Without finite embeddings every loss is NaN.
template <class T>
__device__ __forceinline__ T anchor_loss(const TripletLoss<T>& loss, int32_t positive, T d_ap, T d_an) {
  return positive >= 0 || d_ap != d_ap ? loss.value(d_ap, d_an) : T(0);
}

// One warp per anchor.
template <class S, class Choices>
__global__ void __launch_bounds__(kRowThreads, kFinishBlocks<S>)
    finish_kernel(Batch batch, Choices choices, Triplets out, LossOptions options) {
  using T = Compute<S>;
  const int64_t p = warp_index(), n = batch.anchors.count;
  const TripletLoss<T> loss{T(options.margin), options.soft};
  T *d_ap = static_cast<T*>(out.d_ap), *d_an = static_cast<T*>(out.d_an);
  const bool finite = batch.flags->not_finite == 0;
  LossPart part = {0, 0};
  if (p < n) {
    const int64_t a = choices.anchor(p);
    int32_t positive = finite ? choices.positive(p) : kNobody, negative = finite ? choices.negative(p) : kNobody;
    const bool valid = positive != kNobody && negative != kNobody;
    T ap = finite ? T(0) : not_a_number<T>(), an = ap;
    if (valid && d_ap) {
      const auto norm = [](const double* norms, int64_t i) { return norms ? norms[i] : 1.0; };
      double distances[2];
      distances_between<2, S>(row_of<S>(batch.anchors, a),
                              {row_of<S>(batch.references, positive), row_of<S>(batch.references, negative)}, batch.anchors.depth,
                              batch.distance, norm(batch.anchor_norm, a),
                              {norm(batch.reference_norm, positive), norm(batch.reference_norm, negative)}, distances);
      ap = T(distances[0]);
      an = T(distances[1]);
    }
    if (lane_index() == 0) {
      out.positives[a] = valid ? positive : -1;
      out.negatives[a] = valid ? negative : -1;
      if (d_ap) {
        d_ap[a] = ap;
        d_an[a] = an;
        const T l = anchor_loss(loss, valid ? positive : -1, ap, an);
        if (options.reduction == Reduction::none) static_cast<T*>(out.loss)[a] = l;
        part = {double(l), valid && (options.reduction == Reduction::mean || l > 0)};
      }
    }
  }
  if (!out.loss || options.reduction == Reduction::none) return;

  auto& shared = shared_memory<LossShared>();
  if (!sum_losses(part, out.parts, &batch.flags->finished, shared)) return;
  const auto [sum, count] = shared.part[0];
  const int64_t divisor = options.reduction == Reduction::sum || count == 0 ? 1 : count;
  // Also where there is no anchor at all: then the references alone may be not finite.
  *static_cast<T*>(out.loss) = finite ? T(sum / double(divisor)) : not_a_number<T>();
}

// ---- gradient ----

// Lays the choices end to end; counts the anchors that the sum of losses was divided by; and makes the gradient NaN where the distances
// are, or where indices that no forward pass has written would lead out of the matrix.
template <class T>
__global__ void lay_choices_kernel(LossGradient g, LossOptions options) {
  const int64_t a = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool inside = a < g.batch.anchors.count;
  bool counts = false;
  if (inside) {
    const int32_t positive = g.positives[a], negative = g.negatives[a];
    g.choices[a] = positive;
    g.choices[g.batch.anchors.count + a] = negative;
    const T d_ap = static_cast<const T*>(g.d_ap)[a], d_an = static_cast<const T*>(g.d_an)[a];
    const auto chosen = [&](int32_t index) { return index >= 0 && index < g.batch.references.count; };
    const bool valid = chosen(positive) && chosen(negative);
    if (d_ap != d_ap || !(valid || (positive == -1 && negative == -1))) atomicOr(&g.batch.flags->not_finite, 1);
    const TripletLoss<T> loss{T(options.margin), options.soft};
    counts = valid && (options.reduction != Reduction::mean_nonzero || loss.value(d_ap, d_an) > 0);
  }
  const unsigned counted = __ballot_sync(kAllLanes, counts);
  if (lane_index() == 0 && counted != 0) atomicAdd(&g.batch.flags->counted, uint32_t(__popc(counted)));
}

// What every row needs to know of the anchors: where the choices of each row begin, and what each anchor's triplet weighs:
// dL / d(d_ap), which is -dL / d(d_an); 0 where it is not valid.
template <class T>
__global__ void prepare_kernel(LossGradient g, LossOptions options) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, anchors = g.batch.anchors.count;
  if (i < anchors) {
    const bool divided = options.reduction == Reduction::mean || options.reduction == Reduction::mean_nonzero;
    const uint32_t counted = g.batch.flags->counted;
    const T scale = divided && counted > 0 ? 1 / T(counted) : T(1);
    const TripletLoss<T> loss{T(options.margin), options.soft};
    const T incoming = static_cast<const T*>(g.grad_loss)[options.reduction == Reduction::none ? i : 0];
    const T slope = loss.derivative(static_cast<const T*>(g.d_ap)[i], static_cast<const T*>(g.d_an)[i]);
    static_cast<T*>(g.coefficients)[i] = g.positives[i] < 0 ? T(0) : incoming * scale * slope;
  }
  if (i <= g.batch.references.count) {
    g.first_choice[i] = count_before(g.sorted_choices, int(2 * anchors), [&](int32_t choice) { return choice < i; });
  }
}

// What anchor a's own triplet contributes to its row.
template <class S>
__device__ __forceinline__ void add_own_triplet(RowGradient<S>& row, const LossGradient& g, int64_t a) {
  using T = Compute<S>;
  const T c = static_cast<const T*>(g.coefficients)[a];
  const T d_ap = static_cast<const T*>(g.d_ap)[a], d_an = static_cast<const T*>(g.d_an)[a];
  const int32_t positive = g.positives[a], negative = g.negatives[a];
  if (c == 0) return;
  const Batch& b = g.batch;
  const typename RowGradient<S>::Other others[2] = {row.read(b.references, b.reference_norm, positive),
                                                    row.read(b.references, b.reference_norm, negative)};
  row.add(others[0], d_ap, c);
  row.add(others[1], d_an, -c);
}

// Choice u of those in ascending order: the anchor, how far the chosen row is from it, and what that pulls.
template <class T>
__device__ __forceinline__ PullingPair<T> choice_at(const LossGradient& g, uint32_t u) {
  const uint32_t entry = uint32_t(g.choice_order[u]), anchors = uint32_t(g.batch.anchors.count);
  const bool as_negative = entry >= anchors;
  const uint32_t anchor = as_negative ? entry - anchors : entry;
  const T coefficient = static_cast<const T*>(g.coefficients)[anchor];
  return {int32_t(anchor), static_cast<const T*>(as_negative ? g.d_an : g.d_ap)[anchor], as_negative ? -coefficient : coefficient};
}

// One warp per row and run of kGradientColumns columns: what its own triplet and those who chose it contribute.
template <class S, bool kOwn, bool kChosen>
__global__ void __launch_bounds__(kRowThreads, kGradientBlocks<S>)
    gradient_kernel(LossGradient g, void* grad, int64_t rows) {
  using T = Compute<S>;
  auto& shared = shared_memory<GradientShared>();
  const Rows& of = kOwn ? g.batch.anchors : g.batch.references;
  const double* norms = kOwn ? g.batch.anchor_norm : g.batch.reference_norm;
  const GradientPart part(rows);
  const int64_t i = part.row();
  const bool finite = g.batch.flags->not_finite == 0;
  RowGradient<S> own(g.batch, part.first_column);

  uint32_t begin = 0, end = 0;
  if (i < rows && finite) {
    if (kChosen) {
      begin = g.first_choice[i];
      end = g.first_choice[i + 1];
    }
    own.take(of, norms, i);
    if (kOwn) add_own_triplet(own, g, i);
  }
  if (kChosen) {
    add_pairs_of_block(shared, own, part, of, norms, begin, end, g.batch.anchors, g.batch.anchor_norm,
                       [&](uint32_t u) { return choice_at<T>(g, u); });
  }
  if (i >= rows) return;
  own.store([&](int64_t k, T v) { narrow(finite ? v : not_a_number<T>(), static_cast<S*>(grad)[i * g.batch.anchors.depth + k]); });
}

}  // namespace deepsim::cuda
