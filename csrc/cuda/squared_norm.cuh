#pragma once

// |v|^2 of a vector that lies in several tensors: matrices of one row, read once, straight from global memory.

#include "reduce.cuh"
#include "tiles.cuh"

namespace rgd_ext::cuda {

// A packet for each thread makes a tile.
constexpr int kSquaredNormLanes = kThreads;
constexpr int64_t kSquaredNormSharedBytes = kWarps * sizeof(double);

// The sum of squares of the first `count` columns from `from` on, at most a packet.
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

// partials[first_slot + block] = the sum over the tiles of a block.
template <typename S, int kCapacity>
RGD_DEVICE void squared_norm(const Table<kCapacity>& table, double* partials, int64_t first_slot, char* memory) {
  const int column = thread_index() * Packet<S>::kColumns;
  LongSum<Accumulate<S>> sum;
  int64_t number = block_index();
  Tiles<S, kCapacity> tiles(table, number);
  for (; number < table.tiles; number += blocks()) {
    const Tile<S> tile = tiles[number];
    if (column < tile.count) sum.add(squares(tile.data + column, tile.count - column));
  }
  double* shared = reinterpret_cast<double*>(memory);
  const double of_warp = warp_sum(sum.total());
  if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = of_warp;
  barrier();
  if (thread_index() > 0) return;
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += shared[warp];
  partials[first_slot + block_index()] = total;
}

}  // namespace rgd_ext::cuda
