#pragma once

namespace rgd_ext::cuda {

// Whether the user allowed TF32. False if torch's two settings for that disagree, for which torch raises an error.
bool tf32_allowed();

}  // namespace rgd_ext::cuda
