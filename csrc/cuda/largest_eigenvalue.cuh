#pragma once

// The largest eigenvalue of a symmetric matrix by Lanczos' method, in one block: nothing for the host to wait for.

#include <cmath>
#include <limits>

#include "../lanczos.h"
#include "primitives.cuh"

namespace rgd_ext::cuda {

// Hands out arrays: of shared memory as long as it lasts, then of global memory.
struct Memory {
  char* shared;
  int64_t shared_bytes;
  char* global;

  template <typename U>
  RGD_DEVICE U* take(int64_t count) {
    const int64_t bytes = padded<U>(count);
    if (bytes > shared_bytes) return take_global<U>(count);
    char* taken = shared;
    shared += bytes;
    shared_bytes -= bytes;
    return reinterpret_cast<U*>(taken);
  }

  template <typename U>
  RGD_DEVICE U* take_global(int64_t count) {
    char* taken = global;
    global += padded<U>(count);
    return reinterpret_cast<U*>(taken);
  }

  template <typename U>
  static constexpr int64_t padded(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(U)) + 15) / 16 * 16;
  }
};

// How the matrix is dealt out: its columns in `parts`, and share `index` is row index % rows of part index / rows, in
// packets of columns. Thread t has the shares t, t + kThreads, ...
template <typename T>
struct Shares {
  static constexpr int kColumns = Packet<T>::kColumns;
  static constexpr int kGroup = 8;  // packets that are multiplied without a branch

  int rows, parts = 1, packets;

  constexpr explicit Shares(int size) : rows(size < kThreads ? (size + kWarp - 1) / kWarp * kWarp : size) {
    if (rows < kThreads) parts = kThreads / rows;
    packets = (size + parts * kColumns - 1) / (parts * kColumns);
  }

  constexpr int count() const { return rows * parts; }
  // Those that a product reads, of which all from `size` on have to be 0.
  constexpr int columns() const { return (parts * packets + kGroup - 1) * kColumns; }
  constexpr int packets_of_thread() const { return (count() + kThreads - 1) / kThreads * packets; }
};

// A symmetric matrix, read once: every thread keeps its packets, the first in registers, as many as fit in shared
// memory, and the rest in global memory, where it finds them side by side.
template <typename T>
class DealtMatrix {
 public:
  // `memory` loses what it has left of shared memory.
  template <typename S>
  RGD_DEVICE DealtMatrix(const S* from, int size, S factor, Memory& memory)
      : shares_(size), part_(thread_index() / shares_.rows) {
    const int others = shares_.packets_of_thread() - kHeld;
    const int room = static_cast<int>(memory.shared_bytes / (kThreads * sizeof(Packet<T>)));
    in_shared_ = others < 0 ? 0 : others < room ? others : room;
    shared_ = reinterpret_cast<Packet<T>*>(memory.shared) + thread_index();
    global_ = reinterpret_cast<Packet<T>*>(memory.global) + thread_index();
    const int first = part_ * shares_.packets * kColumns;
    each_share([&](int row, int slot) {
      const int columns = row < size ? size - first : 0;
      const auto packet = [&](int p) {
        Packet<T> result;
        const S* next = from + int64_t{first + p * kColumns} * size + row;
#pragma unroll
        for (int e = 0; e < kColumns; ++e, next += size)
          result.columns[e] = p * kColumns + e < columns ? static_cast<T>(*next * factor) : T(0);
        return result;
      };
      if (slot == 0) {
#pragma unroll
        for (int p = 0; p < kHeld; ++p) held_[p] = p < shares_.packets ? packet(p) : Packet<T>{};
      }
      const int shared_end = end_in_shared(slot);
      int p = first_not_held(slot);
#pragma unroll 4
      for (; p < shared_end; ++p) shared_[(slot + p - kHeld) * kThreads] = packet(p);
#pragma unroll 4
      for (; p < shares_.packets; ++p) global_[int64_t{slot + p - kHeld - in_shared_} * kThreads] = packet(p);
    });
  }

  // Of the shares of this thread.
  RGD_DEVICE int part() const { return part_; }

