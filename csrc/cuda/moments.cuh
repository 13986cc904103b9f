#pragma once

// One read of G: column j of the mean needs only column j of G, so the centred products follow the mean while the tile
// is on chip.

#include "products.cuh"

namespace rgd_ext::cuda {

template <typename S>
constexpr int64_t moments_shared_bytes(int64_t rows, int lanes) {
  return 2 * shared_tile_bytes(rows, lanes) + row_sums_bytes(rows, lanes, 2) + group_sums_bytes<S>() +
         lanes * Packet<S>::kColumns * sizeof(Accumulate<S>);
}

// table.other = g, where not null; sums over the tiles of a block of <g_i - g, g> and |g_i - g|^2, see RowSums::write.
template <typename S, int kCapacity>
RGD_DEVICE void moments(const Table<kCapacity>& table, double* partials, int64_t slots, int64_t first_slot,
                        char* shared) {
  using T = Accumulate<S>;
  const int64_t tile_bytes = shared_tile_bytes(table.rows, table.lanes);
  SharedTile<S> loaded{take<Packet<S>>(shared, tile_bytes), table.lanes};
  SharedTile<S> arriving{take<Packet<S>>(shared, tile_bytes), table.lanes};
  RowSums<S, 2> sums(take<double>(shared, row_sums_bytes(table.rows, table.lanes, 2)), table.rows, table.lanes);
  T* group_sums = take<T>(shared, group_sums_bytes<S>());
  T* mean = reinterpret_cast<T*>(shared);

  const int group = thread_index() / table.lanes, lane = thread_index() % table.lanes, groups = kThreads / table.lanes;
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

    // Each thread reads what it copied itself; the barrier in sum_groups shows it the rest.
    T column_sums[Packet<S>::kColumns] = {};
    for (int64_t i = group; i < table.rows; i += groups) add_weighted<S, T>(weight, loaded.row(i)[lane], column_sums);
    sum_groups<S>(column_sums, table.lanes, group_sums, [&](int column, T sum) {
      mean[column] = sum;
      if (tile.other != nullptr && column < tile.count) narrow(sum, tile.other[column]);
    });

    sums.add(loaded,
             [&](T(&terms)[2], const Packet<S>& packet, int column) { add_centred<S>(terms, packet, mean + column); });
    barrier();  // before the next copies overwrite what is read here
  }
  sums.write(partials, table.rows, 0, slots, first_slot + block_index());
}

}  // namespace rgd_ext::cuda
