#pragma once

// K = G G^T: blocks of samples by samples, on and below the diagonal, each summed over a share of the columns by one
// thread block.

#include "gram_sums.cuh"

namespace rgd_ext::cuda {

// The pair of blocks (i, j), i >= j, with number `pair` in the order (0, 0), (1, 0), (1, 1), (2, 0), ...
struct BlockPair {
  int i = 0, j;
  RGD_DEVICE explicit BlockPair(int64_t pair) : j(static_cast<int>(pair)) {
    while (j > i) j -= ++i;
  }
};

// The part of a product that one thread block sums: the tiles `begin`, `begin` + `step`, ... before `end`, at least
// one. The result is number `share` of the partial results.
struct Part {
  int64_t begin, end, step, share;
};

// Four tiles, and the sums of all warps if there is only one square.
template <typename Sums>
constexpr int64_t gram_shared_bytes() {
  using Shape = typename Sums::Shape;
  constexpr int64_t kSlicesOfSquare = Shape::kSlices > 1 ? Shape::kSlices * Shape::kSquare * Shape::kSquare : 0;
  constexpr int64_t kBytes = 4 * Shape::kTileBytes + kSlicesOfSquare * sizeof(typename Sums::T);
  static_assert(kBytes <= 99 << 10, "the limit of a block on some GPUs");
  return kBytes;
}

// use(std::type_identity<Sums<S, kBlock>>{}) for the smallest kBlock that has room for all samples, or the largest.
template <template <typename, int> class Sums, typename S, typename F>
auto with_block(int64_t rows, F use) {
  return rows <= 8    ? use(std::type_identity<Sums<S, 8>>{})
         : rows <= 16 ? use(std::type_identity<Sums<S, 16>>{})
         : rows <= 32 ? use(std::type_identity<Sums<S, 32>>{})
         : rows <= 64 ? use(std::type_identity<Sums<S, 64>>{})
                      : use(std::type_identity<Sums<S, 128>>{});
}

// Moves the sums of a thread block to partials[(share * rows + i) * rows + j]: writes them there if they are the first,
// and adds them otherwise. `slices` is shared memory for the sums of all warps, if each has a slice of the columns.
template <typename Sums>
RGD_DEVICE void move_sums(Sums& sums, const WarpSquares<typename Sums::Shape>& place, const BlockPair& pair,
                          int64_t rows, int64_t share, typename Sums::T* partials, typename Sums::T* slices,
                          bool first) {
  using T = typename Sums::T;
  using Shape = typename Sums::Shape;
  constexpr int kSquare = Shape::kSquare;
  const int64_t size = computed_here(rows);
  const int limit = static_cast<int>(size);
  const int first_row = Shape::kBlock * static_cast<int>(computed_here(int64_t{pair.i}));
  const int first_column = Shape::kBlock * static_cast<int>(computed_here(int64_t{pair.j}));
  T* const own = partials + share * size * size;
  const auto write = [=](int square, int row, int column, T sum) {
    const int i = first_row + place.row(square) * kSquare + row, j = first_column + place.column * kSquare + column;
    if (i >= limit || j > i) return;
    T& partial = own[i * size + j];
    partial = first ? sum : partial + sum;
  };
  if constexpr (Shape::kSlices == 1) {
    sums.drain(write);
  } else {
    constexpr int kEntries = kSquare * kSquare;
    sums.drain([&](int, int row, int column, T sum) { slices[place.slice * kEntries + row * kSquare + column] = sum; });
    barrier();
    for (int entry = thread_index(); entry < kEntries; entry += kThreads) {
      T sum = 0;
      for (int slice = 0; slice < Shape::kSlices; ++slice) sum += slices[slice * kEntries + entry];
      write(0, entry / kSquare, entry % kSquare, sum);
    }
  }
}

// partials[(share * rows + i) * rows + j] for i and j of the pair block_index_y(). Sums = MatrixUnitSums or PlainSums.
template <typename Sums, int kCapacity>
RGD_DEVICE void gram(const Table<kCapacity>& table, const Part& part, typename Sums::T* partials, char* shared) {
  using S = typename Sums::Storage;
  using Shape = typename Sums::Shape;
  constexpr int kBlock = Shape::kBlock;
  const BlockPair pair(block_index_y());
  const bool diagonal = kBlock < 128 || pair.i == pair.j;  // smaller blocks are only used where one is enough
  const int64_t rows = table.rows;
  const auto block_rows = [&](int block) {
    return static_cast<int>(rows - block * kBlock < kBlock ? rows - block * kBlock : kBlock);
  };
  const auto buffer = [&](int index) {
    return SharedTile<S>{reinterpret_cast<Packet<S>*>(shared + index * Shape::kTileBytes), Shape::kLanes};
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
    barrier();  // this stage has arrived, and no thread reads the one before any more
    copy(stage + stages - 1);
    sums.add(left(stage), right(stage), place);
    if (stage + 1 == count || (stage + 1) % kTogether == 0)
      move_sums(sums, place, pair, rows, part.share, partials,
                reinterpret_cast<typename Sums::T*>(shared + 4 * Shape::kTileBytes), stage < kTogether);
  }
}

constexpr int64_t kReduceSharedBytes = kThreads * sizeof(double);

// gram[i, j] = gram[j, i] = the sum of part(group, i * rows + j) over all groups of kEntries threads, in order, for
// i >= j.
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

// Entries of K for a block of reduce_gram: few, since there are many shares to sum.
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
