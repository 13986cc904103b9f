#pragma once

// From tensors to launches: the table of matrices that a kernel gets, its grid and its shared memory.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "../grads.h"
#include "device.h"
#include "tiles.cuh"

namespace rgd_ext::cuda {

// The capacities of the tables. The parameters of a kernel may take 32 KB, but smaller ones are faster to pass.
constexpr int kFew = 24, kMany = 800;
static_assert(sizeof(Table<kFew>) <= 4000 && sizeof(Table<kMany>) <= 32700, "with others, parameters of a kernel");

template <typename... Parameters>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
  return bytes;
}

// use(S{}) for the type S that kernels use for a tensor's dtype.
template <typename F>
auto with_storage(at::ScalarType dtype, F use) {
  switch (dtype) {
    case at::kDouble:
      return use(double{});
    case at::kBFloat16:
      return use(BFloat16{});
    case at::kHalf:
      return use(Half{});
    default:
      return use(float{});
  }
}

template <typename... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int64_t shared_bytes) {
  return resident_blocks(reinterpret_cast<const void*>(kernel), shared_bytes);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, int64_t shared_bytes,
            const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied byte by byte");
  static_assert(parameter_bytes<Parameters...>() <= 32764, "more than the parameters of a kernel may take");
  if (blocks == 0 || blocks_y == 0) return;
  if (shared_bytes > 48 << 10) resident_blocks(kernel, shared_bytes);  // allows that much
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
  kernel<<<grid, kThreads, shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// use(table) for tables of all matrices that are not empty, kFew or kMany at a time. others[t], of shape (*shape) or
// (k, *shape), is the `other` of matrix t; `others` may be empty.
template <typename S, typename F>
void for_tables(at::TensorList matrices, at::TensorList others, int lanes, F use) {
  const int64_t rows = matrices[0].size(0), width = lanes * Packet<S>::kColumns;
  const auto fill = [&](auto& table, size_t begin, size_t end) {
    table.rows = rows;
    table.lanes = lanes;
    table.tiles = table.matrices = 0;
    for (size_t t = begin; t < end; ++t) {
      const int64_t columns = matrices[t].numel() / rows;
      if (columns == 0) continue;
      void* other = others.empty() ? nullptr : others[t].data_ptr();
      table.matrix[table.matrices++] = {matrices[t].const_data_ptr(), other, matrices[t].stride(0), columns,
                                        table.tiles};
      table.tiles += (columns + width - 1) / width;
    }
    if (table.tiles > 0) use(std::as_const(table));
  };
  if (matrices.size() <= kFew) {
    Table<kFew> table;
    fill(table, 0, matrices.size());
  } else {
    Table<kMany> table;
    for (size_t begin = 0; begin < matrices.size(); begin += kMany)
      fill(table, begin, std::min(begin + kMany, matrices.size()));
  }
}

// One kernel on all matrices: a launch for each table of for_tables(), with a grid of blocks by blocks_y of which all
// run at a time. kernel_for(table) is the instance of the kernel for the table's capacity.
template <typename S, typename KernelFor>
struct Launches {
  at::TensorList matrices, others;
  int lanes;
  int64_t blocks_y, shared_bytes;
  KernelFor kernel_for;

  // use(kernel, table, blocks, first_block) for each launch, where first_block is the number of blocks of those before.
  // Returns the number of blocks of all launches.
  template <typename F>
  int64_t for_each(F use) const {
    int64_t first_block = 0;
    for_tables<S>(matrices, others, lanes, [&](const auto& table) {
      const auto kernel = kernel_for(table);
      const int64_t resident = std::max<int64_t>(resident_blocks(kernel, shared_bytes) / blocks_y, 1);
      const int64_t blocks = std::min(table.tiles, resident);
      use(kernel, table, blocks, first_block);
      first_block += blocks;
    });
    return first_block;
  }

  // The number of blocks of all launches: each block can write to a slot of its own.
  int64_t blocks() const {
    return for_each([](auto&&...) {});
  }

  // Launches kernel(table, arguments..., first_block). Slot first_block + block_index() is that of a block.
  template <typename... Arguments>
  void run(const Arguments&... arguments) const {
    for_each([&](auto kernel, const auto& table, int64_t blocks, int64_t first_block) {
      launch(kernel, blocks, blocks_y, shared_bytes, table, arguments..., first_block);
    });
  }
};

template <typename S, typename KernelFor>
Launches<S, KernelFor> launches_of(at::TensorList matrices, at::TensorList others, int lanes, int64_t blocks_y,
                                   int64_t shared_bytes, KernelFor kernel_for) {
  return {matrices, others, lanes, blocks_y, shared_bytes, kernel_for};
}

}  // namespace rgd_ext::cuda
