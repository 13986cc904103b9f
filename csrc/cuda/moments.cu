#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "launch.h"
#include "moments.cuh"
#include "operators.h"
#include "reads.h"
#include "reduce.cuh"

namespace rgd_ext::cuda {
namespace {

template <typename S, int kCapacity>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ Table<kCapacity> table,
                                                           double* partials, int64_t slots, int64_t first_slot) {
  extern __shared__ __align__(16) char shared[];
  moments<S>(table, partials, slots, first_slot, shared);
}

template <typename S, int kCapacity>
__global__ void __launch_bounds__(kThreads) centred_kernel(const __grid_constant__ Table<kCapacity> table,
                                                           double* partials, int64_t slots, int64_t first_slot) {
  extern __shared__ __align__(16) char shared[];
  products<S, kCapacity, true, 1>(table, 0, 1, partials, slots, first_slot, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const double* partials, int64_t rows, int64_t slots, T* results) {
  reduce_rows(partials, rows, slots, results);
}

// Two statistics of each sample, (2 B, slots), with a slot for each block.
template <typename S, typename F>
at::Tensor read_statistics(const Launches<S, F>& launches) {
  const int64_t slots = launches.blocks();
  const at::Tensor& matrix = launches.matrices[0];
  at::Tensor partials = matrix.new_empty({2 * matrix.size(0), slots}, at::kDouble);
  launches.run(partials.mutable_data_ptr<double>(), slots);
  return partials;
}

}  // namespace

int lanes_on_chip(at::TensorList matrices) {
  return with_storage(matrices[0].scalar_type(), [&](auto storage) {
    return lanes_for<decltype(storage)>(matrices[0].size(0), current_device().shared_bytes);
  });
}

at::Tensor read_moments(at::TensorList matrices, at::TensorList means) {
  return with_storage(matrices[0].scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const int64_t rows = matrices[0].size(0);
    if (const int lanes = lanes_on_chip(matrices); lanes > 0)
      return read_statistics(
          launches_of<S>(matrices, means, lanes, 1, moments_shared_bytes<S>(rows, lanes),
                         []<int kCapacity>(const Table<kCapacity>&) { return moments_kernel<S, kCapacity>; }));
    // More samples than a tile in shared memory can hold: first the mean, then a second read for the statistics.
    const std::vector<at::Tensor> own = means.empty() ? empty_like_parameters(matrices) : std::vector<at::Tensor>();
    const at::TensorList centres = means.empty() ? at::TensorList(own) : means;
    const at::ScalarType dtype = accumulate_dtype(matrices[0].scalar_type());
    read_combination(matrices, matrices[0].new_full({1, rows}, 1.0 / static_cast<double>(rows), dtype), 0, centres);
    const int lanes = product_lanes<S>(rows, 1, 2, current_device().shared_bytes);
    at::Tensor partials = read_statistics(
        launches_of<S>(matrices, centres, lanes, product_blocks(rows), products_shared_bytes<S>(rows, lanes, 1, 2),
                       []<int kCapacity>(const Table<kCapacity>&) { return centred_kernel<S, kCapacity>; }));
    // The alignments should sum to zero, but these centres were rounded to the dtype of G.
    at::Tensor alignments = partials.narrow(0, 0, rows);
    alignments.sub_(alignments.mean(0));
    return partials;
  });
}

at::Tensor reduced(const at::Tensor& partials, at::ScalarType dtype) {
  const int64_t rows = partials.size(0), slots = partials.size(1);
  const at::Tensor results = partials.new_empty({rows}, dtype);
  const auto reduce = [&](auto kernel, auto* to) {
    launch(kernel, row_blocks(rows), 1, 0, partials.const_data_ptr<double>(), rows, slots, to);
  };
  if (dtype == at::kDouble) {
    reduce(reduce_kernel<double>, results.mutable_data_ptr<double>());
  } else {
    reduce(reduce_kernel<float>, results.mutable_data_ptr<float>());
  }
  return results;
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> moments_operator(at::TensorList grads) {
  check_grads(grads);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  std::vector<at::Tensor> means = empty_like_parameters(grads);
  const at::Tensor partials = read_moments(with_contiguous_rows(grads), means);
  const at::ScalarType dtype = accumulate_dtype(grads[0].scalar_type());
  const int64_t rows = grads[0].size(0);
  return {std::move(means), reduced(partials.narrow(0, 0, rows), dtype),
          reduced(partials.narrow(0, rows, rows), dtype)};
}

// As moments, with |g|^2 instead of g. Writing and reading the mean takes 2 / B of the time of reading G.
std::tuple<at::Tensor, at::Tensor, at::Tensor> scalar_moments_operator(at::TensorList grads) {
  auto [means, alignments, squared_norms] = moments_operator(grads);
  return {read_squared_norm(means), std::move(alignments), std::move(squared_norms)};
}

}  // namespace rgd_ext::cuda
