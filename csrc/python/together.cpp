#include "together.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../grads.h"
#include "object.h"

namespace py = pybind11;

namespace rgd_ext {
namespace {

const Attribute kArgs("args"), kBatchSize("batch_size"), kBias("bias"), kCapture("capture"), kEps("eps"),
    kInside("inside"), kKind("kind"), kNormalizedShape("normalized_shape"), kNumGroups("num_groups"),
    kParameters("parameters"), kRule("rule"), kSmall("small"), kTogether("together"), kWeight("weight");

// Of a norm: None stands for the rounding of the dtype that sums have.
double eps_of(py::handle module, const at::Tensor& input) {
  const py::object eps = kEps.of(module);
  if (!eps.is_none()) return eps.cast<double>();
  return accumulate_dtype(input.scalar_type()) == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                              : std::numeric_limits<float>::epsilon();
}

at::Tensor sequences(const at::Tensor& x) { return x.dim() > 3 ? x.flatten(1, -2) : x; }

}  // namespace

bool Together::Group::admits(const at::Tensor& grad) const {
  return grad.scalar_type() == grads[0].scalar_type() && grad.device() == grads[0].device();
}

at::Tensor Together::Group::form() const {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rgd_ext::layer_grads", "")
                             .typed<at::Tensor(const c10::List<std::string>&, at::TensorList, at::TensorList,
                                               at::IntArrayRef, at::ArrayRef<double>, const c10::List<bool>&)>();
  const py::gil_scoped_release unlocked;
  // Sums in the dtype they are given, even if backward is called under autocast.
  const c10::impl::ExcludeDispatchKeyGuard full_precision(c10::autocast_dispatch_keyset);
  return op.call(kinds, grads, inputs, groups, eps, biases);
}

void Together::begin(int64_t task, int64_t batch_size) {
  task_ = task;
  batch_size_ = batch_size;
  held_ = 0;
  groups_.clear();
}

bool Together::admit(py::handle record, const at::Tensor& input, const at::Tensor& grad) {
  return task_ == torch::autograd::get_current_graph_task_id() && kInside.of(record).cast<int>() == -1 &&
         kBatchSize.of(record).cast<int64_t>() == batch_size_ && take(record, input, grad);
}

bool Together::take(py::handle record, const at::Tensor& input, const at::Tensor& grad) {
  const py::object name = kKind.of(record);
  if (name.is_none()) return false;
  const int64_t bytes = input.nbytes() + grad.nbytes();
  const py::object parameters = kParameters.of(record);
  const py::handle weight = kWeight.in(parameters), bias = kBias.in(parameters);
  const at::ScalarType dtype = grad.scalar_type();
  if (bytes > each_ || held_ + bytes > all_ || !weight || THPVariable_Unpack(weight.ptr()).scalar_type() != dtype ||
      input.scalar_type() != dtype)
    return false;
  const auto kind = name.cast<std::string>();
  at::Tensor x = input, e = grad;
  int64_t channel_groups = 1;
  double eps = 0;
  if (kind == "linear") {
    if (input.dim() < 3) return false;
    x = sequences(input);
    e = sequences(grad);
    // Where gradients take much more memory than what they come from, there are better ways.
    if (x.size(2) * e.size(2) > share_ * x.size(1) * (x.size(2) + e.size(2))) return false;
  } else {
    const py::object module = py::reinterpret_borrow<py::tuple>(kArgs.of(kRule.of(record)))[0];
    if (kind == "group_norm")
      channel_groups = kNumGroups.of(module).cast<int64_t>();
    else if (py::len(kNormalizedShape.of(module)) != 1)
      return false;
    eps = eps_of(module, input);
  }
  auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& known) { return known.admits(grad); });
  if (group == groups_.end()) group = groups_.emplace(group);
  group->parameters.append(weight);
  if (bias) group->parameters.append(bias);
  group->kinds.push_back(kind);
  group->grads.push_back(std::move(e));
  group->inputs.push_back(std::move(x));
  group->groups.push_back(channel_groups);
  group->eps.push_back(eps);
  group->biases.push_back(bool(bias));
  held_ += bytes;
  return true;
}

py::list Together::contribute() {
  const std::vector<Group> groups = std::exchange(groups_, {});
  py::list found;
  for (const Group& group : groups) found.append(py::make_tuple(group.parameters, group.form()));
  return found;
}

Together* together_of(py::handle record) { return kTogether.of(kSmall.of(kCapture.of(record))).cast<Together*>(); }

void bind_together(py::module_& m) {
  py::class_<Together>(m, "Together", "Small layers of a backward, which `layer_grads` serves at its end.")
      .def(py::init<int64_t, int64_t, double>(), py::arg("each"), py::arg("all"), py::arg("share"))
      .def("begin", &Together::begin, py::arg("task"), py::arg("batch_size"))
      .def("take", &Together::take, py::arg("record"), py::arg("input"), py::arg("grad"))
      .def("contribute", &Together::contribute);
}

}  // namespace rgd_ext
