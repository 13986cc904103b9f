#pragma once

// K = G G^T: blocks of samples x samples on and below the diagonal, each summed over a share of the columns by one
// thread block. Warps hold squares of it in registers: matrix units for 2-byte types and tf32, else plain
// multiply-adds.

#include "tiles.cuh"

namespace rgd_ext::cuda {

// kBlock samples (8 to 128) by kBlock samples: one square whose columns the warps share, or 4 x 4 squares, two to a
// warp. Tiles of all sizes have 16 KB, of which three are under way.
template <int kBlockSamples, int kSideSquares>
struct GramShape {
  static constexpr int kBlock = kBlockSamples;
  static constexpr int kSide = kSideSquares;
  static constexpr int kSquare = kBlock / kSide;
  static constexpr int kSquares = kSide > 1 ? kSide * kSide / kWarps : 1;  // of a warp
  static constexpr int kSlices = kSide > 1 ? 1 : kWarps;                   // of the columns, one to a warp
  static constexpr int kLanes = 1024 / kBlock;
  static constexpr int64_t kTileBytes = shared_tile_bytes(kBlock, kLanes);
};

// Rounding errors of a long sum in float grow with the sum: after so many additions it moves to the partial results.
constexpr int kMostAdditions = 1024;

// How many blocks a multiprocessor has shared memory for: the fewer, the more registers for each.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksThatFit = 1;  // 100 KB
#else
constexpr int kBlocksThatFit = 2;
#endif

// A warp's squares all lie in one column of squares, so what is read of the right operand can serve them all.
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
      // Mirrored halves: on the diagonal, where squares above it are left out, no scheduler gets more than 3 of the 10.
      column = warp < Shape::kSide ? warp : 2 * Shape::kSide - 1 - warp;
      first_row = warp / Shape::kSide;
#pragma unroll
      for (int square = 0; square < Shape::kSquares; ++square)
        needed[square] = row(square) * Shape::kSquare < rows && !(diagonal && row(square) < column);
    }
  }
  RGD_DEVICE int row(int square) const { return first_row + square * (kWarps / Shape::kSide); }
};

// Squares by matrix units. The packets of a row are 4-byte words to them: word w of row r stands in bank (4 r + w) %
// 32, so the loads of a fragment meet 32 different banks.
template <typename S, int kBlock>
struct MatrixUnitSums {
  using Storage = S;
  using Shape = GramShape<kBlock, kBlock <= 32 ? 1 : 4>;
  using T = float;
  static constexpr int kSquare = Shape::kSquare, kSquares = Shape::kSquares;
  static constexpr int kBlocksPerMultiprocessor = kBlocksThatFit;
  // Instructions of 16 x 8 results, of which a square of 8 x 8 uses half.
  static constexpr int kRowTiles = (kSquare + 15) / 16, kColumnTiles = kSquare / 8, kResults = kSquare < 16 ? 2 : 4;
  // Matrix units cut off what does not fit when they add to a sum, which is then too small by more and more: so few
  // instructions in a row start from zero, and plain additions, which round, do the rest.
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

  // use(square, row in it, column in it, sum) for all this thread holds, which is zero then.
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

// Squares by plain arithmetic: a thread has kRows x 8 sums of each of its squares, 64 in all, so that it multiplies
// often what it reads once. Squares too small for 32 threads are summed by kDepth times as many, over other columns.
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

  // The rows or columns of a square that one of `threads` has. Where eight threads in a row read different packets,
  // their rows are as far apart as it takes to meet different banks.
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

