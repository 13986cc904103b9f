#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "layers.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

// A group is read from memory for its mean, and again from cache.
template <typename S>
void group_norm_grads_kernel(const at::Tensor& output_grad, const at::Tensor& input, int64_t groups, double eps,
                             const Place& weight, const std::optional<Place>& bias) {
  using T = accumulate_t<S>;
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t all = input.size(0) * groups, channels = input.size(1) / groups;
  const int64_t positions = input.numel() / std::max<int64_t>(1, all * channels);
  const double size = std::max<int64_t>(1, channels * positions);
  const T *inputs = input.const_data_ptr<T>(), *grads = output_grad.const_data_ptr<T>();
  at::parallel_for(0, all, grain(channels * positions), [&](int64_t begin, int64_t end) {
    std::vector<CentredSums> sums(channels);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * channels;
      const T mean = static_cast<T>(rows.sum(inputs + first * positions, channels * positions) / size);
      double rest = 0, squares = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t offset = (first + c) * positions;
        sums[c] = rows.centred_sums(inputs + offset, grads + offset, positions, mean);
        rest += sums[c].values;
        squares += sums[c].squares;
      }
      rest /= size;  // of the mean, which was rounded
      const double deviation = std::sqrt(squares / size - rest * rest + eps);
      const int64_t sample = group / groups, channel = group % groups * channels;
      S *weights = weight.row<S>(sample) + channel, *biases = bias ? bias->row<S>(sample) + channel : nullptr;
      for (int64_t c = 0; c < channels; ++c) {
        weights[c] = static_cast<S>((sums[c].products - rest * sums[c].grads) / deviation);
        if (biases) biases[c] = static_cast<S>(sums[c].grads);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> group_norm_grads(const at::Tensor& output_grad, const at::Tensor& input,
                                                    int64_t groups, double eps) {
  check_norm(output_grad, input);
  check_groups(groups, input.size(1));
  at::Tensor weight = at::empty({input.size(0), input.size(1)}, input.options());
  at::Tensor bias = at::empty({input.size(0), input.size(1)}, input.options());
  form_group_norm(output_grad, input, groups, eps, {weight}, Place{bias});
  return {weight, bias};
}

}  // namespace

void form_group_norm(const at::Tensor& output_grad, const at::Tensor& input, int64_t groups, double eps,
                     const Place& weight, const std::optional<Place>& bias) {
  const at::ScalarType dtype = accumulate_dtype(input.scalar_type());
  const at::Tensor grads = output_grad.to(dtype).contiguous(), inputs = input.to(dtype).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "group_norm_grads",
                                  [&] { group_norm_grads_kernel<scalar_t>(grads, inputs, groups, eps, weight, bias); });
}

}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("group_norm_grads", rgd_ext::cpu::group_norm_grads); }
