#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "reads.h"

namespace rgd_ext::cpu {
namespace {

// Column j of the mean needs only column j of G, so a tile's centred products follow its mean while it is in cache,
// one tile behind.
template <typename S>
void moments_kernel(const Work& work, at::TensorList means, bool with_norm, double* partials, int64_t slot) {
  using T = accumulate_t<S>;
  const RowKernels<S>& rows = row_kernels<S>();
  const int64_t batch_size = work.batch_size();
  // The mean is a weighted sum, so combine() with equal weights gives the same bits.
  const std::vector<T> weights(batch_size, static_cast<T>(1.0 / static_cast<double>(batch_size)));
  at::parallel_for(0, work.chunks(), 1, [&](int64_t begin, int64_t end) {
    const int64_t padded = padded_columns(work.max_columns());
    const Scratch<T> scratch(2 * padded);
    T *mean = scratch.data(), *next_mean = mean + padded;
    const Tile<S> none{nullptr, 0, batch_size, 0};
    Tile<S> tile = none;
    double* alignments = partials + begin * slot;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (const Columns& columns : work.chunk(chunk)) {
        const Tile<S> next = work.tile<S>(columns);
        rows.moments(next, weights.data(), next_mean, tile, mean, alignments, alignments + batch_size);
        if (with_norm) {
          const Tile<T> vector{next_mean, padded, 1, columns.count};
          row_kernels<T>().gram(vector, Tile<T>{nullptr, 0, 0, 0}, partials + chunk * slot + 2 * batch_size);
        }
        if (!means.empty())
          rows.narrow(next_mean, columns.count, means[columns.tensor].mutable_data_ptr<S>() + columns.begin);
        tile = next;
        std::swap(mean, next_mean);
        alignments = partials + chunk * slot;
      }
    }
    rows.moments(none, weights.data(), next_mean, tile, mean, alignments, alignments + batch_size);
  });
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> moments(at::TensorList grads) {
  check_grads(grads);
  std::vector<at::Tensor> means = empty_like_parameters(grads);
  auto [squared_norm, alignments, squared_norms] = read_moments(with_contiguous_rows(grads), means, false);
  return {std::move(means), std::move(alignments), std::move(squared_norms)};
}

Moments scalar_moments(at::TensorList grads) {
  check_grads(grads);
  return read_moments(with_contiguous_rows(grads), {}, true);
}

}  // namespace

Moments read_moments(at::TensorList matrices, at::TensorList means, bool with_norm) {
  at::Tensor squared_norm = at::empty({}, empty_statistic(matrices).options());
  at::Tensor alignments = empty_statistic(matrices), squared_norms = empty_statistic(matrices);
  const int64_t batch_size = alignments.numel(), slot = 2 * batch_size + 1;
  const Work work(matrices, slot, kCachedTile);
  std::vector<double> partials(work.chunks() * slot);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, work.dtype(), "moments",
                                  [&] { moments_kernel<scalar_t>(work, means, with_norm, partials.data(), slot); });
  sum_chunks(work.chunks(), partials.data(), slot, alignments);
  sum_chunks(work.chunks(), partials.data() + batch_size, slot, squared_norms);
  sum_chunks(work.chunks(), partials.data() + 2 * batch_size, slot, squared_norm);
  return {std::move(squared_norm), std::move(alignments), std::move(squared_norms)};
}

}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) {
  m.impl("moments", rgd_ext::cpu::moments);
  m.impl("scalar_moments", rgd_ext::cpu::scalar_moments);
}
