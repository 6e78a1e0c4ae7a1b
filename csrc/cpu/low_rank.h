// The low-rank half of a LoRA layer on the CPU: what the kernels of every instruction set offer.
// Nothing here knows torch. Rows are [count, columns] of any strides; "padded" buffers are fp32
// with `pitch(columns)` floats a row, zero past the last column.
#pragma once

#include <cstdint>

namespace lora {

enum class Type : int { kFloat, kBFloat16, kHalf };

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

struct Kernels {
  // Padded buffers have a multiple of `columns` columns, matrices in them of `ranks` rows.
  int columns, ranks;

  // Widens `count` rows from `first` on to the padded buffer `out`, with zeros where `dropout`
  // (may be null) drops.
  void (*load)(const Rows& from, int64_t first, int64_t count, const Dropout* dropout, float* out,
               int64_t pitch);

  // out[count, ranks] = rows [count, pitch] * matrix [ranks, pitch]^T.
  void (*shrink)(const float* rows, int64_t row_stride, int64_t count, const float* matrix,
                 int64_t pitch, int64_t ranks, float* out);

  // sum[ranks, pitch] += low [count, ranks]^T * rows [count, pitch].
  void (*outer)(const float* rows, int64_t row_stride, int64_t count, const float* low,
                int64_t pitch, int64_t ranks, float* sum);

  // Rows first .. first + count of out [., columns] = low [count, ranks] * matrix [ranks, pitch]
  // where kept, + bias (padded, may be null) + out where `accumulate`.
  void (*expand)(const float* low, int64_t first, int64_t count, int64_t ranks, const float* matrix,
                 int64_t pitch, const float* bias, const Dropout* dropout, bool accumulate,
                 void* out, Type type, int64_t columns, int64_t row_stride);
};

extern const Kernels kBase;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace lora
