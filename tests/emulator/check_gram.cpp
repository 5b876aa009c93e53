// Gram matrices, the style loss and its gradient. See check.h.
#include <algorithm>
#include <cmath>
#include <memory>

#include "check.h"
#include "csrc/cuda/gram.cu"

namespace {

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

template <class S>
void check_storage(const std::string& type, std::mt19937& random) {
  check_gram<S>(type + " gram, slices", {{1, 5, 700, false}}, StyleDistance::l2, random);
  check_gram<S>(type + " gram, layers", {{1, 5, 30, false}, {2, 70, 77, false}, {1, 67, 40, true}}, StyleDistance::l2, random);
  check_gram<S>(type + " gram, whole tiles", {{1, 64, 384, false}, {1, 128, 128, false}, {1, 128, 128, true}}, StyleDistance::l2, random);
  check_gram<S>(type + " gram, absolute", {{1, 3, 20, true}, {2, 9, 33, false}}, StyleDistance::l1, random);
  check_gram<S>(type + " gram, roots", {{1, 3, 20, true}, {2, 9, 33, false}}, StyleDistance::frobenius, random);
}

}  // namespace

int main(int argc, char** argv) {
  return check_under_schedules(argc, argv, [](std::mt19937& random) {
    for_each_storage([&](auto s, const std::string& type) { check_storage<decltype(s)>(type, random); });
  });
}
