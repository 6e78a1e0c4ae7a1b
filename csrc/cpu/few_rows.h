// Of the whole layer of few rows in linear.cpp what other ops share.
#pragma once

#include "products.h"

namespace lora {

// x [..., K] as rows of one stride.
Matrix read_rows(const Tensor& x, const char* name);

// [..., columns] for x [..., K].
Tensor empty_rows(const Tensor& x, const char* name, int64_t columns);

Output written(Tensor& t, const char* name, int64_t rows, int64_t columns, Type type);

// W [N,K], whose rows or whose columns are contiguous: then it is held as [K,N]; or whose values
// are coded, of which the matrix has the shape alone.
struct Weight {
  Matrix held;
  bool transposed;
  const Coded* coded;
};

// What of a call is not its weight.
struct Call {
  const Tensor& x;
  const std::optional<Tensor>&lora_a, &lora_b, &bias;
  double scale, high;
  int64_t threshold;
  const std::optional<Tensor>& seed;
  std::optional<Tensor>&s, &into;
};

// y [..., N] = x W^T + bias + scale * high * (drop(x) A^T) B^T of few rows x [..., K]; without A
// and B the frozen layer. s [M,r], where it is given, is filled with scale * drop(x) A^T; where
// `into` [M,N] is given, y is put there and what is returned has no elements.
Tensor layer(const Kernels& kernels, const Call& call, const Matrix& rows, const Weight& W);

// sum [M,N], whose pitch is that of `apart`, = rows W^T before any rounding, of a weight [N,K] that
// is checked here.
void sums_of(const Kernels& kernels, const Matrix& rows, const Tensor& weight, float* sum,
             int64_t pitch);

}  // namespace lora
