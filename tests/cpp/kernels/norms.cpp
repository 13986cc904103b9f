// The kernels of normalisation layers.

#include <algorithm>

#include "group_norm_grads.cuh"
#include "layer_norm_grads.cuh"
#include "problem.h"

namespace kernel_tests {
namespace {

// sum_t e_t (x_t - mean) / deviation and sum_t e_t, of the terms t of a channel.
struct Normalised {
  double mean, deviation, product = 0, grad = 0;

  // The statistics are those of x(0) to x(count - 1). Without centring, the mean counts as zero.
  template <typename F>
  Normalised(int64_t count, double eps, bool centred, F x) {
    double sum = 0, squares = 0;
    for (int64_t t = 0; t < count; ++t) sum += x(t);
    mean = centred ? sum / std::max<int64_t>(count, 1) : 0;
    for (int64_t t = 0; t < count; ++t) squares += (x(t) - mean) * (x(t) - mean);
    deviation = std::sqrt(squares / std::max<int64_t>(count, 1) + eps);
  }
  void add(double e, double x) {
    product += e * (x - mean) / deviation;
    grad += e;
  }
};

// Inputs and output gradients on the heap, exact in size, with copies in double; and results of the kernel.
template <typename S>
struct NormProblem {
  std::unique_ptr<S[]> input, output_grad, weight, bias;
  Doubles x, e, want;
  int64_t results;

  NormProblem(int64_t numbers, int64_t results, float mean)
      : input(new S[numbers]),
        output_grad(new S[numbers]),
        weight(new S[results]),
        bias(new S[results]),
        results(results) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal(mean);
    for (auto [to, copy] : {std::pair{&input, &x}, {&output_grad, &e}})
      for (int64_t i = 0; i < numbers; ++i) {
        narrow(Accumulate<S>(normal(random)), (*to)[i]);
        copy->push_back(value((*to)[i]));
      }
    std::memset(static_cast<void*>(weight.get()), 0xff, results * sizeof(S));
    std::memset(static_cast<void*>(bias.get()), 0xff, results * sizeof(S));
  }

  // The error of all weights and biases, divided by that which rounding allows. `want` has the weights first.
  double deviation(double scale) const {
    Doubles found;
    for (const auto* from : {&weight, &bias})
      for (int64_t c = 0; c < results; ++c) found.push_back(value((*from)[c]));
    return error(found, want, scale) / precision<S>();
  }
};

// The worst of deviation(count), for reads of one element and, if all rows start on 16 bytes, of 16 bytes.
template <typename S, typename F>
double by_reads(int64_t columns, F deviation) {
  constexpr int kColumns = Packet<S>::kColumns;
  const double by_element = deviation(std::integral_constant<int, 1>());
  if (columns % kColumns != 0) return by_element;
  return std::max(by_element, deviation(std::integral_constant<int, kColumns>()));
}

// A few groups, of few or many channels, with as many places as `shape` has columns.
template <typename S, int kCount>
double check_group_norm_by(const Shape& shape, unsigned seed) {
  using T = Accumulate<S>;
  const int64_t groups = shape.blocks + 1, channels = 1 + shape.rows % 71, positions = shape.columns[0];
  const int64_t all = channels * positions;
  const double eps = 1e-5;
  NormProblem<S> problem(groups * all, groups * channels, shape.mean);
  const ChannelParts parts = channel_parts(channels, positions / kCount);
  std::vector<ChannelSums<T>> sums(groups * channels * parts.number, {NAN, NAN, NAN, NAN});
  machine.run(groups, 1, group_norm_shared_bytes<S>(), seed, [&](char* shared) {
    group_norm_grads<kCount>(problem.output_grad.get(), problem.input.get(), channels, positions, parts, eps,
                             sums.data(), problem.weight.get(), problem.bias.get(), shared);
  });
  Doubles grads;
  for (int64_t g = 0; g < groups; ++g) {
    const Normalised group(all, eps, true, [&](int64_t t) { return problem.x[g * all + t]; });
    for (int64_t c = 0; c < channels; ++c) {
      Normalised channel = group;
      for (int64_t i = g * all + c * positions; i < g * all + (c + 1) * positions; ++i)
        channel.add(problem.e[i], problem.x[i]);
      problem.want.push_back(channel.product);
      grads.push_back(channel.grad);
    }
  }
  problem.want.insert(problem.want.end(), grads.begin(), grads.end());
  return problem.deviation(std::sqrt(positions));
}

template <typename S>
double check_group_norm(const Shape& shape, unsigned seed) {
  return by_reads<S>(shape.columns[0], [&](auto count) { return check_group_norm_by<S, count>(shape, seed); });
}

// The lanes of `shape` are the number of blocks that run at the same time.
template <typename S, bool kCentred, int kCount>
double check_layer_norm_by(const Shape& shape, unsigned seed) {
  using T = Accumulate<S>;
  const int64_t batch_size = shape.blocks, places = shape.rows, columns = std::max<int64_t>(shape.columns[0], 1);
  const int64_t rows = batch_size * places;
  const double eps = 1e-5;
  NormProblem<S> problem(rows * columns, batch_size * columns, shape.mean);
  const Runs runs = runs_of(batch_size, places, columns / kCount, shape.lanes);
  const auto read = [&](auto* weights, auto* biases) {
    machine.run(runs.blocks(), 1, layer_norm_shared_bytes<S>(runs), seed, [&](char* shared) {
      layer_norm_grads<kCount>(problem.output_grad.get(), problem.input.get(), runs, columns, eps, kCentred, weights,
                               biases, shared);
    });
  };
  if (runs.of_sample == 1) {
    read(problem.weight.get(), problem.bias.get());
  } else {
    const int64_t sums = runs.number() * columns;
    const std::unique_ptr<T[]> weights(new T[sums]), biases(new T[sums]);
    read(weights.get(), biases.get());
    for (auto [from, to] : {std::pair{weights.get(), problem.weight.get()}, {biases.get(), problem.bias.get()}})
      machine.run(add_runs_blocks(runs, columns), 1, kAddRunsSharedBytes, seed,
                  [&](char* shared) { add_runs(from, runs, columns, to, shared); });
  }
  problem.want.assign(2 * batch_size * columns, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const double* x = problem.x.data() + r * columns;
    const Normalised row(columns, eps, kCentred, [&](int64_t c) { return x[c]; });
    for (int64_t c = 0; c < columns; ++c) {
      Normalised entry = row;
      entry.add(problem.e[r * columns + c], x[c]);
      problem.want[r / places * columns + c] += entry.product;
      problem.want[(batch_size + r / places) * columns + c] += entry.grad;
    }
  }
  return problem.deviation(std::sqrt(places));
}

template <typename S, bool kCentred>
double check_layer_norm(const Shape& shape, unsigned seed) {
  return by_reads<S>(std::max<int64_t>(shape.columns[0], 1),
                     [&](auto count) { return check_layer_norm_by<S, kCentred, count>(shape, seed); });
}

}  // namespace

std::vector<Kernel> norm_kernels() {
  return for_dtypes([]<typename S>() -> std::vector<Kernel> {
    return {{"group norm", check_group_norm<S>},
            {"layer norm", check_layer_norm<S, true>},
            {"rms norm", check_layer_norm<S, false>}};
  });
}

}  // namespace kernel_tests
