// The arguments of the private CPU ops of whole layers, checked, and their results.
#include "few_rows.h"

namespace lora {
namespace {

constexpr int64_t kMostDimensions = 16;

}  // namespace

Matrix read(const Tensor& t, const char* name, int64_t rows, int64_t columns, Type type,
            bool or_float) {
  check_size(t, name, rows, columns);
  check_starts(t, name);
  check_columns(t, name);
  check_type(t, name, type, or_float);
  return {t.const_data_ptr(), type_of(t, name), rows, columns, t.stride(0)};
}

const void* read_bias(const std::optional<Tensor>& bias, int64_t N, Type type) {
  if (!bias.has_value()) return nullptr;
  check_tensor(*bias, "bias", 1);
  STD_TORCH_CHECK(bias->size(0) == N, "bias: must have ", N, " elements, got ", bias->size(0));
  check_starts(*bias, "bias");
  STD_TORCH_CHECK(N == 1 || bias->stride(0) == 1, "bias: must be contiguous");
  check_type(*bias, "bias", type, false);
  return bias->const_data_ptr();
}

Weight read_weight(const Tensor& t, int64_t N, int64_t K, Type type) {
  check_size(t, "weight", N, K);
  check_starts(t, "weight");
  check_type(t, "weight", type, true);
  const Type own = type_of(t, "weight");
  const bool rows = K == 1 || t.stride(1) == 1;
  STD_TORCH_CHECK(rows || N == 1 || t.stride(0) == 1,
                  "weight: the rows or the columns must be contiguous, got strides ", t.stride(0),
                  ", ", t.stride(1));
  if (rows) return {{t.const_data_ptr(), own, N, K, t.stride(0)}, false, nullptr};
  return {{t.const_data_ptr(), own, K, N, t.stride(1)}, true, nullptr};
}

Matrix read_rows(const Tensor& x, const char* name) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d >= 1, name, ": must have a dimension");
  check_tensor(x, name, d);
  const Type type = type_of(x, name);
  const int64_t K = x.size(d - 1);
  STD_TORCH_CHECK(K >= 1, name, ": must have columns");
  check_starts(x, name);
  STD_TORCH_CHECK(K == 1 || x.stride(d - 1) == 1, name, ": the columns must be contiguous");
  int64_t pitch = 0, rows = 1;
  for (int64_t i = d - 2; i >= 0; --i) {
    const int64_t size = x.size(i);
    if (size == 1) continue;
    if (rows == 1) pitch = x.stride(i);
    STD_TORCH_CHECK(pitch >= 0 && (rows == 1 || x.stride(i) == rows * pitch), name,
                    ": must view as one matrix");
    rows *= size;
  }
  return {x.const_data_ptr(), type, rows, K, pitch};
}

namespace {

// By the function itself, as the dispatcher would take longer.
Tensor empty(const Tensor& like, const int64_t* shape, int64_t d) {
  int64_t strides[kMostDimensions], pitch = 1;
  for (int64_t i = d - 1; i >= 0; --i) {
    strides[i] = pitch;
    pitch *= std::max<int64_t>(1, shape[i]);
  }
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(d, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace

Tensor empty_rows(const Tensor& x, const char* name, int64_t columns) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d <= kMostDimensions, name, ": must have at most ", kMostDimensions,
                  " dimensions");
  int64_t shape[kMostDimensions];
  for (int64_t i = 0; i < d; ++i) shape[i] = i == d - 1 ? columns : x.size(i);
  return empty(x, shape, d);
}

Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, bool asked) {
  const int64_t shape[2] = {rows, columns}, none = 0;
  return asked ? empty(like, shape, 2) : empty(like, &none, 1);
}

Output written(Tensor& t, const char* name, int64_t rows, int64_t columns, Type type,
               bool or_float) {
  check_size(t, name, rows, columns);
  check_type(t, name, type, or_float);
  check_writable(t, name);
  check_columns(t, name);
  return {t.mutable_data_ptr(), type_of(t, name), t.stride(0)};
}

}  // namespace lora
