// k nearest neighbours on CUDA: one query's, from its distances to the whole gallery.
//
// Distance and index together are one number, of which no two are equal. Its digits, from the highest on, are counted among the
// candidates that agree with what is known of the k-th smallest number so far, and so the next digit of it is known.
#include "anchor_row.cuh"
#include "dispatch.cuh"

namespace deepsim::cuda {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kDigits == kBlockThreads);

template <class T>
struct NearestShared {
  T distance[kMostNeighbors];
  int32_t index[kMostNeighbors];
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

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) nearest_rows_kernel(Pairs pairs, Stripe stripe, int k, T* distances, int64_t* indices) {
  auto& shared = shared_memory<NearestShared<T>>();
  using Bits = decltype(distance_bits(T{}));
  const AnchorRow<T> row = anchor_row<T>(pairs, stripe, blockIdx.x);
  const int64_t out = (stripe.first + blockIdx.x) * k;
  if (pairs.flags->not_finite) return;

  Bound<Bits> bound;
  int needed = k;  // among the candidates that agree
  bool all_agreeing = false;
  int digit = 0;
  for (; digit < Bound<Bits>::kAllDigits && !all_agreeing; ++digit) {
    __syncthreads();
    shared.digits[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
      const Bits d = distance_bits(row.distance[c]);
      if (c == row.own || !bound.agrees(d, uint32_t(c), digit)) continue;
      atomicAdd(&shared.digits[Bound<Bits>::digit_of(d, uint32_t(c), digit)], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int value = 0, below = 0;
      while (below + shared.digits[value] < needed) below += shared.digits[value++];
      shared.digit = value;
      shared.below = below;
    }
    __syncthreads();
    bound.decide(digit, shared.digit);
    needed -= shared.below;
    all_agreeing = shared.digits[shared.digit] == needed;
  }

  // Candidates below the bound's digits, and those that have them.
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  const int distance_digits = digit < Bound<Bits>::kDistanceDigits ? digit : Bound<Bits>::kDistanceDigits;
  const int shift = Bound<Bits>::distance_shift(distance_digits - 1);
  for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
    if (c == row.own) continue;
    const T d = row.distance[c];
    const Bits high = distance_bits(d) >> shift, high_bound = bound.distance >> shift;
    bool taken = high <= high_bound;
    if (high == high_bound && digit > Bound<Bits>::kDistanceDigits) {
      const int index_shift = Bound<Bits>::index_shift(digit - 1);
      taken = uint32_t(c) >> index_shift <= bound.index >> index_shift;
    }
    if (!taken) continue;
    const int slot = atomicAdd(&shared.count, 1);
    shared.distance[slot] = d;
    shared.index[slot] = int32_t(c);
  }
  __syncthreads();
  sort_by_value<false>(shared.distance, shared.index, k);
  for (int i = int(threadIdx.x); i < k; i += kBlockThreads) {
    distances[out + i] = shared.distance[i];
    indices[out + i] = shared.index[i];
  }
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
  dispatch_compute(pairs.storage, [&](auto t) {
    using T = decltype(t);
    launch(nearest_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(NearestShared<T>), stream, pairs, stripe, int(k),
           static_cast<T*>(distances), indices);
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
