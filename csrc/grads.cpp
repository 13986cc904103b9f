#include "grads.h"

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

}  // namespace

void check_grads(at::TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "grads is empty: pass at least one (B, *shape) tensor");
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    const at::ScalarType dtype = grad.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                     "grads[", i, "] has dtype ", dtype,
                     ": per-sample gradients are float32, float64, bfloat16 or float16; convert it first");
    TORCH_CHECK_VALUE(grad.dim() > 0, "grads[", i, "] is a scalar: its first dimension must be the batch, (B, *shape)");
    TORCH_CHECK_VALUE(grad.size(0) > 0, "empty batch: grads[", i, "] has shape ", grad.sizes(),
                      "; RGD needs at least one sample");
    TORCH_CHECK_VALUE(grad.size(0) == grads[0].size(0), "batch sizes disagree: grads[0] has ", grads[0].size(0),
                      " samples and grads[", i, "] has ", grad.size(0),
                      "; every tensor must be (B, *shape) with the same B");
    TORCH_CHECK_TYPE(dtype == grads[0].scalar_type(), "dtypes disagree: grads[0] is ", grads[0].scalar_type(),
                     " and grads[", i, "] is ", dtype, "; convert them to one");
    TORCH_CHECK_VALUE(grad.device() == grads[0].device(), "devices disagree: grads[0] is on ", grads[0].device(),
                      " and grads[", i, "] on ", grad.device(), "; move them to one device");
  }
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
  const int64_t batch_size = grads[0].size(0);
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == batch_size, "weights has shape ", weights.sizes(),
                    " but grads holds ", batch_size, " samples: pass one weight per sample");
  TORCH_CHECK_VALUE(weights.device() == grads[0].device(), "weights is on ", weights.device(), " but grads on ",
                    grads[0].device(), ": move them to one device");
  TORCH_CHECK_TYPE(at::isFloatingType(weights.scalar_type()), "weights has dtype ", weights.scalar_type(),
                   ": convert it to ", accumulate_dtype(grads[0].scalar_type()));
  return weights.to(accumulate_dtype(grads[0].scalar_type())).contiguous();
}

at::Tensor checked_epsilon(at::TensorList grads, const at::Tensor& epsilon) {
  TORCH_CHECK_VALUE(epsilon.numel() == 1, "epsilon has shape ", epsilon.sizes(), ": pass one number for all samples");
  TORCH_CHECK_VALUE(epsilon.device() == grads[0].device(), "epsilon is on ", epsilon.device(), " but grads on ",
                    grads[0].device(), ": move them to one device");
  TORCH_CHECK_TYPE(at::isFloatingType(epsilon.scalar_type()), "epsilon has dtype ", epsilon.scalar_type(),
                   ": convert it to ", accumulate_dtype(grads[0].scalar_type()));
  return epsilon.reshape({}).to(accumulate_dtype(grads[0].scalar_type()));
}

int64_t check_vectors(at::TensorList grads, at::TensorList vectors) {
  TORCH_CHECK_VALUE(grads.size() == vectors.size(), "grads has ", grads.size(), " tensors and vectors ", vectors.size(),
                    ": pass one vector per tensor");
  const bool several = vectors[0].dim() == grads[0].dim();
  const int64_t count = several ? vectors[0].size(0) : 1;
  for (size_t t = 0; t < grads.size(); ++t) {
    const at::IntArrayRef shape = grads[t].sizes().slice(1);
    const at::Tensor& vector = vectors[t];
    const bool matches =
        several ? vector.dim() == grads[t].dim() && vector.size(0) == count && vector.sizes().slice(1) == shape
                : vector.sizes() == shape;
    TORCH_CHECK_VALUE(matches, "vectors[", t, "] has shape ", vector.sizes(), ": expected ", shape,
                      " for one vector or (k, *shape) for k of them, the same k for every tensor");
    TORCH_CHECK_VALUE(vector.scalar_type() == grads[t].scalar_type() && vector.device() == grads[t].device(),
                      "vectors[", t, "] is ", vector.scalar_type(), " on ", vector.device(), " but grads[", t, "] is ",
                      grads[t].scalar_type(), " on ", grads[t].device(), ": convert one to the other");
  }
  return count;
}

