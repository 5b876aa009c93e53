// Every wrapper of csrc/cuda/device.cuh on random operands against plain loops: by the emulator in the tests, and compiled by nvcc on
// a GPU, where it tells whether the emulator's idea of an instruction is the hardware's (`make gpu-check`).
#include <random>
#include <string>
#include <vector>

#include "csrc/cuda/warp.cuh"
#include "device_memory.h"

using namespace deepsim::cuda;

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  std::printf("%s: %s\n", right ? "right" : "WRONG", what.c_str());
  failures += !right;
}

// ---- conversions ----

template <class S>
__global__ void widen_kernel(const S* in, float* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = widen(in[i]);
}

template <class S>
__global__ void narrow_kernel(const float* in, S* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) narrow(in[i], out[i]);
}

template <class S>
void check_conversions(const std::string& type, std::mt19937& random) {
  constexpr int kCount = 65536;
  Buffer<S> halves_in(kCount), halves_out(kCount);
  Buffer<float> floats_in(kCount), floats_out(kCount);
  for (int i = 0; i < kCount; ++i) {
    halves_in[i].bits = uint16_t(i);
    // Every exponent, and numbers half-way between two results.
    const uint32_t bits = uint32_t(random());
    floats_in[i] = halves::float_of(i % 2 ? bits : bits & 0xfffff000u);
  }
  launch(widen_kernel<S>, kCount / 256, 256, 0, nullptr, &halves_in[0], &floats_out[0], kCount);
  launch(narrow_kernel<S>, kCount / 256, 256, 0, nullptr, &floats_in[0], &halves_out[0], kCount);
  synchronize();
  bool widened = true, narrowed = true;
  for (int i = 0; i < kCount; ++i) {
    const double wide = value_of(halves_in[i]);
    widened &= wide != wide ? floats_out[i] != floats_out[i] : double(floats_out[i]) == wide;
    S exact;
    assign(exact, floats_in[i]);
    narrowed &= floats_in[i] != floats_in[i] ? value_of(halves_out[i]) != value_of(halves_out[i]) : halves_out[i].bits == exact.bits;
  }
  expect(widened, "widen " + type + ", all of them");
  expect(narrowed, "narrow to " + type);
}

// ---- copies ----

struct CopyShared {
  unsigned char bytes[2][32 * 16];
};

// Each lane copies 16 bytes twice, in two groups, and looks at the first when only the second may still be on its way.
__global__ void copy_kernel(const unsigned char* in, unsigned char* out) {
  auto& shared = shared_memory<CopyShared>();
  for (int group = 0; group < 2; ++group) {
    unsigned char* to = shared.bytes[group] + lane_index() * 16;
    const unsigned char* from = in + (group * 32 + lane_index()) * 16;
    if (group == 0) {
      ptx::cp_async_16(to, from);
    } else {
      for (int word = 0; word < 4; ++word) ptx::cp_async_4(to + word * 4, from + word * 4);
    }
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  __syncwarp();
  for (int i = lane_index(); i < 512; i += 32) out[i] = shared.bytes[0][511 - i];
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = lane_index(); i < 512; i += 32) out[512 + i] = shared.bytes[1][511 - i];
}

void check_copies(std::mt19937& random) {
  Buffer<unsigned char> in(1024), out(1024);
  for (int i = 0; i < 1024; ++i) in[i] = static_cast<unsigned char>(random());
  launch(copy_kernel, 1, 32, sizeof(CopyShared), nullptr, &in[0], &out[0]);
  synchronize();
  bool right = true;
  for (int i = 0; i < 1024; ++i) right &= out[i] == in[i / 512 * 512 + 511 - i % 512];
  expect(right, "cp_async_16, cp_async_4, commit, wait");
}

// ---- matrices ----

struct MatrixShared {
  alignas(16) uint16_t row[32][8];
};

template <bool kTransposed>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  auto& shared = shared_memory<MatrixShared>();
  for (int i = lane_index(); i < 256; i += 32) shared.row[i / 8][i % 8] = in[i];
  __syncwarp();
  uint32_t r[4];
  const void* row = shared.row[(lane_index() * 5) % 32];  // rows in another order than lanes
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_transposed(r, row);
  } else {
    ptx::ldmatrix_x4(r, row);
  }
  for (int m = 0; m < 4; ++m) out[m * 32 + lane_index()] = r[m];
}

