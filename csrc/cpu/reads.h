#pragma once

// The two reads of G, shared by the operators: statistics, then a combination of the rows.

#include <ATen/core/Tensor.h>

#include <vector>

#include "work.h"

namespace rgd_ext::cpu {

// `matrices` have contiguous rows. alignments[i] = <g_i - g, g> and squared_norms[i] = |g_i - g|^2, both (B,), and
// means[t] = g, contiguous (*shape), or no means where they are not needed.
void read_moments(at::TensorList matrices, at::TensorList means, at::Tensor& alignments, at::Tensor& squared_norms);

// results[t] = sum_i weights[i] matrices[t][i], contiguous (*shape), for contiguous weights (B,) in accumulate_dtype.
void read_combination(at::TensorList matrices, const at::Tensor& weights, at::TensorList results);

}  // namespace rgd_ext::cpu
