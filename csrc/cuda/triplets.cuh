// From chosen rows to losses: exact distances of the chosen pairs, the reduced loss, and the gradient gathered row by row.
#pragma once

#include "key.cuh"
#include "loss_sum.cuh"
#include "mine_direct.cuh"
#include "rows.cuh"

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

// The gradient of one row, kGradientRun elements to a lane.
constexpr int kGradientRun = 4;
constexpr int kGradientColumns = kWarp * kGradientRun;

template <class S>
struct RowGradient {
  using T = Compute<S>;

  const LossGradient& g;
  int64_t column;  // this lane's first; the others follow at a distance of kWarp
  T row[kGradientRun] = {};
  double norm = 0;  // of the row; for cosine only
  T sum[kGradientRun] = {};

  __device__ __forceinline__ RowGradient(const LossGradient& gradient, int64_t first_column)
      : g(gradient), column(first_column + lane_index()) {}

  __device__ __forceinline__ T element(const S* x, int e) const {
    const int64_t k = column + e * kWarp;
    return k < g.batch.anchors.depth ? T(widen(x[k])) : T(0);
  }

  __device__ __forceinline__ void take(const Rows& rows, const double* norms, int64_t i) {
    for (int e = 0; e < kGradientRun; ++e) row[e] = element(row_of<S>(rows, i), e);
    norm = norms ? norms[i] : 0;
  }

  // This lane's elements of another row. Rows that are wanted one after the other are best read together: a warp waits for what it reads.
  struct Other {
    int32_t index;
    T element[kGradientRun];
  };
  __device__ __forceinline__ Other read(const Rows& rows, int32_t i) const {
    Other other{i, {}};
    for (int e = 0; e < kGradientRun; ++e) other.element[e] = element(row_of<S>(rows, i), e);
    return other;
  }

  // sum += coefficient * (derivative of d(row, other) by row).
  __device__ __forceinline__ void add(const Other& other, const double* norms, T d, T coefficient) {
    if (g.batch.distance == Distance::cosine) {
      // (cos * u/|u| - other/|other|) / |u|, 0 for a zero row; cos = 1 - d.
      if (norm == 0) return;
      const double on_row = double(coefficient) * (1 - double(d)) / norm / norm;
      const double other_norm = norms[other.index];
      const double on_other = other_norm == 0 ? 0 : double(coefficient) / norm / other_norm;
      for (int e = 0; e < kGradientRun; ++e) sum[e] += T(on_row * double(row[e]) - on_other * double(other.element[e]));
      return;
    }
    const T factor = euclidean_factor(g.batch.distance, d, coefficient);
    if (factor == 0) return;
    for (int e = 0; e < kGradientRun; ++e) sum[e] += factor * (row[e] - other.element[e]);
  }

  // What anchor a's own triplet contributes to its row.
  __device__ __forceinline__ void add_own(int64_t a) {
    const T c = static_cast<const T*>(g.coefficients)[a];
    const T d_ap = static_cast<const T*>(g.d_ap)[a], d_an = static_cast<const T*>(g.d_an)[a];
    const int32_t positive = g.positives[a], negative = g.negatives[a];
    if (c == 0) return;
    const Other others[2] = {read(g.batch.references, positive), read(g.batch.references, negative)};
    add(others[0], g.batch.reference_norm, d_ap, c);
    add(others[1], g.batch.reference_norm, d_an, -c);
  }

