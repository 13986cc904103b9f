#pragma once

// The mean and its statistics in one read of G. Column j of the mean needs only column j of G, so the centred products
// are computed from the same tile while it is on chip.

#include "products.cuh"

namespace rgd_ext::cuda {

template <typename S>
constexpr int64_t moments_shared_bytes(int64_t rows, int lanes) {
  return 2 * shared_tile_bytes(rows, lanes) + row_sums_bytes(rows, lanes, 2) + group_sums_bytes<S>();
}

// The lanes of a tile of all samples, see fitting_lanes(); 0 if no such tile fits.
template <typename S>
constexpr int lanes_for(int64_t rows, int64_t shared_limit) {
  return fitting_lanes(rows, shared_limit, [&](int lanes) { return moments_shared_bytes<S>(rows, lanes); });
}

// table.other = g, unless it is null. partials = <g_i - g, g> and |g_i - g|^2, summed over the tiles of each block, see
// RowSums::write.
template <typename S, int kCapacity>
RGD_DEVICE void moments(const Table<kCapacity>& table, double* partials, int64_t slots, int64_t first_slot,
                        char* shared) {
  using T = Accumulate<S>;
  const int64_t tile_bytes = shared_tile_bytes(table.rows, table.lanes);
  SharedTile<S> loaded{take<Packet<S>>(shared, tile_bytes), table.lanes};
  SharedTile<S> arriving{take<Packet<S>>(shared, tile_bytes), table.lanes};
  RowSums<S, 2> sums(take<double>(shared, row_sums_bytes(table.rows, table.lanes, 2)), table.rows, table.lanes);
  PacketSums<S>* mean = reinterpret_cast<PacketSums<S>*>(shared);

  const Share share(table.lanes);
  const T weight = static_cast<T>(1.0 / static_cast<double>(table.rows));

  int64_t number = block_index();
  Tiles<S, kCapacity> tiles(table, number);
  Tile<S> next = tiles[number];
  copy_tile(next, 0, table.rows, arriving);
  commit_copies();
  for (; number < table.tiles; number += blocks()) {
    const Tile<S> tile = next;
    swap(loaded, arriving);
    if (number + blocks() < table.tiles) copy_tile(next = tiles[number + blocks()], 0, table.rows, arriving);
    commit_copies();
    wait_copies<1>();

    // Each thread reads only what it copied itself; after the barrier in sum_groups it may read the rest.
    PacketSums<S> own{};
    if (share.lane < tile.packets()) {
      const Packet<S>* packet = loaded.row(share.group) + share.lane;
      const int samples = share.samples(static_cast<int>(table.rows));
#pragma unroll 4
      for (int i = 0; i < samples; ++i, packet += share.groups * (table.lanes + 1))
        add_weighted(weight, shared_packet(packet), own);
    }
    sum_groups(own, table.lanes, tile.packets(), mean, [&](int lane, const PacketSums<S>& sums) {
      const int column = lane * Packet<S>::kColumns;
      if (tile.other != nullptr) sums.write(tile.other + column, tile.count - column);
    });

    sums.add(loaded, tile.packets(),
             [&](T(&terms)[2], const Packet<S>& packet, int lane) { add_centred(terms, packet, mean[lane]); });
    barrier();  // before the next copies overwrite this tile
  }
  sums.write(partials, table.rows, 0, slots, first_slot + block_index());
}

}  // namespace rgd_ext::cuda
