#include "products.h"

#include <atomic>

namespace lora {

Product product_of(const Matrix& x, const Matrix& matrix, Type rounded, const Output& out) {
  Product p = {};
  p.x = x.data;
  p.type = x.type;
  p.count = x.rows;
  p.columns = x.columns;
  p.pitch = x.pitch;
  p.matrix = matrix.data;
  p.matrix_type = matrix.type;
  p.matrix_pitch = matrix.pitch;
  p.rounded = rounded;
  p.scale = 1.f;
  p.out = out.data;
  p.out_type = out.type;
  p.out_pitch = out.pitch;
  return p;
}

namespace {

// Threads share out the rows of the matrix, N of them, `width` at a time.
template <typename Multiply>
void share(const Multiply& multiply, int64_t width, const Product& product, int64_t N) {
  const int64_t work = product.columns * product.count;
  if (N * work < kSerial) return multiply(product, 0, N);
  const int64_t grain = std::max<int64_t>(1, kGrain / (work * width));
  torch::stable::parallel_for(0, (N + width - 1) / width, grain, [&](int64_t begin, int64_t end) {
    multiply(product, begin * width, std::min(N, end * width));
  });
}

void share(const Kernels& kernels, const Product& product, int64_t N) {
  share(kernels.multiply, kernels.few_columns, product, N);
}

// Threads share out the columns; of few, the rows.
template <class P>
void share(const Kernels& kernels, void (*compute)(const P&, const Arranged&, const Range&),
           const P& p, const Arranged& x, int64_t terms, int64_t columns) {
  const Packed& packed = *kernels.packed;
  constexpr int64_t kFew = 8;
  const int64_t tiles = (x.count + packed.rows - 1) / packed.rows;
  const int64_t panels = (columns + packed.columns - 1) / packed.columns;
  const auto grain = [](int64_t work) { return std::max<int64_t>(1, kGrain / (work + 1)); };
  if (panels < kFew)
    return torch::stable::parallel_for(0, tiles, grain(packed.rows * terms * columns),
                                       [&](int64_t begin, int64_t end) {
                                         const int64_t last = std::min(x.count, end * packed.rows);
                                         compute(p, x, {begin * packed.rows, last, 0, columns});
                                       });
  // Threads take a few at a time as they are ready: a core may be slower than others, or busy.
  constexpr int64_t kTaken = 2;
  const int64_t work = x.count * terms * packed.columns, turns = (panels + kTaken - 1) / kTaken;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), turns);
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, grain(work * turns / threads), [&](int64_t, int64_t) {
    for (int64_t turn = next++; turn < turns; turn = next++) {
      const int64_t first = turn * kTaken * packed.columns;
      const int64_t last = std::min(columns, first + kTaken * packed.columns);
      compute(p, x, {0, x.count, first, last});
    }
  });
}

}  // namespace

bool is_packed(const Kernels& kernels, Type type, int64_t rows, int64_t columns) {
  if (kernels.takes_bf16 && type == Type::kBFloat16) return false;
  return kernels.packed != nullptr && rows >= kernels.packed->least_rows &&
         columns > kernels.packed->columns;
}

LaidOut::LaidOut(const Kernels& kernels, const Rows& x, int64_t count, const int64_t* places)
    : memory(count > 0 ? up(count, kernels.packed->rows) * x.columns : 0),
      arranged{memory.data, count, places, nullptr, 0} {
  if (count == 0) return;
  const Packed& packed = *kernels.packed;
  const int64_t tiles = (count + packed.rows - 1) / packed.rows;
  const int64_t grain = std::max<int64_t>(1, kGrain / (packed.rows * x.columns + 1));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    packed.lay_out(x, places, count, begin, end, memory.data);
  });
}

WithLow::WithLow(const Kernels& kernels, const LaidOut& x, const Matrix& m, const Matrix& b,
                 bool by_rows)
    : low(kernels, view_of(m), m.rows),
      part{0, m.rows, low.memory.data, m.columns, b.data, b.type, b.pitch, by_rows},
      arranged(x.arranged) {
  arranged.parts = &part;
  arranged.part_count = m.rows > 0 ? 1 : 0;
}

void add_low(Product& p, const Matrix& low, const Matrix& b) {
  p.low = static_cast<const float*>(low.data);
  p.low_pitch = low.pitch;
  p.ranks = low.columns;
  p.b = b.data;
  p.b_type = b.type;
  p.b_pitch = b.pitch;
}

void multiply(const Kernels& kernels, const Product& product, int64_t N, const Arranged* x) {
  const Narrow* const narrow = kernels.narrow;
  if (x != nullptr)
    return share(kernels, kernels.packed->multiply, product, *x, product.columns, N);
  if (product.type == Type::kFloat && product.coded == nullptr && product.low == nullptr &&
      product.columns > 0 && is_packed(kernels, Type::kFloat, product.count, N)) {
    const LaidOut laid(kernels, {product.x, Type::kFloat, product.columns, product.pitch, 1},
                       product.count);
    return multiply(kernels, product, N, &laid.arranged);
  }
  if (narrow == nullptr || product.type != Type::kBFloat16 || product.count < narrow->least_rows ||
      product.coded != nullptr)
    return share(kernels, product, N);
  const int64_t side = narrow->columns, tile = up(product.columns, narrow->terms) * side;
  const int64_t tiles = (product.count + side - 1) / side;
  const BFloat16* const rows_of_x = static_cast<const BFloat16*>(product.x);
  BufferOf<BFloat16> laid_out(tiles * tile);
  torch::stable::parallel_for(
      0, tiles, std::max<int64_t>(1, kGrain / tile), [&](int64_t begin, int64_t end) {
        const int64_t m = begin * side, rows = std::min(product.count, end * side) - m;
        narrow->lay_out(
            {rows_of_x + m * product.pitch, product.type, product.columns, rows, 1, product.pitch},
            laid_out.data + begin * tile, tile, side * narrow->terms);
      });
  Product p = product;
  p.tiles = laid_out.data;
  share(kernels, p, N);
}

