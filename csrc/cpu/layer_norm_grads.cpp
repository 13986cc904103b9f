#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../grads.h"
#include "layers.h"
#include "rows.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

// Places whose gradients are summed in T; the sums of blocks are added up in double.
constexpr int64_t kBlock = 64;

template <typename S>
void layer_norm_grads_kernel(const at::Tensor& output_grad, const at::Tensor& input, double eps, bool centred,
                             const Place& weight, const std::optional<Place>& bias) {
  using T = accumulate_t<S>;
  const RowKernels<S>& rows = row_kernels<S>();
  const int64_t batch_size = input.size(0), columns = input.size(-1);
  const int64_t places = input.numel() / (batch_size * columns);
  const int64_t blocks = at::divup(places, kBlock), padded = padded_columns(columns);
  const S *inputs = input.const_data_ptr<S>(), *grads = output_grad.const_data_ptr<S>();
  const Scratch<T> sums(batch_size * blocks * 2 * padded);
  at::parallel_for(0, batch_size * blocks, grain(std::min(kBlock, places) * columns), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % blocks * kBlock, count = std::min(kBlock, places - first);
      const int64_t offset = (block / blocks * places + first) * columns;
      T* partial = sums.data() + block * 2 * padded;
      rows.normalised_products({inputs + offset, columns, count, columns}, {grads + offset, columns, count, columns},
                               eps, centred, partial, partial + padded);
    }
  });
  at::parallel_for(0, batch_size, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      S *weights = weight.row<S>(sample), *biases = bias ? bias->row<S>(sample) : nullptr;
      for (int64_t c = 0; c < columns; ++c) {
        const T* partial = sums.data() + sample * blocks * 2 * padded + c;
        double products = 0, total = 0;
        for (int64_t block = 0; block < blocks; ++block, partial += 2 * padded) {
          products += partial[0];
          total += partial[padded];
        }
        weights[c] = static_cast<S>(products);
        if (biases) biases[c] = static_cast<S>(total);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> layer_norm_grads(const at::Tensor& output_grad, const at::Tensor& input, double eps,
                                                    bool centred) {
  check_norm(output_grad, input);
  at::Tensor weight = at::empty({input.size(0), input.size(-1)}, input.options());
  at::Tensor bias = at::empty({input.size(0), input.size(-1)}, input.options());
  form_layer_norm(output_grad, input, eps, centred, {weight}, Place{bias});
  return {weight, bias};
}

}  // namespace

void form_layer_norm(const at::Tensor& output_grad, const at::Tensor& input, double eps, bool centred,
                     const Place& weight, const std::optional<Place>& bias) {
  if (input.size(0) * input.size(-1) == 0) return;
  const at::Tensor grads = output_grad.contiguous(), inputs = input.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, inputs.scalar_type(), "layer_norm_grads", [&] {
    layer_norm_grads_kernel<scalar_t>(grads, inputs, eps, centred, weight, bias);
  });
}

}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("layer_norm_grads", rgd_ext::cpu::layer_norm_grads); }
