// The bodies of the CUDA kernels, run by emulation.h, against double precision: every dtype, odd sizes and unaligned
// rows, many matrices, few and many blocks, random schedules. And the test of that test: without any one of its
// barriers, every kernel is caught. `kernel_tests NAME` runs the kernels whose name contains NAME.

#include <bit>
#include <cmath>
#include <string>

#include "check.h"
#include "combine.cuh"
#include "embedding_gram.cuh"
#include "ghost_gram.cuh"
#include "gram.cuh"
#include "gram_moments.cuh"
#include "group_norm_grads.cuh"
#include "largest_eigenvalue.cuh"
#include "layer_norm_grads.cuh"
#include "moments.cuh"
#include "products.cuh"
#include "reduce.cuh"
#include "sample_weights.cuh"
#include "squared_norm.cuh"

namespace {

using namespace rgd_ext::cuda;
using rgd_ext::emulation::machine;
using Doubles = std::vector<double>;

constexpr int kCapacity = 8;
constexpr int kVectors = 3;  // beside each matrix

template <typename S>
double value(S stored) {
  return static_cast<double>(widen(stored));
}
template <typename S>
double precision() {
  if constexpr (std::is_same_v<S, double>) return 1e-13;
  return std::is_same_v<S, BFloat16> ? 1e-2 : std::is_same_v<S, Half> ? 2e-3 : 2e-6;
}
template <typename S>
double sum_precision() {
  return std::is_same_v<S, double> ? 1e-13 : 2e-6;
}

struct Shape {
  int64_t rows;
  std::vector<int64_t> columns;
  int lanes;
  int64_t blocks;
  int64_t padding;        // elements in front of each row; odd numbers leave rows unaligned
  int64_t behind = 0;     // elements behind each row but the last; may let aligned rows end inside 16 bytes
  bool positive = false;  // all elements between 1 and 2
  float mean = 3;         // of what is normalised
};

std::string describe(const Shape& shape) {
  std::string text = std::to_string(shape.rows) + " x {";
  for (int64_t n : shape.columns) text += " " + std::to_string(n);
  return text + " }, " + std::to_string(shape.lanes) + " lanes, " + std::to_string(shape.blocks) + " blocks, padding " +
         std::to_string(shape.padding) + " and " + std::to_string(shape.behind);
}

// Matrices to the byte on the heap, the same in double as one, and vectors beside them.
template <typename S>
struct Problem {
  Shape shape;
  std::vector<std::unique_ptr<S[]>> data, others;
  Table<kCapacity> table{};
  std::vector<Doubles> rows, vectors;

  explicit Problem(const Shape& shape) : Problem(shape, shape.lanes) {}
  Problem(const Shape& shape, int lanes) : shape(shape), rows(shape.rows), vectors(kVectors) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.25F);
    std::uniform_real_distribution<float> positive(1, 2);
    table.rows = shape.rows;
    table.lanes = lanes;
    for (int64_t n : shape.columns) {
      const int64_t stride = n + shape.padding + shape.behind, width = lanes * Packet<S>::kColumns;
      const int64_t size = std::max<int64_t>(shape.rows * stride - shape.behind, 0);
      data.emplace_back(new S[size]);
      others.emplace_back(new S[kVectors * n]);
      const auto draw = [&](S& to, Doubles& copy) {
        narrow(Accumulate<S>(shape.positive ? positive(random) : normal(random)), to);
        copy.push_back(value(to));
      };
      for (int64_t i = 0; i < shape.rows; ++i)
        for (int64_t c = 0; c < n; ++c) draw(data.back()[i * stride + shape.padding + c], rows[i]);
      for (int64_t j = 0; j < kVectors; ++j)
        for (int64_t c = 0; c < n; ++c) draw(others.back()[j * n + c], vectors[j]);
      table.matrix[table.matrices++] = {data.back().get() + shape.padding, others.back().get(), stride, n, table.tiles};
      table.tiles += (n + width - 1) / width;
    }
  }

  int64_t blocks() const { return std::min(shape.blocks, table.tiles); }

  // Vector j of what a kernel wrote beside the matrices.
  Doubles written(int64_t j) const {
    Doubles result;
    for (size_t m = 0; m < others.size(); ++m)
      for (int64_t c = 0; c < shape.columns[m]; ++c) result.push_back(value(others[m][j * shape.columns[m] + c]));
    return result;
  }
  void poison() {
    for (size_t m = 0; m < others.size(); ++m)
      std::memset(static_cast<void*>(others[m].get()), 0xff, kVectors * shape.columns[m] * sizeof(S));
  }
};

