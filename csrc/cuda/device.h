#pragma once

// The current GPU, as far as launches depend on it.

#include <cstdint>

namespace rgd_ext::cuda {

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that one block may have
};

// Raises where this binary holds no code for it.
const Device& current_device();

// Blocks of a kernel, of kThreads threads and so much dynamic shared memory, that run at the same time. It may be
// launched with that much from then on. The driver is asked once, which takes microseconds.
int64_t resident_blocks(const void* kernel, int64_t shared_bytes);

}  // namespace rgd_ext::cuda
