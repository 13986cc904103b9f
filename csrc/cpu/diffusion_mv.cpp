#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "work.h"

namespace rgd_ext::cpu {
namespace {

// products[v * B + i] = <g_i, vector_v> for `count` vectors, each tensor of them contiguous, (count, *shape).
template <typename S>
void products_kernel(const Work& work, at::TensorList vectors, int64_t count, double* partials) {
  using T = accumulate_t<S>;
  const RowKernels<S>& rows = row_kernels<S>();
  const int64_t batch_size = work.batch_size();
  at::parallel_for(0, work.chunks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> vector(padded_columns(work.max_columns()));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (const Columns& columns : work.chunk(chunk)) {
        const at::Tensor& tensor = vectors[columns.tensor];
        for (int64_t v = 0; v < count; ++v) {
          const S* from = tensor.const_data_ptr<S>() + v * (tensor.numel() / count) + columns.begin;
          rows.widen(from, columns.count, vector.data());
          rows.products(work.tile<S>(columns), vector.data(), partials + (chunk * count + v) * batch_size);
        }
      }
    }
  });
}

// results[v] = sum_i weights[v * B + i] g_i.
template <typename S>
void combine_kernel(const Work& work, const accumulate_t<S>* weights, int64_t count, at::TensorList results) {
  const RowKernels<S>& rows = row_kernels<S>();
  at::parallel_for(0, work.chunks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<accumulate_t<S>> sums(padded_columns(work.max_columns()));
    for (int64_t chunk = end; chunk-- > begin;) {
      for (const Columns& columns : work.chunk(chunk)) {
        const at::Tensor& tensor = results[columns.tensor];
        for (int64_t v = 0; v < count; ++v) {
          rows.weighted_sum(work.tile<S>(columns), weights + v * work.batch_size(), sums.data());
          S* to = tensor.mutable_data_ptr<S>() + v * (tensor.numel() / count) + columns.begin;
          rows.narrow(sums.data(), columns.count, to);
        }
      }
    }
  });
}

// Weights (<g_i, v> - mean_j <g_j, v>) / B: centring B numbers centres the matrix.
template <typename T>
void centre(const at::Tensor& products, int64_t batch_size, T* weights) {
  const double* all = products.const_data_ptr<double>();
  for (int64_t begin = 0; begin < products.numel(); begin += batch_size) {
    double mean = 0;
    for (int64_t i = 0; i < batch_size; ++i) mean += all[begin + i] / static_cast<double>(batch_size);
    for (int64_t i = 0; i < batch_size; ++i)
      weights[begin + i] = static_cast<T>((all[begin + i] - mean) / static_cast<double>(batch_size));
  }
}

std::vector<at::Tensor> diffusion_mv(at::TensorList grads, at::TensorList vectors) {
  check_grads(grads);
  const int64_t count = check_vectors(grads, vectors), batch_size = grads[0].size(0), slot = count * batch_size;
  std::vector<at::Tensor> directions, results;
  for (const at::Tensor& vector : vectors) {
    directions.push_back(vector.contiguous());
    results.push_back(at::empty(vector.sizes(), vector.options()));
  }
  if (count == 0) return results;
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  const Work work(matrices, slot, count == 1 ? kStreamedTile : kCachedTile);
  std::vector<double> partials(work.chunks() * slot);
  at::Tensor products = at::empty({slot}, grads[0].options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, work.dtype(), "diffusion_mv", [&] {
    products_kernel<scalar_t>(work, directions, count, partials.data());
    sum_chunks(work.chunks(), partials.data(), slot, products);
    std::vector<accumulate_t<scalar_t>> weights(slot);
    centre(products, batch_size, weights.data());
    combine_kernel<scalar_t>(work, weights.data(), count, results);
  });
  return results;
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("diffusion_mv", rgd_ext::cpu::diffusion_mv); }
