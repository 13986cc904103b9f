#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "reads.h"

namespace rgd_ext::cpu {
namespace {

// Column j of the mean needs only column j of G, so a tile's centred products follow its mean while it is in cache.
template <typename S>
void moments_kernel(const Work& work, at::TensorList means, double* partials) {
  using T = accumulate_t<S>;
  const RowKernels<S>& rows = row_kernels<S>();
  const int64_t batch_size = work.batch_size();
  // The mean is a weighted sum, so combine() with equal weights gives the same bits.
  const std::vector<T> weights(batch_size, static_cast<T>(1.0 / static_cast<double>(batch_size)));
  at::parallel_for(0, work.chunks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> mean(padded_columns(work.max_columns()));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* alignments = partials + chunk * 2 * batch_size;
      for (const Columns& columns : work.chunk(chunk)) {
        rows.moments(work.tile<S>(columns), weights.data(), mean.data(), alignments, alignments + batch_size);
        if (means.empty()) continue;
        rows.narrow(mean.data(), columns.count, means[columns.tensor].mutable_data_ptr<S>() + columns.begin);
      }
    }
  });
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> moments(at::TensorList grads) {
  check_grads(grads);
  std::vector<at::Tensor> means = empty_like_parameters(grads);
  at::Tensor alignments = empty_statistic(grads), squared_norms = empty_statistic(grads);
  read_moments(with_contiguous_rows(grads), means, alignments, squared_norms);
  return {std::move(means), std::move(alignments), std::move(squared_norms)};
}

}  // namespace

void read_moments(at::TensorList matrices, at::TensorList means, at::Tensor& alignments, at::Tensor& squared_norms) {
  const int64_t batch_size = alignments.numel(), slot = 2 * batch_size;
  const Work work(matrices, slot, kCachedTile);
  std::vector<double> partials(work.chunks() * slot);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, work.dtype(), "moments",
                                  [&] { moments_kernel<scalar_t>(work, means, partials.data()); });
  sum_chunks(work, partials.data(), slot, alignments);
  sum_chunks(work, partials.data() + batch_size, slot, squared_norms);
}

}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("moments", rgd_ext::cpu::moments); }
