#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "largest_eigenvalue.cuh"
#include "launch.h"

namespace rgd_ext::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    largest_eigenvalue_kernel(const T* matrix, int64_t size, double* workspace, T* result) {
  extern __shared__ __align__(16) char shared[];
  largest_eigenvalue(matrix, size, workspace, result, shared);
}

at::Tensor largest_eigenvalue_operator(const at::Tensor& matrix) {
  check_symmetric(matrix);
  const c10::cuda::CUDAGuard guard(matrix.device());
  const at::Tensor dense = matrix.contiguous(), result = at::empty({}, matrix.options());
  const int64_t size = matrix.size(0);
  const at::Tensor workspace = at::empty({eigenvalue_workspace(size)}, matrix.options().dtype(at::kDouble));
  const auto run = [&](auto kernel, const auto* from, auto* to) {
    launch(kernel, 1, 1, Team::kSharedBytes, from, size, workspace.mutable_data_ptr<double>(), to);
  };
  if (matrix.scalar_type() == at::kDouble) {
    run(largest_eigenvalue_kernel<double>, dense.const_data_ptr<double>(), result.mutable_data_ptr<double>());
  } else {
    run(largest_eigenvalue_kernel<float>, dense.const_data_ptr<float>(), result.mutable_data_ptr<float>());
  }
  return result;
}

}  // namespace
}  // namespace rgd_ext::cuda

TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("largest_eigenvalue", rgd_ext::cuda::largest_eigenvalue_operator); }
