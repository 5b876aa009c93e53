// The CUDA kernels without torch, against plain loops in double: in every dtype, on ragged sizes. By the emulator under many orders
// of threads (test_emulator.py, also from sources with a planted bug; `make sanitize`), and compiled by nvcc (`make gpu-check`).
//
// Usage: check_kernels <first seed> <number of seeds> [what], where checks are left out whose name does not begin with `what`, for
// example float32 or "float32 wgmma". Stops after the first seed in which something was wrong. Buffers are exactly as large as the kernels may touch.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <random>

#include "csrc/cuda/all_pairs.cu"
#include "csrc/cuda/batch_all.cu"
#include "csrc/cuda/batch_contrastive.cu"
#include "csrc/cuda/batch_hard.cu"
#include "csrc/cuda/batch_semi_hard.cu"
#include "csrc/cuda/gram.cu"
#include "csrc/cuda/mine_triplets.cu"
#include "csrc/cuda/nearest_neighbors.cu"
#include "device_memory.h"

using namespace deepsim;
using namespace deepsim::cuda;

__global__ void walk_kernel(TileArguments a, int32_t* visits) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= a.tiles) return;
  const TileIndex tile = tile_index(t, a);
  if (tile.row >= 0) atomicAdd(&visits[tile.row * a.column_tiles + tile.column], 1);
}

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

struct Sorted {
  Buffer<int64_t> order, labels;
  Buffer<unsigned char> operand;
  Buffer<float> half_norm, scale;
  Buffer<int32_t> label_id, original;

  template <class S>
  Sorted(Points<S>& p, int64_t row_bytes)
      : order(p.count), labels(p.count), operand(padded_rows(p.count) * row_bytes), half_norm(padded_rows(p.count)),
        scale(padded_rows(p.count)), label_id(padded_rows(p.count)), original(padded_rows(p.count)) {
    std::iota(&order[0], &order[0] + p.count, 0);
    std::stable_sort(&order[0], &order[0] + p.count, [&](int64_t a, int64_t b) { return p.labels[a] < p.labels[b]; });
    for (int64_t i = 0; i < p.count; ++i) labels[i] = p.labels[order[i]];
  }
  PackedSet view() { return {order, labels, operand, half_norm, scale, label_id, original}; }
};

enum class Mining { direct, mma, wgmma };

