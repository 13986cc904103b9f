// The operators through the dispatcher, against the formulas in double precision.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <vector>

#include "check.h"

// rgd_ext/ops.py defines the operators for Python; here there is no Python.
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

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
std::tuple<Tensors, Tensor, Tensor> moments(const Tensors& grads) {
  return find<std::tuple<Tensors, Tensor, Tensor>(at::TensorList)>("rgd_ext::moments").call(grads);
}
std::tuple<Tensor, Tensor, Tensor> scalar_moments(const Tensors& grads) {
  return find<std::tuple<Tensor, Tensor, Tensor>(at::TensorList)>("rgd_ext::scalar_moments").call(grads);
}
Tensors combine(const Tensors& grads, const Tensor& weights) {
  return find<Tensors(at::TensorList, const Tensor&)>("rgd_ext::combine").call(grads, weights);
}
Tensors diffusion_mv(const Tensors& grads, const Tensors& vectors) {
  return find<Tensors(at::TensorList, at::TensorList)>("rgd_ext::diffusion_mv").call(grads, vectors);
}
Tensor gram(const Tensors& grads) { return find<Tensor(at::TensorList)>("rgd_ext::gram").call(grads); }
Tensors precondition(const Tensors& grads, const Tensor& epsilon) {
  return find<Tensors(at::TensorList, const Tensor&)>("rgd_ext::precondition").call(grads, epsilon);
}

Tensor ghost_gram(const Tensors& inputs, const Tensors& output_grads, const std::vector<bool>& biases) {
  c10::List<bool> list;
  for (const bool bias : biases) list.push_back(bias);
  return find<Tensor(at::TensorList, at::TensorList, const c10::List<bool>&)>("rgd_ext::ghost_gram")
      .call(inputs, output_grads, list);
}
Tensors ghost_combine(const Tensors& inputs, const Tensors& output_grads, const std::vector<bool>& biases,
                      const Tensor& weights) {
  c10::List<bool> list;
  for (const bool bias : biases) list.push_back(bias);
  using Signature = Tensors(at::TensorList, at::TensorList, const c10::List<bool>&, const Tensor&);
  return find<Signature>("rgd_ext::ghost_combine").call(inputs, output_grads, list, weights);
}
Tensor largest_eigenvalue(const Tensor& matrix) {
  return find<Tensor(const Tensor&, double)>("rgd_ext::largest_eigenvalue").call(matrix, 0);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> gram_moments(const Tensor& gram) {
  return find<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&)>("rgd_ext::gram_moments").call(gram);
}
std::tuple<Tensor, Tensor> sample_weights(const Tensor& squared_grad_norm, const Tensor& alignments,
                                          const Tensor& squared_norms, const Tensor& epsilon) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);
  return find<Signature>("rgd_ext::sample_weights").call(squared_grad_norm, alignments, squared_norms, epsilon, 1e-7);
}
// Kernel, stride, padding and dilation.
std::vector<std::vector<int64_t>> in_two_dimensions(const std::vector<int64_t>& geometry) {
  std::vector<std::vector<int64_t>> pairs;
  for (const int64_t number : geometry) pairs.push_back({number, number});
  return pairs;
}
Tensor conv_weight_grads(const Tensor& output_grad, const Tensor& x, const std::vector<int64_t>& geometry,
                         int64_t groups) {
  const auto of_two = in_two_dimensions(geometry);
  using Signature = void(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                         at::IntArrayRef, int64_t, Tensor&);
  Tensor out =
      at::empty({output_grad.size(0), output_grad.size(1), x.size(1) / groups, geometry[0], geometry[0]}, x.options());
  find<Signature>("rgd_ext::conv_weight_grads")
      .call(output_grad, x, of_two[0], of_two[1], of_two[2], of_two[3], groups, out);
  return out;
}
template <typename Result>
Result conv_statistics(const char* name, const Tensor& output_grad, const Tensor& x,
                       const std::vector<int64_t>& geometry) {
  const auto of_two = in_two_dimensions(geometry);
  using Signature =
      Result(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef);
  return find<Signature>(name).call(output_grad, x, of_two[0], of_two[1], of_two[2], of_two[3]);
}
Tensor conv_gram(const Tensor& output_grad, const Tensor& x, const std::vector<int64_t>& geometry) {
  return conv_statistics<Tensor>("rgd_ext::conv_gram", output_grad, x, geometry);
}
std::tuple<Tensor, Tensor, Tensor> conv_scalar_moments(const Tensor& output_grad, const Tensor& x,
                                                       const std::vector<int64_t>& geometry) {
  return conv_statistics<std::tuple<Tensor, Tensor, Tensor>>("rgd_ext::conv_scalar_moments", output_grad, x, geometry);
}
std::tuple<Tensor, Tensor> group_norm_grads(const Tensor& output_grad, const Tensor& x, int64_t groups, double eps) {
  return find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, double)>("rgd_ext::group_norm_grads")
      .call(output_grad, x, groups, eps);
}
std::tuple<Tensor, Tensor> layer_norm_grads(const Tensor& output_grad, const Tensor& x, double eps, bool centred) {
  return find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, bool)>("rgd_ext::layer_norm_grads")
      .call(output_grad, x, eps, centred);
}
Tensor layer_grads(const std::vector<std::string>& kinds, const Tensors& output_grads, const Tensors& inputs,
                   const std::vector<int64_t>& groups, const std::vector<double>& eps,
                   const std::vector<bool>& biases) {
  using Signature = Tensor(const c10::List<std::string>&, at::TensorList, at::TensorList, at::IntArrayRef,
                           at::ArrayRef<double>, const c10::List<bool>&);
  c10::List<std::string> names;
  c10::List<bool> flags;
  for (const std::string& kind : kinds) names.push_back(kind);
  for (const bool bias : biases) flags.push_back(bias);
  return find<Signature>("rgd_ext::layer_grads").call(names, output_grads, inputs, groups, eps, flags);
}

