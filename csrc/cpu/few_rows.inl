// Included after a set of vectors: products of few rows with all rows of a matrix, and with all its
// columns; either reads the matrix once. Tiles: kFewRows x kFewColumns sums, all in registers.

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

// ------------------------------------------------------------------------------------- multiplying

// A sum of a long row is formed in shares of so many steps: its error is that of a short one.
constexpr int kShare = 32;

template <Type kType>
inline V rounded(V v) {
  if constexpr (kType == Type::kBFloat16) return rounded_bf16(v);
  if constexpr (kType == Type::kHalf) return rounded_half(v);
  return v;
}

// How x in fp32 is multiplied with a matrix of type T, rounded to kType.
template <typename T, Type kType>
struct Widened {
  typedef float X;
  typedef T M;
  typedef V VX;
  typedef V VM;
  static constexpr int kStep = W;
  static VX load_x(const X* p) { return load(p); }
  static VX load_x(const X* p, int count) { return load_some(p, count); }
  static VM load_m(const M* p) { return rounded<kType>(load(p)); }
  static VM load_m(const M* p, int count) { return rounded<kType>(load_some(p, count)); }
  static V dot(VX x, VM m, V sum) { return fma(x, m, sum); }
};

// Where of a row to read ahead, in bytes: past its end in the row that comes `stride` after it.
constexpr int64_t kReadAhead = 1024;
inline int64_t ahead_of(int64_t at, int64_t length, int64_t stride) {
  const int64_t ahead = at + kReadAhead;
  return ahead < length ? ahead : ahead - length + stride;
}

