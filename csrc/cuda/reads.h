#pragma once

// The two reads of G, shared by the operators: statistics, then a combination of the samples. Matrices have contiguous
// rows; everything is on the current device and stream.

#include <ATen/core/Tensor.h>

namespace rgd_ext::cuda {

// The statistics summed over the columns of each block, (2 * B, blocks) in double: the alignments, and below them the
// squared norms. means[t] = g, contiguous (*shape); `means` is empty if they are not needed.
at::Tensor read_moments(at::TensorList matrices, at::TensorList means);

// The number of vectors that one read of G serves.
constexpr int kTogether = 4;

// results[t][first + j] = sum_i weights[j, i] matrices[t][i] for contiguous weights (count, B) in accumulate_dtype, and
// results[t] of shape (*shape) or (k, *shape).
void read_combination(at::TensorList matrices, const at::Tensor& weights, int64_t first, at::TensorList results);

// The sums of the rows of `partials`, in `dtype`.
at::Tensor reduced(const at::Tensor& partials, at::ScalarType dtype);

// |v|^2, a scalar in accumulate_dtype, of tensors of any shape.
at::Tensor read_squared_norm(at::TensorList vector);

// The lanes of the tiles in both reads, the same in both so that equal weights give the bits of the mean; 0 if no tile
// of all samples fits in shared memory.
int lanes_on_chip(at::TensorList matrices);

}  // namespace rgd_ext::cuda
