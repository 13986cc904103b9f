#include <ATen/core/List.h>
#include <c10/cuda/CUDAGuard.h>

#include "ghost_gram.cuh"
#include "gram_launch.h"
#include "operators.h"

namespace rgd_ext::cuda {
namespace {

// Few models have more layers that see one vector per sample; these take several launches.
using LayersOfLaunch = Layers<kFew>;

// The most memory that products of layers may take before they are summed; it matters for large batches.
constexpr int64_t kMostBytes = 256 << 20;

template <typename Sums>
__global__ void __launch_bounds__(kThreads, Sums::kBlocksPerMultiprocessor)
    ghost_products_kernel(const __grid_constant__ LayersOfLaunch layers, typename Sums::T* partials) {
  extern __shared__ __align__(16) char shared[];
  ghost_products<Sums>(layers, partials, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_layers_kernel(const __grid_constant__ LayersOfLaunch layers, const T* partials, bool adds, T* gram) {
  extern __shared__ __align__(16) char shared[];
  reduce_layers(layers, partials, adds, gram, shared);
}

// The layers [begin, end), with their tiles divided among about `wanted` blocks.
template <typename Sums>
LayersOfLaunch layers_of(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases,
                         size_t begin, size_t end, int64_t wanted) {
  const int64_t width = Sums::Shape::kLanes * Packet<typename Sums::Storage>::kColumns;
  const auto tiles = [&](const at::Tensor& factor) { return (factor.size(1) + width - 1) / width; };
  const auto blocks = [&](int64_t block_tiles) {
    int64_t count = 0;
    for (size_t l = begin; l < end; ++l)
      for (const at::Tensor* factor : {&inputs[l], &output_grads[l]})
        count += (tiles(*factor) + block_tiles - 1) / block_tiles;
    return count;
  };
  const int64_t least = std::max<int64_t>((blocks(1) + wanted - 1) / wanted, 1);
  int64_t block_tiles = least;
  // The last block of a factor may have little to do. Larger blocks are better than a second wave of blocks.
  while (blocks(block_tiles) > wanted && block_tiles < 2 * least) ++block_tiles;

  LayersOfLaunch layers;
  layers.block_tiles = static_cast<int>(block_tiles);
  Table<kFew>& factors = layers.factors;
  factors.rows = output_grads[0].size(0);
  factors.lanes = Sums::Shape::kLanes;
  factors.tiles = factors.matrices = 0;
  for (size_t l = begin; l < end; ++l) {
    layers.biases[l - begin] = biases[l];
    for (const at::Tensor* factor : {&inputs[l], &output_grads[l]}) {
      factors.matrix[factors.matrices++] = {factor->const_data_ptr(), nullptr, factor->stride(0), factor->size(1),
                                            factors.tiles};
      factors.tiles += (tiles(*factor) + block_tiles - 1) / block_tiles * block_tiles;
    }
  }
  return layers;
}

template <typename Sums>
at::Tensor read_layers(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases) {
  using T = typename Sums::T;
  const int64_t rows = output_grads[0].size(0), pairs = block_pairs<Sums>(rows),
                shared_bytes = gram_shared_bytes<Sums>();
  const at::ScalarType dtype = accumulate_dtype(output_grads[0].scalar_type());
  const at::Tensor gram = output_grads[0].new_empty({rows, rows}, dtype);
  const auto products = ghost_products_kernel<Sums>;
  const int64_t wanted = std::max<int64_t>(resident_blocks(products, shared_bytes) / pairs, 1);
  // Each layer has at least two partial products.
  const int64_t bytes = 2 * rows * rows * static_cast<int64_t>(sizeof(T));
  const int64_t together = std::clamp<int64_t>(kMostBytes / bytes, 1, kFew / 2);
  for (size_t begin = 0; begin < inputs.size(); begin += together) {
    const size_t end = std::min(begin + together, inputs.size());
    const LayersOfLaunch layers = layers_of<Sums>(inputs, output_grads, biases, begin, end, wanted);
    const int64_t blocks = layers.factors.tiles / layers.block_tiles;
    const at::Tensor partials = gram.new_empty({blocks, rows, rows});
    launch(products, blocks, pairs, shared_bytes, layers, partials.mutable_data_ptr<T>());
    launch(reduce_layers_kernel<T>, reduce_blocks<kGhostEntries>(rows), 1, kReduceSharedBytes, layers,
           partials.const_data_ptr<T>(), begin > 0, gram.mutable_data_ptr<T>());
  }
  return gram;
}

}  // namespace

at::Tensor ghost_gram_operator(at::TensorList inputs, at::TensorList output_grads, const c10::List<bool>& biases) {
  check_vector_layers(inputs, output_grads, biases);
  const c10::cuda::CUDAGuard guard(output_grads[0].device());
  const auto a = with_contiguous_rows(inputs), e = with_contiguous_rows(output_grads);
  return with_gram_sums(e[0].scalar_type(), e[0].size(0),
                        [&]<typename Sums>(std::type_identity<Sums>) { return read_layers<Sums>(a, e, biases); });
}

}  // namespace rgd_ext::cuda