template <class S>
void check_batch_hard(const std::string& name, int64_t n, int64_t m, int64_t depth, int classes, Mining how, std::mt19937& random,
                      double apart = 0) {
  using T = Compute<S>;
  if (!wanted(name)) return;
  const bool self_form = m == 0;
  Points<S> anchors(n, depth, classes, 0.5, random, apart), others(self_form ? 0 : m, depth, classes, 0.5, random, apart);
  Points<S>& references = self_form ? anchors : others;
  Buffer<Flags> flags(1, 0);
  Batch batch = batch_of(anchors, references, self_form, Distance::sqeuclidean, flags);
  Buffer<int32_t> positives(n), negatives(n);
  Buffer<T> d_ap(n), d_an(n), loss(1);
  Buffer<LossPart> parts(loss_parts(n));
  const Triplets out{positives, negatives, d_ap, d_an, loss, parts};
  const LossOptions options{0.2, false, Reduction::mean};
  if (how != Mining::direct) {
    const int64_t row_bytes = operand_row_bytes(batch.storage, depth, false);
    Sorted sorted(anchors, row_bytes), ref_sorted(references, row_bytes);
    const int slices = centre_slices(std::max(n, references.count));
    Buffer<double> sums(2 * slices * depth);
    Buffer<float> centre(depth);
    Buffer<unsigned long long> keys(2 * padded_rows(n), 0);
    TileMining mining = {};
    mining.by_wgmma = how == Mining::wgmma;
    mining.anchors = sorted.view();
    mining.references = self_form ? sorted.view() : ref_sorted.view();
    if (batch.storage == Storage::float32) {
      mining.centre = {slices, sums, centre};
    }
    mining.positive = keys;
    mining.negative = &keys[0] + padded_rows(n);
    pack_tiles(batch, mining, nullptr);
    mine_tiles(batch, mining, nullptr);
    finish_tiles(batch, mining, out, options, nullptr);
    synchronize();
  } else {
    const int splits = direct_splits(n, references.count);
    Buffer<T> values(2 * splits * n);
    Buffer<int32_t> indices(2 * splits * n);
    const DirectFound found{splits, values, indices};
    mine_direct(batch, found, nullptr);
    finish_direct(batch, found, out, options, nullptr);
    synchronize();
  }

  double sum = 0;
  int64_t valid = 0;
  for (int64_t a = 0; a < n; ++a) {
    int64_t positive = -1, negative = -1;
    double farthest = -1, nearest = std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < references.count; ++j) {
      if (self_form && j == a) continue;
      const double square = anchors.square(a, references, j);
      const bool same = anchors.labels[a] == references.labels[j];
      if (same && square > farthest) farthest = square, positive = j;
      if (!same && square < nearest) nearest = square, negative = j;
    }
    if (positive < 0 || negative < 0) positive = negative = -1;
    // Another choice is right if it is as far to rounding; random points are rarely that near to each other.
    const auto right = [&](int32_t got, int64_t exact, double square, bool same) {
      return got == exact || (exact >= 0 && got >= 0 && got < references.count && !(self_form && got == a) &&
                              (anchors.labels[a] == references.labels[got]) == same &&
                              std::fabs(anchors.square(a, references, got) - square) < 1e-5 * double(depth));
    };
    expect(right(positives[a], positive, farthest, true), name + ": positive of " + std::to_string(a));
    expect(right(negatives[a], negative, nearest, false), name + ": negative of " + std::to_string(a));
    if (positive < 0) continue;
    ++valid;
    sum += std::max(0.0, farthest - nearest + 0.2);
  }
  const double expected = sum / double(std::max<int64_t>(1, valid));
  expect(std::fabs(double(loss[0]) - expected) <= 1e-5 * std::max(1.0, expected), name + ": loss");

  Buffer<S> grad(n * depth), grad_references(references.count * depth);
  Buffer<T> grad_loss(1);
  grad_loss[0] = T(1);
  Buffer<unsigned long long> count(1, 0);
  std::vector<std::pair<int32_t, int64_t>> choices;
  for (int64_t a = 0; a < n; ++a) choices.push_back({positives[a], a});
  for (int64_t a = 0; a < n; ++a) choices.push_back({negatives[a], n + a});
  std::sort(choices.begin(), choices.end());
  Buffer<int32_t> sorted_choices(2 * n);
  Buffer<int64_t> order(2 * n);
  for (int64_t u = 0; u < 2 * n; ++u) sorted_choices[u] = choices[u].first, order[u] = choices[u].second;
  LossGradient g = {};
  g.batch = batch;
  g.positives = positives;
  g.negatives = negatives;
  g.d_ap = d_ap;
  g.d_an = d_an;
  g.grad_loss = grad_loss;
  Buffer<int32_t> first_choice(references.count + 1);
  Buffer<T> coefficients(n);
  g.sorted_choices = sorted_choices;
  g.choice_order = order;
  g.first_choice = first_choice;
  g.coefficients = coefficients;
  g.count = count;
  g.grad = grad;
  g.grad_references = grad_references;
  triplet_gradient(g, options, nullptr);
  synchronize();
  std::vector<double> exact(anchors.count * depth), exact_references(references.count * depth);
  std::vector<double>& to_references = self_form ? exact : exact_references;
  for (int64_t a = 0; a < n; ++a) {
    if (positives[a] < 0 || double(d_ap[a]) - double(d_an[a]) + 0.2 <= 0) continue;
    for (int64_t k = 0; k < depth; ++k) {
      const double x = anchors.exact[a * depth + k], p = references.exact[positives[a] * depth + k],
                   q = references.exact[negatives[a] * depth + k], scale = 2.0 / double(std::max<int64_t>(1, valid));
      exact[a * depth + k] += scale * ((x - p) - (x - q));
      to_references[positives[a] * depth + k] -= scale * (x - p);
      to_references[negatives[a] * depth + k] += scale * (x - q);
    }
  }
  compare_gradients(grad, exact, 5e-3, name + ": gradient of anchors");
  if (!self_form) compare_gradients(grad_references, exact_references, 5e-3, name + ": gradient of references");
}

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
      pair_distances(of, stripe, nullptr);
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
  pair_distances(pairs, stripe, nullptr);
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

