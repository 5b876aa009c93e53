// Rows made ready for the tensor cores: sorted by label, float32 ones centred, in the order in which tiles read them.
//
// An operand is [tiles][chunks][kTileRows rows][128 bytes]: a tile's share of a chunk of columns is one run of 16 KiB. The
// 16-byte pieces of row r stand at piece ^ (r % 8), so that neither storing rows nor reading columns of shared memory meets a
// bank twice. What a piece holds is told by the operand's type:
//
//   Plain<S>  eight elements of 16-bit rows as they are (for cosine scaled by a power of two), or of float32 rows scaled by a power of
//             two and rounded to 11 bits
//   Split     four elements of float32 rows scaled by a power of two, each as the sum of two float16: [h h h h l l l l]
//
// Scaling brings the largest element of a row to 2^10 up to 2^11, so nothing overflows and what float16 cannot hold is below
// 2^-34 of it. h + l has 22 bits. Products of Split rows i and j: [h l] times [h l] gives hh + ll, times [l h], which is the
// same registers moved over two lanes, hl + lh. As each product of a step and its mirror image fall into one group of eight
// that the hardware adds as one sum, the product of (i, j) has the bits of (j, i): equal rows tie exactly.
#pragma once

#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kChunkBytes = 128;
constexpr int kPieceBytes = 16;
constexpr int kPieces = kChunkBytes / kPieceBytes;
constexpr int64_t kChunkTileBytes = kTileRows * kChunkBytes;

struct alignas(kPieceBytes) Piece {
  uint16_t halves[kPieceBytes / 2];
};

template <class S>
struct Plain {
  using Element = S;
  static constexpr int kElements = 8;  // of a row in a piece
  static constexpr bool kSplit = false;
  __device__ __forceinline__ static Piece encode(const float (&v)[8]) {
    Piece piece;
    for (int e = 0; e < 8; ++e) {
      S out;
      narrow(v[e], out);
      piece.halves[e] = out.bits;
    }
    return piece;
  }
};

struct Split {
  using Element = Half;
  static constexpr int kElements = 4;
  static constexpr bool kSplit = true;
  __device__ __forceinline__ static Piece encode(const float (&v)[4]) {
    Piece piece;
    for (int e = 0; e < 4; ++e) {
      Half high, low;
      narrow(v[e], high);
      narrow(v[e] - widen(high), low);
      piece.halves[e] = high.bits;
      piece.halves[e + 4] = low.bits;
    }
    return piece;
  }
};

// The power of two that brings `largest` to [2^10, 2^11), within what a float can hold together with its inverse.
__device__ __forceinline__ float scale_to_half(float largest) {
  const int exponent = int(__float_as_uint(largest) >> 23 & 255);
  return __uint_as_float(unsigned(254 + 10 - (exponent < 11 ? 11 : exponent)) << 23);
}

struct PackArguments {
  Rows rows;
  const double* norms;         // cosine only
  const float* centre;         // of float32 rows; others stay as they are
  PackedSet out;
  Keys keys;  // of nobody, where there are any
  const int64_t* column_labels;  // sorted labels of the references
  int64_t column_count;
  Flags* flags;
};