  // Of two threads whose depths differ in one bit, each gives the other half of its sums: in the end, each has the
  // totals over all depths of kSums / kDepth of them.
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

// Block pair (i, j), i >= j, of number `pair` in the order (0, 0), (1, 0), (1, 1), (2, 0), ...
struct BlockPair {
  int i = 0, j;
  RGD_DEVICE explicit BlockPair(int64_t pair) : j(static_cast<int>(pair)) {
    while (j > i) j -= ++i;
  }
};

// The tiles `begin`, `begin` + `step`, ... before `end` (one at least): the part of a product that one thread block
// adds up, and leaves as that share of the partial results.
struct Part {
  int64_t begin, end, step, share;
};

// Four tiles, and what the warps have of one square.
template <typename Sums>
constexpr int64_t gram_shared_bytes() {
  using Shape = typename Sums::Shape;
  constexpr int64_t kSlicesOfSquare = Shape::kSlices > 1 ? Shape::kSlices * Shape::kSquare * Shape::kSquare : 0;
  constexpr int64_t kBytes = 4 * Shape::kTileBytes + kSlicesOfSquare * sizeof(typename Sums::T);
  static_assert(kBytes <= 99 << 10, "some GPUs let a block have no more");
  return kBytes;
}

// partials[(share * rows + i) * rows + j] for i and j of the pair block_index_y(). Sums = MatrixUnitSums or PlainSums.
template <typename Sums, int kCapacity>
RGD_DEVICE void gram(const Table<kCapacity>& table, const Part& part, typename Sums::T* partials, char* shared) {
  using S = typename Sums::Storage;
  using T = typename Sums::T;
  using Shape = typename Sums::Shape;
  constexpr int kBlock = Shape::kBlock, kSquare = Shape::kSquare;
  const BlockPair pair(block_index_y());
  const bool diagonal = kBlock < 128 || pair.i == pair.j;  // smaller blocks are only made where one is enough
  const int64_t rows = table.rows;
  const auto buffer = [&](int index) {
    return SharedTile<S>{reinterpret_cast<Packet<S>*>(shared + index * Shape::kTileBytes), Shape::kLanes};
  };
  const auto block_rows = [&](int block) {
    return static_cast<int>(rows - block * kBlock < kBlock ? rows - block * kBlock : kBlock);
  };
  // Stage t holds the rows of block i and, off the diagonal, those of block j beside them.
  const int stages = diagonal ? 4 : 2;
  const auto left = [&](int stage) { return buffer(stage % stages * (4 / stages)); };
  const auto right = [&](int stage) { return buffer(stage % stages * (4 / stages) + !diagonal); };
  // Samples past the last one add zeros.
  for (int64_t index = thread_index(); index < 4 * Shape::kTileBytes / 16; index += kThreads)
    reinterpret_cast<Packet<S>*>(shared)[index] = Packet<S>{};
  barrier();

  const WarpSquares<Shape> place(diagonal, block_rows(pair.i));
  Sums sums{};
  const auto move = [&](bool first) {
    const int64_t size = computed_here(rows);
    const int limit = static_cast<int>(size);
    const int first_row = kBlock * static_cast<int>(computed_here(int64_t{pair.i}));
    const int first_column = kBlock * static_cast<int>(computed_here(int64_t{pair.j}));
    T* const share = partials + part.share * size * size;
    const auto write = [=](int square, int row, int column, T sum) {
      const int i = first_row + place.row(square) * kSquare + row, j = first_column + place.column * kSquare + column;
      if (i >= limit || j > i) return;
      T& partial = share[i * size + j];
      partial = first ? sum : partial + sum;
    };
    if constexpr (Shape::kSlices == 1) {
      sums.drain(write);
    } else {
      constexpr int kEntries = kSquare * kSquare;
      T* slices = reinterpret_cast<T*>(shared + 4 * Shape::kTileBytes);
      sums.drain(
          [&](int, int row, int column, T sum) { slices[place.slice * kEntries + row * kSquare + column] = sum; });
      barrier();
      for (int entry = thread_index(); entry < kEntries; entry += kThreads) {
        T sum = 0;
        for (int slice = 0; slice < Shape::kSlices; ++slice) sum += slices[slice * kEntries + entry];
        write(0, entry / kSquare, entry % kSquare, sum);
      }
    }
  };

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
  constexpr int kTogether = kMostAdditions / Sums::kAdditions;
  for (int stage = 0; stage < count; ++stage) {
    if (diagonal) {
      wait_copies<2>();
    } else {
      wait_copies<0>();
    }
    barrier();  // this stage is there, and nobody reads the one before any more
    copy(stage + stages - 1);
    sums.add(left(stage), right(stage), place);
    if (stage + 1 == count || (stage + 1) % kTogether == 0) move(stage < kTogether);
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
