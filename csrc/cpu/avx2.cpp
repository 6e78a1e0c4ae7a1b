// AVX2, FMA and F16C.
#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lora {
namespace avx2 {

constexpr int W = 8, kVectors = 2, kRows = 4, kPhilox = 4;
constexpr int kFewRows = 4, kFewColumns = 3, kLeastRows = 24;
typedef __m256 V;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline V load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The first `count` elements, then zeros.
template <typename T>
inline V load_some(const T* p, int count) {
  if (count == W) return load(p);
  T some[W] = {};
  std::memcpy(static_cast<void*>(some), p, count * sizeof(T));
  return load(some);
}
// To bf16, in the upper halves of the words.
inline __m256i bits_bf16(V v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7FC00000), nan);
}
inline V rounded_bf16(V v) {
  return _mm256_castsi256_ps(_mm256_and_si256(bits_bf16(v), _mm256_set1_epi32(~0xFFFF)));
}
inline V rounded_half(V v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline void store(BFloat16* p, V v) {
  __m256i r = _mm256_srli_epi32(bits_bf16(v), 16);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(r));
}
inline void store(Half* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline V splat(float f) { return _mm256_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline V keep(V v, uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}

// Rows become columns.
inline void transpose(V (&rows)[W]) {
  V pairs[W], fours[W];
  for (int i = 0; i < W; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < W; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xEE);
    }
  for (int i = 0; i < W / 2; ++i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
inline __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load_four(const BFloat16* p) {
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}
inline __m128 load_four(const Half* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// Four columns of four rows, from column t on, one column after the other.
template <typename T>
inline void transpose_tile(const T* const (&rows)[4], int64_t t, float* columns) {
  __m128 a = load_four(rows[0] + t), b = load_four(rows[1] + t);
  __m128 c = load_four(rows[2] + t), d = load_four(rows[3] + t);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(columns, a);
  _mm_storeu_ps(columns + 4, b);
  _mm_storeu_ps(columns + 8, c);
  _mm_storeu_ps(columns + 12, d);
}

// Codes of 4 bits, in the low ones or the high ones of 8.
typedef __m256i Codes;
inline Codes codes_of(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Codes high(Codes codes) { return _mm256_srli_epi32(codes, 4); }
inline V look(const V (&values)[2], Codes low) {
  const V bit = _mm256_castsi256_ps(_mm256_slli_epi32(low, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values[0], low),
                          _mm256_permutevar8x32_ps(values[1], low), bit);
}
inline V look_up(const float* table, const uint8_t* codes) {
  return _mm256_i32gather_ps(table, codes_of(codes), 4);
}
inline V load_bytes(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
// A product that no sum is fused with.
inline V apart(V v) {
  asm("" : "+x"(v));
  return v;
}
// The elements of even and of odd places, and together again.
inline void part(V first, V second, V* even, V* odd) {
  const __m256d evens = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0x88));
  const __m256d odds = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0xDD));
  *even = _mm256_castpd_ps(_mm256_permute4x64_pd(evens, 0xD8));
  *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(odds, 0xD8));
}
inline void join(V even, V odd, V* first, V* second) {
  const V low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  *first = _mm256_permute2f128_ps(low, high, 0x20);
  *second = _mm256_permute2f128_ps(low, high, 0x31);
}
// What has been rounded to bf16.
inline void store_pairs(BFloat16* p, V even, V odd) {
  const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_or_si256(low, _mm256_castps_si256(odd)));
}

// Four blocks, one in each 64-bit lane; the high halves of the counters are never read.
inline void philox_bits(const Dropout& d, uint32_t block, uint32_t m, uint8_t* out) {
  __m256i c0 = _mm256_setr_epi64x(block, block + 1u, block + 2u, block + 3u);
  __m256i c1 = _mm256_set1_epi64x(m), c2 = _mm256_setzero_si256(), c3 = c2;
  const __m256i mul0 = _mm256_set1_epi64x(kMul0), mul1 = _mm256_set1_epi64x(kMul1);
  uint32_t k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    const __m256i p0 = _mm256_mul_epu32(c0, mul0), p1 = _mm256_mul_epu32(c2, mul1);
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, key0));
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, key1));
    c1 = p1;
    c3 = p0;
  }
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  const __m256i front = _mm256_or_si256(_mm256_and_si256(c0, low), _mm256_slli_epi64(c1, 32));
  const __m256i back = _mm256_or_si256(_mm256_and_si256(c2, low), _mm256_slli_epi64(c3, 32));
  const __m256i t = _mm256_set1_epi16(static_cast<short>(d.threshold));
  const __m256i zero = _mm256_setzero_si256();
  // half >= t iff t - half saturates to zero.
  const __m256i even = _mm256_subs_epu16(t, _mm256_unpacklo_epi64(front, back));
  const __m256i odd = _mm256_subs_epu16(t, _mm256_unpackhi_epi64(front, back));
  const int bits = _mm256_movemask_epi8(
      _mm256_packs_epi16(_mm256_cmpeq_epi16(even, zero), _mm256_cmpeq_epi16(odd, zero)));
  std::memcpy(out, &bits, sizeof bits);
}

#include "few_rows.inl"
#include "packed.inl"
// Of both.
#include "coded.inl"
#include "gating.inl"
#include "low_rank.inl"

}  // namespace avx2

extern const Kernels kAvx2 = {
    avx2::kTile,    avx2::kRows,  avx2::W,       avx2::kFewColumns, false,
    avx2::load_any, avx2::shrink, avx2::outer,   avx2::expand_any,  avx2::multiply_widened,
    avx2::combine,  avx2::kTerms, avx2::decode,  avx2::spread,      nullptr,
    avx2::gate,     nullptr,      &avx2::kPacked};

}  // namespace lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
