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

namespace ptx {

inline void cp_async_16(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16) {
    emulator::fail("cp_async_16: not 16-byte aligned");
  }
  const emulator::Copy copy{shared, global, 16};
  if (emulator::Options::current().lazy_copies) {
    emulator::block()->running->copies.back().push_back(copy);
  } else {
    std::memcpy(shared, global, 16);
  }
}
inline void cp_async_commit() { emulator::block()->running->copies.emplace_back(); }
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::block()->running->copies;
  while (int(groups.size()) - 1 > kPending) {
    for (const emulator::Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}

inline void ldmatrix_x4_at(int line, uint32_t (&r)[4], const void* row) {
  struct Slot {
    const unsigned char* row;
    uint32_t* r;
  } slot{static_cast<const unsigned char*>(row), r};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: not 16-byte aligned");
  emulator::warp_operation("ldmatrix", line, ~0u, &slot, [](void** slots) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int l = 0; l < 32; ++l)
        std::memcpy(&static_cast<Slot*>(slots[l])->r[matrix], static_cast<Slot*>(slots[matrix * 8 + l / 4])->row + l % 4 * 4, 4);
  });
}

// The nearest float at or below |v|: tensor cores cut sums off.
inline float toward_zero(double v) {
  const float f = float(v);
  return std::fabs(double(f)) > std::fabs(v) ? __uint_as_float(__float_as_uint(f) - 1) : f;
}

template <class S>
void mma_at(int line, S, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
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
        for (int k = 0; k < 16; k += 8) {  // eight products at a time, as if in one sum
          double sum = s.d[r];
          for (int i = k; i < k + 8; ++i) sum += double(x[i]) * double(y[i]);
          s.d[r] = toward_zero(sum);
        }
      }
    }
  });
}

inline void mma_tf32_at(int line, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
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
        for (int k = 0; k < 8; k += 4) {  // four products at a time
          double sum = s.d[r];
          for (int i = k; i < k + 4; ++i) sum += double(x[i]) * double(y[i]);
          s.d[r] = toward_zero(sum);
        }
      }
    }
  });
}

#define mma_tf32(d, a, b) mma_tf32_at(__LINE__, d, a, b)
#define ldmatrix_x4(r, row) ldmatrix_x4_at(__LINE__, r, row)
#define mma(type, d, a, b) mma_at(__LINE__, type, d, a, b)

inline unsigned long long load_relaxed(const unsigned long long* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

}  // namespace ptx
}  // namespace deepsim::cuda
