#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "work.h"

namespace rgd_ext::cpu {
namespace {

// Lets NaN through.
double not_negative(double value) { return value < 0 ? 0 : value; }

// One thread: B x B numbers in cache. Returns |g|^2.
template <typename T>
double gram_moments_kernel(const T* gram, int64_t size, double* alignments, double* squared_norms, double* centred) {
  std::fill(alignments, alignments + size, 0.0);
  // Sums over rows, which are those over columns, can be vectorised.
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) alignments[j] += gram[i * size + j];
  double mean = 0;
  for (int64_t i = 0; i < size; ++i) mean += alignments[i] /= size;
  mean /= size;
  for (int64_t i = 0; i < size; ++i) alignments[i] -= mean;
  for (int64_t i = 0; i < size; ++i) {
    const double row = alignments[i] + mean;
    for (int64_t j = 0; j < size; ++j) centred[i * size + j] = gram[i * size + j] - row - alignments[j];
    squared_norms[i] = not_negative(centred[i * size + i]);
  }
  return not_negative(mean);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gram_moments(const at::Tensor& gram) {
  check_symmetric(gram);
  const int64_t size = gram.size(0);
  const at::Tensor rows = gram.contiguous();
  const auto options = gram.options().dtype(at::kDouble);
  at::Tensor squared = at::empty({}, options), alignments = at::empty({size}, options);
  at::Tensor squared_norms = at::empty({size}, options), centred = at::empty({size, size}, options);
  AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "gram_moments", [&] {
    *squared.mutable_data_ptr<double>() =
        gram_moments_kernel(rows.const_data_ptr<scalar_t>(), size, alignments.mutable_data_ptr<double>(),
                            squared_norms.mutable_data_ptr<double>(), centred.mutable_data_ptr<double>());
  });
  return {squared, alignments, squared_norms, centred};
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("gram_moments", rgd_ext::cpu::gram_moments); }