Combination combination_of(const Factors& x, const Matrix& matrix, Type rounded, float scale) {
  Combination c = {};
  c.x = x.data;
  c.narrow = x.narrow && matrix.type == rounded;
  c.x_row = x.row;
  c.x_term = x.term;
  c.count = x.count;
  c.terms = x.terms;
  c.matrix = matrix.data;
  c.matrix_type = matrix.type;
  c.matrix_pitch = matrix.pitch;
  c.rounded = rounded;
  c.scale = scale;
  return c;
}

void put_into(Combination& c, const Output& out) {
  c.out = out.data;
  c.out_type = out.type;
  c.out_pitch = out.pitch;
}

namespace {

// The result from sums [chunks, count, columns] of shares of the terms, and what is there.
void gather(const Combination& c, const float* part, int64_t chunks, int64_t columns) {
  for (int64_t m = 0; m < c.count; ++m) {
    float* const sum = c.sum + m * c.sum_pitch;
    if (!c.accumulate) std::fill(sum, sum + columns, 0.f);
    for (int64_t i = 0; i < chunks; ++i) {
      const float* const more = part + (i * c.count + m) * columns;
      for (int64_t k = 0; k < columns; ++k) sum[k] += more[k];
    }
    if (c.out != nullptr) write_any(sum, columns, 1.f, c.out, c.out_type, m * c.out_pitch, 1);
  }
}

}  // namespace

// Threads share out the columns; of a narrow result the rows; of few rows the terms, for each to
// read its share of the matrix from one end to the other.
void combine(const Kernels& kernels, const Combination& c, int64_t columns, const Arranged* x) {
  if (x != nullptr) return share(kernels, kernels.packed->combine, c, *x, c.terms, columns);
  const int64_t work = c.count * c.terms;
  const bool serial = columns * work < kSerial;
  if (!serial && is_packed(kernels, Type::kFloat, c.count, columns)) {
    const LaidOut laid(kernels, {c.x, Type::kFloat, c.terms, c.x_row, c.x_term}, c.count);
    return combine(kernels, c, columns, &laid.arranged);
  }
  if (serial) return kernels.combine(c, 0, c.count, 0, columns);
  const int64_t width = kernels.columns, strips = (columns + width - 1) / width;
  constexpr int64_t kFew = 2, kChunks = 8, kMany = 256;
  if (c.count <= kFew && c.terms >= kMany && strips > 4) {
    const int64_t chunk = (c.terms + kChunks - 1) / kChunks;
    Buffer part(kChunks * c.count * columns);
    torch::stable::parallel_for(0, kChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Combination share = c;
        const int64_t first = i * chunk, bytes = size_of(c.matrix_type);
        share.x += first * c.x_term;
        share.terms = std::clamp<int64_t>(c.terms - first, 0, chunk);
        share.matrix = static_cast<const char*>(c.matrix) + first * c.matrix_pitch * bytes;
        share.sum = part.data + i * c.count * columns;
        share.sum_pitch = columns;
        share.accumulate = false;
        share.out = nullptr;
        kernels.combine(share, 0, c.count, 0, columns);
      }
    });
    gather(c, part.data, kChunks, columns);
  } else if (strips > 4) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (work * width));
    torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      kernels.combine(c, 0, c.count, begin * width, std::min(columns, end * width));
    });
  } else {
    constexpr int64_t kRows = 16;
    torch::stable::parallel_for(
        0, (c.count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
          kernels.combine(c, begin * kRows, std::min(c.count, end * kRows), 0, columns);
        });
  }
}

namespace {
constexpr int64_t kMultipliedBytes = 768 << 10, kMostRows = 256;
}  // namespace

int64_t rows_at_once(const Kernels& kernels, int64_t rows, int64_t columns, bool combined) {
  const int64_t most = combined || kernels.packed != nullptr
                           ? kMostRows
                           : std::clamp<int64_t>(kMultipliedBytes / (4 * columns), 48, kMostRows);
  const int64_t shares = std::max<int64_t>(1, (rows + most - 1) / most);
  return up((rows + shares - 1) / shares, 4);
}

void put_columns(const float* sum, int64_t pitch, int64_t rows, int64_t columns,
                 const Output& out) {
  constexpr int64_t kWidth = 64;  // so many rows of `out` as a cache keeps while they are filled
  torch::stable::parallel_for(
      0, (columns + kWidth - 1) / kWidth, std::max<int64_t>(1, kGrain / (rows * kWidth)),
      [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * kWidth; n < std::min(columns, end * kWidth); n += kWidth)
          for (int64_t m = 0; m < rows; ++m)
            write_any(sum + m * pitch + n, std::min(kWidth, columns - n), 1.f, out.data, out.type,
                      n * out.pitch + m, out.pitch);
      });
}

}  // namespace lora
