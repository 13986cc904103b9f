// The hook on a parameter that `WatchedParameters` of capture/parameters.py uses. Autograd calls a hook in every
// backward, as a rule without a gradient; this one calls Python only if there is one.

#include "guard.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "object.h"

namespace py = pybind11;

namespace rgd_ext {
namespace {

class Guard {
 public:
  Guard(at::Tensor parameter, py::object callback) : parameter_(std::move(parameter)) {
    position_ = parameter_.register_hook([callback = shared(std::move(callback))](const at::Tensor& grad) {
      if (grad.defined()) in_python([&] { py::handle(callback.get())(grad); });
    });
  }

  void remove() { parameter_.remove_hook(position_); }

 private:
  at::Tensor parameter_;
  unsigned position_;
};

}  // namespace

void bind_guard(py::module_& m) {
  py::class_<Guard>(m, "Guard", "Calls callback(gradient) for every gradient that reaches a parameter, until removed.")
      .def(py::init<at::Tensor, py::object>(), py::arg("parameter"), py::arg("callback"))
      .def("remove", &Guard::remove);
}

}  // namespace rgd_ext
