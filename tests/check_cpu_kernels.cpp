// The CPU kernels (csrc/cpu/kernels.h) without torch, every instruction set that this processor has, work shared out among threads as
// the ops do it. Built with sanitizers by `make sanitize`: buffers are exactly as large as the kernels may touch, and threads
// write what lies side by side.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cpu/kernels.h"

using namespace deepsim;
using namespace deepsim::cpu;

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

// Calls f(begin, end) for three ranges of [0, count) at a time.
template <class F>
void in_threads(int64_t count, F f) {
  constexpr int kThreads = 3;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    const int64_t begin = count * t / kThreads, end = count * (t + 1) / kThreads;
    if (begin < end) threads.emplace_back([=] { f(begin, end); });
  }
  for (std::thread& t : threads) t.join();
}

template <class T>
std::vector<T> normal(int64_t count, std::mt19937& random) {
  std::normal_distribution<double> draw(0.5);
  std::vector<T> v(count);
  for (T& x : v) x = T(draw(random));
  return v;
}

// Normal points in classes of three adjacent rows, packed in their order.
template <class T>
struct Points {
  Points(const Kernels<T>& kernels, int64_t n, int64_t depth, std::mt19937& random)
      : n(n),
        depth(depth),
        panels((n + kernels.panel_rows - 1) / kernels.panel_rows),
        padded(panels * kernels.panel_rows),
        x(normal<T>(n * depth, random)),
        rows{x.data(), n, depth, depth},
        begin(n),
        end(n),
        panel_buffer(padded * depth),
        half_norm(padded),
        original(padded),
        packed{panel_buffer.data(), half_norm.data(), original.data(), depth} {
    std::vector<double> sums(depth), norms(n);
    kernels.column_sums(rows, nullptr, 0, n, sums.data());
    std::vector<T> centre;
    for (const double sum : sums) centre.push_back(T(sum / double(n)));
    in_threads(n, [&](int64_t begin, int64_t end) { kernels.norms(rows, begin, end, norms.data()); });
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = 0; i < n; ++i) begin[i] = int32_t(i / 3 * 3), end[i] = int32_t(std::min(n, i / 3 * 3 + 3));
    in_threads(panels, [&](int64_t b, int64_t e) { kernels.pack(rows, {order.data(), centre.data(), nullptr}, b, e, packed); });
  }

  double square(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum += std::pow(double(x[i * depth + k]) - double(x[j * depth + k]), 2);
    return sum;
  }

  TileBlock<T> tiles(int64_t first_panel, int64_t last_panel) const {
    return {packed, packed, begin.data(), end.data(), n, first_panel, last_panel, 0, panels, true};
  }

  int64_t n, depth, panels, padded;
  std::vector<T> x;
  Rows rows;
  std::vector<int32_t> begin, end;
  std::vector<T> panel_buffer, half_norm;
  std::vector<int32_t> original;
  PackedRows<T> packed;
};

