#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "../grads.h"
#include "layers.h"

namespace rgd_ext::cpu {
namespace {

enum class Kind { kLinear, kLayerNorm, kRmsNorm, kGroupNorm };

struct Layer {
  Kind kind;
  at::Tensor output_grad, input;
  int64_t groups;
  double eps;
  bool has_bias;

  int64_t outputs() const { return output_grad.size(kind == Kind::kGroupNorm ? 1 : -1); }
  int64_t weights() const { return kind == Kind::kLinear ? outputs() * input.size(-1) : outputs(); }
  int64_t columns() const { return weights() + has_bias * outputs(); }

  void form(const at::Tensor& matrix, int64_t column) const {
    const Place weight{matrix, column};
    std::optional<Place> bias;
    if (has_bias) bias.emplace(Place{matrix, column + weights()});
    if (kind == Kind::kLinear)
      form_linear(output_grad, input, weight, bias);
    else if (kind == Kind::kGroupNorm)
      form_group_norm(output_grad, input, groups, eps, weight, bias);
    else
      form_layer_norm(output_grad, input, eps, kind == Kind::kLayerNorm, weight, bias);
  }
};

Kind checked_kind(const std::string& name) {
  for (const auto& [known, kind] : {std::pair{"linear", Kind::kLinear},
                                    {"layer_norm", Kind::kLayerNorm},
                                    {"rms_norm", Kind::kRmsNorm},
                                    {"group_norm", Kind::kGroupNorm}})
    if (name == known) return kind;
  TORCH_CHECK_VALUE(false, "kind is ", name, ": choose linear, layer_norm, rms_norm or group_norm");
}

void check_layer(const Layer& layer, size_t index) {
  const auto &grad = layer.output_grad.sizes(), &input = layer.input.sizes();
  if (layer.kind == Kind::kLinear) {
    TORCH_CHECK_VALUE(grad.size() == 3 && input.size() == 3 && grad[0] == input[0] && grad[1] == input[1], "layer ",
                      index, " has inputs of shape ", input, " and output gradients of shape ", grad,
                      ": expected (B, T, n) and (B, T, m)");
  } else {
    TORCH_CHECK_VALUE(input.size() >= 2 && grad == input, "layer ", index, " has inputs of shape ", input,
                      " and output gradients of shape ", grad, ": expected two of one shape, of at least (B, n)");
  }
  if (layer.kind == Kind::kGroupNorm)
    TORCH_CHECK_VALUE(layer.groups > 0 && input[1] % layer.groups == 0, "layer ", index, " has ", layer.groups,
                      " groups: they must divide ", input[1], " channels");
}

at::Tensor layer_grads(const c10::List<std::string>& kinds, at::TensorList output_grads, at::TensorList inputs,
                       at::IntArrayRef groups, at::ArrayRef<double> eps, const c10::List<bool>& biases) {
  check_grads(output_grads);
  check_grads(inputs);
  const size_t count = kinds.size();
  TORCH_CHECK_VALUE(output_grads.size() == count && inputs.size() == count && groups.size() == count &&
                        eps.size() == count && biases.size() == count,
                    "got ", count, " kinds, ", output_grads.size(), " output gradients, ", inputs.size(), " inputs, ",
                    groups.size(), " groups, ", eps.size(), " eps and ", biases.size(),
                    " biases: pass one of each per layer");
  check_grads({output_grads[0], inputs[0]});
  std::vector<Layer> layers;
  int64_t columns = 0;
  layers.reserve(count);
  for (size_t l = 0; l < count; ++l) {
    layers.push_back({checked_kind(kinds.get(l)), output_grads[l], inputs[l], groups[l], eps[l], biases.get(l)});
    check_layer(layers.back(), l);
    columns += layers.back().columns();
  }
  const at::Tensor result = at::empty({inputs[0].size(0), columns}, inputs[0].options());
  int64_t column = 0;
  for (const Layer& layer : layers) {
    layer.form(result, column);
    column += layer.columns();
  }
  return result;
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("layer_grads", rgd_ext::cpu::layer_grads); }
