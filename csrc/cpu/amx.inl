// Included after few_rows.inl: the same products in bf16 by tiles of 16 x 16 sums in fp32, 32 terms
// a step. A tile has 16 rows of 64 bytes: 32 terms, or 16 columns of two terms each, or 16 sums.

constexpr int kSide = 16, kStepTerms = 32, kTileBytes = 1024;
constexpr int64_t kMostPitch = 1 << 26;
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

// 16 rows of 32 columns: where they lie, if not too far apart for indices in 32 bits, or a copy of
// those there are among zeros.
struct Square {
  Square(const BFloat16* from, int64_t from_pitch, int64_t rows, int64_t columns) {
    if (rows >= kSide && columns >= kStepTerms && from_pitch < kMostPitch) {
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

// ------------------------------------------------------------------------------------- multiplying

// x as right factors: [tile of 16 rows][step of terms], each of two terms of all rows in turn.
Memory<BFloat16> pairs_of_terms(const Product& p, int64_t tiles, int64_t steps) {
  Memory<BFloat16> memory = memory_of<BFloat16>(tiles * steps * kSide * kStepTerms);
  BFloat16* to = memory.get();
  const BFloat16* const x = static_cast<const BFloat16*>(p.x);
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t step = 0; step < steps; ++step, to += kSide * kStepTerms) {
      const int64_t m = tile * kSide, k = step * kStepTerms;
      const Square square(x + m * p.pitch + k, p.pitch, p.count - m, p.columns - k);
      const __m512i rows = _mm512_mullo_epi32(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
          _mm512_set1_epi32(static_cast<int>(square.pitch)));
      for (int pair = 0; pair < kSide; ++pair)
        _mm512_store_si512(to + pair * kStepTerms,
                           _mm512_i32gather_epi32(rows, square.data + 2 * pair, 2));
    }
  return memory;
}

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
  const Memory<BFloat16> right = pairs_of_terms(p, tiles, steps);
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
      const BFloat16* const from = right.get() + tile * steps * kSide * kStepTerms;
      float* const to = &sums[0][0][0];
      if (here == 1) multiply_rows<1>(p, n, count, from, steps, to);
      if (here == 2) multiply_rows<2>(p, n, count, from, steps, to);
      if (here == 3) multiply_rows<3>(p, n, count, from, steps, to);
      if (here == 4) multiply_rows<4>(p, n, count, from, steps, to);
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

template <int kTiles>
void combine_steps(const BFloat16* left, const BFloat16* right, int64_t steps, float* sums) {
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  clear_tile<3>();
  constexpr int64_t kTile = kSide * kStepTerms;
  for (int64_t step = 0; step < steps; ++step, left += kTile, right += kBlockColumns * kStepTerms) {
    load_tile<kLeft>(left, 64);
    multiply_step<kTiles>(right, kTile);
  }
  store_tile<0>(sums, kStripColumns * 4);
  if constexpr (kTiles > 1) store_tile<1>(sums + kSide, kStripColumns * 4);
  if constexpr (kTiles > 2) store_tile<2>(sums + 2 * kSide, kStripColumns * 4);
  if constexpr (kTiles > 3) store_tile<3>(sums + 3 * kSide, kStripColumns * 4);
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
          if (columns > 2 * kSide)
            combine_steps<4>(x, from, here, &sums[0][0]);
          else if (columns > kSide)
            combine_steps<2>(x, from, here, &sums[0][0]);
          else
            combine_steps<1>(x, from, here, &sums[0][0]);
          for (int i = 0; i < kSide && m + i < last_row; ++i)
            for (int64_t c = 0; c < columns; c += W) {
              const int some = columns - c < W ? static_cast<int>(columns - c) : W;
              float* const sum = p.sum + (m + i) * p.sum_pitch + k + c;
              const int64_t at = (m + i) * p.out_pitch + k + c;
              const V made = load(&sums[i][c]);
              const V v = adds ? fma(scale, made, load_some(sum, some)) : scale * made;
              if (!ends)
                store_some(sum, v, some);
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
