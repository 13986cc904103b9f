#pragma once

// Emulates csrc/cuda/primitives.cuh on the CPU, with one fiber per CUDA thread. A fiber runs until it reaches a barrier
// or an exchange with its warp. The fiber that runs next, the order of the blocks, and the time at which an
// asynchronous copy arrives are random. Compile with AddressSanitizer: shared memory and the arrays of the tests are
// exact in size, so that it notices every access past their ends.

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace rgd_ext::emulation {

using Place = std::source_location;

// "file:line"
inline std::string describe(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;

  void land() const {
    std::memcpy(shared, global, valid);
    std::memset(static_cast<char*>(shared) + valid, 0, bytes - valid);
  }
};

struct Fiber {
  static constexpr size_t kStackBytes = 256 << 10;

  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  void* fake_stack;
  bool done;
  std::string waits_at;                   // the barrier at which it waits, or "" if it can run
  std::optional<Place> exchanges;         // the shuffle at which it waits for the other lanes of its warp
  std::vector<std::vector<Copy>> copies;  // groups of copies; the last one is not yet committed
};

// Runs one grid at a time. A defect (threads at different barriers, lanes at different shuffles, a misaligned access)
// makes run() throw an exception. The fibers of that block never return, and what is on their stacks is abandoned.
class Machine {
 public:
  static constexpr int kThreads = 256, kWarp = 32;
  static constexpr int kSlotBytes = 64;

  // The barrier at this "file:line" is ignored, to test that the tests notice it.
  std::string ignored_barrier;
  // All barriers that were reached.
  std::set<std::string> barriers;

  int thread = 0;
  int64_t block_x = 0, block_y = 0, blocks_x = 1;
  char slots[kThreads][kSlotBytes];

  void run(int64_t x, int64_t y, int64_t shared_bytes, unsigned seed, const std::function<void(char*)>& kernel) {
    random_.seed(seed);
    kernel_ = &kernel;
    blocks_x = x;
    std::vector<std::pair<int64_t, int64_t>> order;
    for (int64_t i = 0; i < x * y; ++i) order.emplace_back(i % x, i / x);
    std::shuffle(order.begin(), order.end(), random_);
    for (const auto& block : order) {
      std::tie(block_x, block_y) = block;
      run_block(shared_bytes);
    }
  }

  void fail(const std::string& message) {
    failure_ = message;
    leave();
  }

  void wait_at(const Place& barrier) {
    if (stops_at(describe(barrier))) leave();
  }

  void wait_for_warp(const Place& place) {
    fibers_[thread].exchanges = place;
    leave();
  }

  void start_copy(Copy copy) {
    if (coin()) return copy.land();
    fibers_[thread].copies.back().push_back(copy);
  }
  void commit_copies() { fibers_[thread].copies.emplace_back(); }
  void wait_copies(int pending) {
    auto& groups = fibers_[thread].copies;
    while (static_cast<int>(groups.size()) - 1 > pending) {
      for (const Copy& copy : groups.front()) copy.land();
      groups.erase(groups.begin());
    }
  }

 private:
  bool coin() { return random_() & 1; }

  // Whether the thread waits at the barrier. The string must not live on the stack of the fiber while it waits: it
  // would leak if the fiber is abandoned.
  bool stops_at(const std::string& barrier) {
    barriers.insert(barrier);
    if (barrier == ignored_barrier) return false;
    fibers_[thread].waits_at = barrier;
    return true;
  }

  void run_block(int64_t shared_bytes) {
    // Exact in size, so that AddressSanitizer notices every access past its end, and full of NaN.
    const std::unique_ptr<char[]> shared(new char[shared_bytes]);
    std::memset(shared.get(), 0xff, shared_bytes);
    shared_ = shared.get();
    for (Fiber& fiber : fibers_) {
      // Clear AddressSanitizer's marks: on the whole stack if the fibers did not return, else on the outermost frame.
      const size_t marked = failure_.empty() ? 1024 : Fiber::kStackBytes;
      ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get() + Fiber::kStackBytes - marked, marked);
      getcontext(&fiber.context);
      fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = Fiber::kStackBytes};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
      fiber.context.uc_stack.ss_size = 0;  // AddressSanitizer would clear its marks of so much stack at every switch
      fiber.fake_stack = nullptr;
      fiber.done = false;
      fiber.waits_at.clear();
      fiber.exchanges.reset();
      fiber.copies.assign(1, {});
    }
    failure_ = kUnfinished;
    draw_laggards();
    for (std::vector<int> ready = next_threads(); !ready.empty(); ready = next_threads()) {
      std::shuffle(ready.begin(), ready.end(), random_);
      for (int t : ready) {
        resume(t);
        if (failure_ != kUnfinished) throw std::runtime_error(failure_);
      }
    }
    failure_.clear();
  }

  // Lets the lanes of a warp continue if all have arrived at the same exchange. It is an error if a lane waits
  // elsewhere or has ended, because a GPU need not wait for it.
  void open_exchange(int warp) {
    const auto begin = fibers_.begin() + warp, end = begin + kWarp;
    const auto first = std::find_if(begin, end, [](const Fiber& fiber) { return fiber.exchanges.has_value(); });
    if (first == end) return;
    const Place place = *first->exchanges;
    for (auto fiber = begin; fiber != end; ++fiber) {
      if (fiber->done) throw std::runtime_error("a lane ended before its warp's exchange at " + describe(place));
      const auto& other = fiber->exchanges;
      const bool elsewhere = other && (other->line() != place.line() || other->column() != place.column() ||
                                       std::strcmp(other->file_name(), place.file_name()) != 0);
      if (elsewhere || !fiber->waits_at.empty())
        throw std::runtime_error("lanes of a warp wait at " + describe(place) + " and at " +
                                 (elsewhere ? describe(*other) : fiber->waits_at));
    }
    if (std::all_of(begin, end, [](const Fiber& fiber) { return fiber.exchanges.has_value(); }))
      for (auto fiber = begin; fiber != end; ++fiber) fiber->exchanges.reset();
  }

  // The fibers that can run. Warps that are complete at an exchange, and the block at a barrier, may continue.
  std::vector<int> next_threads() {
    std::vector<int> ready;
    int live = 0, at_barrier = 0;
    const std::string* place = nullptr;
    for (int warp = 0; warp < kThreads; warp += kWarp) {
      open_exchange(warp);
      for (int t = warp; t < warp + kWarp; ++t) {
        Fiber& fiber = fibers_[t];
        live += !fiber.done;
        if (!fiber.waits_at.empty()) {
          ++at_barrier;
          if (place && *place != fiber.waits_at)
            throw std::runtime_error("threads wait at " + *place + " and at " + fiber.waits_at);
          place = &fiber.waits_at;
        } else if (!fiber.done && !fiber.exchanges) {
          ready.push_back(t);
        }
      }
    }
    const auto lags = [this](int t) { return first_laggard_ <= t && t < end_of_laggards_; };
    if (!std::all_of(ready.begin(), ready.end(), lags)) std::erase_if(ready, lags);
    if (!ready.empty() || live == 0) return ready;
    for (Fiber& fiber : fibers_) fiber.waits_at.clear();
    draw_laggards();
    return next_threads();
  }

  // Chooses a thread or a warp that runs only while no other can.
  void draw_laggards() {
    const int size = coin() ? 1 : kWarp;
    first_laggard_ = static_cast<int>(random_() % (kThreads / size)) * size;
    end_of_laggards_ = first_laggard_ + size;
  }

  static void enter();

  void resume(int t) {
    thread = t;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fibers_[t].stack.get(), Fiber::kStackBytes);
    swapcontext(&scheduler_, &fibers_[t].context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  void leave() {
    Fiber& fiber = fibers_[thread];
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
  }

  static constexpr const char* kUnfinished = "the block did not finish";

  std::vector<Fiber> fibers_{kThreads};
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  const std::function<void(char*)>* kernel_ = nullptr;
  char* shared_ = nullptr;
  std::string failure_;
  int first_laggard_ = 0, end_of_laggards_ = kWarp;
  std::mt19937 random_;
};

