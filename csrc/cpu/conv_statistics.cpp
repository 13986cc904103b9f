#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "convolution.h"
#include "reads.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

// Bytes of a tile: the gradients of all samples that some taps and output channels have. It stays in L2 with what it
// is made of, so that gradients never reach memory.
constexpr int64_t kTileBytes = 640 << 10;
// Columns of a tile that statistics are taken of at a time: a block of rows stays in L1.
constexpr int64_t kColumns = 1024;

// What is summed over the columns of tiles, in double: `size` numbers.
struct GramSums {
  explicit GramSums(int64_t batch_size) : size(batch_size * batch_size) {}

  template <typename T>
  void add(const Tile<T>& tile, double* sums) const {
    row_kernels<T>().gram(tile, {nullptr, 0, 0, 0}, sums);
  }

  const int64_t size;
};

// Alignments <g_i - g, g>, squared norms |g_i - g|^2 and |g|^2.
struct MomentSums {
  explicit MomentSums(int64_t batch_size) : size(2 * batch_size + 1) {}

  template <typename T>
  void add(const Tile<T>& tile, double* sums) const {
    const std::vector<T> weights(tile.rows, static_cast<T>(1.0 / static_cast<double>(tile.rows)));
    const Scratch<T> mean(kColumns);
    const Tile<T> none{nullptr, 0, tile.rows, 0};
    double *alignments = sums, *squared_norms = sums + tile.rows;
    row_kernels<T>().moments(tile, weights.data(), mean.data(), none, mean.data(), alignments, squared_norms);
    row_kernels<T>().moments(none, weights.data(), mean.data(), tile, mean.data(), alignments, squared_norms);
    row_kernels<T>().gram({mean.data(), kColumns, 1, tile.columns}, {nullptr, 0, 0, 0}, sums + 2 * tile.rows);
  }

  const int64_t size;
};

// How many taps of `count` output channels make a tile.
int64_t taps_in_tile(const Convolution& conv, int64_t batch_size, int64_t count, int64_t element_bytes) {
  const int64_t fitting = kTileBytes / (batch_size * padded_columns(count) * element_bytes) / kTapBlock * kTapBlock;
  return std::clamp<int64_t>(fitting, kTapBlock, conv.taps.size());
}

// sums[chunk] over the chunks of the gradients of `count` output channels from `first` on, for all samples.
template <typename T, typename Sums>
void add_panel(const Convolution& conv, const at::Tensor& output_grad, const at::Tensor& input, int64_t first,
               int64_t count, int64_t chunks, const Sums& sums, double* partials) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t batch_size = input.size(0), channels = output_grad.size(1), places = conv.positions.size();
  const int64_t taps = conv.taps.size(), width = padded_columns(count);
  const int64_t plane = volume(conv.size), padded_plane = volume(conv.padded_size);
  const int64_t kernel_size = conv.weights / conv.channels;
  const T *images = input.const_data_ptr<T>(), *grads = output_grad.const_data_ptr<T>();
  // By place, with zeros for channels that are not there.
  const Scratch<T> by_place(batch_size * places * width);
  at::parallel_for(0, batch_size, grain(places * width), [&](int64_t begin, int64_t end) {
    std::fill_n(by_place.data() + begin * places * width, (end - begin) * places * width, T{0});
    for (int64_t sample = begin; sample < end; ++sample)
      rows.transpose(grads + (sample * channels + first) * places, places, count, places,
                     by_place.data() + sample * places * width, width);
  });
  const int64_t tile_taps = taps_in_tile(conv, batch_size, count, sizeof(T)), tiles = at::divup(taps, tile_taps);
  const int64_t tile_channels = (tile_taps + kernel_size - 2) / kernel_size + 1, stride = tile_taps * width;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> padded(conv.has_margin() ? tile_channels * padded_plane : 0), products(batch_size * stride);
    if (conv.has_margin()) std::fill_n(padded.data(), tile_channels * padded_plane, T{0});
    std::vector<int64_t> offsets(tile_taps);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t tile = chunk * tiles / chunks; tile < (chunk + 1) * tiles / chunks; ++tile) {
        const int64_t tap = tile * tile_taps, number = std::min(tile_taps, taps - tap);
        const int64_t used = std::min(number, conv.weights - tap), channel = tap / kernel_size;
        const int64_t planes = (tap + used - 1) / kernel_size + 1 - channel;
        // Those that are not used meet some pixel.
        for (int64_t r = 0; r < number; ++r) offsets[r] = r < used ? conv.taps[tap + r] - channel * padded_plane : 0;
        std::fill_n(products.data(), batch_size * stride, T{0});
        for (int64_t sample = 0; sample < batch_size; ++sample) {
          const T* image = images + (sample * conv.channels + channel) * plane;
          if (conv.has_margin()) {
            conv.pad(image, planes, padded.data());
            image = padded.data();
          }
          for (int64_t t = 0; t < places; t += kPositions)
            rows.tap_products(image, offsets.data(), number, conv.positions.data() + t,
                              std::min(kPositions, places - t), by_place.data() + (sample * places + t) * width, width,
                              products.data() + sample * stride);
        }
        for (int64_t c = 0; c < used * width; c += kColumns)
          sums.add(Tile<T>{products.data() + c, stride, batch_size, std::min(kColumns, used * width - c)},
                   partials + chunk * sums.size);
      }
    }
  });
}

