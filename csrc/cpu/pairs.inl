// The products of factors.inl by instructions of two terms: each pair of a row with those of 16
// columns at once.

constexpr int kMultiplied = 32, kCombined = 5;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kDots = 32;

struct Tiles {
  Tiles() {}  // nothing is configured
};

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
      int both;
      std::memcpy(&both, left + m * pitch, sizeof both);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
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

// ------------------------------------------------------------------------------- the low-rank half

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
