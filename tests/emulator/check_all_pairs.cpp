// Losses over all pairs, mining by strategy, nearest neighbours. See check.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "check.h"
#include "csrc/cuda/all_pairs.cu"
#include "csrc/cuda/batch_all.cu"
#include "csrc/cuda/batch_contrastive.cu"
#include "csrc/cuda/batch_hard.cu"  // rows and their centre
#include "csrc/cuda/batch_semi_hard.cu"
#include "csrc/cuda/mine_triplets.cu"
#include "csrc/cuda/nearest_neighbors.cu"

namespace {

// A loss over all pairs as plain loops see it: its sums, and what each distance weighs in it.
struct PlainLoss {
  RowSums sums = {};
  std::vector<double> weight;  // [anchors][references]
};

enum class PairLoss { batch_all, window, semi_hard, contrastive };

constexpr double kMargin = 0.5;

// d: [n][m] distances.
template <class S>
PlainLoss plain_loss(PairLoss which, Points<S>& anchors, Points<S>& references, bool self_form, const std::vector<double>& d) {
  const int64_t m = references.count;
  PlainLoss out{{}, std::vector<double>(d.size())};
  double* value = out.sums.values;
  int64_t* count = out.sums.counts;
  for (int64_t a = 0; a < anchors.count; ++a) {
    const double* row = &d[a * m];
    double* weight = &out.weight[a * m];
    std::vector<int64_t> positives, negatives;
    for (int64_t j = 0; j < m; ++j) {
      if (self_form && j == a) continue;
      (anchors.labels[a] == references.labels[j] ? positives : negatives).push_back(j);
    }
    const auto triplet = [&](int64_t p, int64_t q) {
      const double loss = row[p] - row[q] + kMargin;
      value[1] += row[p];
      value[2] += row[q];
      ++count[1];
      if (loss <= 0) return;
      value[0] += loss;
      ++count[2];
      weight[p] += 1;
      weight[q] -= 1;
    };
    if (which == PairLoss::contrastive) {
      const auto pair = [&](int64_t j, int side, double beyond) {
        value[2 + side] += row[j];
        ++count[side];
        if (beyond <= 0) return;
        value[side] += beyond;
        ++count[2 + side];
        weight[j] += side ? -1 : 1;
      };
      for (int64_t p : positives) pair(p, 0, row[p] - kMargin);
      for (int64_t q : negatives) pair(q, 1, 4 * kMargin - row[q]);
      continue;
    }
    count[0] += !positives.empty() && !negatives.empty();
    for (int64_t p : positives) {
      int64_t nearest = -1, farthest = -1;
      for (int64_t q : negatives) {
        const double gap = row[q] - row[p];
        if (which == PairLoss::batch_all || (which == PairLoss::window && gap > 0 && gap <= kMargin)) triplet(p, q);
        if (gap > 0 && (nearest < 0 || row[q] < row[nearest])) nearest = q;
        if (farthest < 0 || row[q] > row[farthest]) farthest = q;
      }
      if (which == PairLoss::semi_hard && farthest >= 0) triplet(p, nearest < 0 ? farthest : nearest);
    }
  }
  return out;
}

// What tensor cores multiply of a batch, which is told of it; nothing in float64.
template <class S>
struct OwnCentredRows {
  int64_t stride;
  int slices;
  Buffer<double> sums;
  Buffer<float> centre, anchors, half_norm, references, reference_half_norm;

