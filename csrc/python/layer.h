#pragma once

#include <pybind11/pybind11.h>

namespace rgd_ext {

// Adds `Layer` to the module.
void bind_layer(pybind11::module_& m);

}  // namespace rgd_ext
