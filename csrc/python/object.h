#pragma once

// Python objects: in the hands of autograd, and their attributes.

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <memory>

namespace rgd_ext {

// Shared: autograd drops objects in any thread, with or without the interpreter's lock, or after its end.
inline std::shared_ptr<PyObject> shared(pybind11::object object) {
  return {object.release().ptr(), [](PyObject* pointer) {
            if (!Py_IsInitialized()) return;
            const pybind11::gil_scoped_acquire lock;
            Py_DECREF(pointer);
          }};
}

// An attribute, by a string that is made once.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  pybind11::object of(pybind11::handle object) const {
    PyObject* const found = PyObject_GetAttr(object.ptr(), name_);
    if (!found) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(found);
  }

  pybind11::handle in(pybind11::handle dict) const { return PyDict_GetItemWithError(dict.ptr(), name_); }

 private:
  PyObject* name_;
};

// What `call` returns, under the interpreter's lock; what Python raises there reaches whoever called backward().
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
