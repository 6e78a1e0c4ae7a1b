// Included after few_rows.inl: a matrix of few bits, multiplied and decoded as it lies. Of 4 bits
// the even columns lie in the high halves of the bytes, so x is spread likewise: of each two
// steps of columns the even ones first.

// Blocks whose scales are made at a time: also the share in which a long sum is formed.
constexpr int kBlocks = 16;
constexpr int kCodedColumns = 4;
// Many rows are multiplied with so many columns, two at a time, before the next share of them.
constexpr int kManyRows = 8, kManyColumns = 16;

inline void scales_of(const Coded& c, int64_t first, int count, float* out) {
  if (c.scale_codes == nullptr) {
    std::memcpy(out, c.scale + first, count * sizeof(float));
    return;
  }
  for (int i = 0; i < count;) {
    const int64_t at = first + i, outer = at / c.outer_block;
    const int64_t rest = (outer + 1) * c.outer_block - at;
    int some = count - i < W ? count - i : W;
    if (some > rest) some = static_cast<int>(rest);
    uint8_t codes[16] = {};
    std::memcpy(codes, c.scale_codes + at, some);
    const V product = apart(look_up(c.outer_table, codes) * splat(c.outer_scale[outer]));
    float scales[W];
    store(scales, product + splat(c.offset));
    std::memcpy(out + i, scales, some * sizeof(float));
    i += some;
  }
}

// The 16 values of a block.
struct Values {
  V part[16 / W];
};

template <Type kType>
inline Values values_of(const Coded& c, int64_t block, float scale) {
  const V zero = splat(c.zero == nullptr ? 0.f : c.zero[block]), factor = splat(scale);
  Values values;
#pragma GCC unroll 4
  for (int i = 0; i < 16 / W; ++i)
    values.part[i] = rounded<kType>((load(c.table + i * W) - zero) * factor);
  return values;
}

template <Type kType>
struct Wide4 {
  typedef float X;
  typedef V VX;
  typedef V VM;
  typedef Values Table;
  static constexpr int kStep = W;
  static VX load_x(const X* p) { return load(p); }
  static Table table(const Coded& c, int64_t block, float scale) {
    return values_of<kType>(c, block, scale);
  }
  static void pair(const Table& table, const uint8_t* p, VM* even, VM* odd) {
    const Codes codes = codes_of(p);
    *even = look(table.part, high(codes));
    *odd = look(table.part, codes);
  }
  static V dot(VX x, VM m, V sum) { return fma(x, m, sum); }
};

