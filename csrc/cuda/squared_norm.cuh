#pragma once

// |v|^2 of a vector that is held in several tensors, as matrices of one row: one read, directly from global memory.

#include "reduce.cuh"
#include "tiles.cuh"

namespace rgd_ext::cuda {

// A tile has one packet for each thread.
constexpr int kSquaredNormLanes = kThreads;

// The sum of the squares of `count` columns, at most those of a packet.
template <typename S>
RGD_DEVICE Accumulate<S> squares(const S* from, int count) {
  constexpr int kColumns = Packet<S>::kColumns;
  Packet<S> packet;
  if (count >= kColumns && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    packet = load_packet<Packet<S>>(from);
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) packet.columns[c] = c < count ? from[c] : S{};
  }
  Accumulate<S> sum = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const Accumulate<S> value = widen(packet.columns[c]);
    sum = fused_multiply_add(value, value, sum);
  }
  return sum;
}

// partials[first_slot + block] = the sum of squares in the tiles of a block.
template <typename S, int kCapacity>
RGD_DEVICE void squared_norm(const Table<kCapacity>& table, double* partials, int64_t first_slot, char* shared) {
  const int column = thread_index() * Packet<S>::kColumns;
  LongSum<Accumulate<S>> sum;
  int64_t number = block_index();
  Tiles<S, kCapacity> tiles(table, number);
  for (; number < table.tiles; number += blocks()) {
    const Tile<S> tile = tiles[number];
    if (column < tile.count) sum.add(squares(tile.data + column, tile.count - column));
  }
  const double total = sum_by_block(sum.total(), shared);
  if (thread_index() == 0) partials[first_slot + block_index()] = total;
}

}  // namespace rgd_ext::cuda
