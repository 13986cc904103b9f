// The autograd node that ties a layer's output to its parameters. A node in Python, as in capture/native.py, would cost
// a multiple of it, once per layer and step.

#include "watch.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "collector.h"
#include "object.h"

namespace py = pybind11;

namespace rgd_ext {
namespace {

using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

bool requires_grad(const Edge& parameter) {
  const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(parameter.function.get());
  return !leaf || leaf->variable.requires_grad();
}

// Which parameters' gradients the backward under way accumulates, given the edges to them. Parameters that were frozen
// since the forward are not among them. None if the backward was asked to return one of the gradients.
std::optional<std::vector<bool>> wanted(c10::ArrayRef<Edge> parameters) {
  const auto* executed = torch::autograd::get_current_graph_task_exec_info();
  if (!executed) return std::nullopt;  // called by hand, not by a backward
  std::vector<bool> found;
  found.reserve(parameters.size());
  for (const Edge& edge : parameters) {
    if (executed->empty()) {  // all of the graph
      found.push_back(requires_grad(edge));
      continue;
    }
    const auto entry = executed->find(edge.function.get());
    if (entry != executed->end() && entry->second.captures_) return std::nullopt;
    found.push_back(entry != executed->end() && entry->second.should_execute() && requires_grad(edge));
  }
  return found;
}

// The identity. Its first edge leads to the layer, the others to the parameters. Python's garbage collector does not
// see into it: a module that keeps its layer's raw output lives as long as that.
struct Watch : torch::autograd::Node {
  Watch(edge_list edges, py::object call_, const variable_list& tensors)
      : Node(std::move(edges)), call(call_.cast<LayerCall&>()), owner(shared(std::move(call_))) {
    inputs.reserve(tensors.size());
    for (const at::Tensor& tensor : tensors) inputs.emplace_back(tensor, /*is_output=*/false);
  }

  std::string name() const override { return "rgd_ext::Watch"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& input : inputs) input.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    variable_list result(num_outputs());
    at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const auto which = wanted(c10::ArrayRef<Edge>(next_edges()).slice(1));
    const bool any = !which || std::find(which->begin(), which->end(), true) != which->end();
    if (any || at::GradMode::is_enabled()) {
      const variable_list tensors = any ? unpacked() : variable_list();
      const bool all = which && std::find(which->begin(), which->end(), false) == which->end();
      grad = in_python([&] {
        const std::shared_ptr<Collector> collector = call.native->collector.lock();
        if (all && !tensors.empty() && collector && collector->admit(call, tensors[0], grad)) return grad;
        return call.native->receive(py::handle(owner.get()), tensors, grad, which).cast<at::Tensor>();
      });
    }
    result[0] = grad;
    return result;
  }

  // Locked as in autograd's own nodes: another thread may release what a second backward still reads.
  variable_list unpacked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list tensors;
    tensors.reserve(inputs.size());
    for (const SavedVariable& input : inputs) tensors.push_back(input.unpack());
    return tensors;
  }

  const LayerCall& call;
  const std::shared_ptr<PyObject> owner;  // of the call
  std::vector<SavedVariable> inputs;
};

}  // namespace

at::Tensor watch(py::object call, const at::Tensor& output, const variable_list& inputs) {
  variable_list parameters;
  for (const auto& [name, parameter] : call.cast<LayerCall&>().parameters)
    parameters.push_back(THPVariable_Unpack(parameter.ptr()));
  edge_list edges = torch::autograd::collect_next_edges(output, parameters);
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  std::shared_ptr<Watch> node(new Watch(std::move(edges), std::move(call), inputs), torch::autograd::deleteNode);
#else
  auto node = c10::make_intrusive<Watch>(std::move(edges), std::move(call), inputs);
#endif
  // Detached, not viewed: in-place operations may follow, and version counters stay shared.
  at::Tensor result = output.detach();
  torch::autograd::create_gradient_edge(result, std::move(node));
  return result;
}

void bind_watch(py::module_& m) {
  m.def("watch", &watch, py::arg("call"), py::arg("output"), py::arg("inputs"),
        "The output, tied to the parameters of the call.");
}

}  // namespace rgd_ext
