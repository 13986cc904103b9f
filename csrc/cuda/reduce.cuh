#pragma once

// Sums of what the blocks of another kernel left, in a fixed order.

#include "primitives.cuh"

namespace rgd_ext::cuda {

// Rows are dealt out to warps.
constexpr int kRowsOfBlock = kThreads / kWarp;
constexpr int64_t row_blocks(int64_t rows) { return (rows + kRowsOfBlock - 1) / kRowsOfBlock; }
RGD_DEVICE int64_t row_of_warp() { return block_index() * kRowsOfBlock + thread_index() / kWarp; }

// The sum of values[0, count), by a warp; every lane gets it.
template <typename T>
RGD_DEVICE double sum_by_warp(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = thread_index() % kWarp; i < count; i += kWarp) sum += values[i];
  return warp_sum(sum);
}

// results[r] = sum_s partials[r * slots + s], one warp a row.
template <typename T>
RGD_DEVICE void reduce_rows(const double* partials, int64_t rows, int64_t slots, T* results) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const double sum = sum_by_warp(partials + row * slots, slots);
  if (thread_index() % kWarp == 0) results[row] = static_cast<T>(sum);
}

// w_i = (1 - eps a_i) / B, eq. (10), with the alignments a_i as reduce_rows gives them.
template <typename T>
RGD_DEVICE void reduce_to_weights(const double* partials, int64_t rows, int64_t slots, const T* epsilon, T* weights) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const T alignment = static_cast<T>(sum_by_warp(partials + row * slots, slots));
  if (thread_index() % kWarp == 0) weights[row] = (1 - multiply(*epsilon, alignment)) / static_cast<T>(rows);
}

}  // namespace rgd_ext::cuda
