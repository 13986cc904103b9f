#include "tf32.h"

#include <ATen/Context.h>

namespace rgd_ext::cuda {

bool tf32_allowed() {
  try {
    return at::globalContext().allowTF32CuBLAS();
  } catch (const c10::Error&) {
    return false;
  }
}

}  // namespace rgd_ext::cuda