struct Shape {
  int64_t batch, channels, positions;
  bool channels_last;
};

// Of the whole: what is added up in float32 or better, and for 16 bits the last rounding.
template <class S>
constexpr double kGradientTolerance = std::is_same_v<S, double>     ? 1e-12
                                      : std::is_same_v<S, float>    ? 2e-6
                                      : std::is_same_v<S, BFloat16> ? 2e-3
                                                                    : 3e-4;

// The style loss of all layers at once, and its gradient.
template <class S>
void check_gram(const std::string& name, const std::vector<Shape>& shapes, StyleDistance distance, std::mt19937& random) {
  if (!wanted(name)) return;
  using T = Compute<S>;
  struct Layer {
    Points<S> values;
    Buffer<T> matrix, target, symmetric;
    Buffer<float> row_scale;
    Buffer<S> grad;
    double loss = 0;

    Layer(const Shape& s, std::mt19937& random)
        : values(s.batch, s.channels * s.positions, 1, 0.3, random),
          matrix(s.batch * s.channels * s.channels),
          target(s.channels * s.channels),
          symmetric(matrix.size),
          row_scale(s.batch * s.channels),
          grad(values.x.size) {}
  };
  std::vector<std::unique_ptr<Layer>> layers;
  Gram work = {};
  work.distance = distance;
  for (const Shape& s : shapes) {
    layers.push_back(std::make_unique<Layer>(s, random));
    Layer& l = *layers.back();
    for (int64_t i = 0; i < l.target.size; ++i) l.target[i] = T(0.01 * double(i % 7));
    GramLayer& to = work.layer[work.count++];
    to.features = {l.values.x, s.batch, s.channels, s.positions, s.channels * s.positions, s.channels_last ? 1 : s.positions,
                   s.channels_last ? s.channels : 1};
    to.matrix = &l.matrix[0];
    to.target = &l.target[0];
    to.scale = 1.0 / double(s.channels * s.positions);
    to.factor = 0.5;
    to.weight = double(work.count);
  }
  plan_gram(kStorage<S>, work);
  Buffer<T> loss(1), losses(work.count), sums(work.sum_blocks * kGramTile * kGramTile);
  Buffer<double> partial_losses(work.reduce_blocks);
  Buffer<uint32_t> finished(1, 0);
  work.loss = loss;
  work.losses = losses;
  work.sums = sums;
  work.partial_losses = partial_losses;
  work.finished = finished;
  gram(kStorage<S>, false, work, nullptr);
  synchronize();

  double total = 0;
  for (int i = 0; i < work.count; ++i) {
    Layer& l = *layers[i];
    const Features& f = work.layer[i].features;
    double error = 0, norm = 0, sum_of_distances = 0;
    for (int64_t b = 0; b < f.batch; ++b) {
      for (int64_t r = 0; r < f.channels; ++r) {
        for (int64_t c = 0; c < f.channels; ++c) {
          double sum = 0;
          for (int64_t k = 0; k < f.positions; ++k)
            sum += l.values.exact[b * f.batch_stride + r * f.channel_stride + k * f.position_stride] *
                   l.values.exact[b * f.batch_stride + c * f.channel_stride + k * f.position_stride];
          const double v = work.layer[i].scale * sum - double(l.target[r * f.channels + c]);
          error += std::pow(double(l.matrix[(b * f.channels + r) * f.channels + c]) - v, 2);
          norm += v * v;
          sum_of_distances += distance == StyleDistance::l1 ? std::fabs(v) : v * v;
        }
      }
    }
    const std::string layer = name + ", layer " + std::to_string(i);
    expect(std::sqrt(error) <= 2e-6 * std::sqrt(norm), layer + ": matrix");
    l.loss = 0.5 * sum_of_distances;
    if (distance == StyleDistance::frobenius) l.loss = std::sqrt(l.loss);
    expect(std::fabs(double(losses[i]) - l.loss) <= 1e-5 * l.loss, layer + ": loss");
    total += double(i + 1) * l.loss;
  }
  expect(std::fabs(double(loss[0]) - total) <= 1e-5 * total, name + ": loss");

  // All but the first: what is handed on need not be what was summed.
  Buffer<T> grad_loss(1);
  grad_loss[0] = T(0.75);
  GramGradient gradient = {};
  gradient.distance = distance;
  gradient.grad_loss = grad_loss;
  for (int i = work.count > 1; i < work.count; ++i) {
    GramGradientLayer& to = gradient.layer[gradient.count++];
    to.features = to.grad = work.layer[i].features;
    to.grad.data = &layers[i]->grad[0];
    to.g = &layers[i]->matrix[0];
    to.symmetric = &layers[i]->symmetric[0];
    to.row_scale = &layers[i]->row_scale[0];
    to.scale = work.layer[i].scale;
    to.loss = &losses[i];
  }
  gram_gradient(kStorage<S>, false, gradient, nullptr);
  synchronize();
  for (int i = work.count > 1; i < work.count; ++i) {
    Layer& l = *layers[i];
    const Features& f = work.layer[i].features;
    const auto value = [&](double x) {
      if (distance == StyleDistance::l1) return double((x > 0) - (x < 0));
      return distance == StyleDistance::l2 ? x : x / l.loss;
    };
    double error = 0, norm = 0;
    for (int64_t b = 0; b < f.batch; ++b) {
      for (int64_t c = 0; c < f.channels; ++c) {
        for (int64_t k = 0; k < f.positions; ++k) {
          double sum = 0;
          for (int64_t j = 0; j < f.channels; ++j) {
            const int64_t square = b * f.channels * f.channels;
            sum += 0.75 * work.layer[i].scale *
                   (value(double(l.matrix[square + c * f.channels + j])) + value(double(l.matrix[square + j * f.channels + c]))) *
                   l.values.exact[b * f.batch_stride + j * f.channel_stride + k * f.position_stride];
          }
          error += std::pow(value_of(l.grad[b * f.batch_stride + c * f.channel_stride + k * f.position_stride]) - sum, 2);
          norm += sum * sum;
        }
      }
    }
    expect(std::sqrt(error) <= kGradientTolerance<S> * std::sqrt(norm), name + ", layer " + std::to_string(i) + ": gradient");
  }
}

