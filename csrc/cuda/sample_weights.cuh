#pragma once

// The weights of eq. (10) from the statistics, in one block: nothing for the host to wait for.

#include "reduce.cuh"

namespace rgd_ext::cuda {

// w_i = (1 - epsilon a_i) / B, with epsilon = 0, as `chosen` says then, where D = 0 to rounding.
template <typename T>
RGD_DEVICE void sample_weights(const T* squared_grad_norm, const T* alignments, const T* squared_norms,
                               const T* epsilon, double ulp, int64_t rows, T* chosen, T* weights) {
  const double trace = sum_by_warp(squared_norms, rows) / static_cast<double>(rows);
  // The threshold is trace_rounding of rgd_ext/linalg.py.
  const T value = trace <= 8 * ulp * *squared_grad_norm ? 0 : *epsilon;
  if (thread_index() == 0) *chosen = value;
  for (int64_t i = thread_index(); i < rows; i += kThreads)
    weights[i] = (1 - multiply(value, alignments[i])) / static_cast<T>(rows);
}

}  // namespace rgd_ext::cuda
