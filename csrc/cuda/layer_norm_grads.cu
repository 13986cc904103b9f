#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "launch.h"
#include "layer_norm_grads.cuh"

namespace rgd_ext::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(kThreads)
    row_statistics_kernel(const S* input, int64_t rows, int64_t columns, double eps, bool centred,
                          RowStatistics<Accumulate<S>>* statistics) {
  row_statistics(input, rows, columns, eps, centred, statistics);
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    layer_norm_grads_kernel(const S* output_grad, const S* input, const RowStatistics<Accumulate<S>>* statistics,
                            int64_t places, int64_t columns, S* weight, S* bias) {
  extern __shared__ __align__(16) char shared[];
  layer_norm_grads(output_grad, input, statistics, places, columns, weight, bias, shared);
}

std::tuple<at::Tensor, at::Tensor> layer_norm_grads_operator(const at::Tensor& output_grad, const at::Tensor& input,
                                                             double eps, bool centred) {
  check_layer_norm(output_grad, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor grads = output_grad.contiguous(), inputs = input.contiguous();
  const int64_t batch_size = input.size(0), columns = input.size(-1);
  const at::Tensor weight = at::empty({batch_size, columns}, input.options());
  const at::Tensor bias = at::empty({batch_size, columns}, input.options());
  if (columns == 0) return {weight, bias};
  const int64_t rows = input.numel() / columns;
  const at::ScalarType dtype = accumulate_dtype(input.scalar_type());
  with_storage(input.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using Statistics = RowStatistics<Accumulate<S>>;
    constexpr int64_t kNumbers = sizeof(Statistics) / sizeof(Accumulate<S>);
    const at::Tensor statistics = at::empty({rows, kNumbers}, input.options().dtype(dtype));
    Statistics* of_rows = static_cast<Statistics*>(statistics.mutable_data_ptr());
    const S* x = static_cast<const S*>(inputs.const_data_ptr());
    launch(row_statistics_kernel<S>, row_blocks(rows), 1, 0, x, rows, columns, eps, centred, of_rows);
    launch(layer_norm_grads_kernel<S>, batch_size * column_chunks(columns), 1, kLayerNormSharedBytes,
           static_cast<const S*>(grads.const_data_ptr()), x, of_rows, rows / batch_size, columns,
           static_cast<S*>(weight.mutable_data_ptr()), static_cast<S*>(bias.mutable_data_ptr()));
  });
  return {weight, bias};
}

}  // namespace
}  // namespace rgd_ext::cuda

TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("layer_norm_grads", rgd_ext::cuda::layer_norm_grads_operator); }
