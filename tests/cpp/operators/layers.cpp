// The operators of single layers, compared with the formulas in double.

#include <ATen/Parallel.h>

#include <array>

#include "calls.h"

namespace operator_tests {

// Compared with products of the unfolded images.
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

// Some cases have more taps, or more output channels, than a tile holds.
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

}  // namespace operator_tests