// As dot_tile, of columns k .. end of 4 bits.
template <class O, int kX, int kM>
inline void dot_coded(const Product& p, int64_t m, int64_t n, int64_t k, int64_t end,
                      V (&sum)[kX][kM]) {
  const Coded& c = *p.coded;
  const typename O::X* const x = static_cast<const typename O::X*>(p.x) + m * p.pitch;
  const int64_t blocks = c.columns / c.block, pitch = c.columns / 2, last = end / c.block;
  const uint8_t* const codes = static_cast<const uint8_t*>(c.codes) + n * pitch;
  for (int64_t first = k / c.block; first < last; first += kBlocks) {
    const int count = last - first < kBlocks ? static_cast<int>(last - first) : kBlocks;
    float scales[kM][kBlocks];
    for (int j = 0; j < kM; ++j) scales_of(c, (n + j) * blocks + first, count, scales[j]);
    V part[kX][kM] = {};
    for (int b = 0; b < count; ++b) {
      typename O::Table table[kM];
#pragma GCC unroll 8
      for (int j = 0; j < kM; ++j)
        table[j] = O::table(c, (n + j) * blocks + first + b, scales[j][b]);
      const int64_t begin = (first + b) * c.block;
      for (int64_t at = begin; at < begin + c.block; at += 2 * O::kStep) {
        typename O::VM even[kM], odd[kM];
        const int64_t ahead = ahead_of(at / 2, pitch, kM * pitch);
#pragma GCC unroll 8
        for (int j = 0; j < kM; ++j) {
          O::pair(table[j], codes + j * pitch + at / 2, &even[j], &odd[j]);
          __builtin_prefetch(codes + j * pitch + ahead);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kX; ++i) {
          const typename O::VX first_x = O::load_x(x + i * p.pitch + at);
          const typename O::VX second_x = O::load_x(x + i * p.pitch + at + O::kStep);
#pragma GCC unroll 8
          for (int j = 0; j < kM; ++j)
            part[i][j] = O::dot(second_x, odd[j], O::dot(first_x, even[j], part[i][j]));
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kM; ++j) sum[i][j] = sum[i][j] + part[i][j];
  }
}

struct Wide8 {
  typedef float X;
  typedef int8_t M;
  typedef V VX;
  typedef V VM;
  static constexpr int kStep = W;
  static VX load_x(const X* p) { return load(p); }
  static VX load_x(const X* p, int count) { return load_some(p, count); }
  static VM load_m(const M* p) { return load_bytes(p); }
  static VM load_m(const M* p, int count) {
    M some[W] = {};
    std::memcpy(some, p, count);
    return load_bytes(some);
  }
  static V dot(VX x, VM m, V sum) { return fma(x, m, sum); }
};

// Columns k .. end.
template <class O, int kX, int kM>
inline void dot_any(const Product& p, int64_t m, int64_t n, int64_t k, int64_t end,
                    V (&sum)[kX][kM]) {
  if constexpr (requires { typename O::Table; }) {
    dot_coded<O, kX, kM>(p, m, n, k, end, sum);
  } else {
    const int64_t columns = p.coded->columns;
    dot_tile<O, kX, kM, kX == 1 ? 2 : 1>(
        static_cast<const typename O::X*>(p.x) + m * p.pitch + k, p.pitch,
        static_cast<const int8_t*>(p.coded->codes) + n * columns + k, columns, end - k, sum);
  }
}

template <class O, int kX, int kM>
inline void finish_coded(const Product& p, int64_t m, int64_t n, V (&sum)[kX][kM]) {
  if constexpr (!requires { typename O::Table; }) {
#pragma GCC unroll 8
    for (int j = 0; j < kM; ++j) {
      const V scale = splat(p.coded->scale[n + j] * p.coded->factor);
#pragma GCC unroll 8
      for (int i = 0; i < kX; ++i) sum[i][j] = sum[i][j] * scale;
    }
  }
  finish_tile<kX, kM>(p, m, n, sum);
}

template <class O, int kX, int kM>
inline void coded_tile(const Product& p, int64_t m, int64_t n) {
  V sum[kX][kM] = {};
  dot_any<O, kX, kM>(p, m, n, 0, p.columns, sum);
  finish_coded<O, kX, kM>(p, m, n, sum);
}

// Rows from m on.
template <class O, int kM>
inline void coded_rows(const Product& p, int64_t m, int64_t n) {
  for (; p.count - m >= 4; m += 4) coded_tile<O, 4, kM>(p, m, n);
  for (; p.count - m >= 2; m += 2) coded_tile<O, 2, kM>(p, m, n);
  if (m < p.count) coded_tile<O, 1, kM>(p, m, n);
}

// The first rows, in eights, of kManyColumns columns: a share of x stays in the cache for them.
template <class O>
inline void coded_strip(const Product& p, int64_t n) {
  const int64_t share = kBlocks * (p.coded->four ? p.coded->block : 64);
  for (int64_t m = 0; p.count - m >= kManyRows; m += kManyRows) {
    V sum[kManyColumns / 2][kManyRows][2] = {};
    for (int64_t k = 0; k < p.columns; k += share) {
      const int64_t end = p.columns - k < share ? p.columns : k + share;
      for (int j = 0; j < kManyColumns / 2; ++j)
        dot_any<O, kManyRows, 2>(p, m, n + 2 * j, k, end, sum[j]);
    }
    for (int j = 0; j < kManyColumns / 2; ++j)
      finish_coded<O, kManyRows, 2>(p, m, n + 2 * j, sum[j]);
  }
}

template <class O>
void multiply_as(const Product& p, int64_t first, int64_t last) {
  int64_t n = first;
  if constexpr (W == 16) {
    for (; p.count >= kManyRows && n + kManyColumns <= last; n += kManyColumns) {
      coded_strip<O>(p, n);
      for (int j = 0; j < kManyColumns; j += kCodedColumns)
        coded_rows<O, kCodedColumns>(p, p.count / kManyRows * kManyRows, n + j);
    }
  }
  for (; n + kCodedColumns <= last; n += kCodedColumns) coded_rows<O, kCodedColumns>(p, 0, n);
  for (; n < last; ++n) coded_rows<O, 1>(p, 0, n);
}

void multiply_coded(const Product& p, int64_t first, int64_t last) {
  if (!p.coded->four) return multiply_as<Wide8>(p, first, last);
  switch (p.rounded) {
    case Type::kBFloat16:
      return multiply_as<Wide4<Type::kBFloat16>>(p, first, last);
    case Type::kHalf:
      return multiply_as<Wide4<Type::kHalf>>(p, first, last);
    case Type::kFloat:
      return multiply_as<Wide4<Type::kFloat>>(p, first, last);
  }
}

// Rows in fp32, in place.
void spread(void* rows, int64_t count, int64_t columns, int64_t pitch) {
  for (int64_t m = 0; m < count; ++m) {
    float* const row = static_cast<float*>(rows) + m * pitch;
    for (int64_t k = 0; k < columns; k += 2 * W) {
      V even, odd;
      part(load(row + k), load(row + k + W), &even, &odd);
      store(row + k, even);
      store(row + k + W, odd);
    }
  }
}

// ---------------------------------------------------------------------------------------- decoding

template <typename T>
inline void store_pairs(T* p, V even, V odd) {
  V first, second;
  join(even, odd, &first, &second);
  store(p, first);
  store(p + W, second);
}

template <typename T, Type kType>
void decode_as(const Coded& c, int64_t row, int64_t last_row, int64_t first, int64_t last, T* out,
               int64_t pitch) {
  for (int64_t n = row; n < last_row; ++n, out += pitch) {
    if (c.four) {
      const int64_t blocks = c.columns / c.block, end = last / c.block;
      const uint8_t* const codes = static_cast<const uint8_t*>(c.codes) + n * c.columns / 2;
      float scales[kBlocks];
      for (int64_t b = first / c.block; b < end; b += kBlocks) {
        const int count = end - b < kBlocks ? static_cast<int>(end - b) : kBlocks;
        scales_of(c, n * blocks + b, count, scales);
        for (int i = 0; i < count; ++i) {
          const Values values = values_of<kType>(c, n * blocks + b + i, scales[i]);
          for (int64_t k = (b + i) * c.block; k < (b + i + 1) * c.block; k += 2 * W) {
            const Codes pair = codes_of(codes + k / 2);
            store_pairs(out + k - first, look(values.part, high(pair)), look(values.part, pair));
          }
        }
      }
      continue;
    }
    const int8_t* const codes = static_cast<const int8_t*>(c.codes) + n * c.columns;
    const V zero = splat(c.zero == nullptr ? 0.f : c.zero[n]);
    const V scale = splat(c.scale[n]), factor = splat(c.factor);
    int64_t k = first;
    for (; k + W <= last; k += W)
      store(out + k - first, (load_bytes(codes + k) - zero) * scale * factor);
    if (k < last)
      store_some(out + k - first,
                 (Wide8::load_m(codes + k, static_cast<int>(last - k)) - zero) * scale * factor,
                 static_cast<int>(last - k));
  }
}

void decode(const Coded& c, int64_t row, int64_t last_row, int64_t first, int64_t last, void* out,
            Type type, int64_t pitch) {
  switch (type) {
    case Type::kFloat:
      return decode_as<float, Type::kFloat>(c, row, last_row, first, last, static_cast<float*>(out),
                                            pitch);
    case Type::kBFloat16:
      return decode_as<BFloat16, Type::kBFloat16>(c, row, last_row, first, last,
                                                  static_cast<BFloat16*>(out), pitch);
    case Type::kHalf:
      return decode_as<Half, Type::kHalf>(c, row, last_row, first, last, static_cast<Half*>(out),
                                          pitch);
  }
}
