#include "work.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace rgd_ext::cpu {
namespace {

constexpr int64_t kMinColumns = 128;
constexpr int64_t kMinTiles = 64, kNarrowedColumns = 4096;
constexpr int64_t kMinChunks = 8, kMaxChunks = 256;
// 2 MB. Measured on two cores: with 8 MB the Gramian of 64 samples in 250,000 dimensions takes a third longer. That of
// 128 samples has 16 chunks, for as many cores.
constexpr int64_t kMaxPartials = 1 << 18;

}  // namespace

Work::Work(at::TensorList matrices, int64_t slot, TileShape shape)
    : batch_size_(matrices[0].size(0)), matrices_(matrices) {
  int64_t total = 0;
  for (const at::Tensor& matrix : matrices) total += matrix.numel() / batch_size_;
  const int64_t row_bytes = shape.bytes / batch_size_, element_bytes = matrices[0].element_size();
  // No wider than leaves work for many threads.
  const int64_t most = std::min(shape.columns, std::max(total / kMinTiles / 32 * 32, kNarrowedColumns));
  const int64_t widest = std::clamp(row_bytes / element_bytes / 32 * 32, kMinColumns, most);
  for (size_t t = 0; t < matrices.size(); ++t) {
    const int64_t size = matrices[t].numel() / batch_size_;
    for (int64_t begin = 0; begin < size; begin += widest)
      columns_.push_back({static_cast<int64_t>(t), begin, std::min(widest, size - begin)});
    max_columns_ = std::max(max_columns_, std::min(widest, size));
  }
  const int64_t tiles = columns_.size();
  const int64_t chunks = std::min(tiles, most_chunks(slot));
  // A chunk ends at the first tile that reaches its share of the columns.
  chunk_begin_.push_back(0);
  int64_t done = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    done += columns_[tile].count;
    const int64_t share = static_cast<int64_t>(chunk_begin_.size());
    if (tile + 1 == tiles || done * chunks >= total * share) chunk_begin_.push_back(tile + 1);
  }
}

int64_t most_chunks(int64_t slot) {
  return std::clamp(kMaxPartials / std::max<int64_t>(slot, 1), kMinChunks, kMaxChunks);
}

void sum_chunks(int64_t chunks, const double* partials, int64_t stride, at::Tensor& out) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "sum_chunks", [&] {
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, out.numel(), grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[chunk * stride + i];
        sums[i] = static_cast<scalar_t>(sum);
      }
    });
  });
}

void mirror(at::Tensor& matrix) {
  const int64_t size = matrix.size(0);
  AT_DISPATCH_FLOATING_TYPES(matrix.scalar_type(), "mirror", [&] {
    scalar_t* numbers = matrix.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < i; ++j) numbers[j * size + i] = numbers[i * size + j];
  });
}

}  // namespace rgd_ext::cpu