double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}
Doubles weighted_sum(const std::vector<Doubles>& rows, const Doubles& weights) {
  Doubles sum(rows[0].size());
  for (size_t i = 0; i < rows.size(); ++i)
    for (size_t c = 0; c < sum.size(); ++c) sum[c] += weights[i] * rows[i][c];
  return sum;
}
Doubles minus(Doubles a, const Doubles& b) {
  for (size_t c = 0; c < a.size(); ++c) a[c] -= b[c];
  return a;
}

// Largest error over the largest expected value or `scale`.
double error(const Doubles& got, const Doubles& want, double scale) {
  double error = 0;
  for (size_t c = 0; c < want.size(); ++c) {
    if (!std::isfinite(got[c])) return INFINITY;
    error = std::max(error, std::abs(got[c] - want[c]));
    scale = std::max(scale, std::abs(want[c]));
  }
  return got.size() == want.size() ? error / std::max(scale, 1e-300) : INFINITY;
}

template <typename T>
Doubles reduced(const Doubles& partials, int64_t rows, int64_t slots, unsigned seed) {
  std::unique_ptr<T[]> results(new T[rows]);
  machine.run(row_blocks(rows), 1, 0, seed, [&](char*) { reduce_rows(partials.data(), rows, slots, results.get()); });
  return {results.get(), results.get() + rows};
}

// A check runs a kernel once and returns its error over what rounding allows.
template <typename S>
double check_moments(const Shape& shape, unsigned seed) {
  Problem<S> problem(shape);
  problem.poison();
  const int64_t rows = shape.rows, blocks = problem.blocks(), slots = blocks + 2;
  Doubles partials(2 * rows * slots, 0.0);
  machine.run(blocks, 1, moments_shared_bytes<S>(rows, shape.lanes), seed,
              [&](char* shared) { moments<S>(problem.table, partials.data(), slots, 1, shared); });
  const Doubles mean = weighted_sum(problem.rows, Doubles(rows, 1.0 / rows));
  double scale = 0;
  Doubles want;
  for (const Doubles& row : problem.rows) scale = std::max(scale, dot(row, row));
  for (const Doubles& row : problem.rows) want.push_back(dot(minus(row, mean), mean));
  for (const Doubles& row : problem.rows) want.push_back(dot(minus(row, mean), minus(row, mean)));
  return std::max(error(problem.written(0), mean, 1) / precision<S>(),
                  error(reduced<Accumulate<S>>(partials, 2 * rows, slots, seed), want, scale) / sum_precision<S>());
}

template <typename S>
double check_squared_norm(const Shape& shape, unsigned seed) {
  const Problem<S> problem({1, shape.columns, kSquaredNormLanes, shape.blocks, shape.padding});
  const int64_t slots = problem.blocks() + 2;
  Doubles partials(slots, 0.0);
  machine.run(problem.blocks(), 1, kBlockSumBytes, seed,
              [&](char* shared) { squared_norm<S>(problem.table, partials.data(), 1, shared); });
  const Doubles want{dot(problem.rows[0], problem.rows[0])};
  return error(reduced<Accumulate<S>>(partials, 1, slots, seed), want, 0) / sum_precision<S>();
}

template <typename S, int kOutputs>
double check_combine(const Shape& shape, unsigned seed) {
  Problem<S> problem(shape);
  problem.poison();
  const int64_t count = kOutputs == 1 ? 1 : 2, first = 1;
  std::vector<Accumulate<S>> weights;
  for (int64_t i = 0; i < count * shape.rows; ++i) weights.push_back(Accumulate<S>((i * 7 % 5 - 1) / 3.0));
  machine.run(problem.blocks(), 1, group_sums_bytes<S>(), seed, [&](char* shared) {
    combine<S, kCapacity, kOutputs>(problem.table, weights.data(), first, count, shared);
  });
  double worst = 0;
  for (int64_t j = 0; j < count; ++j) {
    const auto begin = weights.begin() + j * shape.rows;
    const Doubles want = weighted_sum(problem.rows, Doubles(begin, begin + shape.rows));
    worst = std::max(worst, error(problem.written(first + j), want, std::sqrt(shape.rows)));
  }
  return worst / precision<S>();
}