template <bool kTransposed>
void check_ldmatrix(const std::string& name, std::mt19937& random) {
  Buffer<uint16_t> in(256);
  Buffer<uint32_t> out(128);
  for (int i = 0; i < 256; ++i) in[i] = uint16_t(random());
  launch(ldmatrix_kernel<kTransposed>, 1, 32, sizeof(MatrixShared), nullptr, &in[0], &out[0]);
  synchronize();
  bool right = true;
  for (int m = 0; m < 4; ++m) {
    for (int l = 0; l < 32; ++l) {
      const auto element = [&](int i, int k) {
        return uint32_t(kTransposed ? in[(m * 8 + k) * 5 % 32 * 8 + i] : in[(m * 8 + i) * 5 % 32 * 8 + k]);
      };
      right &= out[m * 32 + l] == (element(l / 4, l % 4 * 2) | element(l / 4, l % 4 * 2 + 1) << 16);
    }
  }
  expect(right, name);
}

// One product of a 16 x kDepth and an 8 x kDepth matrix, given row by row.
template <class S>
__global__ void mma_kernel(const S* a, const S* b, float* d) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto pair = [](const S* p) { return uint32_t(p[0].bits) | uint32_t(p[1].bits) << 16; };
  uint32_t x[4], y[2];
  for (int r = 0; r < 4; ++r) x[r] = pair(a + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8);
  for (int r = 0; r < 2; ++r) y[r] = pair(b + g * 16 + 2 * t + r * 8);
  float sum[4];
  for (int r = 0; r < 4; ++r) sum[r] = d[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
  ptx::mma(S{}, sum, x, y);
  for (int r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto bits = [](float v) { return __float_as_uint(v); };
  uint32_t x[4], y[2];
  for (int r = 0; r < 4; ++r) x[r] = bits(a[(g + r % 2 * 8) * 8 + t + r / 2 * 4]);
  for (int r = 0; r < 2; ++r) y[r] = bits(b[g * 8 + t + r * 4]);
  float sum[4];
  for (int r = 0; r < 4; ++r) sum[r] = d[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
  ptx::mma_tf32(sum, x, y);
  for (int r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

// What TF32 keeps of a float.
double kept(float v) { return halves::float_of(halves::bits_of(v) & 0xffffe000u); }
double kept(Half v) { return value_of(v); }
double kept(BFloat16 v) { return value_of(v); }

template <class S, int kDepth, class Kernel>
void check_mma(const std::string& name, Kernel kernel, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Buffer<S> a(16 * kDepth), b(8 * kDepth);
  Buffer<float> d(16 * 8);
  double worst = 0;
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < a.size; ++i) assign(a[i], normal(random));
    for (int i = 0; i < b.size; ++i) assign(b[i], normal(random));
    std::vector<double> exact(16 * 8);
    for (int i = 0; i < d.size; ++i) exact[i] = d[i] = normal(random);
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 8; ++c)
        for (int k = 0; k < kDepth; ++k) exact[r * 8 + c] += kept(a[r * kDepth + k]) * kept(b[c * kDepth + k]);
    launch(kernel, 1, 32, 0, nullptr, &a[0], &b[0], &d[0]);
    synchronize();
    for (int i = 0; i < d.size; ++i) worst = std::max(worst, std::fabs(double(d[i]) - exact[i]));
  }
  std::printf("%s: largest error %.1e\n", name.c_str(), worst);
  expect(worst < 1e-5, name);  // sums of sixteen products of size 1, added in float
}

// Batch-hard counts on this: with rows [h l] of eight, four numbers split in two, products [h l] [l h] of rows i and j have the bits of
// j and i, whatever has been added up before.
__global__ void mirror_kernel(const Half* rows, float* d) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  float sum[4] = {};
  for (int step = 0; step < 8; ++step) {
    const Half* x = rows + step * 16;
    const auto pair = [&](int row, int k) { return uint32_t(x[row * 128 + k].bits) | uint32_t(x[row * 128 + k + 1].bits) << 16; };
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; ++r) a[r] = pair((g + r % 2 * 8) % 8, 2 * t + r / 2 * 8);
    for (int r = 0; r < 2; ++r) b[r] = pair(g, 2 * t + r * 8);
    ptx::mma(Half{}, sum, a, b);
    for (int r = 0; r < 2; ++r) b[r] = __shfl_xor_sync(kAllLanes, b[r], 2);
    ptx::mma(Half{}, sum, a, b);
  }
  for (int r = 0; r < 2; ++r) d[g * 8 + 2 * t + r] = sum[r];
}

void check_mirror(std::mt19937& random) {
  std::normal_distribution<float> normal;
  Buffer<Half> rows(8 * 128);
  Buffer<float> d(64);
  bool right = true;
  for (int round = 0; round < 200; ++round) {
    for (int i = 0; i < rows.size; i += 8) {
      for (int e = 0; e < 4; ++e) {
        const float v = 400 * normal(random);
        assign(rows[i + e], v);
        assign(rows[i + e + 4], v - value_of(rows[i + e]));
      }
    }
    launch(mirror_kernel, 1, 32, 0, nullptr, &rows[0], &d[0]);
    synchronize();
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) right &= halves::bits_of(d[i * 8 + j]) == halves::bits_of(d[j * 8 + i]);
  }
  expect(right, "products of split rows have the bits of their mirror image");
}

