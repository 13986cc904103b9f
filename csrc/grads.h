#pragma once

// What the operators of every device check of their arguments and allocate for their results. Per-sample gradients are
// a list of (B, *shape) tensors. The checks are those without which a kernel would read outside of a tensor or
// give nonsense. The public functions of rgd_ext/ops check before, and say more.

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

// Whoever looks into a list includes ATen/core/List.h, which takes longer to read than all that is included here.
namespace c10 {
template <typename T>
class List;
}

namespace rgd_ext {

// Raises where grads are not (B, *shape) tensors of one B, dtype and device.
void check_grads(at::TensorList grads);

// The dtype of sums over gradients of `dtype`.
inline at::ScalarType accumulate_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// grads themselves, or contiguous copies of those whose rows are not contiguous.
std::vector<at::Tensor> with_contiguous_rows(at::TensorList grads);

// One contiguous (*shape) tensor per (B, *shape) tensor, of the same dtype, not initialised.
std::vector<at::Tensor> empty_like_parameters(at::TensorList grads);

// One number per sample, (B,) in accumulate_dtype, not initialised.
at::Tensor empty_statistic(at::TensorList grads);

// `weights` of shape (B,), contiguous and in accumulate_dtype.
at::Tensor checked_weights(at::TensorList grads, const at::Tensor& weights);

// `epsilon` for precondition, a scalar in accumulate_dtype.
at::Tensor checked_epsilon(at::TensorList grads, const at::Tensor& epsilon);

// Raises where vectors are not of shape (*shape), or (k, *shape) with one k. Returns how many they are: one, or k.
int64_t check_vectors(at::TensorList grads, at::TensorList vectors);

// Raises where inputs and output gradients are not (B, *shape) tensors of one B, dtype and device, one of each for each
// of the layers, which are `count` according to the argument `name`.
void check_layers(at::TensorList inputs, at::TensorList output_grads, size_t count, const char* name);

// `check_layers` for linear layers with inputs (B, n) and output gradients (B, m).
void check_vector_layers(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases);

// Raises where `matrix` is not (B, B) of float64 or float32; symmetry itself is taken on trust.
void check_symmetric(const at::Tensor& matrix);

// Raises where alignments and squared_norms are not (B,) with one number in each of the others, of one dtype and
// device.
void check_statistics(const at::Tensor& squared_grad_norm, const at::Tensor& alignments,
                      const at::Tensor& squared_norms, const at::Tensor& epsilon);

// Raises where they are not of one shape with at least two dimensions, of one dtype and device.
void check_norm(const at::Tensor& output_grad, const at::Tensor& input);

// Raises where `groups` does not divide the channels.
void check_groups(int64_t groups, int64_t channels);

// What a message says of a tensor.
std::string described(const at::Tensor& tensor);

}  // namespace rgd_ext
