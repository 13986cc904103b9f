// Checks the launches of the streaming kernels and of gram, for every number of samples, dtype and architecture: their
// shared memory fits, and enough bytes are in flight to read at the rate of the memory. `launch_tests ROWS` prints the
// launches for ROWS samples, for bench/gpu/machine_code.py.

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include "check.h"
#include "combine.cuh"
#include "gram.cuh"
#include "moments.cuh"

namespace {

using namespace rgd_ext::cuda;

struct Multiprocessor {
  std::string name;
  int64_t block_bytes, shared_bytes;  // shared memory that a block may use, and that of the multiprocessor
  int64_t threads, number;
  int64_t needed;  // bytes that have to be in flight to read at the rate of the memory
};

// For the GPU with the fastest memory of each architecture (A100 2.0 TB/s, RTX 3090 0.9, RTX 4090 1.0, H200 4.3, RTX
// 5090 1.8), and a latency of about a microsecond.
const std::vector<Multiprocessor> multiprocessors = {
    {"sm_80", 163 << 10, 164 << 10, 2048, 108, 19 << 10}, {"sm_86", 99 << 10, 100 << 10, 1536, 82, 12 << 10},
    {"sm_89", 99 << 10, 100 << 10, 1536, 128, 8 << 10},   {"sm_90", 227 << 10, 228 << 10, 2048, 132, 32 << 10},
    {"sm_120", 99 << 10, 100 << 10, 1536, 170, 11 << 10},
};
constexpr int64_t kSystemBytes = 1 << 10;  // that the system reserves of each block's shared memory
constexpr int64_t kColumns = 1 << 20;      // of a G that is large enough for all blocks
constexpr int64_t kFewSamples = 4;         // fewer samples do not fill the tiles that a block has in flight

struct Launch {
  std::string kernel;
  int64_t shared_bytes;
  int64_t by_registers;     // blocks for which there are enough registers, see tests/binary/test_cuda_build.py
  int64_t block_in_flight;  // bytes that a block has requested while it works on others
  int64_t results;          // bytes of partial results that a block writes for each sample

  int64_t blocks(const Multiprocessor& on) const {
    return std::min({on.shared_bytes / (shared_bytes + kSystemBytes), on.threads / kThreads, by_registers});
  }
  int64_t in_flight(const Multiprocessor& on) const { return blocks(on) * block_in_flight; }
};

template <typename Sums>
Launch gram(const std::string& kernel, int64_t rows) {
  // Two tiles are in flight off the diagonal of K, and three on it.
  const int64_t side = (rows + Sums::Shape::kBlock - 1) / Sums::Shape::kBlock, pairs = side * (side + 1) / 2;
  return {kernel, gram_shared_bytes<Sums>(), Sums::kBlocksPerMultiprocessor,
          (pairs > 1 ? 2 : 3) * Sums::Shape::kTileBytes, rows * int64_t{sizeof(typename Sums::T)} / pairs};
}

template <template <typename, int> class Sums, typename S>
Launch gram_by_size(const std::string& kernel, int64_t rows) {
  return with_block<Sums, S>(rows,
                             [&]<typename Found>(std::type_identity<Found>) { return gram<Found>(kernel, rows); });
}

template <typename S>
std::vector<Launch> launches(int64_t rows, const Multiprocessor& on) {
  const int on_chip = lanes_for<S>(rows, on.block_bytes), lanes = on_chip > 0 ? on_chip : widest_lanes(rows);
  const int64_t groups = kThreads / lanes;
  const auto loads = [&](int64_t ahead) { return std::min(ahead, (rows + groups - 1) / groups) * kThreads * 16; };
  const auto products = [&](const std::string& kernel, int vectors, int sums) {
    const int of_each = product_lanes<S>(rows, vectors, sums, on.block_bytes);
    return Launch{kernel, products_shared_bytes<S>(rows, of_each, vectors, sums), 2, product_rows(rows) * of_each * 16,
                  sums * int64_t{sizeof(double)}};
  };
  std::vector<Launch> all = {
      {"combine", group_sums_bytes<S>(), 4, loads(8), 0},
      {"combine of four", group_sums_bytes<S>(), 2, loads(4), 0},
      products("products", 1, 1),
      products("products with four", 4, 4),
      products("centred", 1, 2),
  };
  if (on_chip > 0)
    all.push_back({"moments", moments_shared_bytes<S>(rows, lanes), 4, rows * lanes * 16, 2 * sizeof(double)});
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>)
    all.push_back(gram_by_size<PlainSums, S>("gram", rows));
  if constexpr (!std::is_same_v<S, double>)
    all.push_back(gram_by_size<MatrixUnitSums, S>("gram by matrix units", rows));
  return all;
}

template <typename S>
void test_launches(const std::string& dtype) {
  for (const Multiprocessor& on : multiprocessors) {
    for (int64_t rows = 1; rows <= 1400; ++rows) {
      for (const Launch& launch : launches<S>(rows, on)) {
        const std::string what =
            launch.kernel + " of " + std::to_string(rows) + " samples of " + dtype + " on " + on.name + ": ";
        expect(launch.shared_bytes <= on.block_bytes, what + std::to_string(launch.shared_bytes) + " bytes do not fit");
        expect(launch.blocks(on) >= 1, what + "no block runs");
        expect(rows < kFewSamples || launch.in_flight(on) >= on.needed,
               what + std::to_string(launch.in_flight(on)) + " bytes in flight");
        const int64_t results = launch.results * launch.blocks(on) * on.number;
        expect(results <= kColumns * int64_t{sizeof(S)} / 10, what + std::to_string(results) + " bytes of results");
      }
    }
  }
}

template <typename S>
void print_launches(const std::string& dtype, int64_t rows) {
  for (const Multiprocessor& on : multiprocessors)
    for (const Launch& launch : launches<S>(rows, on))
      std::cout << on.name << ',' << launch.kernel << ',' << dtype << ',' << launch.shared_bytes << '\n';
}

}  // namespace

int main(int count, char** arguments) {
  const auto each_dtype = [](auto use) {
    use.template operator()<float>("float");
    use.template operator()<double>("double");
    use.template operator()<BFloat16>("BFloat16");
    use.template operator()<Half>("Half");
  };
  if (count > 1) {
    each_dtype([&]<typename S>(const char* dtype) { print_launches<S>(dtype, std::stoll(arguments[1])); });
    return 0;
  }
  each_dtype([]<typename S>(const char* dtype) { test_launches<S>(dtype); });
  std::cout << failures << " failures" << std::endl;
  return failures == 0 ? 0 : 1;
}
