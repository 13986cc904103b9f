#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "gram.cuh"
#include "launch.h"

namespace rgd_ext::cuda {
namespace {

template <typename S, int kCapacity, int kBlock, template <typename, int> class Sums>
__global__ void __launch_bounds__(kThreads, Sums<S, kBlock>::kBlocksPerMultiprocessor)
    gram_kernel(const __grid_constant__ Table<kCapacity> table, Accumulate<S>* partials, int64_t first_share) {
  extern __shared__ __align__(16) char shared[];
  gram<S, kCapacity, kBlock, Sums>(table, partials, first_share, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_gram_kernel(const T* partials, int64_t rows, int64_t shares, T* gram) {
  extern __shared__ __align__(16) char shared[];
  reduce_gram(partials, rows, shares, gram, shared);
}

template <typename S, int kBlock, template <typename, int> class Sums>
at::Tensor read_gram(at::TensorList matrices) {
  using T = Accumulate<S>;
  using Shape = GramShape<kBlock>;
  const int64_t rows = matrices[0].size(0), side = (rows + kBlock - 1) / kBlock, pairs = side * (side + 1) / 2;
  TORCH_CHECK_VALUE(pairs <= 65535, "the Gramian of ", rows, " samples is larger than one launch can make: use fewer");
  const auto launches = [&](auto use) {
    const auto kernel_for = []<int kCapacity>(const Table<kCapacity>&) {
      return gram_kernel<S, kCapacity, kBlock, Sums>;
    };
    return for_launches<S>(matrices, {}, Shape::kLanes, pairs, Shape::kSharedBytes, kernel_for, use);
  };
  const int64_t shares = launches([](auto&&...) {}) * Shape::kSlices;
  const at::TensorOptions options = matrices[0].options().dtype(accumulate_dtype(matrices[0].scalar_type()));
  const at::Tensor partials = at::empty({shares, rows, rows}, options), result = at::empty({rows, rows}, options);
  launches([&](auto kernel, const auto& table, int64_t blocks, int64_t first_block) {
    launch(kernel, blocks, pairs, Shape::kSharedBytes, table, partials.mutable_data_ptr<T>(),
           first_block * Shape::kSlices);
  });
  launch(reduce_gram_kernel<T>, (rows * rows + kGramEntries - 1) / kGramEntries, 1, kReduceGramSharedBytes,
         partials.const_data_ptr<T>(), rows, shares, result.mutable_data_ptr<T>());
  return result;
}

template <typename S, template <typename, int> class Sums>
at::Tensor read_gram_by_size(at::TensorList matrices) {
  const int64_t rows = matrices[0].size(0);
  return rows <= 32   ? read_gram<S, 32, Sums>(matrices)
         : rows <= 64 ? read_gram<S, 64, Sums>(matrices)
                      : read_gram<S, 128, Sums>(matrices);
}

// Whether both of torch's ways to say so agree that the last bits of float products do not matter.
bool tf32_allowed() {
  try {
    return at::globalContext().allowTF32CuBLAS();
  } catch (const c10::Error&) {
    return false;
  }
}

// Products of 2-byte types are exact in float; float itself goes to the matrix units only where the user gave up its
// last bits with torch.backends.cuda.matmul.allow_tf32 or torch.set_float32_matmul_precision.
at::Tensor gram_operator(at::TensorList grads) {
  check_grads(grads);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  return with_storage(grads[0].scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    if constexpr (std::is_same_v<S, double>) {
      return read_gram_by_size<S, PlainSums>(matrices);
    } else if constexpr (std::is_same_v<S, float>) {
      return tf32_allowed() ? read_gram_by_size<S, MatrixUnitSums>(matrices)
                            : read_gram_by_size<S, PlainSums>(matrices);
    } else {
      return read_gram_by_size<S, MatrixUnitSums>(matrices);
    }
  });
}

}  // namespace
}  // namespace rgd_ext::cuda

TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("gram", rgd_ext::cuda::gram_operator); }
