// The Python module rgd_ext._C. Importing it loads the kernels that the other files register with the dispatcher.
// Functions bound by pybind11 break the graphs of torch.compile, so only what runs eagerly in any case is bound here.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "collector.h"
#include "context.h"
#include "guard.h"
#include "layer.h"
#include "layer_call.h"
#include "watch.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
#ifdef RGD_EXT_CUDA
  info["cuda"] = RGD_EXT_CUDA;
  info["architectures"] = py::str(RGD_EXT_ARCHITECTURES).attr("split")();
#else
  info["cuda"] = py::none();
  info["architectures"] = py::list();
#endif
  info["torch"] = TORCH_VERSION;
  info["compiler"] = compiler();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of rgd_ext.";
  m.def("build_info", &build_info, "What this binary was built with: cuda, architectures, torch, compiler.");
  rgd_ext::bind_context(m);
  rgd_ext::bind_layer_call(m);
  rgd_ext::bind_collector(m);
  rgd_ext::bind_guard(m);
  rgd_ext::bind_layer(m);
  rgd_ext::bind_watch(m);
}
