#pragma once

// The properties of the current GPU that launches depend on.

#include <cstdint>

namespace rgd_ext::cuda {

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that one block may have
};

// Raises an error if this binary has no code for the current GPU.
const Device& current_device();

// The number of blocks of a kernel, with kThreads threads and this much dynamic shared memory, that run at the same
// time. The kernel may then be launched with that much. The driver, which takes microseconds to answer, is asked once.
int64_t resident_blocks(const void* kernel, int64_t shared_bytes);

}  // namespace rgd_ext::cuda
