// Included after few_rows.inl: factors of products in bf16 as they are multiplied by tiles of 16 x
// 16 sums in fp32, 32 terms a step. A tile of factors has 16 rows of 64 bytes: 32 terms, or 16
// columns of two terms each.

constexpr int kSide = 16, kStepTerms = 32;
constexpr int kMostTiles = 4;  // of sums at once
// A matrix that is combined is read by so many rows and columns at a time, each row in one run.
constexpr int64_t kBlockTerms = 128, kBlockColumns = 512;
constexpr int64_t kStripColumns = kMostTiles * kSide, kRowsAhead = 8;

// 16 rows of 32 columns: where they lie, or a copy of those there are among zeros.
struct Square {
  Square(const BFloat16* from, int64_t from_pitch, int64_t rows, int64_t columns) {
    if (rows >= kSide && columns >= kStepTerms) {
      data = from;
      pitch = from_pitch;
      return;
    }
    const int count = columns < kStepTerms ? static_cast<int>(columns) : kStepTerms;
    for (int i = 0; i < kSide; ++i)
      _mm512_store_si512(
          copy + i * kStepTerms,
          i < rows ? _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, count), from + i * from_pitch)
                   : _mm512_setzero_si512());
    data = copy;
    pitch = kStepTerms;
  }
  const BFloat16* data;
  int64_t pitch;
  alignas(64) BFloat16 copy[kSide * kStepTerms];
};

// ---------------------------------------------------------------------------------- right factors

alignas(64) constexpr uint16_t kInTurn[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                              21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// 32 values of a row, and 16 of each of two rows (null: zeros); `count` of them are there.
inline __m512i values(const BFloat16* p, int count) {
  return _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, count), p);
}
inline __m512i values(const float* p, int count) {
  const V front = load_some(p, count < W ? count : W);
  const V back = count > W ? load_some(p + W, count - W) : splat(0.f);
  return (__m512i)_mm512_cvtne2ps_pbh(back, front);
}
inline __m512i values_of_two(const BFloat16* p, const BFloat16* q, int count) {
  const __mmask16 mask = static_cast<__mmask16>(_bzhi_u32(~0u, count));
  const auto row = [&](const BFloat16* from) {
    return from == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(mask, from);
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(row(p)), row(q), 1);
}
inline __m512i values_of_two(const float* p, const float* q, int count) {
  const auto row = [&](const float* from) {
    return from == nullptr ? splat(0.f) : load_some(from, count);
  };
  return (__m512i)_mm512_cvtne2ps_pbh(row(q), row(p));
}

// One tile: for two terms in turn, all columns of both.
template <typename T>
inline void lay_out_tile(const Factor& p, int64_t t, int64_t c, BFloat16* to) {
  const T* const from = static_cast<const T*>(p.data) + t * p.term_stride + c * p.column_stride;
  const int terms = p.terms - t < kStepTerms ? static_cast<int>(p.terms - t) : kStepTerms;
  const int columns = p.columns - c < kSide ? static_cast<int>(p.columns - c) : kSide;
  if (p.column_stride == 1 && p.term_stride != 1) {
    const __m512i in_turn = _mm512_load_si512(kInTurn);
    for (int i = 0; i < kStepTerms; i += 2) {
      const auto row = [&](int j) { return j < terms ? from + j * p.term_stride : nullptr; };
      const __m512i both = values_of_two(row(i), row(i + 1), columns);
      _mm512_store_si512(to + i * kSide, _mm512_permutexvar_epi16(in_turn, both));
    }
    return;
  }
  alignas(64) BFloat16 square[kSide * kStepTerms] = {};
  for (int i = 0; i < columns; ++i) {
    const T* const row = from + i * p.column_stride;
    if (p.term_stride == 1)
      _mm512_store_si512(square + i * kStepTerms, values(row, terms));
    else
      for (int j = 0; j < terms; ++j)
        square[i * kStepTerms + j] = static_cast<BFloat16>(row[j * p.term_stride]);
  }
  const __m512i rows =
      _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  for (int i = 0; i < kSide; ++i)
    _mm512_store_si512(to + i * kStepTerms, _mm512_i32gather_epi32(rows, square + 2 * i, 4));
}