  explicit OwnCentredRows(Pairs& pairs)
      : stride((pairs.anchors.depth + 3) / 4 * 4),
        slices(centre_slices(std::max(pairs.anchors.count, pairs.references.count))),
        sums(2 * slices * pairs.anchors.depth),
        centre(pairs.anchors.depth),
        anchors(pairs.anchors.count * stride),
        half_norm(pairs.anchors.count),
        references(pairs.references.count * stride),
        reference_half_norm(pairs.references.count) {
    if (std::is_same_v<S, double>) return;
    pairs.centred_anchors = {anchors, stride, half_norm};
    pairs.centred_references = pairs.self_form ? pairs.centred_anchors : CentredRows{references, stride, reference_half_norm};
    centre_rows(pairs, {slices, sums, centre}, nullptr);
    synchronize();
  }
};

template <class S>
void check_all_pairs(const std::string& name, int64_t n, int64_t m, int64_t depth, int classes, std::mt19937& random, double apart = 0) {
  using T = Compute<S>;
  if (!wanted(name)) return;
  const bool self_form = m == 0;
  Points<S> anchors(n, depth, classes, 0.5, random, apart), others(self_form ? 0 : m, depth, classes, 0.5, random, apart);
  Points<S>& references = self_form ? anchors : others;
  m = references.count;
  Buffer<Flags> flags(1, 0);
  Pairs pairs = {};
  static_cast<Batch&>(pairs) = batch_of(anchors, references, self_form, Distance::euclidean, flags);
  OwnCentredRows<S> centred(pairs);
  std::vector<double> exact(n * m);
  for (int64_t a = 0; a < n; ++a)
    for (int64_t j = 0; j < m; ++j) exact[a * m + j] = std::sqrt(anchors.square(a, references, j));

  // Two stripes, the second not a whole tile.
  const int64_t stride = (m + kStripeColumns - 1) / kStripeColumns * kStripeColumns, rows = std::min<int64_t>(n, 64);
  Buffer<T> distances(rows * stride), strengths(rows * stride), anchor_sums(rows), reference_sums(m);
  const auto for_each_stripe = [&](const Pairs& of, bool few, auto run) {
    for (int64_t first = 0; first < n; first += rows) {
      Buffer<uint32_t> single(rows * stride / 32);
      Stripe stripe = {first, std::min(rows, n - first), stride, distances};
      if (few) {
        stripe.single_strengths = strengths;
      } else {
        stripe.strengths = strengths;
        stripe.single_strengths = distances;
        stripe.anchor_sums = anchor_sums;
        stripe.reference_sums = reference_sums;
      }
      stripe.single = single;
      stripe_distances(of, stripe, nullptr);
      run(stripe);
      synchronize();
    }
  };
  for (const PairLoss which : {PairLoss::batch_all, PairLoss::window, PairLoss::semi_hard, PairLoss::contrastive}) {
    const std::string what = name + ", loss " + std::to_string(int(which));
    Buffer<RowSums> sums(n);
    Buffer<T> grad(n * depth, 0), grad_references((self_form ? 0 : m) * depth, 0), loss(1), means(2);
    Buffer<int64_t> counts(4, 0);
    Buffer<double> scales(2);
    const bool few = which == PairLoss::semi_hard;
    for_each_stripe(pairs, few, [&](const Stripe& stripe) {
      if (which == PairLoss::contrastive) {
        contrastive_rows(pairs, stripe, {kMargin, 4 * kMargin, false}, nullptr, sums, nullptr);
      } else if (which == PairLoss::semi_hard) {
        semi_hard_rows(pairs, stripe, {kMargin, false}, sums, nullptr);
      } else {
        batch_all_rows(pairs, stripe, {kMargin, which == PairLoss::window}, sums, nullptr);
      }
      for (const bool of_anchors : {true, false}) {
        Buffer<T>& to = of_anchors || self_form ? grad : grad_references;
        pull_singles(pairs, stripe, of_anchors, to, nullptr);
        if (few) continue;
        const int splits = of_anchors ? 3 : 1;
        Buffer<T> partial(splits * stripe.rows * depth);
        pull(pairs, stripe, of_anchors, splits, partial, to, nullptr);
        synchronize();
      }
    });
    const LossOutputs out{loss, counts, means, scales};
    if (which == PairLoss::contrastive) {
      finish_pairs(pairs, sums, SumReduction::sum, {kMargin, 4 * kMargin, false}, out, nullptr);
    } else {
      finish_triplets(pairs, sums, SumReduction::sum, out, nullptr);
    }
    finish_gradient(pairs, true, scales, grad, nullptr);
    if (!self_form) finish_gradient(pairs, false, scales, grad_references, nullptr);
    synchronize();

    // A negative almost exactly as far as a positive may be taken for a nearer one: then other triplets count, with nearly the same loss.
    const bool chooses = which == PairLoss::window || which == PairLoss::semi_hard;
    const PlainLoss plain = plain_loss(which, anchors, references, self_form, exact);
    const double expected = plain.sums.values[0] + (which == PairLoss::contrastive ? plain.sums.values[1] : 0);
    expect(std::fabs(double(loss[0]) - expected) <= (chooses ? 1e-3 : 1e-5) * expected, what + ": loss");
    for (int i = 0; i < (which == PairLoss::contrastive ? 4 : 3); ++i) {
      const double difference = std::fabs(double(counts[i] - plain.sums.counts[i]));
      expect(difference <= 1e-3 * double(plain.sums.counts[i]) + 2, what + ": count " + std::to_string(i));
    }
    std::vector<double> gradient(n * depth), of_references(m * depth);
    std::vector<double>& to_references = self_form ? gradient : of_references;
    for (int64_t a = 0; a < n; ++a) {
      for (int64_t j = 0; j < m; ++j) {
        if (plain.weight[a * m + j] == 0 || exact[a * m + j] == 0) continue;
        for (int64_t k = 0; k < depth; ++k) {
          const double difference = anchors.exact[a * depth + k] - references.exact[j * depth + k];
          const double along = plain.weight[a * m + j] * difference / exact[a * m + j];
          gradient[a * depth + k] += along;
          to_references[j * depth + k] -= along;
        }
      }
    }
    const double tolerance = chooses ? 5e-2 : 1e-4;
    compare_gradients(grad, gradient, tolerance, what + ": gradient of anchors");
    if (!self_form) compare_gradients(grad_references, of_references, tolerance, what + ": gradient of references");
  }

  for (const Strategies strategies : {Strategies{Strategy::easy, Strategy::hard}, {Strategy::hard, Strategy::semihard},
                                      {Strategy::semihard, Strategy::easy}}) {
    Buffer<T> values(2 * n);
    Buffer<int32_t> indices(2 * n);
    for_each_stripe(pairs, false, [&](const Stripe& stripe) { mine_rows(pairs, stripe, strategies, {1, values, indices}, nullptr); });
    for (int64_t a = 0; a < n; ++a) {
      // The distance that a strategy leads to, or -1.
      const auto choose = [&](bool positives, bool nearest, double above, double below) {
        double best = -1;
        for (int64_t j = 0; j < m; ++j) {
          const double d = exact[a * m + j];
          if ((self_form && j == a) || (anchors.labels[a] == references.labels[j]) != positives || d <= above || d >= below) continue;
          if (best < 0 || (nearest ? d < best : d > best)) best = d;
        }
        return best;
      };
      const bool nearest_negative = strategies.negative != Strategy::easy, semi_hard = strategies.negative == Strategy::semihard;
      double positive, negative;
      if (strategies.positive == Strategy::semihard) {
        negative = choose(false, nearest_negative, -1, 1e9);
        positive = choose(true, false, -1, negative);
      } else {
        positive = choose(true, strategies.positive == Strategy::easy, -1, 1e9);
        negative = choose(false, nearest_negative, semi_hard ? positive : -1, 1e9);
      }
      const auto right = [&](double expected, int64_t at) {
        const double rounding = 1e-5 + (apart > 0 ? 3e-7 * expected : 0);  // one heap is thousands away from the other
        return expected < 0 ? indices[at] == kNobody : std::fabs(double(values[at]) - expected) < rounding;
      };
      expect(right(positive, a) && right(negative, n + a), name + ": strategies for " + std::to_string(a));
    }
  }
}

// With `copies` each row of the gallery stands there so many times: of equal distances those with the lowest indices are nearest.
template <class S>
void check_neighbors(const std::string& name, int64_t n, int64_t m, int64_t depth, std::mt19937& random, int64_t copies = 1) {
  using T = Compute<S>;
  if (!wanted(name)) return;
  const bool self_form = m == 0;
  Points<S> queries(n, depth, 1, 0.5, random), others(m, depth, 1, 0.5, random);
  Points<S>& gallery = self_form ? queries : others;
  m = gallery.count;
  for (int64_t i = 0; i < m * depth; ++i) {
    gallery.x[i] = gallery.x[i / depth % (m / copies) * depth + i % depth];
    gallery.exact[i] = value_of(gallery.x[i]);
  }
  Buffer<Flags> flags(1, 0);
  Pairs pairs = {};
  static_cast<Batch&>(pairs) = batch_of(queries, gallery, self_form, Distance::euclidean, flags);
  OwnCentredRows<S> centred(pairs);

  const int64_t stride = (m + kStripeColumns - 1) / kStripeColumns * kStripeColumns, k = std::min<int64_t>(7, m - self_form);
  Buffer<T> distances(n * stride), near(n * k);
  Buffer<float> least(n * stride / kStripeColumns);
  Buffer<int64_t> index(n * k);
  Stripe stripe = {0, n, stride, distances};
  if (!std::is_same_v<S, double>) stripe.least = least;
  stripe_distances(pairs, stripe, nullptr);
  nearest_rows(pairs, stripe, k, near, index, nullptr);
  synchronize();
  for (int64_t a = 0; a < n; ++a) {
    std::vector<std::pair<double, int64_t>> sorted;
    for (int64_t j = 0; j < m; ++j)
      if (!self_form || j != a) sorted.emplace_back(std::sqrt(queries.square(a, gallery, j)), j);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t i = 0; i < k; ++i) {
      const int64_t j = index[a * k + i];
      const bool inside = j >= 0 && j < m && !(self_form && j == a), is_nearest = copies == 1 || j == sorted[i].second;
      const double d = inside ? std::sqrt(queries.square(a, gallery, j)) : -1;
      expect(is_nearest && std::fabs(d - sorted[i].first) < 1e-6 && std::fabs(double(near[a * k + i]) - sorted[i].first) < 1e-6,
             name + ": neighbour " + std::to_string(i) + " of " + std::to_string(a));
    }
  }
}

