#pragma once

// The only parts of CUDA that kernel bodies use: thread indices, barriers, shuffles, asynchronous copies, the matrix
// instruction. With RGD_EXT_EMULATION a host compiler takes the same names from tests/cpp/emulation.h, which emulates
// them on the CPU with one fiber per CUDA thread.

#include <cstdint>
#include <type_traits>

#ifdef RGD_EXT_EMULATION

#define RGD_DEVICE inline
#include "emulation.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "rgd_ext's CUDA kernels need compute capability 8.0: leave older architectures out of TORCH_CUDA_ARCH_LIST"
#endif

#define RGD_DEVICE __device__ __forceinline__

namespace rgd_ext::cuda {

RGD_DEVICE int thread_index() { return threadIdx.x; }
RGD_DEVICE int64_t block_index() { return blockIdx.x; }
RGD_DEVICE int64_t block_index_y() { return blockIdx.y; }
RGD_DEVICE int64_t blocks() { return gridDim.x; }

RGD_DEVICE void barrier() { __syncthreads(); }

// The source location of a call, which only the emulation uses.
struct Place {
  RGD_DEVICE static Place current() { return {}; }
};

// The value of lane (own lane ^ mask). All lanes of the warp have to make the same call.
template <typename T>
RGD_DEVICE T shuffle_xor(T value, int mask, Place = {}) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of one lane. All lanes of the warp have to make the same call, with the same lane.
template <typename T>
RGD_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Starts a copy of `bytes` (4, 8 or 16) from global to shared memory, both aligned to `bytes`. Only the first `valid`
// bytes are read; the rest becomes zero. The copy has arrived after wait_copies(), for other threads after a barrier().
template <int bytes>
RGD_DEVICE void copy_async(void* shared, const void* global, int valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(bytes), "r"(valid)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
RGD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until only the last `pending` of this thread's groups may still be in flight.
template <int pending>
RGD_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Rounds once, as the host's operators do: never contracted to a fused multiply-add.
RGD_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
RGD_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
RGD_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RGD_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

RGD_DEVICE int log2_of(int power_of_two) { return 31 - __clz(power_of_two); }

// The same value, but the compiler cannot move computations with it to another place. It would compute addresses of
// rare writes before a loop and keep them in registers that the loop needs, or convert every element to select a few.
RGD_DEVICE int64_t computed_here(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
RGD_DEVICE double computed_here(double value) {
  asm volatile("" : "+d"(value));
  return value;
}

// 16 bytes of global memory that no thread writes during the kernel.
template <typename T>
RGD_DEVICE T load_packet(const void* global) {
  static_assert(sizeof(T) == 16);
  const uint4 words = __ldg(static_cast<const uint4*>(global));
  return reinterpret_cast<const T&>(words);
}

// 16 bytes of shared memory, in one load even where only some of the elements are used.
template <typename T>
RGD_DEVICE T shared_packet(const T* shared) {
  static_assert(sizeof(T) == 16);
  const uint4 words = *reinterpret_cast<const uint4*>(shared);
  return reinterpret_cast<const T&>(words);
}

template <typename T>
RGD_DEVICE void store_packet(void* global, const T& packet) {
  static_assert(sizeof(T) == 16);
  *static_cast<uint4*>(global) = reinterpret_cast<const uint4&>(packet);
}

RGD_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

RGD_DEVICE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
RGD_DEVICE float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
RGD_DEVICE void narrow(float value, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
RGD_DEVICE void narrow(float value, Half& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }

// Rounded to the ten bits of mantissa that matrix units use of a float.
RGD_DEVICE uint32_t to_tf32(uint32_t word) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(word)));
  return word;
}

// sums += A B^T, a warp together, for A of 16 x 32 bytes and B of 8 x 32 bytes, rows of S. With g = lane / 4 and
// t = lane % 4: a = 4-byte words (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) of A; b = words (g, t), (g, t + 4) of
// B; sums = elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename S>
RGD_DEVICE void multiply_accumulate(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define RGD_MMA(instruction)                                                                  \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<S, BFloat16>) {
    RGD_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<S, Half>) {
    RGD_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<S, float>);
    RGD_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef RGD_MMA
}

}  // namespace rgd_ext::cuda

#endif

namespace rgd_ext::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;  // of a block

// The values of all lanes of a warp, or of `lanes` neighbours (a power of two), combined in a fixed order. Every lane
// has to make the call, and gets the result.
template <typename T, typename F>
RGD_DEVICE T warp_combined(T value, F combine, int lanes = kWarp, Place place = Place::current()) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask, place);
    if (mask < lanes) value = combine(value, other);
  }
  return value;
}
template <typename T>
RGD_DEVICE T warp_sum(T value, int lanes = kWarp, Place place = Place::current()) {
  return warp_combined(value, [](T a, T b) { return a + b; }, lanes, place);
}

RGD_DEVICE float widen(float value) { return value; }
RGD_DEVICE double widen(double value) { return value; }
RGD_DEVICE void narrow(float value, float& to) { to = value; }
RGD_DEVICE void narrow(double value, double& to) { to = value; }

// The type in which sums over S are accumulated.
template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

// 16 bytes of one row, which a thread moves at a time.
template <typename S>
struct alignas(16) Packet {
  static constexpr int kColumns = 16 / sizeof(S);
  S columns[kColumns];
};

// Column c of a packet. Two columns of bfloat16 share a word; widening either takes one instruction.
template <typename S>
RGD_DEVICE Accumulate<S> widen(const Packet<S>& packet, int c) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(packet.columns)[c / 2];
    return float_of(c % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return widen(packet.columns[c]);
  }
}

}  // namespace rgd_ext::cuda
