// Lines of numbers that are adjacent in memory, between global and shared memory, by all threads of a block: neighbouring threads take
// neighbouring pieces of 16 bytes.
#pragma once

#include "warp.cuh"

namespace deepsim::cuda {

// kLines lines of kElements numbers in shared memory, each followed by kPad bytes that spread what is read down the lines over the
// banks. In global memory they begin `stride` elements apart, and only so many `lines` and `elements` of each exist: no fewer than
// none.
template <class S, int kLines, int kElements, int kPad>
struct alignas(16) Lines {
  static constexpr int kPieceElements = 16 / sizeof(S), kPieces = kElements / kPieceElements;
  static_assert(kPad % 16 == 0 && kElements % kPieceElements == 0);
  unsigned char line[kLines][kElements * sizeof(S) + kPad];

  __device__ __forceinline__ S* at(int l, int element) { return reinterpret_cast<S*>(line[l]) + element; }
  __device__ __forceinline__ const S* at(int l, int element) const { return reinterpret_cast<const S*>(line[l]) + element; }

  // Begins to fetch them: there after cp_async_commit, cp_async_wait and a barrier. What does not exist becomes zero.
  template <int kThreads>
  __device__ __forceinline__ void load(const S* from, int64_t stride, int64_t lines, int64_t elements) {
    constexpr int kAtOnce = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kLines % kAtOnce == 0);
    const int first = int(threadIdx.x) % kPieces * kPieceElements;
    int l = int(threadIdx.x) / kPieces;
    const S* piece = from + l * stride + first;
    if (lines >= kLines && elements >= kElements && is_aligned(from) && stride % kPieceElements == 0) {
#pragma unroll
      for (int q = 0; q < kLines / kAtOnce; ++q, piece += kAtOnce * stride) ptx::cp_async_16(at(l + q * kAtOnce, first), piece);
      return;
    }
#pragma unroll 1
    for (; l < kLines; l += kAtOnce, piece += kAtOnce * stride) {
      S* to = at(l, first);
      const bool whole = l < lines && first + kPieceElements <= elements;
      if (whole && is_aligned(piece)) {
        ptx::cp_async_16(to, piece);
      } else if (whole && (sizeof(S) >= 4 || is_aligned<4>(piece))) {  // rows of an odd length
        for (int word = 0; word < 4; ++word) {
          ptx::cp_async_4(reinterpret_cast<uint32_t*>(to) + word, reinterpret_cast<const uint32_t*>(piece) + word);
        }
      } else {
        for (int e = 0; e < kPieceElements; ++e) to[e] = l < lines && first + e < elements ? piece[e] : S{};
      }
    }
    __syncwarp();  // what follows may ask for whole warps
  }

  // Writes those that exist.
  template <int kThreads>
  __device__ __forceinline__ void store(S* to, int64_t stride, int64_t lines, int64_t elements) const {
    constexpr int kAtOnce = kThreads / kPieces;
    const int first = int(threadIdx.x) % kPieces * kPieceElements;
    S* piece = to + int(threadIdx.x) / kPieces * stride + first;
    for (int l = int(threadIdx.x) / kPieces; l < kLines && l < lines; l += kAtOnce, piece += kAtOnce * stride) {
      const S* from = at(l, first);
      if (first + kPieceElements <= elements && is_aligned(piece)) {
        *reinterpret_cast<Piece*>(piece) = *reinterpret_cast<const Piece*>(from);
      } else {
        for (int e = 0; e < kPieceElements && first + e < elements; ++e) piece[e] = from[e];
      }
    }
  }

 private:
  struct alignas(16) Piece {
    S element[kPieceElements];
  };

  template <int kBytes = 16>
  __device__ __forceinline__ static bool is_aligned(const S* p) {
    return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
  }
};

}  // namespace deepsim::cuda
