#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "grads.h"

namespace rgd_ext {
namespace {

// As in rgd_ext/linalg.py.
at::Tensor product_with_wider(const at::Tensor& left, const at::Tensor& right) {
  const at::ScalarType wide = right.scalar_type(), narrow = left.scalar_type();
  if (left.is_cpu()) return at::mm(left.to(wide), right);
  const at::Tensor high = right.to(narrow), low = at::sub(right, high).to(narrow);
  return at::mm(left, high, wide).add_(at::mm(left, low, wide));
}

// PyTorch's own products, on any device: small models pay for the calls, which cost less here than from Python.
std::vector<at::Tensor> ghost_combine(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases,
                                      const at::Tensor& weights) {
  check_vector_layers(inputs, output_grads, biases);
  // Nothing here is differentiated: small models pay for every operator that looks whether it is.
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::ScalarType dtype = output_grads[0].scalar_type();
  const at::Tensor column = checked_weights(output_grads, weights).unsqueeze(1);
  std::vector<at::Tensor> results;
  results.reserve(2 * inputs.size());
  for (size_t layer = 0; layer < inputs.size(); ++layer) {
    const at::Tensor weighted = at::mul(output_grads[layer], column);
    // The bias first: the product drives from the caches what the two share.
    if (biases[layer]) results.push_back(weighted.sum(0).to(dtype));
    if (inputs[layer].size(1) == 0) continue;
    if (dtype == column.scalar_type())
      results.push_back(at::mm(weighted.t(), inputs[layer]));
    else
      results.push_back(product_with_wider(output_grads[layer].t(), at::mul(inputs[layer], column)).to(dtype));
  }
  return results;
}

}  // namespace
}  // namespace rgd_ext

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("ghost_combine", rgd_ext::ghost_combine); }
TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("ghost_combine", rgd_ext::ghost_combine); }
