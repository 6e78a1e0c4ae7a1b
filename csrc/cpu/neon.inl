// Vectors of NEON and the kernels of them; included in a namespace for each further extension.

constexpr int W = 4, kVectors = 2, kRows = 4, kPhilox = 2;
constexpr int kFewRows = 4, kFewColumns = 4;
typedef float32x4_t V;

inline V load(const float* p) { return vld1q_f32(p); }
inline V widened_bf16(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
inline V load(const BFloat16* p) {
  return widened_bf16(vld1_u16(reinterpret_cast<const uint16_t*>(p)));
}
inline V load(const Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
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
inline uint32x4_t bits_bf16(V v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  return vbslq_u32(vceqq_f32(v, v), r, vdupq_n_u32(0x7FC00000));
}
inline V rounded_bf16(V v) {
  return vreinterpretq_f32_u32(vandq_u32(bits_bf16(v), vdupq_n_u32(0xFFFF0000)));
}
inline V rounded_half(V v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline void store(BFloat16* p, V v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(bits_bf16(v), 16));
}
inline void store(Half* p, V v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
inline V splat(float f) { return vdupq_n_f32(f); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline float total(V v) { return vaddvq_f32(v); }
inline V keep(V v, uint32_t bits) {
  const uint32x4_t lane = {1, 2, 4, 8};
  const uint32x4_t kept = vtstq_u32(vdupq_n_u32(bits), lane);
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), kept));
}
// Codes of 4 bits, in the low ones or the high ones of words.
typedef uint32x4_t Codes;
inline Codes codes_of(const uint8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}
inline Codes high(Codes codes) { return vshrq_n_u32(codes, 4); }
inline V look(const V (&values)[4], Codes low) {
  // The bytes of a value: four of the table's 64.
  const uint32x4_t code = vandq_u32(low, vdupq_n_u32(15));
  const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
  const uint8x16x4_t table = {{vreinterpretq_u8_f32(values[0]), vreinterpretq_u8_f32(values[1]),
                               vreinterpretq_u8_f32(values[2]), vreinterpretq_u8_f32(values[3])}};
  return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)));
}
inline V look_up(const float* table, const uint8_t* codes) {
  return V{table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
}
inline V load_bytes(const int8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
// A product that no sum is fused with.
inline V apart(V v) {
  asm("" : "+w"(v));
  return v;
}
// The elements of even and of odd places, and together again.
inline void part(V first, V second, V* even, V* odd) {
  *even = vuzp1q_f32(first, second);
  *odd = vuzp2q_f32(first, second);
}
inline void join(V even, V odd, V* first, V* second) {
  *first = vzip1q_f32(even, odd);
  *second = vzip2q_f32(even, odd);
}
// What has been rounded to bf16.
inline void store_pairs(BFloat16* p, V even, V odd) {
  const uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_f32(even), 16);
  vst1q_u32(reinterpret_cast<uint32_t*>(p), vorrq_u32(low, vreinterpretq_u32_f32(odd)));
}

// Two blocks, one in each lane.
inline void philox_bits(const Dropout& d, uint32_t block, uint32_t m, uint8_t* out) {
  uint32x2_t c0 = {block, block + 1u}, c1 = vdup_n_u32(m), c2 = vdup_n_u32(0), c3 = c2;
  uint32_t k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    const uint64x2_t p0 = vmull_n_u32(c0, kMul0), p1 = vmull_n_u32(c2, kMul1);
    c0 = veor_u32(vshrn_n_u64(p1, 32), veor_u32(c1, vdup_n_u32(k0)));
    c2 = veor_u32(vshrn_n_u64(p0, 32), veor_u32(c3, vdup_n_u32(k1)));
    c1 = vmovn_u64(p1);
    c3 = vmovn_u64(p0);
  }
  uint32_t words[4][2];
  vst1_u32(words[0], c0);
  vst1_u32(words[1], c1);
  vst1_u32(words[2], c2);
  vst1_u32(words[3], c3);
  for (int lane = 0; lane < 2; ++lane) {
    uint32_t bits = 0;
    for (int h = 0; h < 8; ++h)
      bits |= uint32_t{(words[h >> 1][lane] >> 16 * (h & 1) & 0xFFFFu) >= d.threshold} << h;
    out[lane] = static_cast<uint8_t>(bits);
  }
}
