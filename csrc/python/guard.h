#pragma once

#include <pybind11/pybind11.h>

namespace rgd_ext {

// Adds `Guard` to the module.
void bind_guard(pybind11::module_& m);

}  // namespace rgd_ext
