#pragma once

// Products of the samples with a few vectors, <g_i, v_j>: sums over all columns that a block reads, in double, each in
// a slot of shared memory that one thread owns; one number per sample and block goes to global memory at the end.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// Samples are split among threads by `parts` where there are fewer samples than threads.
constexpr int row_parts(int64_t rows, int lanes) {
  const int64_t parts = rows < kThreads ? kThreads / rows : 1;
  return static_cast<int>(parts < lanes ? parts : lanes);
}

constexpr int64_t row_sums_bytes(int64_t rows, int lanes, int sums) {
  return rows * row_parts(rows, lanes) * sums * sizeof(double);
}

template <typename S, int kSums>
struct RowSums {
  using T = Accumulate<S>;

  double* shared;  // kSums arrays of rows * parts
  int rows, lanes, parts;

  RGD_DEVICE RowSums(double* shared, int64_t rows, int lanes)
      : shared(shared), rows(static_cast<int>(rows)), lanes(lanes), parts(row_parts(rows, lanes)) {
    for (int slot = thread_index(); slot < this->rows * parts; slot += kThreads)
      for (int j = 0; j < kSums; ++j) sum(j, slot) = 0;
  }

  RGD_DEVICE double& sum(int j, int slot) { return shared[j * rows * parts + slot]; }

  // Adds term(sums, sample, packet) over all samples of a tile and their packets.
  template <typename F>
  RGD_DEVICE void add(SharedTile<S> tile, F term) {
    for (int slot = thread_index(); slot < rows * parts; slot += kThreads) {
      const int row = slot % rows;
      T sums[kSums] = {};
      for (int p = slot / rows; p < lanes; p += parts) term(sums, tile.row(row)[p], p * Packet<S>::kColumns);
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum(j, slot) += sums[j];
    }
  }

  // After a barrier: partials[(j * all_rows + first_row + i) * slots + slot], for the samples i of this block.
  RGD_DEVICE void write(double* partials, int64_t all_rows, int64_t first_row, int64_t slots, int64_t slot) {
    for (int index = thread_index(); index < kSums * rows; index += kThreads) {
      const int j = index / rows, row = index % rows;
      double total = 0;
      for (int part = 0; part < parts; ++part) total += sum(j, part * rows + row);
      partials[(j * all_rows + first_row + row) * slots + slot] = total;
    }
  }
};

// <x - m, m> and |x - m|^2 of a packet x.
template <typename S>
RGD_DEVICE void add_centred(Accumulate<S> (&sums)[2], const Packet<S>& packet, const Accumulate<S>* mean) {
#pragma unroll
  for (int c = 0; c < Packet<S>::kColumns; ++c) {
    const Accumulate<S> centre = mean[c], difference = widen(packet.columns[c]) - centre;
    sums[0] = fused_multiply_add(difference, centre, sums[0]);
    sums[1] = fused_multiply_add(difference, difference, sums[1]);
  }
}

template <typename S, int kVectors>
RGD_DEVICE void add_products(Accumulate<S> (&sums)[kVectors], const Packet<S>& packet, const Accumulate<S>* vectors,
                             int width) {
#pragma unroll
  for (int c = 0; c < Packet<S>::kColumns; ++c) {
    const Accumulate<S> value = widen(packet.columns[c]);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) sums[j] = fused_multiply_add(value, vectors[j * width + c], sums[j]);
  }
}

// How a block of products() reads G: samples beyond these are other blocks' work, by block_index_y().
constexpr int64_t kProductRows = 64;
constexpr int kProductLanes = kMostLanes;

template <typename S>
constexpr int64_t products_shared_bytes(int vectors, int sums) {
  return 2 * shared_tile_bytes(kProductRows, kProductLanes) + row_sums_bytes(kProductRows, kProductLanes, sums) +
         vectors * kProductLanes * Packet<S>::kColumns * sizeof(Accumulate<S>);
}

// With kCentred: alignments and squared norms of g_i - m, where m is the one vector of table.other (two sums). Else the
// products with the vectors [first, first + count) of table.other, count <= kVectors.
template <typename S, int kCapacity, bool kCentred, int kVectors>
RGD_DEVICE void products(const Table<kCapacity>& table, int64_t first, int count, double* partials, int64_t slots,
                         int64_t first_slot, char* shared) {
  using T = Accumulate<S>;
  constexpr int kSums = kCentred ? 2 : kVectors;
  const int64_t first_row = block_index_y() * kProductRows;
  const int64_t rows = table.rows - first_row < kProductRows ? table.rows - first_row : kProductRows;
  const int64_t tile_bytes = shared_tile_bytes(kProductRows, kProductLanes);
  const int width = kProductLanes * Packet<S>::kColumns;

  SharedTile<S> loaded{take<Packet<S>>(shared, tile_bytes), kProductLanes};
  SharedTile<S> arriving{take<Packet<S>>(shared, tile_bytes), kProductLanes};
  RowSums<S, kSums> sums(take<double>(shared, row_sums_bytes(kProductRows, kProductLanes, kSums)), rows, kProductLanes);
  T* vectors = reinterpret_cast<T*>(shared);

  int64_t number = block_index();
  Tiles<S, kCapacity> tiles(table, number);
  Tile<S> next = tiles[number];
  copy_tile(next, first_row, rows, arriving);
  commit_copies();
  for (; number < table.tiles; number += blocks()) {
    const Tile<S> tile = next;
    swap(loaded, arriving);
    if (number + blocks() < table.tiles) copy_tile(next = tiles[number + blocks()], first_row, rows, arriving);
    commit_copies();
    for (int index = thread_index(); index < kVectors * width; index += kThreads) {
      const int j = index / width, column = index % width;
      const bool inside = j < count && column < tile.count;
      vectors[index] = inside ? widen(tile.other[(first + j) * tile.other_stride + column]) : T(0);
    }
    wait_copies<1>();
    barrier();
    sums.add(loaded, [&](T(&terms)[kSums], const Packet<S>& packet, int column) {
      if constexpr (kCentred) {
        add_centred<S>(terms, packet, vectors + column);
      } else {
        add_products<S, kVectors>(terms, packet, vectors + column, width);
      }
    });
    barrier();  // before the next copies overwrite what is read here
  }
  sums.write(partials, table.rows, first_row, slots, first_slot + block_index());
}

}  // namespace rgd_ext::cuda