struct Partials {
  int64_t chunks, size;
  std::vector<double> sums;

  void sum(int64_t from, at::Tensor& out) const { sum_chunks(chunks, sums.data() + from, size, out); }
};

template <typename Sums>
Partials conv_statistics(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_convolution(output_grad, input, kernel, stride, padding, dilation, 1);
  TORCH_CHECK_VALUE(output_grad.size(1) > 0 && input.size(1) > 0, "got output gradients ", described(output_grad),
                    " and inputs ", described(input), ": pass at least one channel each");
  const Convolution conv(output_grad, input, kernel, stride, padding, dilation, 1);
  const at::ScalarType dtype = accumulate_dtype(input.scalar_type());
  const at::Tensor grads = output_grad.to(dtype).contiguous(), images = input.to(dtype).contiguous();
  const Sums sums(input.size(0));
  const int64_t channels = output_grad.size(1);
  const int64_t tile_taps = taps_in_tile(conv, input.size(0), std::min(kChannels, channels), grads.element_size());
  Partials partials{std::min<int64_t>(most_chunks(sums.size), at::divup(conv.taps.size(), tile_taps)), sums.size, {}};
  partials.sums.resize(partials.chunks * partials.size);
  for (int64_t first = 0; first < channels; first += kChannels)
    AT_DISPATCH_FLOATING_TYPES(dtype, "conv_statistics", [&] {
      add_panel<scalar_t>(conv, grads, images, first, std::min(kChannels, channels - first), partials.chunks, sums,
                          partials.sums.data());
    });
  return partials;
}

at::Tensor conv_gram(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Partials partials = conv_statistics<GramSums>(output_grad, input, kernel, stride, padding, dilation);
  const int64_t batch_size = input.size(0);
  at::Tensor gram = at::empty({batch_size, batch_size}, empty_statistic({input}).options());
  partials.sum(0, gram);
  mirror(gram);
  return gram;
}

Moments conv_scalar_moments(const at::Tensor& output_grad, const at::Tensor& input, at::IntArrayRef kernel,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Partials partials = conv_statistics<MomentSums>(output_grad, input, kernel, stride, padding, dilation);
  const int64_t batch_size = input.size(0);
  at::Tensor alignments = empty_statistic({input}), squared_norms = empty_statistic({input});
  at::Tensor squared_norm = at::empty({}, alignments.options());
  partials.sum(0, alignments);
  partials.sum(batch_size, squared_norms);
  partials.sum(2 * batch_size, squared_norm);
  return {std::move(squared_norm), std::move(alignments), std::move(squared_norms)};
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) {
  m.impl("conv_gram", rgd_ext::cpu::conv_gram);
  m.impl("conv_scalar_moments", rgd_ext::cpu::conv_scalar_moments);
}
