#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "device.h"
#include "primitives.cuh"

namespace rgd_ext::cuda {
namespace {

__global__ void probe() {}

Device inspect(int index) {
  int major = 0, minor = 0, multiprocessors = 0, shared_bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();
    TORCH_CHECK(false, "rgd_ext was compiled for ", RGD_EXT_ARCHITECTURES, " but this GPU has compute capability ",
                major, ".", minor, ": install it again with TORCH_CUDA_ARCH_LIST=", major, ".", minor,
                " (8.0 or newer), or with RGD_EXT_BUILD=cpu for plain PyTorch on the GPU");
  }
  C10_CUDA_CHECK(error);
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return {multiprocessors, shared_bytes};
}

int64_t ask_resident_blocks(const void* kernel, int64_t shared_bytes, const Device& device) {
  // A kernel may have no more than 48 KB by default. The new limit is always the same, because host threads that launch
  // the kernel concurrently share it.
  if (shared_bytes > 48 << 10)
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(device.shared_bytes)));
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared_bytes));
  return int64_t{std::max(blocks, 1)} * device.multiprocessors;
}

}  // namespace

const Device& current_device() {
  // A device whose inspection fails is inspected again at the next call.
  static std::mutex devices_mutex;
  static std::array<Device, C10_COMPILE_TIME_MAX_GPUS> devices{};
  const int index = c10::cuda::current_device();
  const std::lock_guard<std::mutex> lock(devices_mutex);
  if (devices[index].multiprocessors == 0) devices[index] = inspect(index);
  return devices[index];
}

int64_t resident_blocks(const void* kernel, int64_t shared_bytes) {
  static std::mutex known_mutex;
  static std::map<std::tuple<const void*, int, int64_t>, int64_t> known;
  const Device& device = current_device();
  const std::lock_guard<std::mutex> lock(known_mutex);
  const std::tuple key(kernel, static_cast<int>(c10::cuda::current_device()), shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = ask_resident_blocks(kernel, shared_bytes, device);
}

}  // namespace rgd_ext::cuda
