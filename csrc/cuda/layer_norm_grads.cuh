#pragma once

// Per-sample gradients of the weight and bias of a LayerNorm or RMSNorm over (B, places, n): sum_t e_t o x^_t and
// sum_t e_t per sample. A row is normalised by statistics of all its columns, and columns are summed over all places
// of a sample, so they are two kernels.

#include "reduce.cuh"

namespace rgd_ext::cuda {

// x^ = ((x - mean) - rest) * scale, where `rest` is what rounding the mean left.
template <typename T>
struct RowStatistics {
  T mean, rest, scale;
};

// statistics[r] of the rows of `input`, one warp a row; RMSNorm's if not centred.
template <typename S>
RGD_DEVICE void row_statistics(const S* input, int64_t rows, int64_t columns, double eps, bool centred,
                               RowStatistics<Accumulate<S>>* statistics) {
  using T = Accumulate<S>;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int lane = thread_index() % kWarp;
  const S* x = input + row * columns;
  const double size = static_cast<double>(columns);
  T mean = 0;
  if (centred) {
    LongSum<T> values;
    for (int64_t c = lane; c < columns; c += kWarp) values.add(widen(x[c]));
    mean = static_cast<T>(warp_sum(values.total()) / size);
  }
  LongSum<T> values, squares;
  for (int64_t c = lane; c < columns; c += kWarp) {
    const T value = widen(x[c]) - mean;
    values.add(value);
    squares.add(value * value);
  }
  const double rest = centred ? warp_sum(values.total()) / size : 0;
  const double variance = warp_sum(squares.total()) / size - rest * rest;
  if (lane == 0) statistics[row] = {mean, static_cast<T>(rest), static_cast<T>(1 / sqrt(variance + eps))};
}

constexpr int64_t column_chunks(int64_t columns) { return (columns + kWarp - 1) / kWarp; }

// Of each thread two sums.
constexpr int64_t kLayerNormSharedBytes = 2 * kThreads * sizeof(double);

// weight and bias, (B, n): block `sample * column_chunks(n) + chunk` has a warp's width of columns, and its warps share
// the places.
template <typename S>
RGD_DEVICE void layer_norm_grads(const S* output_grad, const S* input, const RowStatistics<Accumulate<S>>* statistics,
                                 int64_t places, int64_t columns, S* weight, S* bias, char* memory) {
  using T = Accumulate<S>;
  const int64_t chunks = column_chunks(columns), sample = block_index() / chunks;
  const int64_t column = block_index() % chunks * kWarp + thread_index() % kWarp;
  LongSum<T> products, grads;
  if (column < columns) {
    for (int64_t place = thread_index() / kWarp; place < places; place += kWarps) {
      const int64_t row = sample * places + place;
      const RowStatistics<T> of_row = statistics[row];
      const T grad = widen(output_grad[row * columns + column]);
      products.add((widen(input[row * columns + column]) - of_row.mean - of_row.rest) * of_row.scale * grad);
      grads.add(grad);
    }
  }
  double* shared = reinterpret_cast<double*>(memory);
  shared[thread_index()] = products.total();
  shared[kThreads + thread_index()] = grads.total();
  barrier();
  if (thread_index() >= kWarp || column >= columns) return;
  double product = 0, grad = 0;
  for (int slot = thread_index(); slot < kThreads; slot += kWarp) {
    product += shared[slot];
    grad += shared[kThreads + slot];
  }
  narrow(static_cast<T>(product), weight[sample * columns + column]);
  narrow(static_cast<T>(grad), bias[sample * columns + column]);
}

}  // namespace rgd_ext::cuda
