// Included after few_rows.inl: products of many rows in fp32, bound by what is computed. x is laid
// out by tiles of kFewRows rows; of the matrix kPanel columns are packed at a time, kPackedTerms of
// their terms, which the first cache keeps for all rows.

constexpr int kPanel = kFewColumns * W;
constexpr int kGroup = 4;  // panels that a block of x is read for, while the second cache has it

// `columns` <= kPanel columns of so many terms of a matrix, zeros past them in the last vector, as
// [term][kPanel]; what is `ahead` elements from each will be the next.
typedef void (*Pack)(const void* matrix, int64_t pitch, int64_t terms, int64_t columns,
                     int64_t ahead, float* panel);

// Rows of the matrix are the columns: they are transposed.
template <typename T, Type kType>
void pack_rows(const void* matrix, int64_t pitch, int64_t terms, int64_t columns, int64_t ahead,
               float* panel) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < columns; c += W)
    for (int64_t t = 0; t < terms; t += W) {
      const T* const from = static_cast<const T*>(matrix) + c * pitch + t;
      V square[W];
      if (c + W <= columns && t + W <= terms) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = rounded<kType>(load(from + i * pitch));
      } else {
        const int count = terms - t < W ? static_cast<int>(terms - t) : W;
        for (int i = 0; i < W; ++i)
          square[i] =
              c + i < columns ? rounded<kType>(load_some(from + i * pitch, count)) : splat(0.f);
      }
      if (t % kLine == 0)
        for (int i = 0; i < W; ++i) __builtin_prefetch(from + i * pitch + ahead);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(panel + (t + i) * kPanel + c, square[i]);
    }
}

template <typename T, Type kType>
void pack_columns(const void* matrix, int64_t pitch, int64_t terms, int64_t columns, int64_t ahead,
                  float* panel) {
  const T* row = static_cast<const T*>(matrix);
  for (int64_t t = 0; t < terms; ++t, row += pitch, panel += kPanel) {
    if (columns == kPanel) {
#pragma GCC unroll 8
      for (int c = 0; c < kPanel; c += W) {
        store(panel + c, rounded<kType>(load(row + c)));
        __builtin_prefetch(row + c + ahead);
      }
      continue;
    }
    for (int64_t c = 0; c < columns; c += W) {
      const int count = columns - c < W ? static_cast<int>(columns - c) : W;
      store(panel + c, rounded<kType>(load_some(row + c, count)));
    }
  }
}

// Of a matrix of a type whose values are rounded to another.
inline Pack pack_of(Type type, Type to, bool rows) {
  if (type == Type::kBFloat16)
    return rows ? pack_rows<BFloat16, Type::kFloat> : pack_columns<BFloat16, Type::kFloat>;
  if (type == Type::kHalf)
    return rows ? pack_rows<Half, Type::kFloat> : pack_columns<Half, Type::kFloat>;
  if (to == Type::kBFloat16)
    return rows ? pack_rows<float, Type::kBFloat16> : pack_columns<float, Type::kBFloat16>;
  if (to == Type::kHalf)
    return rows ? pack_rows<float, Type::kHalf> : pack_columns<float, Type::kHalf>;
  return rows ? pack_rows<float, Type::kFloat> : pack_columns<float, Type::kFloat>;
}

inline int64_t tiles_of(int64_t rows) { return (rows + kFewRows - 1) / kFewRows; }

// Tiles first .. last of rows [., columns] as [block of terms][tile][term][row]. Rows past the
// last, and nobody's, are the one before.
template <typename T>
void lay_out_typed(const Rows& x, const int64_t* places, int64_t count, int64_t first, int64_t last,
                   float* out) {
  const int64_t all = tiles_of(count) * kFewRows;
  for (int64_t k = 0; k < x.columns; k += kPackedTerms) {
    const int64_t terms = x.columns - k < kPackedTerms ? x.columns - k : kPackedTerms;
    const T* const from = static_cast<const T*>(x.data) + k * x.column_stride;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kFewRows;
      const T* rows[kFewRows];
      for (int64_t i = 0; i < kFewRows; ++i) {
        const int64_t m = begin + i < count ? begin + i : count - 1;
        rows[i] = from + (places != nullptr ? places[m] : m) * x.row_stride;
      }
      float* const to = out + k * all + begin * terms;
      int64_t t = 0;
      if (x.column_stride == 1)
        for (; t + kFewRows <= terms; t += kFewRows) transpose_tile(rows, t, to + t * kFewRows);
      for (; t < terms; ++t)
#pragma GCC unroll 4
        for (int64_t i = 0; i < kFewRows; ++i)
          to[t * kFewRows + i] = static_cast<float>(rows[i][t * x.column_stride]);
    }
  }
}

