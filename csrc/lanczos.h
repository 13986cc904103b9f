#pragma once

// The largest eigenvalue of a symmetric matrix by Lanczos' method with full reorthogonalisation. Needs nothing but a
// product with the matrix and memory from the caller.

#include <cmath>
#include <cstdint>

// For functions that a CUDA kernel calls as well.
#ifdef __CUDACC__
#define RGD_EXT_SHARED inline __host__ __device__
#else
#define RGD_EXT_SHARED inline
#endif

namespace rgd_ext::lanczos {

// For entries with a relative rounding error of `ulp`: stop at |A v - theta v| <= tolerance theta, which bounds the
// distance of theta to an eigenvalue.
inline double tolerance(double ulp) { return std::fmax(1e-13, ulp / 4); }

// Entry i of a pseudo-random start vector, in (-1, 1). A vector of ones would be in the null space of every centred
// Gramian.
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

// A function of x and its first two derivatives.
struct Jet {
  double value, slope, curvature;

  RGD_EXT_SHARED Jet operator*(double factor) const { return {value * factor, slope * factor, curvature * factor}; }
  RGD_EXT_SHARED Jet operator-(const Jet& other) const {
    return {value - other.value, slope - other.slope, curvature - other.curvature};
  }
};

// An s with (x I - T) s = f e_1.
struct Solution {
  Jet f;                             // proportional to the characteristic polynomial of T
  double first, last, squared_norm;  // of s
};

// T = V^T A V for the orthonormal vectors V of Lanczos' method, built row by row.
class Tridiagonal {
 public:
  struct Row {
    double entry, beside;  // on the diagonal and right of it
    double inverse;        // 1 / the entry left of the diagonal, or 1 in the first row
  };

  // For A of `size`; `memory` holds as many rows.
  RGD_EXT_SHARED Tridiagonal(int64_t size, double tolerance, Row* memory)
      : size_(size), tolerance_(tolerance), memory_(memory) {}

  // `entry` = v^T A v for the next v; `norm` is the norm of A v without its projection on V, and `inverse` is 1 / norm.
  // Returns whether the method has ended: value() is then the largest eigenvalue of A, or NaN if A is not finite.
  // Otherwise norm > 0.
  RGD_EXT_SHARED bool append(double entry, double norm, double inverse) {
    value_ = entry - entry;
    if (value_ != 0) return true;
    bound_ = std::fmax(bound_, norm_ + entry + norm);  // Gershgorin's
    largest_ = std::fmax(largest_, std::fabs(entry));
    memory_[rows_] = {entry, norm, inverse_};
    ++rows_;
    norm_ = norm;
    inverse_ = inverse;
    const bool is_last = rows_ == size_ || norm <= tolerance_ * largest_;
    return (is_last || rows_ >= next_check_) && has_converged();
  }

  RGD_EXT_SHARED double value() const { return value_; }

 private:
  // Solves from the last row, where s is smallest, upwards, so that errors do not grow. There are no divisions.
  RGD_EXT_SHARED Solution solve(double x) const {
    constexpr double kLarge = 0x1p300;
    Jet s{1, 0, 0}, before{0, 0, 0};
    double first = 1, last = 1, squared_norm = 0;
    Row next_row = memory_[rows_ - 1];
    for (int64_t k = rows_ - 1; k >= 0; --k) {
      const Row row = next_row;
      next_row = memory_[k > 0 ? k - 1 : 0];  // loaded before it is needed
      Jet next = s * ((x - row.entry) * row.inverse) - before * (row.beside * row.inverse);
      next.slope += row.inverse * s.value;
      next.curvature += 2 * row.inverse * s.slope;
      squared_norm += s.value * s.value;
      first = s.value;
      before = s;
      s = next;
      if (std::fabs(s.value) <= kLarge) continue;
      s = s * (1 / kLarge);
      before = before * (1 / kLarge);
      first /= kLarge;
      last /= kLarge;
      squared_norm /= kLarge * kLarge;
    }
    return {s, first, last, squared_norm};
  }

