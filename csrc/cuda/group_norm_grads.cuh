#pragma once

// Per-sample gradients of a GroupNorm's weight and bias: sum_t e_t x^_t and sum_t e_t per sample and channel. Each
// block has one group of one sample, which lies side by side; it is read for its mean, and again, from cache, with e.

#include "reduce.cuh"

namespace rgd_ext::cuda {

// Warps share a channel where there are fewer channels than warps.
constexpr int64_t channel_parts(int64_t channels) { return channels < kWarps ? kWarps / channels : 1; }

// Of one part of a channel, with x centred by a mean that was rounded.
struct ChannelSums {
  double values, squares, products, grads;  // of x, x^2, e x, e
};

// Doubles of shared memory: one per warp.
constexpr int64_t kGroupNormSharedBytes = kWarps * sizeof(double);

// output_grad and input (B, groups, channels, positions), weight and bias (B, groups, channels), sums (B, groups,
// channel_parts, channels).
template <typename S>
RGD_DEVICE void group_norm_grads(const S* output_grad, const S* input, int64_t channels, int64_t positions, double eps,
                                 ChannelSums* sums, S* weight, S* bias, char* memory) {
  using T = Accumulate<S>;
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int64_t parts = channel_parts(channels), first = block_index() * channels, all = channels * positions;
  const S *x = input + first * positions, *e = output_grad + first * positions;
  const double size = static_cast<double>(all > 0 ? all : 1);
  ChannelSums* own = sums + first * parts;
  double* shared = reinterpret_cast<double*>(memory);

  LongSum<T> values;
  for (int64_t i = thread_index(); i < all; i += kThreads) values.add(widen(x[i]));
  const double of_warp = warp_sum(values.total());
  if (lane == 0) shared[warp] = of_warp;
  barrier();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  const T mean = static_cast<T>(sum / size);

  for (int64_t unit = warp; unit < parts * channels; unit += kWarps) {
    const int64_t offset = unit % channels * positions;
    LongSum<T> values, squares, products, grads;
    for (int64_t i = unit / channels * kWarp + lane; i < positions; i += parts * kWarp) {
      const T value = widen(x[offset + i]) - mean, grad = widen(e[offset + i]);
      values.add(value);
      squares.add(value * value);
      products.add(value * grad);
      grads.add(grad);
    }
    const ChannelSums totals{warp_sum(values.total()), warp_sum(squares.total()), warp_sum(products.total()),
                             warp_sum(grads.total())};
    if (lane == 0) own[unit] = totals;
  }
  barrier();

  double rest = 0, squares = 0;
  for (int64_t unit = lane; unit < parts * channels; unit += kWarp) {
    rest += own[unit].values;
    squares += own[unit].squares;
  }
  rest = warp_sum(rest) / size;
  const double deviation = sqrt(warp_sum(squares) / size - rest * rest + eps);
  for (int64_t c = thread_index(); c < channels; c += kThreads) {
    double products = 0, grads = 0;
    for (int64_t part = 0; part < parts; ++part) {
      products += own[part * channels + c].products;
      grads += own[part * channels + c].grads;
    }
    narrow(static_cast<T>((products - rest * grads) / deviation), weight[first + c]);
    narrow(static_cast<T>(grads), bias[first + c]);
  }
}

}  // namespace rgd_ext::cuda
