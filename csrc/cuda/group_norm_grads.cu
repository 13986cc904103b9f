#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "group_norm_grads.cuh"
#include "launch.h"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

template <int kCount, typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 3 : 4)
    group_norm_grads_kernel(const S* output_grad, const S* input, int64_t channels, int64_t positions,
                            ChannelParts parts, double eps, ChannelSums<Accumulate<S>>* sums, S* weight, S* bias) {
  extern __shared__ __align__(16) char shared[];
  group_norm_grads<kCount>(output_grad, input, channels, positions, parts, eps, sums, weight, bias, shared);
}

template <int kCount, typename S>
void read_groups(const S* output_grad, const S* input, int64_t groups, int64_t channels, int64_t positions, double eps,
                 const at::Tensor& weight, const at::Tensor& bias) {
  using Sums = ChannelSums<Accumulate<S>>;
  const ChannelParts parts = channel_parts(channels, positions / kCount);
  const int64_t units = groups * channels * parts.number, numbers = sizeof(Sums) / sizeof(Accumulate<S>);
  const at::Tensor sums = weight.new_empty({units, numbers}, accumulate_dtype(weight.scalar_type()));
  launch(group_norm_grads_kernel<kCount, S>, groups, 1, group_norm_shared_bytes<S>(), output_grad, input, channels,
         positions, parts, eps, static_cast<Sums*>(sums.mutable_data_ptr()), static_cast<S*>(weight.mutable_data_ptr()),
         static_cast<S*>(bias.mutable_data_ptr()));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> group_norm_grads_operator(const at::Tensor& output_grad, const at::Tensor& input,
                                                             int64_t groups, double eps) {
  check_norm(output_grad, input);
  check_groups(groups, input.size(1));
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor grads = output_grad.contiguous(), inputs = input.contiguous();
  const int64_t batch_size = input.size(0), number = input.size(1);
  const at::Tensor weight = input.new_empty({batch_size, number});
  const at::Tensor bias = input.new_empty({batch_size, number});
  if (weight.numel() == 0) return {weight, bias};
  const int64_t positions = input.numel() / (batch_size * number), channels = number / groups;
  with_storage(input.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const S *e = static_cast<const S*>(grads.const_data_ptr()), *x = static_cast<const S*>(inputs.const_data_ptr());
    if (on_packets(e, x, positions)) {
      read_groups<Packet<S>::kColumns>(e, x, batch_size * groups, channels, positions, eps, weight, bias);
    } else {
      read_groups<1>(e, x, batch_size * groups, channels, positions, eps, weight, bias);
    }
  });
  return {weight, bias};
}

}  // namespace rgd_ext::cuda
