#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "layers.h"
#include "widen.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

template <typename S>
void linear_grads_kernel(const at::Tensor& output_grad, const at::Tensor& input, const Place& weight,
                         const std::optional<Place>& bias) {
  using T = accumulate_t<S>;
  const RowKernels<S>& rows = row_kernels<S>();
  const int64_t places = input.size(1), n = input.size(2), m = output_grad.size(2);
  const S *inputs = input.const_data_ptr<S>(), *grads = output_grad.const_data_ptr<S>();
  at::parallel_for(0, input.size(0), grain(places * n * m), [&](int64_t begin, int64_t end) {
    const Scratch<T> widened_grads(places * padded_columns(m)), by_output(m * places);
    const Scratch<T> sums(padded_columns(std::max(n, m)));
    const std::vector<T> ones(places, 1);
    for (int64_t sample = begin; sample < end; ++sample) {
      const Tile<S> x{inputs + sample * places * n, n, places, n}, e{grads + sample * places * m, m, places, m};
      const Tile<T> wide = widened(e, widened_grads.data());
      row_kernels<T>().transpose(wide.data, wide.stride, places, m, by_output.data(), places);
      for (int64_t output = 0; output < m; ++output) {
        rows.weighted_sum(x, by_output.data() + output * places, sums.data());
        rows.narrow(sums.data(), n, weight.row<S>(sample) + output * n);
      }
      if (!bias) continue;
      rows.weighted_sum(e, ones.data(), sums.data());
      rows.narrow(sums.data(), m, bias->row<S>(sample));
    }
  });
}

}  // namespace

void form_linear(const at::Tensor& output_grad, const at::Tensor& input, const Place& weight,
                 const std::optional<Place>& bias) {
  const at::Tensor grads = output_grad.contiguous(), inputs = input.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, inputs.scalar_type(), "linear_grads",
                                  [&] { linear_grads_kernel<scalar_t>(grads, inputs, weight, bias); });
}

}  // namespace rgd_ext::cpu
