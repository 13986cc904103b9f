// What Layer of capture/taps.py does around a layer's forward, in the usual case and at a fraction of the price: small
// models wait for it once per layer and step.

#include "layer.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>

#include "object.h"
#include "watch.h"

namespace py = pybind11;

namespace rgd_ext {
namespace {

using torch::autograd::variable_list;

const Attribute kBatch("batch"), kBoundRule("_bound_rule"), kBuffers("_buffers"), kCapture("capture"),
    kDict("__dict__"), kForward("forward"), kGuards("guards"), kKind("_kind"), kMark("_rgd_ext_batch_dim"),
    kModule("module"), kName("name"), kParameters("_parameters"), kPrevious("previous"), kRecording("recording"),
    kSampleNdim("sample_ndim"), kSize("size"), kSlots("slots"), kWatch("_watch");

bool is_plain_tensor(py::handle object) {
  return Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(THPVariableClass);
}

// Whether `x` carries gradient and has the samples in front.
bool is_usual_input(py::handle x, py::handle batch_size, int64_t sample_ndim) {
  if (!is_plain_tensor(x) || batch_size.is_none()) return false;
  const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
  return tensor.layout() == at::kStrided && tensor.requires_grad() && tensor.dim() > sample_ndim &&
         tensor.size(0) == batch_size.cast<int64_t>();
}

// Whether the class of the module has the forward that runs, and the rule needs nothing that may change meanwhile.
bool is_usual_module(py::handle tap, py::handle module) {
  const py::object attributes = kDict.of(module);
  return kPrevious.of(tap).is_none() && !kMark.in(attributes) && !py::len(kBuffers.in(attributes));
}

// The trainable parameters in the places of a tap, by name and in order; none where one is gone or not watched yet.
std::pair<py::dict, variable_list> trainable(py::handle slots, py::handle guards) {
  std::pair<py::dict, variable_list> found;
  for (Py_ssize_t s = 0; s < PyList_GET_SIZE(slots.ptr()); ++s) {
    PyObject* const slot = PyList_GET_ITEM(slots.ptr(), s);  // owner, key, name
    PyObject* const parameter =
        PyDict_GetItemWithError(kParameters.of(PyTuple_GET_ITEM(slot, 0)).ptr(), PyTuple_GET_ITEM(slot, 1));
    if (!parameter) return {};
    if (parameter == Py_None || !THPVariable_Unpack(parameter).requires_grad()) continue;
    const auto id = py::reinterpret_steal<py::int_>(PyLong_FromVoidPtr(parameter));
    if (!PyDict_Contains(guards.ptr(), id.ptr())) return {};
    if (PyDict_SetItem(found.first.ptr(), PyTuple_GET_ITEM(slot, 2), parameter)) throw py::error_already_set();
    found.second.push_back(THPVariable_Unpack(parameter));
  }
  return found;
}

// While it lives autograd computes no gradient of the parameters.
struct Frozen {
  explicit Frozen(const variable_list& all) : parameters(all) {
    for (const at::Tensor& parameter : parameters) parameter.set_requires_grad(false);
  }
  ~Frozen() {
    for (const at::Tensor& parameter : parameters) parameter.set_requires_grad(true);
  }
  const variable_list& parameters;
};

bool has_tangent(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  return meta && meta->fw_grad_;
}

// The watched output of a forward of `tap`, or None where more has to be looked at; nothing was done then.
py::object run_layer(const py::object& tap, const py::tuple& args, const py::object& record_type) {
  const py::object capture = kCapture.of(tap), batch = kBatch.of(capture);
  if (args.size() != 1 || batch.is_none() || !kRecording.of(capture)().cast<bool>()) return py::none();
  const py::object module = kModule.of(tap), size = kSize.of(batch);
  const py::handle x = PyTuple_GET_ITEM(args.ptr(), 0);
  if (!is_usual_input(x, size, kSampleNdim.of(tap).cast<int64_t>()) || !is_usual_module(tap, module)) return py::none();
  auto [names, parameters] = trainable(kSlots.of(tap), kGuards.of(capture));
  if (parameters.empty()) return py::none();
  py::object output;
  {
    const Frozen frozen(parameters);
    output = kForward.of(py::type::handle_of(module))(module, x);
  }
  const py::object rule = kBoundRule.of(tap), kind = kKind.of(tap);
  if (!is_plain_tensor(output) || has_tangent(THPVariable_Unpack(output.ptr())))
    return kWatch.of(tap)(names, size, rule, output, args, kind);
  py::object record = record_type(capture, kName.of(tap), names, size, rule, kind);
  const at::Tensor watched =
      watch(std::move(record), THPVariable_Unpack(output.ptr()), {THPVariable_Unpack(x.ptr())}, parameters);
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(watched));
}

}  // namespace

void bind_layer(py::module_& m) {
  m.def("run_layer", &run_layer, py::arg("tap"), py::arg("args"), py::arg("record_type"),
        "The watched output of a layer's forward in the usual case, or None.");
}

}  // namespace rgd_ext