// sum[i][c] += row i of x times row c of the matrix; kUnroll steps are in flight at once.
template <class O, int kX, int kM, int kUnroll>
inline void dot_tile(const typename O::X* x, int64_t x_pitch, const typename O::M* m,
                     int64_t m_pitch, int64_t columns, V (&sum)[kX][kM]) {
  constexpr int64_t kStride = O::kStep * kUnroll;
  const int64_t whole = columns / kStride * kStride;
  for (int64_t first = 0; first < whole; first += kShare * kStride) {
    const int64_t last = whole - first < kShare * kStride ? whole : first + kShare * kStride;
    V part[kUnroll][kX][kM] = {};
    for (int64_t k = first; k < last; k += kStride) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = k + u * O::kStep;
        typename O::VM column[kM];
        constexpr int64_t kSize = sizeof(*m);
        const int64_t ahead = ahead_of(at * kSize, columns * kSize, kM * m_pitch * kSize);
#pragma GCC unroll 8
        for (int c = 0; c < kM; ++c) {
          column[c] = O::load_m(m + c * m_pitch + at);
          __builtin_prefetch(reinterpret_cast<const char*>(m + c * m_pitch) + ahead);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kX; ++i) {
          const typename O::VX row = O::load_x(x + i * x_pitch + at);
#pragma GCC unroll 8
          for (int c = 0; c < kM; ++c) part[u][i][c] = O::dot(row, column[c], part[u][i][c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < kM; ++c) {
#pragma GCC unroll 2
        for (int u = 1; u < kUnroll; ++u) part[0][i][c] = part[0][i][c] + part[u][i][c];
        sum[i][c] = sum[i][c] + part[0][i][c];
      }
  }
  for (int64_t k = whole; k < columns; k += O::kStep) {
    const int count = columns - k < O::kStep ? static_cast<int>(columns - k) : O::kStep;
    typename O::VM column[kM];
#pragma GCC unroll 8
    for (int c = 0; c < kM; ++c) column[c] = O::load_m(m + c * m_pitch + k, count);
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i) {
      const typename O::VX row = O::load_x(x + i * x_pitch + k, count);
#pragma GCC unroll 8
      for (int c = 0; c < kM; ++c) sum[i][c] = O::dot(row, column[c], sum[i][c]);
    }
  }
}

// `count` <= W values of b at (row, column), rounded as the product says.
inline V load_b(const Product& p, int64_t row, int64_t column, int count) {
  const int64_t at = row * p.b_pitch + column;
  if (p.b_type == Type::kBFloat16) return load_some(static_cast<const BFloat16*>(p.b) + at, count);
  if (p.b_type == Type::kHalf) return load_some(static_cast<const Half*>(p.b) + at, count);
  const V v = load_some(static_cast<const float*>(p.b) + at, count);
  if (p.rounded == Type::kBFloat16) return rounded_bf16(v);
  return p.rounded == Type::kHalf ? rounded_half(v) : v;
}

template <typename T>
inline void put(const Product& p, int64_t m, int64_t n, const float* values, int count) {
  T* out = static_cast<T*>(p.out) + m * p.out_pitch + n;
  for (int c = 0; c < count; ++c) {
    float value = p.scale * values[c];
    if (p.bias != nullptr) value += static_cast<float>(static_cast<const T*>(p.bias)[n + c]);
    if (p.sum != nullptr) value += p.sum[m * p.sum_pitch + n + c];
    out[c] = static_cast<T>(value);
  }
}

// Adds the low-rank part to the sums of a tile, and puts them out.
template <int kX, int kM>
inline void finish_tile(const Product& p, int64_t m, int64_t n, V (&sum)[kX][kM]) {
  for (int64_t j = 0; p.low != nullptr && j < p.ranks; j += W) {
    const int count = p.ranks - j < W ? static_cast<int>(p.ranks - j) : W;
    V column[kM];
#pragma GCC unroll 8
    for (int c = 0; c < kM; ++c) column[c] = load_b(p, n + c, j, count);
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i) {
      const V row = load(p.low + (m + i) * p.low_pitch + j);
#pragma GCC unroll 8
      for (int c = 0; c < kM; ++c) sum[i][c] = fma(row, column[c], sum[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kX; ++i) {
    float values[kM];
#pragma GCC unroll 8
    for (int c = 0; c < kM; ++c) values[c] = total(sum[i][c]);
    switch (p.out_type) {
      case Type::kFloat:
        put<float>(p, m + i, n, values, kM);
        break;
      case Type::kBFloat16:
        put<BFloat16>(p, m + i, n, values, kM);
        break;
      case Type::kHalf:
        put<Half>(p, m + i, n, values, kM);
        break;
    }
  }
}

// Rows m .. m + kX of x, columns n .. n + kM of the result.
template <class O, int kX, int kM>
inline void multiply_tile(const Product& p, int64_t m, int64_t n) {
  V sum[kX][kM] = {};
  dot_tile<O, kX, kM, kX == 1 ? 2 : 1>(
      static_cast<const typename O::X*>(p.x) + m * p.pitch, p.pitch,
      static_cast<const typename O::M*>(p.matrix) + n * p.matrix_pitch, p.matrix_pitch, p.columns,
      sum);
  finish_tile<kX, kM>(p, m, n, sum);
}

template <class O, int kM>
inline void multiply_strip(const Product& p, int64_t n) {
  int64_t m = 0;
  for (; p.count - m >= kFewRows; m += kFewRows) multiply_tile<O, kFewRows, kM>(p, m, n);
  if constexpr (kFewRows > 3) {
    if (p.count - m == 3) return multiply_tile<O, 3, kM>(p, m, n);
    if (p.count - m == 2) return multiply_tile<O, 2, kM>(p, m, n);
  }
  if (p.count - m == 1) multiply_tile<O, 1, kM>(p, m, n);
}

template <class O>
void multiply(const Product& p, int64_t first, int64_t last) {
  int64_t n = first;
  for (; n + kFewColumns <= last; n += kFewColumns) multiply_strip<O, kFewColumns>(p, n);
  for (; n < last; ++n) multiply_strip<O, 1>(p, n);
}

void multiply_coded(const Product& p, int64_t first, int64_t last);

void multiply_widened(const Product& p, int64_t first, int64_t last) {
  if (p.coded != nullptr) return multiply_coded(p, first, last);
  switch (p.matrix_type) {
    case Type::kBFloat16:
      return multiply<Widened<BFloat16, Type::kFloat>>(p, first, last);
    case Type::kHalf:
      return multiply<Widened<Half, Type::kFloat>>(p, first, last);
    case Type::kFloat:
      break;
  }
  switch (p.rounded) {
    case Type::kBFloat16:
      return multiply<Widened<float, Type::kBFloat16>>(p, first, last);
    case Type::kHalf:
      return multiply<Widened<float, Type::kHalf>>(p, first, last);
    case Type::kFloat:
      return multiply<Widened<float, Type::kFloat>>(p, first, last);
  }
}

// --------------------------------------------------------------------------------------- combining

// Terms of a sum that are formed in registers, as many rows of the matrix are read at a time: fewer
// where memory is waited for, more where the columns are packed.
constexpr int kFewTerms = 16, kTerms = 32, kPackedTerms = 1024 / W;
constexpr int kPackedRows = 17;  // from so many on
constexpr int kAhead = 128;      // bytes

template <typename T>
inline void store_some(T* p, V v, int count) {
  if (count == W) return store(p, v);
  T values[W];
  store(values, v);
  std::memcpy(static_cast<void*>(p), values, count * sizeof(T));
}

// Adds what else the product has to sums of row m, columns n .. n + count, and puts them out.
template <typename T>
void put_row(const Product& p, int64_t m, int64_t n, V v, int count) {
  v = splat(p.scale) * v;
  if (p.bias != nullptr) v = v + load_some(static_cast<const T*>(p.bias) + n, count);
  if (p.sum != nullptr) v = v + load_some(p.sum + m * p.sum_pitch + n, count);
  store_some(static_cast<T*>(p.out) + m * p.out_pitch + n, v, count);
}
inline void put_any(const Product& p, int64_t m, int64_t n, V v, int count) {
  switch (p.out_type) {
    case Type::kFloat:
      return put_row<float>(p, m, n, v, count);
    case Type::kBFloat16:
      return put_row<BFloat16>(p, m, n, v, count);
    case Type::kHalf:
      return put_row<Half>(p, m, n, v, count);
  }
}

// What of the matrix is multiplied at a time: columns k .. k + kV * W (of the last vector `count`),
// terms n .. last; where it lies, or packed.
template <typename T>
struct Strip {
  const T* data;
  int64_t pitch, k, n, last;
  int count;
};

// Columns k .. k + count of row m, from their products: to the sum, or where it `ends` to the
// result.
inline void end_sum(const Combination& p, int64_t m, int64_t k, bool adds, bool ends, V v,
                    int count) {
  float* const sum = p.sum != nullptr ? p.sum + m * p.sum_pitch + k : nullptr;
  const int64_t at = m * p.out_pitch + k;
  const V scale = splat(p.scale);
  v = adds ? fma(scale, v, load_some(sum, count)) : scale * v;
  if (!ends || p.out == nullptr)
    store_some(sum, v, count);
  else if (p.out_type == Type::kFloat)
    store_some(static_cast<float*>(p.out) + at, v, count);
  else if (p.out_type == Type::kBFloat16)
    store_some(static_cast<BFloat16*>(p.out) + at, v, count);
  else
    store_some(static_cast<Half*>(p.out) + at, v, count);
}

// Rows i .. i + kX of the result.
template <typename T, Type kType, int kX, int kV>
inline void combine_tile(const Combination& p, int64_t i, const Strip<T>& strip) {
  const int64_t n = strip.n, last = strip.last;
  const int count = strip.count;
  V acc[kX][kV] = {};
  const T* row = strip.data;
  const float* x = p.x + i * p.x_row + n * p.x_term;
  for (int64_t t = n; t < last; ++t, row += strip.pitch, x += p.x_term) {
    // Few rows wait for memory: the columns after these.
    if (strip.pitch != kV * W)
#pragma GCC unroll 8
      for (int line = 0; line < kV * W * static_cast<int>(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row + kV * W) + kAhead + line);
    if constexpr (kX <= 2) {
      V factor[kX];
#pragma GCC unroll 8
      for (int m = 0; m < kX; ++m) factor[m] = splat(x[m * p.x_row]);
#pragma GCC unroll 8
      for (int c = 0; c < kV; ++c) {
        const V column = rounded<kType>(kV == 1 ? load_some(row, count) : load(row + c * W));
#pragma GCC unroll 8
        for (int m = 0; m < kX; ++m) acc[m][c] = fma(factor[m], column, acc[m][c]);
      }
    } else {
      V column[kV];
#pragma GCC unroll 8
      for (int c = 0; c < kV; ++c)
        column[c] = rounded<kType>(kV == 1 ? load_some(row, count) : load(row + c * W));
#pragma GCC unroll 8
      for (int m = 0; m < kX; ++m) {
        const V factor = splat(x[m * p.x_row]);
#pragma GCC unroll 8
        for (int c = 0; c < kV; ++c) acc[m][c] = fma(factor, column[c], acc[m][c]);
      }
    }
  }
  const bool adds = p.accumulate || n > 0;
#pragma GCC unroll 8
  for (int m = 0; m < kX; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kV; ++c)
      end_sum(p, i + m, strip.k + c * W, adds, last == p.terms, acc[m][c], kV == 1 ? count : W);
}

template <typename T, Type kType, int kV>
inline void combine_rows(const Combination& p, int64_t i, int64_t last_row, const Strip<T>& strip) {
  if constexpr (kV <= kFewColumns) {
    for (; last_row - i >= kFewRows; i += kFewRows)
      combine_tile<T, kType, kFewRows, kV>(p, i, strip);
  }
  for (; last_row - i >= 2; i += 2) combine_tile<T, kType, 2, kV>(p, i, strip);
  if (i < last_row) combine_tile<T, kType, 1, kV>(p, i, strip);
}

// Packed for many rows: rows of the matrix may lie where they drive each other out of the cache.
template <typename T, Type kType, int kV>
inline void combine_strip(const Combination& p, int64_t row, int64_t last_row,
                          const Strip<T>& strip) {
  if constexpr (kV == kFewColumns) {
    if (p.count >= kPackedRows) {
      alignas(64) float packed[kPackedTerms * kV * W];
      const T* from = strip.data;
      float* to = packed;
      for (int64_t t = strip.n; t < strip.last; ++t, from += strip.pitch, to += kV * W)
        for (int c = 0; c < kV; ++c) {
          __builtin_prefetch(reinterpret_cast<const char*>(from + kV * W + c * W) + kAhead);
          store(to + c * W, rounded<kType>(load(from + c * W)));
        }
      return combine_rows<float, Type::kFloat, kV>(
          p, row, last_row, {packed, kV * W, strip.k, strip.n, strip.last, strip.count});
    }
  }
  combine_rows<T, kType, kV>(p, row, last_row, strip);
}

template <typename T, Type kType>
void combine_terms(const Combination& p, int64_t row, int64_t last_row, int64_t first,
                   int64_t end) {
  constexpr int kWidth = kFewColumns * W;
  const int64_t step = p.count >= kPackedRows             ? kPackedTerms
                       : p.count <= 4 && p.sum != nullptr ? kFewTerms
                                                          : kTerms;
  int64_t n = 0;
  do {
    const int64_t last = p.terms - n < step ? p.terms : n + step;
    const T* const rows = static_cast<const T*>(p.matrix) + n * p.matrix_pitch;
    const auto strip = [&](int64_t k, int count) {
      return Strip<T>{rows + k, p.matrix_pitch, k, n, last, count};
    };
    int64_t k = first;
    if (last_row - row <= 2)
      for (; end - k >= 2 * kWidth; k += 2 * kWidth)
        combine_strip<T, kType, 2 * kFewColumns>(p, row, last_row, strip(k, W));
    for (; end - k >= kWidth; k += kWidth)
      combine_strip<T, kType, kFewColumns>(p, row, last_row, strip(k, W));
    for (; k < end; k += W)
      combine_strip<T, kType, 1>(p, row, last_row,
                                 strip(k, end - k < W ? static_cast<int>(end - k) : W));
    n = last;
  } while (n < p.terms);
}

void combine(const Combination& p, int64_t row, int64_t last_row, int64_t first, int64_t last) {
  switch (p.matrix_type) {
    case Type::kBFloat16:
      return combine_terms<BFloat16, Type::kFloat>(p, row, last_row, first, last);
    case Type::kHalf:
      return combine_terms<Half, Type::kFloat>(p, row, last_row, first, last);
    case Type::kFloat:
      break;
  }
  switch (p.rounded) {
    case Type::kBFloat16:
      return combine_terms<float, Type::kBFloat16>(p, row, last_row, first, last);
    case Type::kHalf:
      return combine_terms<float, Type::kHalf>(p, row, last_row, first, last);
    case Type::kFloat:
      return combine_terms<float, Type::kFloat>(p, row, last_row, first, last);
  }
}
