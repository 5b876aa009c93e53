// k nearest neighbours on CUDA: one query's, from its distances to the whole gallery.
//
// Distance and index together are one number, of which no two are equal. Its digits, from the highest on, are counted among the
// candidates that agree with what is known of the k-th smallest number so far, and so the next digit of it is known.
//
// Where distances are approximate, those within their error of the k-th smallest are measured by differences, and the k nearest are
// chosen of these: the same as of all.
#include "anchor_row.cuh"
#include "dispatch.cuh"
#include "rows.cuh"

namespace deepsim::cuda {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kDigits == kBlockThreads);

// That are measured in shared memory: a few more than are wanted. A power of two, as they are sorted.
constexpr int kMostCandidates = 2 * kMostNeighbors;

template <class T>
struct NearestShared {
  T distance[kMostCandidates];
  int32_t index[kMostCandidates];
  int32_t digits[kDigits];
  int32_t digit, below, count;
};

// The digits of a candidate that have been decided: those of its distance's bits, then those of its index.
template <class Bits>
struct Bound {
  Bits distance = 0;
  uint32_t index = 0;

  static constexpr int kDistanceDigits = sizeof(Bits) * 8 / kDigitBits, kAllDigits = kDistanceDigits + 32 / kDigitBits;

  __device__ __forceinline__ static int distance_shift(int digit) { return (kDistanceDigits - 1 - digit) * kDigitBits; }
  __device__ __forceinline__ static int index_shift(int digit) { return (kAllDigits - 1 - digit) * kDigitBits; }

  __device__ __forceinline__ static int digit_of(Bits d, uint32_t i, int digit) {
    return int((digit < kDistanceDigits ? uint32_t(d >> distance_shift(digit)) : i >> index_shift(digit)) & (kDigits - 1));
  }
  // Whether a candidate has the digits before `digit`.
  __device__ __forceinline__ bool agrees(Bits d, uint32_t i, int digit) const {
    if (digit == 0) return true;
    if (digit <= kDistanceDigits) return d >> distance_shift(digit - 1) == distance >> distance_shift(digit - 1);
    return d == distance && i >> index_shift(digit - 1) == index >> index_shift(digit - 1);
  }
  __device__ __forceinline__ void decide(int digit, int value) {
    if (digit < kDistanceDigits) {
      distance |= Bits(value) << distance_shift(digit);
    } else {
      index |= uint32_t(value) << index_shift(digit);
    }
  }
};

// The digit that the needed-th of the counted candidates has, and how many have a lower one, by one warp: the lane to whose digits it
// belongs goes through these.
template <class T>
__device__ __forceinline__ void find_digit(NearestShared<T>& shared, int needed) {
  constexpr int kOfLane = kDigits / kWarp;
  int digit = lane_index() * kOfLane, own = 0;
  for (int d = 0; d < kOfLane; ++d) own += shared.digits[digit + d];
  int below = warp_sum_so_far(own) - own;
  if (below >= needed || below + own < needed) return;
  while (below + shared.digits[digit] < needed) below += shared.digits[digit++];
  shared.digit = digit;
  shared.below = below;
}

// The first digits of the k-th smallest of `count` values, without the own-th: as many as it takes until all candidates that have them
// are wanted. Of k and more values. Begins and ends with a barrier.
template <class T>
struct Selection {
  using Bits = decltype(distance_bits(T{}));
  Bound<Bits> bound;
  int digits = 0;  // decided

