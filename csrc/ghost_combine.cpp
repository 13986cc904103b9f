#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "grads.h"

namespace rgd_ext {
namespace {

// PyTorch's own products, on any device: small models pay for the calls, which cost less here than from Python.
std::vector<at::Tensor> ghost_combine(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases,
                                      const at::Tensor& weights) {
  check_layers(inputs, output_grads, biases);
  const at::Tensor& first = output_grads[0];
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == first.size(0) && weights.is_floating_point() &&
                        weights.device() == first.device(),
                    "weights has shape ", weights.sizes(), " and is ", weights.scalar_type(), " on ", weights.device(),
                    ": pass ", first.size(0), " floating-point weights on ", first.device());
  // Nothing here is differentiated: small models pay for every operator that looks whether it is.
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor column = weights.to(first.scalar_type()).unsqueeze(1);
  std::vector<at::Tensor> results;
  results.reserve(2 * inputs.size());
  for (size_t layer = 0; layer < inputs.size(); ++layer) {
    const at::Tensor weighted = at::mul(output_grads[layer], column);
    // The bias first: the product drives from the caches what the two share.
    if (biases[layer]) results.push_back(weighted.sum(0));
    if (inputs[layer].size(1) > 0) results.push_back(at::mm(weighted.t(), inputs[layer]));
  }
  return results;
}

}  // namespace
}  // namespace rgd_ext

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("ghost_combine", rgd_ext::ghost_combine); }
TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) { m.impl("ghost_combine", rgd_ext::ghost_combine); }
