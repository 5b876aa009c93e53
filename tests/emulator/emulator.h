// Runs CUDA device code on the CPU: every thread of a block is a fiber, and every core runs one block after another.
//
// What it is for is finding what a GPU would only sometimes show. Threads run in an order drawn from a seed and change over only
// where they meet; asynchronous copies and products land as late as the code allows (or at once); shared memory starts as NaN.
// Threads that wait at different barriers, lanes that reach different warp operations, and waiting that nobody can end are reported
// with the lines where they stand. Built with ASan it finds accesses out of bounds, with TSan missing synchronisation: fibers are
// announced to both, and only barriers and warp operations count as synchronisation.
//
// Not shown: what PTX text means, weak memory order, how a tensor core rounds (see ptx.h), speed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

// Where a seed and the landing of copies come from: set by a test, or EMULATOR_SEED and EMULATOR_EAGER=1.
struct Options {
  unsigned seed = 0;
  bool lazy_copies = true;

  static Options& current() {
    static Options options = [] {
      const char *seed = std::getenv("EMULATOR_SEED"), *eager = std::getenv("EMULATOR_EAGER");
      return Options{seed ? unsigned(std::atoi(seed)) : 0u, !(eager && *eager == '1')};
    }();
    return options;
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// One phase of an mbarrier: over when as many threads have arrived as are to, and no bytes are outstanding.
struct Mbarrier {
  uint16_t arrivals, missing;
  int32_t bytes_and_phase;  // twice the bytes outstanding, plus the phase's parity: eight bytes in all, as on the GPU

  EMULATOR_NO_TSAN bool is_over(int phase) const { return (bytes_and_phase & 1) != (phase & 1); }
  EMULATOR_NO_TSAN void step() {
    if (missing != 0 || bytes_and_phase > 1 || bytes_and_phase < 0) return;
    missing = arrivals;
    bytes_and_phase ^= 1;
  }
};

struct BulkCopy {
  Copy copy;
  Mbarrier* barrier;
};

// A product of a warpgroup that has been started: carried out at the latest when it is waited for.
struct Product {
  void (*execute)(const Product&);
  float (*d[128])[4];
  const uint32_t* a[128];
  const void* b;
  bool accumulate;
};

enum class State { ready, at_barrier, at_mbarrier, at_group_operation, done };

struct Thread {
  Fiber fiber;
  State state = State::ready;
  int index = 0;
  bool fenced = false;  // since its last atomic addition
  const char* where = "";
  int line = 0;
  std::vector<std::vector<Copy>> copies;  // committed groups, then the one that is open
  const Mbarrier* mbarrier = nullptr;     // waited for
  int phase = 0;

  EMULATOR_NO_TSAN int lane() const { return index % 32; }
};

// What stands for a place where threads wait for each other before TSan: two addresses by turns. With one, whoever leaves late
// would also come after what others did when they had left, and TSan would miss that they race.
struct Turns {
  int64_t turn[2] = {};
  unsigned over = 0;

  EMULATOR_NO_TSAN const int64_t* current() const { return &turn[over % 2]; }
};

// Threads of a warp or a warpgroup that wait for the others at the same operation.
struct Meeting {
  Turns turns;
  const char* operation = "";
  int line = 0;
  unsigned mask = 0;  // of the lanes, in each of the warps
  int arrived = 0;
  void* slot[128] = {};
};

struct Warpgroup {
  Meeting meeting;
  std::vector<std::vector<Product>> products;  // committed groups, then the one that is open
};

// Some of what fibers of a block share. TSan would look at each access by way of a vector.
template <class T>
struct Shared {
  T* first = nullptr;
  int count = 0;

  EMULATOR_NO_TSAN T* begin() const { return first; }
  EMULATOR_NO_TSAN T* end() const { return first + count; }
  EMULATOR_NO_TSAN T& operator[](int i) const { return first[i]; }
};

struct Block {
  Dim3 index, grid, size;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Shared<Thread> threads;
  Shared<Meeting> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<BulkCopy> bulk_copies;  // on their way
  Thread* running = nullptr;
  Fiber scheduler;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  uint32_t random = 0;
  Turns barrier;
  int64_t beginning = 0, end = 0;  // before TSan

  EMULATOR_NO_TSAN uint32_t draw(uint32_t below) {
    random = random * 1664525u + 1013904223u;
    return uint32_t(uint64_t(random) * below >> 32);  // by the high bits: the low ones repeat after a few draws
  }
};

EMULATOR_NO_TSAN inline Block*& block() {
  static thread_local Block* current = nullptr;
  return current;
}

EMULATOR_NO_TSAN inline void to_scheduler() {
  Thread& t = *block()->running;
  t.fiber.switch_to(block()->scheduler, t.state == State::done);
}

[[noreturn]] EMULATOR_NO_TSAN inline void fail(const std::string& what) {
  Block& b = *block();
  if (b.error.empty()) {
    b.error = what + " [block " + std::to_string(b.index.x) + ", thread " + std::to_string(b.running->index) + "]";
  }
  b.running->state = State::done;
  to_scheduler();
  std::abort();
}

EMULATOR_NO_TSAN inline void thread_main() {
  Fiber::entered();
  Block& b = *block();
  acquire(&b.beginning);
  b.entry(b.argument);
  release(&b.end);
  block()->running->state = State::done;
  to_scheduler();
  std::abort();
}

EMULATOR_NO_TSAN inline void resume(Block& b, Thread& t) {
  b.running = &t;
  b.scheduler.switch_to(t.fiber, false);
  if (!b.error.empty()) throw std::runtime_error(b.error);
}

EMULATOR_NO_TSAN inline std::string place(const Thread& t) {
  return t.state == State::done ? "have returned" : std::string("wait at ") + t.where + " in line " + std::to_string(t.line);
}

// All live threads at the barrier, at the same one: on they go. False if that is not so yet.
EMULATOR_NO_TSAN inline bool release_barrier(Block& b) {
  const Thread* first = nullptr;
  for (const Thread& t : b.threads) {
    if (t.state != State::at_barrier && t.state != State::done) return false;
    if (t.state == State::at_barrier && first == nullptr) first = &t;
  }
  if (first == nullptr) return false;
  for (const Thread& t : b.threads) {
    if (t.state == State::done || t.line != first->line) {
      throw std::runtime_error("divergent __syncthreads: threads " + place(*first) + ", others " + place(t));
    }
  }
  for (Thread& t : b.threads) t.state = State::ready;
  ++b.barrier.over;
  return true;
}

EMULATOR_NO_TSAN inline bool can_run(Thread& t) {
  if (t.state == State::at_mbarrier && t.mbarrier->is_over(t.phase)) t.state = State::ready;
  return t.state == State::ready;
}

EMULATOR_NO_TSAN inline void land(const BulkCopy& c) {
  acquire(c.barrier);
  std::memcpy(c.copy.to, c.copy.from, c.copy.bytes);
  release(c.barrier);
  c.barrier->bytes_and_phase -= 2 * c.copy.bytes;
  c.barrier->step();
}

// Lets one of the copies that are on their way arrive. False if there is none.
EMULATOR_NO_TSAN inline bool land_one(Block& b, unsigned seed) {
  BulkCopy c;
  {
    Unseen unseen;
    if (b.bulk_copies.empty()) return false;
    const size_t which = seed == 0 ? 0 : b.draw(uint32_t(b.bulk_copies.size()));
    c = b.bulk_copies[which];
    b.bulk_copies.erase(b.bulk_copies.begin() + ptrdiff_t(which));
  }
  land(c);
  return true;
}

// Even seeds shuffle the threads at every turn (0: in their order); odd seeds draw an order of warps once, and the first warp
// that can run goes as far ahead of the others as it is able to before they are looked at again.
EMULATOR_NO_TSAN inline std::vector<Thread*> first_order(Block& b, unsigned seed) {
  std::vector<int> warps(b.warps.count);
  std::vector<Thread*> order;
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = int(w);
  if (seed % 2 == 1) {
    for (size_t w = warps.size(); w > 1; --w) std::swap(warps[w - 1], warps[b.draw(uint32_t(w))]);
  }
  for (int w : warps)
    for (int i = w * 32; i < std::min((w + 1) * 32, b.threads.count); ++i) order.push_back(&b.threads[i]);
  return order;
}

// The warp that begins at `first`, until none of it can go on. False if none could.
EMULATOR_NO_TSAN inline bool run_warp(Block& b, const Shared<Thread*>& order, int first) {
  bool ran = false, again = true;
  while (again) {
    again = false;
    for (int k = first; k < first + 32 && k < order.count; ++k) {
      if (!can_run(*order[k])) continue;
      resume(b, *order[k]);
      ran = again = true;
    }
  }
  return ran;
}

EMULATOR_NO_TSAN inline void run_block(Block& b, unsigned seed) {
  const int count = int(b.size.x);
  b.random = seed * 2654435761u + b.index.x * 40503u + 12345u;
  for (Meeting& m : b.warps) m = {};
  b.warpgroups.assign((count + 127) / 128, Warpgroup{{}, std::vector<std::vector<Product>>(1)});
  b.bulk_copies.clear();
  for (int i = 0; i < count; ++i) {
    Thread& t = b.threads[i];
    t.state = State::ready;
    t.index = i;
    t.fenced = false;
    t.copies.assign(1, {});
    t.fiber.start(&thread_main);
  }
  std::memset(b.shared, 0xff, b.shared_bytes);  // NaN in every floating format
  release(&b.beginning);
  std::vector<Thread*> drawn = first_order(b, seed);
  const Shared<Thread*> order{drawn.data(), count};
  for (;;) {
    bool ran = false;
    if (seed % 2 == 1) {
      for (int first = 0; first < count; first += 32) {
        if (!run_warp(b, order, first)) continue;
        ran = true;
        first = -32;  // back to the first warp
      }
    } else {
      if (seed != 0) {
        for (int k = count; k > 1; --k) std::swap(order[k - 1], order[b.draw(uint32_t(k))]);
      }
      for (Thread* t : order) {
        if (!can_run(*t)) continue;
        resume(b, *t);
        ran = true;
      }
    }
    bool all_done = true;
    for (const Thread& t : b.threads) all_done &= t.state == State::done;
    if (all_done) break;
    if (release_barrier(b) || ran || land_one(b, seed)) continue;
    std::map<std::string, int> places;
    for (const Thread& t : b.threads) ++places[place(t)];
    std::string stuck = "deadlock:";
    for (const auto& [place, count] : places) stuck += " " + std::to_string(count) + " threads " + place + ";";
    throw std::runtime_error(stuck);
  }
  acquire(&b.end);
}

// Runs kernel() in every thread of one block after another, as long as `next` has any, and returns what went wrong.
template <class Kernel>
std::string run_blocks(std::atomic<int64_t>& next, int64_t blocks, int threads, size_t shared_bytes, Kernel kernel) {
  Block b;
  b.grid.x = unsigned(blocks);
  b.size.x = unsigned(threads);
  b.shared_bytes = shared_bytes;
  std::vector<Thread> all_threads(threads);
  std::vector<Meeting> all_warps((threads + 31) / 32);
  b.threads = {all_threads.data(), threads};
  b.warps = {all_warps.data(), int(all_warps.size())};
  for (Thread& t : b.threads) IdleFibers::take(t.fiber);
  b.scheduler.adopt_caller();
  // Exactly as large as asked for, so that ASan sees an access behind it.
  const size_t allocated = (shared_bytes + 1024) / 1024 * 1024;
  b.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, allocated));
  poison(b.shared + shared_bytes, allocated - shared_bytes);
  b.argument = &kernel;
  b.entry = [](void* k) { (*static_cast<Kernel*>(k))(); };
  block() = &b;
  std::string error;
  try {
    for (int64_t i = next++; i < blocks; i = next++) {
      b.index.x = unsigned(i);
      run_block(b, Options::current().seed);
    }
  } catch (const std::exception& e) {
    error = e.what();
  }
  block() = nullptr;
  unpoison(b.shared, allocated);
  std::free(b.shared);
  for (const Thread& t : b.threads) IdleFibers::give_back(t.fiber);
  return error;
}

