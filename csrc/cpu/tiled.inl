// Included after the products of factors.inl by one kind of instructions, in a namespace of its
// own.

// ------------------------------------------------------------------------------------- multiplying

// Sums [tile][row][column] of rows n .. n + count of b with tiles of low [rank][rows of x].
template <int kTiles>
void branch_of(const Product& p, int64_t n, int count, const float* low, int64_t low_pitch,
               float* sums) {
  constexpr int kRows = 4;
  const int64_t ranks = p.low != nullptr ? p.ranks : 0;
  alignas(64) float b[kRows][W];
  for (int i = 0; i < kSide; i += kRows) {
    V part[kRows][kTiles] = {};
    for (int64_t j = 0; i < count && j < ranks; j += W) {
      const int some = ranks - j < W ? static_cast<int>(ranks - j) : W;
      for (int q = 0; q < kRows; ++q)
        store(b[q], i + q < count ? load_b(p, n + i + q, j, some) : splat(0.f));
      for (int c = 0; c < some; ++c) {
        V column[kTiles];
#pragma GCC unroll 4
        for (int t = 0; t < kTiles; ++t) column[t] = load(low + (j + c) * low_pitch + t * kSide);
#pragma GCC unroll 4
        for (int q = 0; q < kRows; ++q) {
          const V u = splat(b[q][c]);
#pragma GCC unroll 4
          for (int t = 0; t < kTiles; ++t) part[q][t] = fma(u, column[t], part[q][t]);
        }
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kRows; ++q)
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) store(sums + (t * kSide + i + q) * kSide, part[q][t]);
  }
}

inline void branch_some(int tiles, const Product& p, int64_t n, int count, const float* low,
                        int64_t low_pitch, float* sums) {
  if (tiles == 1) branch_of<1>(p, n, count, low, low_pitch, sums);
  if (tiles == 2) branch_of<2>(p, n, count, low, low_pitch, sums);
  if (tiles == 3) branch_of<3>(p, n, count, low, low_pitch, sums);
  if (tiles == 4) branch_of<4>(p, n, count, low, low_pitch, sums);
}

void multiply_tiled(const Product& p, int64_t first, int64_t last) {
  const int64_t tiles = (p.count + kSide - 1) / kSide, rows = tiles * kSide;
  const int64_t steps = (p.columns + kStepTerms - 1) / kStepTerms;
  const int64_t ranks = p.low != nullptr ? p.ranks : 0;
  const Memory<float> low = memory_of<float>(ranks * rows);
  for (int64_t j = 0; j < ranks; ++j)
    for (int64_t m = 0; m < rows; ++m)
      low[j * rows + m] = m < p.count ? p.low[m * p.low_pitch + j] : 0.f;
  const __m512i turned =
      _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  alignas(64) float sums[kMostTiles][kSide][kSide];
  const Tiles configured;
  for (int64_t n = first; n < last; n += kSide) {
    const int count = last - n < kSide ? static_cast<int>(last - n) : kSide;
    for (int64_t tile = 0; tile < tiles; tile += kMostTiles) {
      const int here = tiles - tile < kMostTiles ? static_cast<int>(tiles - tile) : kMostTiles;
      // The branch first.
      const float* const of_tile = low.get() + tile * kSide;
      float* const to = &sums[0][0][0];
      branch_some(here, p, n, count, of_tile, rows, to);
      const BFloat16* const from =
          static_cast<const BFloat16*>(p.tiles) + tile * steps * kSide * kStepTerms;
      multiply_some(here, p, n, count, from, steps, to);
      for (int64_t m = tile * kSide; m < p.count && m < (tile + here) * kSide; ++m) {
        const V v = _mm512_i32gather_ps(turned, &sums[m / kSide - tile][0][m % kSide], 4);
        put_any(p, m, n, v, count);
      }
    }
  }
}

// --------------------------------------------------------------------------------------- combining

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

void combine_tiled(const Combination& p, int64_t row, int64_t last_row, int64_t first,
                   int64_t end) {
  const int64_t steps = (p.terms + kStepTerms - 1) / kStepTerms;
  const Memory<BFloat16> left = left_factors(p, row, last_row, steps);
  const Memory<BFloat16> right = memory_of<BFloat16>(kBlockTerms * kBlockColumns);
  alignas(64) float sums[kSide][kStripColumns];
  const Tiles configured;
  int64_t n = 0;
  do {
    const int64_t last = p.terms - n < kBlockTerms ? p.terms : n + kBlockTerms;
    const bool adds = p.accumulate || n > 0, ends = last == p.terms && p.out != nullptr;
    for (int64_t start = first; start < end; start += kBlockColumns) {
      const int64_t stop = end - start < kBlockColumns ? end : start + kBlockColumns;
      interleave(p, n, last, start, stop - start, right.get());
      for (int64_t m = row; m < last_row; m += kSide)
        for (int64_t k = start; k < stop; k += kStripColumns) {
          const int64_t columns = stop - k < kStripColumns ? stop - k : kStripColumns;
          const BFloat16* const x =
              left.get() + ((m - row) / kSide * steps + n / kStepTerms) * kSide * kStepTerms;
          const BFloat16* const from = right.get() + (k - start) * kStepTerms;
          constexpr int64_t kPitch = kBlockColumns * kStepTerms;
          const int64_t rows = last_row - m < kSide ? last_row - m : kSide;
          if (!ends && p.scale == 1 && columns == kStripColumns && rows % kRowsAtOnce == 0) {
            const Sums in_place = {p.sum + m * p.sum_pitch + k, p.sum_pitch, rows, adds};
            combine_some(columns, x, from, kPitch, last - n, in_place);
            continue;
          }
          combine_some(columns, x, from, kPitch, last - n,
                       {&sums[0][0], kStripColumns, rows, false});
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < columns; c += W) {
              const int some = columns - c < W ? static_cast<int>(columns - c) : W;
              end_sum(p, m + i, k + c, adds, ends, load(&sums[i][c]), some);
            }
        }
    }
    n = last;
  } while (n < p.terms);
}

