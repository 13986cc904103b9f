// Tests of the operators through the dispatcher, compared with the formulas in double; and of their errors.

#include <cstdlib>

#include "calls.h"

// rgd_ext/ops defines the operators, but the tests run without Python.
TORCH_LIBRARY(rgd_ext, m) {
  m.def("moments(Tensor[] grads) -> (Tensor[], Tensor, Tensor)");
  m.def("scalar_moments(Tensor[] grads) -> (Tensor, Tensor, Tensor)");
  m.def("combine(Tensor[] grads, Tensor weights) -> Tensor[]");
  m.def("diffusion_mv(Tensor[] grads, Tensor[] vectors) -> Tensor[]");
  m.def("gram(Tensor[] grads) -> Tensor");
  m.def("precondition(Tensor[] grads, Tensor epsilon) -> Tensor[]");
  m.def("squared_norm(Tensor[] vector) -> Tensor");
  m.def("ghost_gram(Tensor[] inputs, Tensor[] output_grads, bool[] biases) -> Tensor");
  m.def("ghost_combine(Tensor[] inputs, Tensor[] output_grads, bool[] biases, Tensor weights) -> Tensor[]");
  m.def("largest_eigenvalue(Tensor matrix, float ulp) -> Tensor");
  m.def("gram_moments(Tensor gram) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sample_weights(Tensor squared_grad_norm, Tensor alignments, Tensor squared_norms, Tensor epsilon, float ulp) -> "
      "(Tensor, Tensor)");
  m.def(
      "conv_weight_grads(Tensor output_grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
      " int groups, Tensor(a!) out) -> ()");
  m.def("conv_gram(Tensor output_grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "conv_scalar_moments(Tensor output_grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("group_norm_grads(Tensor output_grad, Tensor x, int groups, float eps) -> (Tensor, Tensor)");
  m.def("layer_norm_grads(Tensor output_grad, Tensor x, float eps, bool centred) -> (Tensor, Tensor)");
  m.def(
      "layer_grads(str[] kinds, Tensor[] output_grads, Tensor[] inputs, int[] groups, float[] eps, bool[] biases) -> "
      "Tensor");
}

namespace operator_tests {
namespace {

void test_errors() {
  const Tensor g = at::ones({3, 2});
  expect_error([&] { moments({at::ones({0, 2})}); }, "Float[0, 2]");
  expect_error([&] { gram({g, at::ones({4, 2})}); }, "Float[4, 2]");
  expect_error([&] { gram({g, g.to(at::kDouble)}); }, "Double[3, 2]");
  expect_error([&] { gram({g.to(at::kLong)}); }, "Long[3, 2]");
  expect_error([&] { gram({g, at::ones({})}); }, "Float[] on cpu");
  expect_error([&] { combine({g}, at::ones({4})); }, "[4]");
  expect_error([&] { combine({g}, at::ones({3}, at::kLong)); }, "weights Long[3]");
  expect_error([&] { precondition({g}, at::ones({2})); }, "epsilon Float[2]");
  expect_error([&] { diffusion_mv({g}, {at::ones({3})}); }, "(k, *shape)");
  expect_error([&] { diffusion_mv({g}, {}); }, "0 vectors");
  expect_error([&] { diffusion_mv({g, g}, {at::ones({2, 2}), at::ones({2})}); }, "vectors[1]");
  expect_error([&] { diffusion_mv({g}, {at::ones({2}, at::kDouble)}); }, "Double[2]");
  expect_error([&] { ghost_gram({g}, {g}, {}); }, "0 biases");
  expect_error([&] { ghost_gram({g}, {g, g}, {true, true}); }, "1 inputs");
  expect_error([&] { ghost_combine({g}, {g, g}, {true, true}, at::ones({3})); }, "1 inputs");
  expect_error([&] { ghost_combine({g}, {g}, {true}, at::ones({2})); }, "weights Float[2]");
  expect_error([&] { ghost_gram({at::ones({2, 2})}, {g}, {true}); }, "Float[2, 2]");
  expect_error([&] { ghost_gram({at::ones({3, 2, 1})}, {g}, {true}); }, "(B, n)");
  expect_error([&] { ghost_gram({g.to(at::kDouble)}, {g}, {true}); }, "Double[3, 2]");
  const Tensor x = at::ones({3, 4, 5, 5}), e = at::ones({3, 6, 3, 3});
  expect_error([&] { conv_weight_grads(e, x, {4, 1, 0, 1}, 1); }, "kernel [4, 4]");
  expect_error([&] { conv_weight_grads(e, x, {3, 0, 0, 1}, 1); }, "stride [0, 0]");
  expect_error([&] { conv_weight_grads(e, x, {3, 1, 0, 1}, 4); }, "4 groups");
  expect_error([&] { conv_weight_grads(e[0], x, {3, 1, 0, 1}, 1); }, "Float[6, 3, 3]");
  expect_error([&] { conv_gram(e, x, {4, 1, 0, 1}); }, "kernel [4, 4]");
  expect_error([&] { conv_scalar_moments(e, x.to(at::kDouble), {3, 1, 0, 1}); }, "Double[3, 4, 5, 5]");
  expect_error([&] { group_norm_grads(x, x, 3, 1e-5); }, "3 groups");
  expect_error([&] { group_norm_grads(e, x, 2, 1e-5); }, "of one shape");
  expect_error([&] { layer_norm_grads(e, x, 1e-5, true); }, "of one shape");
  expect_error([&] { layer_norm_grads(e[0], x[0], 1e-5, true); }, "Float[6, 3, 3]");
  expect_error([&] { layer_grads({"dense"}, {x}, {x}, {1}, {0}, {true}); }, "kind dense");
  expect_error([&] { layer_grads({"linear"}, {x, x}, {x}, {1}, {0}, {true}); }, "one of each per layer");
  expect_error([&] { layer_grads({"linear"}, {x}, {x}, {1}, {0}, {true}); }, "(B, T, n)");
  expect_error([&] { layer_grads({"rms_norm"}, {e}, {x}, {1}, {0}, {true}); }, "of one shape");
  expect_error([&] { layer_grads({"group_norm"}, {x}, {x}, {3}, {0}, {true}); }, "3 groups");
  expect_error([&] { layer_grads({"rms_norm"}, {x}, {x.to(at::kDouble)}, {1}, {0}, {true}); }, "Double[3, 4, 5, 5]");
  expect_error([&] { largest_eigenvalue(g); }, "symmetric");
  expect_error([&] { largest_eigenvalue(at::eye(2, at::kHalf)); }, "float64 or float32");
  expect_error([&] { gram_moments(g); }, "symmetric");
  const Tensor one = at::ones({}), b = at::ones({3});
  expect_error([&] { sample_weights(one, b, at::ones({2}), one); }, "squared norms Float[2]");
  expect_error([&] { sample_weights(one, b, b, b); }, "epsilon Float[3]");
  expect_error([&] { sample_weights(one, b, b, one.to(at::kDouble)); }, "epsilon Double[]");
}

// Whether the processor has the instructions that ATEN_CPU_CAPABILITY names, which torch does not check.
bool capability_is_there() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = variable ? variable : "";
  if (capability == "avx512") return __builtin_cpu_supports("avx512bw");
  if (capability == "avx2") return __builtin_cpu_supports("avx2");
#endif
  return true;
}

}  // namespace
}  // namespace operator_tests

int main() {
  using namespace operator_tests;
  if (!capability_is_there()) return 77;
  at::manual_seed(0);
  for (at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    test_layouts(dtype);
    test_ghost_gram(dtype);
    test_conv_weight_grads(dtype);
    test_conv_statistics(dtype);
    test_group_norm_grads(dtype);
    test_layer_norm_grads(dtype);
    test_layer_grads(dtype);
  }
  test_largest_eigenvalue();
  test_statistics_of_a_gramian();
  test_not_finite();
  test_no_columns();
  test_errors();
  std::cout << failures << " failures" << std::endl;
  return failures == 0 ? 0 : 1;
}