template <typename S, bool kCentred>
double check_products(const Shape& shape, unsigned seed) {
  Problem<S> problem(shape);
  constexpr int kSums = kCentred ? 2 : 4, kRead = kCentred ? 1 : 4;
  const int64_t rows = shape.rows, slots = problem.blocks(), first = kCentred ? 0 : 1;
  Doubles partials(kSums * rows * slots, -1);
  machine.run(slots, product_blocks(rows), products_shared_bytes<S>(rows, shape.lanes, kRead, kSums), seed,
              [&](char* shared) {
                products<S, kCapacity, kCentred, kRead>(problem.table, first, kCentred ? 1 : 2, partials.data(), slots,
                                                        0, shared);
              });
  double scale = 0;
  for (const Doubles& row : problem.rows) scale = std::max(scale, dot(row, row));
  Doubles want;
  const Doubles &v = problem.vectors[first], &u = problem.vectors[first + 1];
  if (kCentred) {
    for (const Doubles& row : problem.rows) want.push_back(dot(minus(row, v), v));
    for (const Doubles& row : problem.rows) want.push_back(dot(minus(row, v), minus(row, v)));
  } else {
    for (const Doubles& row : problem.rows) want.push_back(dot(row, v));
    for (const Doubles& row : problem.rows) want.push_back(dot(row, u));
  }
  Doubles got = reduced<Accumulate<S>>(partials, kSums * rows, slots, seed);
  got.resize(2 * rows);  // vectors that were not asked for
  return error(got, want, scale) / sum_precision<S>();
}

// For every pair of samples.
template <typename F>
Doubles pairs(int64_t rows, F product) {
  Doubles products;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j) products.push_back(product(i, j));
  return products;
}

template <typename Sums>
double gram_error(const std::vector<typename Sums::T>& gram, const Doubles& want, int64_t rows) {
  using S = typename Sums::Storage;
  if (pairs(rows, [&](int64_t i, int64_t j) { return gram[i * rows + j]; }) !=
      pairs(rows, [&](int64_t i, int64_t j) { return gram[j * rows + i]; }))
    return INFINITY;
  const bool tf32 = std::is_same_v<S, float> && std::is_same_v<Sums, MatrixUnitSums<S, Sums::Shape::kBlock>>;
  return error(Doubles(gram.begin(), gram.end()), want, 0) / (tf32 ? 1e-3 : sum_precision<S>());
}

template <typename Sums>
double check_gram(const Shape& shape, unsigned seed) {
  using Layout = typename Sums::Shape;
  const Problem<typename Sums::Storage> problem(shape, Layout::kLanes);
  const int64_t rows = shape.rows, side = (rows + Layout::kBlock - 1) / Layout::kBlock;
  const int64_t first_share = 1, shares = first_share + problem.blocks();
  std::vector<typename Sums::T> partials(shares * rows * rows, NAN), gram(rows * rows, NAN);
  std::fill(partials.begin(), partials.begin() + rows * rows, 0);  // share 0: another launch's
  machine.run(problem.blocks(), side * (side + 1) / 2, gram_shared_bytes<Sums>(), seed, [&](char* shared) {
    const Part part{block_index(), problem.table.tiles, blocks(), first_share + block_index()};
    rgd_ext::cuda::gram<Sums>(problem.table, part, partials.data(), shared);
  });
  machine.run(reduce_blocks<kGramEntries>(rows), 1, kReduceSharedBytes, seed,
              [&](char* shared) { reduce_gram(partials.data(), rows, shares, gram.data(), shared); });
  const auto want = [&](int64_t i, int64_t j) { return dot(problem.rows[i], problem.rows[j]); };
  return gram_error<Sums>(gram, pairs(rows, want), rows);
}

// Layers whose inputs have the columns of `shape`, and output gradients some of their own; every other has a bias. On
// top of a Gramian that is there.
template <typename Sums>
double check_ghost_gram(const Shape& shape, unsigned seed) {
  using Layout = typename Sums::Shape;
  Shape both = shape;
  both.columns.clear();
  for (int64_t n : shape.columns) both.columns.insert(both.columns.end(), {n, n * 7 % 90 + 1});
  const Problem<typename Sums::Storage> problem(both, Layout::kLanes);
  const int64_t rows = shape.rows, side = (rows + Layout::kBlock - 1) / Layout::kBlock;

  Layers<kCapacity> layers{.factors = problem.table, .block_tiles = 0, .biases = {}};
  Table<kCapacity>& factors = layers.factors;
  layers.block_tiles = static_cast<int>(std::max<int64_t>(factors.tiles / shape.blocks, 1));
  for (int m = 0; m < factors.matrices; ++m) {
    layers.biases[m / 2] = m / 2 % 2 == 0;
    const int64_t end = m + 1 < factors.matrices ? problem.table.matrix[m + 1].first_tile : problem.table.tiles;
    const int64_t blocks = (end - problem.table.matrix[m].first_tile + layers.block_tiles - 1) / layers.block_tiles;
    if (m == 0) factors.tiles = 0;
    factors.matrix[m].first_tile = factors.tiles;
    factors.tiles += blocks * layers.block_tiles;
  }
  const int64_t blocks = factors.tiles / layers.block_tiles;
  std::vector<typename Sums::T> partials(blocks * rows * rows, NAN), gram(rows * rows, 1);
  machine.run(blocks, side * (side + 1) / 2, gram_shared_bytes<Sums>(), seed,
              [&](char* shared) { ghost_products<Sums>(layers, partials.data(), shared); });
  machine.run(reduce_blocks<kGhostEntries>(rows), 1, kReduceSharedBytes, seed,
              [&](char* shared) { reduce_layers(layers, partials.data(), true, gram.data(), shared); });
  const auto want = [&](int64_t i, int64_t j) {
    double sum = 1;
    int64_t column = 0;
    for (int m = 0; m < factors.matrices; m += 2) {
      double products[2] = {0, 0};
      for (int f = 0; f < 2; ++f)
        for (int64_t c = 0; c < factors.matrix[m + f].columns; ++c, ++column)
          products[f] += problem.rows[i][column] * problem.rows[j][column];
      sum += (products[0] + layers.biases[m / 2]) * products[1];
    }
    return sum;
  };
  return gram_error<Sums>(gram, pairs(rows, want), rows);
}