// One warp per packed row.
//
// label_id is twice the first position of the label among the references, or one less than that if it is not among them: equal
// for equal labels, never equal for others, ascending. Rows of filling come last and are infinitely long: never a negative, and
// positives of nobody but each other.
template <class S, class Operand>
__global__ void __launch_bounds__(kWarp * 8, sizeof(S) == 4 ? 3 : 4) pack_kernel(PackArguments p) {
  const int64_t position = warp_index(), depth = p.rows.depth;
  const int64_t chunks = (depth + kPieces * Operand::kElements - 1) / (kPieces * Operand::kElements);
  if (position >= padded_rows(p.rows.count)) return;
  const bool filling = position >= p.rows.count;
  const int64_t row = filling ? 0 : p.out.order[position];
  const S* x = row_of<S>(p.rows, row);
  const bool zero_row = p.norms && p.flags->zero_row;
  const double norm = p.norms && !filling ? p.norms[row] : 1.0;
  constexpr bool kMoved = std::is_same_v<S, float>;  // to the centre, and for cosine to the unit sphere before that
  constexpr int kElements = Operand::kElements;
  const int64_t pieces = chunks * kPieces, elements = filling ? 0 : depth;
  struct Stored {
    S element[kElements];
    float centre[kMoved ? kElements : 1];
  };
  struct Elements {
    float value[kElements];
  };
  // First all loads, then what waits for them.
  const auto read = [&](int64_t piece) {
    Stored read;
    for (int e = 0; e < kElements; ++e) {
      const int64_t k = piece * kElements + e;
      read.element[e] = k < elements ? x[k] : S{};
      if constexpr (kMoved) read.centre[e] = k < elements && !zero_row ? p.centre[k] : 0.0f;
    }
    return read;
  };
  const auto elements_of = [&](const Stored& stored) {
    Elements of;
    for (int e = 0; e < kElements; ++e) {
      of.value[e] = widen(stored.element[e]);
      if constexpr (kMoved) of.value[e] = normalised<float>(stored.element[e], p.norms, row) - stored.centre[e];
    }
    return of;
  };
  const Stored begin = read(lane_index());  // of most rows all that there is for a lane; on its way while the label is looked for

  int64_t id = 0x7fffffff;
  if (!filling) {
    const int64_t label = p.out.sorted_labels[position];
    const int64_t first_position = lower_bound(p.column_labels, p.column_count, label);
    const bool found = first_position < p.column_count && p.column_labels[first_position] == label;
    id = found ? 2 * first_position : 2 * first_position - 1;
  }

  const Elements first = elements_of(begin);
  const auto for_each_piece = [&](auto f) {
    if (lane_index() < pieces) f(lane_index(), first);
    for (int64_t piece = lane_index() + kWarp; piece < pieces; piece += kWarp) f(piece, elements_of(read(piece)));
  };
  double square = 0;
  float largest = 0;
  for_each_piece([&](int64_t, const Elements& piece) {
    for (const float v : piece.value) {
      square += double(v) * double(v);
      largest = fmaxf(largest, std::fabs(v));
    }
  });
  square = warp_sum(square);
  for (int bits = kWarp / 2; bits > 0; bits /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, bits));
  const float factor = kMoved || p.norms ? scale_to_half(largest) : 1.0f;

  for_each_piece([&](int64_t index, const Elements& piece) {
    float v[kElements];
    for (int e = 0; e < kElements; ++e) v[e] = piece.value[e] * factor;
    const int64_t chunk = position / kTileRows * chunks + index / kPieces, r = position % kTileRows;
    unsigned char* to = p.out.operand + chunk * kChunkTileBytes + r * kChunkBytes + ((index % kPieces) ^ (r % 8)) * kPieceBytes;
    *reinterpret_cast<Piece*>(to) = Operand::encode(v);
  });
  if (lane_index() != 0) return;
  float half_norm = float(square / 2), scale = 1 / factor;
  if (zero_row || (p.norms && !kMoved)) half_norm = 0.5f;  // a zero row is at 1/2 + 1/2 - 0 from everyone
  if (p.norms && !kMoved) scale = norm == 0 ? 0.0f : float(1 / (norm * double(factor)));
  if (filling) half_norm = infinity<float>();
  // Also where a float could not hold the distance of two such rows. (Of cosine in 16 bits the norms have told.)
  if (!filling && !(p.norms && !kMoved) && !(square / 2 < 3.402823466e38 / 8)) atomicOr(&p.flags->not_finite, 1);
  p.out.half_norm[position] = half_norm;
  p.out.scale[position] = scale;
  p.out.label_id[position] = int32_t(id);
  p.out.original[position] = filling ? kNobody : int32_t(row);
  if (p.keys.positive) p.keys.positive[position] = p.keys.negative[position] = 0;
}

}  // namespace deepsim::cuda
