#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../lanczos.h"
#include "work.h"

namespace rgd_ext::cpu {
namespace {

// So that the products of a small matrix, which is in cache, don't wait for other threads.
constexpr int64_t kMinElements = 1 << 16;

at::Tensor largest_eigenvalue(const at::Tensor& matrix, double ulp) {
  check_symmetric(matrix);
  const int64_t size = matrix.size(0);
  const at::Tensor wide = matrix.to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  // Squares of the entries have to be representable.
  double scale = 0;
  for (int64_t i = 0; i < size; ++i) scale = std::max(scale, std::abs(data[i * size + i]));
  if (scale == 0) scale = 1;
  const RowKernels<double>& rows = row_kernels<double>();
  const auto multiply = [&](const double* x, double* y) {
    at::parallel_for(0, size, std::max<int64_t>(1, kMinElements / size), [&](int64_t begin, int64_t end) {
      std::fill(y + begin, y + end, 0.0);
      rows.products({data + begin * size, size, end - begin, size}, x, y + begin);
      for (int64_t i = begin; i < end; ++i) y[i] /= scale;
    });
  };
  const Scratch<double> workspace(lanczos::workspace_size(size)), parts(size), sum(padded_columns(size));
  const auto remove = [&](const double* basis, int64_t n, double* x) {
    const Tile<double> tile{basis, size, n, size};
    std::fill_n(parts.data(), n, 0.0);
    rows.products(tile, x, parts.data());
    rows.weighted_sum(tile, parts.data(), sum.data());
    for (int64_t i = 0; i < size; ++i) x[i] -= sum.data()[i];
  };
  const Scratch<lanczos::Tridiagonal::Row> projection(size);
  const double value = scale * lanczos::largest_eigenvalue(size, lanczos::tolerance(ulp), multiply, remove,
                                                           workspace.data(), projection.data());
  return at::full({}, value < 0 ? 0 : value, wide.options()).to(matrix.scalar_type());  // may be infinite in float32
}

}  // namespace
}  // namespace rgd_ext::cpu

TORCH_LIBRARY_IMPL(rgd_ext, CPU, m) { m.impl("largest_eigenvalue", rgd_ext::cpu::largest_eigenvalue); }
