#include "layer_call.h"

#include <torch/csrc/autograd/graph_task.h>

#include <utility>

namespace py = pybind11;

namespace rgd_ext {
namespace {

// A parameter of a layer that has a spec, or null.
py::handle find(const py::dict& parameters, const std::shared_ptr<const LayerSpec>& spec, PyObject* key) {
  return spec ? PyDict_GetItemWithError(parameters.ptr(), key) : nullptr;
}

PyObject* const kWeight = PyUnicode_InternFromString("weight");
PyObject* const kBias = PyUnicode_InternFromString("bias");

}  // namespace

LayerCall::LayerCall(py::object context_, std::shared_ptr<NativeContext> native_, py::object name_,
                     py::dict parameters_, int64_t batch_size_, py::object rule_,
                     std::shared_ptr<const LayerSpec> spec_, py::object operands_)
    : context(std::move(context_)),
      native(std::move(native_)),
      name(std::move(name_)),
      parameters(std::move(parameters_)),
      weight(find(parameters, spec_, kWeight)),
      bias(find(parameters, spec_, kBias)),
      batch_size(batch_size_),
      rule(std::move(rule_)),
      spec(std::move(spec_)),
      operands(std::move(operands_)),
      number(native->call),
      inside(torch::autograd::get_current_graph_task_id()) {}

void bind_layer_call(py::module_& m) {
  py::class_<LayerSpec, std::shared_ptr<LayerSpec>>(m, "LayerSpec",
                                                    "What `layer_grads` has to know of a layer besides tensors.")
      .def(py::init<std::string, int64_t, double>(), py::arg("kind"), py::arg("groups"), py::arg("eps"))
      .def_readonly("kind", &LayerSpec::kind)
      .def_readonly("groups", &LayerSpec::groups)
      .def_readonly("eps", &LayerSpec::eps);
  py::class_<LayerCall, std::shared_ptr<LayerCall>>(m, "LayerCall", "One use of some parameters in a forward.")
      .def(py::init<py::object, std::shared_ptr<NativeContext>, py::object, py::dict, int64_t, py::object,
                    std::shared_ptr<LayerSpec>, py::object>(),
           py::arg("context"), py::arg("native"), py::arg("name"), py::arg("parameters"), py::arg("batch_size"),
           py::arg("rule") = py::none(), py::arg("spec") = py::none(), py::arg("operands") = py::none())
      .def_readonly("context", &LayerCall::context)
      .def_readonly("name", &LayerCall::name)
      .def_readonly("parameters", &LayerCall::parameters)
      .def_readonly("batch_size", &LayerCall::batch_size)
      .def_readonly("rule", &LayerCall::rule)
      .def_property_readonly("spec",
                             [](const LayerCall& call) { return std::const_pointer_cast<LayerSpec>(call.spec); })
      .def_readonly("number", &LayerCall::number)
      .def_readonly("inside", &LayerCall::inside)
      .def_readonly("operands", &LayerCall::operands);
}

}  // namespace rgd_ext
