// AVX-512 as in avx512.cpp, and its bf16 products; and where there are tiles of them, these too.
#include <cstdlib>
#include <memory>
#include <new>

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

void multiply_any(const Product& p, int64_t first, int64_t last) {
  return p.type == Type::kBFloat16 ? multiply<Pairs>(p, first, last)
                                   : multiply_widened(p, first, last);
}

#if LORA_AMX
#include "amx.inl"

void multiply_amx(const Product& p, int64_t first, int64_t last) {
  return p.tiles != nullptr ? multiply_tiled(p, first, last) : multiply_any(p, first, last);
}

void combine_amx(const Combination& p, int64_t row, int64_t last_row, int64_t first, int64_t last) {
  const bool tiled = p.narrow && p.matrix_type == Type::kBFloat16 && p.count >= kCombined;
  return tiled ? combine_tiled(p, row, last_row, first, last)
               : combine(p, row, last_row, first, last);
}
#endif

}  // namespace avx512_bf16

extern const Kernels kAvx512Bf16 = {avx512_bf16::kTile,
                                    avx512_bf16::kRows,
                                    avx512_bf16::W,
                                    avx512_bf16::kFewColumns,
                                    true,
                                    avx512_bf16::load_any,
                                    avx512_bf16::shrink,
                                    avx512_bf16::outer,
                                    avx512_bf16::expand_any,
                                    avx512_bf16::multiply_any,
                                    avx512_bf16::combine,
                                    avx512_bf16::kTerms};
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
                             avx512_bf16::multiply_amx,
                             avx512_bf16::combine_amx,
                             avx512_bf16::kTerms,
                             &avx512_bf16::kTiled};
#endif

}  // namespace lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
