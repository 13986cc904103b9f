#pragma once

#include <pybind11/pybind11.h>

namespace rgd_ext {

// Adds `watch` to the module.
void bind_watch(pybind11::module_& m);

}  // namespace rgd_ext
