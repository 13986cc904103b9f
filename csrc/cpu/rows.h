#pragma once

// Kernels on a tile of G, some columns of every row, compiled once per instruction set and chosen at run time.
// S is the storage type of G and T the type that sums over it are accumulated in.

#include <cstdint>
#include <type_traits>

namespace rgd_ext::cpu {

template <typename S>
using accumulate_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

// g_i[c] is data[i * stride + c], 0 <= i < rows, 0 <= c < columns.
template <typename S>
struct Tile {
  const S* data;
  int64_t stride;
  int64_t rows;
  int64_t columns;
};

// Arrays that a kernel writes over columns (sums, mean, weight, bias) need room for padded_columns(columns) elements.
constexpr int64_t padded_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// The taps of a convolution are handled in blocks of this many.
constexpr int64_t kTapBlock = 12;

// Over x - c and e, for a centre c: sum (x - c), sum (x - c)^2, sum e, sum (x - c) e.
struct CentredSums {
  double values, squares, grads, products;
};

template <typename S, typename T = accumulate_t<S>>
struct RowKernels {
  // sums[c] = sum_i weights[i] g_i[c], added in the order of the rows: the same bits for any tile that holds c.
  void (*weighted_sum)(const Tile<S>& tile, const T* weights, T* sums);

  // One step along the tiles: next_mean = weighted_sum(next), which waits for memory, and in between, from cache,
  // alignments[i] += <g_i - mean, mean> and squared_norms[i] += |g_i - mean|^2 over `tile`, the `next` of the step
  // before. Both have the same rows, and either may have no columns.
  void (*moments)(const Tile<S>& next, const T* weights, T* next_mean, const Tile<S>& tile, const T* mean,
                  double* alignments, double* squared_norms);

  // products[i] += <g_i, vector>.
  void (*products)(const Tile<S>& tile, const T* vector, double* products);

  // gram[i * rows + j] += <g_i, g_j> for i >= j; what is above the diagonal is not defined. Meanwhile `next`, which may
  // have no rows, is fetched to L2.
  void (*gram)(const Tile<T>& tile, const Tile<S>& next, double* gram);

  // products[i * b.rows + j] += <a_i, b_j>, for tiles of the same columns.
  void (*cross_gram)(const Tile<T>& a, const Tile<T>& b, double* products);

  // sum_c values[c].
  double (*sum)(const T* values, int64_t size);

  CentredSums (*centred_sums)(const T* x, const T* grads, int64_t size, T centre);

  // weight[c] = sum_t grads_t[c] x^_t[c] and bias[c] = sum_t grads_t[c], added in the order of the rows t, for tiles of
  // the same shape. x^_t = (x_t - mean) / sqrt(variance + eps) by the statistics of its row; the mean counts as zero
  // unless `centred`.
  void (*normalised_products)(const Tile<S>& x, const Tile<S>& grads, double eps, bool centred, T* weight, T* bias);

  // products[r * channels + c] += sum_t image[taps[r] + positions[t]] grads[t * channels + c], for `tap_count` taps, a
  // multiple of kTapBlock, and `channels`, a multiple of 16.
  void (*tap_products)(const T* image, const int64_t* taps, int64_t tap_count, const int64_t* positions, int64_t count,
                       const T* grads, int64_t channels, T* products);

  // to[c * to_stride + r] = from[r * from_stride + c].
  void (*transpose)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride);

  // Conversions between the two types, rounding to nearest even.
  void (*widen)(const S* from, int64_t size, T* to);
  void (*narrow)(const T* from, int64_t size, S* to);
};

// The kernels for at::get_cpu_capability(), so the environment variable ATEN_CPU_CAPABILITY limits them too.
template <typename S>
const RowKernels<S>& row_kernels();

}  // namespace rgd_ext::cpu
