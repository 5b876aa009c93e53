// The CUDA kernels without torch, against plain loops in double: in every dtype, on ragged sizes. By the emulator under many orders
// of threads (test_emulator.py, also from sources with a planted bug; `make sanitize`), and compiled by nvcc (`make gpu-check`).
// What the programs check_<op>.cpp have in common.
//
// Usage: check_<op> <first seed> <number of seeds> [what], where checks are left out whose name does not begin with `what`, for
// example float32 or "float32 wgmma". Stops after the first seed in which something was wrong. Buffers are exactly as large as the
// kernels may touch.
#pragma once

#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "csrc/cuda/batch_hard.h"
#include "csrc/cuda/dispatch.cuh"
#include "device_memory.h"

using namespace deepsim;
using namespace deepsim::cuda;

namespace {

int failures = 0;
std::string selected;

bool wanted(const std::string& name) { return name.compare(0, selected.size(), selected) == 0; }

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

template <class S>
constexpr Storage kStorage = std::is_same_v<S, float>      ? Storage::float32
                             : std::is_same_v<S, double>   ? Storage::float64
                             : std::is_same_v<S, BFloat16> ? Storage::bfloat16
                                                           : Storage::float16;

template <class S>
struct Points {
  int64_t count, depth;
  Buffer<S> x;
  Buffer<int64_t> labels;
  std::vector<double> exact;

  // Classes stand around two points that are `apart` from each other in every coordinate.
  Points(int64_t n, int64_t d, int classes, double shift, std::mt19937& random, double apart = 0)
      : count(n), depth(d), x(n * d), labels(n), exact(n * d) {
    std::normal_distribution<double> normal(shift);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = int64_t(random() % classes);
      labels[i] = label * 1000003 - 5;
      for (int64_t k = i * d; k < (i + 1) * d; ++k) {
        assign(x[k], normal(random) + double(label % 2) * apart);
        exact[k] = value_of(x[k]);
      }
    }
  }

  double square(int64_t i, const Points& other, int64_t j) const {
    double sum = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const double difference = exact[i * depth + k] - other.exact[j * depth + k];
      sum += difference * difference;
    }
    return sum;
  }
};

template <class S>
Batch batch_of(Points<S>& anchors, Points<S>& references, bool self_form, Distance distance, Buffer<Flags>& flags) {
  Batch batch = {};
  batch.storage = kStorage<S>;
  batch.distance = distance;
  batch.self_form = self_form;
  batch.anchors = {anchors.x, anchors.count, anchors.depth, anchors.depth};
  batch.references = {references.x, references.count, references.depth, references.depth};
  batch.labels = anchors.labels;
  batch.reference_labels = references.labels;
  batch.flags = flags;
  return batch;
}

template <class S>
void compare_gradients(Buffer<S>& got, const std::vector<double>& wanted, double tolerance, const std::string& what) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < got.size; ++i) {
    error += std::pow(value_of(got[i]) - wanted[i], 2);
    norm += std::pow(wanted[i], 2);
  }
  expect(std::sqrt(error) <= tolerance * std::sqrt(norm) + 1e-6, what);
}

#if defined(__CUDACC__)
void set_schedule(int, bool) {}  // the GPU has its own
#else
void set_schedule(int seed, bool lazy) { emulator::Options::current() = {unsigned(seed), lazy}; }
#endif

// What a program does: check(random) under every schedule, and the exit status.
template <class Check>
int check_under_schedules(int argc, char** argv, Check check) {
  const int first = argc > 1 ? std::atoi(argv[1]) : 0, count = argc > 2 ? std::atoi(argv[2]) : 1;
  selected = argc > 3 ? argv[3] : "";
  try {
    for (int seed = first; seed < first + count && failures == 0; ++seed) {
      for (const bool lazy : {true, false}) {
        set_schedule(seed, lazy);
        std::mt19937 random(seed);
        check(random);
      }
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d wrong in %d seeds\n", failures, count);
  return failures != 0;
}

// Calls check(a value of the storage's element type, its name) for each.
template <class Check>
void for_each_storage(Check check) {
  check(float{}, std::string("float32"));
  check(double{}, std::string("float64"));
  check(BFloat16{}, std::string("bfloat16"));
  check(Half{}, std::string("float16"));
}

}  // namespace
