// The products of the kernels, shared out over torch's threads. Of few rows they read a matrix
// once, as it lies, of more it is packed: its rows are multiplied, its columns combined. Tiles
// follow from the shapes alone, so the bits of a result do not depend on the number of threads.
#pragma once

#include "checks.h"

namespace lora {

constexpr int64_t kSerial = 65536;       // multiply-adds that are not worth a second thread
constexpr int64_t kGrain = kSerial / 2;  // of a thread, at least

// What a caller owns, or memory made for it.
struct Matrix {
  const void* data;
  Type type;
  int64_t rows, columns, pitch;
};

inline Rows view_of(const Matrix& m) { return {m.data, m.type, m.columns, m.pitch, 1}; }

// Memory for a result, whose columns are contiguous.
struct Output {
  void* data;
  Type type;
  int64_t pitch;
};

// The pitch of padded rows, none of which begin at the same place of a cache's sets.
inline int64_t apart(int64_t columns, const Kernels& kernels) {
  return up(columns, kernels.columns) + kernels.columns;
}

// Rows in fp32, where they are not already.
struct Widened {
  Widened(const Kernels& kernels, const Matrix& from, const Dropout* dropout, bool needed)
      : memory(needed ? from.rows * apart(from.columns, kernels) : 0), matrix(from) {
    if (!needed) return;
    matrix.data = memory.data;
    matrix.type = Type::kFloat;
    matrix.pitch = apart(from.columns, kernels);
    const int64_t grain = std::max<int64_t>(1, kGrain / matrix.pitch);
    torch::stable::parallel_for(0, from.rows, grain, [&](int64_t begin, int64_t end) {
      kernels.load(view_of(from), begin, end - begin, dropout, memory.data + begin * matrix.pitch,
                   matrix.pitch);
    });
  }
  Scratch<2048> memory;
  Matrix matrix;
};

// Whether products with so many rows of x and columns are packed, of x in bf16 where it is not
// multiplied as it is.
bool is_packed(const Kernels& kernels, Type type, int64_t rows, int64_t columns);

// x laid out, for packed kernels: once for all products with it. Nothing of no rows.
struct LaidOut {
  LaidOut(const Kernels& kernels, const Rows& x, int64_t count, const int64_t* places = nullptr);
  Buffer memory;
  Arranged arranged;
};

// x laid out with the low-rank part of its rows: low [., ranks], of no rows without one, times b.
struct WithLow {
  WithLow(const Kernels& kernels, const LaidOut& x, const Matrix& low, const Matrix& b,
          bool by_rows);
  LaidOut low;
  Part part;
  Arranged arranged;
};

// x matrix^T, whose values are rounded.
Product product_of(const Matrix& x, const Matrix& matrix, Type rounded, const Output& out);

// N is the number of the matrix's rows. x is read as it is arranged, where that is given.
void multiply(const Kernels& kernels, const Product& product, int64_t N,
              const Arranged* x = nullptr);

// x(i, t) of fp32 memory: its rows, or by swapped strides its columns; `narrow` rows hold values of
// the call's dtype.
struct Factors {
  const float* data;
  int64_t row, term;
  int64_t count, terms;
  bool narrow;
};

// Rows first .. first + count, or to the last.
inline Matrix rows_from(const Matrix& all, int64_t first, int64_t count) {
  return {static_cast<const char*>(all.data) + first * all.pitch * size_of(all.type), all.type,
          std::min(count, all.rows - first), all.columns, all.pitch};
}
inline Output rows_from(const Output& all, int64_t first) {
  if (all.data == nullptr) return all;
  return {static_cast<char*>(all.data) + first * all.pitch * size_of(all.type), all.type,
          all.pitch};
}

inline Factors rows_of(const Matrix& m, bool narrow) {
  return {static_cast<const float*>(m.data), m.pitch, 1, m.rows, m.columns, narrow};
}
inline Factors columns_of(const Matrix& m) {
  return {static_cast<const float*>(m.data), 1, m.pitch, m.columns, m.rows, false};
}

Combination combination_of(const Factors& x, const Matrix& matrix, Type rounded, float scale);

void put_into(Combination& c, const Output& out);

// low [rows, ranks], padded, times b^T [ranks, N] is added.
void add_low(Product& p, const Matrix& low, const Matrix& b);

// Rows that are computed at a time, where there are many: of what is packed, that it is worth it;
// of x that is multiplied as it lies, so many as stay in a core's own cache while rows of the
// weight pass by. Shares are as even as can be.
int64_t rows_at_once(const Kernels& kernels, int64_t rows, int64_t columns, bool combined);

// out [columns, rows] = sum [rows, columns]^T.
void put_columns(const float* sum, int64_t pitch, int64_t rows, int64_t columns, const Output& out);

void combine(const Kernels& kernels, const Combination& c, int64_t columns,
             const Arranged* x = nullptr);

}  // namespace lora