// All columns of all tensors, (leading, d) in double.
Tensor flat(const Tensors& tensors, int64_t leading) {
  Tensors matrices;
  for (const Tensor& tensor : tensors) matrices.push_back(tensor.reshape({leading, tensor.numel() / leading}));
  return at::cat(matrices, 1).to(at::kDouble);
}

// Largest error over the largest value that rounding can refer to.
bool close(const Tensor& got, const Tensor& want, const Tensor& scale, double tolerance) {
  if (want.numel() == 0) return got.numel() == 0;
  const double error = (got.to(at::kDouble) - want).abs().max().item<double>();
  return error <= tolerance * scale.abs().max().item<double>();
}

// Every output of every operator, so that two runs can be compared bit by bit.
Tensors run_all(const Tensors& grads, const Tensor& weights, const Tensor& epsilon, const Tensors& vectors) {
  auto [all, alignments, squared_norms] = moments(grads);
  all.insert(all.end(), {alignments, squared_norms, gram(grads), std::get<0>(scalar_moments(grads))});
  for (const Tensors& more : {combine(grads, weights), diffusion_mv(grads, vectors), precondition(grads, epsilon)})
    all.insert(all.end(), more.begin(), more.end());
  return all;
}

void test_against_double(const Tensors& grads, const std::string& name) {
  const at::ScalarType dtype = grads[0].scalar_type();
  const at::ScalarType accumulate = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t batch_size = grads[0].size(0);
  // Of a sum in the accumulation type, and of a result rounded to the storage type.
  const double sum_tolerance = dtype == at::kDouble ? 1e-13 : 5e-6;
  const double tolerance = dtype == at::kBFloat16 ? 1e-2 : dtype == at::kHalf ? 2e-3 : 4 * sum_tolerance;

  const Tensor weights = at::randn({batch_size}, accumulate), epsilon = at::full({}, 0.01, accumulate);
  Tensors vectors;
  for (const Tensor& grad : grads) vectors.push_back(at::stack({grad[0], grad[0] * 2 + 1, at::ones_like(grad[0])}));

  const Tensor rows = flat(grads, batch_size), mean = rows.mean(0), centred = rows - mean;
  const Tensor norms = rows.square().sum(1), magnitude = rows.abs().sum(0);
  const Tensor alignments = centred.mv(mean);
  const Tensor directions = flat(vectors, 3);
  const Tensor products = rows.matmul(directions.t());
  const Tensor diffused = (products - products.mean(0)).t().matmul(rows) / batch_size;
  const auto weighted = [&](const Tensor& w) { return w.to(at::kDouble).unsqueeze(0).matmul(rows).squeeze(0); };

  auto [means, a, squared_norms] = moments(grads);
  expect(close(flat(means, 1).squeeze(0), mean, magnitude, tolerance), name + " mean");
  expect(close(a, alignments, norms, sum_tolerance), name + " alignments");
  expect(close(squared_norms, centred.square().sum(1), norms, sum_tolerance), name + " squared norms");

  const auto [squared, same_a, same_norms] = scalar_moments(grads);
  expect(close(squared, mean.square().sum(), mean.square().sum(), 4 * sum_tolerance), name + " squared norm");
  expect(same_a.equal(a) && same_norms.equal(squared_norms), name + " scalar moments are the moments");

  const Tensor scale = magnitude * std::max(1.0, weights.abs().max().item<double>());
  expect(close(flat(combine(grads, weights), 1).squeeze(0), weighted(weights), scale, tolerance), name + " combine");

  const Tensor k = gram(grads);
  expect(close(k, rows.matmul(rows.t()), norms, sum_tolerance), name + " gram");
  expect(k.equal(k.t()), name + " gram is symmetric");

  const Tensor product_scale = magnitude.max() * products.abs().max();
  expect(close(flat(diffusion_mv(grads, vectors), 3), diffused, product_scale, tolerance), name + " diffusion_mv");

  const Tensors direction = precondition(grads, epsilon);
  const Tensor exact = (1 - 0.01 * alignments) / batch_size;
  expect(close(flat(direction, 1).squeeze(0), weighted(exact), magnitude * exact.abs().max(), tolerance),
         name + " precondition");

  // The same bits: as composed operators, for epsilon = 0, and for any number of threads.
  const Tensors composed = combine(grads, (1 - epsilon * a) / batch_size);
  const Tensors unmoved = precondition(grads, at::zeros_like(epsilon));
  for (size_t t = 0; t < grads.size(); ++t) {
    expect(direction[t].equal(composed[t]), name + " precondition is moments, weights, combine");
    expect(unmoved[t].equal(means[t]), name + " epsilon = 0 gives the mean");
    expect(direction[t].sizes() == grads[t].sizes().slice(1) && direction[t].is_contiguous(), name + " shape");
  }
  at::set_num_threads(1);
  const Tensors first = run_all(grads, weights, epsilon, vectors);
  for (int threads : {2, 3}) {
    at::set_num_threads(threads);
    const Tensors again = run_all(grads, weights, epsilon, vectors);
    for (size_t t = 0; t < first.size(); ++t)
      expect(first[t].equal(again[t]), name + " same bits on " + std::to_string(threads) + " threads");
  }
}