double check_weights(const Shape& shape, unsigned seed) {
  const int64_t rows = shape.rows, slots = 67;
  Doubles partials(rows * slots);
  for (size_t i = 0; i < partials.size(); ++i) partials[i] = std::sin(static_cast<double>(i));
  std::unique_ptr<double[]> weights(new double[rows]);
  const double epsilon = 0.3;
  machine.run(row_blocks(rows), 1, 0, seed,
              [&](char*) { reduce_to_weights(partials.data(), rows, slots, &epsilon, weights.get()); });
  Doubles want;
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < slots; ++s) sum += partials[i * slots + s];
    want.push_back((1 - epsilon * sum) / rows);
  }
  return error({weights.get(), weights.get() + rows}, want, 1) / 1e-13;
}

double check_gram_moments(const Shape& shape, unsigned seed) {
  const Problem<double> problem(shape);
  const int64_t rows = shape.rows, blocks = row_blocks(rows);
  const Doubles gram = pairs(rows, [&](int64_t i, int64_t j) { return dot(problem.rows[i], problem.rows[j]); });
  Doubles means(rows, NAN), found(1 + 2 * rows + rows * rows, NAN);
  machine.run(blocks, 1, 0, seed, [&](char*) { row_means(gram.data(), rows, means.data()); });
  double* to = found.data();
  machine.run(blocks, 1, 0, seed, [&](char*) {
    centre_gram(gram.data(), means.data(), rows, GramMoments{to, to + 1, to + 1 + rows, to + 1 + 2 * rows});
  });
  const Doubles mean = weighted_sum(problem.rows, Doubles(rows, 1.0 / rows));
  std::vector<Doubles> centred;
  for (const Doubles& row : problem.rows) centred.push_back(minus(row, mean));
  Doubles want = {dot(mean, mean)};
  for (const Doubles& row : centred) want.push_back(dot(row, mean));
  for (const Doubles& row : centred) want.push_back(dot(row, row));
  for (const Doubles& row : centred)
    for (const Doubles& other : centred) want.push_back(dot(row, other));
  return error(found, want, *std::max_element(gram.begin(), gram.end())) / 1e-13;
}

// Once with a D that counts as zero and once with one that does not.
double check_sample_weights(const Shape& shape, unsigned seed) {
  const int64_t rows = shape.rows;
  Doubles alignments, norms, found(2 * (1 + rows), NAN), want;
  for (int64_t i = 0; i < rows; ++i) alignments.push_back(std::sin(static_cast<double>(i)));
  for (int64_t i = 0; i < rows; ++i) norms.push_back(1 + static_cast<double>(i % 3));
  const double trace = dot(norms, Doubles(rows, 1.0 / rows)), epsilon = 0.3, ulp = 1e-3;
  double* to = found.data();
  for (const double factor : {0.99, 1.01}) {
    const double squared = trace / (8 * ulp) / factor, wanted = factor > 1 ? epsilon : 0;
    machine.run(1, 1, 0, seed, [&](char*) {
      sample_weights(&squared, alignments.data(), norms.data(), &epsilon, ulp, rows, to, to + 1);
    });
    to += 1 + rows;
    want.push_back(wanted);
    for (double alignment : alignments) want.push_back((1 - wanted * alignment) / rows);
  }
  return error(found, want, 0) / 1e-15;
}

// sum_t e_t (x_t - mean) / deviation and sum_t e_t, of the terms t of a channel.
struct Normalised {
  double mean, deviation, product = 0, grad = 0;

  // With statistics of all x; of their squares alone if not centred.
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

// Inputs and output gradients, to the byte on the heap and in double; and what becomes of them.
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

