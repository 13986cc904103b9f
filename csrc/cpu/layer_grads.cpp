#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "../grads.h"
#include "layers.h"

namespace rgd_ext::cpu {
namespace {

struct Layer;

// A kind of layer: its name, the dimension of the output gradients along which its outputs lie, whether its weight is a
// matrix, and what forms its gradients.
struct Kind {
  const char* name;
  int64_t output_dim;
  bool has_matrix;
  void (*form)(const Layer&, const Place& weight, const std::optional<Place>& bias);
};

// One of the layers in the arguments of `layer_grads`, to which it refers.
struct Layer {
  const Kind& kind;
  const at::Tensor &output_grad, &input;
  int64_t groups;
  double eps;
  bool has_bias;

  int64_t outputs() const { return output_grad.size(kind.output_dim); }
  int64_t weights() const { return kind.has_matrix ? outputs() * input.size(-1) : outputs(); }
  int64_t columns() const { return weights() + has_bias * outputs(); }

  void form(const at::Tensor& matrix, int64_t column) const {
    std::optional<Place> bias;
    if (has_bias) bias.emplace(Place{matrix, column + weights()});
    kind.form(*this, Place{matrix, column}, bias);
  }
};

constexpr Kind kKinds[] = {
    {"linear", -1, true,
     [](const Layer& layer, const Place& weight, const std::optional<Place>& bias) {
       form_linear(layer.output_grad, layer.input, weight, bias);
     }},
    {"layer_norm", -1, false,
     [](const Layer& layer, const Place& weight, const std::optional<Place>& bias) {
       form_layer_norm(layer.output_grad, layer.input, layer.eps, true, weight, bias);
     }},
    {"rms_norm", -1, false,
     [](const Layer& layer, const Place& weight, const std::optional<Place>& bias) {
       form_layer_norm(layer.output_grad, layer.input, layer.eps, false, weight, bias);
     }},
    {"group_norm", 1, false,
     [](const Layer& layer, const Place& weight, const std::optional<Place>& bias) {
       form_group_norm(layer.output_grad, layer.input, layer.groups, layer.eps, weight, bias);
     }},
};

const Kind& kind_of(const std::string& name) {
  for (const Kind& kind : kKinds)
    if (name == kind.name) return kind;
  std::string names;
  for (const Kind& kind : kKinds) names += (names.empty() ? "" : ", ") + std::string(kind.name);
  TORCH_CHECK_VALUE(false, "got a layer of kind ", name, ": choose one of ", names);
}

void check_layer(const Layer& layer) {
  const at::Tensor &e = layer.output_grad, &x = layer.input;
  if (layer.kind.has_matrix) {
    TORCH_CHECK_VALUE(e.dim() == 3 && x.dim() == 3 && e.size(1) == x.size(1), "got output gradients ", described(e),
                      " and inputs ", described(x), ": pass (B, T, m) and (B, T, n)");
  } else {
    check_norm(e, x);
    if (layer.kind.output_dim == 1) check_groups(layer.groups, x.size(1));
  }
}

at::Tensor layer_grads(const c10::List<std::string>& kinds, at::TensorList output_grads, at::TensorList inputs,
                       at::IntArrayRef groups, at::ArrayRef<double> eps, const c10::List<bool>& biases) {
  check_layers(inputs, output_grads, kinds.size(), "kinds");
  const size_t count = kinds.size();
  TORCH_CHECK_VALUE(groups.size() == count && eps.size() == count && biases.size() == count, "got ", groups.size(),
                    " groups, ", eps.size(), " eps and ", biases.size(), " biases of ", count, " layers: pass as many");
  std::vector<Layer> layers;
  int64_t columns = 0;
  layers.reserve(count);
  for (size_t l = 0; l < count; ++l) {
    layers.push_back({kind_of(kinds.get(l)), output_grads[l], inputs[l], groups[l], eps[l], biases.get(l)});
    check_layer(layers.back());
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
