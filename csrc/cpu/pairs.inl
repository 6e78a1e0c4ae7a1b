// The products of factors.inl by instructions of two terms: each pair of a row with those of 16
// columns at once.

constexpr int kMultiplied = 32, kCombined = 5;
constexpr int kRowsAtOnce = 4;

struct Tiles {
  Tiles() {}  // nothing is configured
};

inline __m512bh spread_pair(uint32_t both) {
  return (__m512bh)_mm512_set1_epi32(static_cast<int>(both));
}

// Sums of kRows rows, `pitch` apart, with kTiles tiles of columns, so many pairs of terms.
template <int kRows, int kTiles>
inline void add_pairs(const BFloat16* left, int64_t pitch, const BFloat16* right,
                      int64_t tile_pitch, int64_t pairs, V (&sum)[kRows][kTiles]) {
  for (int64_t i = 0; i < pairs; ++i, left += 2, right += 2 * kSide) {
    __m512bh column[kTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t)
      column[t] = (__m512bh)_mm512_load_si512(right + t * tile_pitch);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      uint32_t both;
      std::memcpy(&both, left + m * pitch, sizeof both);
      const __m512bh row = spread_pair(both);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) sum[m][t] = _mm512_dpbf16_ps(sum[m][t], row, column[t]);
    }
  }
}

// Rows of sums that are in registers beside so many tiles.
constexpr int rows_beside(int tiles) { return tiles == 1 ? 16 : tiles == 2 ? 8 : 4; }

template <int kRows, int kTiles>
inline void multiply_block(const BFloat16* rows, int64_t pitch, int64_t columns,
                           const BFloat16* right, int64_t tile_pitch, float* sums) {
  V sum[kRows][kTiles];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) sum[m][t] = load(sums + (t * kSide + m) * kSide);
  const int64_t pairs = columns / 2;
  add_pairs<kRows, kTiles>(rows, pitch, right, tile_pitch, pairs, sum);
  if (columns % 2 != 0) {
    BFloat16 last[kRows][2] = {};
    for (int m = 0; m < kRows; ++m) last[m][0] = rows[m * pitch + columns - 1];
    add_pairs<kRows, kTiles>(last[0], 2, right + pairs * 2 * kSide, tile_pitch, 1, sum);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) store(sums + (t * kSide + m) * kSide, sum[m][t]);
}

template <int kTiles>
void multiply_rows(const Product& p, int64_t n, int64_t rows, const BFloat16* right,
                   int64_t tile_pitch, float* sums) {
  constexpr int kRows = rows_beside(kTiles);
  const BFloat16* matrix = static_cast<const BFloat16*>(p.matrix) + n * p.matrix_pitch;
  const int64_t pitch = p.matrix_pitch;
  int64_t m = 0;
  for (; rows - m >= kRows; m += kRows)
    multiply_block<kRows, kTiles>(matrix + m * pitch, pitch, p.columns, right, tile_pitch,
                                  sums + m * kSide);
  for (; m < rows; ++m)
    multiply_block<1, kTiles>(matrix + m * pitch, pitch, p.columns, right, tile_pitch,
                              sums + m * kSide);
}

// Sums [tile][row][column] of rows n .. n + rows of the matrix with tiles of x.
inline void multiply_some(int tiles, const Product& p, int64_t n, int64_t rows,
                          const BFloat16* right, int64_t steps, float* sums) {
  const int64_t pitch = steps * kSide * kStepTerms;
  if (tiles == 1) multiply_rows<1>(p, n, rows, right, pitch, sums);
  if (tiles == 2) multiply_rows<2>(p, n, rows, right, pitch, sums);
  if (tiles == 3) multiply_rows<3>(p, n, rows, right, pitch, sums);
  if (tiles == 4) multiply_rows<4>(p, n, rows, right, pitch, sums);
}

template <int kTiles>
void combine_steps(const BFloat16* left, const BFloat16* right, int64_t pitch, int64_t terms,
                   const Sums& sums) {
  constexpr int kRows = rows_beside(kTiles);
  constexpr int64_t kTile = kSide * kStepTerms;
  for (int64_t m = 0; m < kSide && m < sums.rows; m += kRows) {
    float* const to = sums.data + m * sums.pitch;
    V sum[kRows][kTiles];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kTiles; ++c)
        sum[i][c] = sums.adds ? load(to + i * sums.pitch + c * kSide) : splat(0.f);
    for (int64_t t = 0, step = 0; t < terms; t += kStepTerms, ++step) {
      const int64_t here = terms - t < kStepTerms ? terms - t : kStepTerms;
      add_pairs<kRows, kTiles>(left + step * kTile + m * kStepTerms, kStepTerms,
                               right + step * pitch, kTile, (here + 1) / 2, sum);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kTiles; ++c) store(to + i * sums.pitch + c * kSide, sum[i][c]);
  }
}

