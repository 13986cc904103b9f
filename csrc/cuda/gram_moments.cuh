#pragma once

// Moments of the gradients from K = G G^T: its rows first, then what is centred by them.

#include "reduce.cuh"

namespace rgd_ext::cuda {

// means[i] = mean_j K[i, j] = <g_i, g>, one warp a row.
template <typename T>
RGD_DEVICE void row_means(const T* gram, int64_t size, double* means) {
  const int64_t row = row_of_warp();
  if (row >= size) return;
  const double sum = sum_by_warp(gram + row * size, size);
  if (thread_index() % kWarp == 0) means[row] = sum / static_cast<double>(size);
}

// What is computed, in double.
struct GramMoments {
  double *squared_grad_norm, *alignments, *squared_norms, *centred;
};

// With the means of all rows: |g|^2, and of some rows the alignments, |g_i - g|^2 and the centred Gramian.
template <typename T>
RGD_DEVICE void centre_gram(const T* gram, const double* means, int64_t size, const GramMoments& to) {
  const auto not_negative = [](double value) { return value < 0 ? 0 : value; };  // lets NaN through
  const double mean = sum_by_warp(means, size) / static_cast<double>(size);
  if (block_index() == 0 && thread_index() == 0) *to.squared_grad_norm = not_negative(mean);

  const int64_t i = row_of_warp();
  if (i >= size) return;
  for (int64_t j = thread_index() % kWarp; j < size; j += kWarp) {
    const double alignment = means[j] - mean, entry = gram[i * size + j] - means[i] - alignment;
    to.centred[i * size + j] = entry;
    if (i != j) continue;
    to.alignments[i] = alignment;
    to.squared_norms[i] = not_negative(entry);
  }
}

}  // namespace rgd_ext::cuda
