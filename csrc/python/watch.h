#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/variable.h>

#include "layer_call.h"

namespace rgd_ext {

// `output`, tied to the parameters of `call`, a LayerCall. In a backward its gradient goes to the collector of that
// backward; or, if that does not take it, to `receive` of the context, which is that of capture/nodes.py.
at::Tensor watch(pybind11::object call, const at::Tensor& output, const torch::autograd::variable_list& inputs);

// Adds `watch` to the module.
void bind_watch(pybind11::module_& m);

}  // namespace rgd_ext
