// A LoRA layer on the CPU: what the kernels of every instruction set offer, the low-rank half for
// any number of rows and the whole layer for few.
// Of torch nothing is known here but its 16-bit types. Rows are [count, columns] of any strides;
// "padded" buffers are fp32 with `pitch(columns)` floats a row, zero past the last column.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

// Tiles of bf16 (AMX): what a compiler must know of them.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define LORA_AMX 1
#else
#define LORA_AMX 0
#endif

namespace lora {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Rows that the kernels take at a time.
constexpr int kBlockRows = 64, kExpandRows = 32;

enum class Type : int { kFloat, kBFloat16, kHalf };
inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// The mask of rows whose first element is at (row, 8 * block) of the matrix that it is a mask of.
struct Dropout {
  uint32_t key[2];
  uint32_t threshold;
  uint32_t row, block;
};

// A view of rows in the caller's memory; strides in elements.
struct Rows {
  const void* data;
  Type type;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

// A matrix [., columns] of few bits, rows one after the other: (code - zero) * scale * factor, of
// int8 with a scale and a zero of each row; or of 4 bits (table[code] - zero) * scale, two codes in
// a byte, the first in the high bits, of blocks of columns. Scales of blocks may be codes in turn:
// outer_table[code] * outer_scale + offset, outer_scale of each `outer_block` blocks.
struct Coded {
  const void* codes;
  bool four;
  int64_t columns, block;
  const float* table;
  const float* scale;  // null where there are codes of it
  const float* zero;   // may be null
  float factor;
  const uint8_t* scale_codes;
  const float* outer_table;
  const float* outer_scale;
  float offset;
  int64_t outer_block;
};

// out [count, n] = scale * x matrix^T + low b^T + bias, of a matrix [n, columns] whose values are
// rounded to `rounded`, as b's [n, ranks] are. x is in fp32, or in bf16 for kernels that take it.
struct Product {
  const void* x;
  Type type;
  int64_t count, columns, pitch;
  const void* matrix;
  Type matrix_type;
  int64_t matrix_pitch;
  Type rounded;
  float scale;
  const float* low;  // padded; null without a branch
  int64_t low_pitch, ranks;
  const void* b;
  Type b_type;
  int64_t b_pitch;
  const void* bias;  // of out's type; may be null
  const float* sum;  // [count, n], added; may be null
  int64_t sum_pitch;
  void* out;
  Type out_type;
  int64_t out_pitch;
  const void* tiles;   // x laid out, where the kernels multiply by tiles
  const Coded* coded;  // the matrix, where it is of few bits; of 4 bits x is spread
};

// out [count, columns] = scale * x matrix (+ sum), of x [count, terms] in fp32, of any strides, and
// a matrix [terms, columns] whose values are rounded to `rounded`. Where it is `narrow`, rows of x
// are contiguous and hold values of the matrix's type.
struct Combination {
  const float* x;
  bool narrow;
  int64_t x_row, x_term;
  int64_t count, terms;
  const void* matrix;
  Type matrix_type;
  int64_t matrix_pitch;
  Type rounded;
  float scale;
  float* sum;  // [count, columns], overwritten; may be null for up to `terms` terms of the kernels
  int64_t sum_pitch;
  bool accumulate;  // whether sum counts
  void* out;        // null: the result is left in sum
  Type out_type;
  int64_t out_pitch;
};

// A matrix [terms, columns] of any strides, in bf16 or fp32 to be rounded.
struct Factor {
  const void* data;
  Type type;
  int64_t terms, columns, term_stride, column_stride;
};

// Rows first .. last of out [., columns] = scale * low [., ranks] matrix [ranks, columns] where
// kept, + bias (padded, may be null) + out where `accumulate`; the matrix is laid out by tiles.
struct Expansion {
  const BFloat16* low;
  int64_t low_pitch, ranks;
  const BFloat16* matrix;
  int64_t step_pitch;
  float scale;
  const float* bias;
  const Dropout* dropout;  // may be null
  bool accumulate;
  BFloat16* out;
  int64_t out_pitch, columns;
};

// The low-rank half of rows in bf16 that are never widened, by tiles of `columns` columns and
// `terms` terms.
struct Narrow {
  int columns, terms;

  // `combine` takes rows of x, where it is narrow, in multiples of this.
  int ranks;

  // `multiply` takes x in bf16 of so many rows or more laid out: its rows are the columns.
  int least_rows;

  // Each tile of columns is `tile_pitch` after the one before, each step of terms `step_pitch`.
  void (*lay_out)(const Factor& matrix, BFloat16* out, int64_t tile_pitch, int64_t step_pitch);

  // `count` rows from `first` on with zeros where `dropout` drops, and past the last column.
  void (*drop)(const Rows& from, int64_t first, int64_t count, const Dropout& dropout,
               BFloat16* out, int64_t pitch);

  // Whole tiles of columns of a matrix [terms, ranks] as `shrink` reads it: each column has
  // `terms` in multiples of those of a tile.
  void (*lay_out_ranks)(const Factor& matrix, int64_t ranks, BFloat16* out);

