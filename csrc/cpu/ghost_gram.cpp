#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "widen.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

// A block of K is the parallel unit and belongs to one thread, so the bits depend on no schedule. Measured: 24 rows
// balance two threads at B = 128, and 1024 columns keep the rows of a register block in L1.
constexpr int64_t kBlock = 24, kColumns = 1024;

using Products = std::array<double, kBlock * kBlock>;

// The rows [begin, end) of K by the columns [other, other_end), on or below the diagonal.
struct Block {
  int64_t begin, end, other, other_end;
  bool on_diagonal() const { return begin == other; }
};

std::vector<Block> blocks_of(int64_t batch_size) {
  std::vector<Block> blocks;
  // The last rows first: what is left at the end is small.
  for (int64_t row = (batch_size - 1) / kBlock; row >= 0; --row)
    for (int64_t other = 0; other <= row; ++other)
      blocks.push_back({row * kBlock, std::min((row + 1) * kBlock, batch_size), other * kBlock,
                        std::min((other + 1) * kBlock, batch_size)});
  return blocks;
}

// products[i, j] = <x_i, x_j> for the rows x of a matrix (B, n).
template <typename S>
void block_products(const at::Tensor& matrix, const Block& block, accumulate_t<S>* scratch, Products& products) {
  const RowKernels<S>& rows = row_kernels<S>();
  const S* data = matrix.const_data_ptr<S>();
  const int64_t stride = matrix.stride(0), columns = matrix.size(1);
  products.fill(0);
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t count = std::min(kColumns, columns - c);
    const auto tile = [&](int64_t begin, int64_t end) {
      return Tile<S>{data + begin * stride + c, stride, end - begin, count};
    };
    const auto left = widened(tile(block.begin, block.end), scratch);
    if (block.on_diagonal())
      rows.gram(left, Tile<S>{nullptr, 0, 0, 0}, products.data());
    else
      rows.cross_gram(left, widened(tile(block.other, block.other_end), scratch + kBlock * kColumns), products.data());
  }
}

template <typename S>
void ghost_gram_kernel(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases,
                       at::Tensor& result) {
  using T = accumulate_t<S>;
  const int64_t batch_size = result.size(0);
  T* gram = result.mutable_data_ptr<T>();
  const std::vector<Block> blocks = blocks_of(batch_size);
  const int64_t count = blocks.size();
  std::atomic<int64_t> next = 0;
  // Threads take blocks as they get free: blocks differ in size.
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const Scratch<T> scratch(std::is_same_v<S, T> ? 0 : 2 * kBlock * kColumns);
    Products sums, of_inputs, of_grads;
    for (int64_t index = next++; index < count; index = next++) {
      const Block& block = blocks[index];
      sums.fill(0);
      for (size_t layer = 0; layer < inputs.size(); ++layer) {
        block_products<S>(inputs[layer], block, scratch.data(), of_inputs);
        block_products<S>(output_grads[layer], block, scratch.data(), of_grads);
        const double bias = biases[layer] ? 1 : 0;
        for (int64_t p = 0; p < kBlock * kBlock; ++p) sums[p] += (of_inputs[p] + bias) * of_grads[p];
      }
      const int64_t width = block.other_end - block.other;
      for (int64_t i = block.begin; i < block.end; ++i)
        for (int64_t j = block.other; j < std::min(block.other_end, i + 1); ++j) {
          const double sum = sums[(i - block.begin) * width + j - block.other];
          gram[i * batch_size + j] = gram[j * batch_size + i] = static_cast<T>(sum);
        }
    }
  });
}

at::Tensor ghost_gram(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases) {
  check_vector_layers(inputs, output_grads, biases);
  const int64_t batch_size = output_grads[0].size(0);
  const at::ScalarType dtype = output_grads[0].scalar_type();
  at::Tensor result = at::empty({batch_size, batch_size}, output_grads[0].options().dtype(accumulate_dtype(dtype)));
  const auto rows = with_contiguous_rows(inputs), grad_rows = with_contiguous_rows(output_grads);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "ghost_gram",
                                  [&] { ghost_gram_kernel<scalar_t>(rows, grad_rows, biases, result); });
  return result;
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("ghost_gram", rgd_ext::cpu::ghost_gram); }
