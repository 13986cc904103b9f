#include <c10/cuda/CUDAGuard.h>

#include "launch.h"
#include "operators.h"
#include "products.cuh"
#include "reads.h"

namespace rgd_ext::cuda {
namespace {

template <typename S, int kCapacity, int kVectors>
__global__ void __launch_bounds__(kThreads, kVectors == 1 ? 4 : 2)
    products_kernel(const __grid_constant__ Table<kCapacity> table, int64_t first, int count, double* partials,
                    int64_t slots, int64_t first_slot) {
  extern __shared__ __align__(16) char shared[];
  products<S, kCapacity, false, kVectors>(table, first, count, partials, slots, first_slot, shared);
}

// <g_i, v_j> for the vectors [first, first + count), (kVectors, B) in accumulate_dtype; zero past the last.
template <typename S, int kVectors>
at::Tensor read_products(at::TensorList matrices, at::TensorList vectors, int64_t first, int count) {
  const int64_t rows = matrices[0].size(0);
  const int lanes = product_lanes<S>(rows, kVectors, kVectors, current_device().shared_bytes);
  const auto launches = launches_of<S>(
      matrices, vectors, lanes, product_blocks(rows), products_shared_bytes<S>(rows, lanes, kVectors, kVectors),
      []<int kCapacity>(const Table<kCapacity>&) { return products_kernel<S, kCapacity, kVectors>; });
  const int64_t slots = launches.blocks();
  const at::Tensor partials = matrices[0].new_empty({kVectors * rows, slots}, at::kDouble);
  launches.run(first, count, partials.mutable_data_ptr<double>(), slots);
  return reduced(partials, accumulate_dtype(matrices[0].scalar_type())).view({kVectors, rows});
}

}  // namespace

std::vector<at::Tensor> diffusion_mv_operator(at::TensorList grads, at::TensorList vectors) {
  check_grads(grads);
  const int64_t number = check_vectors(grads, vectors);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  std::vector<at::Tensor> directions, results;
  for (const at::Tensor& vector : vectors) {
    directions.push_back(vector.contiguous());
    results.push_back(vector.new_empty(vector.sizes()));
  }
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  with_storage(grads[0].scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    for (int64_t first = 0; first < number; first += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(number - first, kTogether));
      const at::Tensor products = count == 1 ? read_products<S, 1>(matrices, directions, first, count)
                                             : read_products<S, kTogether>(matrices, directions, first, count);
      // Centring the B products of a vector centres the matrix.
      const at::Tensor centred = products.sub(products.mean(1, true)).div(grads[0].size(0));
      read_combination(matrices, centred.narrow(0, 0, count), first, results);
    }
  });
  return results;
}

}  // namespace rgd_ext::cuda
