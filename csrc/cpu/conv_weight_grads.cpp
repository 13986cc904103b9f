#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "convolution.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

template <typename T>
void conv_weight_grads_kernel(const Convolution& conv, const at::Tensor& output_grad, const at::Tensor& input,
                              at::Tensor& result) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t places = conv.positions.size(), taps = conv.taps.size(), weights = conv.weights;
  const int64_t channels = output_grad.size(1) / conv.groups, panels = (channels + kChannels - 1) / kChannels;
  const int64_t widest = padded_columns(std::min(channels, kChannels));
  const int64_t pixels = conv.channels * volume(conv.size), padded_pixels = conv.channels * volume(conv.padded_size);
  const T *images = input.const_data_ptr<T>(), *grads = output_grad.const_data_ptr<T>();
  T* results = result.mutable_data_ptr<T>();
  at::parallel_for(0, output_grad.size(0) * conv.groups * panels, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> padded(conv.has_margin() ? padded_pixels : 0), block(kPositions * widest), products(taps * widest);
    if (conv.has_margin()) std::fill_n(padded.data(), padded_pixels, T{0});
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels, first = item % panels * kChannels;  // a group of some sample
      const int64_t count = std::min(kChannels, channels - first), width = padded_columns(count);
      const int64_t channel = group * channels + first;
      const T* image = images + group * pixels;
      if (conv.has_margin()) {
        conv.pad(image, conv.channels, padded.data());
        image = padded.data();
      }
      std::fill_n(block.data(), kPositions * width, T{0});
      std::fill_n(products.data(), taps * width, T{0});
      for (int64_t t = 0; t < places; t += kPositions) {
        const int64_t length = std::min(kPositions, places - t);
        rows.transpose(grads + channel * places + t, places, count, length, block.data(), width);
        rows.tap_products(image, conv.taps.data(), taps, conv.positions.data() + t, length, block.data(), width,
                          products.data());
      }
      rows.transpose(products.data(), width, weights, count, results + channel * weights, weights);
    }
  });
}

void conv_weight_grads(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       at::Tensor& out) {
  check_convolution(output_grad, input, kernel, stride, padding, dilation, groups);
  std::vector<int64_t> sizes{output_grad.size(0), output_grad.size(1), input.size(1) / groups};
  sizes.insert(sizes.end(), kernel.begin(), kernel.end());
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef(sizes) && out.is_contiguous(), "got out ", described(out),
                    ": pass a contiguous tensor of shape ", at::IntArrayRef(sizes));
  const Convolution conv(output_grad, input, kernel, stride, padding, dilation, groups);
  const at::ScalarType dtype = accumulate_dtype(input.scalar_type());
  const at::Tensor grads = output_grad.to(dtype).contiguous(), images = input.to(dtype).contiguous();
  at::Tensor result = out.scalar_type() == dtype ? out : at::empty(out.sizes(), images.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "conv_weight_grads",
                             [&] { conv_weight_grads_kernel<scalar_t>(conv, grads, images, result); });
  if (!result.is_same(out)) out.copy_(result);
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("conv_weight_grads", rgd_ext::cpu::conv_weight_grads); }