void lay_out(const Factor& p, BFloat16* to, int64_t tile_pitch, int64_t step_pitch) {
  for (int64_t c = 0; c < p.columns; c += kSide)
    for (int64_t t = 0; t < p.terms; t += kStepTerms) {
      BFloat16* const tile = to + c / kSide * tile_pitch + t / kStepTerms * step_pitch;
      if (p.type == Type::kFloat)
        lay_out_tile<float>(p, t, c, tile);
      else
        lay_out_tile<BFloat16>(p, t, c, tile);
    }
}

// ----------------------------------------------------------------------------------- left factors

// Rows `row` .. `last_row` of x as left factors: [tile of 16 rows][step of terms].
Memory<BFloat16> left_factors(const Combination& p, int64_t row, int64_t last_row, int64_t steps) {
  const int64_t tiles = (last_row - row + kSide - 1) / kSide;
  Memory<BFloat16> memory = memory_of<BFloat16>(tiles * steps * kSide * kStepTerms);
  BFloat16* to = memory.get();
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t step = 0; step < steps; ++step)
      for (int i = 0; i < kSide; ++i, to += kStepTerms) {
        const int64_t m = row + tile * kSide + i, t = step * kStepTerms;
        for (int half = 0; half < kStepTerms; half += W) {
          const int64_t left = m < last_row ? p.terms - t - half : 0;
          const int some = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
          store(to + half, load_some(p.x + m * p.x_row + t + half, some));
        }
      }
  return memory;
}

// Rows n .. last of the matrix, columns k .. k + columns, as right factors: [step of terms][tile of
// 16 columns], each of two rows in turn.
void interleave(const Combination& p, int64_t n, int64_t last, int64_t k, int64_t columns,
                BFloat16* to) {
  alignas(64) static constexpr uint16_t kFront[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i front = _mm512_load_si512(kFront);
  const __m512i back = _mm512_add_epi16(front, _mm512_set1_epi16(16));
  const BFloat16* const matrix = static_cast<const BFloat16*>(p.matrix) + k;
  const int64_t rows = (last - n + kStepTerms - 1) / kStepTerms * kStepTerms;
  for (int64_t t = n; t < n + rows; t += 2)
    for (int64_t c = 0; c < columns; c += kStepTerms) {
      const BFloat16* const from = matrix + t * p.matrix_pitch + c;
      const int some = columns - c < kStepTerms ? static_cast<int>(columns - c) : kStepTerms;
      const __mmask32 mask = _bzhi_u32(~0u, some);
      const auto row = [&](int64_t i) {
        if (t + i >= last) return _mm512_setzero_si512();
        const BFloat16* const at = from + i * p.matrix_pitch;
        __builtin_prefetch(at + kRowsAhead * p.matrix_pitch);
        return _mm512_maskz_loadu_epi16(mask, at);
      };
      const __m512i even = row(0), odd = row(1);
      BFloat16* const pair = to + (t - n) / kStepTerms * kBlockColumns * kStepTerms +
                             c / kSide * kSide * kStepTerms + (t - n) % kStepTerms * kSide;
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, front, odd));
      _mm512_store_si512(pair + kSide * kStepTerms, _mm512_permutex2var_epi16(even, back, odd));
    }
}

// ------------------------------------------------------------------------------------------- ends

// Sums of `rows` rows, `pitch` apart; `adds`: to what is there. There is memory of 16.
struct Sums {
  float* data;
  int64_t pitch, rows;
  bool adds;
};

// Rows m .. m + rows, columns k .. k + columns of an expansion.
struct Block {
  int64_t m, rows, k;
  int columns;
};

// Row m of an expansion, columns k .. k + columns, from their sums, of which `kept` count.
template <bool kWhole>
inline void finish(const Expansion& p, int64_t m, int64_t k, int columns, V (&v)[kMostTiles],
                   uint64_t kept) {
  BFloat16* const to = p.out + m * p.out_pitch + k;
  const V scale = splat(p.scale);
  const auto here = [&](int c) { return columns - c * W < W ? columns - c * W : W; };
#pragma GCC unroll 4
  for (int c = 0; c < kMostTiles; ++c) v[c] = scale * v[c];
  if (p.dropout != nullptr)
#pragma GCC unroll 4
    for (int c = 0; c < kMostTiles; ++c) v[c] = keep(v[c], static_cast<uint32_t>(kept >> (c * W)));
  if (p.bias != nullptr)
#pragma GCC unroll 4
    for (int c = 0; c < kMostTiles; ++c) v[c] = v[c] + load(p.bias + k + c * W);
  if (p.accumulate)
#pragma GCC unroll 4
    for (int c = 0; c < kMostTiles; ++c)
      if (kWhole || here(c) > 0)
        v[c] = v[c] + (kWhole ? load(to + c * W) : load_some(to + c * W, here(c)));
  if constexpr (kWhole) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
    _mm512_storeu_si512(to + 2 * W, (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]));
  } else {
    for (int c = 0; c < kMostTiles; ++c)
      if (here(c) > 0) store_some(to + c * W, v[c], here(c));
  }
}