void lay_out_rows(const Rows& x, const int64_t* places, int64_t count, int64_t first, int64_t last,
                  float* out) {
  switch (x.type) {
    case Type::kFloat:
      return lay_out_typed<float>(x, places, count, first, last, out);
    case Type::kBFloat16:
      return lay_out_typed<BFloat16>(x, places, count, first, last, out);
    case Type::kHalf:
      return lay_out_typed<Half>(x, places, count, first, last, out);
  }
}

// Rows first .. last of x [count, terms], which is laid out.
struct Left {
  const float* data;
  int64_t count, first, last, terms;
};

// A matrix whose rows, or columns, are those of the result.
struct Right {
  const void* data;
  Type type;
  int64_t pitch;
  Type rounded;
  bool by_rows;
};

// Terms of rows first .. last of x, which is laid out.
struct Terms {
  const float* x;
  int64_t first, last, count;
};

// What takes a product's sums: nobody while they are formed.
struct Nobody {};

// sums [row][kPanel] of kTiles tiles of rows from m on (+)= x panel, of which kVectors count; the
// last ones go to put(row, vector, sum).
template <int kTiles, int kVectors, class Put>
inline void add_tiles(const Terms& of, int64_t m, const float* panel, bool adds, float* sums,
                      const Put& put) {
  constexpr int kRows = kTiles * kFewRows;
  V sum[kRows][kVectors] = {};
  const float* left = of.x + m * of.count;
  const float* right = panel;
  for (int64_t t = 0; t < of.count; ++t, left += kFewRows, right += kPanel) {
    V column[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) column[c] = load(right + c * W);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V factor = splat(left[i / kFewRows * kFewRows * of.count + i % kFewRows]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sum[i][c] = fma(factor, column[c], sum[i][c]);
    }
  }
  // A sum of a long row is formed in shares: its error is that of a short one.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (m + i < of.first || m + i >= of.last) continue;
    float* const to = sums + (m + i - of.first) * kPanel;
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const V v = adds ? load(to + c * W) + sum[i][c] : sum[i][c];
      if constexpr (std::is_same_v<Put, Nobody>)
        store(to + c * W, v);
      else
        put(m + i, c, v);
    }
  }
}

// As many tiles at a time as give the sums that are in flight at once.
template <int kVectors, class Put>
inline void add_terms(const Terms& of, const float* panel, bool adds, float* sums, const Put& put) {
  constexpr int kTiles = kVectors == 1 ? 2 : 1;
  int64_t m = of.first / kFewRows * kFewRows;
  for (; m + kTiles * kFewRows <= of.last; m += kTiles * kFewRows)
    add_tiles<kTiles, kVectors>(of, m, panel, adds, sums, put);
  for (; m < of.last; m += kFewRows) add_tiles<1, kVectors>(of, m, panel, adds, sums, put);
}

template <class Put>
inline void add_panel(const Terms& of, int64_t columns, const float* panel, bool adds, float* sums,
                      const Put& put) {
  if (columns <= W) return add_terms<1>(of, panel, adds, sums, put);
  if (columns <= 2 * W) return add_terms<2>(of, panel, adds, sums, put);
  add_terms<kFewColumns>(of, panel, adds, sums, put);
}

