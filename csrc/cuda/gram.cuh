#pragma once

// K = G G^T: blocks of samples x samples on and below the diagonal, each summed over a share of the columns by one
// thread block. Warps hold 32 x 32 squares of it in registers: matrix units for 2-byte types and tf32, else plain
// multiply-adds.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// kBlock samples (32, 64 or 128) by kBlock samples. Eight warps share kSide^2 squares; where there are fewer squares
// than warps, `kSlices` warps share a square's columns, and each has results of its own.
template <int kBlockSamples>
struct GramShape {
  static constexpr int kBlock = kBlockSamples;
  static constexpr int kSide = kBlock / 32;
  static constexpr int kSlices = kSide * kSide < kWarps ? kWarps / (kSide * kSide) : 1;
  static constexpr int kSquares = kSide * kSide > kWarps ? kSide * kSide / kWarps : 1;  // of a warp
  static constexpr int kLanes = kBlock == 32 ? 16 : 8;
  static constexpr int64_t kSharedBytes = 4 * shared_tile_bytes(kBlock, kLanes);
};

// Sums in float get long: after so many columns they move to the partial results.
constexpr int kColumnsInRegisters = 8192;

// A warp's squares all lie in one column of squares, so they share what is read of the right operand.
template <int kBlock>
struct WarpSquares {
  using Shape = GramShape<kBlock>;
  int column, first_row, slice;

  RGD_DEVICE WarpSquares() {
    const int warp = thread_index() / kWarp;
    if constexpr (Shape::kSquares > 1) {
      // Mirrored halves: on the diagonal, where squares above it are left out, the four schedulers get equal shares.
      column = warp < Shape::kSide ? warp : 2 * Shape::kSide - 1 - warp;
      first_row = warp / Shape::kSide;
      slice = 0;
    } else {
      slice = warp % Shape::kSlices;
      column = warp / Shape::kSlices % Shape::kSide;
      first_row = warp / Shape::kSlices / Shape::kSide;
    }
  }
  RGD_DEVICE int row(int square) const { return first_row + square * (kWarps / Shape::kSide); }
};

// Squares by matrix units. The packets of a row are 4-byte words to them: word w of row r stands in bank (4 r + w) %
// 32, so the loads of a fragment meet 32 different banks.
template <typename S, int kBlock>
struct MatrixUnitSums {
  using Storage = S;
  using Shape = GramShape<kBlock>;
  using T = float;
  static constexpr int kSquares = Shape::kSquares;
  static constexpr int kBlocksPerMultiprocessor = 2;

  float sums[kSquares][2][4][4];  // square, 16 rows, 8 columns, fragment

  RGD_DEVICE static uint32_t word(SharedTile<S> tile, int row, int index) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(tile.row(row))[index];
    if constexpr (std::is_same_v<S, float>) return to_tf32(word);
    return word;
  }

  RGD_DEVICE void add(SharedTile<S> left, SharedTile<S> right, const WarpSquares<kBlock>& place, bool diagonal) {
    const int g = thread_index() % kWarp / 4, t = thread_index() % 4;
#pragma unroll 1  // the sums fill the registers
    for (int step = place.slice; step < Shape::kLanes / 2; step += Shape::kSlices) {
      const int w = step * 8 + t;
      uint32_t b[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) b[n][k] = word(right, place.column * 32 + n * 8 + g, w + 4 * k);
#pragma unroll
      for (int square = 0; square < kSquares; ++square) {
        if (diagonal && place.row(square) < place.column) continue;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int row = place.row(square) * 32 + m * 16 + g;
          const uint32_t a[4] = {word(left, row, w), word(left, row + 8, w), word(left, row, w + 4),
                                 word(left, row + 8, w + 4)};
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply_accumulate<S>(sums[square][m][n], a, b[n]);
        }
      }
    }
  }

  // use(square, row in it, column in it, sum) for all this thread holds, which is zero then.
  template <typename F>
  RGD_DEVICE void drain(F use) {
    const int g = thread_index() % kWarp / 4, t = thread_index() % 4;
#pragma unroll
    for (int square = 0; square < kSquares; ++square)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            use(square, m * 16 + g + e / 2 * 8, n * 8 + 2 * t + e % 2, sums[square][m][n][e]);
            sums[square][m][n][e] = 0;
          }
  }
};

// Squares by plain arithmetic: a thread has rows y, y + 8, ... and columns x, x + 4, ... of each.
template <typename S, int kBlock>
struct PlainSums {
  using Storage = S;
  using Shape = GramShape<kBlock>;
  using T = Accumulate<S>;
  static constexpr int kSquares = Shape::kSquares;
  static constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 || kBlock == 128 ? 1 : 2;

  T sums[kSquares][4][8];

  RGD_DEVICE void add(SharedTile<S> left, SharedTile<S> right, const WarpSquares<kBlock>& place, bool diagonal) {
    const int y = thread_index() % kWarp / 4, x = thread_index() % 4;
#pragma unroll 1  // the sums fill the registers
    for (int p = place.slice; p < Shape::kLanes; p += Shape::kSlices) {
      Packet<S> b[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) b[n] = right.row(place.column * 32 + n * 4 + x)[p];
#pragma unroll
      for (int square = 0; square < kSquares; ++square) {
        if (diagonal && place.row(square) < place.column) continue;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const Packet<S> a = left.row(place.row(square) * 32 + m * 8 + y)[p];
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int c = 0; c < Packet<S>::kColumns; ++c)
              sums[square][m][n] = fused_multiply_add(a.columns[c], b[n].columns[c], sums[square][m][n]);
        }
      }
    }
  }

  template <typename F>
  RGD_DEVICE void drain(F use) {
    const int y = thread_index() % kWarp / 4, x = thread_index() % 4;
#pragma unroll
    for (int square = 0; square < kSquares; ++square)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          use(square, m * 8 + y, n * 4 + x, sums[square][m][n]);
          sums[square][m][n] = 0;
        }
  }
};