  // What those contribute who chose the row: choices begin, begin + step, ... before end. Lanes look one up each, so that rows are all
  // that is waited for one after another, and two of them at once.
  __device__ __forceinline__ void add_choices(uint32_t begin, uint32_t end, uint32_t step) {
    const uint32_t anchors = uint32_t(g.batch.anchors.count);
    for (uint32_t first = begin; first < end; first += kWarp * step) {
      const uint32_t own = first + uint32_t(lane_index()) * step, left = (end - first + step - 1) / step;
      uint32_t anchor = 0;
      T d = 0, coefficient = 0;
      if (own < end) {
        const uint32_t entry = uint32_t(g.choice_order[own]);
        const bool as_negative = entry >= anchors;
        anchor = as_negative ? entry - anchors : entry;
        d = static_cast<const T*>(as_negative ? g.d_an : g.d_ap)[anchor];
        coefficient = static_cast<const T*>(g.coefficients)[anchor];
        if (as_negative) coefficient = -coefficient;
      }
      for (uint32_t l = 0; l < kWarp && l < left; l += 2) {
        Other others[2] = {};
        T c[2];
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int32_t a = __shfl_sync(kAllLanes, int32_t(anchor), l + o);
          c[o] = __shfl_sync(kAllLanes, coefficient, l + o);
          if (c[o] != 0) others[o] = read(g.batch.anchors, a);
        }
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const T d_of_a = __shfl_sync(kAllLanes, d, l + o);
          if (c[o] != 0) add(others[o], g.batch.anchor_norm, d_of_a, c[o]);
        }
      }
    }
  }
};

struct GradientShared {
  uint32_t begin[kRowWarps], end[kRowWarps];
  double partial[kRowWarps][kGradientColumns];
};

// Rows chosen more often than this are added up by the whole block.
constexpr uint32_t kManyChoices = 64;

// Blocks on a multiprocessor at least: warps wait for rows, and only others hide that.
template <class S>
constexpr int kGradientBlocks = sizeof(Compute<S>) == 4 ? 3 : 2;

// One warp per row and run of kGradientColumns columns: what its own triplet and those who chose it contribute.
template <class S, bool kOwn, bool kChosen>
__global__ void __launch_bounds__(kRowThreads, kGradientBlocks<S>)
    gradient_kernel(LossGradient g, void* grad, int64_t rows) {
  using T = Compute<S>;
  auto& shared = shared_memory<GradientShared>();
  const Rows& of = kOwn ? g.batch.anchors : g.batch.references;
  const double* norms = kOwn ? g.batch.anchor_norm : g.batch.reference_norm;
  const int64_t row_blocks = (rows + kRowWarps - 1) / kRowWarps, depth = g.batch.anchors.depth;
  const int64_t first_row = blockIdx.x % row_blocks * kRowWarps;
  const int64_t first_column = blockIdx.x / row_blocks * kGradientColumns;
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t i = first_row + warp;
  const bool finite = g.batch.flags->not_finite == 0;
  RowGradient<S> own(g, first_column);

  uint32_t begin = 0, end = 0;
  if (i < rows && finite) {
    if (kChosen) {
      begin = g.first_choice[i];
      end = g.first_choice[i + 1];
    }
    own.take(of, norms, i);
    if (kOwn) own.add_own(i);
    if (kChosen && end - begin <= kManyChoices) own.add_choices(begin, end, 1);
  }
  if (kChosen) {
    if (lane_index() == 0) {
      shared.begin[warp] = begin;
      shared.end[warp] = end;
    }
    __syncthreads();
    for (int w = 0; w < kRowWarps; ++w) {
      if (shared.end[w] - shared.begin[w] <= kManyChoices) continue;  // the same for the whole block
      RowGradient<S> part(g, first_column);
      part.take(of, norms, first_row + w);
      part.add_choices(shared.begin[w] + warp, shared.end[w], kRowWarps);
      for (int e = 0; e < kGradientRun; ++e) shared.partial[warp][e * kWarp + lane_index()] = double(part.sum[e]);
      __syncthreads();
      if (warp == w) {
        for (int e = 0; e < kGradientRun; ++e) {
          double sum = 0;
          for (int from = 0; from < kRowWarps; ++from) sum += shared.partial[from][e * kWarp + lane_index()];
          own.sum[e] += T(sum);
        }
      }
      __syncthreads();
    }
  }
  if (i >= rows) return;
  S* out = static_cast<S*>(grad) + i * depth;
  for (int e = 0; e < kGradientRun; ++e) {
    const int64_t k = first_column + lane_index() + e * kWarp;
    if (k < depth) narrow(finite ? own.sum[e] : not_a_number<T>(), out[k]);
  }
}

}  // namespace deepsim::cuda