  // Of all weights and then all biases, which `want` holds.
  double deviation(double scale) const {
    Doubles found;
    for (const auto* from : {&weight, &bias})
      for (int64_t c = 0; c < results; ++c) found.push_back(value((*from)[c]));
    return error(found, want, scale) / precision<S>();
  }
};

// With reads of 16 bytes if all rows start on 16 bytes, and with reads of one element.
template <typename S, typename F>
double by_reads(int64_t columns, F deviation) {
  constexpr int kColumns = Packet<S>::kColumns;
  const double by_element = deviation(std::integral_constant<int, 1>());
  if (columns % kColumns != 0) return by_element;
  return std::max(by_element, deviation(std::integral_constant<int, kColumns>()));
}

// Few channels and many, of a few groups of as many places as `shape` has columns.
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

// The lanes of `shape` are blocks that run at the same time.
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

// Slightly more samples than blocks; about as many entries as rows, some of them in the same row of the table. Sums
// that must not be read are NaN.
template <typename T>
double check_embedding_gram(const Shape& shape, unsigned seed) {
  const int64_t batch_size = shape.blocks + 1, columns = shape.columns[0], table_rows = shape.rows / 2 + 1;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.25F);
  std::vector<int64_t> starts = {0}, keys;
  for (int64_t i = 0; i < batch_size; ++i) {
    for (int64_t t = 0; t < shape.rows * i / shape.blocks; ++t)
      keys.push_back(i * table_rows + static_cast<int64_t>(random() % table_rows));
    starts.push_back(static_cast<int64_t>(keys.size()));
  }
  std::sort(keys.begin(), keys.end());
  std::unique_ptr<T[]> sums(new T[keys.size() * columns]), gram(new T[batch_size * batch_size]);
  std::vector<Doubles> grads(batch_size, Doubles(table_rows * columns, 0));
  for (size_t k = 0; k < keys.size(); ++k) {
    const bool counts = k == 0 || keys[k] != keys[k - 1];
    for (int64_t c = 0; c < columns; ++c) {
      const T sum = sums[k * columns + c] = counts ? normal(random) : NAN;
      if (counts) grads[keys[k] / table_rows][keys[k] % table_rows * columns + c] = sum;
    }
  }
  const std::unique_ptr<int64_t[]> sorted(new int64_t[keys.size()]);
  std::copy(keys.begin(), keys.end(), sorted.get());
  machine.run(batch_size, batch_size, kBlockSumBytes, seed, [&](char* shared) {
    embedding_gram(sorted.get(), sums.get(), starts.data(), table_rows, columns, batch_size, gram.get(), shared);
  });
  const Doubles want = pairs(batch_size, [&](int64_t i, int64_t j) { return dot(grads[i], grads[j]); });
  return error(Doubles(gram.get(), gram.get() + batch_size * batch_size), want, 0) / sum_precision<T>();
}

// The kernel's result for a reflection of a diagonal matrix, with one entry changed.
template <typename T, typename S>
double found_eigenvalue(const Doubles& eigenvalues, double change, int64_t shared_bytes, unsigned seed) {
  const auto size = static_cast<int>(eigenvalues.size());
  Doubles normal, scaled;  // scaled by the diagonal matrix
  for (int i = 0; i < size; ++i) normal.push_back(1 + static_cast<double>(i % 7));
  const double factor = 2 / dot(normal, normal);
  for (int i = 0; i < size; ++i) scaled.push_back(factor * eigenvalues[i] * normal[i]);
  const double form = factor * dot(scaled, normal);
  const std::unique_ptr<S[]> matrix(new S[size * size]);
  const std::unique_ptr<char[]> workspace(new char[eigenvalue_workspace_bytes<T>(size)]);
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const double products = form * normal[i] * normal[j] - normal[i] * scaled[j] - scaled[i] * normal[j];
      matrix[i * size + j] = static_cast<S>(products + (i == j ? eigenvalues[i] : 0));
    }
  }
  matrix[size * size / 2] += static_cast<S>(change);
  const double tolerance = rgd_ext::lanczos::tolerance(std::numeric_limits<T>::epsilon());
  S value = -1;
  machine.run(1, 1, shared_bytes, seed, [&](char* shared) {
    largest_eigenvalue<T>(matrix.get(), size, tolerance, workspace.get(), &value, shared, shared_bytes);
  });
  return value;
}