void drop(const Rows& from, int64_t first, int64_t count, const Dropout& dropout, BFloat16* out,
          int64_t pitch) {
  uint8_t bits[kStrip / 8 + kPhilox + 2];
  for (int64_t i = 0; i < count; ++i, out += pitch) {
    const BFloat16* const row =
        static_cast<const BFloat16*>(from.data) + (first + i) * from.row_stride;
    for (int64_t strip = 0; strip < pitch; strip += kStrip) {
      const int64_t width = pitch - strip < kStrip ? pitch - strip : kStrip;
      mask_bits(dropout, static_cast<uint32_t>(first + i), strip / 8, width / 8, bits);
      for (int64_t k = 0; k < width; k += kStepTerms) {
        const int64_t left = from.columns - strip - k;
        uint32_t kept;
        std::memcpy(&kept, bits + k / 8, sizeof kept);
        kept &= _bzhi_u32(~0u, left < 0 ? 0 : left < kStepTerms ? static_cast<int>(left) : 32);
        _mm512_store_si512(out + strip + k, _mm512_maskz_loadu_epi16(kept, row + strip + k));
      }
    }
  }
}

// ------------------------------------------------------------------------- sums of a row's own
// pairs

int64_t padded_terms(int64_t terms) { return (terms + kStepTerms - 1) / kStepTerms * kStepTerms; }

// Ranks one after the other, each padded.
template <typename T>
void rows_of_ranks(const Factor& p, BFloat16* to) {
  const T* const from = static_cast<const T*>(p.data);
  const int64_t pitch = padded_terms(p.terms);
  if (p.term_stride == 1) {
    for (int64_t j = 0; j < p.columns; ++j)
      for (int64_t t = 0; t < pitch; t += kStepTerms) {
        const int64_t count = p.terms - t < kStepTerms ? p.terms - t : kStepTerms;
        _mm512_store_si512(to + j * pitch + t,
                           values(from + j * p.column_stride + t, static_cast<int>(count)));
      }
    return;
  }
  for (int64_t t = 0; t < pitch; ++t)
    for (int64_t j = 0; j < p.columns; ++j)
      to[j * pitch + t] = t < p.terms
                              ? static_cast<BFloat16>(from[t * p.term_stride + j * p.column_stride])
                              : BFloat16(0.f);
}

inline __m128 totals(V a, V b, V c, V d) {
  const V ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const V cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const V all = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

// Sums of kRows rows with four ranks.
template <int kRows>
inline void dot_ranks(const BFloat16* rows, int64_t pitch, int64_t columns, const BFloat16* matrix,
                      int64_t matrix_pitch, int64_t out_pitch, float* out) {
  V sum[kRows][4] = {};
  for (int64_t k = 0; k < columns; k += kStepTerms) {
    const __mmask32 mask =
        columns - k < kStepTerms ? _bzhi_u32(~0u, static_cast<unsigned>(columns - k)) : ~0u;
    __m512bh rank[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      rank[c] = (__m512bh)_mm512_load_si512(matrix + c * matrix_pitch + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows + i * pitch + k);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], row, rank[c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    _mm_storeu_ps(out + i * out_pitch, totals(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

// out [count, ranks], rows `out_pitch` apart.
void shrink_by_dots(const BFloat16* rows, int64_t pitch, int64_t count, int64_t columns,
                    const BFloat16* matrix, int64_t ranks, int64_t out_pitch, float* out) {
  constexpr int kRows = 4;
  const int64_t terms = padded_terms(columns);
  for (int64_t m = 0; m < count; m += count - m >= kRows ? kRows : 1)
    for (int64_t j = 0; j < ranks; j += 4) {
      const auto dot = count - m >= kRows ? dot_ranks<kRows> : dot_ranks<1>;
      dot(rows + m * pitch, pitch, columns, matrix + j * terms, terms, out_pitch,
          out + m * out_pitch + j);
    }
}
