#pragma once

// What the tests of the kernels share: shapes, random matrices with their copies in double, errors, and the lists of
// the kernels in each file.

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "reduce.cuh"
#include "tiles.cuh"

namespace kernel_tests {

using namespace rgd_ext::cuda;
using rgd_ext::emulation::machine;
using Doubles = std::vector<double>;

constexpr int kCapacity = 8;
constexpr int kVectors = 3;  // of each matrix

template <typename S>
double value(S stored) {
  return static_cast<double>(widen(stored));
}

// The error that rounding to S allows, relative to the largest value; and the error of a sum of numbers of type S.
template <typename S>
double precision() {
  if constexpr (std::is_same_v<S, double>) return 1e-13;
  return std::is_same_v<S, BFloat16> ? 1e-2 : std::is_same_v<S, Half> ? 2e-3 : 2e-6;
}
template <typename S>
double sum_precision() {
  return std::is_same_v<S, double> ? 1e-13 : 2e-6;
}

// What a kernel is tested on: matrices with `rows` samples each, and how they are cut into tiles.
struct Shape {
  int64_t rows;
  std::vector<int64_t> columns;  // of each matrix
  int lanes;
  int64_t blocks;
  int64_t padding;        // elements in front of each row; odd numbers leave rows unaligned
  int64_t behind = 0;     // elements behind each row but the last; may let aligned rows end inside 16 bytes
  bool positive = false;  // all elements are between 1 and 2
  float mean = 3;         // of the inputs of normalisation layers
};

inline std::string describe(const Shape& shape) {
  std::string text = std::to_string(shape.rows) + " x {";
  for (int64_t n : shape.columns) text += " " + std::to_string(n);
  return text + " }, " + std::to_string(shape.lanes) + " lanes, " + std::to_string(shape.blocks) + " blocks, padding " +
         std::to_string(shape.padding) + " and " + std::to_string(shape.behind);
}

// Random matrices with a copy in double, which is one matrix, and vectors of the length of their rows. All are on the
// heap and exact in size.
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

inline double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}
inline Doubles weighted_sum(const std::vector<Doubles>& rows, const Doubles& weights) {
  Doubles sum(rows[0].size());
  for (size_t i = 0; i < rows.size(); ++i)
    for (size_t c = 0; c < sum.size(); ++c) sum[c] += weights[i] * rows[i][c];
  return sum;
}
inline Doubles minus(Doubles a, const Doubles& b) {
  for (size_t c = 0; c < a.size(); ++c) a[c] -= b[c];
  return a;
}

// The largest error, divided by the largest expected value or by `scale`.
inline double error(const Doubles& got, const Doubles& want, double scale) {
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

// product(i, j) for every pair of samples.
template <typename F>
Doubles pairs(int64_t rows, F product) {
  Doubles products;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j) products.push_back(product(i, j));
  return products;
}

// Runs a kernel once and returns its error, divided by the error that rounding allows.
using Check = double (*)(const Shape&, unsigned seed);
struct Kernel {
  std::string name;
  Check check;
};

// The kernels that are tested in each file.
std::vector<Kernel> streaming_kernels();
std::vector<Kernel> gram_kernels();
std::vector<Kernel> norm_kernels();
std::vector<Kernel> statistics_kernels();

// Tests of single properties, in the same files.
void test_long_sums();
void test_equal_weights_give_the_mean_bitwise();
void read_past_the_end();
void test_wrong_kernels_are_caught();
void test_blocks_do_not_wait_for_each_other();
void test_matrix_units_truncate();

// The kernels of use.operator()<S>() for every dtype S, with the dtype in front of their names.
template <typename F>
std::vector<Kernel> for_dtypes(F use) {
  std::vector<Kernel> kernels;
  const auto add = [&](const std::string& dtype, const std::vector<Kernel>& more) {
    for (const Kernel& kernel : more) kernels.push_back({dtype + " " + kernel.name, kernel.check});
  };
  add("float", use.template operator()<float>());
  add("double", use.template operator()<double>());
  add("bfloat16", use.template operator()<BFloat16>());
  add("half", use.template operator()<Half>());
  return kernels;
}

}  // namespace kernel_tests