// sums [panel][row][kPanel], panels `pitch` apart, (+)= x times columns first .. last of the
// result; the last ones go to put(row, column, sum, count), which takes so many columns.
template <class Put>
void add_product(const Left& x, const Right& matrix, int64_t first, int64_t last, bool adds,
                 float* sums, int64_t pitch, const Put& put) {
  alignas(64) float panel[kPackedTerms * kPanel];
  const Pack pack = pack_of(matrix.type, matrix.rounded, matrix.by_rows);
  const int64_t of_column = matrix.by_rows ? matrix.pitch : 1;
  const int64_t of_term = matrix.by_rows ? 1 : matrix.pitch;
  const int64_t all = tiles_of(x.count) * kFewRows;
  for (int64_t k = 0; k < x.terms; k += kPackedTerms) {
    const bool ends = x.terms - k <= kPackedTerms;
    const int64_t terms = ends ? x.terms - k : kPackedTerms;
    const int64_t ahead = ends ? kGroup * kPanel * of_column - k * of_term : kPackedTerms * of_term;
    float* to = sums;
    for (int64_t n = first; n < last; n += kPanel, to += pitch) {
      const int64_t columns = last - n < kPanel ? last - n : kPanel;
      pack(static_cast<const char*>(matrix.data) +
               (n * of_column + k * of_term) * size_of(matrix.type),
           matrix.pitch, terms, columns, ahead, panel);
      const Terms part = {x.data + k * all, x.first, x.last, terms};
      if constexpr (!std::is_same_v<Put, Nobody>) {
        if (ends) {
          add_panel(part, columns, panel, adds || k > 0, to, [&](int64_t m, int c, V v) {
            const int64_t left = columns - c * W;
            if (left > 0) put(m, n + c * W, v, left < W ? static_cast<int>(left) : W);
          });
          continue;
        }
      }
      add_panel(part, columns, panel, adds || k > 0, to, Nobody());
    }
  }
}

// Sums of the parts and of x times the matrix; put(m, n, sum, count) takes `count` columns of row m
// of the result from n on.
template <class Put>
inline void add_up(const Arranged& x, int64_t terms, const Right& matrix, const Range& range,
                   const Put& put) {
  const int64_t row = range.row, last_row = range.last_row, pitch = (last_row - row) * kPanel;
  const Memory<float> sums = memory_of<float>(kGroup * pitch);
  for (int64_t from = range.first; from < range.last; from += kGroup * kPanel) {
    const int64_t left = range.last - from;
    const int64_t to = left < kGroup * kPanel ? range.last : from + kGroup * kPanel;
    if (x.part_count > 0) std::memset(sums.get(), 0, kGroup * pitch * sizeof(float));
    for (int64_t i = 0; i < x.part_count; ++i) {
      const Part& part = x.parts[i];
      const int64_t begin = part.first > row ? part.first : row;
      const int64_t last = part.first + part.count, end = last < last_row ? last : last_row;
      if (begin < end)
        add_product({part.low, part.count, begin - part.first, end - part.first, part.ranks},
                    {part.b, part.b_type, part.b_pitch, matrix.rounded, part.by_rows}, from, to,
                    true, sums.get() + (begin - row) * kPanel, pitch, Nobody());
    }
    add_product({x.tiles, x.count, row, last_row, terms}, matrix, from, to, x.part_count > 0,
                sums.get(), pitch, [&](int64_t m, int64_t n, V v, int count) {
                  put(x.places != nullptr ? x.places[m] : m, n, v, count);
                });
  }
}

void multiply_packed(const Product& p, const Arranged& x, const Range& range) {
  add_up(x, p.columns, {p.matrix, p.matrix_type, p.matrix_pitch, p.rounded, true}, range,
         [&](int64_t m, int64_t n, V v, int count) { put_any(p, m, n, v, count); });
}

void combine_packed(const Combination& p, const Arranged& x, const Range& range) {
  add_up(x, p.terms, {p.matrix, p.matrix_type, p.matrix_pitch, p.rounded, false}, range,
         [&](int64_t m, int64_t k, V v, int count) {
           end_sum(p, m, k, p.accumulate, true, v, count);
         });
}

constexpr Packed kPacked = {kFewRows,     kPanel,          kLeastRows,
                            lay_out_rows, multiply_packed, combine_packed};
