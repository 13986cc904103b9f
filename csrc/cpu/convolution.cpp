#include "convolution.h"

#include "../grads.h"
#include "rows.h"

namespace rgd_ext::cpu {
namespace {

// `missing` stands for dimensions that are not there.
Space in_space(at::IntArrayRef numbers, int64_t missing) {
  Space space;
  space.fill(missing);
  std::copy(numbers.begin(), numbers.end(), space.end() - numbers.size());
  return space;
}

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

}  // namespace

Convolution::Convolution(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups)
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

void check_convolution(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_grads({output_grad, input});
  const size_t space = input.dim() - 2;
  bool is_valid = input.dim() >= 3 && input.dim() <= 5 && output_grad.dim() == input.dim() && kernel.size() == space &&
                  stride.size() == space && padding.size() == space && dilation.size() == space;
  for (size_t dim = 0; is_valid && dim < space; ++dim) {
    const int64_t places = output_grad.size(dim + 2), size = input.size(dim + 2) + 2 * padding[dim];
    is_valid = kernel[dim] > 0 && stride[dim] > 0 && padding[dim] >= 0 && dilation[dim] > 0 && places > 0 &&
               (places - 1) * stride[dim] + (kernel[dim] - 1) * dilation[dim] < size;
  }
  TORCH_CHECK_VALUE(is_valid, "got output gradients ", described(output_grad), " and inputs ", described(input),
                    " for kernel ", kernel, ", stride ", stride, ", padding ", padding, " and dilation ", dilation,
                    ": pass those of a convolution with one to three dimensions of space");
  check_groups(groups, input.size(1));
  check_groups(groups, output_grad.size(1));
}

}  // namespace rgd_ext::cpu
