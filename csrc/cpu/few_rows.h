// What the ops of whole layers share.
#pragma once

#include "products.h"

namespace lora {

// A matrix whose columns are contiguous, of the type or where that may be of fp32.
Matrix read(const Tensor& t, const char* name, int64_t rows, int64_t columns, Type type,
            bool or_float);

// x [..., K] as rows of one stride.
Matrix read_rows(const Tensor& x, const char* name);

// [..., columns] for x [..., K].
Tensor empty_rows(const Tensor& x, const char* name, int64_t columns);

// [rows, columns] in the dtype of `like`, of size 0 where it is not asked for.
Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, bool asked);

// A result of the type, or where that may be of fp32.
Output written(Tensor& t, const char* name, int64_t rows, int64_t columns, Type type,
               bool or_float = false);

// W [N,K], whose rows or whose columns are contiguous: then it is held as [K,N]; or whose values
// are coded, of which the matrix has the shape alone.
struct Weight {
  Matrix held;
  bool transposed;
  const Coded* coded;
};

// [N], contiguous; null where it is not given.
const void* read_bias(const std::optional<Tensor>& bias, int64_t N, Type type);

Weight read_weight(const Tensor& t, int64_t N, int64_t K, Type type);

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
// `into` [M,N] is given, in the dtype of x or without a bias in fp32, y is put there and what is
// returned has no elements.
Tensor layer(const Kernels& kernels, const Call& call, const Matrix& rows, const Weight& W);

// sum [M,N], whose pitch is that of `apart`, = rows W^T before any rounding, of a weight [N,K] that
// is checked here.
void sums_of(const Kernels& kernels, const Matrix& rows, const Tensor& weight, float* sum,
             int64_t pitch);

}  // namespace lora
