#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <c10/cuda/CUDAGuard.h>

#include "embedding_gram.cuh"
#include "launch.h"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_gram_kernel(const int64_t* keys, const T* sums, const int64_t* starts, int64_t table_rows,
                          int64_t columns, int64_t batch_size, T* gram) {
  extern __shared__ __align__(16) char shared[];
  embedding_gram(keys, sums, starts, table_rows, columns, batch_size, gram, shared);
}

void check_entries(const at::Tensor& keys, const at::Tensor& sums, int64_t table_rows, int64_t batch_size) {
  TORCH_CHECK_VALUE(keys.dim() == 1 && sums.dim() == 2 && sums.size(0) == keys.size(0) &&
                        keys.device() == sums.device() && keys.scalar_type() == at::kLong &&
                        (sums.scalar_type() == at::kDouble || sums.scalar_type() == at::kFloat),
                    "got keys ", described(keys), " and sums ", described(sums),
                    ": pass (N,) of int64 and (N, n) of float64 or float32 on one device");
  TORCH_CHECK_VALUE(table_rows > 0 && batch_size > 0 && batch_size <= 65535, "got ", table_rows, " table rows and ",
                    batch_size, " samples: pass at least one row, and 1 to 65535 samples");
}

}  // namespace

at::Tensor embedding_gram_operator(const at::Tensor& keys, const at::Tensor& sums, int64_t table_rows,
                                   int64_t batch_size) {
  check_entries(keys, sums, table_rows, batch_size);
  const c10::cuda::CUDAGuard guard(sums.device());
  const at::Tensor sorted = keys.contiguous(), values = sums.contiguous();
  const at::Tensor firsts = at::arange(0, (batch_size + 1) * table_rows, table_rows, keys.options());
  const at::Tensor starts = at::searchsorted(sorted, firsts);
  const at::Tensor gram = sums.new_empty({batch_size, batch_size});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(embedding_gram_kernel<T>, batch_size, batch_size, kBlockSumBytes, sorted.const_data_ptr<int64_t>(),
           values.const_data_ptr<T>(), starts.const_data_ptr<int64_t>(), table_rows, values.size(1), batch_size,
           gram.mutable_data_ptr<T>());
  };
  if (sums.scalar_type() == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
  return gram;
}

}  // namespace rgd_ext::cuda
