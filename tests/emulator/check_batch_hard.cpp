// Batch-hard mining, loss and gradient; the walk over tiles; sorts. See check.h.
#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"
#include "csrc/cuda/batch_hard.cu"

__global__ void walk_kernel(TileArguments a, int32_t* visits) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= a.stretches) return;
  for (int step = 0; step < steps_of(t, a); ++step) {
    const TileIndex tile = tile_index(t, step, a);
    if (tile.row >= 0) atomicAdd(&visits[tile.row * a.column_tiles + tile.column], 1);
  }
}

namespace {

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
    Buffer<unsigned long long> keys(2 * padded_rows(n));
    TileMining mining = {};
    mining.by_wgmma = how == Mining::wgmma;
    mining.anchors = sorted.view();
    mining.references = self_form ? sorted.view() : ref_sorted.view();
    if (batch.storage == Storage::float32) {
      mining.centre = {slices, sums, centre};
    }
    mining.anchor_keys = {keys, &keys[0] + padded_rows(n)};
    if (self_form) mining.reference_keys = mining.anchor_keys;
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
  LossGradient g = {};
  g.batch = batch;
  g.positives = positives;
  g.negatives = negatives;
  g.d_ap = d_ap;
  g.d_an = d_an;
  g.grad_loss = grad_loss;
  Buffer<int32_t> choices(2 * n), sorted_choices(2 * n);
  Buffer<int64_t> order(2 * n);
  g.choices = choices;
  lay_choices(g, options, nullptr);
  synchronize();
  std::iota(&order[0], &order[0] + 2 * n, 0);
  std::stable_sort(&order[0], &order[0] + 2 * n, [&](int64_t a, int64_t b) { return choices[a] < choices[b]; });
  for (int64_t u = 0; u < 2 * n; ++u) sorted_choices[u] = choices[order[u]];
  Buffer<int32_t> first_choice(references.count + 1);
  Buffer<T> coefficients(n);
  g.sorted_choices = sorted_choices;
  g.choice_order = order;
  g.first_choice = first_choice;
  g.coefficients = coefficients;
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

// Of the rows of both sides the farthest positive and the nearest negative: by tiles that are given a centre, of anchors by differences.
template <class S>
void check_extremes(const std::string& name, int64_t n, int64_t m, int64_t depth, int classes, Mining how, std::mt19937& random) {
  using T = Compute<S>;
  if (!wanted(name)) return;
  const bool self_form = m == 0;
  Points<S> anchors(n, depth, classes, 0.5, random), others(m, depth, classes, 0.5, random);
  Points<S>& references = self_form ? anchors : others;
  Buffer<Flags> flags(1, 0);
  const Batch batch = batch_of(anchors, references, self_form, Distance::euclidean, flags);
  const auto compare = [&](Points<S>& rows, Points<S>& columns, Buffer<T>& values, Buffer<int32_t>& indices, const std::string& what) {
    for (int64_t a = 0; a < rows.count; ++a) {
      for (const bool same : {true, false}) {
        const auto candidate = [&](int64_t j) { return (rows.labels[a] == columns.labels[j]) == same && !(self_form && j == a); };
        const double none = same ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
        double best = none;
        for (int64_t j = 0; j < columns.count; ++j) {
          if (!candidate(j)) continue;
          const double half_square = rows.square(a, columns, j) / 2;
          best = same ? std::max(best, half_square) : std::min(best, half_square);
        }
        const int64_t at = (same ? 0 : rows.count) + a, j = indices[at];
        const double value = double(values[at]);
        const auto near = [&](double v) { return std::fabs(v - best) < 1e-5 * double(depth); };
        const bool found = j >= 0 && j < columns.count && candidate(j) && near(rows.square(a, columns, j) / 2) && near(value);
        expect(best == none ? j == -1 && value == none : found,
               name + what + (same ? ": positive of " : ": negative of ") + std::to_string(a));
      }
    }
  };

  Buffer<T> values(2 * n), reference_values(2 * m);
  Buffer<int32_t> indices(2 * n), reference_indices(2 * m);
  if (how == Mining::direct) {
    const int splits = direct_splits(n, references.count);
    Buffer<T> found_values(2 * splits * n);
    Buffer<int32_t> found_indices(2 * splits * n);
    const DirectFound found{splits, found_values, found_indices};
    mine_direct(batch, found, nullptr);
    extremes_of_direct(batch, found, {values, indices, nullptr}, nullptr);
    synchronize();
    return compare(anchors, references, values, indices, "");
  }

  const int64_t row_bytes = operand_row_bytes(batch.storage, depth, false);
  Sorted sorted(anchors, row_bytes), ref_sorted(references, row_bytes);
  const bool centred = batch.storage == Storage::float32;
  Buffer<float> centre(depth), half_norms(n);
  for (int64_t k = 0; k < depth; ++k) centre[k] = 0.25f;
  Buffer<unsigned long long> keys(2 * padded_rows(n)), reference_keys(2 * padded_rows(m));
  TileMining mining = {};
  mining.by_wgmma = how == Mining::wgmma;
  mining.anchors = sorted.view();
  mining.references = self_form ? sorted.view() : ref_sorted.view();
  if (centred) mining.centre = {0, nullptr, centre};
  mining.anchor_keys = {keys, &keys[0] + padded_rows(n)};
  mining.reference_keys = self_form ? mining.anchor_keys : Keys{reference_keys, &reference_keys[0] + padded_rows(m)};
  pack_tiles(batch, mining, nullptr);
  mine_tiles(batch, mining, nullptr);
  extremes_of_tiles(batch, mining, false, {values, indices, half_norms}, nullptr);
  if (!self_form) extremes_of_tiles(batch, mining, true, {reference_values, reference_indices, nullptr}, nullptr);
  synchronize();
  compare(anchors, references, values, indices, "");
  if (!self_form) compare(references, anchors, reference_values, reference_indices, ", seen from the references");
  for (int64_t a = 0; a < n; ++a) {
    double half_norm = 0;
    for (int64_t k = 0; k < depth; ++k) half_norm += std::pow(anchors.exact[a * depth + k] - (centred ? 0.25 : 0), 2) / 2;
    expect(std::fabs(double(half_norms[a]) - half_norm) < 1e-5 * double(depth), name + ": half norm of " + std::to_string(a));
  }
}

// Every tile is visited once; of the self form those on and above the diagonal.
void check_walk() {
  if (!wanted("walk")) return;
  for (const auto [down, across] : {std::pair{1, 1}, {2, 2}, {8, 8}, {9, 9}, {31, 31}, {3, 20}, {20, 3}, {17, 1}}) {
    for (const int bits : {0, 1, 2, 3}) {
      TileArguments a = {};
      a.row_tiles = down;
      a.column_tiles = across;
      a.self_form = down == across;
      plan_walk(a, bits);
      Buffer<int32_t> visits(down * across, 0);
      launch(walk_kernel, blocks_for(a.stretches, 32), 32, 0, nullptr, a, &visits[0]);
      synchronize();
      bool right = true;
      for (int r = 0; r < down; ++r)
        for (int c = 0; c < across; ++c) right &= visits[r * across + c] == (!a.self_form || r <= c);
      expect(right, "walk over " + std::to_string(down) + " x " + std::to_string(across) + " tiles by " + std::to_string(1 << bits));
    }
  }
}

// Stable, also of the least and the largest number there is.
void check_sort(std::mt19937& random) {
  if (!wanted("sort")) return;
  for (const auto [count, labels] : {std::pair{1, 1}, {255, 3}, {257, 1000}, {1300, 40}, {1100, 1}, {17000, 300}}) {
    Buffer<int64_t> label(count), order(count), sorted(count);
    Buffer<int64_t> of_runs(count);
    Buffer<int32_t> order_of_runs(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t l = int64_t(random() % unsigned(labels)) - labels / 2;
      label[i] = i > 600 ? l : l * (int64_t(1) << 33);  // blocks with and without numbers of more than 32 bits
      if (i < 600 && i % 7 == 0) label[i] = std::numeric_limits<int64_t>::min();
      if (i < 600 && i % 7 == 1) label[i] = std::numeric_limits<int64_t>::max();
    }
    sort_by_rank(&label[0], count, {of_runs, order_of_runs}, &sorted[0], &order[0], nullptr);
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
void check_storage(const std::string& type, std::mt19937& random) {
  check_batch_hard<S>(type + " direct", 70, 0, 19, 9, Mining::direct, random);
  check_batch_hard<S>(type + " direct, references", 5, 130, 19, 3, Mining::direct, random);
  check_extremes<S>(type + " direct, extremes", 70, 90, 19, 40, Mining::direct, random);
  if constexpr (!std::is_same_v<S, double>) {
    for (const Mining how : {Mining::mma, Mining::wgmma}) {
      if (how == Mining::wgmma && !can_use_wgmma()) continue;
      const std::string tiles = type + (how == Mining::mma ? " mma" : " wgmma");
      check_batch_hard<S>(tiles, 300, 0, 100, 40, how, random);
      check_batch_hard<S>(tiles + ", two heaps", 140, 0, 20, 40, how, random, 1e3);
      check_batch_hard<S>(tiles + ", one label", 130, 0, 70, 1, how, random);
      check_batch_hard<S>(tiles + ", references", 40, 270, 390, 12, how, random);
      check_extremes<S>(tiles + ", extremes", 150, 0, 40, 60, how, random);
      check_extremes<S>(tiles + ", extremes of both sides", 140, 270, 70, 90, how, random);
      if (how != Mining::wgmma) continue;
      check_batch_hard<S>(tiles + ", rows that stay", 270, 600, 70, 300, how, random);
      check_batch_hard<S>(tiles + ", rows of one chunk that stay", 500, 300, 30, 300, how, random);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return check_under_schedules(argc, argv, [](std::mt19937& random) {
    check_walk();
    check_sort(random);
    for_each_storage([&](auto s, const std::string& type) { check_storage<decltype(s)>(type, random); });
  });
}
