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
  std::vector<at::Tensor> results = empty_like_parameters(grads);
  read_combination(with_contiguous_rows(grads), checked_weights(grads, weights), results);
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
