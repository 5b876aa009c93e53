// From chosen rows to losses: exact distances of the chosen pairs, the reduced loss, and the gradient gathered row by row.
#pragma once

#include "key.cuh"
#include "mine_direct.cuh"
#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;

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
  __device__ __forceinline__ int32_t positive(int64_t p) const { return best<true>(p, 0); }
  __device__ __forceinline__ int32_t negative(int64_t p) const { return best<false>(p, found.splits); }

 private:
  template <bool kLargest>
  __device__ __forceinline__ int32_t best(int64_t p, int first) const {
    Best<T, kLargest> best;
    for (int s = first; s < first + found.splits; ++s) {
      best.improve(static_cast<const T*>(found.values)[s * anchors + p], found.indices[s * anchors + p]);
    }
    return best.index;
  }
};

// By packed position, as keys.
struct TileChoices {
  const unsigned long long *positives, *negatives;
  const int32_t* original;

  __device__ __forceinline__ int64_t anchor(int64_t p) const { return original[p]; }
  __device__ __forceinline__ int32_t positive(int64_t p) const { return index_of_key(positives[p]); }
  __device__ __forceinline__ int32_t negative(int64_t p) const { return index_of_key(negatives[p]); }
};

// ---- loss ----

struct LossShared {
  LossPart part[kRowThreads];
  bool last;
};

// The loss of an anchor, 0 if it is not valid. Without finite embeddings every loss is NaN.
template <class T>
__device__ __forceinline__ T anchor_loss(const TripletLoss<T>& loss, int32_t positive, T d_ap, T d_an) {
  return positive >= 0 || d_ap != d_ap ? loss.value(d_ap, d_an) : T(0);
}

// One warp per anchor. Each block adds up its losses, and the block that is last to finish the sums of all, in an order that depends
// on their number only.
template <class S, class Choices>
__global__ void __launch_bounds__(kRowThreads, kFinishBlocks<S>) finish_kernel(Batch batch, Choices choices, Triplets out, LossOptions options) {
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
      const auto distance = [&](int32_t other) {
        const double norm = batch.anchor_norm ? batch.anchor_norm[a] : 1.0;
        const double other_norm = batch.reference_norm ? batch.reference_norm[other] : 1.0;
        return T(distance_between(row_of<S>(batch.anchors, a), row_of<S>(batch.references, other), batch.anchors.depth,
                                  batch.distance, norm, other_norm));
      };
      ap = distance(positive);
      an = distance(negative);
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
  if (lane_index() == 0) shared.part[threadIdx.x / kWarp] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kRowWarps; ++w) {
      part.sum += shared.part[w].sum;
      part.count += shared.part[w].count;
    }
    out.parts[blockIdx.x] = part;
    __threadfence();  // is seen by whoever sees the ticket
    shared.last = atomicAdd(&batch.flags->finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  part = {0, 0};
#pragma unroll 4  // loads that wait for nothing
  for (int64_t k = threadIdx.x; k < gridDim.x; k += kRowThreads) {
    part.sum += out.parts[k].sum;
    part.count += out.parts[k].count;
  }
  shared.part[threadIdx.x] = part;
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      shared.part[threadIdx.x].sum += shared.part[threadIdx.x + half].sum;
      shared.part[threadIdx.x].count += shared.part[threadIdx.x + half].count;
    }
  }
  if (threadIdx.x != 0) return;
  const auto [sum, count] = shared.part[0];
  const int64_t divisor = options.reduction == Reduction::sum || count == 0 ? 1 : count;
  // Also where there is no anchor at all: then the references alone may be not finite.
  *static_cast<T*>(out.loss) = finite ? T(sum / double(divisor)) : not_a_number<T>();
}

// ---- gradient ----

