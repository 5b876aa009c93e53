// The wrappers of csrc/cuda/device.cuh, on top of the emulator. Layouts are those of the PTX ISA.
#pragma once

namespace deepsim::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) { return halves::from_bfloat16(v.bits); }
inline float widen(Half v) { return halves::from_float16(v.bits); }

inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, BFloat16& out) { out.bits = halves::to_bfloat16(v); }
inline void narrow(float v, Half& out) { out.bits = halves::to_float16(v); }

inline double rounded_product(double a, double b) { return a * b; }

constexpr bool kHasWgmma = true;
template <class... P>
bool has_wgmma(void (*)(P...)) {
  return true;
}
inline int multiprocessors() { return 1; }

namespace ptx {

template <int kBytes>
void cp_async(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes) {
    emulator::fail("cp_async: not aligned");
  }
  const emulator::Copy copy{shared, global, kBytes};
  if (emulator::Options::current().lazy_copies) {
    emulator::block()->running->copies.back().push_back(copy);
  } else {
    std::memcpy(shared, global, kBytes);
  }
}
inline void cp_async_16(void* shared, const void* global) { cp_async<16>(shared, global); }
inline void cp_async_4(void* shared, const void* global) { cp_async<4>(shared, global); }
inline void cp_async_commit() { emulator::block()->running->copies.emplace_back(); }
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::block()->running->copies;
  while (int(groups.size()) - 1 > kPending) {
    for (const emulator::Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}

template <bool kTransposed>
void ldmatrix(uint32_t (&r)[4], const void* row, int line) {
  struct Slot {
    const unsigned char* row;
    uint32_t* r;
  } slot{static_cast<const unsigned char*>(row), r};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: not 16-byte aligned");
  emulator::warp_operation("ldmatrix", line, ~0u, &slot, [](void** slots) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto row_of = [&](int i) { return static_cast<Slot*>(slots[matrix * 8 + i])->row; };
      for (int l = 0; l < 32; ++l) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int i = l / 4, k = l % 4 * 2 + e;
          std::memcpy(&pair[e], kTransposed ? row_of(k) + i * 2 : row_of(i) + k * 2, 2);
        }
        static_cast<Slot*>(slots[l])->r[matrix] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) { ldmatrix<false>(r, row, line); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) { ldmatrix<true>(r, row, line); }

// sum + x[0] y[0] + x[1] y[1] + ... as tensor cores add: every term is brought to the exponent of the largest and cut off kGuardBits
// behind the last bit that a float would have there; so is their exact sum. NVIDIA publishes nothing about it. Measurements
// (Fasi, Higham, Mikaitis, Pranesh 2021, and later ones of Hopper) found one more bit than a float's or two; one is the worse.
constexpr int kGuardBits = 1;

template <int kCount>
float sum_of_products(float sum, const float* x, const float* y) {
  double terms[kCount + 1] = {sum}, largest = std::fabs(double(sum));
  for (int k = 0; k < kCount; ++k) terms[k + 1] = double(x[k]) * double(y[k]);
  bool finite = largest < HUGE_VAL;
  for (int k = 1; k <= kCount; ++k) {
    const double size = std::fabs(terms[k]);
    finite &= size < HUGE_VAL;
    largest = size > largest ? size : largest;
  }
  if (!finite || largest == 0) {
    double plain = 0;
    for (const double term : terms) plain += term;
    return float(plain);
  }
  // 2^exponent <= largest < 2^(exponent + 1)
  const int exponent = int(halves::bits_of(largest) >> 52) - 1023, last_bit = exponent - 23 - kGuardBits;
  const double per_unit = halves::power_of_two(-last_bit);
  int32_t units = 0;
  for (const double term : terms) units += int32_t(term * per_unit);
  const double exact = double(units) * halves::power_of_two(last_bit);
  const float f = float(exact);
  return std::fabs(double(f)) > std::fabs(exact) ? __uint_as_float(__float_as_uint(f) - 1) : f;
}

template <class S>
void mma(S, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
  } slot{d, a, b};
  emulator::warp_operation("mma", line, ~0u, &slot, [](void** slots) {
    const auto element = [](uint32_t pair, int e) { return widen(S{uint16_t(pair >> (16 * e))}); };
    float left[16][16], right[8][16];
    for (int l = 0; l < 32; ++l) {
      const Slot& s = *static_cast<Slot*>(slots[l]);
      const int g = l / 4, t = l % 4;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][2 * t + e + r / 2 * 8] = element(s.a[r], e);
        for (int r = 0; r < 2; ++r) right[g][2 * t + e + r * 8] = element(s.b[r], e);
      }
    }
    for (int l = 0; l < 32; ++l) {
      const Slot& s = *static_cast<Slot*>(slots[l]);
      for (int r = 0; r < 4; ++r) {
        const float *x = left[l / 4 + r / 2 * 8], *y = right[l % 4 * 2 + r % 2];
        for (int k = 0; k < 16; k += 8) s.d[r] = sum_of_products<8>(s.d[r], x + k, y + k);
      }
    }
  });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
  } slot{d, a, b};
  emulator::warp_operation("mma_tf32", line, ~0u, &slot, [](void** slots) {
    const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
    float left[16][8], right[8][8];
    for (int l = 0; l < 32; ++l) {
      const Slot& s = *static_cast<Slot*>(slots[l]);
      for (int r = 0; r < 4; ++r) left[l / 4 + r % 2 * 8][l % 4 + r / 2 * 4] = tf32(s.a[r]);
      for (int r = 0; r < 2; ++r) right[l / 4][l % 4 + r * 4] = tf32(s.b[r]);
    }
    for (int l = 0; l < 32; ++l) {
      const Slot& s = *static_cast<Slot*>(slots[l]);
      for (int r = 0; r < 4; ++r) {
        const float *x = left[l / 4 + r / 2 * 8], *y = right[l % 4 * 2 + r % 2];
        for (int k = 0; k < 8; k += 4) s.d[r] = sum_of_products<4>(s.d[r], x + k, y + k);
      }
    }
  });
}

