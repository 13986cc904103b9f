#pragma once

// Per-sample gradients of the weight and bias of a LayerNorm or RMSNorm over (B, places, n): sum_t e_t o x^_t and
// sum_t e_t per sample. The places of a sample are divided into short runs. A block computes the statistics of the rows
// of its runs and reads these rows again, from cache, for the sums over each run. Another kernel adds up the runs.

#include <algorithm>

#include "norms.cuh"

namespace rgd_ext::cuda {

// x^ = (x - mean) * scale + shift, where the shift corrects for the rounding error of the mean.
template <typename T>
struct alignas(16) RowStatistics {
  T mean, scale, shift;
};

// The statistics of one row, by `lanes` neighbours in a warp, of which this is `lane`. RMSNorm is not centred.
template <int kCount, typename S>
RGD_DEVICE RowStatistics<Accumulate<S>> row_statistics(const S* row, int64_t columns, double eps, bool centred,
                                                       int lane, int lanes) {
  using T = Accumulate<S>;
  const int64_t reads = share_of(columns / kCount, lane, lanes);
  const Reader<kCount, S> reader{row + lane * kCount, lanes * kCount};
  const T share = 1 / static_cast<T>(columns);
  T mean = 0;  // need not be exact: the shift corrects for the rest
  if (centred) {
    for_reads<4>(reads, reader, [&](const Loaded<kCount, S>& x) {
      T sum = 0;
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum += x[c];
      mean += sum;
    });
    mean = warp_sum(mean, lanes) * share;
  }
  LongSum<T> values, squares;
  for_reads<4>(reads, reader, [&](const Loaded<kCount, S>& x) {
    T value_sum = 0, square_sum = 0;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const T value = x[c] - mean;
      value_sum += value;
      square_sum += value * value;
    }
    values.add(value_sum);
    squares.add(square_sum);
  });
  const T rest = centred ? warp_sum(static_cast<T>(values.total()), lanes) * share : 0;
  const T variance = warp_sum(static_cast<T>(squares.total()), lanes) * share - rest * rest;
  const T scale = 1 / sqrt(variance + static_cast<T>(eps));
  return {mean, scale, -rest * scale};
}

// The places of each sample in runs of `length`, numbered consecutively over all samples. The last run of a sample may
// be shorter. A block has a few neighbouring runs.
struct Runs {
  int64_t samples, places, length, of_sample, of_block;

  constexpr int64_t number() const { return samples * of_sample; }
  constexpr int64_t blocks() const { return (number() + of_block - 1) / of_block; }
  constexpr int64_t rows_of_block() const { return of_block * length; }
  constexpr int64_t first_row(int64_t run) const { return run / of_sample * places + run % of_sample * length; }
};

// The smallest number of runs that keeps `resident` blocks busy, for rows that take `reads` reads.
constexpr Runs runs_of(int64_t samples, int64_t places, int64_t reads, int64_t resident) {
  const int64_t some = std::max<int64_t>(places, 1);
  const int64_t wanted = std::clamp(resident / samples, (some + kShortSum - 1) / kShortSum, some);
  const int64_t length = (some + wanted - 1) / wanted, of_sample = (some + length - 1) / length;
  // Threads that one run keeps busy, in the worse of the two phases.
  const int64_t busy = std::max<int64_t>(std::min(reads, row_lanes(reads) * length), 8);
  const int64_t of_block =
      std::clamp<int64_t>(samples * of_sample / resident, 1, std::max<int64_t>(kThreads / busy, 1));
  return {samples, places, length, of_sample, of_block};
}

template <typename S>
int64_t layer_norm_shared_bytes(const Runs& runs) {
  return runs.rows_of_block() * static_cast<int64_t>(sizeof(RowStatistics<Accumulate<S>>));
}

// weight and bias = the sums over each run, (runs, n). If each sample is one run they are the results, of type S, and
// otherwise partial sums of type T.
template <int kCount, typename S, typename Sum>
RGD_DEVICE void layer_norm_grads(const S* output_grad, const S* input, const Runs& runs, int64_t columns, double eps,
                                 bool centred, Sum* weight, Sum* bias, char* shared) {
  using T = Accumulate<S>;
  const int64_t begin = block_index() * runs.of_block, reads = columns / kCount;
  const int64_t end = begin + runs.of_block < runs.number() ? begin + runs.of_block : runs.number();
  const int64_t first = runs.first_row(begin), rows = runs.first_row(end) - first;
  RowStatistics<T>* statistics = reinterpret_cast<RowStatistics<T>*>(shared);

  const int lanes = row_lanes(reads), lane = thread_index() % lanes, group = thread_index() / lanes;
  for (int64_t done = 0; done < rows; done += kThreads / lanes) {
    const int64_t row = done + group < rows ? done + group : rows - 1;  // the whole warp has to take part
    const RowStatistics<T> found =
        row_statistics<kCount>(input + (first + row) * columns, columns, eps, centred, lane, lanes);
    if (done + group == row && lane == 0) statistics[row] = found;
  }
  barrier();

  for (int64_t index = thread_index(); index < (end - begin) * reads; index += kThreads) {
    const int64_t run = begin + index / reads, column = index % reads * kCount;
    const int64_t row = runs.first_row(run), offset = row * columns + column;
    const RowStatistics<T>* next = statistics + (row - first);
    T products[kCount] = {}, grads[kCount] = {};
    const PairReader<kCount, S> reader{input + offset, output_grad + offset, columns};
    for_reads<4>(runs.first_row(run + 1) - row, reader, [&](const auto& pair) {
      const RowStatistics<T> of_row = *next++;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const T grad = pair.e[c];
        products[c] += ((pair.x[c] - of_row.mean) * of_row.scale + of_row.shift) * grad;
        grads[c] += grad;
      }
    });
    store(products, weight + run * columns + column);
    store(grads, bias + run * columns + column);
  }
}

// The number of warps that add up the runs of a sample: each has four runs if there are warps enough.
constexpr int add_runs_warps(int64_t runs) {
  const int warps = row_lanes((runs + 3) / 4);
  return warps < kWarps ? warps : kWarps;
}

constexpr int64_t add_runs_blocks(const Runs& runs, int64_t columns) {
  return (runs.samples * columns * add_runs_warps(runs.of_sample) + kThreads - 1) / kThreads;
}

constexpr int64_t kAddRunsSharedBytes = kThreads * sizeof(double);

// sums[b] = the sum of partials[b, r] over the runs r of each sample b, (B, n) of (B, runs, n).
template <typename T, typename S>
RGD_DEVICE void add_runs(const T* partials, const Runs& runs, int64_t columns, S* sums, char* shared) {
  const int warp = thread_index() / kWarp, warps = add_runs_warps(runs.of_sample), share = warp % warps;
  const int64_t index = (block_index() * kWarps + warp) / warps * kWarp + thread_index() % kWarp;
  const bool mine = index < runs.samples * columns;
  LongSum<T> sum;
  if (mine) {
    const int64_t first_run = index / columns * runs.of_sample + share;
    const Reader<1, T> reader{partials + first_run * columns + index % columns, warps * columns};
    for_reads<4>(share_of(runs.of_sample, share, warps), reader,
                 [&](const Loaded<1, T>& partial) { sum.add(partial[0]); });
  }
  double* totals = reinterpret_cast<double*>(shared);
  totals[thread_index()] = sum.total();
  barrier();
  if (share > 0 || !mine) return;
  double total = 0;
  for (int w = 0; w < warps; ++w) total += totals[thread_index() + w * kWarp];
  narrow(static_cast<T>(total), sums[index]);
}

}  // namespace rgd_ext::cuda
