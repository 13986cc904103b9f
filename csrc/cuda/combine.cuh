#pragma once

// The second read of G: weighted sums over the samples, p_j = sum_i w_ji g_i, straight from global memory.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// use(sample, packet) for every groups-th sample from `group` on: the packet of `lane`, zero past the end of the tile.
template <int kUnroll, typename S, typename F>
RGD_DEVICE void for_samples(const Tile<S>& tile, int64_t rows, int group, int groups, int lane, F use) {
  constexpr int kColumns = Packet<S>::kColumns;
  const int left = tile.count - lane * kColumns;
  const S* from = tile.data + lane * kColumns;
  if (left >= kColumns && tile.aligned()) {
#pragma unroll kUnroll
    for (int64_t i = group; i < rows; i += groups) use(i, load_packet<Packet<S>>(from + i * tile.stride));
  } else if (left > 0) {
    for (int64_t i = group; i < rows; i += groups) {
      Packet<S> packet;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) packet.columns[c] = c < left ? from[i * tile.stride + c] : S{};
      use(i, packet);
    }
  }
}

// Vectors [first, first + count) of table.other = sums with weights[j * rows + i], count <= kOutputs. Tiles are taken
// last to first: the read of the statistics ended there, so they may still be in the L2 cache.
template <typename S, int kCapacity, int kOutputs>
RGD_DEVICE void combine(const Table<kCapacity>& table, const Accumulate<S>* weights, int64_t first, int count,
                        char* shared) {
  using T = Accumulate<S>;
  const int group = thread_index() / table.lanes, lane = thread_index() % table.lanes, groups = kThreads / table.lanes;
  int64_t number = table.tiles - 1 - block_index();
  Tiles<S, kCapacity> tiles(table, number);
  for (; number >= 0; number -= blocks()) {
    const Tile<S> tile = tiles[number];
    T sums[kOutputs][Packet<S>::kColumns] = {};
    // Loads under way at a time, as far as the sums leave registers.
    for_samples<kOutputs == 1 ? 8 : 2>(tile, table.rows, group, groups, lane, [&](int64_t i, const Packet<S>& packet) {
#pragma unroll
      for (int j = 0; j < kOutputs; ++j)
        if (kOutputs == 1 || j < count) add_weighted<S, T>(weights[j * table.rows + i], packet, sums[j]);
    });
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      if (kOutputs > 1 && j >= count) break;
      sum_groups<S>(sums[j], table.lanes, reinterpret_cast<T*>(shared), [&](int column, T sum) {
        if (column < tile.count) narrow(sum, tile.other[(first + j) * tile.other_stride + column]);
      });
    }
  }
}

}  // namespace rgd_ext::cuda
