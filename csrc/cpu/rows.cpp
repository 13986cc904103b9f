#include "rows.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// False alarms from GCC's own AVX-512 header (_mm512_undefined_*).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace rgd_ext::cpu {
namespace {

template <typename T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};

// The lanes of two vectors by number, those of b after those of a.
#if defined(__clang__)
#define RGD_EXT_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
template <typename T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
#define RGD_EXT_SHUFFLE(T, a, b, ...) \
  __builtin_shuffle(a, b, typename VectorOf<Index<T>, kVectorBytes>::type{__VA_ARGS__})
#endif

namespace plain {

constexpr int kVectorBytes = 16;
constexpr int kDotRows = 4, kGramRows = 2, kGramColumns = 4, kTapVectors = 2;
using Float = VectorOf<float, kVectorBytes>::type;

template <typename V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

template <typename S>
inline Float from_half(const S* from) {
  return Float{from[0], from[1], from[2], from[3]};
}
inline Float from_bfloat16(const c10::BFloat16* from) { return from_half(from); }

template <typename S>
inline void to_half(Float vector, S* to) {
  for (int lane = 0; lane < 4; ++lane) to[lane] = vector[lane];
}
inline void to_bfloat16(Float vector, c10::BFloat16* to) { to_half(vector, to); }

#include "row_kernels.h"

}  // namespace plain

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {

constexpr int kVectorBytes = 32;
// Sixteen registers: 4 rows x (weight + 2 sums) + sum + centre + difference; 3 x 3 products + 3 + 1.
constexpr int kDotRows = 4, kGramRows = 3, kGramColumns = 3, kTapVectors = 2;

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

inline __m256 from_half(const c10::Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline void to_half(__m256 vector, c10::Half* to) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256 from_bfloat16(const c10::BFloat16* from) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline void to_bfloat16(__m256 vector, c10::BFloat16* to) {
  const __m256i bits = _mm256_castps_si256(vector);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(vector, vector, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0b1000);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
}

#include "row_kernels.h"

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {

constexpr int kVectorBytes = 64;
// Thirty-two registers: 8 rows x (weight + 2 sums) + sum + centre + difference; 6 x 4 products + 4 + 1.
constexpr int kDotRows = 8, kGramRows = 6, kGramColumns = 4, kTapVectors = 4;

inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }

inline __m512 from_half(const c10::Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline void to_half(__m512 vector, c10::Half* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}

inline __m512 from_bfloat16(const c10::BFloat16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline void to_bfloat16(__m512 vector, c10::BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(vector);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(vector, vector, _CMP_UNORD_Q);
  const __m512i halves = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(halves));
}

#include "row_kernels.h"

}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)

}  // namespace

template <typename S>
const RowKernels<S>& row_kernels() {
  using T = accumulate_t<S>;
  static const RowKernels<S> chosen = [] {
#if defined(__x86_64__)
    // The environment variable may name more than the processor has.
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && __builtin_cpu_supports("avx512bw")) return avx512::kernels<S, T>();
    if (capability.starts_with("AVX") && __builtin_cpu_supports("avx2")) return avx2::kernels<S, T>();
#endif
    return plain::kernels<S, T>();
  }();
  return chosen;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<c10::BFloat16>& row_kernels<c10::BFloat16>();
template const RowKernels<c10::Half>& row_kernels<c10::Half>();

}  // namespace rgd_ext::cpu