void test_layouts(at::ScalarType dtype) {
  const std::string name = c10::toString(dtype);
  const auto random = [&](at::IntArrayRef sizes) { return at::randn(sizes).add_(0.3).to(dtype); };
  for (int64_t batch_size : {1, 2, 3, 7, 8, 9, 17, 130}) {
    for (int64_t columns : {1, 15, 16, 17, 1000, 4099}) {
      test_against_double({random({batch_size, columns})},
                          name + " (" + std::to_string(batch_size) + ", " + std::to_string(columns) + ")");
    }
  }
  test_against_double({random({5, 300}), random({5, 0}), random({5}), random({5, 129, 65}), random({5, 8200})},
                      name + " many tensors");
  Tensors many;
  for (int64_t t = 0; t < 161; ++t) many.push_back(random({16, 1 + t * 37 % 1000}));
  test_against_double(many, name + " 161 tensors");
  const Tensor base = random({20, 5000});
  test_against_double({base.narrow(1, 10, 4990)}, name + " strided rows");
  test_against_double({base.slice(0, 0, 20, 3).slice(1, 7, 4500)}, name + " every third row");
  test_against_double({base.t().narrow(0, 0, 333)}, name + " transposed");
  test_against_double({random({6, 3, 4, 5}).permute({0, 3, 1, 2})}, name + " permuted");
  test_against_double({random({700, 1001})}, name + " large batch");
}

