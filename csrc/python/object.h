#pragma once

// Python objects that autograd holds and calls.

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <memory>

namespace rgd_ext {

// A reference that autograd may drop in any thread, with or without the interpreter's lock, or after the interpreter's
// end.
inline std::shared_ptr<PyObject> shared(pybind11::object object) {
  return {object.release().ptr(), [](PyObject* pointer) {
            if (!Py_IsInitialized()) return;
            const pybind11::gil_scoped_acquire lock;
            Py_DECREF(pointer);
          }};
}

// What `call` returns under the interpreter's lock. An exception that Python raises there reaches the caller of
// backward().
template <typename Call>
auto in_python(const Call& call) {
  const pybind11::gil_scoped_acquire lock;
  try {
    return call();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error raised;
    raised.persist();
    throw raised;
  }
}

}  // namespace rgd_ext
