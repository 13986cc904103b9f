// The kernels that stream G: moments, squared norm, weighted sums, and products with vectors.

#include "combine.cuh"
#include "moments.cuh"
#include "problem.h"
#include "products.cuh"
#include "squared_norm.cuh"

namespace kernel_tests {
namespace {

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

template <typename S>
void expect_mean_of_equal_weights(const Shape& shape) {
  Problem<S> first(shape), second(shape);
  Doubles partials(2 * shape.rows * first.blocks());
  machine.run(first.blocks(), 1, moments_shared_bytes<S>(shape.rows, shape.lanes), 4,
              [&](char* shared) { moments<S>(first.table, partials.data(), first.blocks(), 0, shared); });
  const std::vector<Accumulate<S>> weights(shape.rows, Accumulate<S>(1) / Accumulate<S>(shape.rows));
  machine.run(second.blocks(), 1, group_sums_bytes<S>(), 5,
              [&](char* shared) { combine<S, kCapacity, 1>(second.table, weights.data(), 0, 1, shared); });
  expect(first.written(0) == second.written(0), "equal weights give the mean bitwise, " + describe(shape));
}

}  // namespace

std::vector<Kernel> streaming_kernels() {
  return for_dtypes([]<typename S>() -> std::vector<Kernel> {
    return {{"moments", check_moments<S>},
            {"squared norm", check_squared_norm<S>},
            {"combine", check_combine<S, 1>},
            {"combine of several", check_combine<S, 4>},
            {"centred products", check_products<S, true>},
            {"products", check_products<S, false>}};
  });
}

// All kernels add over the samples in the same order.
void test_equal_weights_give_the_mean_bitwise() {
  expect_mean_of_equal_weights<float>({19, {300, 77}, 16, 2, 0});
  expect_mean_of_equal_weights<BFloat16>({33, {500}, 8, 3, 1});
  expect_mean_of_equal_weights<double>({64, {129}, 32, 1, 0});
  expect_mean_of_equal_weights<float>({4, {4000, 70}, 256, 2, 0});
  expect_mean_of_equal_weights<BFloat16>({13, {1500, 5}, 128, 1, 0});
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

}  // namespace kernel_tests
