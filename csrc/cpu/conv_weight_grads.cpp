#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "work.h"

namespace rgd_ext::cpu {
namespace {

// A work item has at most kChannels output channels of one sample. Measured: their gradients in kPositions places stay
// in L1 while all taps meet them.
constexpr int64_t kChannels = 64, kPositions = 64;

// Numbers per dimension of space.
using Space = std::array<int64_t, 3>;

// `missing` stands for dimensions that are not there.
Space in_space(at::IntArrayRef numbers, int64_t missing) {
  Space space;
  space.fill(missing);
  std::copy(numbers.begin(), numbers.end(), space.end() - numbers.size());
  return space;
}

int64_t volume(const Space& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Where the points of a grid lie in an image of `channels` planes of `sizes`, `step` apart.
std::vector<int64_t> offsets(const Space& sizes, int64_t channels, const Space& points, const Space& step) {
  std::vector<int64_t> found;
  found.reserve(channels * volume(points));
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t z = 0; z < points[0]; ++z)
      for (int64_t y = 0; y < points[1]; ++y)
        for (int64_t x = 0; x < points[2]; ++x)
          found.push_back(((c * sizes[0] + z * step[0]) * sizes[1] + y * step[1]) * sizes[2] + x * step[2]);
  return found;
}

// A convolution of one sample and group: in place t of the output, weight r meets the pixel at taps[r] + positions[t]
// of the padded image.
struct Convolution {
  Convolution(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups)
      : groups(groups),
        channels(input.size(1) / groups),
        size(in_space(input.sizes().slice(2), 1)),
        margin(in_space(padding, 0)) {
    for (int dim = 0; dim < 3; ++dim) padded_size[dim] = size[dim] + 2 * margin[dim];
    taps = offsets(padded_size, channels, in_space(kernel, 1), in_space(dilation, 1));
    positions = offsets(padded_size, 1, in_space(output_grad.sizes().slice(2), 1), in_space(stride, 1));
    weights = taps.size();
    // What the first pixel gives is computed and not used.
    taps.resize((weights + kTapBlock - 1) / kTapBlock * kTapBlock, 0);
  }

  // The image into the middle of `padded`, whose margins are zero.
  template <typename T>
  void pad(const T* image, T* padded) const {
    for (int64_t plane = 0; plane < channels * size[0]; ++plane) {
      const int64_t target = plane / size[0] * padded_size[0] + plane % size[0] + margin[0];
      for (int64_t row = 0; row < size[1]; ++row, image += size[2])
        std::copy_n(image, size[2], padded + (target * padded_size[1] + row + margin[1]) * padded_size[2] + margin[2]);
    }
  }

  int64_t groups, channels, weights;
  Space size, margin, padded_size;
  std::vector<int64_t> taps, positions;
};

template <typename T>
void conv_weight_grads_kernel(const Convolution& conv, const at::Tensor& output_grad, const at::Tensor& input,
                              at::Tensor& result) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t places = conv.positions.size(), taps = conv.taps.size(), weights = conv.weights;
  const int64_t channels = output_grad.size(1) / conv.groups, panels = (channels + kChannels - 1) / kChannels;
  const int64_t widest = padded_columns(std::min(channels, kChannels));
  const int64_t pixels = conv.channels * volume(conv.size), padded_pixels = conv.channels * volume(conv.padded_size);
  const bool has_margin = padded_pixels != pixels;
  const T *images = input.const_data_ptr<T>(), *grads = output_grad.const_data_ptr<T>();
  T* results = result.mutable_data_ptr<T>();
  at::parallel_for(0, output_grad.size(0) * conv.groups * panels, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> padded(has_margin ? padded_pixels : 0), block(kPositions * widest), products(taps * widest);
    if (has_margin) std::fill_n(padded.data(), padded_pixels, T{0});
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels, first = item % panels * kChannels;  // a group of some sample
      const int64_t count = std::min(kChannels, channels - first), width = padded_columns(count);
      const int64_t channel = group * channels + first;
      const T* image = images + group * pixels;
      if (has_margin) {
        conv.pad(image, padded.data());
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

void check_convolution(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       const at::Tensor& out) {
  check_grads({output_grad, input, out});
  const size_t space = input.dim() - 2;
  TORCH_CHECK_VALUE(input.dim() >= 3 && input.dim() <= 5 && output_grad.dim() == input.dim(), "output_grad has shape ",
                    output_grad.sizes(), " and input ", input.sizes(),
                    ": pass (B, m, *output) and (B, n, *space) with one to three dimensions of space");
  TORCH_CHECK_VALUE(
      kernel.size() == space && stride.size() == space && padding.size() == space && dilation.size() == space,
      "kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ", dilation,
      ": pass one number of each for each of ", space, " dimensions of space");
  TORCH_CHECK_VALUE(groups > 0 && input.size(1) % groups == 0 && output_grad.size(1) % groups == 0, "groups is ",
                    groups, ": it must divide ", output_grad.size(1), " and ", input.size(1), " channels");
  for (size_t dim = 0; dim < space; ++dim) {
    const int64_t places = output_grad.size(dim + 2), size = input.size(dim + 2) + 2 * padding[dim];
    TORCH_CHECK_VALUE(kernel[dim] > 0 && stride[dim] > 0 && padding[dim] >= 0 && dilation[dim] > 0 && places > 0 &&
                          (places - 1) * stride[dim] + (kernel[dim] - 1) * dilation[dim] < size,
                      "output_grad has ", places, " places along a dimension of ", input.size(dim + 2),
                      ", too many or too few for kernel ", kernel[dim], ", stride ", stride[dim], ", padding ",
                      padding[dim], " and dilation ", dilation[dim]);
  }
  std::vector<int64_t> sizes{output_grad.size(0), output_grad.size(1), input.size(1) / groups};
  sizes.insert(sizes.end(), kernel.begin(), kernel.end());
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef(sizes) && out.is_contiguous(), "out has shape ", out.sizes(),
                    ": pass a contiguous tensor of shape ", at::IntArrayRef(sizes));
}

void conv_weight_grads(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       at::Tensor& out) {
  check_convolution(output_grad, input, kernel, stride, padding, dilation, groups, out);
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