// ---- Hopper ----

constexpr int kRowBytes = 128;
constexpr int kMatrixBytes = 128 * kRowBytes;

struct BulkShared {
  alignas(1024) unsigned char bytes[2][1024];
  ptx::Mbarrier full[2], empty;
};

// Two warps: the first thread copies four kilobytes through two buffers, all read them. `out` gets each copy backwards.
__global__ void bulk_copy_kernel(const unsigned char* in, unsigned char* out) {
  if constexpr (kHasWgmma) {
    auto& shared = shared_memory<BulkShared>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty, 2);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (int round = 0; round < 4; ++round) {
      const int buffer = round % 2;
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.full[buffer], 1024);
        for (int half = 0; half < 2; ++half) {
          ptx::bulk_copy(shared.bytes[buffer] + half * 512, in + round * 1024 + half * 512, 512, &shared.full[buffer]);
        }
      }
      ptx::mbarrier_wait(&shared.full[buffer], round / 2);
      for (int i = int(threadIdx.x); i < 1024; i += 64) out[round * 1024 + i] = shared.bytes[buffer][1023 - i];
      __syncwarp();
      if (lane_index() == 0) ptx::mbarrier_arrive(&shared.empty);
      ptx::mbarrier_wait(&shared.empty, round);
    }
  }
}

void check_bulk_copy(std::mt19937& random) {
  Buffer<unsigned char> in(4096), out(4096);
  for (int i = 0; i < 4096; ++i) in[i] = static_cast<unsigned char>(random());
  launch(bulk_copy_kernel, 1, 64, sizeof(BulkShared), nullptr, &in[0], &out[0]);
  synchronize();
  bool right = true;
  for (int i = 0; i < 4096; ++i) right &= out[i] == in[i / 1024 * 1024 + 1023 - i % 1024];
  expect(right, "bulk_copy, mbarrier_init, _arrive, _arrive_expect, _wait");
}

struct WgmmaShared {
  alignas(1024) unsigned char rows[kMatrixBytes];
  ptx::Mbarrier full;
};

// d = d + a b^T of a: 64 x 64, b: 128 x 64, both row by row, b swizzled; with kMirrored of a with its pieces' halves swapped as well.
// Two warpgroups do the same, with `d` of their own. The first product overwrites d where `fresh`.
template <class S, bool kMirrored>
__global__ void wgmma_kernel(const S* a, const S* b, float* d, bool fresh) {
  if constexpr (kHasWgmma) {
    auto& shared = shared_memory<WgmmaShared>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&shared.full, 1);
      ptx::mbarrier_init_fence();
      ptx::mbarrier_arrive_expect(&shared.full, kMatrixBytes);
      ptx::bulk_copy(shared.rows, b, kMatrixBytes, &shared.full);
    }
    __syncthreads();
    ptx::mbarrier_wait(&shared.full, 0);
    const int group = int(threadIdx.x) / 128, warp = int(threadIdx.x) / kWarp % 4, g = lane_index() / 4, t = lane_index() % 4;
    float sum[16][4];
    const auto place = [&](int n, int r) { return ((group * 64 + warp * 16 + g + r / 2 * 8) * 128) + n * 8 + 2 * t + r % 2; };
    for (int n = 0; n < 16; ++n)
      for (int r = 0; r < 4; ++r) sum[n][r] = d[place(n, r)];
    uint32_t x[4][4], swapped[4][4];
    for (int step = 0; step < 4; ++step) {
      for (int r = 0; r < 4; ++r) {
        const S* p = a + (warp * 16 + g + r % 2 * 8) * 64 + step * 16 + 2 * t + r / 2 * 8;
        x[step][r] = uint32_t(p[0].bits) | uint32_t(p[1].bits) << 16;
        swapped[step][r] = __shfl_xor_sync(kAllLanes, x[step][r], 2);
      }
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma(S{}, sum, x[step], shared.rows + step * 32, !fresh || step > 0);
      if constexpr (kMirrored) ptx::wgmma(S{}, sum, swapped[step], shared.rows + step * 32, true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(sum);
    for (int n = 0; n < 16; ++n)
      for (int r = 0; r < 4; ++r) d[place(n, r)] = sum[n][r];
  }
}

// Element (row, k) of a swizzled matrix of 64 columns.
int swizzled(int row, int k) { return row * 64 + ((k / 8) ^ (row % 8)) * 8 + k % 8; }