// ------------------------------------------------------------------------------- the low-rank half

// Up to kDots ranks sums of a row's own pairs are the faster ones: no rank is computed in vain.
void lay_out_ranks(const Factor& p, int64_t ranks, BFloat16* to) {
  if (ranks > kDots) return lay_out(p, to, padded_terms(p.terms) * kSide, kSide * kStepTerms);
  if (p.type == Type::kFloat)
    rows_of_ranks<float>(p, to);
  else
    rows_of_ranks<BFloat16>(p, to);
}

void shrink_tiled(const BFloat16* rows, int64_t pitch, int64_t count, int64_t columns,
                  const BFloat16* matrix, int64_t ranks, float* out) {
  const int64_t tiles = (ranks + kSide - 1) / kSide, terms = padded_terms(columns);
  const int64_t out_pitch = tiles * kSide;
  if (ranks <= kDots)
    return shrink_by_dots(rows, pitch, count, columns, matrix, ranks, out_pitch, out);
  Product p = {};
  p.matrix = rows;
  p.matrix_pitch = pitch;
  p.columns = columns;
  alignas(64) float sums[kMostTiles][kSide][kSide];
  const Tiles configured;
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

void expand_tiled(const Expansion& p, int64_t first, int64_t last) {
  const int64_t steps = (p.ranks + kStepTerms - 1) / kStepTerms;
  const Memory<BFloat16> left = memory_of<BFloat16>(steps * kSide * kStepTerms);
  constexpr int64_t kBytes = kStrip / 8;
  alignas(64) uint8_t bits[kSide][kBytes + kPhilox];
  uint64_t kept[kSide] = {};
  const Tiles configured;
  for (int64_t m = first; m < last; m += kSide) {
    const int64_t rows = last - m < kSide ? last - m : kSide;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t j = step * kStepTerms;
      const Square square(p.low + m * p.low_pitch + j, p.low_pitch, rows, p.ranks - j);
      for (int i = 0; i < kSide; ++i)
        _mm512_store_si512(left.get() + (step * kSide + i) * kStepTerms,
                           _mm512_loadu_si512(square.data + i * square.pitch));
    }
    for (int64_t k = 0; k < p.columns; k += kStripColumns) {
      const int columns = p.columns - k < kStripColumns ? static_cast<int>(p.columns - k)
                                                        : static_cast<int>(kStripColumns);
      if (p.dropout != nullptr && k % kStrip == 0) {
        const int64_t width = p.columns - k < kStrip ? p.columns - k : kStrip;
        for (int64_t i = 0; i < rows; ++i)
          mask_bits(*p.dropout, static_cast<uint32_t>(m + i), k / 8, (width + 7) / 8, bits[i]);
      }
      for (int64_t i = 0; p.dropout != nullptr && i < rows; ++i)
        std::memcpy(&kept[i], bits[i] + k % kStrip / 8, sizeof kept[i]);
      const Block block = {m, rows, k, columns};
      if (columns == kStripColumns)
        expand_block<true>(p, block, left.get(), kept);
      else
        expand_block<false>(p, block, left.get(), kept);
    }
  }
}

// Of bf16 where that is enough for tiles.
void multiply_bf16(const Product& p, int64_t first, int64_t last) {
  return p.tiles != nullptr ? multiply_tiled(p, first, last) : multiply_any(p, first, last);
}

void combine_bf16(const Combination& p, int64_t row, int64_t last_row, int64_t first,
                  int64_t last) {
  const bool tiled = p.narrow && p.matrix_type == Type::kBFloat16 && p.count >= kCombined;
  return tiled ? combine_tiled(p, row, last_row, first, last)
               : combine(p, row, last_row, first, last);
}

constexpr Narrow kTiled = {kSide, kStepTerms,    kRowsAtOnce,  kMultiplied, lay_out,
                           drop,  lay_out_ranks, shrink_tiled, expand_tiled};
