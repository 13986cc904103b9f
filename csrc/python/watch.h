#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/variable.h>

namespace rgd_ext {

// `output`, tied to the parameters: in a backward its gradient goes to record.receive(inputs, gradient, wanted).
at::Tensor watch(pybind11::object record, const at::Tensor& output, const torch::autograd::variable_list& inputs,
                 const torch::autograd::variable_list& parameters);

// Adds `watch` to the module.
void bind_watch(pybind11::module_& m);

}  // namespace rgd_ext
