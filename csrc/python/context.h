#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_set>
#include <utility>

namespace rgd_ext {

class Collector;

// The compiled half of `CaptureContext` of capture/context.py: what every layer asks before and after its forward. It
// is used under the interpreter's lock.
struct NativeContext {
  NativeContext(pybind11::object receive_, pybind11::object transform_)
      : receive(std::move(receive_)), transform(std::move(transform_)) {}

  // Whether forwards are recorded now: not while paused, without gradients, or inside a transform of torch.func.
  bool is_recording() const;

  // (call, inputs, output gradient, wanted) -> the gradient to pass on; called in the backward of a layer.
  const pybind11::object receive;
  // () -> the transform of torch.func under way, or None. It is a function of torch's Python module, since the headers
  // of the transforms include others that torch does not install.
  const pybind11::object transform;
  // Reasons not to record: blocks of `paused()`, and the end of the capture.
  int64_t pauses = 0;
  // The call of the model under way: its number, and its number of samples if that is known.
  int64_t call = 0;
  std::optional<int64_t> batch_size;
  // Trainable parameters whose gradients are watched, by the addresses of their Python objects.
  std::unordered_set<const PyObject*> watched;
  // The collector of the backward under way.
  std::weak_ptr<Collector> collector;
};

// Adds `NativeContext` to the module.
void bind_context(pybind11::module_& m);

}  // namespace rgd_ext
