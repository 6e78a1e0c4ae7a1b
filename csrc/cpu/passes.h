// The two passes over wide rows that the low-rank half is made of, on memory whose shapes and types
// have been checked. Both share their work out over torch's threads, or are one thread's where they
// are called by one of these.
#pragma once

#include "low_rank.h"

namespace lora {

struct Result {
  void* data;
  Type type;
  int64_t row_stride, column_stride;
};

// shrunk [count,ranks] = scale * drop(rows) matrix^T and
// gradient [ranks,columns] = gradient_scale * low^T drop(rows), each where its operand is given.
struct Shrinking {
  Rows rows;
  int64_t count, ranks;
  const Rows* matrix;
  const Rows* low;
  float scale, gradient_scale;
  const Dropout* dropout;
  Result shrunk, gradient;
};
void shrink(const Kernels& kernels, const Shrinking& p);

// out [count,columns] = scale * drop'(low matrix) + bias (padded, may be null) + out where
// `accumulate`; its columns are contiguous.
struct Expanding {
  Rows low, matrix;
  int64_t count, ranks;
  const float* bias;
  float scale;
  const Dropout* dropout;
  bool accumulate;
  Result out;
};
void expand(const Kernels& kernels, const Expanding& p);

}  // namespace lora
