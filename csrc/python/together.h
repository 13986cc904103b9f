#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace rgd_ext {

// What small layers hand over in one backward for `layer_grads` to form at its end: the part of capture/small.py that
// small models wait for once per layer. Used under the interpreter's lock.
class Together {
 public:
  // `each` and `all`: bytes of inputs and output gradient that a layer, and all together, may hold. A linear layer's
  // gradients may take `share` times the memory of those.
  Together(int64_t each, int64_t all, double share) : each_(each), all_(all), share_(share) {}

  // Forget what was taken. Until the next call, layers of this backward and batch size need no more than `take`.
  void begin(int64_t task, int64_t batch_size);

  // Take what a record gets in the backward under way, if that has begun and the record has the right batch size.
  bool admit(pybind11::handle record, const at::Tensor& input, const at::Tensor& grad);

  // Take a use of a layer, if it is small and of those that `layer_grads` serves.
  bool take(pybind11::handle record, const at::Tensor& input, const at::Tensor& grad);

  // By dtype and device, the parameters and their contributions side by side, (B, D). What was taken is forgotten.
  pybind11::list contribute();

 private:
  // Layers of one dtype and device, as `layer_grads` takes them.
  struct Group {
    bool admits(const at::Tensor& grad) const;
    at::Tensor form() const;

    pybind11::list parameters;
    c10::List<std::string> kinds;
    std::vector<at::Tensor> grads, inputs;
    std::vector<int64_t> groups;
    std::vector<double> eps;
    c10::List<bool> biases;
  };

  const int64_t each_, all_;
  const double share_;
  int64_t task_ = -1, batch_size_ = 0, held_ = 0;
  std::vector<Group> groups_;
};

// Those of the capture of `record`.
Together* together_of(pybind11::handle record);

// Adds `Together` to the module.
void bind_together(pybind11::module_& m);

}  // namespace rgd_ext