// Sums of 16 rows and so many columns, of factors as `left_factors` and `interleave` lay them,
// steps of the right ones `pitch` apart.
inline void combine_some(int64_t columns, const BFloat16* left, const BFloat16* right,
                         int64_t pitch, int64_t terms, const Sums& sums) {
  if (columns > 2 * kSide)
    combine_steps<4>(left, right, pitch, terms, sums);
  else if (columns > kSide)
    combine_steps<2>(left, right, pitch, terms, sums);
  else
    combine_steps<1>(left, right, pitch, terms, sums);
}

// ------------------------------------------------------------------------------- the low-rank half

// Up to so many ranks sums of a row's own pairs are the faster ones: no rank is computed in vain.
constexpr int64_t kDots = 32;

int64_t padded_terms(int64_t terms) { return (terms + kStepTerms - 1) / kStepTerms * kStepTerms; }

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

void lay_out_ranks(const Factor& p, int64_t ranks, BFloat16* to) {
  if (ranks > kDots) return lay_out(p, to, padded_terms(p.terms) * kSide, kSide * kStepTerms);
  if (p.type == Type::kFloat)
    rows_of_ranks<float>(p, to);
  else
    rows_of_ranks<BFloat16>(p, to);
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

void shrink(const BFloat16* rows, int64_t pitch, int64_t count, int64_t columns,
            const BFloat16* matrix, int64_t ranks, float* out) {
  const int64_t tiles = (ranks + kSide - 1) / kSide, terms = padded_terms(columns);
  const int64_t out_pitch = tiles * kSide;
  if (ranks <= kDots) {
    constexpr int kRows = 4;
    for (int64_t m = 0; m < count; m += count - m >= kRows ? kRows : 1)
      for (int64_t j = 0; j < ranks; j += 4) {
        const BFloat16* const from = rows + m * pitch;
        const auto dot = count - m >= kRows ? dot_ranks<kRows> : dot_ranks<1>;
        dot(from, pitch, columns, matrix + j * terms, terms, out_pitch, out + m * out_pitch + j);
      }
    return;
  }
  Product p = {};
  p.matrix = rows;
  p.matrix_pitch = pitch;
  p.columns = columns;
  alignas(64) float sums[kMostTiles][kSide][kSide];
  for (int64_t n = 0; n < count; n += kSide) {
    const int64_t some = count - n < kSide ? count - n : kSide;
    for (int64_t tile = 0; tile < tiles; tile += kMostTiles) {
      const int here = tiles - tile < kMostTiles ? static_cast<int>(tiles - tile) : kMostTiles;
      std::memset(sums, 0, sizeof sums);
      multiply_some(here, p, n, some, matrix + tile * kSide * terms, terms / kStepTerms,
                    &sums[0][0][0]);
      for (int64_t i = 0; i < some; ++i)
        for (int t = 0; t < here; ++t)
          store(out + (n + i) * out_pitch + (tile + t) * kSide, load(sums[t][i]));
    }
  }
}

template <bool kWhole>
inline void expand_block(const Expansion& p, const Block& block, const BFloat16* left,
                         const uint64_t* kept) {
  for (int64_t i = 0; i < block.rows; i += kRowsAtOnce) {
    V sum[kRowsAtOnce][kMostTiles] = {};
    const BFloat16* const right = p.matrix + block.k * kStepTerms;
    for (int64_t j = 0, step = 0; j < p.ranks; j += kStepTerms, ++step) {
      const int64_t here = p.ranks - j < kStepTerms ? p.ranks - j : kStepTerms;
      add_pairs<kRowsAtOnce, kMostTiles>(left + (step * kSide + i) * kStepTerms, kStepTerms,
                                         right + step * p.step_pitch, kSide * kStepTerms,
                                         (here + 1) / 2, sum);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRowsAtOnce; ++row)
      if (i + row < block.rows)
        finish<kWhole>(p, block.m + i + row, block.k, block.columns, sum[row], kept[i + row]);
  }
}
