#include <c10/cuda/CUDAGuard.h>

#include "launch.h"
#include "operators.h"
#include "reads.h"
#include "reduce.cuh"

namespace rgd_ext::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const double* partials, int64_t rows, int64_t slots, const T* epsilon, T* weights) {
  reduce_to_weights(partials, rows, slots, epsilon, weights);
}

}  // namespace

// Statistics, weights, combination: three launches, and the host waits for none.
std::vector<at::Tensor> precondition_operator(at::TensorList grads, const at::Tensor& epsilon) {
  check_grads(grads);
  const at::Tensor step = checked_epsilon(grads, epsilon);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  const at::Tensor partials = read_moments(matrices, {});
  const int64_t rows = grads[0].size(0), slots = partials.size(1);
  const at::Tensor weights = step.new_empty({1, rows});
  const auto reduce = [&](auto kernel, auto* to) {
    launch(kernel, row_blocks(rows), 1, 0, partials.const_data_ptr<double>(), rows, slots,
           step.const_data_ptr<std::remove_pointer_t<decltype(to)>>(), to);
  };
  if (step.scalar_type() == at::kDouble) {
    reduce(weights_kernel<double>, weights.mutable_data_ptr<double>());
  } else {
    reduce(weights_kernel<float>, weights.mutable_data_ptr<float>());
  }
  std::vector<at::Tensor> direction = empty_like_parameters(grads);
  read_combination(matrices, weights, 0, direction);
  return direction;
}

}  // namespace rgd_ext::cuda
