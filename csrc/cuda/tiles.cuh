#pragma once

// G as tiles of all samples by a few columns. G is a list of (B, n) matrices, never concatenated. A table of them is
// passed in the parameters of a kernel, so that nothing has to be copied or kept alive for a CUDA graph.

#include "primitives.cuh"

namespace rgd_ext::cuda {

// One matrix, whose rows are contiguous and `stride` elements apart. `other` is a vector (n) or vectors (k, n) that the
// kernel reads or writes as well, contiguous and of the same dtype; or null.
struct Matrix {
  const void* data;
  void* other;
  int64_t stride;
  int64_t columns;
  int64_t first_tile;
};

// A tile has `lanes` packets of each row: a power of two, at most kThreads.
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

  RGD_DEVICE int packets() const { return (count + Packet<S>::kColumns - 1) / Packet<S>::kColumns; }
  RGD_DEVICE const S* row(int64_t sample) const { return data + sample * stride; }
  RGD_DEVICE bool aligned() const {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride) * sizeof(S)) % 16 == 0;
  }
};

// Tiles by number. The search for the matrix starts at that of the last tile, or of `first`.
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

  // One past the last tile of the matrix of the last tile.
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

// The share of this thread in a tile: packet `lane` of the samples `group`, `group` + `groups`, ...
struct Share {
  int lane, group, groups;

  RGD_DEVICE explicit Share(int lanes)
      : lane(thread_index() & (lanes - 1)),
        group(thread_index() >> log2_of(lanes)),
        groups(kThreads >> log2_of(lanes)) {}

  // The number of these samples.
  template <typename Integer>
  RGD_DEVICE Integer samples(Integer rows) const {
    return (rows - group + groups - 1) >> log2_of(groups);
  }
};

// A tile in shared memory: rows of `lanes` packets with a gap of 16 bytes between them, so that a warp that reads one
// column of 8 rows uses 8 different groups of banks. Columns past the end of a matrix are zero.
template <typename S>
struct SharedTile {
  Packet<S>* packets;
  int lanes;

  RGD_DEVICE Packet<S>* row(int64_t sample) const { return packets + sample * (lanes + 1); }
};

constexpr int64_t shared_tile_bytes(int64_t rows, int lanes) { return rows * (lanes + 1) * 16; }

// The most lanes that a tile may have: 512 bytes of each row, and more if there are few rows, for tiles of 32 KB. In
// smaller tiles the fixed cost of a tile would be most of the work.
constexpr int widest_lanes(int64_t rows) {
  int lanes = 32;
  while (lanes < kThreads && rows * lanes * 16 < 32 << 10) lanes *= 2;
  return lanes;
}

// The lanes of a tile for a kernel whose blocks need bytes(lanes) of shared memory and may have `shared_limit`; 0 if
// none fit. Two blocks on a multiprocessor, one of which computes while the other waits, are preferred to wider tiles
// as long as a tile has 128 bytes of each row.
template <typename F>
constexpr int fitting_lanes(int64_t rows, int64_t shared_limit, F bytes) {
  // The system reserves this for each block; a multiprocessor has as much more than one block may have.
  constexpr int64_t kReserved = 1 << 10;
  for (int lanes = widest_lanes(rows); lanes >= 8; lanes /= 2)
    if (2 * (bytes(lanes) + kReserved) <= shared_limit + kReserved) return lanes;
  for (int lanes = widest_lanes(rows); lanes >= 4; lanes /= 2)
    if (bytes(lanes) <= shared_limit) return lanes;
  return 0;
}

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

// Starts copying `rows` samples of a tile, from `first` on. All threads of the block have to make the call.
template <typename S>
RGD_DEVICE void copy_tile(const Tile<S>& tile, int64_t first, int64_t rows, SharedTile<S> to) {
  constexpr int kColumns = Packet<S>::kColumns;
  const Share share(to.lanes);
  const int left = tile.count - share.lane * kColumns;
  const int valid = left < 0 ? 0 : left < kColumns ? left : kColumns;
  // Past its end nothing is read, but a copy needs a valid address.
  const S* from = valid > 0 ? tile.row(first + share.group) + share.lane * kColumns : tile.data;
  const int64_t step = valid > 0 ? share.groups * tile.stride : 0;
  Packet<S>* packet = to.row(share.group) + share.lane;
  const int packets = share.groups * (to.lanes + 1), samples = share.samples(static_cast<int>(rows));
  if (tile.aligned()) {
#pragma unroll 4
    for (int i = 0; i < samples; ++i, from += step, packet += packets)
      copy_async<16>(packet, from, valid * static_cast<int>(sizeof(S)));
    return;
  }
#pragma unroll 1
  for (int i = 0; i < samples; ++i, from += step, packet += packets) {
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

// A sum for each column of a packet.
template <typename S>
struct alignas(16) PacketSums {
  Accumulate<S> columns[Packet<S>::kColumns];

  // Writes the first `count` of them.
  RGD_DEVICE void write(S* to, int count) const {
    if (count >= Packet<S>::kColumns && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      Packet<S> packet;
#pragma unroll
      for (int c = 0; c < Packet<S>::kColumns; ++c) narrow(columns[c], packet.columns[c]);
      store_packet(to, packet);
      return;
    }
#pragma unroll
    for (int c = 0; c < Packet<S>::kColumns; ++c)
      if (c < count) narrow(columns[c], to[c]);
  }
};

// sums += weight * packet.
template <typename S>
RGD_DEVICE void add_weighted(Accumulate<S> weight, const Packet<S>& packet, PacketSums<S>& sums) {
#pragma unroll
  for (int c = 0; c < Packet<S>::kColumns; ++c)
    sums.columns[c] = fused_multiply_add(weight, widen(packet, c), sums.columns[c]);
}

// Bytes of shared memory that sum_groups needs.
template <typename S>
constexpr int64_t group_sums_bytes() {
  return kThreads * sizeof(PacketSums<S>);
}

// Adds the sums that each thread has for its lane and its samples over all groups, in order. The results of lane l are
// left in shared[l] and passed to use(l, sums), for the first `packets` lanes. Every kernel that sums over samples
// calls this, so that equal weights give the bits of the mean.
template <typename S, typename F>
RGD_DEVICE void sum_groups(const PacketSums<S>& own, int lanes, int packets, PacketSums<S>* shared, F use) {
  const int groups = Share(lanes).groups, lane = thread_index();
  shared[thread_index()] = own;
  barrier();
  if (lane < packets) {
    PacketSums<S> sums = shared[lane];
#pragma unroll 4
    for (int group = 1; group < groups; ++group) {
      const PacketSums<S> more = shared[group * lanes + lane];
#pragma unroll
      for (int c = 0; c < Packet<S>::kColumns; ++c) sums.columns[c] += more.columns[c];
    }
    shared[lane] = sums;
    use(lane, sums);
  }
  barrier();
}

}  // namespace rgd_ext::cuda
