// Registers the operators with CUDA kernels. Not where they are defined, since nvcc reads the header of the library for
// every architecture anew, which takes longer than most kernels.

#include "operators.h"

#include <torch/library.h>

#include "reads.h"

TORCH_LIBRARY_IMPL(rgd_ext, CUDA, m) {
  using namespace rgd_ext::cuda;
  m.impl("combine", combine_operator);
  m.impl("diffusion_mv", diffusion_mv_operator);
  m.impl("embedding_gram", embedding_gram_operator);
  m.impl("ghost_gram", ghost_gram_operator);
  m.impl("gram_moments", gram_moments_operator);
  m.impl("gram", gram_operator);
  m.impl("group_norm_grads", group_norm_grads_operator);
  m.impl("largest_eigenvalue", largest_eigenvalue_operator);
  m.impl("layer_norm_grads", layer_norm_grads_operator);
  m.impl("moments", moments_operator);
  m.impl("precondition", precondition_operator);
  m.impl("sample_weights", sample_weights_operator);
  m.impl("scalar_moments", scalar_moments_operator);
  m.impl("squared_norm", read_squared_norm);
}