inline Machine machine;

inline void Machine::enter() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_, &machine.scheduler_stack_bytes_);
  (*machine.kernel_)(machine.shared_);
  machine.fibers_[machine.thread].done = true;
  machine.leave();
}

inline void check_alignment(const void* address, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    machine.fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at an address they do not divide");
}

}  // namespace rgd_ext::emulation

namespace rgd_ext::cuda {

inline int thread_index() { return emulation::machine.thread; }
inline int64_t block_index() { return emulation::machine.block_x; }
inline int64_t block_index_y() { return emulation::machine.block_y; }
inline int64_t blocks() { return emulation::machine.blocks_x; }

using emulation::Place;

inline void barrier(Place place = Place::current()) { emulation::machine.wait_at(place); }

// use(lane), where lane(i) is the value of lane i of the warp. All lanes have to make the same call.
template <typename T, typename F>
auto with_warp(const T& value, const Place& place, F use) {
  static_assert(sizeof(T) <= emulation::Machine::kSlotBytes);
  auto& machine = emulation::machine;
  std::memcpy(machine.slots[machine.thread], &value, sizeof(T));
  machine.wait_for_warp(place);
  const int first = machine.thread / machine.kWarp * machine.kWarp;
  const auto result = use([&](int lane) {
    T other;
    std::memcpy(&other, machine.slots[first + lane], sizeof(T));
    return other;
  });
  machine.wait_for_warp(place);
  return result;
}

template <typename T>
T shuffle_xor(T value, int mask, Place place = Place::current()) {
  return with_warp(value, place, [&](auto lane) { return lane(thread_index() % emulation::Machine::kWarp ^ mask); });
}

template <typename T>
T shuffle(T value, int of, Place place = Place::current()) {
  return with_warp(value, place, [&](auto lane) { return lane(of); });
}

template <int bytes>
void copy_async(void* shared, const void* global, int valid) {
  emulation::check_alignment(shared, bytes, "copy to shared memory");
  emulation::check_alignment(global, bytes, "copy from global memory");
  emulation::machine.start_copy({shared, global, bytes, valid});
}
inline void commit_copies() { emulation::machine.commit_copies(); }
template <int pending>
void wait_copies() {
  emulation::machine.wait_copies(pending);
}

template <typename T>
T multiply(T a, T b) {
  return a * b;
}
inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline int log2_of(int power_of_two) { return 31 - __builtin_clz(power_of_two); }

inline int64_t computed_here(int64_t value) { return value; }
inline double computed_here(double value) { return value; }

template <typename T>
T load_packet(const void* global) {
  emulation::check_alignment(global, sizeof(T), "load");
  T value;
  std::memcpy(&value, global, sizeof(T));
  return value;
}

template <typename T>
T shared_packet(const T* shared) {
  static_assert(sizeof(T) == 16);
  emulation::check_alignment(shared, sizeof(T), "load from shared memory");
  return *shared;
}

template <typename T>
void store_packet(void* global, const T& packet) {
  static_assert(sizeof(T) == 16);
  emulation::check_alignment(global, sizeof(T), "store");
  std::memcpy(global, &packet, sizeof(T));
}

inline float float_of(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Half value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof(half));
  return half;
}
inline void narrow(float value, BFloat16& to) {  // finite values, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  to.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float value, Half& to) {
  const auto half = static_cast<_Float16>(value);
  std::memcpy(&to, &half, sizeof(half));
}

