// Included once per instruction set, inside its namespace, after V (a vector of W floats) and its
// load/store/fma/keep functions. Tiles: kRows x kVectors accumulators, all in registers.

constexpr int kTile = W * kVectors;
static_assert(kRows % kVectors == 0 && kStrip % kTile == 0, "tiles do not fit");

// Mask bits of the eight-element blocks `first` .. `first + count` of row m, one byte a block.
// `out` takes whole groups of kPhilox blocks.
inline void mask_bits(const Dropout& dropout, uint32_t m, int64_t first, int64_t count,
                      uint8_t* out) {
  for (int64_t block = 0; block < count; block += kPhilox)
    philox_bits(dropout, dropout.block + static_cast<uint32_t>(first + block), dropout.row + m,
                out + block);
}

inline uint32_t bits_of(const uint8_t* bits, int64_t column) {
  uint32_t word = bits[column >> 3];
  if (W == 4) return word >> (column & 4);
  if (W == 16) word |= static_cast<uint32_t>(bits[(column >> 3) + 1]) << 8;
  return word;
}

template <typename T>
void load_rows(const Rows& from, int64_t first, int64_t count, const Dropout* dropout, float* out,
               int64_t pitch) {
  const int64_t columns = from.columns, whole = from.column_stride == 1 ? columns / W * W : 0;
  uint8_t bits[kStrip / 8 + kPhilox + 2];
  for (int64_t i = 0; i < count; ++i, out += pitch) {
    const T* row = static_cast<const T*>(from.data) + (first + i) * from.row_stride;
    for (int64_t k = 0; k < whole; k += W) store(out + k, load(row + k));
    for (int64_t k = whole; k < columns; ++k)
      out[k] = static_cast<float>(row[k * from.column_stride]);
    for (int64_t k = columns; k < pitch; ++k) out[k] = 0.f;
    if (dropout == nullptr) continue;
    for (int64_t strip = 0; strip < pitch; strip += kStrip) {
      const int64_t width = pitch - strip < kStrip ? pitch - strip : kStrip;
      mask_bits(*dropout, static_cast<uint32_t>(first + i), strip / 8, (width + 7) / 8, bits);
      for (int64_t k = 0; k < width; k += W)
        store(out + strip + k, keep(load(out + strip + k), bits_of(bits, k)));
    }
  }
}

void load_any(const Rows& from, int64_t first, int64_t count, const Dropout* dropout, float* out,
              int64_t pitch) {
  switch (from.type) {
    case Type::kFloat:
      return load_rows<float>(from, first, count, dropout, out, pitch);
    case Type::kBFloat16:
      return load_rows<BFloat16>(from, first, count, dropout, out, pitch);
    case Type::kHalf:
      return load_rows<Half>(from, first, count, dropout, out, pitch);
  }
}

// Columns in chunks: of many ranks a chunk of the matrix stays in the cache for all rows.
void shrink(const float* rows, int64_t row_stride, int64_t count, const float* matrix,
            int64_t pitch, int64_t ranks, float* out) {
  constexpr int64_t kChunk = 512;
  for (int64_t first = 0; first < pitch; first += kChunk) {
    const int64_t last = pitch - first < kChunk ? pitch : first + kChunk;
    for (int64_t m = 0; m < count; m += kRows) {
      const float* row[kRows];
      // Rows past the last repeat it; their results are not stored.
      for (int i = 0; i < kRows; ++i)
        row[i] = rows + (m + i < count ? m + i : count - 1) * row_stride;
      for (int64_t j = 0; j < ranks; j += kVectors) {
        const float* a = matrix + j * pitch;
        V acc[kRows][kVectors] = {};
        for (int64_t k = first; k < last; k += W) {
          V column[kVectors];
#pragma GCC unroll 8
          for (int c = 0; c < kVectors; ++c) column[c] = load(a + c * pitch + k);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const V x = load(row[i] + k);
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; ++c) acc[i][c] = fma(x, column[c], acc[i][c]);
          }
        }
        for (int i = 0; i < kRows && m + i < count; ++i)
          for (int c = 0; c < kVectors; ++c) {
            float* const to = out + (m + i) * ranks + j + c;
            *to = total(acc[i][c]) + (first == 0 ? 0.f : *to);
          }
      }
    }
  }
}

