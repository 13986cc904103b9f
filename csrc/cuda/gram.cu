#include <c10/cuda/CUDAGuard.h>

#include "gram_launch.h"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

template <typename Sums, int kCapacity>
__global__ void __launch_bounds__(kThreads, Sums::kBlocksPerMultiprocessor)
    gram_kernel(const __grid_constant__ Table<kCapacity> table, typename Sums::T* partials, int64_t first_share) {
  extern __shared__ __align__(16) char shared[];
  const Part part{block_index(), table.tiles, blocks(), first_share + block_index()};
  gram<Sums>(table, part, partials, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_gram_kernel(const T* partials, int64_t rows, int64_t shares, T* gram) {
  extern __shared__ __align__(16) char shared[];
  reduce_gram(partials, rows, shares, gram, shared);
}

template <typename Sums>
at::Tensor read_gram(at::TensorList matrices) {
  using T = typename Sums::T;
  const int64_t rows = matrices[0].size(0);
  const auto launches = launches_of<typename Sums::Storage>(
      matrices, {}, Sums::Shape::kLanes, block_pairs<Sums>(rows), gram_shared_bytes<Sums>(),
      []<int kCapacity>(const Table<kCapacity>&) { return gram_kernel<Sums, kCapacity>; });
  const int64_t shares = launches.blocks();
  const at::ScalarType dtype = accumulate_dtype(matrices[0].scalar_type());
  const at::Tensor partials = matrices[0].new_empty({shares, rows, rows}, dtype);
  const at::Tensor result = matrices[0].new_empty({rows, rows}, dtype);
  launches.run(partials.mutable_data_ptr<T>());
  launch(reduce_gram_kernel<T>, reduce_blocks<kGramEntries>(rows), 1, kReduceSharedBytes, partials.const_data_ptr<T>(),
         rows, shares, result.mutable_data_ptr<T>());
  return result;
}

}  // namespace

at::Tensor gram_operator(at::TensorList grads) {
  check_grads(grads);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  return with_gram_sums(grads[0].scalar_type(), grads[0].size(0),
                        [&]<typename Sums>(std::type_identity<Sums>) { return read_gram<Sums>(matrices); });
}

}  // namespace rgd_ext::cuda
