#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "work.h"

namespace rgd_ext::cpu {
namespace {

// Output channels of one work item, at most, and positions whose output gradients stay in L1 meanwhile.
constexpr int64_t kChannels = 64, kPositions = 64;

using Sizes = std::array<int64_t, 3>;

// Missing leading dimensions have size 1.
Sizes three(at::IntArrayRef sizes, int64_t missing) {
  Sizes result;
  result.fill(missing);
  std::copy(sizes.begin(), sizes.end(), result.end() - sizes.size());
  return result;
}

int64_t volume(const Sizes& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// A convolution of one sample and group, as shifts in an image with its padding: the weight at `taps[r]` meets the
// pixel at taps[r] + positions[t] in the output's place t.
struct Shifts {
  int64_t channels;
  Sizes input, output, kernel, padding, padded;
  std::vector<int64_t> taps, positions;

  int64_t weights() const { return channels * volume(kernel); }
  int64_t pixels() const { return channels * volume(input); }
  bool is_padded() const { return padded != input; }
};

// The image into the middle of `padded`, whose margins are zero.
template <typename T>
void pad(const Shifts& shifts, const T* image, T* padded) {
  const auto& [channels, input, output, kernel, padding, size, taps, positions] = shifts;
  for (int64_t plane = 0; plane < channels * input[0]; ++plane) {
    const int64_t target = plane / input[0] * size[0] + plane % input[0] + padding[0];
    for (int64_t row = 0; row < input[1]; ++row, image += input[2])
      std::copy_n(image, input[2], padded + (target * size[1] + row + padding[1]) * size[2] + padding[2]);
  }
}

template <typename T>
void conv_weight_grads_kernel(const Shifts& shifts, const at::Tensor& output_grad, const at::Tensor& input,
                              int64_t groups, at::Tensor& result) {
  const int64_t places = volume(shifts.output), weights = shifts.weights(), pixels = shifts.pixels();
  const int64_t channels = output_grad.size(1) / groups, panels = (channels + kChannels - 1) / kChannels;
  const int64_t widest = padded_columns(std::min(channels, kChannels)), taps = shifts.taps.size();
  const T *images = input.const_data_ptr<T>(), *grads = output_grad.const_data_ptr<T>();
  T* results = result.mutable_data_ptr<T>();
  at::parallel_for(0, output_grad.size(0) * groups * panels, 1, [&](int64_t begin, int64_t end) {
    const int64_t padded_pixels = shifts.is_padded() ? shifts.channels * volume(shifts.padded) : 0;
    const Scratch<T> padded(padded_pixels), transposed(places * widest), products(taps * widest);
    std::fill_n(padded.data(), padded_pixels, T{0});
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels, first = item % panels * kChannels;
      const int64_t count = std::min(kChannels, channels - first), width = padded_columns(count);
      const T* image = images + group * pixels;
      if (shifts.is_padded()) {
        pad(shifts, image, padded.data());
        image = padded.data();
      }
      const int64_t channel = group * channels + first;
      if (count < width) std::fill_n(transposed.data(), places * width, T{0});
      row_kernels<T>().transpose(grads + channel * places, places, count, places, transposed.data(), width);
      std::fill_n(products.data(), taps * width, T{0});
      for (int64_t t = 0; t < places; t += kPositions)
        row_kernels<T>().tap_products(image, shifts.taps.data(), taps, shifts.positions.data() + t,
                                      std::min(kPositions, places - t), transposed.data() + t * width, width,
                                      products.data());
      row_kernels<T>().transpose(products.data(), width, weights, count, results + channel * weights, weights);
    }
  });
}

at::Tensor conv_weight_grads(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups) {
  Shifts shifts{input.size(1) / groups,
                three(input.sizes().slice(2), 1),
                three(output_grad.sizes().slice(2), 1),
                three(kernel, 1),
                three(padding, 0),
                {},
                {},
                {}};
  const Sizes strides = three(stride, 1), dilations = three(dilation, 1);
  for (int dim = 0; dim < 3; ++dim) shifts.padded[dim] = shifts.input[dim] + 2 * shifts.padding[dim];
  const auto offsets = [&](int64_t channels, const Sizes& sizes, const Sizes& steps) {
    std::vector<int64_t> result;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t z = 0; z < sizes[0]; ++z)
        for (int64_t y = 0; y < sizes[1]; ++y)
          for (int64_t x = 0; x < sizes[2]; ++x)
            result.push_back(((c * shifts.padded[0] + z * steps[0]) * shifts.padded[1] + y * steps[1]) *
                                 shifts.padded[2] + x * steps[2]);
    return result;
  };
  shifts.taps = offsets(shifts.channels, shifts.kernel, dilations);
  shifts.positions = offsets(1, shifts.output, strides);
  shifts.taps.resize((shifts.taps.size() + kTapBlock - 1) / kTapBlock * kTapBlock, 0);
  std::vector<int64_t> sizes{output_grad.size(0), output_grad.size(1), shifts.channels};
  sizes.insert(sizes.end(), kernel.begin(), kernel.end());
  at::Tensor result = at::empty(sizes, input.options());
  const at::Tensor grads = output_grad.contiguous(), images = input.contiguous();
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv_weight_grads", [&] {
    conv_weight_grads_kernel<scalar_t>(shifts, grads, images, groups, result);
  });
  return result;
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("conv_weight_grads", rgd_ext::cpu::conv_weight_grads); }