void outer(const float* rows, int64_t row_stride, int64_t count, const float* low, int64_t pitch,
           int64_t ranks, float* sum) {
  alignas(64) float packed[kBlockRows * kTile];
  for (int64_t k = 0; k < pitch; k += kTile) {
    const float* from = rows + k;
    int64_t step = row_stride;
    // Rows may lie where they drive each other out of the cache.
    if (ranks > kRows) {
      for (int64_t m = 0; m < count; ++m)
        for (int c = 0; c < kVectors; ++c)
          store(packed + m * kTile + c * W, load(from + m * step + c * W));
      from = packed;
      step = kTile;
    }
    for (int64_t j = 0; j < ranks; j += kRows) {
      V acc[kRows][kVectors];
      float* to = sum + j * pitch + k;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) acc[i][c] = load(to + i * pitch + c * W);
      for (int64_t m = 0; m < count; ++m) {
        V x[kVectors];
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) x[c] = load(from + m * step + c * W);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const V u = splat(low[m * ranks + j + i]);
#pragma GCC unroll 8
          for (int c = 0; c < kVectors; ++c) acc[i][c] = fma(u, x[c], acc[i][c]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) store(to + i * pitch + c * W, acc[i][c]);
    }
  }
}

// One tile of `expand`: `count` <= kRows rows, kTile columns from k on, `tile` those of the matrix.
template <typename T>
inline void expand_tile(const float* low, int64_t count, int64_t ranks, const float* tile,
                        const float* bias, const uint8_t* const* bits, int64_t bit_column,
                        bool accumulate, T* const* out, int64_t k) {
  V acc[kRows][kVectors] = {};
  const float* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = low + (i < count ? i : count - 1) * ranks;
  for (int64_t j = 0; j < ranks; ++j) {
    V q[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) q[c] = load(tile + j * kTile + c * W);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V u = splat(row[i][j]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) acc[i][c] = fma(u, q[c], acc[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= count) break;
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      V v = acc[i][c];
      if (bits != nullptr) v = keep(v, bits_of(bits[i], bit_column + c * W));
      if (bias != nullptr) v = v + load(bias + k + c * W);
      if (accumulate) v = v + load(out[i] + c * W);
      store(out[i] + c * W, v);
    }
  }
}

template <typename T>
void expand_rows(const float* low, int64_t first, int64_t count, int64_t ranks, const float* tiles,
                 const float* bias, const Dropout* dropout, bool accumulate, T* out,
                 int64_t columns, int64_t row_stride) {
  uint8_t bits[kExpandRows][kStrip / 8 + kPhilox + 2];
  const uint8_t* bit_rows[kExpandRows];
  for (int i = 0; i < kExpandRows; ++i) bit_rows[i] = bits[i];
  for (int64_t k = 0; k < columns; k += kTile, tiles += ranks * kTile) {
    if (dropout != nullptr && k % kStrip == 0) {
      const int64_t width = columns - k < kStrip ? columns - k : kStrip;
      for (int64_t m = 0; m < count; ++m)
        mask_bits(*dropout, static_cast<uint32_t>(first + m), k / 8,
                  (width + kTile - 1) / kTile * kTile / 8, bits[m]);
    }
    const int64_t width = columns - k < kTile ? columns - k : kTile;
    for (int64_t m = 0; m < count; m += kRows) {
      const int64_t here = count - m < kRows ? count - m : kRows;
      T* to[kRows] = {};
      T edge[kRows][kTile];
      for (int64_t i = 0; i < here; ++i) {
        T* row = out + (first + m + i) * row_stride + k;
        to[i] = width == kTile ? row : edge[i];
        if (width < kTile && accumulate)
          for (int64_t c = 0; c < kTile; ++c) edge[i][c] = c < width ? row[c] : T(0.f);
      }
      expand_tile<T>(low + m * ranks, here, ranks, tiles, bias,
                     dropout == nullptr ? nullptr : bit_rows + m, k % kStrip, accumulate, to, k);
      if (width < kTile)
        for (int64_t i = 0; i < here; ++i)
          for (int64_t c = 0; c < width; ++c)
            out[(first + m + i) * row_stride + k + c] = edge[i][c];
    }
  }
}

void expand_any(const float* low, int64_t first, int64_t count, int64_t ranks, const float* tiles,
                const float* bias, const Dropout* dropout, bool accumulate, void* out, Type type,
                int64_t columns, int64_t row_stride) {
  switch (type) {
    case Type::kFloat:
      return expand_rows(low, first, count, ranks, tiles, bias, dropout, accumulate,
                         static_cast<float*>(out), columns, row_stride);
    case Type::kBFloat16:
      return expand_rows(low, first, count, ranks, tiles, bias, dropout, accumulate,
                         static_cast<BFloat16*>(out), columns, row_stride);
    case Type::kHalf:
      return expand_rows(low, first, count, ranks, tiles, bias, dropout, accumulate,
                         static_cast<Half*>(out), columns, row_stride);
  }
}
