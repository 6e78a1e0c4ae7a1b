// The products of factors.inl where the processor has tiles.

// Of fewer rows a tile is mostly empty.
constexpr int kMultiplied = 2, kCombined = 5;
constexpr int kRowsAtOnce = kSide;
constexpr int64_t kDots = 0;

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

template <int kTiles>
void combine_steps(const BFloat16* left, const BFloat16* right, int64_t pitch, int64_t terms,
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
  for (int64_t t = 0; t < terms; t += kStepTerms, left += kTile, right += pitch) {
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
                         int64_t pitch, int64_t terms, const Sums& sums);

// ------------------------------------------------------------------------------- the low-rank half

template <bool kWhole>
inline void expand_block(const Expansion& p, const Block& block, const BFloat16* left,
                         const uint64_t* kept) {
  alignas(64) float sums[kSide][kStripColumns];
  combine_some(block.columns, left, p.matrix + block.k * kStepTerms, p.step_pitch, p.ranks,
               {&sums[0][0], kStripColumns, block.rows, false});
  for (int64_t i = 0; i < block.rows; ++i) {
    V v[kMostTiles];
    for (int c = 0; c < kMostTiles; ++c) v[c] = load(&sums[i][c * W]);
    finish<kWhole>(p, block.m + i, block.k, block.columns, v, kept[i]);
  }
}
