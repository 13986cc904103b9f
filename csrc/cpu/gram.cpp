#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "widen.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

// A block of rows stays in L1 while all rows are read from L2, where the next tile arrives meanwhile.
constexpr TileShape kGramTile{512 << 10, 1024};

template <typename S>
void gram_kernel(const Work& work, double* partials) {
  using T = accumulate_t<S>;
  const int64_t batch_size = work.batch_size();
  const int64_t scratch_size = std::is_same_v<S, T> ? 0 : batch_size * padded_columns(work.max_columns());
  at::parallel_for(0, work.chunks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(scratch_size);
    const Columns* last = &work.chunk(end - 1).back();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (const Columns& columns : work.chunk(chunk)) {
        const Tile<S> next = &columns == last ? Tile<S>{nullptr, 0, 0, 0} : work.tile<S>(*(&columns + 1));
        row_kernels<S>().gram(widened(work.tile<S>(columns), scratch.data()), next,
                              partials + chunk * batch_size * batch_size);
      }
    }
  });
}

at::Tensor gram(at::TensorList grads) {
  check_grads(grads);
  const int64_t batch_size = grads[0].size(0), slot = batch_size * batch_size;
  const std::vector<at::Tensor> matrices = with_contiguous_rows(grads);
  const Work work(matrices, slot, kGramTile);
  at::Tensor result = at::empty({batch_size, batch_size}, grads[0].options().dtype(accumulate_dtype(work.dtype())));
  std::vector<double> partials(work.chunks() * slot);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, work.dtype(), "gram",
                                  [&] { gram_kernel<scalar_t>(work, partials.data()); });
  sum_chunks(work.chunks(), partials.data(), slot, result);
  mirror(result);
  return result;
}

// The Gramian of one sample.
at::Tensor squared_norm(at::TensorList vector) {
  std::vector<at::Tensor> rows;
  rows.reserve(vector.size());
  for (const at::Tensor& tensor : vector) rows.push_back(tensor.unsqueeze(0));
  return gram(rows).view(at::IntArrayRef());
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) {
  m.impl("gram", rgd_ext::cpu::gram);
  m.impl("squared_norm", rgd_ext::cpu::squared_norm);
}
