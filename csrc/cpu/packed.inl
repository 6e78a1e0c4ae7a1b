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

// Tiles first .. last of rows in fp32 [count, columns] as [block of terms][tile][term][row]: zeros
// past the last row.
void lay_out_rows(const Rows& x, int64_t count, int64_t first, int64_t last, float* out) {
  const int64_t tiles = tiles_of(count);
  const float* const from = static_cast<const float*>(x.data);
  for (int64_t k = 0; k < x.columns; k += kPackedTerms) {
    const int64_t terms = x.columns - k < kPackedTerms ? x.columns - k : kPackedTerms;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t m = tile * kFewRows, rows = count - m < kFewRows ? count - m : kFewRows;
      const float* const at = from + m * x.row_stride + k * x.column_stride;
      float* const to = out + (k * tiles + tile * terms) * kFewRows;
      int64_t t = 0;
      if (rows == kFewRows && x.column_stride == 1)
        for (; t + kFewRows <= terms; t += kFewRows)
          transpose_tile(at + t, x.row_stride, to + t * kFewRows);
      for (; t < terms; ++t)
        for (int64_t i = 0; i < kFewRows; ++i)
          to[t * kFewRows + i] = i < rows ? at[i * x.row_stride + t * x.column_stride] : 0.f;
    }
  }
}

// x laid out, from term k on: `rows` in whole tiles.
struct Left {
  const float* data;
  int64_t rows, terms;
  const float* block(int64_t k) const { return data + k * rows; }
};

// A matrix whose rows, or columns, are those of the result.
struct Right {
  const void* data;
  Type type;
  int64_t pitch;
  Type rounded;
  bool by_rows;
};

// sums [row][kPanel] (+)= x [., terms] panel.
inline void add_terms(const float* x, int64_t rows, int64_t terms, const float* panel, bool adds,
                      float* sums) {
  for (int64_t m = 0; m < rows; m += kFewRows, x += terms * kFewRows, sums += kFewRows * kPanel) {
    V sum[kFewRows][kFewColumns] = {};
    const float* left = x;
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
    for (int i = 0; i < kFewRows; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < kFewColumns; ++c) {
        float* const to = sums + i * kPanel + c * W;
        store(to, adds ? load(to) + sum[i][c] : sum[i][c]);
      }
  }
}

// sums [panel][row][kPanel] (+)= x times columns first .. last of the result.
void add_product(const Left& x, const Right& matrix, int64_t first, int64_t last, bool adds,
                 float* sums) {
  alignas(64) float panel[kPackedTerms * kPanel];
  const Pack pack = pack_of(matrix.type, matrix.rounded, matrix.by_rows);
  const int64_t of_column = matrix.by_rows ? matrix.pitch : 1;
  const int64_t of_term = matrix.by_rows ? 1 : matrix.pitch;
  for (int64_t k = 0; k < x.terms; k += kPackedTerms) {
    const int64_t terms = x.terms - k < kPackedTerms ? x.terms - k : kPackedTerms;
    const int64_t ahead =
        k + terms < x.terms ? kPackedTerms * of_term : kGroup * kPanel * of_column - k * of_term;
    float* to = sums;
    for (int64_t n = first; n < last; n += kPanel, to += x.rows * kPanel) {
      const int64_t columns = last - n < kPanel ? last - n : kPanel;
      pack(static_cast<const char*>(matrix.data) +
               (n * of_column + k * of_term) * size_of(matrix.type),
           matrix.pitch, terms, columns, ahead, panel);
      add_terms(x.block(k), x.rows, terms, panel, adds || k > 0, to);
    }
  }
}

// Columns first .. last in groups: what adds the sums of one up, and what puts out `count` columns
// of a row from n on.
template <class Add, class Put>
inline void for_groups(int64_t count, int64_t first, int64_t last, const Add& add, const Put& put) {
  const int64_t rows = tiles_of(count) * kFewRows;
  const Memory<float> sums = memory_of<float>(rows * kGroup * kPanel);
  for (int64_t from = first; from < last; from += kGroup * kPanel) {
    const int64_t to = last - from < kGroup * kPanel ? last : from + kGroup * kPanel;
    add(rows, from, to, sums.get());
    const float* sum = sums.get();
    for (int64_t n = from; n < to; n += kPanel, sum += rows * kPanel)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t c = 0; c < kPanel && n + c < to; c += W)
          put(m, n + c, load(sum + m * kPanel + c),
              to - n - c < W ? static_cast<int>(to - n - c) : W);
  }
}

// What is added to the product: low [count, ranks], which it lays out, times b.
struct Low {
  template <class P>
  Low(const P& p, bool by_rows)
      : ranks(p.low != nullptr ? p.ranks : 0),
        low(memory_of<float>(tiles_of(p.count) * kFewRows * ranks)),
        b{p.b, p.b_type, p.b_pitch, p.rounded, by_rows} {
    if (ranks > 0)
      lay_out_rows({p.low, Type::kFloat, ranks, p.low_pitch, 1}, p.count, 0, tiles_of(p.count),
                   low.get());
  }
  void add(int64_t rows, int64_t from, int64_t to, float* sums) const {
    if (ranks > 0) add_product({low.get(), rows, ranks}, b, from, to, true, sums);
  }
  const int64_t ranks;
  const Memory<float> low;
  const Right b;
};

void multiply_packed(const Product& p, int64_t first, int64_t last) {
  const Right matrix = {p.matrix, p.matrix_type, p.matrix_pitch, p.rounded, true};
  const Low low(p, true);
  for_groups(
      p.count, first, last,
      [&](int64_t rows, int64_t from, int64_t to, float* sums) {
        add_product({static_cast<const float*>(p.tiles), rows, p.columns}, matrix, from, to, false,
                    sums);
        low.add(rows, from, to, sums);
      },
      [&](int64_t m, int64_t n, V v, int count) { put_any(p, m, n, v, count); });
}

void combine_packed(const Combination& p, int64_t first, int64_t last) {
  const Right matrix = {p.matrix, p.matrix_type, p.matrix_pitch, p.rounded, false};
  const Low low(p, false);
  for_groups(
      p.count, first, last,
      [&](int64_t rows, int64_t from, int64_t to, float* sums) {
        add_product({p.tiles, rows, p.terms}, matrix, from, to, false, sums);
        low.add(rows, from, to, sums);
      },
      [&](int64_t m, int64_t k, V v, int count) {
        end_sum(p, m, k, p.accumulate, true, v, count);
      });
}

constexpr Packed kPacked = {kFewRows,     kPanel,          kLeastRows,
                            lay_out_rows, multiply_packed, combine_packed};