// All blocks, shared out among the processor's cores; throws what went wrong first.
template <class Kernel>
void launch(int64_t blocks, int threads, size_t shared_bytes, Kernel kernel) {
  const int64_t workers = std::min<int64_t>(blocks, std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<int64_t> next{0};
  std::vector<std::string> errors(workers);
  std::vector<std::thread> others;
  for (int64_t w = 1; w < workers; ++w) {
    others.emplace_back([&, w] { errors[w] = run_blocks(next, blocks, threads, shared_bytes, kernel); });
  }
  errors[0] = run_blocks(next, blocks, threads, shared_bytes, kernel);
  for (std::thread& t : others) t.join();
  for (const std::string& error : errors)
    if (!error.empty()) throw std::runtime_error("emulator: " + error);
}

EMULATOR_NO_TSAN inline void barrier(int line) {
  Thread& t = *block()->running;
  t.state = State::at_barrier;
  t.where = "__syncthreads";
  t.line = line;
  const int64_t* turn = block()->barrier.current();
  release(turn);
  to_scheduler();
  acquire(turn);
}

// Threads come together at one operation: the lanes of `mask` of each of the warps from thread `first` on. The last to arrive carries
// it out on what all of them brought.
template <class Execute>
EMULATOR_NO_TSAN void meet(Meeting& m, int first, int size, const char* operation, int line, unsigned mask, void* slot,
                           Execute execute) {
  Block& b = *block();
  Thread& t = *b.running;
  if (!(mask >> t.lane() & 1)) fail(std::string(operation) + ": a lane that is not in its own mask");
  if (m.arrived == 0) {
    m.operation = operation;
    m.line = line;
    m.mask = mask;
  } else if ((m.operation != operation && std::strcmp(m.operation, operation) != 0) || m.line != line || m.mask != mask) {
    fail(std::string("divergent warp: ") + operation + " in line " + std::to_string(line) + ", other lanes at " + m.operation +
         " in line " + std::to_string(m.line));
  }
  ++m.arrived;
  m.slot[t.index - first] = slot;
  const int64_t* turn = m.turns.current();
  release(turn);
  if (m.arrived != __builtin_popcount(mask) * (size / 32)) {
    t.state = State::at_group_operation;
    t.where = operation;
    t.line = line;
    to_scheduler();
    acquire(turn);
    return;
  }
  acquire(turn);
  execute(m.slot);
  m.arrived = 0;
  ++m.turns.over;
  release(turn);
  for (int i = first; i < first + size && i < b.threads.count; ++i) {
    if (b.threads[i].state == State::at_group_operation && (mask >> (i % 32) & 1)) b.threads[i].state = State::ready;
  }
}

template <class Execute>
EMULATOR_NO_TSAN void warp_operation(const char* operation, int line, unsigned mask, void* slot, Execute execute) {
  const int warp = block()->running->index / 32;
  meet(block()->warps[warp], warp * 32, 32, operation, line, mask, slot, execute);
}

// execute(group, slots)
template <class Execute>
EMULATOR_NO_TSAN void warpgroup_operation(const char* operation, int line, void* slot, Execute execute) {
  const int index = block()->running->index / 128;
  if ((index + 1) * 128 > block()->threads.count) fail(std::string(operation) + ": not in a whole warpgroup");
  Warpgroup& group = block()->warpgroups[index];
  meet(group.meeting, index * 128, 128, operation, line, ~0u, slot, [&](void** slots) { execute(group, slots); });
}

EMULATOR_NO_TSAN inline void arrive(Mbarrier* m) {
  release(m);
  if (m->missing == 0) fail("mbarrier: more threads arrive than it was initialised with");
  --m->missing;
  m->step();
}

EMULATOR_NO_TSAN inline void wait(int line, const Mbarrier* m, int phase) {
  Thread& t = *block()->running;
  if (!m->is_over(phase)) {
    t.state = State::at_mbarrier;
    t.where = "mbarrier_wait";
    t.line = line;
    t.mbarrier = m;
    t.phase = phase;
    to_scheduler();
  }
  acquire(m);
}

}  // namespace emulator

#include "cuda_builtins.h"
#include "ptx.h"
