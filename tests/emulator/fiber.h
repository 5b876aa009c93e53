// A stack that can be switched to and from (x86-64), announced to the sanitizers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATOR_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define EMULATOR_NO_TSAN
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif

// void emulator_switch(void** save, void* load): pushes what a function must preserve, keeps the stack pointer in *save and goes
// on where `load` was kept.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.weak emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {

// Everything before release(p) happens before everything after a later acquire(p).
EMULATOR_NO_TSAN inline void release([[maybe_unused]] const void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<void*>(p));
#endif
}
EMULATOR_NO_TSAN inline void acquire([[maybe_unused]] const void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(p));
#endif
}

// The emulator's own lists, which fibers of one block share and which are not what TSan is to look at.
#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
struct Unseen {
  Unseen() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
#endif
  }
  ~Unseen() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
#endif
  }
};

inline void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

struct Fiber {
  static constexpr size_t kStackBytes = 256 * 1024;

  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* caller_stack = nullptr;  // learnt when the caller is left
  size_t caller_bytes = 0;
  static inline thread_local Fiber* left = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif

  void allocate() {
    stack_bytes = kStackBytes;
    stack = static_cast<char*>(std::malloc(kStackBytes));
#if defined(__SANITIZE_THREAD__)
    tsan = __tsan_create_fiber(0);
#endif
  }

  // What ASan knows of the functions that were not returned from when the fiber was left for good.
  EMULATOR_NO_TSAN void forget_frames() {
    if (stack_pointer) unpoison(stack_pointer, size_t(stack + stack_bytes - static_cast<char*>(stack_pointer)));
  }

  void free() {
    forget_frames();
    std::free(stack);
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan);
#endif
  }

  void adopt_caller() {
#if defined(__SANITIZE_THREAD__)
    tsan = __tsan_get_current_fiber();
#endif
  }

  // Makes the next switch to this fiber call `entry`, which must not return.
  EMULATOR_NO_TSAN void start(void (*entry)()) {
    forget_frames();
    // As a call of entry would leave it: rsp + 8 is a multiple of 16 at its first instruction.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t(15)) - 8;
    for (int i = 0; i < 6; ++i) top[i] = nullptr;  // the six registers
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer = top;
  }

  // Leaves this fiber, for good if `finished`, for `next`.
  EMULATOR_NO_TSAN void switch_to(Fiber& next, [[maybe_unused]] bool finished) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    left = this;
    __sanitizer_start_switch_fiber(finished ? nullptr : &fake, next.stack ? next.stack : next.caller_stack,
                                   next.stack ? next.stack_bytes : next.caller_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(next.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    emulator_switch(&stack_pointer, next.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    arrived(fake);
#endif
  }

  // To be called first by an entry.
  EMULATOR_NO_TSAN static void entered() {
#if defined(__SANITIZE_ADDRESS__)
    arrived(nullptr);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  static void arrived(void* fake) {
    const void* from = nullptr;
    size_t bytes = 0;
    Fiber* previous = left;
    __sanitizer_finish_switch_fiber(fake, &from, &bytes);
    if (previous->stack == nullptr) {
      previous->caller_stack = from;
      previous->caller_bytes = bytes;
    }
  }
#endif
};

// Fibers that nobody runs now. To make one takes longer, above all with a sanitizer, than most kernels take to run in it.
class IdleFibers {
 public:
  static void take(Fiber& fiber) {
    const std::lock_guard<std::mutex> lock(idle().mutex_);
    std::vector<Fiber>& fibers = idle().fibers_;
    if (fibers.empty()) return fiber.allocate();
    fiber = fibers.back();
    fibers.pop_back();
  }

  static void give_back(const Fiber& fiber) {
    const std::lock_guard<std::mutex> lock(idle().mutex_);
    idle().fibers_.push_back(fiber);
  }

 private:
  ~IdleFibers() {
    for (Fiber& fiber : fibers_) fiber.free();
  }

  static IdleFibers& idle() {
    static IdleFibers idle;
    return idle;
  }

  std::mutex mutex_;
  std::vector<Fiber> fibers_;
};

}  // namespace emulator
