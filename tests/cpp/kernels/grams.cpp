// The kernels of Gramians: of G, of linear layers, and of embeddings.

#include <algorithm>

#include "embedding_gram.cuh"
#include "ghost_gram.cuh"
#include "gram.cuh"
#include "problem.h"

namespace kernel_tests {
namespace {

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

// Each layer has the columns of a matrix of `shape` as inputs, and another number of output gradients; every second
// layer has a bias. The result is added to a Gramian of ones.
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

// There are slightly more samples than blocks, and about as many entries as rows, some of them in the same row of the
// table. Sums that must not be read are NaN.
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

template <typename S, template <typename, int> class Sums>
double check_gram_by_size(const Shape& shape, unsigned seed) {
  return with_block<Sums, S>(shape.rows,
                             [&]<typename Found>(std::type_identity<Found>) { return check_gram<Found>(shape, seed); });
}

template <typename S, template <typename, int> class Sums>
double check_ghost_gram_by_size(const Shape& shape, unsigned seed) {
  return with_block<Sums, S>(
      shape.rows, [&]<typename Found>(std::type_identity<Found>) { return check_ghost_gram<Found>(shape, seed); });
}

}  // namespace

std::vector<Kernel> gram_kernels() {
  return for_dtypes([]<typename S>() {
    std::vector<Kernel> kernels;
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>)
      kernels.insert(kernels.end(), {{"gram", check_gram_by_size<S, PlainSums>},
                                     {"ghost gram", check_ghost_gram_by_size<S, PlainSums>},
                                     {"embedding gram", check_embedding_gram<S>}});
    if constexpr (!std::is_same_v<S, double>)
      kernels.insert(kernels.end(), {{"gram by matrix units", check_gram_by_size<S, MatrixUnitSums>},
                                     {"ghost gram by matrix units", check_ghost_gram_by_size<S, MatrixUnitSums>}});
    return kernels;
  });
}

// Sums of so many terms move to the partial results while the kernel runs. All terms are positive, because the matrix
// units round towards zero, which makes such sums too small.
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

}  // namespace kernel_tests