  __device__ __forceinline__ Selection(NearestShared<T>& shared, const T* values, int64_t count, int64_t own, int k) {
    int needed = k;  // among the candidates that agree
    for (bool all_agreeing = false; digits < Bound<Bits>::kAllDigits && !all_agreeing; ++digits) {
      __syncthreads();
      shared.digits[threadIdx.x] = 0;
      __syncthreads();
      for (int64_t c = threadIdx.x; c < count; c += kBlockThreads) {
        const Bits d = distance_bits(values[c]);
        if (c == own || !bound.agrees(d, uint32_t(c), digits)) continue;
        atomicAdd(&shared.digits[Bound<Bits>::digit_of(d, uint32_t(c), digits)], 1);
      }
      __syncthreads();
      if (threadIdx.x < kWarp) find_digit(shared, needed);
      __syncthreads();
      bound.decide(digits, shared.digit);
      needed -= shared.below;
      all_agreeing = shared.digits[shared.digit] == needed;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int undecided_bits() const {
    return Bound<Bits>::distance_shift((digits < Bound<Bits>::kDistanceDigits ? digits : Bound<Bits>::kDistanceDigits) - 1);
  }

  // Whether a candidate is below the bound's digits, or has them.
  __device__ __forceinline__ bool takes(T value, int64_t c) const {
    const Bits high = distance_bits(value) >> undecided_bits(), high_bound = bound.distance >> undecided_bits();
    if (high != high_bound || digits <= Bound<Bits>::kDistanceDigits) return high <= high_bound;
    const int shift = Bound<Bits>::index_shift(digits - 1);
    return uint32_t(c) >> shift <= bound.index >> shift;
  }

  // No less than the k-th smallest value.
  __device__ __forceinline__ Bits most() const { return bound.distance | ((Bits(1) << undecided_bits()) - 1); }
};

// Of `count` candidates in shared memory the k nearest. Begins and ends with a barrier.
template <class T>
__device__ __forceinline__ void store_nearest(NearestShared<T>& shared, int count, int k, T* distances, int64_t* indices) {
  sort_by_value<false>(shared.distance, shared.index, count);
  for (int i = int(threadIdx.x); i < k; i += kBlockThreads) {
    distances[i] = shared.distance[i];
    indices[i] = shared.index[i];
  }
}

// Of a row of distances.
template <class T>
__device__ __forceinline__ void nearest_of_row(NearestShared<T>& shared, const AnchorRow<T>& row, int k, T* distances, int64_t* indices) {
  const Selection<T> selected(shared, row.distance, row.columns, row.own, k);
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
    if (c == row.own || !selected.takes(row.distance[c], c)) continue;
    const int slot = atomicAdd(&shared.count, 1);
    shared.distance[slot] = row.distance[c];
    shared.index[slot] = int32_t(c);
  }
  __syncthreads();
  store_nearest(shared, k, k, distances, indices);
}

__global__ void __launch_bounds__(kBlockThreads, 2) nearest_rows_kernel(Pairs pairs, Stripe stripe, int k, double* distances,
                                                                        int64_t* indices) {
  auto& shared = shared_memory<NearestShared<double>>();
  if (pairs.flags->not_finite) return;
  const AnchorRow<double> row = anchor_row<double>(pairs, stripe, blockIdx.x);
  const int64_t out = (stripe.first + blockIdx.x) * k;
  nearest_of_row(shared, row, k, distances + out, indices + out);
}

// ---- from approximate distances ----

// The distance by differences in float, by one warp: the same for copies of a row, wherever they are.
template <class S>
__device__ __forceinline__ float measured_distance(const Pairs& pairs, int64_t anchor, int64_t reference) {
  const bool cosine = pairs.distance == Distance::cosine;
  if (cosine && (pairs.anchor_norm[anchor] == 0 || pairs.reference_norm[reference] == 0)) return 1;
  const S *a = row_of<S>(pairs.anchors, anchor), *b = row_of<S>(pairs.references, reference);
  float square = 0;
#pragma unroll 4
  for (int64_t k = lane_index(); k < pairs.anchors.depth; k += kWarp) {
    const float difference = normalised<float>(a[k], pairs.anchor_norm, anchor) - normalised<float>(b[k], pairs.reference_norm, reference);
    square += difference * difference;
  }
  return distance_of_half_square(pairs.distance, warp_sum(square) / 2);
}

// Up to what approximate |a - b|^2 / 2 a row may be as near as one that has `h`.
//
// With |a|^2 / 2 = p of centred rows and |b|^2 / 2 = q, product and differences are within e (p + q) of each other. Tensor cores cut off
// at most 2^-23 of the sum of |a_i b_i| <= p + q for each of the 120 terms at most that they add up before a sum is rounded (four products
// and a sum at a time); the split leaves out 2^-21, centring 2^-22. Sums of 32 elements are then added up, and so are a lane's squares of
// differences, one of every 32: three times depth / 32 roundings at most, as |a - b|^2 / 2 <= 2 (p + q). And since |b| <= |a| + |a - b|,
// q <= 2 p + 2 |a - b|^2 / 2. Below 2^-100 digits may be missing altogether.
DEEPSIM_HOST_DEVICE inline float as_near(float h, float half_norm, int64_t depth) {
  const double e = 0x1p-15 + double(depth) * 0x1p-27, of_anchor = 3 * e * double(half_norm);
  if (2 * e >= 1) return __builtin_huge_valf();  // no digit is sure
  const double measured = (double(h) + of_anchor) / (1 - 2 * e);
  return float(measured * (1 + 2 * e) + of_anchor + 0x1p-100) * 1.000001f;
}

// Calls visit(column of this lane, whether it is a candidate) for every 32 columns of which one may be, by whole warps.
template <class Visit>
__device__ __forceinline__ void for_candidates(const AnchorRow<float>& row, const float* least, int64_t groups, float limit, Visit visit) {
  for (int64_t first = threadIdx.x / kWarp * kWarp; first < groups; first += kBlockThreads) {
    const int64_t group = first + lane_index();
    uint32_t any = __ballot_sync(kAllLanes, group < groups && !(least[group] > limit));
    for (; any != 0; any &= any - 1) {
      const int64_t c = (first + __ffs(any) - 1) * kStripeColumns + lane_index();
      visit(c, c < row.columns && c != row.own && !(row.distance[c] > limit));
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2) nearest_candidates_kernel(Pairs pairs, Stripe stripe, int k, float* distances,
                                                                              int64_t* indices) {
  auto& shared = shared_memory<NearestShared<float>>();
  if (pairs.flags->not_finite) return;
  const AnchorRow<float> row = anchor_row<float>(pairs, stripe, blockIdx.x);
  const int64_t anchor = stripe.first + blockIdx.x, out = anchor * k, groups = stripe.stride / kStripeColumns;
  const float* least = stripe.least + blockIdx.x * groups;

  // The k-th smallest of the least of groups is no less than that of all, and, with many groups, hardly larger.
  const bool by_groups = groups >= 2 * k;
  const Selection<float> selected(shared, by_groups ? least : row.distance, by_groups ? groups : row.columns, by_groups ? -1 : row.own, k);
  const float limit = as_near(__uint_as_float(selected.most()), row.half_norm, pairs.anchors.depth);

  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for_candidates(row, least, groups, limit, [&](int64_t c, bool candidate) {
    const uint32_t found = __ballot_sync(kAllLanes, candidate);
    int slot = lane_index() == 0 ? atomicAdd(&shared.count, __popc(found)) : 0;
    slot = __shfl_sync(kAllLanes, slot, 0) + __popc(found & ((1u << lane_index()) - 1));
    if (candidate && slot < kMostCandidates) shared.index[slot] = int32_t(c);
  });
  __syncthreads();
  const int count = shared.count;
  if (count <= kMostCandidates) {
    for (int i = int(threadIdx.x) / kWarp; i < count; i += kBlockWarps) {
      const float d = measured_distance<S>(pairs, anchor, shared.index[i]);
      if (lane_index() == 0) shared.distance[i] = d;
    }
    return store_nearest(shared, count, k, distances + out, indices + out);
  }

  // Many are equally near, or products have too few digits to tell: distances take the place of what is approximate.
  for_candidates(row, least, groups, infinity<float>(), [&](int64_t c, bool) {
    const bool candidate = c < row.columns && c != row.own && !(row.distance[c] > limit);
    float own = infinity<float>();
    for (uint32_t found = __ballot_sync(kAllLanes, candidate); found != 0; found &= found - 1) {
      const int lane = __ffs(found) - 1;
      const float d = measured_distance<S>(pairs, anchor, c - lane_index() + lane);
      if (lane_index() == lane) own = d;
    }
    row.distance[c] = own;
  });
  nearest_of_row(shared, row, k, distances + out, indices + out);
}

// Nothing is near to what is not finite.
template <class T>
__global__ void nobody_near_kernel(const Flags* flags, int64_t elements, T* distances, int64_t* indices) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= elements || flags->not_finite == 0) return;
  distances[i] = not_a_number<T>();
  indices[i] = -1;
}

}  // namespace

void nearest_rows(const Pairs& pairs, const Stripe& stripe, int64_t k, void* distances, int64_t* indices, void* stream) {
  dispatch(pairs.storage, [&](auto s) {
    using S = decltype(s);
    const auto run = [&](auto kernel, auto* to) {
      launch(kernel, stripe.rows, kBlockThreads, sizeof(NearestShared<Compute<S>>), stream, pairs, stripe, int(k), to, indices);
    };
    if constexpr (std::is_same_v<S, double>) {
      run(nearest_rows_kernel, static_cast<double*>(distances));
    } else {
      run(nearest_candidates_kernel<S>, static_cast<float*>(distances));
    }
  });
}

void nobody_near(const Batch& batch, int64_t k, void* distances, int64_t* indices, void* stream) {
  const int64_t elements = batch.anchors.count * k;
  if (elements == 0) return;
  dispatch_compute(batch.storage, [&](auto t) {
    using T = decltype(t);
    launch(nobody_near_kernel<T>, blocks_for(elements, 256), 256, 0, stream, batch.flags, elements, static_cast<T*>(distances), indices);
  });
}

}  // namespace deepsim::cuda
