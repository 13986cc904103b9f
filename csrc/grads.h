#pragma once

// What the operators of every device check of their arguments and allocate for their results. Per-sample gradients are
// a list of (B, *shape) tensors.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

namespace rgd_ext {

// Raises where grads is not a list of per-sample gradients of one batch size, dtype and device.
void check_grads(at::TensorList grads);

// The dtype of sums over gradients of `dtype`.
inline at::ScalarType accumulate_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// grads themselves, or contiguous copies of those whose rows are not contiguous.
std::vector<at::Tensor> with_contiguous_rows(at::TensorList grads);

// One contiguous (*shape) tensor per (B, *shape) tensor, of the same dtype, not initialised.
std::vector<at::Tensor> empty_like_parameters(at::TensorList grads);

// One number per sample, (B,) in accumulate_dtype, not initialised.
at::Tensor empty_statistic(at::TensorList grads);

// `weights` of shape (B,) for combine, contiguous and in accumulate_dtype.
at::Tensor checked_weights(at::TensorList grads, const at::Tensor& weights);

// `epsilon` for precondition, a scalar in accumulate_dtype.
at::Tensor checked_epsilon(at::TensorList grads, const at::Tensor& epsilon);

// Raises where vectors are not of shape (*shape), or (k, *shape) with one k. Returns how many they are: one, or k.
int64_t check_vectors(at::TensorList grads, at::TensorList vectors);

// Raises where linear layers don't have inputs (B, n) and output gradients (B, m) of one dtype and device.
void check_layers(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases);

// Raises where `matrix` is not (B, B) of float64 or float32; symmetry itself is taken on trust.
void check_symmetric(const at::Tensor& matrix);

// Raises where alignments and squared_norms are not (B,) with one number in each of the others, of one dtype and
// device.
void check_statistics(const at::Tensor& squared_grad_norm, const at::Tensor& alignments,
                      const at::Tensor& squared_norms, const at::Tensor& epsilon);

// Raises where they are not of one shape (B, n, ...), dtype and device, or `groups` does not divide n.
void check_group_norm(const at::Tensor& output_grad, const at::Tensor& input, int64_t groups);

// Raises where they are not of one shape (B, ..., n), dtype and device.
void check_layer_norm(const at::Tensor& output_grad, const at::Tensor& input);

}  // namespace rgd_ext