// Vectors of T, a matrix of S: a gradual spectrum with each eigenvalue twice, one with two that nearly are equal, and
// what has none. The second has so little shared memory that most of the matrix and the basis is in global memory.
template <typename T, typename S>
double check_largest_eigenvalue(const Shape& shape, unsigned seed) {
  constexpr int64_t kMuch = 227 << 10, kLittle = 12 << 10;
  // For float, the rounding error that rgd_ext/metric.py assumes on a GPU.
  constexpr double kUlps = std::is_same_v<T, float> ? 4 : 2000;
  const double scale = std::pow(10, (std::is_same_v<S, float> ? 35 : 280) * (static_cast<int>(seed % 3) - 1));
  Doubles gradual, close;
  for (int64_t i = 0; i < shape.rows; ++i) {
    gradual.push_back(scale * std::exp(-static_cast<double>(i / 2) / 3));
    close.push_back(scale * (i == 1 ? 1 - 1e-10 : 1 / (1 + static_cast<double>(i))));
  }
  const Doubles zero(shape.rows);
  if (found_eigenvalue<T, S>(zero, 0, kMuch, seed) != 0) return INFINITY;
  for (const double flaw : {NAN, INFINITY})
    if (!std::isnan(found_eigenvalue<T, S>(close, flaw, kMuch, seed))) return INFINITY;
  const double allowed = kUlps * std::numeric_limits<T>::epsilon();
  return std::max(error({found_eigenvalue<T, S>(gradual, 0, kMuch, seed)}, {scale}, scale),
                  error({found_eigenvalue<T, S>(close, 0, kLittle, seed)}, {scale}, scale)) /
         allowed;
}

using Check = double (*)(const Shape&, unsigned);
struct Kernel {
  std::string name;
  Check check;
};

template <typename S, template <typename, int> class Sums>
double check_gram_by_size(const Shape& shape, unsigned seed) {
  return (shape.rows <= 8    ? check_gram<Sums<S, 8>>
          : shape.rows <= 16 ? check_gram<Sums<S, 16>>
          : shape.rows <= 32 ? check_gram<Sums<S, 32>>
          : shape.rows <= 64 ? check_gram<Sums<S, 64>>
                             : check_gram<Sums<S, 128>>)(shape, seed);
}
template <typename S, template <typename, int> class Sums>
double check_ghost_gram_by_size(const Shape& shape, unsigned seed) {
  return (shape.rows <= 8    ? check_ghost_gram<Sums<S, 8>>
          : shape.rows <= 16 ? check_ghost_gram<Sums<S, 16>>
          : shape.rows <= 32 ? check_ghost_gram<Sums<S, 32>>
          : shape.rows <= 64 ? check_ghost_gram<Sums<S, 64>>
                             : check_ghost_gram<Sums<S, 128>>)(shape, seed);
}

template <typename S>
std::vector<Kernel> kernels_of(const std::string& dtype) {
  std::vector<Kernel> kernels = {{"moments", check_moments<S>},
                                 {"squared norm", check_squared_norm<S>},
                                 {"combine", check_combine<S, 1>},
                                 {"combine of several", check_combine<S, 4>},
                                 {"centred products", check_products<S, true>},
                                 {"products", check_products<S, false>},
                                 {"group norm", check_group_norm<S>},
                                 {"layer norm", check_layer_norm<S, true>},
                                 {"rms norm", check_layer_norm<S, false>}};
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>)
    kernels.insert(kernels.end(), {{"gram", check_gram_by_size<S, PlainSums>},
                                   {"ghost gram", check_ghost_gram_by_size<S, PlainSums>},
                                   {"embedding gram", check_embedding_gram<S>}});
  if constexpr (!std::is_same_v<S, double>)
    kernels.insert(kernels.end(), {{"gram by matrix units", check_gram_by_size<S, MatrixUnitSums>},
                                   {"ghost gram by matrix units", check_ghost_gram_by_size<S, MatrixUnitSums>}});
  for (Kernel& kernel : kernels) kernel.name = dtype + " " + kernel.name;
  return kernels;
}

// Set by the command line: only kernels whose name contains this run.
std::string chosen;

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels = {{"weights", check_weights},
                                 {"gram moments", check_gram_moments},
                                 {"sample weights", check_sample_weights},
                                 {"largest eigenvalue of double", check_largest_eigenvalue<double, double>},
                                 {"largest eigenvalue of double, in float", check_largest_eigenvalue<float, double>},
                                 {"largest eigenvalue of float", check_largest_eigenvalue<float, float>}};
  for (auto& more : {kernels_of<float>("float"), kernels_of<double>("double"), kernels_of<BFloat16>("bfloat16"),
                     kernels_of<Half>("half")})
    kernels.insert(kernels.end(), more.begin(), more.end());
  std::erase_if(kernels, [](const Kernel& kernel) { return kernel.name.find(chosen) == std::string::npos; });
  return kernels;
}

