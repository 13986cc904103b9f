#pragma once

// Shared by the gradients of LayerNorm and GroupNorm: a few lanes of a warp read a row of a contiguous tensor in wide
// loads, several of which are in flight.

#include "reduce.cuh"

namespace rgd_ext::cuda {

// Sums of at most this many terms are accumulated in T.
constexpr int64_t kShortSum = 32;

// Whether all rows of `columns` elements start on 16 bytes.
template <typename S>
bool on_packets(const S* output_grad, const S* input, int64_t columns) {
  const uintptr_t starts = reinterpret_cast<uintptr_t>(output_grad) | reinterpret_cast<uintptr_t>(input);
  return starts % 16 == 0 && columns % Packet<S>::kColumns == 0;
}

// kCount neighbouring elements in one load: a packet if every row starts on 16 bytes, and one element otherwise. Two
// elements of two bytes share a register until they are used.
template <int kCount, typename S>
class Loaded {
  static constexpr bool kWide = kCount * sizeof(S) == 16;
  static_assert(kWide || kCount == 1);
  using Word = std::conditional_t<kWide && sizeof(S) == 2, uint32_t, S>;
  struct alignas(kCount * sizeof(S)) Words {
    Word words[kCount * sizeof(S) / sizeof(Word)];
  };

 public:
  Loaded() = default;
  RGD_DEVICE explicit Loaded(const S* from) {
    if constexpr (kWide) {
      held_ = load_packet<Words>(from);
    } else {
      held_.words[0] = *from;
    }
  }

  RGD_DEVICE Accumulate<S> operator[](int c) const {
    if constexpr (sizeof(Word) == sizeof(S)) {
      return widen(held_.words[c]);
    } else {
      return widen(S{static_cast<uint16_t>(held_.words[c / 2] >> c % 2 * 16)});
    }
  }

 private:
  Words held_;
};

// Rounds kCount neighbouring values and stores them together.
template <int kCount, typename T, typename R>
RGD_DEVICE void store(const T (&values)[kCount], R* to) {
  struct alignas(kCount * sizeof(R) < 16 ? kCount * sizeof(R) : 16) Rounded {
    R elements[kCount];
  } rounded;
#pragma unroll
  for (int c = 0; c < kCount; ++c) narrow(values[c], rounded.elements[c]);
  *reinterpret_cast<Rounded*>(to) = rounded;
}

// Reads kCount neighbouring elements at `next`, `next` + `step`, ...
template <int kCount, typename S>
struct Reader {
  const S* next;
  int64_t step;

  RGD_DEVICE Loaded<kCount, S> read() const { return Loaded<kCount, S>(next); }
  RGD_DEVICE void advance() { next += step; }
};

// Reads an input x and an output gradient e at the same positions.
template <int kCount, typename S>
struct PairReader {
  struct Pair {
    Loaded<kCount, S> x, e;
  };

  const S *x, *e;
  int64_t step;

  RGD_DEVICE Pair read() const { return {Loaded<kCount, S>(x), Loaded<kCount, S>(e)}; }
  RGD_DEVICE void advance() { x += step, e += step; }
};

// Reads and calls use(result) `times` times. kTogether reads are in flight before the first result is used.
template <int kTogether, typename R, typename Use>
RGD_DEVICE void for_reads(int64_t times, R reader, Use use) {
  for (; times > 0; times -= kTogether) {
    const int together = times < kTogether ? static_cast<int>(times) : kTogether;
    reader.step = computed_here(reader.step);  // rather than keep kTogether addresses
    decltype(reader.read()) results[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k, reader.advance())
      if (k < together) results[k] = reader.read();
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (k < together) use(results[k]);
  }
}

// The number of reads for one of `step` threads that take turns with `reads` reads.
RGD_DEVICE int64_t share_of(int64_t reads, int64_t thread, int64_t step) {
  return reads / step + (thread < reads % step ? 1 : 0);
}

// The number of neighbouring lanes, a power of two, that share the reads of a row.
constexpr int row_lanes(int64_t reads) {
  int lanes = 1;
  while (lanes < kWarp && lanes < reads) lanes *= 2;
  return lanes;
}

}  // namespace rgd_ext::cuda