template <class T>
void check_batch_hard(const std::string& name, const Kernels<T>& kernels, int64_t n, int64_t depth, std::mt19937& random) {
  const Points<T> points(kernels, n, depth, random);
  const Rows& rows = points.rows;
  const auto square = [&](int64_t i, int64_t j) { return points.square(i, j); };
  const int64_t padded = points.padded;

  const T infinity = std::numeric_limits<T>::infinity();
  std::vector<T> smallest(padded, infinity), largest(padded, -infinity);
  std::vector<int32_t> negatives(padded, INT32_MAX), positives(padded, INT32_MAX);
  const Extremes<T> best{smallest.data(), largest.data(), negatives.data(), positives.data()};
  kernels.mine({points.tiles(0, points.panels), best, best, false});
  for (int64_t i = 0; i < n; ++i) {
    double nearest = 1e300, farthest = -1;
    for (int64_t j = 0; j < n; ++j) {
      if (i / 3 != j / 3) nearest = std::min(nearest, square(i, j));
      if (i / 3 == j / 3 && i != j) farthest = std::max(farthest, square(i, j));
    }
    const auto right = [&](int32_t chosen, bool same, double wanted) {
      return chosen >= 0 && chosen < n && (chosen / 3 == i / 3) == same && std::fabs(square(i, chosen) - wanted) < 1e-4;
    };
    expect(right(negatives[i], false, nearest), name + ": negative of " + std::to_string(i));
    expect(farthest < 0 || right(positives[i], true, farthest), name + ": positive of " + std::to_string(i));
    if (farthest < 0) negatives[i] = positives[i] = -1;
  }

  std::vector<T> d_ap(n), d_an(n), coefficient(n, T(0.5));
  in_threads(n, [&](int64_t b, int64_t e) {
    kernels.triplet_distances(rows, rows, positives.data(), negatives.data(), Distance::euclidean, b, e, d_ap.data(), d_an.data());
  });
  std::vector<int64_t> use_begin(n + 1);
  std::vector<int32_t> uses;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t a = 0; a < n; ++a) {
      if (positives[a] == j) uses.push_back(int32_t(2 * a));
      if (negatives[a] == j) uses.push_back(int32_t(2 * a + 1));
    }
    use_begin[j + 1] = int64_t(uses.size());
  }
  const TripletGradient<T> gradient{rows,    rows,    positives.data(), negatives.data(), d_ap.data(), d_an.data(), coefficient.data(),
                                    nullptr, nullptr, use_begin.data(), uses.data(),      Distance::euclidean};
  std::vector<T> grad(n * depth);
  in_threads(n, [&](int64_t b, int64_t e) {
    std::vector<T> row(depth);
    kernels.self_gradient(gradient, b, e, row.data(), grad.data());
  });
  double sum = 0;  // moving all points together changes no distance
  for (T g : grad) sum += double(g);
  expect(std::fabs(sum) < 1e-3, name + ": gradient");
}

template <class T>
void keep_nearest(T* value, int32_t* index, int32_t* count, T* limit, int64_t k) {
  std::vector<std::pair<T, int32_t>> candidates;
  for (int32_t i = 0; i < *count; ++i) candidates.emplace_back(value[i], index[i]);
  std::sort(candidates.begin(), candidates.end());
  if (*count > k) candidates.resize(k), *limit = candidates.back().first;
  *count = int32_t(candidates.size());
  for (int32_t i = 0; i < *count; ++i) value[i] = candidates[i].first, index[i] = candidates[i].second;
}