  // use(row, sum) for each share of this thread: the sum of its row times x over its columns. x, on 16 bytes, is as
  // long as Shares::columns() says.
  template <typename F>
  RGD_DEVICE void multiply(const T* x, F use) const {
    const auto* packets = reinterpret_cast<const Packet<T>*>(x) + part_ * shares_.packets;
    each_share([&](int row, int slot) {
      T sums[kColumns] = {};
      const auto add = [&](const Packet<T>& own, int p) {
        const Packet<T> other = packets[p];
#pragma unroll
        for (int e = 0; e < kColumns; ++e) sums[e] += own.columns[e] * other.columns[e];
      };
      if (slot == 0) {
#pragma unroll
        for (int first = 0; first < kHeld; first += kGroup) {
          if (first >= shares_.packets) break;
#pragma unroll
          for (int p = first; p < first + kGroup; ++p) add(held_[p], p);
        }
      }
      const int shared_end = end_in_shared(slot);
      int p = first_not_held(slot);
#pragma unroll 8
      for (; p < shared_end; ++p) add(shared_[(slot + p - kHeld) * kThreads], p);
#pragma unroll 8
      for (; p < shares_.packets; ++p) add(global_[int64_t{slot + p - kHeld - in_shared_} * kThreads], p);
      T sum = 0;
#pragma unroll
      for (int e = 0; e < kColumns; ++e) sum += sums[e];
      use(row, sum);
    });
  }

 private:
  static constexpr int kColumns = Shares<T>::kColumns, kGroup = Shares<T>::kGroup;
  static constexpr int kHeld = 24;  // packets in 96 registers, as many as there are without spills

  // use(row, slot) with the number of its first packet among those of the thread, which has several only of one part.
  template <typename F>
  RGD_DEVICE void each_share(F use) const {
    int slot = 0;
    for (int index = thread_index(); index < shares_.count(); index += kThreads, slot += shares_.packets)
      use(index - part_ * shares_.rows, slot);
  }

  // Of a share. One that is not a thread's first is of so many packets that the first had kHeld.
  RGD_DEVICE int first_not_held(int slot) const {
    return slot > 0 ? 0 : shares_.packets < kHeld ? shares_.packets : kHeld;
  }
  RGD_DEVICE int end_in_shared(int slot) const {
    const int first = first_not_held(slot), end = kHeld + in_shared_ - slot;
    return end < first ? first : end < shares_.packets ? end : shares_.packets;
  }

  Shares<T> shares_;
  int part_, in_shared_;
  Packet<T>*shared_, *global_;
  Packet<T> held_[kHeld];
};

// What the threads tell each other; of sums over the block what each warp has.
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

// The vectors of Lanczos' method; those that every step reads are in shared memory.
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

// Of global memory that largest_eigenvalue works in.
template <typename T>
constexpr int64_t eigenvalue_workspace_bytes(int size) {
  const Shares<T> shares(size);
  const int64_t vectors = shares.columns() + shares.count() + 2 * size + int64_t{size} * size;
  return vectors * sizeof(T) + int64_t{shares.packets_of_thread()} * kThreads * sizeof(Packet<T>) +
         size * sizeof(lanczos::Tridiagonal::Row) + sizeof(lanczos::Tridiagonal) + sizeof(Board) + 9 * 16;
}

// Of a positive semi-definite (size, size) matrix; NaN if it is not finite. lanczos::largest_eigenvalue with vectors of
// T, so that products are sums in T.
template <typename T, typename S>
RGD_DEVICE void largest_eigenvalue(const S* matrix, int size, double tolerance, char* workspace, S* result,
                                   char* shared, int64_t shared_bytes) {
  const auto sum = [](double a, double b) { return a + b; };
  const auto larger = [](double a, double b) { return fmax(a, b); };
  const auto each = [size](auto use) {
    for (int i = thread_index(); i < size; i += kThreads) use(i);
  };
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const Shares<T> shares(size);
  Memory memory{shared, shared_bytes, workspace};
  Board& board = *memory.take<Board>(1);
  T *rest = memory.take<T>(shares.columns()), *product = memory.take<T>(size), *parts = memory.take<T>(size);
  T* sums = memory.take<T>(shares.count());
  // Of thread 0, which has no registers for it.
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
  // Squares of the entries have to be representable.
  largest = Board::read(board.largest, larger);
  using Limits = std::numeric_limits<S>;
  const int exponent = largest > 0 ? ilogb(fmin(largest, Limits::max())) : 0;
  const int shift = exponent < Limits::min_exponent ? Limits::min_exponent : exponent;
  const DealtMatrix<T> own(matrix, size, static_cast<S>(ldexp(1.0, -shift)), memory);

  double entry = 0;
  for (int n = 1;; ++n) {
    if (thread == 0) {  // the others multiply meanwhile
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
    constexpr int kAtOnce = 4;  // sums, so that shuffles need not wait for each other
    for (int first = warp; first < n; first += kAtOnce * kWarps) {
      const T* vectors[kAtOnce];
      T totals[kAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) vectors[j] = basis[first + j * kWarps < n ? first + j * kWarps : first];
      for (int i = lane; i < size; i += kWarp) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) totals[j] += vectors[j][i] * product[i];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) totals[j] = warp_sum(totals[j]);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (lane == 0 && first + j * kWarps < n) parts[first + j * kWarps] = totals[j];
    }
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
