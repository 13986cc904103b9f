#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rsub.h>
#include <torch/library.h>

#include "reads.h"

namespace rgd_ext::cpu {
namespace {

// moments, w_i = (1 - eps a_i) / B, combine: the same bits as these three one after the other, without writing the
// mean.
std::vector<at::Tensor> precondition(at::TensorList grads, const at::Tensor& epsilon) {
  check_grads(grads);
  const at::Tensor step = checked_epsilon(grads, epsilon);
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  const at::Tensor alignments = std::get<1>(read_moments(matrices, {}, false));
  const at::Tensor weights = at::rsub(at::mul(alignments, step), 1).div(alignments.numel());
  std::vector<at::Tensor> direction = empty_like_parameters(grads);
  read_combination(matrices, weights, direction);
  return direction;
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("precondition", rgd_ext::cpu::precondition); }
