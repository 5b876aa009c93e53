// Losses of given triplets and pairs, and their gradient. See check.h.
#include "check.h"
#include "csrc/cuda/batch_hard.cu"  // how many parts a loss is summed in
#include "csrc/cuda/given_rows.cu"
#include "exact_pairs.h"

namespace {

// Of the whole; in 16 bits the last rounding, 2^-8 and 2^-11 at most.
template <class S>
constexpr double kGradientTolerance = std::is_same_v<S, double>     ? 1e-12
                                      : std::is_same_v<S, float>    ? 2e-6
                                      : std::is_same_v<S, BFloat16> ? 4e-3
                                                                    : 5e-4;

// Rows 3 and 4 of the second set are those of the first, row 5 is zero; where nothing is reduced, row 6 of the last set has a NaN.
template <class S>
void check_given(const std::string& name, int64_t n, int64_t depth, int pairs, Distance distance, Reduction reduction,
                 std::mt19937& random) {
  using T = Compute<S>;
  if (!wanted(name)) return;
  const int sets = pairs == 1 ? 2 : 3;
  std::vector<Points<S>> x;
  Buffer<S> grads[kMostGivenSets] = {Buffer<S>(n * depth), Buffer<S>(n * depth), Buffer<S>(n * depth)};
  GivenGradient g = {};
  g.rows = {kStorage<S>, distance, {}, sets, pairs};
  for (int s = 0; s < sets; ++s) x.emplace_back(n, depth, 1, 0.5, random);
  const auto put = [&](int set, int64_t row, int64_t k, double v) {
    if (row >= n) return;
    assign(x[set].x[row * depth + k], v);
    x[set].exact[row * depth + k] = value_of(x[set].x[row * depth + k]);
  };
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t row = 3; row < 5 && row < n; ++row) put(1, row, k, x[0].exact[row * depth + k]);
    put(1, 5, k, 0);
  }
  if (reduction == Reduction::none) put(sets - 1, 6, 0, std::nan(""));
  for (int s = 0; s < sets; ++s) {
    g.rows.sets[s] = {x[s].x, n, depth, depth};
    g.grads[s] = grads[s];
  }

  const bool reduced = reduction != Reduction::none;
  Buffer<T> y(n), loss(reduced ? 1 : n), distances(pairs * n), slopes(pairs * n), scale(1), incoming(reduced ? 1 : n);
  Buffer<LossPart> parts(loss_parts(n));
  Buffer<uint32_t> finished(1, 0);
  for (int64_t t = 0; t < n; ++t) y[t] = T(t % 3) / 2;
  for (int64_t t = 0; t < incoming.size; ++t) incoming[t] = T(1 + t % 2);
  const GivenTriplet triplet{{0.5, n % 2 == 1}, pairs == 3};
  const GivenContrast<T> contrast{y, 3.0};
  const GivenLosses out{reduction, loss, distances, slopes, scale, parts, finished};
  if (sets == 2) {
    contrastive_losses(g.rows, y, contrast.margin, out, nullptr);
  } else {
    triplet_losses(g.rows, triplet, out, nullptr);
  }
  g.distances = distances;
  g.slopes = slopes;
  g.scale = scale;
  g.grad_loss = incoming;
  g.grad_loss_stride = !reduced;
  given_gradient(g, nullptr);
  synchronize();

  std::vector<double> wanted_grads[kMostGivenSets] = {std::vector<double>(n * depth), std::vector<double>(n * depth),
                                                      std::vector<double>(n * depth)};
  int64_t active = 0;
  double sum = 0, tolerance = sizeof(T) == 4 ? 1e-6 : 1e-12;
  for (int64_t t = 0; t < n; ++t) {
    const double* rows[kMostGivenSets] = {};
    for (int s = 0; s < sets; ++s) rows[s] = &x[s].exact[t * depth];
    double d[kMostGivenPairs] = {}, slope[kMostGivenPairs] = {};
    for (int k = 0; k < pairs; ++k) d[k] = distance_of(distance, rows[k / 2], rows[(k + 3) / 2], depth);
    double own = sets == 2 ? contrast(t, d, slope) : triplet(t, d, slope);
    const bool finite = t != 6 || reduced;
    if (finite) sum += own, active += own > 0;
    const auto close = [&](double got, double expected) { return std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected)); };
    const std::string row = name + ": row " + std::to_string(t);
    if (!reduced) expect(finite ? close(loss[t], own) : std::isnan(loss[t]), row + ", loss");
    for (int k = 0; k < pairs; ++k) {
      expect(!finite || close(distances[k * n + t], d[k]), row + ", distance");
      expect(finite ? close(slopes[k * n + t], slope[k]) : std::isnan(slopes[k * n + t]), row + ", slope");
      const int i = k / 2, j = (k + 3) / 2;
      for (int64_t c = 0; c < depth && finite; ++c) {
        const double weight = double(incoming[reduced ? 0 : t]) * double(scale[0]) * slope[k];
        wanted_grads[i][t * depth + c] += weight * slope_of(distance, rows[i], rows[j], depth, d[k], c);
        wanted_grads[j][t * depth + c] += weight * slope_of(distance, rows[j], rows[i], depth, d[k], c);
      }
    }
    for (int s = 0; s < sets && !finite; ++s) {
      for (int64_t c = 0; c < depth; ++c) {
        expect(std::isnan(value_of(grads[s][t * depth + c])), row + ", gradient is not NaN");
        assign(grads[s][t * depth + c], 0);
      }
    }
  }
  if (reduced) {
    const double divisor = reduction == Reduction::mean ? double(n) : reduction == Reduction::mean_nonzero ? double(active) : 1;
    expect(std::fabs(double(scale[0]) * divisor - 1) < 1e-6, name + ": scale");
    expect(std::fabs(double(loss[0]) - sum / divisor) <= tolerance * (1 + sum / divisor), name + ": loss");
  }
  for (int s = 0; s < sets; ++s)
    compare_gradients(grads[s], wanted_grads[s], kGradientTolerance<S>, name + ": gradient of set " + std::to_string(s));
}

template <class S>
void check_storage(const std::string& type, std::mt19937& random) {
  check_given<S>(type + " triplets", 37, 21, 2, Distance::sqeuclidean, Reduction::mean, random);
  check_given<S>(type + " triplets, active", 90, 5, 2, Distance::euclidean, Reduction::mean_nonzero, random);
  check_given<S>(type + " triplets, few", 6, 150, 2, Distance::euclidean, Reduction::sum, random);
  check_given<S>(type + " triplets, swap", 20, 130, 3, Distance::euclidean, Reduction::none, random);
  check_given<S>(type + " triplets, cosine", 19, 33, 3, Distance::cosine, Reduction::none, random);
  check_given<S>(type + " pairs", 30, 129, 1, Distance::euclidean, Reduction::none, random);
  check_given<S>(type + " pairs, few", 5, 7, 1, Distance::euclidean, Reduction::mean, random);
}

}  // namespace

int main(int argc, char** argv) {
  return check_under_schedules(argc, argv, [](std::mt19937& random) {
    for_each_storage([&](auto s, const std::string& type) { check_storage<decltype(s)>(type, random); });
  });
}