// ---- Hopper ----

using Mbarrier = emulator::Mbarrier;
static_assert(sizeof(Mbarrier) == 8);

EMULATOR_NO_TSAN inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  *barrier = {uint16_t(arrivals), uint16_t(arrivals), 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_wait(Mbarrier* barrier, int phase, int line = __builtin_LINE()) { emulator::wait(line, barrier, phase); }
inline void mbarrier_arrive(Mbarrier* barrier) { emulator::arrive(barrier); }
EMULATOR_NO_TSAN inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  barrier->bytes_and_phase += 2 * bytes;
  emulator::arrive(barrier);
}

EMULATOR_NO_TSAN inline void bulk_copy(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | uintptr_t(bytes)) % 16) {
    emulator::fail("bulk_copy: not 16-byte aligned");
  }
  const emulator::BulkCopy copy{{shared, global, bytes}, barrier};
  emulator::release(barrier);
  if (!emulator::Options::current().lazy_copies) return emulator::land(copy);
  emulator::Unseen unseen;
  emulator::block()->bulk_copies.push_back(copy);
}

template <class S>
void execute_wgmma(const emulator::Product& p) {
  float right[128][16];
  for (int row = 0; row < 128; ++row) {
    for (int k = 0; k < 16; ++k) {
      // The swizzle is of addresses: bits 4 to 6 are those of the piece, bits 7 to 9 the row in its group of eight.
      uintptr_t address = reinterpret_cast<uintptr_t>(p.b) + row / 8 * 1024 + row % 8 * 128 + k * 2;
      address ^= (address >> 7 & 7) << 4;
      S element;
      std::memcpy(&element, reinterpret_cast<const void*>(address), 2);
      right[row][k] = widen(element);
    }
  }
  for (int warp = 0; warp < 4; ++warp) {
    float left[16][16];
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          left[l / 4 + r % 2 * 8][l % 4 * 2 + e + r / 2 * 8] = widen(S{uint16_t(p.a[warp * 32 + l][r] >> (16 * e))});
    for (int l = 0; l < 32; ++l) {
      for (int n = 0; n < 16; ++n) {
        for (int r = 0; r < 4; ++r) {
          float& d = p.d[warp * 32 + l][n][r];
          d = sum_of_products<16>(p.accumulate ? d : 0.0f, left[l / 4 + r / 2 * 8], right[n * 8 + l % 4 * 2 + r % 2]);
        }
      }
    }
  }
}

template <class S>
void wgmma(S, float (&d)[16][4], const uint32_t (&a)[4], const void* b, bool accumulate, int line = __builtin_LINE()) {
  struct Slot {
    float (*d)[4];
    const uint32_t* a;
    const void* b;
    bool accumulate;
  } slot{d, a, b, accumulate};
  emulator::warpgroup_operation("wgmma", line, &slot, [](emulator::Warpgroup& group, void** slots) {
    const Slot& first = *static_cast<Slot*>(slots[0]);
    emulator::Product product = {execute_wgmma<S>, {}, {}, first.b, first.accumulate};
    for (int t = 0; t < 128; ++t) {
      const Slot& s = *static_cast<Slot*>(slots[t]);
      if (s.b != first.b || s.accumulate != first.accumulate) emulator::fail("wgmma: threads do not agree on an operand");
      product.d[t] = s.d;
      product.a[t] = s.a;
    }
    if (!emulator::Options::current().lazy_copies) return product.execute(product);
    group.products.back().push_back(product);
  });
}

inline void wgmma_fence(int line = __builtin_LINE()) {
  emulator::warpgroup_operation("wgmma_fence", line, nullptr, [](emulator::Warpgroup&, void**) {});
}
inline void wgmma_commit(int line = __builtin_LINE()) {
  emulator::warpgroup_operation("wgmma_commit", line, nullptr,
                                [](emulator::Warpgroup& group, void**) { group.products.emplace_back(); });
}
template <int kPending, int kFragments>
void wgmma_wait(float (&)[kFragments][4], int line = __builtin_LINE()) {
  emulator::warpgroup_operation("wgmma_wait", line, nullptr, [](emulator::Warpgroup& group, void**) {
    while (int(group.products.size()) - 1 > kPending) {
      for (const emulator::Product& p : group.products.front()) p.execute(p);
      group.products.erase(group.products.begin());
    }
  });
}

inline void forget(int&) {}
inline int32_t load_relaxed_shared(const int32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline unsigned long long load_relaxed_shared(const unsigned long long* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline unsigned long long load_relaxed(const unsigned long long* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

}  // namespace ptx
}  // namespace deepsim::cuda
