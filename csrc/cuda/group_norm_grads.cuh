#pragma once

// Per-sample gradients of a GroupNorm's weight and bias: sum_t e_t x^_t and sum_t e_t per sample and channel. Each
// block has one group of one sample, which is contiguous. It reads the input for the mean, and again, from cache,
// together with e.

#include <algorithm>

#include "norms.cuh"

namespace rgd_ext::cuda {

// The sums of one part of a channel, where x is centred by the rounded mean.
template <typename T>
struct alignas(16) ChannelSums {
  T values, squares, products, grads;  // of x, x^2, e x, e
};

constexpr int kPairsTogether = 4;  // reads of x and of e that a lane has in flight

// How a channel is divided: into several parts where there are few channels. A few lanes share each part.
struct ChannelParts {
  int number, lanes;
};

// The division of channels that take `reads` reads: each lane has kPairsTogether of them if there are enough, and not
// more than a short sum of them.
constexpr ChannelParts channel_parts(int64_t channels, int64_t reads) {
  const int lanes = row_lanes((reads + kPairsTogether - 1) / kPairsTogether);
  const auto parts_of = [&](int64_t reads_of_lane) {
    return std::max<int64_t>((reads + lanes * reads_of_lane - 1) / (lanes * reads_of_lane), 1);
  };
  const int64_t number = std::clamp(kThreads / lanes / channels, parts_of(kShortSum), parts_of(kPairsTogether));
  return {static_cast<int>(number), lanes};
}

// One number for each warp.
template <typename S>
constexpr int64_t group_norm_shared_bytes() {
  return kWarps * sizeof(Accumulate<S>);
}

// The sums of one lane over `reads` reads.
template <int kCount, typename S>
RGD_DEVICE ChannelSums<Accumulate<S>> channel_sums(int64_t reads, const PairReader<kCount, S>& reader,
                                                   Accumulate<S> mean) {
  using T = Accumulate<S>;
  constexpr int kTogether = sizeof(T) == 8 ? kPairsTogether / 2 : kPairsTogether;  // sums in double take more registers
  ChannelSums<T> sums{};
  for_reads<kTogether>(reads, reader, [&](const auto& pair) {
    ChannelSums<T> terms{};
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const T value = pair.x[c] - mean, grad = pair.e[c];
      terms.values += value;
      terms.squares += value * value;
      terms.products += value * grad;
      terms.grads += grad;
    }
    sums.values += terms.values;
    sums.squares += terms.squares;
    sums.products += terms.products;
    sums.grads += terms.grads;
  });
  return sums;
}

// The mean of `count` contiguous elements, by all threads of a block. It is rounded: users correct for the error.
template <int kCount, typename S>
RGD_DEVICE Accumulate<S> rounded_mean(const S* input, int64_t count, Accumulate<S>* shared) {
  using T = Accumulate<S>;
  T sum = 0;
  const Reader<kCount, S> reader{input + thread_index() * kCount, kThreads * kCount};
  for_reads<8>(share_of(count / kCount, thread_index(), kThreads), reader, [&](const Loaded<kCount, S>& read) {
    T of_read = 0;
#pragma unroll
    for (int c = 0; c < kCount; ++c) of_read += read[c];
    sum += of_read;
  });
  sum = warp_sum(sum);
  if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = sum;
  barrier();
  T mean = 0;
  for (int w = 0; w < kWarps; ++w) mean += shared[w];
  return mean / static_cast<T>(static_cast<double>(count > 0 ? count : 1));
}

// output_grad and input (B, groups, channels, positions), weight and bias (B, groups, channels), sums (B, groups,
// parts, channels).
template <int kCount, typename S>
RGD_DEVICE void group_norm_grads(const S* output_grad, const S* input, int64_t channels, int64_t positions,
                                 const ChannelParts& parts, double eps, ChannelSums<Accumulate<S>>* sums, S* weight,
                                 S* bias, char* memory) {
  using T = Accumulate<S>;
  const int64_t first = block_index() * channels, all = channels * positions;
  const S *x = input + first * positions, *e = output_grad + first * positions;
  const double size = static_cast<double>(all > 0 ? all : 1);
  T* shared = reinterpret_cast<T*>(memory);

  const T mean = rounded_mean<kCount>(x, all, shared);

  const int lanes = parts.lanes, lane = thread_index() % lanes, teams = kThreads / lanes;
  const int64_t units = parts.number * channels, reads = positions / kCount, step = int64_t{parts.number} * lanes;
  ChannelSums<T>* own = sums + first * parts.number;
  int part = 0;
  int64_t channel = thread_index() / lanes;
  for (int64_t done = 0; done < units; done += teams, channel += teams) {
    for (; channel >= channels; channel -= channels) ++part;
    const bool mine = part < parts.number;  // other lanes stay with their warp for its shuffles
    const int64_t start = int64_t{part} * lanes + lane, offset = channel * positions + start * kCount;
    const PairReader<kCount, S> reader{x + offset, e + offset, step * kCount};
    const ChannelSums<T> found = channel_sums(mine ? share_of(reads, start, step) : 0, reader, mean);
    const ChannelSums<T> totals{warp_sum(found.values, lanes), warp_sum(found.squares, lanes),
                                warp_sum(found.products, lanes), warp_sum(found.grads, lanes)};
    if (mine && lane == 0) own[part * channels + channel] = totals;
  }
  barrier();

  if (thread_index() < kWarp) {
    double rest = 0, squares = 0;
    for (int64_t unit = thread_index(); unit < units; unit += kWarp) {
      rest += own[unit].values;
      squares += own[unit].squares;
    }
    rest = warp_sum(rest) / size;
    const double variance = warp_sum(squares) / size - rest * rest;
    shared[0] = static_cast<T>(rest);
    shared[1] = 1 / sqrt(static_cast<T>(variance + eps));
  }
  barrier();
  const T rest = shared[0], scale = shared[1];
  for (int64_t c = thread_index(); c < channels; c += kThreads) {
    double products = 0, grads = 0;
    for (int64_t part = 0; part < parts.number; ++part) {
      products += own[part * channels + c].products;
      grads += own[part * channels + c].grads;
    }
    narrow(static_cast<T>((products - rest * grads) * scale), weight[first + c]);
    narrow(static_cast<T>(grads), bias[first + c]);
  }
}

}  // namespace rgd_ext::cuda
