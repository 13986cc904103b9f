#pragma once

// The Gramian of an embedding's gradients. The product of those of samples i and j is a sum over the rows of the table
// that both use. Each block has one pair of samples, and looks up every row of one among the rows of the other.

#include "reduce.cuh"

namespace rgd_ext::cuda {

// The first position in the ascending keys[begin, end) that is not less than `key`.
RGD_DEVICE int64_t lower_bound(const int64_t* keys, int64_t begin, int64_t end, int64_t key) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// gram[i, j] and gram[j, i] for i = block_index() and j = block_index_y(), if j <= i. `keys` are sample * table_rows +
// row, ascending; those of sample i are keys[starts[i], starts[i + 1]). The first of several equal keys has their sum
// in `sums`, (number of keys, columns); the others are not read.
template <typename T>
RGD_DEVICE void embedding_gram(const int64_t* keys, const T* sums, const int64_t* starts, int64_t table_rows,
                               int64_t columns, int64_t batch_size, T* gram, char* shared) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int64_t i = block_index(), j = block_index_y();
  if (j > i) return;
  const int64_t begin = starts[i], end = starts[i + 1], other_begin = starts[j], other_end = starts[j + 1];
  double total = 0;
  for (int64_t first = begin + warp * kWarp; first < end; first += kThreads) {
    // Each lane looks up one row; then the whole warp computes the product of each row that was found.
    const int64_t own = first + lane;
    int64_t found = -1;
    if (own < end && (own == begin || keys[own] != keys[own - 1])) {
      const int64_t key = keys[own] + (j - i) * table_rows;
      const int64_t place = lower_bound(keys, other_begin, other_end, key);
      if (place < other_end && keys[place] == key) found = place;
    }
    for (int each = 0; each < kWarp; ++each) {
      const int64_t other = shuffle(found, each);
      if (other < 0) continue;
      const T *x = sums + (first + each) * columns, *y = sums + other * columns;
      T product = 0;
#pragma unroll 8
      for (int64_t c = lane; c < columns; c += kWarp) product += x[c] * y[c];
      total += product;
    }
  }
  const double sum = sum_by_block(total, shared);
  if (thread_index() == 0) gram[i * batch_size + j] = gram[j * batch_size + i] = static_cast<T>(sum);
}

}  // namespace rgd_ext::cuda
