// The operators on per-sample gradients and on their Gramian, compared with the formulas in double.

#include <ATen/Parallel.h>

#include <limits>

#include "calls.h"

namespace operator_tests {
namespace {

// The outputs of the operators, so that two runs can be compared bit by bit.
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
  // The error of a sum in the accumulation type, and that of a result rounded to the storage type.
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

  // Results are the same bits as those of the composed operators, those of the mean for epsilon = 0, and those of
  // another number of threads.
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

}  // namespace

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

}  // namespace operator_tests
