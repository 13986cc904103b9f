#pragma once

// G as tiles of all samples by a few columns: a list of (B, n) matrices, never concatenated, described by a table that
// travels in the parameters of a kernel (nothing to copy, nothing to keep alive for a CUDA graph).

#include "primitives.cuh"

namespace rgd_ext::cuda {

// One matrix with contiguous rows `stride` elements apart. `other` is what the kernel reads or writes beside it:
// contiguous (n) or (k, n), of the dtype of the matrix, or null.
struct Matrix {
  const void* data;
  void* other;
  int64_t stride;
  int64_t columns;
  int64_t first_tile;
};

// `lanes` packets (a power of two, at most kMostLanes) of each row make a tile.
constexpr int kMostLanes = 32;

template <int kCapacity>
struct Table {
  int64_t rows;
  int64_t tiles;
  int lanes;
  int matrices;
  Matrix matrix[kCapacity];
};

// The columns [begin, begin + count) of one matrix.
template <typename S>
struct Tile {
  const S* data;  // of sample 0
  int64_t stride;
  S* other;  // null, or of vector 0
  int64_t other_stride;
  int count;

  RGD_DEVICE const S* row(int64_t sample) const { return data + sample * stride; }
  RGD_DEVICE bool aligned() const {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride) * sizeof(S)) % 16 == 0;
  }
};

// Tiles by number, near `first` to begin with: neighbours are looked up one after the other.
template <typename S, int kCapacity>
struct Tiles {
  const Table<kCapacity>& table;
  int matrix = 0;

  RGD_DEVICE Tiles(const Table<kCapacity>& table, int64_t first) : table(table) {
    for (int end = table.matrices; end - matrix > 1;) {
      const int middle = (matrix + end) / 2;
      (table.matrix[middle].first_tile <= first ? matrix : end) = middle;
    }
  }

  RGD_DEVICE int width() const { return table.lanes * Packet<S>::kColumns; }

  // One past the last tile of the matrix found last.
  RGD_DEVICE int64_t end() const {
    const Matrix& found = table.matrix[matrix];
    return found.first_tile + (found.columns + width() - 1) / width();
  }

  RGD_DEVICE Tile<S> operator[](int64_t tile) {
    while (matrix + 1 < table.matrices && tile >= table.matrix[matrix + 1].first_tile) ++matrix;
    while (tile < table.matrix[matrix].first_tile) --matrix;
    const Matrix& found = table.matrix[matrix];
    const int64_t begin = (tile - found.first_tile) * width();
    const int64_t left = found.columns - begin;
    S* other = found.other == nullptr ? nullptr : static_cast<S*>(found.other) + begin;
    const int count = static_cast<int>(left < width() ? left : width());
    return {static_cast<const S*>(found.data) + begin, found.stride, other, found.columns, count};
  }
};

// A tile in shared memory: rows of `lanes` packets, 16 bytes apart from each other so that a warp that reads one column
// of 8 rows meets 8 different banks. Columns past the end of a matrix are zero.
template <typename S>
struct SharedTile {
  Packet<S>* packets;
  int lanes;

  RGD_DEVICE Packet<S>* row(int64_t sample) const { return packets + sample * (lanes + 1); }
};

constexpr int64_t shared_tile_bytes(int64_t rows, int lanes) { return rows * (lanes + 1) * 16; }

template <typename S>
RGD_DEVICE void swap(SharedTile<S>& a, SharedTile<S>& b) {
  const SharedTile<S> held = a;
  a = b;
  b = held;
}

// The next `bytes` of a block's shared memory.
template <typename T>
RGD_DEVICE T* take(char*& shared, int64_t bytes) {
  T* taken = reinterpret_cast<T*>(shared);
  shared += bytes;
  return taken;
}

// Starts copying `rows` samples of a tile, from `first` on: all threads of the block share the work.
template <typename S>
RGD_DEVICE void copy_tile(const Tile<S>& tile, int64_t first, int64_t rows, SharedTile<S> to) {
  constexpr int kColumns = Packet<S>::kColumns;
  const bool aligned = tile.aligned();
  const int group = thread_index() / to.lanes, lane = thread_index() % to.lanes, groups = kThreads / to.lanes;
  const int left = tile.count - lane * kColumns;
  const int valid = left < 0 ? 0 : left < kColumns ? left : kColumns;
  for (int64_t i = group; i < rows; i += groups) {
    const S* from = tile.row(first + i) + lane * kColumns;
    Packet<S>* packet = to.row(i) + lane;
    if (aligned) {
      copy_async<16>(packet, valid > 0 ? from : tile.data, valid * static_cast<int>(sizeof(S)));
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if constexpr (sizeof(S) >= 4) {
          const bool inside = c < valid;
          copy_async<sizeof(S)>(packet->columns + c, inside ? from + c : tile.data, inside ? sizeof(S) : 0);
        } else {
          packet->columns[c] = c < valid ? from[c] : S{};
        }
      }
    }
  }
}

// sums[c] += weight * packet[c].
template <typename S, typename T>
RGD_DEVICE void add_weighted(T weight, const Packet<S>& packet, T (&sums)[Packet<S>::kColumns]) {
#pragma unroll
  for (int c = 0; c < Packet<S>::kColumns; ++c)
    sums[c] = fused_multiply_add(weight, static_cast<T>(widen(packet.columns[c])), sums[c]);
}

// Bytes of shared memory that sum_groups needs.
template <typename S>
constexpr int64_t group_sums_bytes() {
  return kThreads * Packet<S>::kColumns * sizeof(Accumulate<S>);
}

// Thread (group, lane) holds sums of its group's samples over the columns of its lane: the sums over all groups, added
// in their order, of column `thread_index()` and every kThreads-th after it, go to use(column, sum). Every kernel that
// sums over samples does it here, so that equal weights give the bits of the mean.
template <typename S, typename F>
RGD_DEVICE void sum_groups(const Accumulate<S> (&sums)[Packet<S>::kColumns], int lanes, Accumulate<S>* shared, F use) {
  const int width = lanes * Packet<S>::kColumns, groups = kThreads / lanes;
  struct alignas(16) Sums {
    Accumulate<S> columns[Packet<S>::kColumns];
  };
  Sums own;
#pragma unroll
  for (int c = 0; c < Packet<S>::kColumns; ++c) own.columns[c] = sums[c];
  reinterpret_cast<Sums*>(shared)[thread_index()] = own;
  barrier();
  for (int column = thread_index(); column < width; column += kThreads) {
    Accumulate<S> sum = shared[column];
    for (int group = 1; group < groups; ++group) sum += shared[group * width + column];
    use(column, sum);
  }
  barrier();
}

}  // namespace rgd_ext::cuda
