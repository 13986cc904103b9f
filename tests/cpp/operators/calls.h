#pragma once

// Calls of the operators through the dispatcher, and comparisons of tensors.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../check.h"

namespace operator_tests {

using at::Tensor;
using Tensors = std::vector<Tensor>;

template <typename T>
c10::List<T> list_of(const std::vector<T>& values) {
  c10::List<T> list;
  for (const T& value : values) list.push_back(value);
  return list;
}

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
inline std::tuple<Tensors, Tensor, Tensor> moments(const Tensors& grads) {
  return find<std::tuple<Tensors, Tensor, Tensor>(at::TensorList)>("rgd_ext::moments").call(grads);
}
inline std::tuple<Tensor, Tensor, Tensor> scalar_moments(const Tensors& grads) {
  return find<std::tuple<Tensor, Tensor, Tensor>(at::TensorList)>("rgd_ext::scalar_moments").call(grads);
}
inline Tensors combine(const Tensors& grads, const Tensor& weights) {
  return find<Tensors(at::TensorList, const Tensor&)>("rgd_ext::combine").call(grads, weights);
}
inline Tensors diffusion_mv(const Tensors& grads, const Tensors& vectors) {
  return find<Tensors(at::TensorList, at::TensorList)>("rgd_ext::diffusion_mv").call(grads, vectors);
}
inline Tensor gram(const Tensors& grads) { return find<Tensor(at::TensorList)>("rgd_ext::gram").call(grads); }
inline Tensors precondition(const Tensors& grads, const Tensor& epsilon) {
  return find<Tensors(at::TensorList, const Tensor&)>("rgd_ext::precondition").call(grads, epsilon);
}

inline Tensor ghost_gram(const Tensors& inputs, const Tensors& output_grads, const std::vector<bool>& biases) {
  return find<Tensor(at::TensorList, at::TensorList, const c10::List<bool>&)>("rgd_ext::ghost_gram")
      .call(inputs, output_grads, list_of(biases));
}
inline Tensors ghost_combine(const Tensors& inputs, const Tensors& output_grads, const std::vector<bool>& biases,
                             const Tensor& weights) {
  using Signature = Tensors(at::TensorList, at::TensorList, const c10::List<bool>&, const Tensor&);
  return find<Signature>("rgd_ext::ghost_combine").call(inputs, output_grads, list_of(biases), weights);
}
inline Tensor largest_eigenvalue(const Tensor& matrix) {
  return find<Tensor(const Tensor&, double)>("rgd_ext::largest_eigenvalue").call(matrix, 0);
}
inline std::tuple<Tensor, Tensor, Tensor, Tensor> gram_moments(const Tensor& gram) {
  return find<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&)>("rgd_ext::gram_moments").call(gram);
}
inline std::tuple<Tensor, Tensor> sample_weights(const Tensor& squared_grad_norm, const Tensor& alignments,
                                                 const Tensor& squared_norms, const Tensor& epsilon) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);
  return find<Signature>("rgd_ext::sample_weights").call(squared_grad_norm, alignments, squared_norms, epsilon, 1e-7);
}
// Kernel, stride, padding and dilation of a convolution, each for both dimensions.
inline std::vector<std::vector<int64_t>> in_two_dimensions(const std::vector<int64_t>& geometry) {
  std::vector<std::vector<int64_t>> pairs;
  for (const int64_t number : geometry) pairs.push_back({number, number});
  return pairs;
}
inline Tensor conv_weight_grads(const Tensor& output_grad, const Tensor& x, const std::vector<int64_t>& geometry,
                                int64_t groups) {
  const auto of_two = in_two_dimensions(geometry);
  using Signature = void(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                         at::IntArrayRef, int64_t, Tensor&);
  Tensor out =
      at::empty({output_grad.size(0), output_grad.size(1), x.size(1) / groups, geometry[0], geometry[0]}, x.options());
  find<Signature>("rgd_ext::conv_weight_grads")
      .call(output_grad, x, of_two[0], of_two[1], of_two[2], of_two[3], groups, out);
  return out;
}
template <typename Result>
Result conv_statistics(const char* name, const Tensor& output_grad, const Tensor& x,
                       const std::vector<int64_t>& geometry) {
  const auto of_two = in_two_dimensions(geometry);
  using Signature =
      Result(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef);
  return find<Signature>(name).call(output_grad, x, of_two[0], of_two[1], of_two[2], of_two[3]);
}
inline Tensor conv_gram(const Tensor& output_grad, const Tensor& x, const std::vector<int64_t>& geometry) {
  return conv_statistics<Tensor>("rgd_ext::conv_gram", output_grad, x, geometry);
}
inline std::tuple<Tensor, Tensor, Tensor> conv_scalar_moments(const Tensor& output_grad, const Tensor& x,
                                                              const std::vector<int64_t>& geometry) {
  return conv_statistics<std::tuple<Tensor, Tensor, Tensor>>("rgd_ext::conv_scalar_moments", output_grad, x, geometry);
}
inline std::tuple<Tensor, Tensor> group_norm_grads(const Tensor& output_grad, const Tensor& x, int64_t groups,
                                                   double eps) {
  return find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, double)>("rgd_ext::group_norm_grads")
      .call(output_grad, x, groups, eps);
}
inline std::tuple<Tensor, Tensor> layer_norm_grads(const Tensor& output_grad, const Tensor& x, double eps,
                                                   bool centred) {
  return find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, bool)>("rgd_ext::layer_norm_grads")
      .call(output_grad, x, eps, centred);
}
inline Tensor layer_grads(const std::vector<std::string>& kinds, const Tensors& output_grads, const Tensors& inputs,
                          const std::vector<int64_t>& groups, const std::vector<double>& eps,
                          const std::vector<bool>& biases) {
  using Signature = Tensor(const c10::List<std::string>&, at::TensorList, at::TensorList, at::IntArrayRef,
                           at::ArrayRef<double>, const c10::List<bool>&);
  return find<Signature>("rgd_ext::layer_grads")
      .call(list_of(kinds), output_grads, inputs, groups, eps, list_of(biases));
}

// All columns of all tensors, as one (leading, d) matrix in double.
inline Tensor flat(const Tensors& tensors, int64_t leading) {
  Tensors matrices;
  for (const Tensor& tensor : tensors) matrices.push_back(tensor.reshape({leading, tensor.numel() / leading}));
  return at::cat(matrices, 1).to(at::kDouble);
}

// Whether the largest error is within `tolerance`, relative to the largest value in `scale`.
inline bool close(const Tensor& got, const Tensor& want, const Tensor& scale, double tolerance) {
  if (want.numel() == 0) return got.numel() == 0;
  const double error = (got.to(at::kDouble) - want).abs().max().item<double>();
  return error <= tolerance * scale.abs().max().item<double>();
}

// The tests of gradients.cpp and layers.cpp.
void test_layouts(at::ScalarType dtype);
void test_ghost_gram(at::ScalarType dtype);
void test_largest_eigenvalue();
void test_statistics_of_a_gramian();
void test_not_finite();
void test_no_columns();
void test_conv_weight_grads(at::ScalarType dtype);
void test_conv_statistics(at::ScalarType dtype);
void test_group_norm_grads(at::ScalarType dtype);
void test_layer_norm_grads(at::ScalarType dtype);
void test_layer_grads(at::ScalarType dtype);

}  // namespace operator_tests
