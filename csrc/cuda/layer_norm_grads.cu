#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "launch.h"
#include "layer_norm_grads.cuh"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

template <int kCount, typename S, typename Sum>
__global__ void __launch_bounds__(kThreads, 3)
    layer_norm_grads_kernel(const S* output_grad, const S* input, Runs runs, int64_t columns, double eps, bool centred,
                            Sum* weight, Sum* bias) {
  extern __shared__ __align__(16) char shared[];
  layer_norm_grads<kCount>(output_grad, input, runs, columns, eps, centred, weight, bias, shared);
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    add_runs_kernel(const T* weights, const T* biases, Runs runs, int64_t columns, S* weight, S* bias) {
  extern __shared__ __align__(16) char shared[];
  const bool of_bias = block_index_y() > 0;
  add_runs(of_bias ? biases : weights, runs, columns, of_bias ? bias : weight, shared);
}

template <int kCount, typename S>
void read_samples(const S* output_grad, const S* input, int64_t samples, int64_t places, int64_t columns, double eps,
                  bool centred, const at::Tensor& weight, const at::Tensor& bias) {
  using T = Accumulate<S>;
  const int64_t resident = resident_blocks(layer_norm_grads_kernel<kCount, S, T>, 0);
  const Runs runs = runs_of(samples, places, columns / kCount, resident);
  const auto read = [&]<typename Sum>(Sum* weights, Sum* biases) {
    launch(layer_norm_grads_kernel<kCount, S, Sum>, runs.blocks(), 1, layer_norm_shared_bytes<S>(runs), output_grad,
           input, runs, columns, eps, centred, weights, biases);
  };
  S *weights = static_cast<S*>(weight.mutable_data_ptr()), *biases = static_cast<S*>(bias.mutable_data_ptr());
  if (runs.of_sample == 1) return read(weights, biases);
  const at::Tensor partials = weight.new_empty({2, runs.number(), columns}, accumulate_dtype(weight.scalar_type()));
  T *weight_sums = partials.mutable_data_ptr<T>(), *bias_sums = weight_sums + runs.number() * columns;
  read(weight_sums, bias_sums);
  launch(add_runs_kernel<S, T>, add_runs_blocks(runs, columns), 2, kAddRunsSharedBytes, weight_sums, bias_sums, runs,
         columns, weights, biases);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> layer_norm_grads_operator(const at::Tensor& output_grad, const at::Tensor& input,
                                                             double eps, bool centred) {
  check_norm(output_grad, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor grads = output_grad.contiguous(), inputs = input.contiguous();
  const int64_t batch_size = input.size(0), columns = input.size(-1);
  const at::Tensor weight = input.new_empty({batch_size, columns});
  const at::Tensor bias = input.new_empty({batch_size, columns});
  if (weight.numel() == 0) return {weight, bias};
  const int64_t places = input.numel() / (batch_size * columns);
  with_storage(input.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const S *e = static_cast<const S*>(grads.const_data_ptr()), *x = static_cast<const S*>(inputs.const_data_ptr());
    if (on_packets(e, x, columns)) {
      read_samples<Packet<S>::kColumns>(e, x, batch_size, places, columns, eps, centred, weight, bias);
    } else {
      read_samples<1>(e, x, batch_size, places, columns, eps, centred, weight, bias);
    }
  });
  return {weight, bias};
}

}  // namespace rgd_ext::cuda
