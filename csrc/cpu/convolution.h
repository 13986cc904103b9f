#pragma once

// What the operators on convolutions share.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace rgd_ext::cpu {

// How many output channels and places are handled at a time. Measured: their output gradients stay in L1 while all taps
// are multiplied by them.
constexpr int64_t kChannels = 64, kPositions = 64;

// One number per dimension of space.
using Space = std::array<int64_t, 3>;

inline int64_t volume(const Space& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// A convolution of one sample and group: in place t of the output, weight r meets the pixel at taps[r] + positions[t]
// of the padded image.
struct Convolution {
  Convolution(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

  bool has_margin() const { return padded_size != size; }

  // The first `planes` channels of an image into the middle of `padded`, whose margins are zero.
  template <typename T>
  void pad(const T* image, int64_t planes, T* padded) const {
    for (int64_t plane = 0; plane < planes * size[0]; ++plane) {
      const int64_t target = plane / size[0] * padded_size[0] + plane % size[0] + margin[0];
      for (int64_t row = 0; row < size[1]; ++row, image += size[2])
        std::copy_n(image, size[2], padded + (target * padded_size[1] + row + margin[1]) * padded_size[2] + margin[2]);
    }
  }

  int64_t groups, channels, weights;
  Space size, margin, padded_size;
  std::vector<int64_t> taps, positions;
};

// Raises where the shapes are not those of a convolution.
void check_convolution(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

}  // namespace rgd_ext::cpu
