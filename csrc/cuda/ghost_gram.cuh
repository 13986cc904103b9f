#pragma once

// K = sum_l (A_l A_l^T + bias_l) o (E_l E_l^T) of linear layers with inputs A and output gradients E, without forming
// per-sample gradients. One kernel computes the products of all layers. The two of a layer are complete only when all
// blocks are done, so another kernel computes their Hadamard product and the sum over layers.

#include "gram.cuh"

namespace rgd_ext::cuda {

template <int kCapacity>
struct Layers {
  Table<kCapacity> factors;  // A_0, E_0, A_1, E_1, ...
  int block_tiles;           // tiles of a block, all of one factor: divides every first_tile, and the number of tiles
  bool biases[kCapacity / 2];
};

// partials = shares of X X^T for each factor X, one share for each block, see gram().
template <typename Sums, int kCapacity>
RGD_DEVICE void ghost_products(const Layers<kCapacity>& layers, typename Sums::T* partials, char* shared) {
  const int64_t begin = block_index() * layers.block_tiles;
  const int64_t last = Tiles<typename Sums::Storage, kCapacity>(layers.factors, begin).end();
  const int64_t end = begin + layers.block_tiles < last ? begin + layers.block_tiles : last;
  gram<Sums>(layers.factors, {begin, end, 1, block_index()}, partials, shared);
}

constexpr int kGhostEntries = 32;

// gram = the sum over layers, or gram += that sum if `adds`.
template <typename T, int kCapacity>
RGD_DEVICE void reduce_layers(const Layers<kCapacity>& layers, const T* partials, bool adds, T* gram, char* shared) {
  const Table<kCapacity>& factors = layers.factors;
  const int64_t rows = factors.rows;
  const auto first_share = [&](int factor) {
    const int64_t tile = factor < factors.matrices ? factors.matrix[factor].first_tile : factors.tiles;
    return tile / layers.block_tiles;
  };
  reduce_symmetric<kGhostEntries>(rows, gram, shared, [&](int group, int64_t index) {
    const auto product = [&](int factor) {
      const T* partial = partials + first_share(factor) * rows * rows + index;
      double sum = 0;
      for (int64_t left = first_share(factor + 1) - first_share(factor); left > 0; --left, partial += rows * rows)
        sum += *partial;
      return sum;
    };
    double sum = adds && group == 0 ? gram[index] : 0;
    for (int layer = group; layer < factors.matrices / 2; layer += kThreads / kGhostEntries)
      sum += (product(2 * layer) + layers.biases[layer]) * product(2 * layer + 1);
    return sum;
  });
}

}  // namespace rgd_ext::cuda