  // out[count, ranks] = rows [count, columns] * a matrix that `lay_out_ranks` has laid out; rows of
  // out have whole tiles.
  void (*shrink)(const BFloat16* rows, int64_t pitch, int64_t count, int64_t columns,
                 const BFloat16* matrix, int64_t ranks, float* out);

  void (*expand)(const Expansion& expansion, int64_t first, int64_t last);
};

// The low-rank part of some rows of a product or a combination: to rows first .. first + count,
// those of them that are computed, low [count, ranks], laid out, times b is added, whose rows are
// columns of the result, or where they are not its columns.
struct Part {
  int64_t first, count;
  const float* low;
  int64_t ranks;
  const void* b;
  Type b_type;
  int64_t b_pitch;
  bool by_rows;
};

// x of a product or a combination laid out, of whose result row m is row `places[m]`, or m where
// there are no places.
struct Arranged {
  const float* tiles;
  int64_t count;
  const int64_t* places;
  const Part* parts;
  int64_t part_count;
};

// Rows row .. last_row of what is laid out, columns first .. last.
struct Range {
  int64_t row, last_row, first, last;
};

// Products of many rows in fp32. x is laid out by tiles of `rows` rows, and columns are taken
// `columns` at a time; this pays from `least_rows` rows on. Neither x nor the low-rank part of what
// is multiplied is read but as it is arranged.
struct Packed {
  int rows, columns, least_rows;

  // Tiles first .. last of rows `places[m]`, or m, [count, columns] of any type and strides.
  void (*lay_out)(const Rows& x, const int64_t* places, int64_t count, int64_t first, int64_t last,
                  float* out);

  void (*multiply)(const Product& product, const Arranged& x, const Range& range);
  void (*combine)(const Combination& combination, const Arranged& x, const Range& range);
};

// Of a gate; the numbers are those of extension.py.
enum class Act : int { kSilu, kGeluTanh, kRelu, kRelu2 };
constexpr int kActs = 4;

// h = act(g) u; or where dh is given, which dg or du may be, dg = dh u act'(g) and du = dh act(g).
struct Gating {
  Type type;
  Act act;
  int64_t columns;
  const void *g, *u, *dh;
  void *h, *dg, *du;
  int64_t g_pitch, u_pitch, dh_pitch, h_pitch, dg_pitch, du_pitch;
};

struct Kernels {
  // Padded buffers have a multiple of `columns` columns, matrices in them of `ranks` rows.
  int columns, ranks;

  // Padded buffers of `multiply` have a multiple of `width` columns; it computes `few_columns` at a
  // time. It takes x in bf16, for a matrix in bf16, where `takes_bf16`.
  int width, few_columns;
  bool takes_bf16;

  // Widens `count` rows from `first` on to the padded buffer `out`, with zeros where `dropout`
  // (may be null) drops.
  void (*load)(const Rows& from, int64_t first, int64_t count, const Dropout* dropout, float* out,
               int64_t pitch);

  // out[count, ranks] = rows [count, pitch] * matrix [ranks, pitch]^T.
  void (*shrink)(const float* rows, int64_t row_stride, int64_t count, const float* matrix,
                 int64_t pitch, int64_t ranks, float* out);

  // sum[ranks, pitch] += low [count, ranks]^T * rows [count, pitch], of at most kBlockRows rows.
  void (*outer)(const float* rows, int64_t row_stride, int64_t count, const float* low,
                int64_t pitch, int64_t ranks, float* sum);

  // Rows first .. first + count, at most kExpandRows, of out [., columns] = low [count, ranks] *
  // matrix where kept, + bias (padded, may be null) + out where `accumulate`. The matrix comes in
  // tiles of `columns` columns, [ranks, columns] each.
  void (*expand)(const float* low, int64_t first, int64_t count, int64_t ranks, const float* tiles,
                 const float* bias, const Dropout* dropout, bool accumulate, void* out, Type type,
                 int64_t columns, int64_t row_stride);

  // Columns `first` .. `last` of the product. Bits do not depend on how columns are shared out.
  void (*multiply)(const Product& product, int64_t first, int64_t last);

  // Rows `row` .. `last_row`, columns `first` .. `last`. Bits do not depend on how rows are shared
  // out, nor columns in multiples of 16.
  void (*combine)(const Combination& combination, int64_t row, int64_t last_row, int64_t first,
                  int64_t last);
  int terms;

  // Rows `row` .. `last_row`, columns `first` .. `last` (ends of blocks) of a matrix of few bits.
  void (*decode)(const Coded& matrix, int64_t row, int64_t last_row, int64_t first, int64_t last,
                 void* out, Type type, int64_t pitch);

  // Rows in fp32, or in bf16 for kernels that take it, in the order in which codes of 4 bits are
  // multiplied; columns come in multiples of 64.
  void (*spread)(void* rows, int64_t count, int64_t columns, int64_t pitch);
  void (*spread_bf16)(void* rows, int64_t count, int64_t columns, int64_t pitch);

  // Rows `first` .. `last`.
  void (*gate)(const Gating& gating, int64_t first, int64_t last);

  const Narrow* narrow = nullptr;  // where there are such
  const Packed* packed = nullptr;
};

extern const Kernels kBase;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
#endif
#if LORA_AMX
extern const Kernels kAmx;
#endif
#if defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonBf16;
#endif

}  // namespace lora
