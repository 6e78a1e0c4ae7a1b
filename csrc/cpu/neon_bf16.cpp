// NEON as in neon.cpp, and its bf16 products (Armv8.6, or 8.2 with the extension).
#include "scalar.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
#include <arm_neon.h>

namespace lora {
namespace neon_bf16 {

#include "neon.inl"
// Of these vectors.
#include "few_rows.inl"
// Of both.
#include "coded.inl"
#include "gating.inl"
#include "low_rank.inl"

// x and matrix in bf16: sums of two products each, in fp32.
struct Pairs {
  typedef BFloat16 X;
  typedef BFloat16 M;
  typedef bfloat16x8_t VX;
  typedef bfloat16x8_t VM;
  static constexpr int kStep = 2 * W;
  static VX load_x(const X* p) { return vld1q_bf16(reinterpret_cast<const bfloat16_t*>(p)); }
  static VX load_x(const X* p, int count) {
    X some[kStep] = {};
    std::memcpy(static_cast<void*>(some), p, count * sizeof(X));
    return load_x(some);
  }
  static VM load_m(const M* p) { return load_x(p); }
  static VM load_m(const M* p, int count) { return load_x(p, count); }
  static V dot(VX x, VM m, V sum) { return vbfdotq_f32(sum, x, m); }
};

// And of bytes, all of which are numbers in bf16.
struct Pairs8 {
  typedef BFloat16 X;
  typedef int8_t M;
  typedef bfloat16x8_t VX;
  typedef bfloat16x8_t VM;
  static constexpr int kStep = 2 * W;
  static VX load_x(const X* p) { return Pairs::load_x(p); }
  static VX load_x(const X* p, int count) { return Pairs::load_x(p, count); }
  static VM load_m(const M* p) {
    BFloat16 values[kStep];
    store(values, load_bytes(p));
    store(values + W, load_bytes(p + W));
    return load_x(values);
  }
  static VM load_m(const M* p, int count) {
    M some[kStep] = {};
    std::memcpy(some, p, count);
    return load_m(some);
  }
  static V dot(VX x, VM m, V sum) { return vbfdotq_f32(sum, x, m); }
};

// And of 4 bits, whose values are 32 bytes.
struct Pairs4 {
  typedef BFloat16 X;
  typedef bfloat16x8_t VX;
  typedef bfloat16x8_t VM;
  typedef uint8x16x2_t Table;
  static constexpr int kStep = 2 * W;
  static VX load_x(const X* p) { return Pairs::load_x(p); }
  static Table table(const Coded& c, int64_t block, float scale) {
    const Values values = values_of<Type::kBFloat16>(c, block, scale);
    BFloat16 bits[16];
    for (int i = 0; i < 4; ++i) store(bits + i * W, values.part[i]);
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(bits);
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
  }
  static VM values_at(Table table, uint8x8_t codes) {
    // The two bytes of a value follow each other.
    const uint8x8_t low = vshl_n_u8(codes, 1), high = vorr_u8(low, vdup_n_u8(1));
    const uint8x16_t places = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
    return vreinterpretq_bf16_u8(vqtbl2q_u8(table, places));
  }
  static void pair(Table table, const uint8_t* p, VM* even, VM* odd) {
    const uint8x8_t codes = vld1_u8(p);
    *even = values_at(table, vshr_n_u8(codes, 4));
    *odd = values_at(table, vand_u8(codes, vdup_n_u8(15)));
  }
  static V dot(VX x, VM m, V sum) { return vbfdotq_f32(sum, x, m); }
};

void spread_bf16(void* rows, int64_t count, int64_t columns, int64_t pitch) {
  for (int64_t m = 0; m < count; ++m) {
    uint16_t* const row = static_cast<uint16_t*>(rows) + m * pitch;
    for (int64_t k = 0; k < columns; k += 4 * W) {
      const uint16x8x2_t parts = vld2q_u16(row + k);
      vst1q_u16(row + k, parts.val[0]);
      vst1q_u16(row + k + 2 * W, parts.val[1]);
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

}  // namespace neon_bf16

extern const Kernels kNeonBf16 = {neon_bf16::kTile,
                                  neon_bf16::kRows,
                                  neon_bf16::W,
                                  neon_bf16::kFewColumns,
                                  true,
                                  neon_bf16::load_any,
                                  neon_bf16::shrink,
                                  neon_bf16::outer,
                                  neon_bf16::expand_any,
                                  neon_bf16::multiply_any,
                                  neon_bf16::combine,
                                  neon_bf16::kTerms,
                                  neon_bf16::decode,
                                  neon_bf16::spread,
                                  neon_bf16::spread_bf16,
                                  neon_bf16::gate};

}  // namespace lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
