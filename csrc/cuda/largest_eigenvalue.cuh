#pragma once

// The largest eigenvalue of a symmetric matrix by Lanczos' method, in one block: nothing for the host to wait for.

#include "../lanczos.h"
#include "primitives.cuh"

namespace rgd_ext::cuda {

// What the threads of a block make together. Vectors are dealt out to them by entry, so each finds what it wrote
// itself.
struct Team {
  double* shared;  // one number per warp, and one

  static constexpr int64_t kSharedBytes = (kWarps + 1) * sizeof(double);

  template <typename F>
  RGD_DEVICE void each(int64_t size, F use) const {
    for (int64_t i = thread_index(); i < size; i += kThreads) use(i);
  }

  // combine(combine(own of thread 0, own of thread 1), ...) in a fixed order, for all.
  template <typename F>
  RGD_DEVICE double combined(double own, F combine) const {
    own = warp_combined(own, combine);
    if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = own;
    barrier();
    double result = shared[0];
    for (int warp = 1; warp < kWarps; ++warp) result = combine(result, shared[warp]);
    barrier();  // before `shared` is written again
    return result;
  }

  RGD_DEVICE double dot(int64_t size, const double* a, const double* b) const {
    double sum = 0;
    each(size, [&](int64_t i) { sum += a[i] * b[i]; });
    return combined(sum, [](double x, double y) { return x + y; });
  }

  // What thread 0 computes, for all.
  template <typename F>
  RGD_DEVICE bool first(F compute) const {
    int* place = reinterpret_cast<int*>(shared + kWarps);
    if (thread_index() == 0) *place = compute();
    barrier();
    return *place != 0;
  }
};

// Doubles of global memory that largest_eigenvalue works in.
constexpr int64_t eigenvalue_workspace(int64_t size) { return lanczos::workspace_size(size) + size; }

// Of a positive semi-definite (size, size) matrix; NaN if it is not finite. lanczos::largest_eigenvalue with the
// reorthogonalisation in blocks (classical Gram-Schmidt, twice).
template <typename T>
RGD_DEVICE void largest_eigenvalue(const T* matrix, int64_t size, double* workspace, T* result, char* memory) {
  const Team team{reinterpret_cast<double*>(memory)};
  double *diagonal = workspace, *beside = diagonal + size, *parts = beside + size, *product = parts + size;
  double* basis = product + size;

  // Squares of the entries have to be representable.
  double largest = 0;
  team.each(size, [&](int64_t i) { largest = fmax(largest, matrix[i * size + i]); });
  largest = team.combined(largest, [](double x, double y) { return fmax(x, y); });
  const double scale = largest > 1e-290 ? largest : 1, inverse = 1 / scale;

  team.each(size, [&](int64_t i) { product[i] = lanczos::start_entry(i); });
  double norm = sqrt(team.dot(size, product, product)), value = 0, top = 0;
  for (int64_t n = 1; n <= size; ++n) {
    double* last = basis + (n - 1) * size;
    team.each(size, [&](int64_t i) { last[i] = product[i] / norm; });
    barrier();
    team.each(size, [&](int64_t i) {
      double sum = 0;
#pragma unroll 16
      for (int64_t j = 0; j < size; ++j) sum += matrix[j * size + i] * inverse * last[j];
      product[i] = sum;
    });
    const double alpha = team.dot(size, last, product);
    if (!(alpha - alpha == 0)) {
      if (thread_index() == 0) *result = static_cast<T>(alpha - alpha);
      return;
    }
    for (int repeat = 0; repeat < 2; ++repeat) {
      barrier();  // warps read all of the product
      for (int64_t k = thread_index() / kWarp; k < n; k += kWarps) {
        double sum = 0;
        for (int64_t i = thread_index() % kWarp; i < size; i += kWarp) sum += basis[k * size + i] * product[i];
        sum = warp_sum(sum);
        if (thread_index() % kWarp == 0) parts[k] = sum;
      }
      barrier();
      team.each(size, [&](int64_t i) {
        double rest = product[i];
#pragma unroll 8
        for (int64_t k = 0; k < n; ++k) rest -= parts[k] * basis[k * size + i];
        product[i] = rest;
      });
    }
    norm = sqrt(team.dot(size, product, product));
    top = fmax(top, fabs(alpha));
    const bool done = team.first([&] {  // the others wait; `value` is thread 0's alone
      diagonal[n - 1] = alpha;
      beside[n - 1] = norm;
      if (!lanczos::is_checked(n, size, norm, top)) return false;
      const lanczos::RitzPair pair = lanczos::largest_ritz_pair(diagonal, beside, n, value);
      value = pair.value;
      return n == size || norm * pair.last <= lanczos::kTolerance * fabs(value);
    });
    if (!done) continue;
    if (thread_index() == 0) *result = static_cast<T>(value > 0 ? value * scale : 0);
    return;
  }
}

}  // namespace rgd_ext::cuda
