#pragma once

#include "rows.h"

namespace rgd_ext::cpu {

// A tile in the accumulation type. Where it has to be converted, it is written to `scratch`, which has room for
// rows * padded_columns(columns) elements.
template <typename S, typename T = accumulate_t<S>>
Tile<T> widened(const Tile<S>& tile, T* scratch) {
  if constexpr (std::is_same_v<S, T>) {
    return tile;
  } else {
    const int64_t stride = padded_columns(tile.columns);
    for (int64_t i = 0; i < tile.rows; ++i)
      row_kernels<S>().widen(tile.data + i * tile.stride, tile.columns, scratch + i * stride);
    return {scratch, stride, tile.rows, tile.columns};
  }
}

}  // namespace rgd_ext::cpu
