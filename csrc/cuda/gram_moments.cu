#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "gram_moments.cuh"
#include "launch.h"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) row_means_kernel(const T* gram, int64_t size, double* means) {
  row_means(gram, size, means);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    centre_gram_kernel(const T* gram, const double* means, int64_t size, GramMoments to) {
  centre_gram(gram, means, size, to);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gram_moments_operator(const at::Tensor& gram) {
  check_symmetric(gram);
  const c10::cuda::CUDAGuard guard(gram.device());
  const int64_t size = gram.size(0), blocks = row_blocks(size);
  const at::Tensor dense = gram.contiguous();
  const auto empty = [&](at::IntArrayRef shape) { return gram.new_empty(shape, at::kDouble); };
  const at::Tensor squared = empty({}), alignments = empty({size}), squared_norms = empty({size});
  const at::Tensor centred = empty({size, size}), means = empty({size});
  const auto run = [&](auto row_means, auto centre_gram, const auto* from) {
    launch(row_means, blocks, 1, 0, from, size, means.mutable_data_ptr<double>());
    launch(centre_gram, blocks, 1, 0, from, means.const_data_ptr<double>(), size,
           GramMoments{squared.mutable_data_ptr<double>(), alignments.mutable_data_ptr<double>(),
                       squared_norms.mutable_data_ptr<double>(), centred.mutable_data_ptr<double>()});
  };
  if (gram.scalar_type() == at::kDouble) {
    run(row_means_kernel<double>, centre_gram_kernel<double>, dense.const_data_ptr<double>());
  } else {
    run(row_means_kernel<float>, centre_gram_kernel<float>, dense.const_data_ptr<float>());
  }
  return {squared, alignments, squared_norms, centred};
}

}  // namespace rgd_ext::cuda