void expect_agreement(const std::vector<Kernel>& kernels, const std::vector<Shape>& shapes) {
  unsigned seed = 0;
  for (const Kernel& kernel : kernels) {
    for (const Shape& shape : shapes) {
      const double ratio = kernel.check(shape, ++seed);
      expect(ratio <= 1, kernel.name + ", " + describe(shape) + ": error " + std::to_string(ratio) + " of allowed");
    }
  }
}

void test_against_double() {
  expect_agreement(all_kernels(),
                   {
                       {1, {1}, 32, 1, 0},           {2, {129}, 32, 2, 0},         {3, {0, 5}, 8, 1, 1},
                       {7, {640}, 32, 2, 0},         {16, {515, 1, 64}, 16, 3, 0}, {17, {1000}, 8, 4, 8},
                       {33, {300, 0, 41}, 4, 2, 1},  {64, {257}, 32, 5, 3},        {70, {130, 260}, 16, 3, 0},
                       {130, {520}, 8, 2, 0},        {150, {97, 64}, 4, 3, 5},     {260, {65}, 4, 2, 0},
                       {9, {61, 5}, 8, 2, 0, 3},     {70, {125, 13}, 8, 3, 0, 3},  {5, {1030, 3}, 256, 1, 1},
                       {4, {70}, 256, 1, 0},         {4, {4000, 70}, 256, 2, 0},   {11, {600, 70}, 128, 2, 0},
                       {20, {64, 530}, 64, 2, 0, 3}, {8, {2100, 3}, 32, 2, 0},     {15, {1300, 70}, 16, 1, 1},
                   });
}

// Samples of one place, and of none; narrow rows at many places; rows with more reads than a block has threads, and
// than a lane adds up in T.
void test_normalisations() {
  std::vector<Kernel> norms = all_kernels();
  std::erase_if(norms, [](const Kernel& kernel) { return kernel.name.find(" norm") == std::string::npos; });
  expect_agreement(
      norms,
      {{1, {96}, 4, 70, 0}, {0, {5}, 4, 3, 0}, {700, {24}, 8, 2, 0}, {39, {2104}, 4, 1, 0}, {2, {17000}, 4, 1, 0}});
  // The rounding error of the mean is corrected.
  std::erase_if(norms, [](const Kernel& kernel) {
    return !kernel.name.starts_with("float") || kernel.name.ends_with("rms norm");
  });
  expect_agreement(norms, {{.rows = 40, .columns = {128}, .lanes = 4, .blocks = 2, .padding = 0, .mean = 1e4F}});
}

// Sums of so many terms move to the partial results while the kernel runs. The terms have one sign, so that they show
// the bias of the matrix units, which round towards zero.
void test_long_sums() {
  const auto check = [](const Check& check, int64_t rows, int64_t columns) {
    const Shape shape{.rows = rows, .columns = {columns}, .lanes = 8, .blocks = 1, .padding = 0, .positive = true};
    const double ratio = check(shape, 3);
    expect(ratio <= 1, "gram of long rows, " + describe(shape) + ": error " + std::to_string(ratio) + " of allowed");
  };
  check(check_gram_by_size<BFloat16, MatrixUnitSums>, 3, 300000);
  check(check_gram_by_size<BFloat16, MatrixUnitSums>, 33, 40000);
  check(check_gram_by_size<float, PlainSums>, 3, 150000);
  check(check_gram_by_size<float, PlainSums>, 33, 10000);
}

// Sums over samples are taken in one order everywhere.
template <typename S>
void test_equal_weights_give_the_mean_bitwise(const Shape& shape) {
  Problem<S> first(shape), second(shape);
  Doubles partials(2 * shape.rows * first.blocks());
  machine.run(first.blocks(), 1, moments_shared_bytes<S>(shape.rows, shape.lanes), 4,
              [&](char* shared) { moments<S>(first.table, partials.data(), first.blocks(), 0, shared); });
  const std::vector<Accumulate<S>> weights(shape.rows, Accumulate<S>(1) / Accumulate<S>(shape.rows));
  machine.run(second.blocks(), 1, group_sums_bytes<S>(), 5,
              [&](char* shared) { combine<S, kCapacity, 1>(second.table, weights.data(), 0, 1, shared); });
  expect(first.written(0) == second.written(0), "equal weights give the mean bitwise, " + describe(shape));
}

