// AVX-512 as in avx512.cpp, and its bf16 products; and where there are tiles of them, these too.
#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target(                                                                       \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#endif

namespace lora {
namespace avx512_bf16 {

#define LORA_CONVERTS_BF16 1
#include "avx512.inl"
#include "few_rows.inl"
// Of both.
#include "coded.inl"
#include "gating.inl"
#include "low_rank.inl"

// x and matrix in bf16: sums of two products each, in fp32.
struct Pairs {
  typedef BFloat16 X;
  typedef BFloat16 M;
  typedef __m512bh VX;
  typedef __m512bh VM;
  static constexpr int kStep = 2 * W;
  static VX load_x(const X* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static VX load_x(const X* p, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, count), p);
  }
  static VM load_m(const M* p) { return load_x(p); }
  static VM load_m(const M* p, int count) { return load_x(p, count); }
  static V dot(VX x, VM m, V sum) { return _mm512_dpbf16_ps(sum, x, m); }
};

// The same of a matrix of 4 bits, whose values are words of a register, twice.
struct Pairs4 {
  typedef BFloat16 X;
  typedef __m512bh VX;
  typedef __m512i VM;
  typedef __m512i Table;
  static constexpr int kStep = 2 * W;
  static VX load_x(const X* p) { return Pairs::load_x(p); }
  static Table table(const Coded& c, int64_t block, float scale) {
    const Values values = values_of<Type::kFloat>(c, block, scale);
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values.part[0]));
  }
  static void pair(Table table, const uint8_t* p, VM* even, VM* odd) {
    const __m512i codes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    *odd = _mm512_permutexvar_epi16(codes, table);
  }
  static V dot(VX x, VM m, V sum) { return _mm512_dpbf16_ps(sum, x, (__m512bh)m); }
};

// And of bytes, all of which are numbers in bf16.
struct Pairs8 {
  typedef BFloat16 X;
  typedef int8_t M;
  typedef __m512bh VX;
  typedef __m512bh VM;
  static constexpr int kStep = 2 * W;
  static VX load_x(const X* p) { return Pairs::load_x(p); }
  static VX load_x(const X* p, int count) { return Pairs::load_x(p, count); }
  static VM load_m(const M* p) { return _mm512_cvtne2ps_pbh(load_bytes(p + W), load_bytes(p)); }
  static VM load_m(const M* p, int count) {
    M some[kStep] = {};
    std::memcpy(some, p, count);
    return load_m(some);
  }
  static V dot(VX x, VM m, V sum) { return _mm512_dpbf16_ps(sum, x, m); }
};

void spread_bf16(void* rows, int64_t count, int64_t columns, int64_t pitch) {
  const __m512i one = _mm512_set1_epi16(1);
  alignas(64) uint16_t places[2 * W];
  for (int i = 0; i < 2 * W; ++i) places[i] = static_cast<uint16_t>(2 * i);
  const __m512i even = _mm512_load_si512(places), odd = _mm512_add_epi16(even, one);
  for (int64_t m = 0; m < count; ++m) {
    BFloat16* const row = static_cast<BFloat16*>(rows) + m * pitch;
    for (int64_t k = 0; k < columns; k += 4 * W) {
      const __m512i first = _mm512_loadu_si512(row + k);
      const __m512i second = _mm512_loadu_si512(row + k + 2 * W);
      _mm512_storeu_si512(row + k, _mm512_permutex2var_epi16(first, even, second));
      _mm512_storeu_si512(row + k + 2 * W, _mm512_permutex2var_epi16(first, odd, second));
    }
  }
}

void multiply_any(const Product& p, int64_t first, int64_t last) {
  if (p.coded != nullptr && p.type == Type::kBFloat16)
    return p.coded->four ? multiply_as<Pairs4>(p, first, last)
                         : multiply_as<Pairs8>(p, first, last);
  return p.type == Type::kBFloat16 ? multiply<Pairs>(p, first, last)
                                   : multiply_widened(p, first, last);
}

#include "factors.inl"
namespace pairs {
#include "pairs.inl"
#include "tiled.inl"
}  // namespace pairs

#if LORA_AMX
namespace amx {
#include "amx.inl"
#include "tiled.inl"
}  // namespace amx
#endif

}  // namespace avx512_bf16

extern const Kernels kAvx512Bf16 = {avx512_bf16::kTile,
                                    avx512_bf16::kRows,
                                    avx512_bf16::W,
                                    avx512_bf16::kSide,
                                    true,
                                    avx512_bf16::load_any,
                                    avx512_bf16::shrink,
                                    avx512_bf16::outer,
                                    avx512_bf16::expand_any,
                                    avx512_bf16::pairs::multiply_bf16,
                                    avx512_bf16::pairs::combine_bf16,
                                    avx512_bf16::kTerms,
                                    avx512_bf16::decode,
                                    avx512_bf16::spread,
                                    avx512_bf16::spread_bf16,
                                    avx512_bf16::gate,
                                    &avx512_bf16::pairs::kTiled};
#if LORA_AMX
extern const Kernels kAmx = {avx512_bf16::kTile,
                             avx512_bf16::kRows,
                             avx512_bf16::W,
                             avx512_bf16::kSide,
                             true,
                             avx512_bf16::load_any,
                             avx512_bf16::shrink,
                             avx512_bf16::outer,
                             avx512_bf16::expand_any,
                             avx512_bf16::amx::multiply_bf16,
                             avx512_bf16::amx::combine_bf16,
                             avx512_bf16::kTerms,
                             avx512_bf16::decode,
                             avx512_bf16::spread,
                             avx512_bf16::spread_bf16,
                             avx512_bf16::gate,
                             &avx512_bf16::amx::kTiled};
#endif

}  // namespace lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
