#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "launch.h"
#include "operators.h"
#include "sample_weights.cuh"

namespace rgd_ext::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_weights_kernel(const T* squared_grad_norm, const T* alignments, const T* squared_norms, const T* epsilon,
                          double ulp, int64_t rows, T* chosen, T* weights) {
  sample_weights(squared_grad_norm, alignments, squared_norms, epsilon, ulp, rows, chosen, weights);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> sample_weights_operator(const at::Tensor& squared_grad_norm,
                                                           const at::Tensor& alignments,
                                                           const at::Tensor& squared_norms, const at::Tensor& epsilon,
                                                           double ulp) {
  check_statistics(squared_grad_norm, alignments, squared_norms, epsilon);
  const c10::cuda::CUDAGuard guard(alignments.device());
  const at::Tensor a = alignments.contiguous(), norms = squared_norms.contiguous();
  const at::Tensor chosen = epsilon.new_empty(epsilon.sizes()), weights = a.new_empty(a.sizes());
  const auto run = [&]<typename T>(T) {
    launch(sample_weights_kernel<T>, 1, 1, 0, squared_grad_norm.const_data_ptr<T>(), a.const_data_ptr<T>(),
           norms.const_data_ptr<T>(), epsilon.const_data_ptr<T>(), ulp, a.size(0), chosen.mutable_data_ptr<T>(),
           weights.mutable_data_ptr<T>());
  };
  if (a.scalar_type() == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
  return {chosen, weights};
}

}  // namespace rgd_ext::cuda