// The emulation notices errors in kernels: each of these has one.
void test_wrong_kernels_are_caught() {
  const auto run = [](auto kernel) { machine.run(1, 1, 0, 0, [&](char*) { kernel(thread_index() % kWarp); }); };
  const auto one_ends = [](int lane) { return lane == 5 ? 0 : warp_sum(1.0); };
  expect_error([&] { run(one_ends); }, "a lane ended before its warp's exchange at kernels.cpp:");
  const auto two_places = [](int lane) { return lane < 16 ? warp_sum(1.0) : warp_sum(2.0); };
  expect_error([&] { run(two_places); }, "lanes of a warp wait at kernels.cpp:");
  const auto some_at_a_barrier = [](int lane) {
    if (lane == 31) barrier();
    warp_sum(1.0);
  };
  expect_error([&] { run(some_at_a_barrier); }, "lanes of a warp wait at kernels.cpp:");
  const auto one_multiplies_alone = [](int lane) {
    float sums[4] = {};
    if (lane > 0) multiply_accumulate<BFloat16>(sums, {0, 0, 0, 0}, {0, 0});
  };
  expect_error([&] { run(one_multiplies_alone); }, "a lane ended before its warp's exchange at kernels.cpp:");
}

// Blocks run in any order: a kernel in which one block uses the results of another fails for some seed.
void test_blocks_do_not_wait_for_each_other() {
  const int64_t columns = 3, rows = 2;
  bool in_turn = true;
  for (unsigned seed = 0; seed < 10; ++seed) {
    int64_t next = 0;
    machine.run(columns, rows, 0, seed, [&](char*) {
      if (thread_index() != 0) return;
      in_turn &= next == block_index_y() * columns + block_index();
      ++next;
    });
    expect(next == columns * rows, "every block runs once");
  }
  expect(!in_turn, "blocks that rely on their order are caught");
}

// The matrix units truncate: many small products are lost on a large sum, of either sign.
void test_matrix_units_truncate() {
  for (const float sign : {1.0F, -1.0F}) {
    float sum = 0;
    machine.run(1, 1, 0, 0, [&](char*) {
      const auto word = [](float value) { return std::bit_cast<uint32_t>(value); };
      float sums[4] = {sign, sign, sign, sign};
      for (int repeat = 0; repeat < 100; ++repeat)
        multiply_accumulate<float>(sums, {word(0x1.8p-12F), 0, 0, 0}, {word(sign * 0x1p-14F), 0});
      if (thread_index() == 0) sum = sums[0];
    });
    expect(sum == sign, "matrix units truncate to " + std::to_string(sign));
  }
}

// Every barrier that a kernel meets is needed, and its absence is noticed.
void test_missing_barriers_are_caught() {
  const auto is_caught = [](const Kernel& kernel, const Shape& shape) {
    for (unsigned seed = 0; seed < 20; ++seed) {
      try {
        if (!(kernel.check(shape, seed) <= 1)) return true;
      } catch (const std::exception&) {
        return true;
      }
    }
    return false;
  };
  for (const Kernel& kernel : all_kernels()) {
    std::set<std::string> tried;
    for (const Shape& shape : {Shape{70, {700, 31}, 8, 1, 0}, Shape{5, {700, 31}, 8, 1, 0}}) {
      machine.barriers.clear();
      kernel.check(shape, 0);
      const std::set<std::string> barriers = machine.barriers;
      for (const std::string& barrier : barriers) {
        if (!tried.insert(barrier).second) continue;
        machine.ignored_barrier = barrier;
        expect(is_caught(kernel, shape), kernel.name + " without the barrier at " + barrier + " is caught");
      }
      machine.ignored_barrier.clear();
    }
  }
}

// One column too many: AddressSanitizer ends the program.
void read_past_the_end() {
  Problem<float> problem({4, {128}, 32, 1, 0});
  problem.table.matrix[0].columns += 1;
  problem.table.tiles = 2;
  const std::vector<float> weights(4, 1);
  machine.run(1, 1, group_sums_bytes<float>(), 0,
              [&](char* shared) { combine<float, kCapacity, 1>(problem.table, weights.data(), 0, 1, shared); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && arguments[1] == std::string("past_the_end")) {
    read_past_the_end();
    return 0;
  }
  if (count > 1) chosen = arguments[1];
  test_against_double();
  test_normalisations();
  test_long_sums();
  test_equal_weights_give_the_mean_bitwise<float>({19, {300, 77}, 16, 2, 0});
  test_equal_weights_give_the_mean_bitwise<BFloat16>({33, {500}, 8, 3, 1});
  test_equal_weights_give_the_mean_bitwise<double>({64, {129}, 32, 1, 0});
  test_equal_weights_give_the_mean_bitwise<float>({4, {4000, 70}, 256, 2, 0});
  test_equal_weights_give_the_mean_bitwise<BFloat16>({13, {1500, 5}, 128, 1, 0});
  test_missing_barriers_are_caught();
  test_wrong_kernels_are_caught();
  test_blocks_do_not_wait_for_each_other();
  test_matrix_units_truncate();
  std::cout << failures << " failures" << std::endl;
  return failures == 0 ? 0 : 1;
}
