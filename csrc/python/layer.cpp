// What the recorder of a layer (`LayerRecorder` of capture/recorders/layer.py) does around the forward in the usual
// case, in a fraction of the time: small models wait for it once per layer and step.

#include "layer.h"

#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>
#include <vector>

#include "layer_call.h"
#include "object.h"
#include "watch.h"

namespace py = pybind11;

namespace rgd_ext {
namespace {

using torch::autograd::variable_list;

bool is_plain_tensor(py::handle object) {
  return Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(THPVariableClass);
}

bool has_tangent(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  return meta && meta->fw_grad_;
}

// As long as it exists, the parameters are frozen, so that autograd computes no gradient of them.
struct Frozen {
  explicit Frozen(const variable_list& all) : parameters(all) {
    for (const at::Tensor& parameter : parameters) parameter.set_requires_grad(false);
  }
  ~Frozen() {
    for (const at::Tensor& parameter : parameters) parameter.set_requires_grad(true);
  }
  const variable_list& parameters;
};

// A place of a parameter: the dictionary of the module that owns it, its key there, and its name in the layer.
struct Place {
  py::dict parameters;
  py::object key, name;
};

struct Layer {
  Layer(py::object context_, std::shared_ptr<NativeContext> native_, py::object name_,
        const std::vector<std::tuple<py::dict, py::object, py::object>>& places_, py::object rule_,
        std::shared_ptr<LayerSpec> spec_, int64_t sample_ndim_)
      : context(std::move(context_)),
        native(std::move(native_)),
        name(std::move(name_)),
        rule(std::move(rule_)),
        spec(std::move(spec_)),
        sample_ndim(sample_ndim_) {
    for (const auto& [parameters, key, its_name] : places_) places.push_back({parameters, key, its_name});
  }

  // Whether `x` carries gradient and has the samples of the call under way in front.
  bool is_usual_input(py::handle x) const {
    if (!native->batch_size || !is_plain_tensor(x)) return false;
    const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
    return tensor.layout() == at::kStrided && tensor.requires_grad() && tensor.dim() > sample_ndim &&
           tensor.size(0) == *native->batch_size;
  }

  // The trainable parameters by name and in order; none where one is gone or not watched yet.
  std::pair<py::dict, variable_list> trainable() const {
    std::pair<py::dict, variable_list> found;
    for (const Place& place : places) {
      PyObject* const parameter = PyDict_GetItemWithError(place.parameters.ptr(), place.key.ptr());
      if (!parameter) return {};
      if (parameter == Py_None || !THPVariable_Unpack(parameter).requires_grad()) continue;
      if (!native->watched.contains(parameter)) return {};
      found.first[place.name] = py::handle(parameter);
      found.second.push_back(THPVariable_Unpack(parameter));
    }
    return found;
  }

  // The watched output of the layer for `x`, or None where more has to be looked at; nothing was done then.
  py::object run(const py::object& module, const py::object& forward, const py::object& x) const {
    if (!is_usual_input(x) || !native->is_recording()) return py::none();
    auto [names, parameters] = trainable();
    if (parameters.empty()) return py::none();
    py::object output;
    {
      const Frozen frozen(parameters);
      output = forward(module, x);
    }
    py::object call =
        py::cast(std::make_shared<LayerCall>(context, native, name, names, *native->batch_size, rule, spec));
    if (!is_plain_tensor(output) || has_tangent(THPVariable_Unpack(output.ptr()))) return py::make_tuple(call, output);
    const at::Tensor watched = watch(std::move(call), THPVariable_Unpack(output.ptr()), {THPVariable_Unpack(x.ptr())});
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(watched));
  }

  // Not const, so that the garbage collector can clear them: the context leads to the model and back to here.
  py::object context;
  const std::shared_ptr<NativeContext> native;
  const py::object name;
  std::vector<Place> places;
  py::object rule;
  const std::shared_ptr<const LayerSpec> spec;
  const int64_t sample_ndim;
};

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (py::detail::is_holder_constructed(self)) {
    const Layer& layer = py::cast<const Layer&>(py::handle(self));
    Py_VISIT(layer.context.ptr());
    Py_VISIT(layer.rule.ptr());
    for (const Place& place : layer.places) Py_VISIT(place.parameters.ptr());
  }
  return 0;
}

int clear(PyObject* self) {
  if (py::detail::is_holder_constructed(self)) {
    Layer& layer = py::cast<Layer&>(py::handle(self));
    layer.context = py::none();
    layer.rule = py::none();
    layer.places.clear();
  }
  return 0;
}

}  // namespace

void bind_layer(py::module_& m) {
  const py::custom_type_setup collected([](PyHeapTypeObject* type) {
    type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->ht_type.tp_traverse = traverse;
    type->ht_type.tp_clear = clear;
  });
  py::class_<Layer>(m, "Layer", "A recorded layer in the usual case.", collected)
      .def(py::init<py::object, std::shared_ptr<NativeContext>, py::object,
                    const std::vector<std::tuple<py::dict, py::object, py::object>>&, py::object,
                    std::shared_ptr<LayerSpec>, int64_t>(),
           py::arg("context"), py::arg("native"), py::arg("name"), py::arg("places"), py::arg("rule"), py::arg("spec"),
           py::arg("sample_ndim"))
      .def("run", &Layer::run, py::arg("module"), py::arg("forward"), py::arg("x"),
           "The watched output of the layer's forward; None if nothing was done; or the call and its output, "
           "unwatched.");
}

}  // namespace rgd_ext
