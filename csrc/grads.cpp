#include "grads.h"

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>

namespace rgd_ext {
namespace {

bool rows_are_contiguous(const at::Tensor& grad) {
  int64_t expected = 1;
  for (int64_t dim = grad.dim() - 1; dim > 0; expected *= grad.size(dim--)) {
    if (grad.size(dim) != 1 && grad.stride(dim) != expected) return false;
  }
  return true;
}

bool is_gradient(const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  const bool is_supported = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  return is_supported && tensor.dim() > 0 && tensor.size(0) > 0;
}

bool is_alike(const at::Tensor& left, const at::Tensor& right) {
  return left.scalar_type() == right.scalar_type() && left.device() == right.device();
}

}  // namespace

std::string described(const at::Tensor& tensor) {
  return c10::str(tensor.scalar_type(), tensor.sizes(), " on ", tensor.device());
}

void check_grads(at::TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "got no tensors: pass at least one");
  const at::Tensor& first = grads[0];
  for (const at::Tensor& grad : grads)
    TORCH_CHECK_VALUE(is_gradient(grad) && is_alike(grad, first) && grad.size(0) == first.size(0), "got ",
                      described(first), " and ", described(grad),
                      ": pass (B, *shape) tensors of float32, float64, bfloat16 or float16, of the same B > 0 and "
                      "dtype on one device");
}

std::vector<at::Tensor> with_contiguous_rows(at::TensorList grads) {
  std::vector<at::Tensor> matrices;
  matrices.reserve(grads.size());
  for (const at::Tensor& grad : grads) matrices.push_back(rows_are_contiguous(grad) ? grad : grad.contiguous());
  return matrices;
}

std::vector<at::Tensor> empty_like_parameters(at::TensorList grads) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(grads.size());
  for (const at::Tensor& grad : grads) tensors.push_back(at::empty(grad.sizes().slice(1), grad.options()));
  return tensors;
}

at::Tensor empty_statistic(at::TensorList grads) {
  return at::empty({grads[0].size(0)}, grads[0].options().dtype(accumulate_dtype(grads[0].scalar_type())));
}

at::Tensor checked_weights(at::TensorList grads, const at::Tensor& weights) {
  const at::Tensor& first = grads[0];
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == first.size(0) && weights.is_floating_point() &&
                        weights.device() == first.device(),
                    "got weights ", described(weights), " for gradients ", described(first),
                    ": pass one floating-point weight per sample on their device");
  return weights.to(accumulate_dtype(first.scalar_type())).contiguous();
}

at::Tensor checked_epsilon(at::TensorList grads, const at::Tensor& epsilon) {
  const at::Tensor& first = grads[0];
  TORCH_CHECK_VALUE(epsilon.numel() == 1 && epsilon.is_floating_point() && epsilon.device() == first.device(),
                    "got epsilon ", described(epsilon), " for gradients ", described(first),
                    ": pass one floating-point number on their device");
  return epsilon.reshape({}).to(accumulate_dtype(first.scalar_type()));
}

int64_t check_vectors(at::TensorList grads, at::TensorList vectors) {
  TORCH_CHECK_VALUE(grads.size() == vectors.size(), "got ", vectors.size(), " vectors for ", grads.size(),
                    " tensors of gradients: pass as many");
  const bool several = vectors[0].dim() == grads[0].dim();
  const int64_t count = several ? vectors[0].size(0) : 1;
  for (size_t t = 0; t < grads.size(); ++t) {
    const at::IntArrayRef shape = grads[t].sizes().slice(1);
    const at::Tensor& vector = vectors[t];
    const bool matches =
        several ? vector.dim() == grads[t].dim() && vector.size(0) == count && vector.sizes().slice(1) == shape
                : vector.sizes() == shape;
    TORCH_CHECK_VALUE(matches && is_alike(vector, grads[t]), "got vectors[", t, "] ", described(vector),
                      " for gradients ", described(grads[t]),
                      ": pass (*shape) or, with one k for all, (k, *shape), of their dtype and device");
  }
  return count;
}

void check_layers(at::TensorList inputs, at::TensorList output_grads, size_t count, const char* name) {
  TORCH_CHECK_VALUE(inputs.size() == output_grads.size() && inputs.size() == count, "got ", inputs.size(), " inputs, ",
                    output_grads.size(), " output gradients and ", count, " ", name, ": pass one of each per layer");
  check_grads(output_grads);
  check_grads(inputs);
  check_grads({output_grads[0], inputs[0]});
}

void check_vector_layers(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases) {
  check_layers(inputs, output_grads, biases.size(), "biases");
  for (size_t layer = 0; layer < inputs.size(); ++layer)
    TORCH_CHECK_VALUE(inputs[layer].dim() == 2 && output_grads[layer].dim() == 2, "got ", described(inputs[layer]),
                      " and ", described(output_grads[layer]), ": pass (B, n) and (B, m)");
}

void check_symmetric(const at::Tensor& matrix) {
  const at::ScalarType dtype = matrix.scalar_type();
  TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.size(0) > 0 &&
                        (dtype == at::kDouble || dtype == at::kFloat),
                    "got ", described(matrix), ": pass a symmetric (B, B) matrix of float64 or float32");
}

void check_statistics(const at::Tensor& squared_grad_norm, const at::Tensor& alignments,
                      const at::Tensor& squared_norms, const at::Tensor& epsilon) {
  const bool are_alike =
      is_alike(squared_norms, alignments) && is_alike(squared_grad_norm, alignments) && is_alike(epsilon, alignments);
  TORCH_CHECK_VALUE(are_alike && alignments.dim() == 1 && alignments.size(0) > 0 &&
                        squared_norms.sizes() == alignments.sizes() && squared_grad_norm.dim() == 0 &&
                        epsilon.dim() == 0,
                    "got |g|^2 ", described(squared_grad_norm), ", alignments ", described(alignments),
                    ", squared norms ", described(squared_norms), " and epsilon ", described(epsilon),
                    ": pass (), (B,), (B,) and () of one dtype on one device");
}

void check_norm(const at::Tensor& output_grad, const at::Tensor& input) {
  check_grads({output_grad, input});
  TORCH_CHECK_VALUE(input.dim() >= 2 && output_grad.sizes() == input.sizes(), "got output gradients ",
                    described(output_grad), " and inputs ", described(input),
                    ": pass two of one shape, (B, n) or more");
}

void check_groups(int64_t groups, int64_t channels) {
  TORCH_CHECK_VALUE(groups > 0 && channels % groups == 0, "got ", groups, " groups for ", channels,
                    " channels: pass a number that divides them");
}

}  // namespace rgd_ext