// The losses of all pairs and the search for neighbours. `filling` elements of -inf lengthen the lists of positives.
template <class T>
void check_all_pairs(const std::string& name, const Kernels<T>& kernels, int64_t n, int64_t depth, int64_t filling,
                     std::mt19937& random) {
  const Points<T> points(kernels, n, depth, random);
  const TileBlock<T> tiles = points.tiles(0, points.panels);
  const int64_t width = kernels.panel_rows, longest = 2 + filling;
  const auto distance = [&](int64_t i, int64_t j) { return T(std::sqrt(points.square(i, j))); };
  const auto at = [&](int64_t row, int64_t s) { return row / width * longest * width + s * width + row % width; };

  std::vector<int64_t> list_begin(points.panels + 1);
  for (int64_t i = 0; i <= points.panels; ++i) list_begin[i] = i * longest * width;
  std::vector<T> positives(list_begin.back(), -std::numeric_limits<T>::infinity()), active(positives.size()), count(points.padded);
  in_threads(points.panels, [&](int64_t b, int64_t e) {
    kernels.positive_distances(points.tiles(b, e), Distance::euclidean, list_begin.data(), positives.data());
  });
  for (int64_t i = 0; i < n; ++i) {
    count[i] = T(points.end[i] - points.begin[i] - 1);
    for (int64_t j = points.begin[i], s = 0; j < points.end[i]; ++j) {
      if (j != i) expect(std::fabs(positives[at(i, s++)] - distance(i, j)) < 1e-4, name + ": positive distances");
    }
    if (positives[at(i, 0)] < positives[at(i, 1)]) std::swap(positives[at(i, 0)], positives[at(i, 1)]);
  }

  constexpr double kMargin = 1;
  int64_t triplets = 0, pairs = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (i / 3 == j / 3) continue;
      pairs += distance(i, j) < std::sqrt(2.0 * double(depth));
      for (int64_t s = 0; s < int64_t(count[i]); ++s) triplets += double(positives[at(i, s)]) + kMargin > double(distance(i, j));
    }
  }
  const int64_t gathered_size = points.padded * gathered_depth(depth);
  const auto complete = [&](const std::vector<T>& gathered, int64_t i, int64_t c) {
    const T* panel = &gathered[i / width * gathered_depth(depth) * width + i % width];
    return double(panel[c * width] + panel[depth * width] * points.panel_buffer[(i / width * depth + c) * width + i % width]);
  };
  const auto balanced = [&](const std::vector<T>& gathered) {
    double sum = 0, size = 0;  // moving all points together changes no distance
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < depth; ++c) sum += complete(gathered, i, c), size += std::fabs(complete(gathered, i, c));
    return size > 0 && std::fabs(sum) < 1e-4 * size;
  };
  const SortedPositives<T> lists{list_begin.data(), positives.data(), active.data(), count.data()};
  for (const bool semi_hard : {true, false}) {
    std::vector<T> gradient(gathered_size);
    BatchAllSums sums;
    std::fill(active.begin(), active.end(), T(0));
    kernels.batch_all({tiles, lists, lists, T(kMargin), semi_hard, Distance::euclidean, gradient.data(), gradient.data()}, sums);
    expect(semi_hard ? sums.active <= triplets : std::llabs(sums.active - triplets) <= 1, name + ": batch-all");
    expect(balanced(gradient), name + ": gradient of batch-all");
  }
  std::vector<T> gradient(gathered_size);
  ContrastiveSums sums;
  kernels.contrastive_negatives(
      {tiles, T(std::sqrt(2.0 * double(depth))), true, Distance::euclidean, gradient.data(), gradient.data()}, sums);
  expect(std::llabs(sums.active - pairs) <= 2, name + ": contrastive");
  expect(balanced(gradient), name + ": gradient of contrastive");

  std::vector<T> nearest(positives.size(), std::numeric_limits<T>::max()), farthest(points.padded, T(-1));
  std::vector<int32_t> nearest_index(positives.size(), INT32_MAX), farthest_index(points.padded, INT32_MAX);
  const SemiHardLists<T> semi_hard{list_begin.data(),    positives.data(), nearest.data(),
                                   nearest_index.data(), farthest.data(),  farthest_index.data()};
  kernels.semi_hard({tiles, semi_hard, semi_hard, Distance::euclidean});
  for (int64_t i = 0; i < n; ++i) {
    T found = std::numeric_limits<T>::max();
    for (int64_t s = 0; s < int64_t(count[i]); ++s) {
      T wanted = std::numeric_limits<T>::max();
      for (int64_t j = 0; j < n; ++j)
        if (i / 3 != j / 3 && distance(i, j) > positives[at(i, s)]) wanted = std::min(wanted, distance(i, j));
      found = std::min(found, nearest[at(i, s)]);
      expect(wanted == found || std::fabs(wanted - found) < 1e-3, name + ": semi-hard");
    }
  }

  const int64_t k = std::min<int64_t>(5, n - 3), capacity = 2 * k + 2 * width;
  std::vector<T> value(points.padded * capacity), limit(points.padded, std::numeric_limits<T>::max());
  std::vector<int32_t> index(value.size()), found(points.padded);
  const NeighborLists<T> neighbors{value.data(), index.data(), found.data(), limit.data(), k, capacity, keep_nearest<T>};
  kernels.nearest_neighbors({tiles, neighbors, neighbors});
  for (int64_t i = 0; i < n; ++i) {
    keep_nearest(&value[i * capacity], &index[i * capacity], &found[i], &limit[i], k);
    std::vector<T> wanted, got;
    for (int64_t j = 0; j < n; ++j)
      if (i / 3 != j / 3) wanted.push_back(distance(i, j));
    std::sort(wanted.begin(), wanted.end());
    for (int64_t s = 0; s < k; ++s) {
      const int64_t j = index[i * capacity + s];
      expect(found[i] == k && std::fabs(distance(i, j) - wanted[s]) < 1e-4, name + ": neighbours");
    }
  }

  // Every row with the next one, on top of what contrastive_negatives has gathered.
  std::vector<int32_t> row(n), next(n);
  std::vector<T> d(n), grad(n * depth);
  for (int64_t i = 0; i < n; ++i) row[i] = int32_t(i), next[i] = int32_t((i + 1) % n);
  in_threads(n, [&](int64_t b, int64_t e) {
    kernels.pair_distances(points.rows, points.rows, row.data(), next.data(), Distance::euclidean, b, e, d.data());
  });
  for (int64_t i = 0; i < n; ++i) expect(std::fabs(d[i] - distance(i, next[i])) < 1e-5, name + ": pair distances");
  const PairSides sides{points.rows, points.rows, nullptr, nullptr, Distance::euclidean};
  const GatheredRows<T> gathered{points.rows, nullptr, points.original.data(), gradient.data(), points.panel_buffer.data(), T(1), T(1),
                                 Distance::euclidean};
  in_threads(n, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const ListedPair<T> pair{next[i], d[i], T(1)};
      kernels.pair_gradient(sides, i, &pair, 1, &grad[i * depth]);
    }
  });
  in_threads(n, [&](int64_t b, int64_t e) { kernels.finish_gradient(gathered, b, e, grad.data()); });
  for (int64_t i = 0; i < n; ++i) {
    double own = 0;  // of what the pair adds, which is a unit vector: its length along the pair
    for (int64_t c = 0; c < depth; ++c) {
      own += (double(grad[i * depth + c]) - complete(gradient, i, c)) * double(points.x[i * depth + c] - points.x[next[i] * depth + c]) / double(d[i]);
    }
    expect(std::fabs(own - 1) < 1e-2, name + ": pair gradient");
  }
}

