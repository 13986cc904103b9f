#pragma once

// The largest eigenvalue of a symmetric matrix by Lanczos' method with full reorthogonalisation. Needs nothing but a
// product with the matrix and memory from the caller.

#include <cmath>
#include <cstdint>
#include <limits>

// What a CUDA kernel calls as well.
#ifdef __CUDACC__
#define RGD_EXT_SHARED inline __host__ __device__
#else
#define RGD_EXT_SHARED inline
#endif

namespace rgd_ext::lanczos {

// Stop at |A v - theta v| <= kTolerance theta, which bounds the distance of theta to an eigenvalue.
constexpr double kTolerance = 1e-13;

// Whether step n looks at the Ritz value, which costs as much as the step: not always, but where the next step would
// divide by 0. `top` is the largest |diagonal entry| so far.
RGD_EXT_SHARED bool is_checked(int64_t n, int64_t size, double norm, double top) {
  constexpr int64_t kStepsPerCheck = 4;
  return n % kStepsPerCheck == 0 || n == size || norm <= kTolerance * top;
}

// Doubles that largest_eigenvalue works in.
constexpr int64_t workspace_size(int64_t size) { return size * (size + 3); }

// Entry i of a start vector that no structure of a matrix has anything to do with, in (-1, 1). A vector of ones is in
// the null space of every centred Gramian.
RGD_EXT_SHARED double start_entry(int64_t i) {
  uint64_t bits = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((bits ^ (bits >> 31)) >> 11) * 0x1p-52 - 1 + 0x1p-53;
}

inline double dot(int64_t size, const double* a, const double* b) {
  constexpr int kSums = 8;  // independent, so that they need not wait for each other
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += a[i + k] * b[i + k];
  for (; i < size; ++i) sums[0] += a[i] * b[i];
  double sum = 0;
  for (int k = 0; k < kSums; ++k) sum += sums[k];
  return sum;
}

// The first pivot of T - x I eliminated from its last row upwards, as a function of x. Right of the largest eigenvalue
// of T without its first row it falls, is convex, and has its zero at the largest eigenvalue of T.
struct Pivot {
  double value;
  double slope;          // of -value; 1 / s_1^2 at an eigenvalue whose normalised vector is s
  double last;           // (s_n / s_1)^2 there
  bool is_right = true;  // of that largest eigenvalue
};

// T has `diagonal`, n long, and `beside` it, n - 1 long.
RGD_EXT_SHARED Pivot pivot(const double* diagonal, const double* beside, int64_t n, double x) {
  Pivot at{diagonal[n - 1] - x, 1, 1};
  for (int64_t k = n - 2; k >= 0; --k) {
    if (at.value >= 0) return {at.value, at.slope, at.last, false};
    const double ratio = beside[k] / at.value, square = ratio * ratio;
    at = {diagonal[k] - x - beside[k] * ratio, 1 + square * at.slope, square * at.last};
  }
  return at;
}

// An eigenvalue of T and |s_n| for its normalised vector s.
struct RitzPair {
  double value, last;
};

// The largest eigenvalue of T, which is at least `least`: Newton's method, which comes from the left and does not
// overshoot, between `least` and Gershgorin's bound.
RGD_EXT_SHARED RitzPair largest_ritz_pair(const double* diagonal, const double* beside, int64_t n, double least) {
  if (n == 1) return {diagonal[0], 1};
  double low = least, high = least;
  for (int64_t k = 0; k < n; ++k)
    high = std::fmax(high, diagonal[k] + (k > 0 ? beside[k - 1] : 0) + (k < n - 1 ? beside[k] : 0));
  const double ulp = std::numeric_limits<double>::epsilon() * std::fmax(std::fabs(low), std::fabs(high));
  double x = low;
  for (;;) {
    const Pivot at = pivot(diagonal, beside, n, x);
    (at.is_right && at.value <= 0 ? high : low) = x;
    if (high - low <= 4 * ulp) return {x, at.is_right ? std::sqrt(at.last / at.slope) : 1};
    // An ulp further than Newton: the right bound comes in when the left one has arrived.
    const double next = x + at.value / at.slope + ulp;
    x = at.is_right && low < next && next < high ? next : low + (high - low) / 2;
  }
}

// Of a matrix (size, size) with multiply(x, y): y = A x; remove(basis, n, x) takes from x its parts along the n
// orthonormal rows of `basis`. NaN if A is not finite. `workspace` holds workspace_size(size).
template <typename Multiply, typename Remove>
double largest_eigenvalue(int64_t size, Multiply multiply, Remove remove, double* workspace) {
  double *diagonal = workspace, *beside = diagonal + size, *product = beside + size, *basis = product + size;
  for (int64_t i = 0; i < size; ++i) product[i] = start_entry(i);
  double norm = std::sqrt(dot(size, product, product)), value = 0, top = 0;
  for (int64_t n = 1;; ++n) {
    double* last = basis + (n - 1) * size;
    for (int64_t i = 0; i < size; ++i) last[i] = product[i] / norm;
    multiply(last, product);
    diagonal[n - 1] = dot(size, last, product);
    if (!std::isfinite(diagonal[n - 1])) return std::numeric_limits<double>::quiet_NaN();
    for (int repeat = 0; repeat < 2; ++repeat) remove(basis, n, product);  // twice is enough
    norm = std::sqrt(dot(size, product, product));
    beside[n - 1] = norm;
    top = std::fmax(top, std::fabs(diagonal[n - 1]));
    if (!is_checked(n, size, norm, top)) continue;
    const RitzPair pair = largest_ritz_pair(diagonal, beside, n, value);
    value = pair.value;
    if (n == size || norm * pair.last <= kTolerance * std::fabs(value)) return value;
  }
}

}  // namespace rgd_ext::lanczos
