#include "context.h"

#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>

#include "collector.h"

namespace py = pybind11;

namespace rgd_ext {

bool NativeContext::is_recording() const { return pauses == 0 && at::GradMode::is_enabled() && transform().is_none(); }

void bind_context(py::module_& m) {
  py::class_<NativeContext, std::shared_ptr<NativeContext>>(m, "NativeContext",
                                                            "The compiled half of `CaptureContext`.")
      .def(py::init<py::object, py::object>(), py::arg("receive"), py::arg("transform"))
      .def("is_recording", &NativeContext::is_recording, "Whether forwards are recorded now.")
      .def_readonly("pauses", &NativeContext::pauses)
      .def("pause", [](NativeContext& context) { ++context.pauses; })
      .def("resume", [](NativeContext& context) { --context.pauses; })
      .def(
          "begin_call",
          [](NativeContext& context, int64_t number, std::optional<int64_t> batch_size) {
            context.call = number;
            context.batch_size = batch_size;
          },
          py::arg("number"), py::arg("batch_size"), "A call of the model begins, or its batch size has become known.")
      .def("end_call", [](NativeContext& context) { context.batch_size.reset(); })
      .def(
          "begin_backward",
          [](NativeContext& context, const std::shared_ptr<Collector>& collector) { context.collector = collector; },
          py::arg("collector"), "Layers may hand what they get in a backward to its collector.")
      .def("watch", [](NativeContext& context, py::handle parameter) { context.watched.insert(parameter.ptr()); })
      .def("unwatch", [](NativeContext& context, py::handle parameter) { context.watched.erase(parameter.ptr()); });
}

}  // namespace rgd_ext