template <class T>
void check_gram(const std::string& name, const Kernels<T>& kernels, int64_t channels, int64_t positions, bool channels_last,
                std::mt19937& random) {
  const std::vector<T> x = normal<T>(channels * positions, random);
  const int64_t channel_stride = channels_last ? 1 : positions, position_stride = channels_last ? channels : 1;
  const auto at = [&](int64_t c, int64_t k) { return double(x[c * channel_stride + k * position_stride]); };
  const int64_t width = kernels.panel_rows, panels = (channels + width - 1) / width, tiles = panels * (panels + 1) / 2;
  constexpr int kSlices = 3;
  std::vector<T> sums(kSlices * tiles * width * width);
  in_threads(kSlices, [&](int64_t begin, int64_t end) {
    std::vector<T> packed(kernels.gram_scratch(channels));
    for (int64_t s = begin; s < end; ++s) {
      kernels.gram({x.data(), channels, positions * s / kSlices, positions * (s + 1) / kSlices, channel_stride, position_stride},
                   packed.data(), &sums[s * tiles * width * width]);
    }
  });
  double error = 0, norm = 0;
  for (int64_t i = 0, tile = 0; i < panels; ++i) {
    for (int64_t j = i; j < panels; ++j, ++tile) {
      for (int64_t e = 0; e < width * width; ++e) {
        const bool transposed = i < j && j + 1 == panels;
        const int64_t row = (transposed ? j : i) * width + e / width, column = (transposed ? i : j) * width + e % width;
        if (row >= channels || column >= channels || (i == j && column < row)) continue;
        double got = 0, wanted = 0;
        for (int s = 0; s < kSlices; ++s) got += double(sums[(s * tiles + tile) * width * width + e]);
        for (int64_t k = 0; k < positions; ++k) wanted += at(row, k) * at(column, k);
        error += std::pow(got - wanted, 2);
        norm += wanted * wanted;
      }
    }
  }
  expect(std::sqrt(error) <= 1e-6 * std::sqrt(norm), name + ": gram");

  // M = 1 everywhere: every channel of the gradient is the sum over channels.
  std::vector<T> matrix(panels * channels * width, T(0)), grad(x.size());
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t r = 0; r < std::min(width, channels - p * width); ++r) matrix[(p * channels + k) * width + r] = T(1);
  in_threads((positions + width - 1) / width, [&](int64_t begin, int64_t end) {
    std::vector<T> packed(channels * (end - begin) * width);
    kernels.gram_gradient({x.data(), channels, begin * width, std::min(positions, end * width), channel_stride, position_stride},
                          matrix.data(), packed.data(), {grad.data(), channel_stride, position_stride});
  });
  error = 0;
  for (int64_t k = 0; k < positions; ++k) {
    double wanted = 0;
    for (int64_t c = 0; c < channels; ++c) wanted += at(c, k);
    for (int64_t c = 0; c < channels; ++c) error = std::max(error, std::fabs(double(grad[c * channel_stride + k * position_stride]) - wanted));
  }
  expect(error <= 1e-5 * double(channels), name + ": gradient");
}

