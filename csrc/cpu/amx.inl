// Included after few_rows.inl: the same products in bf16 by tiles of 16 x 16 sums in fp32, 32 terms
// a step. A tile has 16 rows of 64 bytes: 32 terms, or 16 columns of two terms each, or 16 sums.

constexpr int kSide = 16, kStepTerms = 32;
constexpr int kMostTiles = 4;  // of sums, beside one for each factor
// A matrix that is combined is read by so many rows and columns at a time, each row in one run.
constexpr int64_t kBlockTerms = 128, kBlockColumns = 512;
constexpr int64_t kStripColumns = kMostTiles * kSide, kRowsAhead = 8;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All tiles whole, while it lives. The instructions are written out, since a compiler's intrinsics
// may leave a store that a tile is loaded from for later.
struct Tiles {
  Tiles() { asm volatile("ldtilecfg %0" ::"m"(config)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  TileConfig config;
};

template <int kTo>
inline void load_tile(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(kTo) : "memory");
}
template <int kFrom>
inline void store_tile(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(kFrom) : "memory");
}
template <int kTo>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTo));
}
// Sums of rows of one times columns of the other.
template <int kSums, int kLeft, int kRight>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}
constexpr int kLeft = 4, kRight = 5;

struct Freed {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Memory = std::unique_ptr<T[], Freed>;

template <typename T>
Memory<T> memory_of(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  Memory<T> memory(static_cast<T*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

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

// ------------------------------------------------------------------------------------- multiplying

// Tiles of sums of rows n .. n + 16 of the matrix with kTiles tiles of x.
template <int kTiles>
inline void multiply_step(const BFloat16* right, int64_t tile_pitch) {
  load_tile<kRight>(right, 64);
  multiply_tiles<0, kLeft, kRight>();
  if constexpr (kTiles > 1) {
    load_tile<kRight>(right + tile_pitch, 64);
    multiply_tiles<1, kLeft, kRight>();
  }
  if constexpr (kTiles > 2) {
    load_tile<kRight + 1>(right + 2 * tile_pitch, 64);
    multiply_tiles<2, kLeft, kRight + 1>();
  }
  if constexpr (kTiles > 3) {
    load_tile<kRight + 1>(right + 3 * tile_pitch, 64);
    multiply_tiles<3, kLeft, kRight + 1>();
  }
}

template <int kTiles>
void multiply_rows(const Product& p, int64_t n, int64_t rows, const BFloat16* right, int64_t steps,
                   float* sums) {
  const BFloat16* const matrix = static_cast<const BFloat16*>(p.matrix) + n * p.matrix_pitch;
  load_tile<0>(sums, 64);
  if constexpr (kTiles > 1) load_tile<1>(sums + kSide * kSide, 64);
  if constexpr (kTiles > 2) load_tile<2>(sums + 2 * kSide * kSide, 64);
  if constexpr (kTiles > 3) load_tile<3>(sums + 3 * kSide * kSide, 64);
  for (int64_t step = 0; step < steps; ++step, right += kSide * kStepTerms) {
    const int64_t k = step * kStepTerms;
    if (rows == kSide && p.columns - k >= kStepTerms) {
      load_tile<kLeft>(matrix + k, p.matrix_pitch * 2);
    } else {
      const Square square(matrix + k, p.matrix_pitch, rows, p.columns - k);
      load_tile<kLeft>(square.data, square.pitch * 2);
    }
    multiply_step<kTiles>(right, steps * kSide * kStepTerms);
  }
  store_tile<0>(sums, 64);
  if constexpr (kTiles > 1) store_tile<1>(sums + kSide * kSide, 64);
  if constexpr (kTiles > 2) store_tile<2>(sums + 2 * kSide * kSide, 64);
  if constexpr (kTiles > 3) store_tile<3>(sums + 3 * kSide * kSide, 64);
}

inline void multiply_some(int tiles, const Product& p, int64_t n, int64_t rows,
                          const BFloat16* right, int64_t steps, float* sums) {
  if (tiles == 1) multiply_rows<1>(p, n, rows, right, steps, sums);
  if (tiles == 2) multiply_rows<2>(p, n, rows, right, steps, sums);
  if (tiles == 3) multiply_rows<3>(p, n, rows, right, steps, sums);
  if (tiles == 4) multiply_rows<4>(p, n, rows, right, steps, sums);
}

template <typename T>
void put_row(const Product& p, int64_t m, int64_t n, V v, int count) {
  v = splat(p.scale) * v;
  if (p.bias != nullptr) v = v + load_some(static_cast<const T*>(p.bias) + n, count);
  if (p.sum != nullptr) v = v + load_some(p.sum + m * p.sum_pitch + n, count);
  store_some(static_cast<T*>(p.out) + m * p.out_pitch + n, v, count);
}

void multiply_tiled(const Product& p, int64_t first, int64_t last) {
  const int64_t tiles = (p.count + kSide - 1) / kSide, rows = tiles * kSide;
  const int64_t steps = (p.columns + kStepTerms - 1) / kStepTerms;
  const int64_t ranks = p.low != nullptr ? p.ranks : 0;
  const Memory<float> low = memory_of<float>(ranks * rows), b = memory_of<float>(ranks + W);
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
      // The branch first: rows of b times columns of low.
      for (int i = 0; i < kSide; ++i) {
        V part[kMostTiles] = {};
        for (int64_t j = 0; i < count && j < ranks; j += W) {
          const int some = ranks - j < W ? static_cast<int>(ranks - j) : W;
          store(b.get(), load_b(p, n + i, j, some));
          for (int c = 0; c < some; ++c)
            for (int t = 0; t < here; ++t)
              part[t] = fma(splat(b[c]), load(&low[(j + c) * rows + (tile + t) * kSide]), part[t]);
        }
        for (int t = 0; t < kMostTiles; ++t) store(sums[t][i], part[t]);
      }
      const BFloat16* const from = p.tiles + tile * steps * kSide * kStepTerms;
      multiply_some(here, p, n, count, from, steps, &sums[0][0][0]);
      for (int64_t m = tile * kSide; m < p.count && m < (tile + here) * kSide; ++m) {
        const V v = _mm512_i32gather_ps(turned, &sums[m / kSide - tile][0][m % kSide], 4);
        if (p.out_type == Type::kFloat)
          put_row<float>(p, m, n, v, count);
        else
          put_row<BFloat16>(p, m, n, v, count);
      }
    }
  }
}

// --------------------------------------------------------------------------------------- combining

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

// Of 16 rows, `pitch` apart; `adds`: to what is there.
struct Sums {
  float* data;
  int64_t pitch;
  bool adds;
};

template <int kTiles>
void combine_steps(const BFloat16* left, const BFloat16* right, int64_t pitch, int64_t steps,
                   const Sums& sums) {
  float* const to = sums.data;
  if (sums.adds) {
    load_tile<0>(to, sums.pitch * 4);
    if constexpr (kTiles > 1) load_tile<1>(to + kSide, sums.pitch * 4);
    if constexpr (kTiles > 2) load_tile<2>(to + 2 * kSide, sums.pitch * 4);
    if constexpr (kTiles > 3) load_tile<3>(to + 3 * kSide, sums.pitch * 4);
  } else {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
  }
  constexpr int64_t kTile = kSide * kStepTerms;
  for (int64_t step = 0; step < steps; ++step, left += kTile, right += pitch) {
    load_tile<kLeft>(left, 64);
    multiply_step<kTiles>(right, kTile);
  }
  store_tile<0>(to, sums.pitch * 4);
  if constexpr (kTiles > 1) store_tile<1>(to + kSide, sums.pitch * 4);
  if constexpr (kTiles > 2) store_tile<2>(to + 2 * kSide, sums.pitch * 4);
  if constexpr (kTiles > 3) store_tile<3>(to + 3 * kSide, sums.pitch * 4);
}

// Sums of 16 rows and so many columns, of factors as `left_factors` and `interleave` lay them,
// steps of the right ones `pitch` apart.
inline void combine_some(int64_t columns, const BFloat16* left, const BFloat16* right,
                         int64_t pitch, int64_t steps, const Sums& sums) {
  if (columns > 2 * kSide)
    combine_steps<4>(left, right, pitch, steps, sums);
  else if (columns > kSide)
    combine_steps<2>(left, right, pitch, steps, sums);
  else
    combine_steps<1>(left, right, pitch, steps, sums);
}

void combine_tiled(const Combination& p, int64_t row, int64_t last_row, int64_t first,
                   int64_t end) {
  const int64_t steps = (p.terms + kStepTerms - 1) / kStepTerms;
  const Memory<BFloat16> left = left_factors(p, row, last_row, steps);
  const Memory<BFloat16> right = memory_of<BFloat16>(kBlockTerms * kBlockColumns);
  alignas(64) float sums[kSide][kStripColumns];
  const V scale = splat(p.scale);
  const Tiles configured;
  int64_t n = 0;
  do {
    const int64_t last = p.terms - n < kBlockTerms ? p.terms : n + kBlockTerms;
    const int64_t here = (last - n + kStepTerms - 1) / kStepTerms;
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
          if (!ends && p.scale == 1 && columns == kStripColumns && last_row - m >= kSide) {
            const Sums in_place = {p.sum + m * p.sum_pitch + k, p.sum_pitch, adds};
            combine_some(columns, x, from, kPitch, here, in_place);
            continue;
          }
          combine_some(columns, x, from, kPitch, here, {&sums[0][0], kStripColumns, false});
          for (int i = 0; i < kSide && m + i < last_row; ++i)
            for (int64_t c = 0; c < columns; c += W) {
              const int some = columns - c < W ? static_cast<int>(columns - c) : W;
              const int64_t in_sum = (m + i) * p.sum_pitch + k + c;
              const int64_t at = (m + i) * p.out_pitch + k + c;
              const V made = load(&sums[i][c]);
              const V v = adds ? fma(scale, made, load_some(p.sum + in_sum, some)) : scale * made;
              if (!ends)
                store_some(p.sum + in_sum, v, some);
              else if (p.out_type == Type::kFloat)
                store_some(static_cast<float*>(p.out) + at, v, some);
              else
                store_some(static_cast<BFloat16*>(p.out) + at, v, some);
            }
        }
    }
    n = last;
  } while (n < p.terms);
}

