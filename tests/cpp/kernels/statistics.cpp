// The kernels on statistics of the samples: weights, moments of a Gramian, and its largest eigenvalue.

#include <algorithm>
#include <limits>

#include "gram_moments.cuh"
#include "largest_eigenvalue.cuh"
#include "problem.h"
#include "sample_weights.cuh"

namespace kernel_tests {
namespace {

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

// First with a D that counts as zero, then with one that does not.
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

// The kernel's result for a matrix with these eigenvalues: a diagonal matrix in a reflected basis. `change` is added to
// one entry.
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

// Vectors of T and a matrix of S: zero, matrices that are not finite, one with a gradual spectrum where each eigenvalue
// occurs twice, and one with two nearly equal eigenvalues, for which most of the matrix and the basis is in global
// memory, since there is little shared memory.
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

}  // namespace

std::vector<Kernel> statistics_kernels() {
  return {{"weights", check_weights},
          {"gram moments", check_gram_moments},
          {"sample weights", check_sample_weights},
          {"largest eigenvalue of double", check_largest_eigenvalue<double, double>},
          {"largest eigenvalue of double, in float", check_largest_eigenvalue<float, double>},
          {"largest eigenvalue of float", check_largest_eigenvalue<float, float>}};
}

}  // namespace kernel_tests
