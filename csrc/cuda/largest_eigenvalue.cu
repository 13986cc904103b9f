#include <c10/cuda/CUDAGuard.h>

#include "largest_eigenvalue.cuh"
#include "launch.h"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

// With vectors of T.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    largest_eigenvalue_kernel(const S* __restrict__ matrix, int size, double tolerance, char* workspace, S* result,
                              int64_t shared_bytes) {
  extern __shared__ __align__(16) char shared[];
  largest_eigenvalue<T>(matrix, size, tolerance, workspace, result, shared, shared_bytes);
}

template <typename T, typename S>
void run(const at::Tensor& matrix, double ulp, const at::Tensor& result) {
  const int size = static_cast<int>(matrix.size(0));
  const int64_t shared_bytes = current_device().shared_bytes;
  const at::Tensor workspace = matrix.new_empty({eigenvalue_workspace_bytes<T>(size)}, at::kByte);
  launch(largest_eigenvalue_kernel<T, S>, 1, 1, shared_bytes, matrix.const_data_ptr<S>(), size, lanczos::tolerance(ulp),
         static_cast<char*>(workspace.mutable_data_ptr()), result.mutable_data_ptr<S>(), shared_bytes);
}

}  // namespace

at::Tensor largest_eigenvalue_operator(const at::Tensor& matrix, double ulp) {
  check_symmetric(matrix);
  const c10::cuda::CUDAGuard guard(matrix.device());
  const at::Tensor dense = matrix.contiguous(), result = matrix.new_empty({});
  const bool is_double = matrix.scalar_type() == at::kDouble;
  // Sums in float are as exact as entries that were rounded to float.
  if (ulp < std::numeric_limits<float>::epsilon()) {
    (is_double ? run<double, double> : run<double, float>)(dense, ulp, result);
  } else {
    (is_double ? run<float, double> : run<float, float>)(dense, ulp, result);
  }
  return result;
}

}  // namespace rgd_ext::cuda
