// Distances of listed pairs, and their gradient. See check.h.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "csrc/cuda/batch_hard.cu"
#include "csrc/cuda/pair_distances.cu"
#include "exact_pairs.h"

namespace {

// The gradient by `batch`'s anchors of the sum of weights times distances, where pair t is of rows[t] and ref_rows[t].
template <class T>
void gradient_by_anchors(const Batch& batch, Buffer<int64_t>& rows, Buffer<int64_t>& ref_rows, Buffer<T>& distances,
                         Buffer<T>& weights, Buffer<T>& grad) {
  const int64_t count = rows.size;
  std::vector<int64_t> by_row(count);
  std::iota(by_row.begin(), by_row.end(), 0);
  std::stable_sort(by_row.begin(), by_row.end(), [&](int64_t s, int64_t t) { return rows[s] < rows[t]; });
  Buffer<int64_t> sorted(count), order(count);
  for (int64_t u = 0; u < count; ++u) {
    order[u] = by_row[u];
    sorted[u] = rows[by_row[u]];
  }
  pair_gradient({batch, sorted, order, ref_rows, distances, weights, count, grad}, nullptr);
  synchronize();
}

// Row 0 is in a third of all pairs, the last row of the anchors in none. Of both sets row 2 is the same and row 3 is zero. Pair 5 is of a
// row of the references, and pair 7 of one of the anchors, that is not there.
template <class S>
void check_pairs(const std::string& name, int64_t n, int64_t m, int64_t depth, int64_t count, Distance distance, std::mt19937& random) {
  using T = Compute<S>;
  if (!wanted(name)) return;
  Points<S> x(n, depth, 1, 0.5, random), y(m, depth, 1, 0.5, random);
  const auto put = [&](Points<S>& points, int64_t row, int64_t k, double v) {
    assign(points.x[row * depth + k], v);
    points.exact[row * depth + k] = value_of(points.x[row * depth + k]);
  };
  for (int64_t k = 0; k < depth; ++k) {
    put(y, 2, k, x.exact[2 * depth + k]);
    put(x, 3, k, 0);
    put(y, 3, k, 0);
  }
  Buffer<int64_t> rows(count), ref_rows(count);
  Buffer<T> distances(count), weights(count), grad_x(n * depth), grad_y(m * depth);
  for (int64_t t = 0; t < count; ++t) {
    rows[t] = t % 3 == 0 ? 0 : int64_t(random() % (n - 1));
    ref_rows[t] = int64_t(random() % m);
    weights[t] = t % 4 == 0 ? T(0) : T(t % 5) - T(1.5);
  }
  rows[1] = ref_rows[1] = rows[2] = ref_rows[2] = 2;
  rows[3] = rows[4] = ref_rows[3] = 3;
  rows[5] = ref_rows[7] = 4;
  ref_rows[5] = m;
  rows[7] = -1;
  Buffer<Flags> flags(1, 0);
  Buffer<double> norm(n), ref_norm(m);
  Batch batch = batch_of(x, y, false, distance, flags);
  measure_pairs(batch, {rows, ref_rows, count}, distances, nullptr);
  if (distance == Distance::cosine) {
    batch.anchor_norm = norm;
    batch.reference_norm = ref_norm;
    row_norms(batch, nullptr);
  }
  Batch swapped = batch;
  std::swap(swapped.anchors, swapped.references);
  std::swap(swapped.anchor_norm, swapped.reference_norm);
  gradient_by_anchors(batch, rows, ref_rows, distances, weights, grad_x);
  gradient_by_anchors(swapped, ref_rows, rows, distances, weights, grad_y);

  std::vector<double> wanted_x(n * depth), wanted_y(m * depth);
  const double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-12;
  for (int64_t t = 0; t < count; ++t) {
    const std::string pair = name + ": pair " + std::to_string(t);
    if (t == 5 || t == 7) {
      expect(std::isnan(distances[t]), pair + " of no row");
      continue;
    }
    const double *a = &x.exact[rows[t] * depth], *b = &y.exact[ref_rows[t] * depth];
    const double d = distance_of(distance, a, b, depth);
    expect(std::fabs(double(distances[t]) - d) <= tolerance * (1 + d), pair + ", distance");
    for (int64_t k = 0; k < depth; ++k) {
      wanted_x[rows[t] * depth + k] += double(weights[t]) * slope_of(distance, a, b, depth, d, k);
      wanted_y[ref_rows[t] * depth + k] += double(weights[t]) * slope_of(distance, b, a, depth, d, k);
    }
  }
  const auto compare = [&](Buffer<T>& grad, std::vector<double>& expected, int64_t lost, const std::string& what) {
    for (int64_t k = lost * depth; k < (lost + 1) * depth; ++k) {
      expect(std::isnan(grad[k]), name + ": gradient of a pair of no row");
      grad[k] = 0;
      expected[k] = 0;
    }
    compare_gradients(grad, expected, tolerance, name + ": gradient by the " + what);
  };
  compare(grad_x, wanted_x, rows[5], "anchors");
  compare(grad_y, wanted_y, ref_rows[7], "references");
}

template <class S>
void check_storage(const std::string& type, std::mt19937& random) {
  check_pairs<S>(type + " pairs", 13, 21, 33, 300, Distance::euclidean, random);
  check_pairs<S>(type + " pairs, deep", 9, 5, 150, 60, Distance::sqeuclidean, random);
  check_pairs<S>(type + " pairs, cosine", 30, 7, 140, 250, Distance::cosine, random);
}

}  // namespace

int main(int argc, char** argv) {
  return check_under_schedules(argc, argv, [](std::mt19937& random) {
    for_each_storage([&](auto s, const std::string& type) { check_storage<decltype(s)>(type, random); });
  });
}