void test_ghost_gram(at::ScalarType dtype) {
  const double tolerance = dtype == at::kDouble ? 1e-13 : 5e-6;
  const auto random = [&](int64_t rows, int64_t columns) { return at::randn({rows, columns}).add_(0.3).to(dtype); };
  for (int64_t batch_size : {1, 5, 24, 25, 130}) {
    const std::string name = std::string(c10::toString(dtype)) + " B = " + std::to_string(batch_size) + " ghost_gram";
    const Tensor wide = random(batch_size, 3000);
    const Tensors inputs = {random(batch_size, 100), wide.narrow(1, 1, 2050), random(17, batch_size).t(),
                            random(batch_size, 0)};
    const Tensors output_grads = {random(batch_size, 33), random(batch_size, 1), wide.narrow(1, 7, 1500),
                                  random(batch_size, 20)};
    const std::vector<bool> biases = {true, false, true, true};
    Tensor want = at::zeros({batch_size, batch_size}, at::kDouble);
    for (size_t layer = 0; layer < inputs.size(); ++layer) {
      const Tensor a = inputs[layer].to(at::kDouble), e = output_grads[layer].to(at::kDouble);
      want += (a.matmul(a.t()) + (biases[layer] ? 1 : 0)) * e.matmul(e.t());
    }
    const Tensor weights = at::randn({batch_size}).to(dtype);
    const Tensors combined = ghost_combine(inputs, output_grads, biases, weights);
    size_t next = 0;
    for (size_t layer = 0; layer < inputs.size(); ++layer) {
      const Tensor weighted = output_grads[layer].to(at::kDouble) * weights.to(at::kDouble).unsqueeze(1);
      const Tensor of_bias = weighted.sum(0), of_weight = weighted.t().matmul(inputs[layer].to(at::kDouble));
      const double rounding = dtype == at::kBFloat16 || dtype == at::kHalf ? 3e-2 : tolerance;
      if (biases[layer]) expect(close(combined[next++], of_bias, of_bias, rounding), name + " combined bias");
      if (of_weight.numel()) expect(close(combined[next++], of_weight, of_weight, rounding), name + " combined weight");
    }
    expect(next == combined.size(), name + " number of combined gradients");
    at::set_num_threads(1);
    const Tensor k = ghost_gram(inputs, output_grads, biases);
    expect(close(k, want, want, tolerance), name);
    expect(k.equal(k.t()), name + " is symmetric");
    for (int threads : {2, 3}) {
      at::set_num_threads(threads);
      expect(k.equal(ghost_gram(inputs, output_grads, biases)), name + " on " + std::to_string(threads) + " threads");
    }
  }
}

