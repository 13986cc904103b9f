#pragma once

// How a thread block multiplies two tiles of a Gramian: its warps hold squares of the product in registers, and add to
// them with matrix units for 2-byte types and TF32, and with plain multiply-adds otherwise.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// A block of K, of kBlock (8 to 128) by kBlock samples: one square, for which each warp sums a slice of the columns, or
// 4 x 4 squares, two for each warp. Tiles have 16 KB whatever kBlock is, and up to three are in flight.
template <int kBlockSamples, int kSideSquares>
struct GramShape {
  static constexpr int kBlock = kBlockSamples;
  static constexpr int kSide = kSideSquares;
  static constexpr int kSquare = kBlock / kSide;
  static constexpr int kSquares = kSide > 1 ? kSide * kSide / kWarps : 1;  // of a warp
  static constexpr int kSlices = kSide > 1 ? 1 : kWarps;                   // of the columns, one for each warp
  static constexpr int kLanes = 1024 / kBlock;
  static constexpr int64_t kTileBytes = shared_tile_bytes(kBlock, kLanes);
};

// Rounding errors of a long sum in float grow with the sum, so it moves to the partial results after this many
// additions.
constexpr int kMostAdditions = 1024;

// How many blocks the shared memory of a multiprocessor is enough for. With fewer blocks, each gets more registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksThatFit = 1;  // 100 KB
#else
constexpr int kBlocksThatFit = 2;
#endif

// The squares of a warp. They are in one column of squares, so that they can share what is read of the right operand.
template <typename Shape>
struct WarpSquares {
  int column = 0, first_row = 0, slice = 0;
  bool needed[Shape::kSquares];  // not above the diagonal, nor past the last sample

  RGD_DEVICE WarpSquares(bool diagonal, int rows) {
    const int warp = thread_index() / kWarp;
    if constexpr (Shape::kSide == 1) {
      slice = warp;
      needed[0] = true;
    } else {
      // The columns of the second four warps are in reverse order: on the diagonal, where the squares above it are left
      // out, no scheduler then gets more than 3 of the 10.
      column = warp < Shape::kSide ? warp : 2 * Shape::kSide - 1 - warp;
      first_row = warp / Shape::kSide;
#pragma unroll
      for (int square = 0; square < Shape::kSquares; ++square)
        needed[square] = row(square) * Shape::kSquare < rows && !(diagonal && row(square) < column);
    }
  }
  RGD_DEVICE int row(int square) const { return first_row + square * (kWarps / Shape::kSide); }
};

// Sums by matrix units. They read the packets of a row as 4-byte words. Word w of row r is in bank (4 r + w) % 32, so
// the loads of a fragment use 32 different banks.
template <typename S, int kBlock>
struct MatrixUnitSums {
  using Storage = S;
  using Shape = GramShape<kBlock, kBlock <= 32 ? 1 : 4>;
  using T = float;
  static constexpr int kSquare = Shape::kSquare, kSquares = Shape::kSquares;
  static constexpr int kBlocksPerMultiprocessor = kBlocksThatFit;
  // Instructions of 16 x 8 results, of which a square of 8 x 8 uses half.
  static constexpr int kRowTiles = (kSquare + 15) / 16, kColumnTiles = kSquare / 8, kResults = kSquare < 16 ? 2 : 4;
  // Matrix units truncate when they add to a sum, which gets more and more too small. So only a few instructions in a
  // row accumulate, from zero, and ordinary additions, which round, do the rest.
  static constexpr int kChain = 2;
  static constexpr int kSteps = Shape::kLanes / 2 / kChain;             // of a tile
  static constexpr int kAdditions = (kSteps - 1) / Shape::kSlices + 1;  // to a sum, for each tile

  float sums[kSquares][kRowTiles][kColumnTiles][kResults];

  RGD_DEVICE static uint32_t word(SharedTile<S> tile, int row, int index) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(tile.row(row))[index];
    if constexpr (std::is_same_v<S, float>) return to_tf32(word);
    return word;
  }

  RGD_DEVICE void add(SharedTile<S> left, SharedTile<S> right, const WarpSquares<Shape>& place) {
    const int g = thread_index() % kWarp / 4, t = thread_index() % 4;
#pragma unroll 1  // the sums fill the registers
    for (int step = place.slice; step < kSteps; step += Shape::kSlices) {
      const int w = step * kChain * 8 + t;
#pragma unroll
      for (int square = 0; square < kSquares; ++square) {
        if (!place.needed[square]) continue;
        uint32_t a[kRowTiles][kChain][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int c = 0; c < kChain; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = m * 16 + i % 2 * 8;
              a[m][c][i] = row < kSquare ? word(left, place.row(square) * kSquare + row + g, w + c * 8 + i / 2 * 4) : 0;
            }
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          uint32_t b[kChain][2];
#pragma unroll
          for (int c = 0; c < kChain; ++c)
#pragma unroll
            for (int k = 0; k < 2; ++k) b[c][k] = word(right, place.column * kSquare + n * 8 + g, w + c * 8 + k * 4);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            float products[4] = {};
#pragma unroll
            for (int c = 0; c < kChain; ++c) multiply_accumulate<S>(products, a[m][c], b[c]);
#pragma unroll
            for (int e = 0; e < kResults; ++e) sums[square][m][n][e] += products[e];
          }
        }
      }
    }
  }

  // use(square, row in it, column in it, sum) for all sums of this thread, which are then reset to zero.
  template <typename F>
  RGD_DEVICE void drain(F use) {
    const int64_t thread = computed_here(int64_t{thread_index()});
    const int g = thread % kWarp / 4, t = thread % 4;
#pragma unroll
    for (int square = 0; square < kSquares; ++square)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int e = 0; e < kResults; ++e) {
            use(square, m * 16 + g + e / 2 * 8, n * 8 + 2 * t + e % 2, sums[square][m][n][e]);
            sums[square][m][n][e] = 0;
          }
  }
};

