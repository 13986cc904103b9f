#pragma once

// Per-sample gradients of layers, from their inputs and output gradients of one dtype, written where the caller wants
// them. The bits do not depend on the number of threads.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace rgd_ext::cpu {

// Where gradients are written: those of sample i to row i of a matrix with contiguous rows, from `column` on.
struct Place {
  template <typename S>
  S* row(int64_t sample) const {
    return matrix.mutable_data_ptr<S>() + sample * matrix.stride(0) + column;
  }

  const at::Tensor& matrix;
  int64_t column = 0;
};

// y = W x + b with inputs (B, T, n) and output gradients (B, T, m): sum_t e_it x_it^T, and sum_t e_it.
void form_linear(const at::Tensor& output_grad, const at::Tensor& input, const Place& weight,
                 const std::optional<Place>& bias);

// LayerNorm, or RMSNorm if not centred, over the last dimension of (B, ..., n): sum_t e_it o x^_it, and sum_t e_it.
void form_layer_norm(const at::Tensor& output_grad, const at::Tensor& input, double eps, bool centred,
                     const Place& weight, const std::optional<Place>& bias);

// GroupNorm of (B, n, ...): the same per channel.
void form_group_norm(const at::Tensor& output_grad, const at::Tensor& input, int64_t groups, double eps,
                     const Place& weight, const std::optional<Place>& bias);

}  // namespace rgd_ext::cpu
