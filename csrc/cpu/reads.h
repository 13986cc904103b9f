#pragma once

// The two passes over G that operators have in common: the statistics, and then a combination of the rows.

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "work.h"

namespace rgd_ext::cpu {

// |g|^2, and of shape (B,) the alignments <g_i - g, g> and the squared norms |g_i - g|^2.
using Moments = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Of `matrices` with contiguous rows; and means[t] = g, contiguous (*shape). Where they are not needed there are no
// means, and |g|^2 is 0.
Moments read_moments(at::TensorList matrices, at::TensorList means, bool with_norm);

// results[t] = sum_i weights[i] matrices[t][i], contiguous (*shape), for contiguous weights (B,) in accumulate_dtype.
void read_combination(at::TensorList matrices, const at::Tensor& weights, at::TensorList results);

}  // namespace rgd_ext::cpu
