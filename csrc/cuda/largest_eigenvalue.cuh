#pragma once

// The largest eigenvalue of a symmetric matrix by Lanczos' method, in one block, so that the host does not wait.

#include <cmath>
#include <limits>

#include "../lanczos.h"
#include "dealt_matrix.cuh"

namespace rgd_ext::cuda {

// Values that the threads of the block exchange. A sum or maximum over the block is an array with a number per warp.
struct Board {
  double largest[kWarps], squares[kWarps], products[kWarps];
  double norm, inverse, done;

  template <typename F>
  static RGD_DEVICE void write(double own, double (&numbers)[kWarps], F combine) {
    own = warp_combined(own, combine);
    if (thread_index() % kWarp == 0) numbers[thread_index() / kWarp] = own;
  }
  template <typename F>
  static RGD_DEVICE double read(const double (&numbers)[kWarps], F combine) {
    double result = numbers[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) result = combine(result, numbers[warp]);
    return result;
  }
};

// The vectors of Lanczos' method. The first kKept, which every later step reads, are in shared memory if they fit.
template <typename T>
struct Basis {
  static constexpr int kKept = 32;

  int size, kept;
  T *near, *far;

  RGD_DEVICE Basis(int size, Memory& memory) : size(size), kept(size < kKept ? size : kKept) {
    const int64_t room = memory.shared_bytes / (size * static_cast<int64_t>(sizeof(T)));
    if (kept > room) kept = static_cast<int>(room);
    near = memory.take<T>(int64_t{kept} * size);
    far = memory.take_global<T>(int64_t{size - kept} * size);
  }

  RGD_DEVICE T* operator[](int k) const { return k < kept ? near + int64_t{k} * size : far + int64_t{k - kept} * size; }
};

// Bytes of global memory that largest_eigenvalue needs as a workspace.
template <typename T>
constexpr int64_t eigenvalue_workspace_bytes(int size) {
  const Shares<T> shares(size);
  const int64_t vectors = shares.columns() + shares.count() + 2 * size + int64_t{size} * size;
  return vectors * sizeof(T) + int64_t{shares.packets_of_thread()} * kThreads * sizeof(Packet<T>) +
         size * sizeof(lanczos::Tridiagonal::Row) + sizeof(lanczos::Tridiagonal) + sizeof(Board) + 9 * 16;
}

// parts[k] = <vector k of the basis, x> for k < n. Each warp takes several vectors at a time, so that their shuffles
// do not wait for each other.
template <typename T>
RGD_DEVICE void multiply_by_basis(const Basis<T>& basis, int n, const T* x, T* parts) {
  constexpr int kAtOnce = 4;
  const int lane = thread_index() % kWarp;
  for (int first = thread_index() / kWarp; first < n; first += kAtOnce * kWarps) {
    const T* vectors[kAtOnce];
    T totals[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) vectors[j] = basis[first + j * kWarps < n ? first + j * kWarps : first];
    for (int i = lane; i < basis.size; i += kWarp) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) totals[j] += vectors[j][i] * x[i];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) totals[j] = warp_sum(totals[j]);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (lane == 0 && first + j * kWarps < n) parts[first + j * kWarps] = totals[j];
  }
}

// The exponent of two that a matrix with this largest diagonal entry is divided by, so that the squares of its entries
// are representable in S.
template <typename S>
RGD_DEVICE int scaling_exponent(double largest) {
  using Limits = std::numeric_limits<S>;
  const int exponent = largest > 0 ? ilogb(fmin(largest, Limits::max())) : 0;
  return exponent < Limits::min_exponent ? Limits::min_exponent : exponent;
}

// *result = the largest eigenvalue of a positive semi-definite (size, size) matrix; NaN if it is not finite. As
// lanczos::largest_eigenvalue, but vectors are of T and products are summed in T.
template <typename T, typename S>
RGD_DEVICE void largest_eigenvalue(const S* matrix, int size, double tolerance, char* workspace, S* result,
                                   char* shared, int64_t shared_bytes) {
  const auto sum = [](double a, double b) { return a + b; };
  const auto larger = [](double a, double b) { return fmax(a, b); };
  const auto each = [size](auto use) {
    for (int i = thread_index(); i < size; i += kThreads) use(i);
  };
  const int thread = thread_index();
  const Shares<T> shares(size);
  Memory memory{shared, shared_bytes, workspace};
  Board& board = *memory.take<Board>(1);
  T *rest = memory.take<T>(shares.columns()), *product = memory.take<T>(size), *parts = memory.take<T>(size);
  T* sums = memory.take<T>(shares.count());
  // Only thread 0 uses these. They are in memory because its registers hold the matrix.
  lanczos::Tridiagonal& projection = *memory.take<lanczos::Tridiagonal>(1);
  auto* rows = memory.take<lanczos::Tridiagonal::Row>(size);
  if (thread == 0) projection = {size, tolerance, rows};
  const Basis<T> basis(size, memory);

  double largest = 0, squares = 0;
  each([&](int i) {
    largest = fmax(largest, static_cast<double>(matrix[int64_t{i} * size + i]));
    rest[i] = static_cast<T>(lanczos::start_entry(i));
    squares += static_cast<double>(rest[i]) * rest[i];
  });
  for (int i = size + thread; i < shares.columns(); i += kThreads) rest[i] = 0;
  Board::write(largest, board.largest, larger);
  Board::write(squares, board.squares, sum);
  barrier();
  const int shift = scaling_exponent<S>(Board::read(board.largest, larger));
  const DealtMatrix<T> own(matrix, size, static_cast<S>(ldexp(1.0, -shift)), memory);

  double entry = 0;
  for (int n = 1;; ++n) {
    if (thread == 0) {  // while the others multiply
      const double norm = sqrt(Board::read(board.squares, sum)), inverse = 1 / norm;
      board.norm = norm;
      board.inverse = inverse;
      board.done = n > 1 && projection.append(entry, norm, inverse);
    }
    double form = 0;
    own.multiply(rest, [&](int row, T value) {
      sums[own.part() * shares.rows + row] = value;
      if (row < size) form += static_cast<double>(rest[row]) * value;
    });
    Board::write(form, board.products, sum);
    barrier();
    if (board.done) {
      if (thread == 0) *result = static_cast<S>(projection.value() < 0 ? 0 : ldexp(projection.value(), shift));
      return;
    }
    const double norm = board.norm, inverse = board.inverse;
    entry = Board::read(board.products, sum) * inverse * inverse;
    each([&](int i) {
      T value = 0;
      for (int part = 0; part < shares.parts; ++part) value += sums[part * shares.rows + i];
      const T last = static_cast<T>(rest[i] * inverse), before = n > 1 ? basis[n - 2][i] : T(0);
      basis[n - 1][i] = last;
      product[i] = static_cast<T>(value * inverse - entry * last - norm * before);
    });
    barrier();
    multiply_by_basis(basis, n, product, parts);
    barrier();
    squares = 0;
    each([&](int i) {
      T value = product[i];
#pragma unroll 8
      for (int k = 0; k < n; ++k) value -= parts[k] * basis[k][i];
      rest[i] = value;
      squares += static_cast<double>(value) * value;
    });
    Board::write(squares, board.squares, sum);
    barrier();
  }
}

}  // namespace rgd_ext::cuda