void check_as_near() {
  if (!wanted("as near")) return;
  for (const float h : {0.0f, 1e-30f, 1.0f, 1e30f}) {
    expect(as_near(h, 1, 128) > h && as_near(h, 1, 128) < h * 1.001f + 1e-3f, "as near: few columns");
    expect(as_near(h, 1, int64_t(1) << 30) > 1e38f, "as near: no digit of so many columns is sure");
  }
}

// Every tile is visited once; of the self form those on and above the diagonal.
void check_walk() {
  if (!wanted("walk")) return;
  for (const auto [down, across] : {std::pair{1, 1}, {2, 2}, {8, 8}, {9, 9}, {31, 31}, {3, 20}, {20, 3}, {17, 1}}) {
    TileArguments a = {};
    a.row_tiles = down;
    a.column_tiles = across;
    a.self_form = down == across;
    plan_walk(a);
    Buffer<int32_t> visits(down * across, 0);
    launch(walk_kernel, blocks_for(a.tiles, 32), 32, 0, nullptr, a, &visits[0]);
    synchronize();
    bool right = true;
    for (int r = 0; r < down; ++r)
      for (int c = 0; c < across; ++c) right &= visits[r * across + c] == (!a.self_form || r <= c);
    expect(right, "walk over " + std::to_string(down) + " x " + std::to_string(across) + " tiles");
  }
}

