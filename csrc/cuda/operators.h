#pragma once

// The operators with CUDA kernels, as torch calls them. rgd_ext/ops says what they compute.

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../grads.h"

namespace rgd_ext::cuda {

std::vector<at::Tensor> combine_operator(at::TensorList grads, const at::Tensor& weights);

std::vector<at::Tensor> diffusion_mv_operator(at::TensorList grads, at::TensorList vectors);

at::Tensor embedding_gram_operator(const at::Tensor& keys, const at::Tensor& sums, int64_t table_rows,
                                   int64_t batch_size);

at::Tensor ghost_gram_operator(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gram_moments_operator(const at::Tensor& gram);

at::Tensor gram_operator(at::TensorList grads);

std::tuple<at::Tensor, at::Tensor> group_norm_grads_operator(const at::Tensor& output_grad, const at::Tensor& input,
                                                             int64_t groups, double eps);

at::Tensor largest_eigenvalue_operator(const at::Tensor& matrix, double ulp);

std::tuple<at::Tensor, at::Tensor> layer_norm_grads_operator(const at::Tensor& output_grad, const at::Tensor& input,
                                                             double eps, bool centred);

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> moments_operator(at::TensorList grads);

std::vector<at::Tensor> precondition_operator(at::TensorList grads, const at::Tensor& epsilon);

std::tuple<at::Tensor, at::Tensor> sample_weights_operator(const at::Tensor& squared_grad_norm,
                                                           const at::Tensor& alignments,
                                                           const at::Tensor& squared_norms, const at::Tensor& epsilon,
                                                           double ulp);

std::tuple<at::Tensor, at::Tensor, at::Tensor> scalar_moments_operator(at::TensorList grads);

}  // namespace rgd_ext::cuda
