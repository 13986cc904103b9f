#pragma once

// A symmetric matrix on chip, as far as it fits, for many products with vectors in one block.

#include "primitives.cuh"

namespace rgd_ext::cuda {

// Allocates arrays in shared memory as long as it lasts, then in global memory.
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

// How a matrix is divided among the threads. Its columns are cut into `parts`, and share `index` is row index % rows of
// part index / rows, in packets of columns. Thread t has the shares t, t + kThreads, ...
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
  // The entries of a vector that a product reads; those from `size` on have to be 0.
  constexpr int columns() const { return (parts * packets + kGroup - 1) * kColumns; }
  constexpr int packets_of_thread() const { return (count() + kThreads - 1) / kThreads * packets; }
};

// A symmetric matrix that is read once. Every thread keeps its packets: the first ones in registers, as many as fit in
// shared memory, and the rest in global memory, where the packets of a warp are contiguous.
template <typename T>
class DealtMatrix {
 public:
  // Takes all shared memory that `memory` has left.
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

  // The part that all shares of this thread are in.
  RGD_DEVICE int part() const { return part_; }

  // use(row, sum) for each share of this thread, with the sum of its row times x over its columns. x starts on 16 bytes
  // and has Shares::columns() entries.
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
  static constexpr int kHeld = 24;  // packets in 96 registers: more would spill

  // use(row, slot) for each share; `slot` numbers its first packet among those of the thread. A thread has several
  // shares only where there is one part.
  template <typename F>
  RGD_DEVICE void each_share(F use) const {
    int slot = 0;
    for (int index = thread_index(); index < shares_.count(); index += kThreads, slot += shares_.packets)
      use(index - part_ * shares_.rows, slot);
  }

  // The first packet of a share that is not in registers. Where a thread has several shares, each has more than kHeld
  // packets, so only the first share is in registers.
  RGD_DEVICE int first_not_held(int slot) const {
    return slot > 0 ? 0 : shares_.packets < kHeld ? shares_.packets : kHeld;
  }
  // One past the last packet of a share that is in shared memory.
  RGD_DEVICE int end_in_shared(int slot) const {
    const int first = first_not_held(slot), end = kHeld + in_shared_ - slot;
    return end < first ? first : end < shares_.packets ? end : shares_.packets;
  }

  Shares<T> shares_;
  int part_, in_shared_;
  Packet<T>*shared_, *global_;
  Packet<T> held_[kHeld];
};

}  // namespace rgd_ext::cuda