// Block pair (i, j), i >= j, of number `pair` in the order (0, 0), (1, 0), (1, 1), (2, 0), ...
struct BlockPair {
  int64_t i = 0, j;
  RGD_DEVICE explicit BlockPair(int64_t pair) : j(pair) {
    while (j > i) j -= ++i;
  }
};

// The tiles `begin`, `begin` + `step`, ... before `end` (one at least): the part of a product that one thread block
// adds up. Its slices leave their results as the shares from first_share on.
struct Part {
  int64_t begin, end, step, first_share;
};

// partials[(share * rows + i) * rows + j] for i and j of the pair block_index_y(). Sums = MatrixUnitSums or PlainSums.
template <typename Sums, int kCapacity>
RGD_DEVICE void gram(const Table<kCapacity>& table, const Part& part, typename Sums::T* partials, char* shared) {
  using S = typename Sums::Storage;
  using Shape = typename Sums::Shape;
  constexpr int kBlock = Shape::kBlock;
  const BlockPair pair(block_index_y());
  const bool diagonal = pair.i == pair.j;
  const int64_t rows = table.rows, tile_bytes = shared_tile_bytes(kBlock, Shape::kLanes);
  const auto buffer = [&](int index) {
    return SharedTile<S>{reinterpret_cast<Packet<S>*>(shared + index * tile_bytes), Shape::kLanes};
  };
  const auto block_rows = [&](int64_t block) {
    return rows - block * kBlock < kBlock ? rows - block * kBlock : int64_t{kBlock};
  };
  // Stage t holds the rows of block i and, off the diagonal, those of block j beside them.
  const int stages = diagonal ? 4 : 2;
  const auto left = [&](int stage) { return buffer(stage % stages * (4 / stages)); };
  const auto right = [&](int stage) { return buffer(stage % stages * (4 / stages) + !diagonal); };
  // Samples past the last one add zeros.
  for (int64_t index = thread_index(); index < 4 * tile_bytes / 16; index += kThreads)
    reinterpret_cast<Packet<S>*>(shared)[index] = Packet<S>{};
  barrier();

  const WarpSquares<kBlock> place;
  const int64_t share = part.first_share + place.slice;
  const auto write = [&](bool first) {
    const int64_t size = computed_here(rows);
    return [=](int square, int row, int column, typename Sums::T sum) {
      const int64_t i = pair.i * kBlock + place.row(square) * 32 + row;
      const int64_t j = pair.j * kBlock + place.column * 32 + column;
      if (i >= size || j > i) return;
      typename Sums::T& partial = partials[(share * size + i) * size + j];
      partial = first ? sum : partial + sum;
    };
  };

  Sums sums{};
  Tiles<S, kCapacity> tiles(table, part.begin);
  const int count = static_cast<int>((part.end - part.begin + part.step - 1) / part.step);
  const auto copy = [&](int stage) {
    if (stage < count) {
      const Tile<S> tile = tiles[part.begin + stage * part.step];
      copy_tile(tile, pair.i * kBlock, block_rows(pair.i), left(stage));
      if (!diagonal) copy_tile(tile, pair.j * kBlock, block_rows(pair.j), right(stage));
    }
    commit_copies();
  };
  for (int stage = 0; stage < stages - 1; ++stage) copy(stage);
  bool first = true;
  int columns = 0;
  for (int stage = 0; stage < count; ++stage) {
    if (diagonal) {
      wait_copies<2>();
    } else {
      wait_copies<0>();
    }
    barrier();  // this stage is there, and nobody reads the one before any more
    copy(stage + stages - 1);
    sums.add(left(stage), right(stage), place, diagonal);
    columns += Shape::kLanes * Packet<S>::kColumns;
    if (stage + 1 == count || columns >= kColumnsInRegisters) {
      sums.drain(write(first));
      first = false;
      columns = 0;
    }
  }
}

constexpr int64_t kReduceSharedBytes = kThreads * sizeof(double);

// gram[i, j] = gram[j, i] = sum of part(group, i * rows + j) over all groups, in their order, for i >= j. kEntries
// threads beside each other make a group.
template <int kEntries, typename T, typename F>
RGD_DEVICE void reduce_symmetric(int64_t rows, T* gram, char* shared, F part) {
  const int entry = thread_index() % kEntries, group = thread_index() / kEntries;
  const int64_t index = block_index() * kEntries + entry, i = index / rows, j = index % rows;
  const bool mine = i < rows && j <= i;
  double* sums = reinterpret_cast<double*>(shared);
  double sum = mine ? part(group, index) : 0;
  sums[thread_index()] = sum;
  barrier();
  if (!mine || group > 0) return;
  for (int other = 1; other < kThreads / kEntries; ++other) sum += sums[other * kEntries + entry];
  gram[index] = gram[j * rows + i] = static_cast<T>(sum);
}

template <int kEntries>
constexpr int64_t reduce_blocks(int64_t rows) {
  return (rows * rows + kEntries - 1) / kEntries;
}

// Entries of K to a block of reduce_gram, which has few of them and many shares.
constexpr int kGramEntries = 8;

// gram = the sum of the shares, each (rows, rows).
template <typename T>
RGD_DEVICE void reduce_gram(const T* partials, int64_t rows, int64_t shares, T* gram, char* shared) {
  reduce_symmetric<kGramEntries>(rows, gram, shared, [&](int group, int64_t index) {
    double sum = 0;
    for (int64_t share = group; share < shares; share += kThreads / kGramEntries)
      sum += partials[share * rows * rows + index];
    return sum;
  });
}

}  // namespace rgd_ext::cuda