// Rows of one number, each so far from the others: of two sets and one distance, or of three and three.
template <class T>
void check_given_rows(const std::string& name, const Kernels<T>& kernels, int64_t n, int64_t depth, int sets, std::mt19937& random) {
  const int pairs = sets == 2 ? 1 : 3;
  std::vector<std::vector<T>> x, grads(sets, std::vector<T>(n * depth));
  GivenRows rows{{}, sets, pairs, Distance::euclidean};
  for (int s = 0; s < sets; ++s) x.push_back(normal<T>(n * depth, random));
  for (int s = 0; s < sets; ++s) rows.sets[s] = {x[s].data(), n, depth, depth};
  std::vector<double> found(n * kMostGivenPairs);
  std::vector<T> distances(pairs * n), slopes(pairs * n, T(1)), incoming(n, T(2));
  in_threads(n, [&](int64_t b, int64_t e) { kernels.given_distances(rows, b, e, &found[b * kMostGivenPairs]); });
  for (int64_t t = 0; t < n; ++t) {
    for (int k = 0; k < pairs; ++k) {
      double square = 0;
      for (int64_t c = t * depth; c < (t + 1) * depth; ++c) square += std::pow(double(x[k / 2][c]) - double(x[(k + 3) / 2][c]), 2);
      expect(std::fabs(found[t * kMostGivenPairs + k] - std::sqrt(square)) < 1e-6, name + ": distances of given rows");
      distances[k * n + t] = T(std::sqrt(square));
    }
  }
  slopes[0] = 0;
  GivenGradient<T> gradient{rows, distances.data(), slopes.data(), incoming.data(), 1, T(0.5), {}};
  for (int s = 0; s < sets; ++s) gradient.grads[s] = grads[s].data();
  in_threads(n, [&](int64_t b, int64_t e) { kernels.given_gradient(gradient, b, e); });
  for (int64_t t = 0; t < n; ++t) {
    double along = 0, all = 0;  // each pair pulls with its length at both ends, and all ends together do not move
    for (int64_t c = t * depth; c < (t + 1) * depth; ++c) {
      double sum = 0;
      for (int s = 0; s < sets; ++s) sum += double(grads[s][c]), along += double(grads[s][c]) * double(x[s][c]);
      all += std::fabs(sum);
    }
    double wanted = 0;
    for (int k = 0; k < pairs; ++k) wanted += double(slopes[k * n + t]) * double(distances[k * n + t]);
    expect(std::fabs(along - wanted) < 1e-3 * (1 + wanted) && all < 1e-4 * double(depth), name + ": gradient of given rows");
  }
}

template <class T>
void check_type(const std::string& name, const Kernels<T>& kernels, std::mt19937& random) {
  check_batch_hard(name, kernels, 101, 37, random);
  check_batch_hard(name, kernels, 4, 300, random);
  check_all_pairs(name, kernels, 101, 37, 0, random);
  check_all_pairs(name, kernels, 70, 9, kScannedPositives, random);
  check_given_rows(name, kernels, 40, 37, 2, random);
  check_given_rows(name, kernels, 5, 130, 3, random);
  for (const bool channels_last : {false, true}) {
    check_gram(name, kernels, 70, 533, channels_last, random);
    check_gram(name, kernels, 3, 5, channels_last, random);
  }
}

void check_table(const std::string& name, const KernelTable& table) {
  std::mt19937 random(1);
  check_type<float>(name + " float32", table.float32, random);
  check_type<double>(name + " float64", table.float64, random);
}

}  // namespace

int main() {
  check_table("portable", portable_kernels);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) check_table("avx2", avx2_kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    check_table("avx512", avx512_kernels);
  }
#endif
  std::printf("%d wrong\n", failures);
  return failures != 0;
}
