#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "group_norm_grads.cuh"
#include "launch.h"

namespace rgd_ext::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(kThreads)
    group_norm_grads_kernel(const S* output_grad, const S* input, int64_t channels, int64_t positions, double eps,
                            ChannelSums* sums, S* weight, S* bias) {
  extern __shared__ __align__(16) char shared[];
  group_norm_grads(output_grad, input, channels, positions, eps, sums, weight, bias, shared);
}

std::tuple<at::Tensor, at::Tensor> group_norm_grads_operator(const at::Tensor& output_grad, const at::Tensor& input,
                                                             int64_t groups, double eps) {
  check_group_norm(output_grad, input, groups);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor grads = output_grad.contiguous(), inputs = input.contiguous();
  const int64_t batch_size = input.size(0), number = input.size(1), channels = number / groups;
  const at::Tensor weight = at::empty({batch_size, number}, input.options());
  const at::Tensor bias = at::empty({batch_size, number}, input.options());
  if (number == 0) return {weight, bias};
  const int64_t units = batch_size * number * channel_parts(channels), numbers = sizeof(ChannelSums) / sizeof(double);
  const at::Tensor sums = at::empty({units, numbers}, input.options().dtype(at::kDouble));
  with_storage(input.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    launch(group_norm_grads_kernel<S>, batch_size * groups, 1, kGroupNormSharedBytes,
           static_cast<const S*>(grads.const_data_ptr()), static_cast<const S*>(inputs.const_data_ptr()), channels,
           input.numel() / (batch_size * number), eps, static_cast<ChannelSums*>(sums.mutable_data_ptr()),
           static_cast<S*>(weight.mutable_data_ptr()), static_cast<S*>(bias.mutable_data_ptr()));
  });
  return {weight, bias};
}

}  // namespace
}  // namespace rgd_ext::cuda

TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("group_norm_grads", rgd_ext::cuda::group_norm_grads_operator); }