// By unfolding the images in double.
void test_conv_weight_grads(at::ScalarType dtype) {
  const double tolerance = dtype == at::kDouble ? 1e-13 : dtype == at::kFloat ? 5e-6 : 1e-2;
  for (const int64_t channels : {1, 8, 16, 33, 48, 64, 130}) {
    for (const std::vector<int64_t>& geometry :
         std::vector<std::vector<int64_t>>{{1, 1, 0, 1}, {3, 1, 1, 1}, {3, 2, 1, 2}, {2, 3, 0, 1}}) {
      for (const int64_t groups : {1, 2}) {
        const auto [kernel, stride, padding, dilation] =
            std::array<int64_t, 4>{geometry[0], geometry[1], geometry[2], geometry[3]};
        const std::string name = std::string(c10::toString(dtype)) + " convolution to " + std::to_string(channels);
        const int64_t places = (11 + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
        const Tensor x = at::randn({3, groups * 5, 11, 11}).to(dtype);
        const Tensor grad = at::randn({3, groups * channels, places, places}).to(dtype);
        const Tensor columns =
            at::im2col(x.to(at::kDouble), {kernel, kernel}, {dilation, dilation}, {padding, padding}, {stride, stride});
        const Tensor want = grad.to(at::kDouble)
                                .reshape({3, groups, channels, -1})
                                .matmul(columns.reshape({3, groups, 5 * kernel * kernel, -1}).transpose(2, 3))
                                .reshape({3, groups * channels, 5, kernel, kernel});
        at::set_num_threads(1);
        const Tensor got = conv_weight_grads(grad, x, geometry, groups);
        expect(got.sizes() == want.sizes() && close(got, want, want, tolerance), name);
        at::set_num_threads(3);
        expect(got.equal(conv_weight_grads(grad, x, geometry, groups)), name + " on three threads");
      }
    }
  }
}

// For more taps, and more output channels, than a tile holds.
void test_conv_statistics(at::ScalarType dtype) {
  const double tolerance = dtype == at::kDouble ? 1e-12 : 1e-5;
  for (const int64_t batch_size : {1, 7, 150}) {
    for (const int64_t channels : {5, 70}) {
      for (const std::vector<int64_t>& geometry : std::vector<std::vector<int64_t>>{{3, 1, 1, 1}, {1, 1, 0, 1}}) {
        const std::string name =
            std::string(c10::toString(dtype)) + " convolutions of " + std::to_string(batch_size) + " samples";
        const Tensor x = at::randn({batch_size, 7, 9, 9}).to(dtype), grad = at::randn({batch_size, channels, 9, 9});
        const Tensor e = grad.to(dtype);
        const Tensor grads =
            conv_weight_grads(e.to(at::kDouble), x.to(at::kDouble), geometry, 1).reshape({batch_size, -1});
        const Tensor wanted = grads.matmul(grads.t()), scale = grads.abs().matmul(grads.abs().t());
        at::set_num_threads(1);
        const Tensor got = conv_gram(e, x, geometry);
        expect(close(got, wanted, scale, tolerance) && got.equal(got.t()), name + ": Gramian");
        const auto [norm, alignments, squared_norms] = conv_scalar_moments(e, x, geometry);
        const Tensor mean = grads.mean(0, true), centred = grads - mean, largest = scale.diagonal();
        expect(close(norm, mean.square().sum(), largest.max(), tolerance), name + ": norm");
        expect(close(alignments, centred.matmul(mean[0]), largest, tolerance), name + ": alignments");
        expect(close(squared_norms, centred.square().sum(1), largest, tolerance), name + ": squared norms");
        at::set_num_threads(3);
        expect(got.equal(conv_gram(e, x, geometry)), name + " on three threads");
        expect(alignments.equal(std::get<1>(conv_scalar_moments(e, x, geometry))), name + " on three threads");
      }
    }
  }
}

void test_group_norm_grads(at::ScalarType dtype) {
  const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 5e-6 : 1e-2;
  for (const int64_t places : {1, 5, 16, 1003}) {
    const std::string name = std::string(c10::toString(dtype)) + " normalisation of " + std::to_string(places);
    const Tensor x = at::randn({3, 6, places}).add_(2).to(dtype), grad = at::randn({3, 6, places}).to(dtype);
    const Tensor exact = x.to(at::kDouble).reshape({3, 2, -1});
    const Tensor centred = exact - exact.mean(2, true), variance = centred.square().mean(2, true);
    const Tensor normalised = (centred / (variance + 1e-5).sqrt()).reshape({3, 6, places});
    const auto [weight, bias] = group_norm_grads(grad, x, 2, 1e-5);
    const Tensor products = normalised * grad.to(at::kDouble);
    expect(close(weight, products.sum(2), products.abs().sum(2), tolerance), name + " weight");
    expect(close(bias, grad.to(at::kDouble).sum(2), grad.to(at::kDouble).abs().sum(2), tolerance), name + " bias");
  }
}

void test_layer_norm_grads(at::ScalarType dtype) {
  const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 5e-6 : 1e-2;
  for (const int64_t places : {0, 1, 5, 64, 1003}) {
    for (const int64_t size : {1, 15, 16, 33, 0}) {
      for (const bool centred : {true, false}) {
        const std::string name = std::string(c10::toString(dtype)) + (centred ? " layer norm" : " RMS norm") + " of " +
                                 std::to_string(size) + " at " + std::to_string(places);
        const Tensor x = at::randn({3, places, size}).add_(2).to(dtype), grad = at::randn({3, places, size}).to(dtype);
        const Tensor exact = x.to(at::kDouble), exact_grad = grad.to(at::kDouble);
        const Tensor difference = centred ? exact - exact.mean(2, true) : exact;
        const Tensor products = difference / (difference.square().mean(2, true) + 1e-5).sqrt() * exact_grad;
        at::set_num_threads(1);
        const auto [weight, bias] = layer_norm_grads(grad, x, 1e-5, centred);
        expect(close(weight, products.sum(1), products.abs().sum(1), tolerance), name + " weight");
        expect(close(bias, exact_grad.sum(1), exact_grad.abs().sum(1), tolerance), name + " bias");
        at::set_num_threads(3);
        const auto [again, bias_again] = layer_norm_grads(grad, x, 1e-5, centred);
        expect(weight.equal(again) && bias.equal(bias_again), name + " on three threads");
      }
    }
  }
}

void test_layer_grads(at::ScalarType dtype) {
  const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 5e-6 : 1e-2;
  const std::string name = std::string(c10::toString(dtype)) + " layers side by side";
  const Tensor x = at::randn({3, 5, 17}).to(dtype), e = at::randn({3, 5, 21}).to(dtype);
  const Tensor images = at::randn({3, 6, 4}).to(dtype), grad = at::randn({3, 6, 4}).to(dtype);
  const Tensor got =
      layer_grads({"linear", "layer_norm", "group_norm", "linear", "rms_norm"}, {e, x, grad, x, x},
                  {x, x, images, e, x}, {1, 1, 2, 1, 1}, {0, 1e-5, 1e-5, 0, 1e-5}, {true, true, true, false, false});
  const Tensor inputs = x.to(at::kDouble), grads = e.to(at::kDouble);
  const Tensor product = grads.mT().matmul(inputs), scale = grads.mT().abs().matmul(inputs.abs());
  const int64_t weights = 21 * 17;
  const auto columns = [&](int64_t from, int64_t count) { return got.narrow(1, from, count); };
  expect(close(columns(0, weights), product.flatten(1), scale.flatten(1), tolerance), name + ": weight");
  expect(close(columns(weights, 21), grads.sum(1), grads.abs().sum(1), tolerance), name + ": bias");
  const auto [weight, bias] = layer_norm_grads(x, x, 1e-5, true);
  int64_t from = weights + 21;
  expect(columns(from, 34).equal(at::cat({weight, bias}, 1)), name + ": layer norm");
  const auto [group_weight, group_bias] = group_norm_grads(grad, images, 2, 1e-5);
  expect(columns(from += 34, 12).equal(at::cat({group_weight, group_bias}, 1)), name + ": group norm");
  expect(close(columns(from += 12, weights), product.mT().flatten(1), scale.mT().flatten(1), tolerance),
         name + ": without bias");
  expect(columns(from += weights, 17).equal(std::get<0>(layer_norm_grads(x, x, 1e-5, false))), name + ": RMS norm");
  expect(from + 17 == got.size(1), name + ": columns");
}

void test_largest_eigenvalue() {
  for (int64_t size : {1, 2, 24, 130, 600}) {
    const std::string name = "largest eigenvalue of " + std::to_string(size);
    for (int64_t rank : {size, (size + 1) / 2, int64_t{1}}) {
      const Tensor rows = at::randn({size, rank}, at::kDouble), matrix = rows.matmul(rows.t());
      at::set_num_threads(1);
      const Tensor found = largest_eigenvalue(matrix);
      const Tensor want = std::get<0>(at::linalg_eigh(matrix)).select(0, size - 1);
      expect(close(found, want, want, 1e-12), name + " of rank " + std::to_string(rank));
      at::set_num_threads(3);
      expect(found.equal(largest_eigenvalue(matrix)), name + " on three threads");
    }
    const Tensor identity = at::eye(size, at::kDouble);
    expect(largest_eigenvalue(0 * identity).item<double>() == 0, name + " zero");
    expect(largest_eigenvalue(-identity).item<double>() == 0, name + " negative");
    expect(std::abs(largest_eigenvalue(identity).item<double>() - 1) < 1e-12, name + " repeated");
    expect(largest_eigenvalue(identity / 0).isnan().item<bool>(), name + " not finite");
  }
}

void test_statistics_of_a_gramian() {
  for (int64_t size : {1, 7, 130}) {
    const std::string name = "statistics of " + std::to_string(size);
    const Tensor rows = at::randn({size, 200}, at::kDouble) + 0.3, mean = rows.mean(0), centred = rows - mean;
    const auto [squared, alignments, squared_norms, gram] = gram_moments(rows.matmul(rows.t()));
    const Tensor want = centred.matmul(mean), norms = centred.square().sum(1), scale = rows.square().sum(1);
    expect(close(squared, mean.dot(mean), scale, 1e-13), name + " |g|^2");
    expect(close(alignments, want, scale, 1e-13), name + " alignments");
    expect(close(squared_norms, norms, scale, 1e-13), name + " squared norms");
    expect(close(gram, centred.matmul(centred.t()), scale, 1e-13), name + " centred Gramian");
    const Tensor epsilon = at::full({}, 0.25, at::kDouble);
    const auto [chosen, weights] = sample_weights(squared, alignments, squared_norms + 1, epsilon);
    expect(chosen.equal(epsilon) && close(weights, (1 - 0.25 * alignments) / size, scale, 1e-13), name + " weights");
    const auto [none, equal] = sample_weights(squared, alignments, 0 * squared_norms, epsilon / 0);
    expect(none.item<double>() == 0 && equal.eq(1.0 / size).all().item<bool>(), name + " D = 0");
  }
}

void test_not_finite() {
  Tensor grads = at::ones({9, 5000});
  grads[3][100] = std::numeric_limits<float>::infinity();
  grads[4][2] = std::numeric_limits<float>::quiet_NaN();
  const Tensor mean = std::get<0>(moments({grads}))[0];
  expect(mean[100].isinf().item<bool>() && mean[2].isnan().item<bool>(), "infinity and NaN reach the mean");
  expect(mean.isfinite().sum().item<int64_t>() == 4998, "and no other weight");
}

void test_no_columns() {
  const auto [means, alignments, squared_norms] = moments({at::empty({4, 0})});
  expect(means[0].numel() == 0 && alignments.equal(at::zeros({4})) && squared_norms.equal(at::zeros({4})), "d = 0");
  expect(gram({at::empty({4, 0})}).equal(at::zeros({4, 4})), "d = 0 gram");
  expect(diffusion_mv({at::ones({4, 3})}, {at::empty({0, 3})})[0].sizes() == at::IntArrayRef({0, 3}), "no vectors");
}

void test_errors() {
  const Tensor g = at::ones({3, 2});
  expect_error([&] { moments({at::ones({0, 2})}); }, "at least one sample");
  expect_error([&] { gram({g, at::ones({4, 2})}); }, "batch sizes disagree");
  expect_error([&] { gram({g, g.to(at::kDouble)}); }, "dtypes disagree");
  expect_error([&] { gram({g.to(at::kLong)}); }, "convert it");
  expect_error([&] { gram({g, at::ones({})}); }, "is a scalar");
  expect_error([&] { combine({g}, at::ones({4})); }, "[4]");
  expect_error([&] { combine({g}, at::ones({3}, at::kLong)); }, "convert it");
  expect_error([&] { precondition({g}, at::ones({2})); }, "one number");
  expect_error([&] { diffusion_mv({g}, {at::ones({3})}); }, "expected [2]");
  expect_error([&] { diffusion_mv({g}, {}); }, "one vector per tensor");
  expect_error([&] { diffusion_mv({g, g}, {at::ones({2, 2}), at::ones({2})}); }, "vectors[1]");
  expect_error([&] { diffusion_mv({g}, {at::ones({2}, at::kDouble)}); }, "convert one");
  expect_error([&] { ghost_gram({g}, {g}, {}); }, "0 biases");
  expect_error([&] { ghost_gram({g}, {g, g}, {true, true}); }, "1 inputs");
  expect_error([&] { ghost_combine({g}, {g, g}, {true, true}, at::ones({3})); }, "1 inputs");
  expect_error([&] { ghost_combine({g}, {g}, {true}, at::ones({2})); }, "weights has shape [2]");
  expect_error([&] { ghost_gram({at::ones({2, 2})}, {g}, {true}); }, "B = 3");
  expect_error([&] { ghost_gram({at::ones({3, 2, 1})}, {g}, {true}); }, "(B, n)");
  expect_error([&] { ghost_gram({g.to(at::kDouble)}, {g}, {true}); }, "inputs[0]");
  const Tensor x = at::ones({3, 4, 5, 5}), e = at::ones({3, 6, 3, 3});
  expect_error([&] { conv_weight_grads(e, x, {4, 1, 0, 1}, 1); }, "too many or too few");
  expect_error([&] { conv_weight_grads(e, x, {3, 0, 0, 1}, 1); }, "stride 0");
  expect_error([&] { conv_weight_grads(e, x, {3, 1, 0, 1}, 4); }, "groups is 4");
  expect_error([&] { conv_weight_grads(e[0], x, {3, 1, 0, 1}, 1); }, "batch sizes disagree");
  expect_error([&] { conv_gram(e, x, {4, 1, 0, 1}); }, "too many or too few");
  expect_error([&] { conv_scalar_moments(e, x.to(at::kDouble), {3, 1, 0, 1}); }, "dtypes disagree");
  expect_error([&] { group_norm_grads(x, x, 3, 1e-5); }, "groups is 3");
  expect_error([&] { group_norm_grads(e, x, 2, 1e-5); }, "(B, n, ...)");
  expect_error([&] { layer_norm_grads(e, x, 1e-5, true); }, "(B, ..., n)");
  expect_error([&] { layer_norm_grads(e[0], x[0], 1e-5, true); }, "batch sizes disagree");
  expect_error([&] { layer_grads({"dense"}, {x}, {x}, {1}, {0}, {true}); }, "kind is dense");
  expect_error([&] { layer_grads({"linear"}, {x, x}, {x}, {1}, {0}, {true}); }, "one of each per layer");
  expect_error([&] { layer_grads({"linear"}, {x}, {x}, {1}, {0}, {true}); }, "(B, T, n)");
  expect_error([&] { layer_grads({"rms_norm"}, {e}, {x}, {1}, {0}, {true}); }, "of one shape");
  expect_error([&] { layer_grads({"group_norm"}, {x}, {x}, {3}, {0}, {true}); }, "must divide 4");
  expect_error([&] { layer_grads({"rms_norm"}, {x}, {x.to(at::kDouble)}, {1}, {0}, {true}); }, "dtypes disagree");
  expect_error([&] { largest_eigenvalue(g); }, "symmetric");
  expect_error([&] { largest_eigenvalue(at::eye(2, at::kHalf)); }, "float64 or float32");
  expect_error([&] { gram_moments(g); }, "symmetric");
  const Tensor one = at::ones({}), b = at::ones({3});
  expect_error([&] { sample_weights(one, b, at::ones({2}), one); }, "[2]");
  expect_error([&] { sample_weights(one, b, b, b); }, "pass a scalar");
  expect_error([&] { sample_weights(one, b, b, one.to(at::kDouble)); }, "convert one");
}

// Whether the processor has what ATEN_CPU_CAPABILITY asks for; torch itself does not check.
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

int main() {
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
