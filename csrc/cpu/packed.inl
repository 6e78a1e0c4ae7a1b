// Included after few_rows.inl: products of many rows in fp32, bound by what is computed. x is laid
// out by tiles of kFewRows rows; of the matrix kPanel columns are packed at a time, kPackedTerms of
// their terms, which the first cache keeps for all rows.

constexpr int kPanel = kFewColumns * W;
constexpr int kGroup = 4;  // panels that a block of x is read for, while the second cache has it

// `columns` <= kPanel columns of so many terms of a matrix, zeros past them, as [term][kPanel];
// what is `ahead` elements from each will be the next.
typedef void (*Pack)(const void* matrix, int64_t pitch, int64_t terms, int64_t columns,
                     int64_t ahead, float* panel);

// Rows of the matrix are the columns: they are transposed.
template <typename T, Type kType>
void pack_rows(const void* matrix, int64_t pitch, int64_t terms, int64_t columns, int64_t ahead,
               float* panel) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < kPanel; c += W)
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
    for (int64_t c = 0; c < kPanel; c += W) {
      const int64_t left = columns - c < 0 ? 0 : columns - c;
      store(panel + c, rounded<kType>(load_some(row + c, static_cast<int>(left < W ? left : W))));
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

// sums [row][kPanel] of rows first .. last (+)= x [., terms] panel.
inline void add_terms(const float* x, int64_t first, int64_t last, int64_t terms,
                      const float* panel, bool adds, float* sums) {
  for (int64_t m = first / kFewRows * kFewRows; m < last; m += kFewRows) {
    V sum[kFewRows][kFewColumns] = {};
    const float* left = x + m * terms;
    const float* right = panel;
    for (int64_t t = 0; t < terms; ++t, left += kFewRows, right += kPanel) {
      V column[kFewColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kFewColumns; ++c) column[c] = load(right + c * W);
#pragma GCC unroll 8
      for (int i = 0; i < kFewRows; ++i) {
        const V factor = splat(left[i]);
#pragma GCC unroll 8
        for (int c = 0; c < kFewColumns; ++c) sum[i][c] = fma(factor, column[c], sum[i][c]);
      }
    }
    // A sum of a long row is formed in shares: its error is that of a short one.
#pragma GCC unroll 8
    for (int i = 0; i < kFewRows; ++i) {
      if (m + i < first || m + i >= last) continue;
      float* const to = sums + (m + i - first) * kPanel;
#pragma GCC unroll 8
      for (int c = 0; c < kFewColumns; ++c)
        store(to + c * W, adds ? load(to + c * W) + sum[i][c] : sum[i][c]);
    }
  }
}

// sums [panel][row][kPanel], panels `pitch` apart, (+)= x times columns first .. last of the
// result.
void add_product(const Left& x, const Right& matrix, int64_t first, int64_t last, bool adds,
                 float* sums, int64_t pitch) {
  alignas(64) float panel[kPackedTerms * kPanel];
  const Pack pack = pack_of(matrix.type, matrix.rounded, matrix.by_rows);
  const int64_t of_column = matrix.by_rows ? matrix.pitch : 1;
  const int64_t of_term = matrix.by_rows ? 1 : matrix.pitch;
  const int64_t all = tiles_of(x.count) * kFewRows;
  for (int64_t k = 0; k < x.terms; k += kPackedTerms) {
    const int64_t terms = x.terms - k < kPackedTerms ? x.terms - k : kPackedTerms;
    const int64_t ahead =
        k + terms < x.terms ? kPackedTerms * of_term : kGroup * kPanel * of_column - k * of_term;
    float* to = sums;
    for (int64_t n = first; n < last; n += kPanel, to += pitch) {
      const int64_t columns = last - n < kPanel ? last - n : kPanel;
      pack(static_cast<const char*>(matrix.data) +
               (n * of_column + k * of_term) * size_of(matrix.type),
           matrix.pitch, terms, columns, ahead, panel);
      add_terms(x.data + k * all, x.first, x.last, terms, panel, adds || k > 0, to);
    }
  }
}

// Sums of x times the matrix and of the parts; put(m, n, sum, count) takes `count` columns of row m
// of the result from n on.
template <class Put>
inline void add_up(const Arranged& x, int64_t terms, const Right& matrix, const Range& range,
                   const Put& put) {
  const int64_t row = range.row, last_row = range.last_row, pitch = (last_row - row) * kPanel;
  const Memory<float> sums = memory_of<float>(kGroup * pitch);
  for (int64_t from = range.first; from < range.last; from += kGroup * kPanel) {
    const int64_t left = range.last - from;
    const int64_t to = left < kGroup * kPanel ? range.last : from + kGroup * kPanel;
    add_product({x.tiles, x.count, row, last_row, terms}, matrix, from, to, false, sums.get(),
                pitch);
    for (int64_t i = 0; i < x.part_count; ++i) {
      const Part& part = x.parts[i];
      const int64_t begin = part.first > row ? part.first : row;
      const int64_t last = part.first + part.count, end = last < last_row ? last : last_row;
      if (begin < end)
        add_product({part.low, part.count, begin - part.first, end - part.first, part.ranks},
                    {part.b, part.b_type, part.b_pitch, matrix.rounded, part.by_rows}, from, to,
                    true, sums.get() + (begin - row) * kPanel, pitch);
    }
    const float* sum = sums.get();
    for (int64_t n = from; n < to; n += kPanel, sum += pitch)
      for (int64_t m = row; m < last_row; ++m)
        for (int64_t c = 0; c < kPanel && n + c < to; c += W)
          put(x.places != nullptr ? x.places[m] : m, n + c, load(sum + (m - row) * kPanel + c),
              to - n - c < W ? static_cast<int>(to - n - c) : W);
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
