#include <c10/cuda/CUDAGuard.h>

#include "combine.cuh"
#include "launch.h"
#include "operators.h"
#include "reads.h"

namespace rgd_ext::cuda {
namespace {

template <typename S, int kCapacity, int kOutputs>
__global__ void __launch_bounds__(kThreads, kOutputs == 1 ? 4 : 2)
    combine_kernel(const __grid_constant__ Table<kCapacity> table, const Accumulate<S>* __restrict__ weights,
                   int64_t first, int count) {
  extern __shared__ __align__(16) char shared[];
  combine<S, kCapacity, kOutputs>(table, weights, first, count, shared);
}

template <typename S, int kOutputs>
void launch_combine(at::TensorList matrices, const at::Tensor& weights, int64_t first, at::TensorList results) {
  const int lanes = lanes_on_chip(matrices), count = static_cast<int>(weights.size(0));
  const auto launches =
      launches_of<S>(matrices, results, lanes > 0 ? lanes : widest_lanes(matrices[0].size(0)), 1, group_sums_bytes<S>(),
                     []<int kCapacity>(const Table<kCapacity>&) { return combine_kernel<S, kCapacity, kOutputs>; });
  launches.for_each([&](auto kernel, const auto& table, int64_t blocks, int64_t) {
    launch(kernel, blocks, 1, launches.shared_bytes, table, weights.const_data_ptr<Accumulate<S>>(), first, count);
  });
}

}  // namespace

void read_combination(at::TensorList matrices, const at::Tensor& weights, int64_t first, at::TensorList results) {
  with_storage(matrices[0].scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    if (weights.size(0) == 1) {
      launch_combine<S, 1>(matrices, weights, first, results);
    } else {
      launch_combine<S, kTogether>(matrices, weights, first, results);
    }
  });
}

std::vector<at::Tensor> combine_operator(at::TensorList grads, const at::Tensor& weights) {
  check_grads(grads);
  const at::Tensor checked = checked_weights(grads, weights);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  std::vector<at::Tensor> results = empty_like_parameters(grads);
  read_combination(with_contiguous_rows(grads), checked.unsqueeze(0), 0, results);
  return results;
}

}  // namespace rgd_ext::cuda
