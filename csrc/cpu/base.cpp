// Plain C++ with four-float vectors: every CPU.
#include "scalar.h"

namespace lora {
namespace base {

constexpr int W = 4, kVectors = 2, kRows = 4, kPhilox = 1;
constexpr int kFewRows = 2, kFewColumns = 4;
typedef float V __attribute__((vector_size(16)));

template <typename T>
inline V load(const T* p) {
  return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void store(T* p, V v) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<T>(v[i]);
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
// The first `count` elements, then zeros.
template <typename T>
inline V load_some(const T* p, int count) {
  V v = {};
  for (int i = 0; i < count; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
template <typename T>
inline V through(V v) {
  for (int i = 0; i < W; ++i) v[i] = static_cast<float>(static_cast<T>(v[i]));
  return v;
}
inline V rounded_bf16(V v) { return through<BFloat16>(v); }
inline V rounded_half(V v) { return through<Half>(v); }
inline V splat(float f) { return V{f, f, f, f}; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline float total(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline V keep(V v, uint32_t bits) {
  for (int i = 0; i < W; ++i)
    if (!(bits >> i & 1)) v[i] = 0.f;
  return v;
}

// Codes of 4 bits, in the low ones or the high ones of 8.
struct Codes {
  uint8_t of[W];
};
inline Codes codes_of(const uint8_t* p) {
  Codes codes;
  std::memcpy(codes.of, p, W);
  return codes;
}
inline Codes high(Codes codes) {
  for (int i = 0; i < W; ++i) codes.of[i] >>= 4;
  return codes;
}
inline V look(const V (&values)[16 / W], Codes low) {
  V v;
  for (int i = 0; i < W; ++i) v[i] = values[(low.of[i] & 15) / W][low.of[i] % W];
  return v;
}
inline V look_up(const float* table, const uint8_t* codes) {
  return V{table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
}
inline V load_bytes(const int8_t* p) {
  return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}
// A product that no sum is fused with.
inline V apart(V v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}
// The elements of even and of odd places, and together again.
inline void part(V first, V second, V* even, V* odd) {
  *even = V{first[0], first[2], second[0], second[2]};
  *odd = V{first[1], first[3], second[1], second[3]};
}
inline void join(V even, V odd, V* first, V* second) {
  *first = V{even[0], odd[0], even[1], odd[1]};
  *second = V{even[2], odd[2], even[3], odd[3]};
}

inline void philox_bits(const Dropout& d, uint32_t block, uint32_t m, uint8_t* out) {
  uint32_t c0 = block, c1 = m, c2 = 0, c3 = 0, k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    const uint64_t p0 = uint64_t{kMul0} * c0, p1 = uint64_t{kMul1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint32_t bits = 0;
  for (int h = 0; h < 8; ++h)
    bits |= uint32_t{(words[h >> 1] >> 16 * (h & 1) & 0xFFFFu) >= d.threshold} << h;
  *out = static_cast<uint8_t>(bits);
}

#include "few_rows.inl"
// Of both.
#include "coded.inl"
#include "gating.inl"
#include "low_rank.inl"

}  // namespace base

const Kernels kBase = {
    base::kTile,    base::kRows,  base::W,      base::kFewColumns, false,
    base::load_any, base::shrink, base::outer,  base::expand_any,  base::multiply_widened,
    base::combine,  base::kTerms, base::decode, base::spread,      nullptr,
    base::gate};

}  // namespace lora
