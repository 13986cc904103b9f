#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "layer_call.h"

namespace rgd_ext {

// Takes what layers hand over in one backward (capture/backward.py), without running Python for each: linear layers
// that met one vector per sample, and small layers, whose gradients the operator `layer_grads` forms together at the
// end. It is used under the interpreter's lock.
class Collector {
 public:
  // `task` is the backward; with -1 `admit` takes no layer. `each` and `all` are the bytes of inputs and output
  // gradients that one small layer, and all of them together, may hold. The gradients of a linear layer may take
  // `share` times the memory of its inputs and output gradients.
  Collector(int64_t task, int64_t batch_size, int64_t each, int64_t all, double share)
      : task_(task), batch_size_(batch_size), each_(each), all_(all), share_(share) {}

  // Take what a layer gets in the backward under way, if that is the backward of this collector and batch sizes agree.
  // Returns whether it was taken, as the next two do.
  bool admit(const LayerCall& call, const at::Tensor& input, const at::Tensor& grad);

  // Take a linear layer that met one vector per sample, in the dtype of its parameters.
  bool take_vectors(const LayerCall& call, const at::Tensor& input, const at::Tensor& grad);

  // Take a small layer that `layer_grads` serves.
  bool take_small(const LayerCall& call, const at::Tensor& input, const at::Tensor& grad);

  // For each dtype and device: the trainable parameters of the linear layers, bias before weight; their inputs (B, n),
  // with n = 0 if the weight is frozen; their output gradients (B, m); and whether they have a bias. The collector lets
  // go of them.
  pybind11::list vectors();

  // For each dtype and device: the parameters of the small layers, and their contributions side by side, (B, D). The
  // collector lets go of the layers.
  pybind11::list gradients();

 private:
  // Layers of one dtype and device, as `ghost_gram` takes them.
  struct VectorLayers {
    pybind11::list parameters;
    std::vector<at::Tensor> inputs, grads;
    std::vector<bool> biases;
  };
  // Layers of one dtype and device, as `layer_grads` takes them.
  struct SmallLayers {
    at::Tensor form() const;

    pybind11::list parameters;
    c10::List<std::string> kinds;
    std::vector<at::Tensor> grads, inputs;
    std::vector<int64_t> groups;
    std::vector<double> eps;
    c10::List<bool> biases;
  };

  const int64_t task_, batch_size_, each_, all_;
  const double share_;
  int64_t held_ = 0;
  std::vector<VectorLayers> vectors_;
  std::vector<SmallLayers> small_;
};

// Adds `Collector` to the module.
void bind_collector(pybind11::module_& m);

}  // namespace rgd_ext
