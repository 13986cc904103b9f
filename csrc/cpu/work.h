#pragma once

// The work of every operator: G is a list of (B, *shape) tensors, never concatenated, cut into tiles of all rows by
// some columns. Tiles and chunks depend on shapes and dtype alone, never on the number of threads, and every chunk sums
// into a slot of its own: the same input gives the same bits.

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "../grads.h"
#include "rows.h"

namespace rgd_ext::cpu {

// How many pieces of `elements` numbers each are worth another thread.
constexpr int64_t grain(int64_t elements) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, elements)); }

// The columns [begin, begin + count) of one tensor.
struct Columns {
  int64_t tensor, begin, count;
};

// A tile is as wide as `bytes` allow for all rows, and at most `columns` wide.
struct TileShape {
  int64_t bytes, columns;
};
// Read once: long rows are what the prefetchers of a processor like.
constexpr TileShape kStreamedTile{std::numeric_limits<int64_t>::max(), 16384};
// Read twice. Measured: of 2 MB of L2, streaming leaves two tiles of 256 KB in place.
constexpr TileShape kCachedTile{256 << 10, 4096};

class Work {
 public:
  // `slot` is how many doubles a chunk keeps; it bounds the number of chunks, and so the memory they need.
  Work(at::TensorList matrices, int64_t slot, TileShape shape);

  int64_t batch_size() const { return batch_size_; }
  at::ScalarType dtype() const { return matrices_[0].scalar_type(); }
  int64_t max_columns() const { return max_columns_; }

  // A chunk is the parallel unit: neighbouring tiles, about the same number of columns in each chunk.
  int64_t chunks() const { return static_cast<int64_t>(chunk_begin_.size()) - 1; }
  std::span<const Columns> chunk(int64_t index) const {
    return {columns_.data() + chunk_begin_[index], columns_.data() + chunk_begin_[index + 1]};
  }

  template <typename S>
  Tile<S> tile(const Columns& columns) const {
    const at::Tensor& matrix = matrices_[columns.tensor];
    return {matrix.const_data_ptr<S>() + columns.begin, matrix.stride(0), batch_size_, columns.count};
  }

 private:
  int64_t batch_size_;
  int64_t max_columns_ = 0;
  at::TensorList matrices_;
  std::vector<Columns> columns_;
  std::vector<int64_t> chunk_begin_;
};

// How many chunks may keep `slot` doubles each.
int64_t most_chunks(int64_t slot);

// Sums the slots of all chunks, `stride` doubles apart, in their order: out[i] = sum_chunk partials[chunk * stride +
// i].
void sum_chunks(int64_t chunks, const double* partials, int64_t stride, at::Tensor& out);

// What is below the diagonal of a square matrix, to above it.
void mirror(at::Tensor& matrix);

// Uninitialised memory of one thread, aligned to a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(c10::GetCPUAllocator()->allocate(size * sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

}  // namespace rgd_ext::cpu
