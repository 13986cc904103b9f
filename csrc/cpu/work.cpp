#include "work.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace rgd_ext::cpu {
namespace {

constexpr int64_t kMinColumns = 128;
constexpr int64_t kMinTiles = 64, kNarrowedColumns = 4096;
constexpr int64_t kMinChunks = 8, kMaxChunks = 256;
constexpr int64_t kMaxPartials = 1 << 20;

bool rows_are_contiguous(const at::Tensor& grad) {
  int64_t expected = 1;
  for (int64_t dim = grad.dim() - 1; dim > 0; expected *= grad.size(dim--)) {
    if (grad.size(dim) != 1 && grad.stride(dim) != expected) return false;
  }
  return true;
}

}  // namespace

void check_grads(at::TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "grads is empty: pass at least one (B, *shape) tensor");
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    const at::ScalarType dtype = grad.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                     "grads[", i, "] has dtype ", dtype,
                     ": per-sample gradients are float32, float64, bfloat16 or float16; convert it first");
    TORCH_CHECK_VALUE(grad.dim() > 0, "grads[", i, "] is a scalar: its first dimension must be the batch, (B, *shape)");
    TORCH_CHECK_VALUE(grad.size(0) > 0, "empty batch: grads[", i, "] has shape ", grad.sizes(),
                      "; RGD needs at least one sample");
    TORCH_CHECK_VALUE(grad.size(0) == grads[0].size(0), "batch sizes disagree: grads[0] has ", grads[0].size(0),
                      " samples and grads[", i, "] has ", grad.size(0),
                      "; every tensor must be (B, *shape) with the same B");
    TORCH_CHECK_TYPE(dtype == grads[0].scalar_type(), "dtypes disagree: grads[0] is ", grads[0].scalar_type(),
                     " and grads[", i, "] is ", dtype, "; convert them to one");
    TORCH_CHECK_VALUE(grad.device() == grads[0].device(), "devices disagree: grads[0] is on ", grads[0].device(),
                      " and grads[", i, "] on ", grad.device(), "; move them to one device");
  }
}

std::vector<at::Tensor> with_contiguous_rows(at::TensorList grads) {
  std::vector<at::Tensor> matrices;
  matrices.reserve(grads.size());
  for (const at::Tensor& grad : grads) matrices.push_back(rows_are_contiguous(grad) ? grad : grad.contiguous());
  return matrices;
}

std::vector<at::Tensor> empty_like_parameters(at::TensorList grads) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(grads.size());
  for (const at::Tensor& grad : grads) tensors.push_back(at::empty(grad.sizes().slice(1), grad.options()));
  return tensors;
}

at::Tensor empty_statistic(at::TensorList grads) {
  return at::empty({grads[0].size(0)}, grads[0].options().dtype(accumulate_dtype(grads[0].scalar_type())));
}

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
  const int64_t chunks = std::min(tiles, std::clamp(kMaxPartials / std::max<int64_t>(slot, 1), kMinChunks, kMaxChunks));
  // A chunk ends at the first tile that reaches its share of the columns.
  chunk_begin_.push_back(0);
  int64_t done = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    done += columns_[tile].count;
    const int64_t share = static_cast<int64_t>(chunk_begin_.size());
    if (tile + 1 == tiles || done * chunks >= total * share) chunk_begin_.push_back(tile + 1);
  }
}

void sum_chunks(const Work& work, const double* partials, int64_t stride, at::Tensor& out) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "sum_chunks", [&] {
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, out.numel(), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < work.chunks(); ++chunk) sum += partials[chunk * stride + i];
        sums[i] = static_cast<scalar_t>(sum);
      }
    });
  });
}

}  // namespace rgd_ext::cpu
