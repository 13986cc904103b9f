#include <c10/cuda/CUDAGuard.h>

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
    const auto launches =
        launches_of<S>(rows, {}, kSquaredNormLanes, 1, kBlockSumBytes,
                       []<int kCapacity>(const Table<kCapacity>&) { return squared_norm_kernel<S, kCapacity>; });
    const at::Tensor partials = rows[0].new_empty({1, launches.blocks()}, at::kDouble);
    launches.run(partials.mutable_data_ptr<double>());
    return reduced(partials, accumulate_dtype(rows[0].scalar_type())).view(at::IntArrayRef());
  });
}

}  // namespace rgd_ext::cuda
