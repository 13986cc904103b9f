#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "launch.h"
#include "reads.h"
#include "squared_norm.cuh"

namespace rgd_ext::cuda {
namespace {

template <typename S, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    squared_norm_kernel(const __grid_constant__ Table<kCapacity> table, double* partials, int64_t first_slot) {
  extern __shared__ __align__(16) char shared[];
  squared_norm<S>(table, partials, first_slot, shared);
}

}  // namespace

at::Tensor read_squared_norm(at::TensorList vector) {
  std::vector<at::Tensor> rows;
  rows.reserve(vector.size());
  for (const at::Tensor& tensor : vector) rows.push_back(tensor.unsqueeze(0));
  check_grads(rows);
  const c10::cuda::CUDAGuard guard(rows[0].device());
  rows = with_contiguous_rows(rows);
  return with_storage(rows[0].scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const auto launches = [&](auto use) {
      const auto kernel_for = []<int kCapacity>(const Table<kCapacity>&) { return squared_norm_kernel<S, kCapacity>; };
      return for_launches<S>(rows, {}, kSquaredNormLanes, 1, kBlockSumBytes, kernel_for, use);
    };
    const int64_t slots = launches([](auto&&...) {});
    const at::Tensor partials = at::empty({1, slots}, rows[0].options().dtype(at::kDouble));
    launches([&](auto kernel, const auto& table, int64_t blocks, int64_t first_block) {
      launch(kernel, blocks, 1, kBlockSumBytes, table, partials.mutable_data_ptr<double>(), first_block);
    });
    return reduced(partials, accumulate_dtype(rows[0].scalar_type())).view(at::IntArrayRef());
  });
}

}  // namespace rgd_ext::cuda

TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("squared_norm", rgd_ext::cuda::read_squared_norm); }
