// Of the products of few rows in linear.cpp what other ops share. They read the weight once, as it
// lies.
#pragma once

#include "checks.h"

namespace lora {

constexpr int64_t kSerial = 65536;  // multiply-adds that are not worth a second thread

// What a caller owns, or memory made for it.
struct Matrix {
  const void* data;
  Type type;
  int64_t rows, columns, pitch;
};

// x [..., K] as rows of one stride.
Matrix read_rows(const Tensor& x, const char* name);

// [..., columns] for x [..., K].
Tensor empty_rows(const Tensor& x, const char* name, int64_t columns);

// The pitch of padded rows, none of which begin at the same place of a cache's sets.
inline int64_t apart(int64_t columns, const Kernels& kernels) {
  return up(columns, kernels.columns) + kernels.columns;
}

// N is the number of the matrix's rows.
void multiply(const Kernels& kernels, const Product& product, int64_t N);

// sum [M,N], whose pitch is that of `apart`, = rows W^T before any rounding, of a weight [N,K] that
// is checked here.
void sums_of(const Kernels& kernels, const Matrix& rows, const Tensor& weight, float* sum,
             int64_t pitch);

}  // namespace lora
