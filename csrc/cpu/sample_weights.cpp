#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "work.h"

namespace rgd_ext::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> sample_weights(const at::Tensor& squared_grad_norm, const at::Tensor& alignments,
                                                  const at::Tensor& squared_norms, const at::Tensor& epsilon,
                                                  double ulp) {
  check_statistics(squared_grad_norm, alignments, squared_norms, epsilon);
  const int64_t batch_size = alignments.size(0);
  const at::Tensor a = alignments.contiguous(), norms = squared_norms.contiguous();
  at::Tensor chosen = at::empty_like(epsilon), weights = at::empty_like(a);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "sample_weights", [&] {
    const scalar_t* data = a.const_data_ptr<scalar_t>();
    double trace = 0;
    for (int64_t i = 0; i < batch_size; ++i) trace += norms.const_data_ptr<scalar_t>()[i];
    trace /= batch_size;
    // The threshold is trace_rounding of rgd_ext/linalg.py.
    const bool is_zero = trace <= 8 * ulp * *squared_grad_norm.const_data_ptr<scalar_t>();
    const scalar_t value = is_zero ? 0 : *epsilon.const_data_ptr<scalar_t>();
    *chosen.mutable_data_ptr<scalar_t>() = value;
    scalar_t* out = weights.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < batch_size; ++i) out[i] = (1 - value * data[i]) / batch_size;
  });
  return {chosen, weights};
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("sample_weights", rgd_ext::cpu::sample_weights); }