  // Laguerre's step from the right towards the largest zero of f, a polynomial with real zeros: it does not overshoot.
  RGD_EXT_SHARED double step(const Jet& f) const {
    const double sum = f.slope / f.value, squares = sum * sum - f.curvature / f.value;  // of 1 / (x - zero)
    const double n = static_cast<double>(rows_);
    return n / (sum + std::sqrt(std::fmax(0.0, (n - 1) * (n * squares - sum * sum))));
  }

  // Searches for the largest eigenvalue of T from an upper bound downwards, and stops when it cannot be one of A. For
  // v = V s / |s| and its Rayleigh quotient theta, |A v - theta v| <= hypot(f, norm s_n) / |s|. During the search
  // norm s_n / |s| is less than at the eigenvalue of T, because the entries of s / s_n grow with x.
  RGD_EXT_SHARED bool has_converged() {
    double x = bound_;
    for (int solutions = 1;; ++solutions) {
      const Solution at = solve(x);
      const double rest = rows_ < size_ ? norm_ * at.last : 0;
      const double allowed = tolerance_ * std::fmax(x, largest_) * std::sqrt(at.squared_norm);
      if (rest > allowed) {
        // A step seldom gains more than eight bits; among clusters of eigenvalues it takes fifty solutions to say no.
        const int bits = std::ilogb(rest / allowed);
        next_check_ = rows_ + (bits > solutions ? bits : solutions) / 8;
        return false;
      }
      value_ = x - at.f.value * at.first / at.squared_norm;
      if (std::hypot(at.f.value, rest) <= allowed) return true;
      // Where s_1 is small, rounding can take x past the zero of f before the residual is small enough. A step from
      // there would lead to the next zero.
      if (!(at.f.value > 0)) return true;
      const double next = x - step(at.f);
      if (!(next < x)) return true;  // converged to rounding
      x = next;
    }
  }

  int64_t size_, rows_ = 0, next_check_ = 0;
  double tolerance_;
  Row* memory_;
  double norm_ = 0, inverse_ = 1, bound_ = 0, largest_ = 0, value_ = 0;
};

// Doubles that largest_eigenvalue works in.
constexpr int64_t workspace_size(int64_t size) { return size * (size + 1); }

// The largest eigenvalue of a matrix A, (size, size); NaN if A is not finite. multiply(x, y) computes y = A x, and
// remove(basis, n, x) removes from x its projection on the n orthonormal rows of `basis`. `workspace` has
// workspace_size(size) doubles, and `rows` has `size` rows.
template <typename Multiply, typename Remove>
double largest_eigenvalue(int64_t size, double tolerance, Multiply multiply, Remove remove, double* workspace,
                          Tridiagonal::Row* rows) {
  double *rest = workspace, *basis = rest + size;
  Tridiagonal projection(size, tolerance, rows);
  for (int64_t i = 0; i < size; ++i) rest[i] = start_entry(i);
  double norm = std::sqrt(dot(size, rest, rest)), inverse = 1 / norm;
  for (int64_t n = 1;; ++n) {
    double* last = basis + (n - 1) * size;
    const double* before = n > 1 ? last - size : last;
    if (n == 1) norm = 0;
    for (int64_t i = 0; i < size; ++i) last[i] = rest[i] * inverse;
    multiply(last, rest);
    const double entry = dot(size, last, rest);
    // Gram-Schmidt twice is enough: first against the two vectors that A v is not orthogonal to, and then against all
    // vectors, which removes rounding errors.
    for (int64_t i = 0; i < size; ++i) rest[i] -= entry * last[i] + norm * before[i];
    remove(basis, n, rest);
    norm = std::sqrt(dot(size, rest, rest));
    inverse = 1 / norm;
    if (projection.append(entry, norm, inverse)) return projection.value();
  }
}

}  // namespace rgd_ext::lanczos
