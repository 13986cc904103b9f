#pragma once

// Sums in a fixed order: over the threads of a block, over the partial results of another kernel, and long sums of one
// thread.

#include "primitives.cuh"

namespace rgd_ext::cuda {

// One warp sums each row.
constexpr int64_t row_blocks(int64_t rows) { return (rows + kWarps - 1) / kWarps; }
RGD_DEVICE int64_t row_of_warp() { return block_index() * kWarps + thread_index() / kWarp; }

// The sum of values[0, count), by a warp; every lane gets it.
template <typename T>
RGD_DEVICE double sum_by_warp(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = thread_index() % kWarp; i < count; i += kWarp) sum += values[i];
  return warp_sum(sum);
}

// Bytes of shared memory that sum_by_block needs.
constexpr int64_t kBlockSumBytes = kWarps * sizeof(double);

// The sum of `own` over the threads of a block; thread 0 gets it.
RGD_DEVICE double sum_by_block(double own, char* shared) {
  double* sums = reinterpret_cast<double*>(shared);
  const double of_warp = warp_sum(own);
  if (thread_index() % kWarp == 0) sums[thread_index() / kWarp] = of_warp;
  barrier();
  double sum = 0;
  if (thread_index() == 0)
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

// A sum of many numbers: short runs are added in T, and their sums in double, which is slow on some GPUs.
template <typename T>
class LongSum {
 public:
  RGD_DEVICE void add(T value) {
    recent_ += value;
    if (++count_ < kRecent) return;
    total_ = computed_here(total_) + recent_;
    recent_ = 0;
    count_ = 0;
  }
  RGD_DEVICE double total() const { return total_ + recent_; }

 private:
  static constexpr int kRecent = 32;

  double total_ = 0;
  T recent_ = 0;
  int count_ = 0;
};

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
