// What device code asks of the hardware: every line of inline PTX of the project, in small wrappers, and the launch of a kernel.
//
// A compiler that is not nvcc takes these names from tests/emulator/emulator.h, which runs the same kernels on the CPU.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deepsim::cuda {

// 16-bit storage. Arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widen(Half v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

// To nearest, ties to even; too large for float16 becomes infinite.
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }
__device__ __forceinline__ void narrow(float v, Half& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
__device__ __forceinline__ void narrow(float v, BFloat16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }

// a * b rounded, and not drawn into one operation with what is added next: then equal terms cancel.
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Whether this is being compiled for a GPU that has wgmma. (The pass for the host sees all of a kernel and emits none of it.)
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// The block's dynamic shared memory as one struct; the launch passes sizeof(T).
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(1024) unsigned char raw[];
  return *reinterpret_cast<T*>(raw);
}

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory (both 16-byte aligned), past L1, in the background: they are there once
// cp_async_wait has counted down to their group, for the thread that asked; for others after a barrier as well.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same of 4 bytes, through L1.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of the latest groups are still on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16-byte aligned) and gets, of
// every matrix, elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of transposed matrices: a lane gets elements l / 4 of rows 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b^T of one warp: a 16 x 16, b 8 x 16, d 16 x 8 in float. With g = lane / 4 and t = lane % 4, a lane holds
//   a: rows g, g + 8, g, g + 8 at k = 2t, 2t + 1 (first two registers) and k + 8 (last two)
//   b: row g at k = 2t, 2t + 1 and k + 8
//   d: row g at columns 2t, 2t + 1, then row g + 8.
// The hardware adds eight products at a time to d in an order of its own: any order of them gives the same bits.
__device__ __forceinline__ void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b^T of one warp in TF32, of which the hardware reads the upper 19 bits: a 16 x 8, b 8 x 8, d as above. A lane holds
//   a: rows g, g + 8 at k = t (first two registers) and t + 4 (last two);  b: row g at k = t and t + 4.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Hopper (sm_90a) ----

// A barrier in shared memory. One phase is over when as many threads have arrived as it was initialised with and all bytes that
// were expected have come; then the next begins. Phases count from 0.
struct Mbarrier {
  uint64_t state;
};

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After initialising and before the __syncthreads behind which barriers are used, by copies as well.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and makes the phase wait for so many bytes of bulk_copy.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until phase `phase` is over; no more than one phase behind.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(phase & 1)
      : "memory");
}

// Copies bytes from global to shared memory (both, and their number, multiples of 16) by the copy engine; the barrier counts them.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// wgmma: four warps, the first of them a multiple of four, multiply together and in the background. wgmma_fence comes before the
// first product that reads registers written since; wgmma_commit closes a group; until wgmma_wait has counted down to the group,
// neither `d` nor `a` may be touched nor `b` overwritten.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, int kFragments>
__device__ __forceinline__ void wgmma_wait(float (&d)[kFragments][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  // No instruction: tells the compiler that d is not to be read before.
#pragma unroll
  for (int n = 0; n < kFragments; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
}

// Rows of 128 bytes in shared memory, groups of eight 1024 bytes apart and as aligned, the 16-byte pieces of row r at piece ^ (r % 8):
// stride 1024 >> 4 from bit 32, the 128-byte swizzle as 1 from bit 62; the offset from bit 16 is not used in this layout.
__device__ __forceinline__ uint64_t swizzled_matrix(const void* p) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// d (+)= a b^T of four warps: a 64 x 16, warp w holding rows 16 w up to 16 w + 15 as in mma; b 128 x 16, read from swizzled rows that
// begin 32 k bytes into a row; d 64 x 128, d[n] as in mma for columns 8 n up to 8 n + 7. Without `accumulate` d is overwritten.
#define DEEPSIM_WGMMA(Type, name)                                                                                               \
  __device__ __forceinline__ void wgmma(Type, float (&d)[16][4], const uint32_t (&a)[4], const void* b, bool accumulate) {        \
    asm volatile(                                                                                                               \
        "{\n"                                                                                                                   \
        ".reg .pred accumulate;\n"                                                                                              \
        "setp.ne.b32 accumulate, %69, 0;\n"                                                                                     \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                                                            \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
        "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, "          \
        "accumulate, 1, 1, 0;\n"                                                                                                \
        "}"                                                                                                                     \
        : DEEPSIM_ROW(0), DEEPSIM_ROW(1), DEEPSIM_ROW(2), DEEPSIM_ROW(3), DEEPSIM_ROW(4), DEEPSIM_ROW(5), DEEPSIM_ROW(6),       \
          DEEPSIM_ROW(7), DEEPSIM_ROW(8), DEEPSIM_ROW(9), DEEPSIM_ROW(10), DEEPSIM_ROW(11), DEEPSIM_ROW(12), DEEPSIM_ROW(13),   \
          DEEPSIM_ROW(14), DEEPSIM_ROW(15)                                                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(swizzled_matrix(b)), "r"(int(accumulate)));                            \
  }
#define DEEPSIM_ROW(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
DEEPSIM_WGMMA(Half, "f16")
DEEPSIM_WGMMA(BFloat16, "bf16")
#undef DEEPSIM_ROW
#undef DEEPSIM_WGMMA

// ---- any ----

// No instruction: the compiler no longer knows where v comes from, and computes nothing of it before this.
__device__ __forceinline__ void forget(int& v) { asm volatile("" : "+r"(v)); }

// A value that other blocks may be raising at this moment; nothing is ordered by it.
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// The same of one that other threads of the block may be changing, in shared memory.
__device__ __forceinline__ int32_t load_relaxed_shared(const int32_t* p) {
  int32_t v;
  asm volatile("ld.relaxed.cta.shared.s32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
  return v;
}
__device__ __forceinline__ unsigned long long load_relaxed_shared(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.cta.shared.u64 %0, [%1];" : "=l"(v) : "r"(shared_address(p)) : "memory");
  return v;
}

}  // namespace ptx

// Throws what CUDA has to say against a call.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("deepsim_ext: CUDA: ") + cudaGetErrorString(error));
}

// Whether the current device runs a kernel that needs kHasWgmma as it was compiled for sm_90a: a driver may be told to compile the PTX
// for older devices instead (CUDA_FORCE_PTX_JIT).
template <class... P>
bool has_wgmma(void (*kernel)(P...)) {
#ifdef DEEPSIM_SM_90A
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major != 9) return false;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
#else
  return false;
#endif
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Starts kernel(args...) on the stream.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, void* stream, const A&... args) {
  if (blocks < 1 || blocks > 0x7fffffff) throw std::runtime_error("deepsim_ext: too large for one launch: " + std::to_string(blocks));
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  kernel<<<dim3(unsigned(blocks)), dim3(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}

}  // namespace deepsim::cuda
#endif
