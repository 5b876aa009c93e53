// A small fixed case of each of the two main CPU kernels, for counting its instructions: `instructions mine | gram | nothing`.
//
// With AVX2, as valgrind knows nothing newer.
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/cpu/kernels.h"

using namespace deepsim::cpu;

namespace {

std::vector<float> random_numbers(int64_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = normal(random);
  return numbers;
}

// 192 rows of 128 columns, classes of four; every tile of the upper triangle.
void mine(const Kernels<float>& kernels, bool run) {
  constexpr int64_t kRows = 192, kDepth = 128;
  const int64_t width = kernels.panel_rows, panels = kRows / width;
  std::vector<float> packed = random_numbers(kRows * kDepth), half_norm(kRows);
  std::vector<int32_t> original(kRows), begin(kRows), end(kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    double square = 0;
    for (int64_t k = 0; k < kDepth; ++k) {
      const double v = packed[(i / width * kDepth + k) * width + i % width];
      square += v * v;
    }
    half_norm[i] = float(square / 2);
    original[i] = int32_t(i * 7919 % kRows);
    begin[i] = int32_t(i / 4 * 4);
    end[i] = begin[i] + 4;
  }
  const PackedRows<float> rows{packed.data(), half_norm.data(), original.data(), kDepth};
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> negative(kRows, kInfinity), positive(kRows, -kInfinity);
  std::vector<int32_t> negative_index(kRows, INT32_MAX), positive_index(kRows, INT32_MAX);
  const Extremes<float> best{negative.data(), positive.data(), negative_index.data(), positive_index.data()};
  if (run) kernels.mine({{rows, rows, begin.data(), end.data(), kRows, 0, panels, 0, panels, true}, best, best});
}

// 96 channels of 1024 positions.
void gram(const Kernels<float>& kernels, bool run) {
  constexpr int64_t kChannels = 96, kPositions = 1024;
  const int64_t width = kernels.panel_rows, panels = (kChannels + width - 1) / width;
  const std::vector<float> features = random_numbers(kChannels * kPositions);
  std::vector<float> scratch(kernels.gram_scratch(kChannels)), tiles(panels * (panels + 1) / 2 * width * width);
  if (run) kernels.gram({features.data(), kChannels, 0, kPositions, kPositions, 1}, scratch.data(), tiles.data());
}

}  // namespace

int main(int argc, char** argv) {
  const char* what = argc > 1 ? argv[1] : "";
  mine(avx2_kernels.float32, std::strcmp(what, "mine") == 0);
  gram(avx2_kernels.float32, std::strcmp(what, "gram") == 0);
}