// ------------------------------------------------------------------------------- the low-rank half

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

void shrink_tiled(const BFloat16* rows, int64_t pitch, int64_t count, int64_t columns,
                  const BFloat16* pairs, int64_t ranks, float* out) {
  const int64_t tiles = ranks / kSide, steps = (columns + kStepTerms - 1) / kStepTerms;
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
      multiply_some(here, p, n, some, pairs + tile * steps * kSide * kStepTerms, steps,
                    &sums[0][0][0]);
      for (int64_t i = 0; i < some; ++i)
        for (int t = 0; t < here; ++t)
          store(out + (n + i) * ranks + (tile + t) * kSide, load(sums[t][i]));
    }
  }
}

// Rows m .. m + rows, columns k .. k + columns of an expansion from their sums; `kept`: the bits of
// their columns, row by row.
template <bool kWhole>
inline void finish(const Expansion& p, int64_t m, int64_t rows, int64_t k, int columns,
                   const float* sums, const uint64_t* kept) {
  constexpr int kVectors = kStripColumns / W;
  const V scale = splat(p.scale);
  V offset[kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; ++c)
    offset[c] = p.bias != nullptr ? load(p.bias + k + c * W) : splat(0.f);
  for (int64_t i = 0; i < rows; ++i, sums += kStripColumns) {
    BFloat16* const to = p.out + (m + i) * p.out_pitch + k;
    V v[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      v[c] = scale * load(sums + c * W);
      if (kept != nullptr) v[c] = keep(v[c], static_cast<uint32_t>(kept[i] >> (c * W)));
      v[c] = v[c] + offset[c];
    }
    const auto here = [&](int c) { return columns - c * W < W ? columns - c * W : W; };
    if (p.accumulate)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c)
        if (kWhole || here(c) > 0)
          v[c] = v[c] + (kWhole ? load(to + c * W) : load_some(to + c * W, here(c)));
    if constexpr (kWhole) {
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
      _mm512_storeu_si512(to + 2 * W, (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]));
    } else {
      for (int c = 0; c < kVectors; ++c)
        if (here(c) > 0) store_some(to + c * W, v[c], here(c));
    }
  }
}

void expand_tiled(const Expansion& p, int64_t first, int64_t last) {
  const int64_t steps = (p.ranks + kStepTerms - 1) / kStepTerms;
  const Memory<BFloat16> left = memory_of<BFloat16>(steps * kSide * kStepTerms);
  constexpr int64_t kBytes = kStrip / 8;
  alignas(64) float sums[kSide][kStripColumns];
  alignas(64) uint8_t bits[kSide][kBytes + kPhilox];
  uint64_t kept[kSide];
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
      combine_some(columns, left.get(), p.matrix + k * kStepTerms, p.step_pitch, steps,
                   {&sums[0][0], kStripColumns, false});
      const uint64_t* const mask = p.dropout != nullptr ? kept : nullptr;
      if (columns == kStripColumns)
        finish<true>(p, m, rows, k, columns, &sums[0][0], mask);
      else
        finish<false>(p, m, rows, k, columns, &sums[0][0], mask);
    }
  }
}

// Of fewer rows a tile is mostly empty.
constexpr int kMultiplied = 2, kCombined = 5;

constexpr Narrow kTiled = {kSide, kStepTerms,   kMultiplied, lay_out,
                           drop,  shrink_tiled, expand_tiled};
