#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "reads.h"

namespace rgd_ext::cpu {
namespace {

// Backwards: what a read of the statistics left in cache comes first.
template <typename S>
void combine_kernel(const Work& work, const accumulate_t<S>* weights, at::TensorList results) {
  const RowKernels<S>& rows = row_kernels<S>();
  at::parallel_for(0, work.chunks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<accumulate_t<S>> sums(padded_columns(work.max_columns()));
    for (int64_t chunk = end; chunk-- > begin;) {
      const std::span<const Columns> tiles = work.chunk(chunk);
      for (auto columns = tiles.rbegin(); columns != tiles.rend(); ++columns) {
        rows.weighted_sum(work.tile<S>(*columns), weights, sums.data());
        rows.narrow(sums.data(), columns->count, results[columns->tensor].mutable_data_ptr<S>() + columns->begin);
      }
    }
  });
}

std::vector<at::Tensor> combine(at::TensorList grads, const at::Tensor& weights) {
  check_grads(grads);
  const int64_t batch_size = grads[0].size(0);
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == batch_size, "weights has shape ", weights.sizes(),
                    " but grads holds ", batch_size, " samples: pass one weight per sample");
  TORCH_CHECK_VALUE(weights.device() == grads[0].device(), "weights is on ", weights.device(), " but grads on ",
                    grads[0].device(), ": move them to one device");
  TORCH_CHECK_TYPE(at::isFloatingType(weights.scalar_type()), "weights has dtype ", weights.scalar_type(),
                   ": convert it to ", accumulate_dtype(grads[0].scalar_type()));
  std::vector<at::Tensor> results = empty_like_parameters(grads);
  read_combination(with_contiguous_rows(grads), weights.to(accumulate_dtype(grads[0].scalar_type())).contiguous(),
                   results);
  return results;
}

}  // namespace

void read_combination(at::TensorList matrices, const at::Tensor& weights, at::TensorList results) {
  const Work work(matrices, 0, kStreamedTile);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, work.dtype(), "combine", [&] {
    combine_kernel<scalar_t>(work, weights.const_data_ptr<accumulate_t<scalar_t>>(), results);
  });
}

}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("combine", rgd_ext::cpu::combine); }
