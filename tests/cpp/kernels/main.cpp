// The bodies of the CUDA kernels, emulated on the CPU with one fiber per CUDA thread, and checked against float64: for
// every dtype, odd sizes and unaligned rows, many matrices, few and many blocks, and random schedules. The tests are
// tested as well: every barrier of every kernel is removed once, which has to fail.
//
// `kernel_tests NAME` runs only the kernels whose name contains NAME, and `kernel_tests 1 2` the second half of them:
// every other one, from number 1 on.

#include <set>

#include "problem.h"

namespace kernel_tests {
namespace {

// From the command line: part of the names of the kernels to run, and which of how many parts of them.
std::string chosen;
std::size_t part = 0, parts = 1;

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels;
  for (const auto& more : {statistics_kernels(), streaming_kernels(), gram_kernels(), norm_kernels()})
    kernels.insert(kernels.end(), more.begin(), more.end());
  std::erase_if(kernels, [](const Kernel& kernel) { return kernel.name.find(chosen) == std::string::npos; });
  std::vector<Kernel> own;
  for (std::size_t i = part; i < kernels.size(); i += parts) own.push_back(kernels[i]);
  return own;
}

void expect_agreement(const std::vector<Kernel>& kernels, const std::vector<Shape>& shapes) {
  unsigned seed = 0;
  for (const Kernel& kernel : kernels) {
    for (const Shape& shape : shapes) {
      const double ratio = kernel.check(shape, ++seed);
      expect(ratio <= 1, kernel.name + ", " + describe(shape) + ": error " + std::to_string(ratio) + " of allowed");
    }
  }
}

void test_against_double() {
  expect_agreement(all_kernels(),
                   {
                       {1, {1}, 32, 1, 0},           {2, {129}, 32, 2, 0},         {3, {0, 5}, 8, 1, 1},
                       {7, {640}, 32, 2, 0},         {16, {515, 1, 64}, 16, 3, 0}, {17, {1000}, 8, 4, 8},
                       {33, {300, 0, 41}, 4, 2, 1},  {64, {257}, 32, 5, 3},        {70, {130, 260}, 16, 3, 0},
                       {130, {520}, 8, 2, 0},        {150, {97, 64}, 4, 3, 5},     {260, {65}, 4, 2, 0},
                       {9, {61, 5}, 8, 2, 0, 3},     {70, {125, 13}, 8, 3, 0, 3},  {5, {1030, 3}, 256, 1, 1},
                       {4, {70}, 256, 1, 0},         {4, {4000, 70}, 256, 2, 0},   {11, {600, 70}, 128, 2, 0},
                       {20, {64, 530}, 64, 2, 0, 3}, {8, {2100, 3}, 32, 2, 0},     {15, {1300, 70}, 16, 1, 1},
                   });
}

// Samples of one place and of none; narrow rows at many places; rows with more reads than a block has threads, and with
// more than a lane adds in T.
void test_normalisations() {
  std::vector<Kernel> norms = all_kernels();
  std::erase_if(norms, [](const Kernel& kernel) { return kernel.name.find(" norm") == std::string::npos; });
  expect_agreement(
      norms,
      {{1, {96}, 4, 70, 0}, {0, {5}, 4, 3, 0}, {700, {24}, 8, 2, 0}, {39, {2104}, 4, 1, 0}, {2, {17000}, 4, 1, 0}});
  // The rounding error of the mean is corrected.
  std::erase_if(norms, [](const Kernel& kernel) {
    return !kernel.name.starts_with("float") || kernel.name.ends_with("rms norm");
  });
  expect_agreement(norms, {{.rows = 40, .columns = {128}, .lanes = 4, .blocks = 2, .padding = 0, .mean = 1e4F}});
}

// Without any one of its barriers, every kernel has a wrong result, or an error, for some seed.
void test_missing_barriers_are_caught() {
  const auto is_caught = [](const Kernel& kernel, const Shape& shape) {
    for (unsigned seed = 0; seed < 20; ++seed) {
      try {
        if (!(kernel.check(shape, seed) <= 1)) return true;
      } catch (const std::exception&) {
        return true;
      }
    }
    return false;
  };
  for (const Kernel& kernel : all_kernels()) {
    std::set<std::string> tried;
    for (const Shape& shape : {Shape{70, {700, 31}, 8, 1, 0}, Shape{5, {700, 31}, 8, 1, 0}}) {
      machine.barriers.clear();
      kernel.check(shape, 0);
      const std::set<std::string> barriers = machine.barriers;
      for (const std::string& barrier : barriers) {
        if (!tried.insert(barrier).second) continue;
        machine.ignored_barrier = barrier;
        expect(is_caught(kernel, shape), kernel.name + " without the barrier at " + barrier + " is caught");
      }
      machine.ignored_barrier.clear();
    }
  }
}

}  // namespace
}  // namespace kernel_tests

int main(int count, char** arguments) {
  using namespace kernel_tests;
  if (count > 1 && arguments[1] == std::string("past_the_end")) {
    read_past_the_end();
    return 0;
  }
  if (count == 2) chosen = arguments[1];
  if (count == 3) part = std::stoul(arguments[1]), parts = std::stoul(arguments[2]);
  test_against_double();
  test_normalisations();
  test_long_sums();
  test_equal_weights_give_the_mean_bitwise();
  test_missing_barriers_are_caught();
  test_wrong_kernels_are_caught();
  test_blocks_do_not_wait_for_each_other();
  test_matrix_units_truncate();
  std::cout << failures << " failures" << std::endl;
  return failures == 0 ? 0 : 1;
}
