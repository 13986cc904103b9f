// Tests of the emulation itself: it has to notice the errors that a GPU would show.

#include <bit>

#include "gram_sums.cuh"
#include "problem.h"

namespace kernel_tests {

// Each of these kernels has an error.
void test_wrong_kernels_are_caught() {
  const auto run = [](auto kernel) { machine.run(1, 1, 0, 0, [&](char*) { kernel(thread_index() % kWarp); }); };
  const auto one_ends = [](int lane) { return lane == 5 ? 0 : warp_sum(1.0); };
  expect_error([&] { run(one_ends); }, "a lane ended before its warp's exchange at emulation.cpp:");
  const auto two_places = [](int lane) { return lane < 16 ? warp_sum(1.0) : warp_sum(2.0); };
  expect_error([&] { run(two_places); }, "lanes of a warp wait at emulation.cpp:");
  const auto some_at_a_barrier = [](int lane) {
    if (lane == 31) barrier();
    warp_sum(1.0);
  };
  expect_error([&] { run(some_at_a_barrier); }, "lanes of a warp wait at emulation.cpp:");
  const auto one_multiplies_alone = [](int lane) {
    float sums[4] = {};
    if (lane > 0) multiply_accumulate<BFloat16>(sums, {0, 0, 0, 0}, {0, 0});
  };
  expect_error([&] { run(one_multiplies_alone); }, "a lane ended before its warp's exchange at emulation.cpp:");
}

// Blocks run in random order, so a kernel in which one block uses the results of another fails for some seed.
void test_blocks_do_not_wait_for_each_other() {
  const int64_t columns = 3, rows = 2;
  bool in_turn = true;
  for (unsigned seed = 0; seed < 10; ++seed) {
    int64_t next = 0;
    machine.run(columns, rows, 0, seed, [&](char*) {
      if (thread_index() != 0) return;
      in_turn &= next == block_index_y() * columns + block_index();
      ++next;
    });
    expect(next == columns * rows, "every block runs once");
  }
  expect(!in_turn, "blocks that rely on their order are caught");
}

// The matrix units truncate: many small products that are added to a large sum are lost, whatever its sign.
void test_matrix_units_truncate() {
  for (const float sign : {1.0F, -1.0F}) {
    float sum = 0;
    machine.run(1, 1, 0, 0, [&](char*) {
      const auto word = [](float value) { return std::bit_cast<uint32_t>(value); };
      float sums[4] = {sign, sign, sign, sign};
      for (int repeat = 0; repeat < 100; ++repeat)
        multiply_accumulate<float>(sums, {word(0x1.8p-12F), 0, 0, 0}, {word(sign * 0x1p-14F), 0});
      if (thread_index() == 0) sum = sums[0];
    });
    expect(sum == sign, "matrix units truncate to " + std::to_string(sign));
  }
}

}  // namespace kernel_tests