template <class S>
void check_wgmma(const std::string& type, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Buffer<S> a(64 * 64), b(128 * 64);
  Buffer<float> d(128 * 128);
  double worst = 0;
  for (const bool fresh : {false, true}) {
    for (int i = 0; i < a.size; ++i) assign(a[i], normal(random));
    for (int i = 0; i < b.size; ++i) assign(b[i], normal(random));
    std::vector<double> exact(d.size);
    for (int i = 0; i < d.size; ++i) {
      d[i] = normal(random);
      exact[i] = fresh ? 0 : d[i];
      for (int k = 0; k < 64; ++k) exact[i] += value_of(a[i / 128 % 64 * 64 + k]) * value_of(b[swizzled(i % 128, k)]);
    }
    launch(wgmma_kernel<S, false>, 1, 256, sizeof(WgmmaShared), nullptr, &a[0], &b[0], &d[0], fresh);
    synchronize();
    for (int i = 0; i < d.size; ++i) worst = std::max(worst, std::fabs(double(d[i]) - exact[i]));
  }
  std::printf("wgmma %s: largest error %.1e\n", type.c_str(), worst);
  expect(worst < 4e-5, "wgmma " + type);  // sums of 64 products of size 1, in float and cut off
}

// As check_mirror, by wgmma.
void check_wgmma_mirror(std::mt19937& random) {
  std::normal_distribution<float> normal;
  Buffer<Half> rows(128 * 64), columns(128 * 64);
  Buffer<float> d(128 * 128);
  bool right = true;
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < rows.size; i += 8) {
      for (int e = 0; e < 4; ++e) {
        const float v = 400 * normal(random);
        assign(rows[i + e], v);
        assign(rows[i + e + 4], v - value_of(rows[i + e]));
      }
    }
    for (int i = 0; i < rows.size; ++i) columns[swizzled(i / 64, i % 64)] = rows[i];
    launch(wgmma_kernel<Half, true>, 1, 256, sizeof(WgmmaShared), nullptr, &rows[0], &columns[0], &d[0], true);
    synchronize();
    for (int i = 0; i < 64; ++i)
      for (int j = 0; j < 64; ++j) right &= halves::bits_of(d[i * 128 + j]) == halves::bits_of(d[j * 128 + i]);
  }
  expect(right, "wgmma: products of split rows have the bits of their mirror image");
}

// ---- the rest ----

struct RaisedShared {
  int32_t value;
  unsigned long long wide;
};

__global__ void load_relaxed_shared_kernel(int32_t* out, unsigned long long* wide) {
  auto& shared = shared_memory<RaisedShared>();
  if (threadIdx.x == 0) shared = {-1, 0};
  __syncthreads();
  atomicMax(&shared.value, int32_t(threadIdx.x));
  atomicMax(&shared.wide, (unsigned long long)threadIdx.x << 33 | 5);
  __syncthreads();
  out[threadIdx.x] = ptx::load_relaxed_shared(&shared.value);
  wide[threadIdx.x] = ptx::load_relaxed_shared(&shared.wide);
}

void check_load_relaxed_shared() {
  Buffer<int32_t> out(64);
  Buffer<unsigned long long> wide(64);
  launch(load_relaxed_shared_kernel, 1, 64, sizeof(RaisedShared), nullptr, &out[0], &wide[0]);
  synchronize();
  bool right = true;
  for (int i = 0; i < 64; ++i) right &= out[i] == 63 && wide[i] == (63ull << 33 | 5);
  expect(right, "load_relaxed_shared after atomicMax");
}

__global__ void load_relaxed_kernel(unsigned long long* p, unsigned long long* out) {
  atomicMax(p, (unsigned long long)threadIdx.x << 33 | 5);
  __syncthreads();
  out[threadIdx.x] = ptx::load_relaxed(p);
}

void check_load_relaxed() {
  Buffer<unsigned long long> p(1, 0), out(64);
  launch(load_relaxed_kernel, 1, 64, 0, nullptr, &p[0], &out[0]);
  synchronize();
  bool right = true;
  for (int i = 0; i < 64; ++i) right &= out[i] == (63ull << 33 | 5);
  expect(right, "load_relaxed after atomicMax of 64 bits");
}

}  // namespace

int main() {
  try {
    std::mt19937 random(7);
    check_conversions<Half>("float16", random);
    check_conversions<BFloat16>("bfloat16", random);
    check_copies(random);
    check_ldmatrix<false>("ldmatrix_x4", random);
    check_ldmatrix<true>("ldmatrix_x4_transposed", random);
    check_mma<Half, 16>("mma float16", mma_kernel<Half>, random);
    check_mma<BFloat16, 16>("mma bfloat16", mma_kernel<BFloat16>, random);
    check_mma<float, 8>("mma_tf32", mma_tf32_kernel, random);
    check_mirror(random);
    check_load_relaxed();
    check_load_relaxed_shared();
    if (has_wgmma(wgmma_kernel<Half, false>)) {
      check_bulk_copy(random);
      check_wgmma<Half>("float16", random);
      check_wgmma<BFloat16>("bfloat16", random);
      check_wgmma_mirror(random);
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures != 0;
}
