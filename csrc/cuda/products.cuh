#pragma once

// Products of the samples with a few vectors, <g_i, v_j>. A block sums them over all columns that it reads, in double,
// each in a slot of shared memory that one thread owns, and writes one number per sample to global memory at the end.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// How many threads share a sample, each with a part of the columns, if there are fewer samples than threads.
constexpr int row_parts(int64_t rows, int lanes) {
  int parts = 1;
  while (2 * parts <= lanes && 2 * parts * rows <= kThreads) parts *= 2;
  return parts;
}

constexpr int64_t row_sums_bytes(int64_t rows, int lanes, int sums) {
  return rows * row_parts(rows, lanes) * sums * sizeof(double);
}

template <typename S, int kSums>
struct RowSums {
  using T = Accumulate<S>;

  double* shared;  // kSums arrays of rows * parts
  int rows, parts;
  int first_row, part;  // of this thread

  RGD_DEVICE RowSums(double* shared, int64_t all_rows, int lanes)
      : shared(shared),
        rows(static_cast<int>(all_rows)),
        parts(row_parts(all_rows, lanes)),
        first_row(thread_index() % rows),
        part(thread_index() / rows) {
    for (int slot = thread_index(); slot < rows * parts; slot += kThreads)
      for (int j = 0; j < kSums; ++j) sum(j, slot) = 0;
  }

  RGD_DEVICE double& sum(int j, int slot) { return shared[j * rows * parts + slot]; }

  // Adds term(sums, packet, lane) over all samples of a tile and their first `packets` packets.
  template <typename F>
  RGD_DEVICE void add(SharedTile<S> tile, int packets, F term) {
    if (part >= parts || part >= packets) return;
    const int count = (packets - part + parts - 1) >> log2_of(parts);
    for (int row = first_row; row < rows; row += kThreads) {
      T sums[kSums] = {};
      const Packet<S>* packet = tile.row(row) + part;
#pragma unroll kSums* Packet < S> ::kColumns <= 8 ? 4 : 2
      for (int k = 0; k < count; ++k, packet += parts) term(sums, shared_packet(packet), part + k * parts);
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum(j, part * rows + row) += sums[j];
    }
  }

  // To be called after a barrier: partials[(j * all_rows + first_row + i) * slots + slot], for the samples i of this
  // block.
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
RGD_DEVICE void add_centred(Accumulate<S> (&sums)[2], const Packet<S>& packet, PacketSums<S> mean) {
#pragma unroll
  for (int c = 0; c < Packet<S>::kColumns; ++c) {
    const Accumulate<S> centre = mean.columns[c], difference = widen(packet, c) - centre;
    sums[0] = fused_multiply_add(difference, centre, sums[0]);
    sums[1] = fused_multiply_add(difference, difference, sums[1]);
  }
}

// sums[j] += <x, v_j> of a packet x, for vectors that are `lanes` packets apart.
template <typename S, int kVectors>
RGD_DEVICE void add_products(Accumulate<S> (&sums)[kVectors], const Packet<S>& packet, const PacketSums<S>* vectors,
                             int lanes) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const PacketSums<S> vector = vectors[j * lanes];
#pragma unroll
    for (int c = 0; c < Packet<S>::kColumns; ++c)
      sums[j] = fused_multiply_add(widen(packet, c), vector.columns[c], sums[j]);
  }
}

// A block of products() takes at most this many samples; those beyond are for other blocks, by block_index_y().
constexpr int64_t kProductRows = 64;
constexpr int64_t product_rows(int64_t rows) { return rows < kProductRows ? rows : kProductRows; }
constexpr int64_t product_blocks(int64_t rows) { return (rows + kProductRows - 1) / kProductRows; }

template <typename S>
constexpr int64_t products_shared_bytes(int64_t rows, int lanes, int vectors, int sums) {
  return 2 * shared_tile_bytes(product_rows(rows), lanes) + row_sums_bytes(product_rows(rows), lanes, sums) +
         vectors * lanes * sizeof(PacketSums<S>);
}

template <typename S>
constexpr int product_lanes(int64_t rows, int vectors, int sums, int64_t shared_limit) {
  return fitting_lanes(product_rows(rows), shared_limit,
                       [&](int lanes) { return products_shared_bytes<S>(rows, lanes, vectors, sums); });
}

// With kCentred, two sums: <g_i - m, m> and |g_i - m|^2, where m is the one vector of table.other. Otherwise the
// products with the vectors [first, first + count) of table.other, for count <= kVectors.
template <typename S, int kCapacity, bool kCentred, int kVectors>
RGD_DEVICE void products(const Table<kCapacity>& table, int64_t first, int count, double* partials, int64_t slots,
                         int64_t first_slot, char* shared) {
  using T = Accumulate<S>;
  constexpr int kSums = kCentred ? 2 : kVectors;
  const int64_t first_row = block_index_y() * kProductRows;
  const int64_t rows = product_rows(table.rows - first_row);
  const int64_t tile_bytes = shared_tile_bytes(product_rows(table.rows), table.lanes);
  const int64_t sums_bytes = row_sums_bytes(product_rows(table.rows), table.lanes, kSums);

  SharedTile<S> loaded{take<Packet<S>>(shared, tile_bytes), table.lanes};
  SharedTile<S> arriving{take<Packet<S>>(shared, tile_bytes), table.lanes};
  RowSums<S, kSums> sums(take<double>(shared, sums_bytes), rows, table.lanes);
  PacketSums<S>* vectors = reinterpret_cast<PacketSums<S>*>(shared);

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
    const int columns = tile.packets() * Packet<S>::kColumns;
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      for (int column = thread_index(); column < columns; column += kThreads) {
        const bool inside = j < count && column < tile.count;
        vectors[j * table.lanes].columns[column] =
            inside ? widen(tile.other[(first + j) * tile.other_stride + column]) : T(0);
      }
    wait_copies<1>();
    barrier();
    sums.add(loaded, tile.packets(), [&](T(&terms)[kSums], const Packet<S>& packet, int lane) {
      if constexpr (kCentred) {
        add_centred(terms, packet, vectors[lane]);
      } else {
        add_products<S, kVectors>(terms, packet, vectors + lane, table.lanes);
      }
    });
    barrier();  // before the next copies overwrite this tile
  }
  sums.write(partials, table.rows, first_row, slots, first_slot + block_index());
}

}  // namespace rgd_ext::cuda
