// The autograd node of capture/nodes.py that ties a layer's output to its parameters, at a fraction of what a node in
// Python costs once per layer and step.

#include "watch.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace rgd_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a node keeps of one use of a layer. Nodes die in any thread, with or without the interpreter's lock. Python's
// garbage collector does not see into it: a module that keeps its layer's raw output lives as long as that.
struct Use : torch::CustomClassHolder {
  py::object record;
  // Of the parameters; the node's edges keep them alive.
  std::vector<torch::autograd::Node*> accumulators;

  explicit Use(py::object record) : record(std::move(record)) {}
  ~Use() override {
    if (!Py_IsInitialized()) {
      record.release();
      return;
    }
    const py::gil_scoped_acquire lock;
    record = py::object();
  }
};

// Which parameters' gradients the backward under way accumulates; none where it was asked to return one of them.
std::optional<std::vector<bool>> wanted(const Use& use) {
  const auto* executed = torch::autograd::get_current_graph_task_exec_info();
  if (!executed) return std::nullopt;  // called by hand, not by a backward
  std::vector<bool> found;
  for (torch::autograd::Node* accumulator : use.accumulators) {
    if (executed->empty()) {  // all of the graph
      found.push_back(true);
      continue;
    }
    const auto entry = executed->find(accumulator);
    if (entry != executed->end() && entry->second.captures_) return std::nullopt;
    found.push_back(entry != executed->end() && entry->second.should_execute());
  }
  return found;
}

struct Watch : torch::autograd::Function<Watch> {
  static at::Tensor forward(AutogradContext* context, const c10::intrusive_ptr<Use>& use, const at::Tensor& output,
                            const variable_list* inputs, at::TensorList parameters) {
    for (const at::Tensor& parameter : parameters)
      use->accumulators.push_back(torch::autograd::impl::gradient_edge(parameter).function.get());
    context->saved_data["use"] = c10::IValue::make_capsule(use);
    context->save_for_backward(*inputs);
    context->set_materialize_grads(false);
    // Detached, not viewed: in-place operations may follow, and version counters stay shared.
    return output.detach();
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto use = c10::static_intrusive_pointer_cast<Use>(context->saved_data["use"].toCapsule());
    variable_list result(3 + use->accumulators.size());  // the arguments of forward
    at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const auto which = wanted(*use);
    const bool any = !which || std::find(which->begin(), which->end(), true) != which->end();
    if (any || at::GradMode::is_enabled()) {
      const variable_list inputs = any ? context->get_saved_variables() : variable_list();
      const py::gil_scoped_acquire lock;
      try {
        grad = use->record.attr("receive")(inputs, grad, which).cast<at::Tensor>();
      } catch (py::error_already_set& error) {
        error.restore();
        python_error raised;
        raised.persist();
        throw raised;
      }
    }
    result[1] = grad;
    return result;
  }
};

at::Tensor watch(py::object record, const at::Tensor& output, const variable_list& inputs,
                 const variable_list& parameters) {
  return Watch::apply(c10::make_intrusive<Use>(std::move(record)), output, &inputs, at::TensorList(parameters));
}

}  // namespace

void bind_watch(py::module_& m) {
  m.def("watch", &watch, py::arg("record"), py::arg("output"), py::arg("inputs"), py::arg("parameters"),
        "The output, tied to the parameters; its gradient goes to record.receive(inputs, gradient, wanted).");
}

}  // namespace rgd_ext