void check_as_near() {
  if (!wanted("as near")) return;
  for (const float h : {0.0f, 1e-30f, 1.0f, 1e30f}) {
    expect(as_near(h, 1, 128) > h && as_near(h, 1, 128) < h * 1.001f + 1e-3f, "as near: few columns");
    expect(as_near(h, 1, int64_t(1) << 30) > 1e38f, "as near: no digit of so many columns is sure");
  }
}

template <class S>
void check_storage(const std::string& type, std::mt19937& random) {
  check_all_pairs<S>(type + " pairs", 90, 0, 21, 12, random);
  check_all_pairs<S>(type + " pairs, references", 20, 130, 70, 6, random);
  check_all_pairs<S>(type + " pairs, two heaps", 90, 0, 9, 12, random, 2000);  // a product has no digit of distances inside them
  check_neighbors<S>(type + " neighbors", 70, 0, 21, random);
  check_neighbors<S>(type + " neighbors, gallery", 5, 700, 70, random);
  check_neighbors<S>(type + " neighbors, copies", 6, 4800, 2, random, 2400);  // more than shared memory has room for
  if (sizeof(S) == 2) return;  // from distances on, their kernels are those of float32
  check_all_pairs<S>(type + " pairs, two labels", 70, 0, 5, 2, random);
  check_neighbors<S>(type + " neighbors, many groups", 470, 0, 5, random);
}

}  // namespace

int main(int argc, char** argv) {
  return check_under_schedules(argc, argv, [](std::mt19937& random) {
    check_as_near();
    for_each_storage([&](auto s, const std::string& type) { check_storage<decltype(s)>(type, random); });
  });
}