inline uint32_t to_tf32(uint32_t word) { return (word + 0x1000) & ~0x1fffu; }

// Rounds towards zero, as the matrix units do.
inline float truncated(double value) {
  const auto nearest = static_cast<float>(value);
  return std::abs(nearest) > std::abs(value) ? std::nextafter(nearest, 0.0F) : nearest;
}

template <typename S>
void multiply_accumulate(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Place place = Place::current()) {
  struct Fragments {
    uint32_t a[4], b[2];
  } own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  constexpr int kElements = 4 / sizeof(S);
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  const auto product = [](uint32_t left, uint32_t right) {
    S x[kElements], y[kElements];
    std::memcpy(x, &left, 4);
    std::memcpy(y, &right, 4);
    double sum = 0;
    for (int e = 0; e < kElements; ++e) {
      if constexpr (std::is_same_v<S, float>) {
        sum += static_cast<double>(x[e]) * y[e];
      } else {
        sum += static_cast<double>(widen(x[e])) * widen(y[e]);
      }
    }
    return sum;
  };
  with_warp(own, place, [&](auto lane) {
    for (int e = 0; e < 4; ++e) {
      double sum = sums[e];
      for (int k = 0; k < 4; ++k) {
        const Fragments left = lane(g * 4 + k), right = lane((2 * t + e % 2) * 4 + k);
        sum += product(left.a[e / 2], right.b[0]) + product(left.a[2 + e / 2], right.b[1]);
      }
      sums[e] = truncated(sum);
    }
    return 0;
  });
}

}  // namespace rgd_ext::cuda
