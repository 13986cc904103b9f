#include "collector.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>

namespace py = pybind11;

namespace rgd_ext {
namespace {

at::Tensor sequences(const at::Tensor& x) { return x.dim() > 3 ? x.flatten(1, -2) : x; }

// The bucket for gradients like `grad`, made if it is new.
template <typename Bucket>
Bucket& bucket_for(std::vector<Bucket>& buckets, const at::Tensor& grad) {
  for (Bucket& bucket : buckets)
    if (bucket.grads[0].scalar_type() == grad.scalar_type() && bucket.grads[0].device() == grad.device()) return bucket;
  return buckets.emplace_back();
}

}  // namespace

at::Tensor Collector::SmallLayers::form() const {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rgd_ext::layer_grads", "")
                             .typed<at::Tensor(const c10::List<std::string>&, at::TensorList, at::TensorList,
                                               at::IntArrayRef, at::ArrayRef<double>, const c10::List<bool>&)>();
  const py::gil_scoped_release unlocked;
  // Sums in the dtype they are given, even if backward is called under autocast.
  const c10::impl::ExcludeDispatchKeyGuard full_precision(c10::autocast_dispatch_keyset);
  return op.call(kinds, grads, inputs, groups, eps, biases);
}

bool Collector::admit(const LayerCall& call, const at::Tensor& input, const at::Tensor& grad) {
  if (task_ != torch::autograd::get_current_graph_task_id() || call.inside != -1 || call.batch_size != batch_size_)
    return false;
  return take_vectors(call, input, grad) || take_small(call, input, grad);
}

bool Collector::take_vectors(const LayerCall& call, const at::Tensor& input, const at::Tensor& grad) {
  if (!call.spec || call.spec->kind != "linear" || grad.dim() != 2 || input.scalar_type() != grad.scalar_type())
    return false;
  const py::handle weight = call.weight, bias = call.bias;
  if (THPVariable_Unpack((weight ? weight : bias).ptr()).scalar_type() != grad.scalar_type()) return false;
  VectorLayers& bucket = bucket_for(vectors_, grad);
  if (bias) bucket.parameters.append(bias);
  if (weight) bucket.parameters.append(weight);
  bucket.inputs.push_back(weight ? input : input.new_empty({input.size(0), 0}));
  bucket.grads.push_back(grad);
  bucket.biases.push_back(bool(bias));
  return true;
}

bool Collector::take_small(const LayerCall& call, const at::Tensor& input, const at::Tensor& grad) {
  if (!call.spec) return false;
  const LayerSpec& spec = *call.spec;
  const int64_t bytes = input.nbytes() + grad.nbytes();
  const py::handle weight = call.weight, bias = call.bias;
  const at::ScalarType dtype = grad.scalar_type();
  if (bytes > each_ || held_ + bytes > all_ || !weight || THPVariable_Unpack(weight.ptr()).scalar_type() != dtype ||
      input.scalar_type() != dtype)
    return false;
  at::Tensor x = input, e = grad;
  if (spec.kind == "linear") {
    if (input.dim() < 3) return false;
    x = sequences(input);
    e = sequences(grad);
    // Where gradients take much more memory than what they come from, there are better strategies.
    if (x.size(2) * e.size(2) > share_ * x.size(1) * (x.size(2) + e.size(2))) return false;
  }
  SmallLayers& bucket = bucket_for(small_, grad);
  bucket.parameters.append(weight);
  if (bias) bucket.parameters.append(bias);
  bucket.kinds.push_back(spec.kind);
  bucket.grads.push_back(std::move(e));
  bucket.inputs.push_back(std::move(x));
  bucket.groups.push_back(spec.groups);
  bucket.eps.push_back(spec.eps);
  bucket.biases.push_back(bool(bias));
  held_ += bytes;
  return true;
}

py::list Collector::vectors() {
  py::list found;
  for (VectorLayers& bucket : std::exchange(vectors_, {}))
    found.append(py::make_tuple(bucket.parameters, std::move(bucket.inputs), std::move(bucket.grads), bucket.biases));
  return found;
}

py::list Collector::gradients() {
  const std::vector<SmallLayers> buckets = std::exchange(small_, {});
  py::list found;
  for (const SmallLayers& bucket : buckets) found.append(py::make_tuple(bucket.parameters, bucket.form()));
  return found;
}

void bind_collector(py::module_& m) {
  py::class_<Collector, std::shared_ptr<Collector>>(m, "Collector", "What layers hand over in one backward.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, double>(), py::arg("task"), py::arg("batch_size"),
           py::arg("each"), py::arg("all"), py::arg("share"))
      .def("take_vectors", &Collector::take_vectors, py::arg("call"), py::arg("input"), py::arg("grad"))
      .def("take_small", &Collector::take_small, py::arg("call"), py::arg("input"), py::arg("grad"))
      .def("vectors", &Collector::vectors)
      .def("gradients", &Collector::gradients);
}

}  // namespace rgd_ext
