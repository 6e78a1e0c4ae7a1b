// AVX-512 F, BW, DQ, VL and BMI2.
#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

namespace lora {
namespace avx512 {

#define LORA_CONVERTS_BF16 0
#include "avx512.inl"
#include "few_rows.inl"
// Of both.
#include "coded.inl"
#include "gating.inl"
#include "low_rank.inl"

}  // namespace avx512

extern const Kernels kAvx512 = {
    avx512::kTile,    avx512::kRows,  avx512::W,      avx512::kFewColumns, false,
    avx512::load_any, avx512::shrink, avx512::outer,  avx512::expand_any,  avx512::multiply_widened,
    avx512::combine,  avx512::kTerms, avx512::decode, avx512::spread,      nullptr,
    avx512::gate};

}  // namespace lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