// Counts the anchors that the sum of losses was divided by; and makes the gradient NaN where the distances are, or where indices
// that no forward pass has written would lead out of the matrix.
template <class T>
__global__ void count_kernel(LossGradient g, LossOptions options) {
  const int64_t a = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool inside = a < g.batch.anchors.count;
  bool counts = false;
  if (inside) {
    const int32_t positive = g.positives[a], negative = g.negatives[a];
    const T d_ap = static_cast<const T*>(g.d_ap)[a], d_an = static_cast<const T*>(g.d_an)[a];
    const auto chosen = [&](int32_t index) { return index >= 0 && index < g.batch.references.count; };
    const bool valid = chosen(positive) && chosen(negative);
    if (d_ap != d_ap || !(valid || (positive == -1 && negative == -1))) atomicOr(&g.batch.flags->not_finite, 1);
    const TripletLoss<T> loss{T(options.margin), options.soft};
    counts = valid && (options.reduction != Reduction::mean_nonzero || loss.value(d_ap, d_an) > 0);
  }
  const unsigned counted = __ballot_sync(kAllLanes, counts);
  if (lane_index() == 0 && counted != 0) atomicAdd(g.count, (unsigned long long)__popc(counted));
}

// The gradient of one row, kGradientRun elements to a lane.
constexpr int kGradientRun = 4;
constexpr int kGradientColumns = kWarp * kGradientRun;

template <class S>
struct RowGradient {
  using T = Compute<S>;

  const LossGradient& g;
  TripletLoss<T> loss;
  Reduction reduction;
  T scale;         // 1 / the number of anchors counted
  int64_t column;  // this lane's first; the others follow at a distance of kWarp
  T sum[kGradientRun] = {};

  // dL / d(d_ap) of anchor a, which is -dL / d(d_an); 0 where it is not valid.
  __device__ __forceinline__ T coefficient(int64_t a) const {
    if (g.positives[a] < 0) return T(0);
    const T incoming = static_cast<const T*>(g.grad_loss)[reduction == Reduction::none ? a : 0];
    return incoming * scale * loss.derivative(static_cast<const T*>(g.d_ap)[a], static_cast<const T*>(g.d_an)[a]);
  }

  // sum += coefficient * (derivative of d(u, other) by u). Norms are read for cosine only.
  __device__ __forceinline__ void add(const S* u, const S* other, T d, T coefficient, double u_norm, double other_norm) {
    const int64_t depth = g.batch.anchors.depth;
    if (g.batch.distance == Distance::cosine) {
      // (cos * u/|u| - other/|other|) / |u|, 0 for a zero row; cos = 1 - d.
      if (u_norm == 0) return;
      const double on_u = double(coefficient) * (1 - double(d)) / u_norm / u_norm;
      const double on_other = other_norm == 0 ? 0 : double(coefficient) / u_norm / other_norm;
      for (int i = 0; i < kGradientRun; ++i) {
        const int64_t k = column + i * kWarp;
        if (k < depth) sum[i] += T(on_u * double(widen(u[k])) - on_other * double(widen(other[k])));
      }
      return;
    }
    // Euclidean: (u - other) / d, taken as 0 at d = 0.
    const T factor = g.batch.distance == Distance::sqeuclidean ? 2 * coefficient : d > 0 ? coefficient / d : d == 0 ? T(0) : d;
    if (factor == 0) return;
    for (int i = 0; i < kGradientRun; ++i) {
      const int64_t k = column + i * kWarp;
      if (k < depth) sum[i] += factor * (T(widen(u[k])) - T(widen(other[k])));
    }
  }

  __device__ __forceinline__ double anchor_norm(int64_t a) const {
    return g.batch.anchor_norm ? g.batch.anchor_norm[a] : 0.0;
  }
  __device__ __forceinline__ double reference_norm(int64_t j) const {
    return g.batch.reference_norm ? g.batch.reference_norm[j] : 0.0;
  }

  // What anchor a's own triplet contributes to its row.
  __device__ __forceinline__ void add_own(int64_t a) {
    const T c = coefficient(a);
    if (c == 0) return;
    const S* u = row_of<S>(g.batch.anchors, a);
    const auto one = [&](int32_t other, T d, T c) {
      add(u, row_of<S>(g.batch.references, other), d, c, anchor_norm(a), reference_norm(other));
    };
    one(g.positives[a], static_cast<const T*>(g.d_ap)[a], c);
    one(g.negatives[a], static_cast<const T*>(g.d_an)[a], -c);
  }

