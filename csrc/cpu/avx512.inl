// Vectors of AVX-512 and the kernels of them; included in a namespace for each further extension:
// LORA_CONVERTS_BF16 where it rounds to bf16 (what is below all normal numbers, to zero).

constexpr int W = 16, kVectors = 4, kRows = 4, kPhilox = 8;
constexpr int kFewRows = 4, kFewColumns = 6;
typedef __m512 V;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline V load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline V load_some(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(_bzhi_u32(~0u, count)), p);
}
inline V load_some(const BFloat16* p, int count) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(_bzhi_u32(~0u, count)), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline V load_some(const Half* p, int count) {
  return _mm512_cvtph_ps(
      _mm256_maskz_loadu_epi16(static_cast<__mmask16>(_bzhi_u32(~0u, count)), p));
}
// To bf16, in the upper halves of the words.
inline __m512i bits_bf16(V v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7FC00000));
}
inline V rounded_bf16(V v) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits_bf16(v), _mm512_set1_epi32(~0xFFFF)));
}
inline V rounded_half(V v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline void store(BFloat16* p, V v) {
#if LORA_CONVERTS_BF16
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits_bf16(v), 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline void store(Half* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline V splat(float f) { return _mm512_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(V v) { return _mm512_reduce_add_ps(v); }
inline V keep(V v, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }

// Codes of 4 bits, in the low ones or the high ones of 8.
typedef __m512i Codes;
inline Codes codes_of(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Codes high(Codes codes) { return _mm512_srli_epi32(codes, 4); }
inline V look(const V (&values)[1], Codes low) { return _mm512_permutexvar_ps(low, values[0]); }
inline V look_up(const float* table, const uint8_t* codes) {
  return _mm512_i32gather_ps(codes_of(codes), table, 4);
}
inline V load_bytes(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// A product that no sum is fused with.
inline V apart(V v) {
  asm("" : "+v"(v));
  return v;
}
// The elements of even and of odd places, and together again.
inline void part(V first, V second, V* even, V* odd) {
  const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(first, i, second);
  *odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(i, _mm512_set1_epi32(1)), second);
}
inline void join(V even, V odd, V* first, V* second) {
  const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *first = _mm512_permutex2var_ps(even, i, odd);
  *second = _mm512_permutex2var_ps(even, _mm512_add_epi32(i, _mm512_set1_epi32(8)), odd);
}
// What has been rounded to bf16.
inline void store_pairs(BFloat16* p, V even, V odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(odd)));
}

// Eight blocks, one in each 64-bit lane; the high halves of the counters are never read.
inline void philox_bits(const Dropout& d, uint32_t block, uint32_t m, uint8_t* out) {
  __m512i c0 =
      _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  __m512i c1 = _mm512_set1_epi64(m), c2 = _mm512_setzero_si512(), c3 = c2;
  const __m512i mul0 = _mm512_set1_epi64(kMul0), mul1 = _mm512_set1_epi64(kMul1);
  uint32_t k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    const __m512i p0 = _mm512_mul_epu32(c0, mul0), p1 = _mm512_mul_epu32(c2, mul1);
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    c0 = _mm512_xor_si512(_mm512_srli_epi64(p1, 32), _mm512_xor_si512(c1, key0));
    c2 = _mm512_xor_si512(_mm512_srli_epi64(p0, 32), _mm512_xor_si512(c3, key1));
    c1 = p1;
    c3 = p0;
  }
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i front = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
  const __m512i back = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
  const __m512i t = _mm512_set1_epi16(static_cast<short>(d.threshold));
  const uint64_t bits = _pdep_u64(_mm512_cmpge_epu16_mask(front, t), 0x0F0F0F0F0F0F0F0FULL) |
                        _pdep_u64(_mm512_cmpge_epu16_mask(back, t), 0xF0F0F0F0F0F0F0F0ULL);
  std::memcpy(out, &bits, sizeof bits);
}