void check_layers(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases) {
  check_grads(output_grads);
  TORCH_CHECK_VALUE(inputs.size() == output_grads.size() && biases.size() == inputs.size(), "got ", inputs.size(),
                    " inputs, ", output_grads.size(), " output gradients and ", biases.size(),
                    " biases: pass one of each per layer");
  const at::Tensor& first = output_grads[0];
  for (size_t layer = 0; layer < inputs.size(); ++layer) {
    const at::Tensor &input = inputs[layer], &grad = output_grads[layer];
    TORCH_CHECK_VALUE(input.dim() == 2 && grad.dim() == 2 && input.size(0) == first.size(0), "layer ", layer,
                      " has inputs of shape ", input.sizes(), " and output gradients of shape ", grad.sizes(),
                      ": expected (B, n) and (B, m) with B = ", first.size(0));
    TORCH_CHECK_VALUE(input.scalar_type() == first.scalar_type() && input.device() == first.device(), "inputs[", layer,
                      "] is ", input.scalar_type(), " on ", input.device(), " but output_grads[0] is ",
                      first.scalar_type(), " on ", first.device(), ": convert one to the other");
  }
}

void check_symmetric(const at::Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.size(0) > 0, "matrix has shape ",
                    matrix.sizes(), ": pass a symmetric (B, B) matrix");
  TORCH_CHECK_TYPE(matrix.scalar_type() == at::kDouble || matrix.scalar_type() == at::kFloat, "matrix has dtype ",
                   matrix.scalar_type(), ": convert it to float64 or float32");
}

void check_statistics(const at::Tensor& squared_grad_norm, const at::Tensor& alignments,
                      const at::Tensor& squared_norms, const at::Tensor& epsilon) {
  TORCH_CHECK_VALUE(alignments.dim() == 1 && alignments.size(0) > 0 && squared_norms.sizes() == alignments.sizes(),
                    "alignments and squared_norms have shapes ", alignments.sizes(), " and ", squared_norms.sizes(),
                    ": pass one of each per sample, (B,)");
  for (const at::Tensor* tensor : {&squared_grad_norm, &squared_norms, &epsilon}) {
    TORCH_CHECK_VALUE(tensor == &squared_norms || tensor->dim() == 0, "|g|^2 or epsilon has shape ", tensor->sizes(),
                      ": pass a scalar");
    TORCH_CHECK_VALUE(tensor->scalar_type() == alignments.scalar_type() && tensor->device() == alignments.device(),
                      "alignments is ", alignments.scalar_type(), " on ", alignments.device(), " but another argument ",
                      tensor->scalar_type(), " on ", tensor->device(), ": convert one to the other");
  }
}

void check_group_norm(const at::Tensor& output_grad, const at::Tensor& input, int64_t groups) {
  check_grads({output_grad, input});
  TORCH_CHECK_VALUE(input.dim() >= 2 && output_grad.sizes() == input.sizes(), "output_grad has shape ",
                    output_grad.sizes(), " and input ", input.sizes(), ": pass two tensors of shape (B, n, ...)");
  TORCH_CHECK_VALUE(groups > 0 && input.size(1) % groups == 0, "groups is ", groups, ": it must divide ", input.size(1),
                    " channels");
}

void check_layer_norm(const at::Tensor& output_grad, const at::Tensor& input) {
  check_grads({output_grad, input});
  TORCH_CHECK_VALUE(input.dim() >= 2 && output_grad.sizes() == input.sizes(), "output_grad has shape ",
                    output_grad.sizes(), " and input ", input.sizes(), ": pass two tensors of shape (B, ..., n)");
}

}  // namespace rgd_ext