// Sums by ordinary arithmetic. A thread has kRows x 8 sums of each of its squares, 64 in all, so that it uses each
// element that it reads many times. A square that is too small for 32 threads is summed kDepth times, each time over
// other columns.
template <typename S, int kBlock>
struct PlainSums {
  using Storage = S;
  using Shape = GramShape<kBlock, kBlock <= 16 ? 1 : 4>;
  using T = Accumulate<S>;
  static constexpr int kSquare = Shape::kSquare, kSquares = Shape::kSquares;
  static constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 || kBlock == 128 ? 1 : kBlocksThatFit;
  static constexpr int kRows = 8 / kSquares, kSums = kSquares * kRows * 8;
  static constexpr int kRowThreads = kSquare / kRows, kColumnThreads = kSquare / 8;
  static constexpr int kDepth = kWarp / (kRowThreads * kColumnThreads);
  static constexpr int kSteps = Shape::kLanes / kDepth;                                         // of a tile
  static constexpr int kAdditions = ((kSteps - 1) / Shape::kSlices + 1) * Packet<S>::kColumns;  // to a sum, for each

  T sums[kSums];

  // Row or column number `index` of those that one of `threads` threads has in a square. Eight neighbouring threads
  // that read different packets get rows that are in different banks.
  RGD_DEVICE static int spread(int index, int thread, int threads) {
    constexpr int kApart = kDepth < kRows ? kDepth : kRows;
    return (index / kApart * threads + thread) * kApart + index % kApart;
  }
  struct Position {
    int depth, x, y;

    RGD_DEVICE explicit Position(int64_t thread)
        : depth(thread % kDepth), x(thread / kDepth % kColumnThreads), y(thread % kWarp / (kDepth * kColumnThreads)) {}
    RGD_DEVICE int row(int m) const { return spread(m, y, kRowThreads); }
    RGD_DEVICE int column(int n) const { return spread(n, x, kColumnThreads); }
  };

  RGD_DEVICE void add(SharedTile<S> left, SharedTile<S> right, const WarpSquares<Shape>& place) {
    const Position own(thread_index());
#pragma unroll 1  // the sums fill the registers
    for (int step = place.slice; step < kSteps; step += Shape::kSlices) {
      const int p = step * kDepth + own.depth;
      Packet<S> b[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) b[n] = right.row(place.column * kSquare + own.column(n))[p];
#pragma unroll
      for (int square = 0; square < kSquares; ++square) {
        if (!place.needed[square]) continue;
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const Packet<S> a = left.row(place.row(square) * kSquare + own.row(m))[p];
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            if (kBlock == 8 && n > m) continue;  // above the diagonal
            T& sum = sums[(square * kRows + m) * 8 + n];
#pragma unroll
            for (int c = 0; c < Packet<S>::kColumns; ++c) sum = fused_multiply_add(a.columns[c], b[n].columns[c], sum);
          }
        }
      }
    }
  }

  // Two threads whose depths differ in one bit exchange halves of their sums. In the end, each has kSums / kDepth
  // totals over all depths.
  template <int kMask>
  RGD_DEVICE void share_totals(int depth) {
    if constexpr (kMask > 0) {
      constexpr int kHalf = kSums / kDepth * kMask;
      const bool upper = depth & kMask;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const T given = upper ? sums[i] : sums[kHalf + i], kept = upper ? sums[kHalf + i] : sums[i];
        sums[i] = kept + shuffle_xor(given, kMask);
      }
      share_totals<kMask / 2>(depth);
    }
  }

  template <typename F>
  RGD_DEVICE void drain(F use) {
    const Position own(computed_here(int64_t{thread_index()}));
    share_totals<kDepth / 2>(own.depth);
#pragma unroll
    for (int i = 0; i < kSums / kDepth; ++i) {
      const int index = own.depth * (kSums / kDepth) + i;
      use(index / 8 / kRows, own.row(index / 8 % kRows), own.column(index % 8), sums[i]);
    }
#pragma unroll
    for (T& sum : sums) sum = 0;
  }
};

}  // namespace rgd_ext::cuda
