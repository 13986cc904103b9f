#pragma once

// The kind of sums that computes the Gramian of a dtype and a number of samples, and the number of blocks that takes.

#include <type_traits>

#include "gram.cuh"
#include "launch.h"
#include "tf32.h"

namespace rgd_ext::cuda {

// use(std::type_identity<Sums>{}). Products of 2-byte types are exact in float, so they use the matrix units. Those of
// float do so only if the user allowed TF32, with torch.backends.cuda.matmul.allow_tf32 or
// torch.set_float32_matmul_precision.
template <typename F>
auto with_gram_sums(at::ScalarType dtype, int64_t rows, F use) {
  return with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (std::is_same_v<S, double>) {
      return with_block<PlainSums, S>(rows, use);
    } else if constexpr (std::is_same_v<S, float>) {
      return tf32_allowed() ? with_block<MatrixUnitSums, S>(rows, use) : with_block<PlainSums, S>(rows, use);
    } else {
      return with_block<MatrixUnitSums, S>(rows, use);
    }
  });
}

// Blocks of samples by blocks of samples, on and below the diagonal of K.
template <typename Sums>
int64_t block_pairs(int64_t rows) {
  const int64_t side = (rows + Sums::Shape::kBlock - 1) / Sums::Shape::kBlock, pairs = side * (side + 1) / 2;
  TORCH_CHECK_VALUE(pairs <= 65535, "the Gramian of ", rows, " samples is larger than one launch can make: use fewer");
  return pairs;
}

}  // namespace rgd_ext::cuda