// Stable, also of the least and the largest number there is.
void check_sort(std::mt19937& random) {
  if (!wanted("sort")) return;
  for (const auto [count, labels] : {std::pair{1, 1}, {255, 3}, {257, 1000}, {1300, 40}, {1100, 1}}) {
    Buffer<int64_t> label(count), order(count), sorted(count);
    Buffer<int32_t> ranks(count, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t l = int64_t(random() % unsigned(labels)) - labels / 2;
      label[i] = i > 600 ? l : l * (int64_t(1) << 33);  // blocks with and without numbers of more than 32 bits
      if (i < 600 && i % 7 == 0) label[i] = std::numeric_limits<int64_t>::min();
      if (i < 600 && i % 7 == 1) label[i] = std::numeric_limits<int64_t>::max();
    }
    sort_by_rank(&label[0], count, &ranks[0], &sorted[0], &order[0], nullptr);
    synchronize();
    std::vector<int64_t> exact(count);
    std::iota(exact.begin(), exact.end(), 0);
    std::stable_sort(exact.begin(), exact.end(), [&](int64_t a, int64_t b) { return label[a] < label[b]; });
    bool right = true;
    for (int64_t i = 0; i < count; ++i) right &= order[i] == exact[i] && sorted[i] == label[exact[i]];
    expect(right, "sort of " + std::to_string(count) + " labels");
  }
}

template <class S>
void check_all(const std::string& type, std::mt19937& random) {
  check_batch_hard<S>(type + " direct", 70, 0, 19, 9, Mining::direct, random);
  check_batch_hard<S>(type + " direct, references", 5, 130, 19, 3, Mining::direct, random);
  if constexpr (!std::is_same_v<S, double>) {
    for (const Mining how : {Mining::mma, Mining::wgmma}) {
      if (how == Mining::wgmma && !can_use_wgmma()) continue;
      const std::string tiles = type + (how == Mining::mma ? " mma" : " wgmma");
      check_batch_hard<S>(tiles, 300, 0, 100, 40, how, random);
      check_batch_hard<S>(tiles + ", two heaps", 140, 0, 20, 40, how, random, 1e3);
      check_batch_hard<S>(tiles + ", one label", 130, 0, 70, 1, how, random);
      check_batch_hard<S>(tiles + ", references", 40, 270, 390, 12, how, random);
    }
  }
  check_all_pairs<S>(type + " pairs", 90, 0, 21, 12, random);
  check_all_pairs<S>(type + " pairs, two labels", 70, 0, 5, 2, random);
  check_all_pairs<S>(type + " pairs, references", 20, 130, 70, 6, random);
  check_all_pairs<S>(type + " pairs, two heaps", 90, 0, 9, 12, random, 2000);  // a product has no digit of distances inside them
  check_neighbors<S>(type + " neighbors", 70, 0, 21, random);
  check_neighbors<S>(type + " neighbors, many groups", 470, 0, 5, random);
  check_neighbors<S>(type + " neighbors, gallery", 5, 700, 70, random);
  check_neighbors<S>(type + " neighbors, copies", 6, 4800, 2, random, 2400);  // more than shared memory has room for
  check_gram<S>(type + " gram, slices", {{1, 5, 700, false}}, StyleDistance::l2, random);
  check_gram<S>(type + " gram, layers", {{1, 5, 30, false}, {2, 70, 77, false}, {1, 67, 40, true}}, StyleDistance::l2, random);
  check_gram<S>(type + " gram, whole tiles", {{1, 64, 384, false}, {1, 128, 128, false}, {1, 128, 128, true}}, StyleDistance::l2, random);
  check_gram<S>(type + " gram, absolute", {{1, 3, 20, true}, {2, 9, 33, false}}, StyleDistance::l1, random);
  check_gram<S>(type + " gram, roots", {{1, 3, 20, true}, {2, 9, 33, false}}, StyleDistance::frobenius, random);
}

}  // namespace

#if defined(__CUDACC__)
void set_schedule(int, bool) {}  // the GPU has its own
#else
void set_schedule(int seed, bool lazy) { emulator::Options::current() = {unsigned(seed), lazy}; }
#endif

int main(int argc, char** argv) {
  const int first = argc > 1 ? std::atoi(argv[1]) : 0, count = argc > 2 ? std::atoi(argv[2]) : 1;
  selected = argc > 3 ? argv[3] : "";
  try {
    for (int seed = first; seed < first + count && failures == 0; ++seed) {
      for (const bool lazy : {true, false}) {
        set_schedule(seed, lazy);
        std::mt19937 random(seed);
        check_walk();
        check_as_near();
        check_sort(random);
        check_all<float>("float32", random);
        check_all<double>("float64", random);
        check_all<BFloat16>("bfloat16", random);
        check_all<Half>("float16", random);
      }
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d wrong in %d seeds\n", failures, count);
  return failures != 0;
}
