#pragma once

// The second read of G: weighted sums over the samples, p_j = sum_i w_ji g_i, directly from global memory.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// use(sample, packet) for the samples `sample`, `sample` + `groups`, ... before `rows`, whose packets are `step`
// elements apart. kAhead packets are loaded before the first of them is used, and half as many where fewer are left.
template <int kAhead, typename S, typename F>
RGD_DEVICE void for_packets(const S* from, int64_t step, int64_t sample, int groups, int64_t rows, F use) {
  for (; sample + (kAhead - 1) * groups < rows; sample += kAhead * groups, from += kAhead * step) {
    Packet<S> packets[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) packets[k] = load_packet<Packet<S>>(from + k * step);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) use(sample + k * groups, packets[k]);
  }
  if constexpr (kAhead > 1) for_packets<kAhead / 2>(from, step, sample, groups, rows, use);
}

// use(sample, packet) for this thread's samples of a tile. Columns past its end are zero.
template <int kAhead, typename S, typename F>
RGD_DEVICE void for_samples(const Tile<S>& tile, int64_t rows, const Share& share, F use) {
  constexpr int kColumns = Packet<S>::kColumns;
  const int left = tile.count - share.lane * kColumns;
  const S* from = tile.row(share.group) + share.lane * kColumns;
  const int64_t step = share.groups * tile.stride;
  if (left >= kColumns && tile.aligned()) {
    for_packets<kAhead>(from, step, share.group, share.groups, rows, use);
  } else if (left > 0) {
    for (int64_t i = share.group; i < rows; i += share.groups, from += step) {
      Packet<S> packet;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) packet.columns[c] = c < left ? from[c] : S{};
      use(i, packet);
    }
  }
}

// Vectors [first, first + count) of table.other = the sums with weights[j * rows + i], for count <= kOutputs. Tiles are
// taken last to first because the read of the statistics ended there: they may still be in the L2 cache.
template <typename S, int kCapacity, int kOutputs>
RGD_DEVICE void combine(const Table<kCapacity>& table, const Accumulate<S>* weights, int64_t first, int count,
                        char* shared) {
  const Share share(table.lanes);
  int64_t number = table.tiles - 1 - block_index();
  Tiles<S, kCapacity> tiles(table, number);
  for (; number >= 0; number -= blocks()) {
    const Tile<S> tile = tiles[number];
    PacketSums<S> sums[kOutputs] = {};
    // As many packets ahead as the sums leave registers for.
    for_samples<kOutputs == 1 ? 8 : 4>(tile, table.rows, share, [&](int64_t i, const Packet<S>& packet) {
#pragma unroll
      for (int j = 0; j < kOutputs; ++j)
        if (kOutputs == 1 || j < count) add_weighted(weights[j * table.rows + i], packet, sums[j]);
    });
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      if (kOutputs > 1 && j >= count) break;
      S* result = tile.other + (first + j) * tile.other_stride;
      sum_groups(sums[j], table.lanes, tile.packets(), reinterpret_cast<PacketSums<S>*>(shared),
                 [&](int lane, const PacketSums<S>& all) {
                   const int column = lane * Packet<S>::kColumns;
                   all.write(result + column, tile.count - column);
                 });
    }
  }
}

}  // namespace rgd_ext::cuda
