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

}  // namespace rgd_ext::cuda
