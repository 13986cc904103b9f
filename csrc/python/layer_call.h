#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "context.h"

namespace rgd_ext {

// What the operator `layer_grads` has to know of a layer besides tensors: `LayerSpec` of layers/spec.py, which the
// layer's entry in layers/registry.py makes.
struct LayerSpec {
  std::string kind;    // one of those in ops/layer.py
  int64_t groups = 1;  // the number of groups of channels
  double eps = 0;      // what a norm adds to the mean of squares
};

// One call of a layer in a forward: what the backward needs of it besides tensors.
struct LayerCall {
  LayerCall(pybind11::object context_, std::shared_ptr<NativeContext> native_, pybind11::object name_,
            pybind11::dict parameters_, int64_t batch_size_, pybind11::object rule_,
            std::shared_ptr<const LayerSpec> spec_, pybind11::object operands_ = pybind11::none());

  const pybind11::object context;
  const std::shared_ptr<NativeContext> native;
  const pybind11::object name;
  const pybind11::dict parameters;  // by name
  // The weight and the bias among the parameters, or null; looked up where compiled code may take the layer.
  const pybind11::handle weight, bias;
  const int64_t batch_size;
  const pybind11::object rule;
  const std::shared_ptr<const LayerSpec> spec;  // or null
  // See `Recorder._make_call` of capture/recorders/recorder.py. Compiled code does not take calls that have it.
  const pybind11::object operands;
  const int64_t number;  // the number of the call of the model that it is part of
  const int64_t inside;  // the backward that this forward runs in, as in re-entrant checkpointing; or -1
};

// Adds `LayerSpec` and `LayerCall` to the module.
void bind_layer_call(pybind11::module_& m);

}  // namespace rgd_ext