  // What anchor a contributes to reference row j, which it chose.
  __device__ __forceinline__ void add_use(int64_t j, int64_t a, bool as_negative) {
    const T c = coefficient(a);
    if (c == 0) return;
    const T d = static_cast<const T*>(as_negative ? g.d_an : g.d_ap)[a];
    add(row_of<S>(g.batch.references, j), row_of<S>(g.batch.anchors, a), d, as_negative ? -c : c, reference_norm(j),
        anchor_norm(a));
  }

  // All who chose row j, by looking through everybody's choices in ascending order.
  __device__ __forceinline__ void search_uses(int64_t j) {
    for (int64_t first = 0; first < g.batch.anchors.count; first += kWarp) {
      const int64_t a = first + lane_index();
      const bool inside = a < g.batch.anchors.count;
      const unsigned positive = __ballot_sync(kAllLanes, inside && g.positives[a] == j);
      const unsigned negative = __ballot_sync(kAllLanes, inside && g.negatives[a] == j);
      for (unsigned left = positive | negative; left != 0; left &= left - 1) {
        const int l = __ffs(left) - 1;
        add_use(j, first + l, negative >> l & 1);
      }
    }
  }

  // Uses begin, begin + step, ... before end of the sorted choices.
  __device__ __forceinline__ void add_sorted_uses(int64_t j, int64_t begin, int64_t end, int64_t step) {
    const int64_t n = g.batch.anchors.count;
    for (int64_t u = begin; u < end; u += step) {
      const int64_t entry = g.choice_order[u];
      add_use(j, entry < n ? entry : entry - n, entry >= n);
    }
  }
};

struct GradientShared {
  int64_t begin[kRowWarps], end[kRowWarps];
  double partial[kRowWarps][kGradientColumns];
};

// Rows chosen more often than this are added up by the whole block.
constexpr int64_t kManyUses = 64;

// One warp per row and run of kGradientColumns columns: what its own triplet and those who chose it contribute.
template <class S, bool kOwn, bool kUses>
__global__ void __launch_bounds__(kRowThreads, 2) gradient_kernel(LossGradient g, LossOptions options, void* grad, int64_t rows) {
  using T = Compute<S>;
  auto& shared = shared_memory<GradientShared>();
  const int64_t row_blocks = (rows + kRowWarps - 1) / kRowWarps, depth = g.batch.anchors.depth;
  const int64_t first_row = blockIdx.x % row_blocks * kRowWarps;
  const int64_t first_column = blockIdx.x / row_blocks * kGradientColumns;
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t i = first_row + warp;
  const bool finite = g.batch.flags->not_finite == 0;
  const bool divided = options.reduction == Reduction::mean || options.reduction == Reduction::mean_nonzero;
  const T scale = divided && *g.count > 0 ? 1 / T(*g.count) : T(1);
  const auto fresh = [&] {
    return RowGradient<S>{g, {T(options.margin), options.soft}, options.reduction, scale, first_column + lane_index()};
  };
  RowGradient<S> own = fresh();

  int64_t begin = 0, end = 0;
  if (i < rows && finite) {
    if (kOwn) own.add_own(i);
    if (kUses && g.sorted_choices) {
      const int64_t choices = 2 * g.batch.anchors.count;
      begin = lower_bound(g.sorted_choices, choices, int32_t(i));
      end = begin + lower_bound(g.sorted_choices + begin, choices - begin, int32_t(i) + 1);
      if (end - begin <= kManyUses) own.add_sorted_uses(i, begin, end, 1);
    } else if (kUses) {
      own.search_uses(i);
    }
  }
  if (kUses && g.sorted_choices) {
    if (lane_index() == 0) {
      shared.begin[warp] = begin;
      shared.end[warp] = end;
    }
    __syncthreads();
    for (int w = 0; w < kRowWarps; ++w) {
      if (shared.end[w] - shared.begin[w] <= kManyUses) continue;  // the same for the whole block
      RowGradient<S> part = fresh();
      part.add_sorted_uses(first_row + w, shared.begin[w] + warp, shared.end[w], kRowWarps);
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
