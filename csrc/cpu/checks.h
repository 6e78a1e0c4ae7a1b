// What every private CPU op does first: checks, a view of the arguments, memory to work in.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "passes.h"
#include "scalar.h"

#if LORA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lora {

using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct BufferOf {
  explicit BufferOf(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) / 64 + 1) * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~BufferOf() { std::free(data); }
  BufferOf(const BufferOf&) = delete;
  T* const data;
};
using Buffer = BufferOf<float>;

// The same, where up to kSmall floats need no call of the allocator.
template <int64_t kSmall>
struct Scratch {
  explicit Scratch(int64_t count)
      : large(count > kSmall ? std::make_unique<Buffer>(count) : nullptr),
        data(large ? large->data : small) {}
  Scratch(const Scratch&) = delete;
  alignas(64) float small[kSmall];
  const std::unique_ptr<Buffer> large;
  float* const data;
};

inline int64_t up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

#if LORA_AMX
// Whether there are tiles of bf16, and the system lets this process use them.
inline bool has_amx() {
  unsigned a, b, c, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kTiles | kBFloat16)) != 0) return false;
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}
#endif

#if defined(__aarch64__)
// Whether there are products of bf16.
inline bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#elif defined(__APPLE__)
  int there = 0;
  size_t size = sizeof there;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &there, &size, nullptr, 0) == 0 && there != 0;
#else
  return false;
#endif
}
#endif

// Its index in the list of extension.py, where those of one kind of CPU follow the plain one.
inline int64_t best_isa() {
#if defined(__aarch64__)
  static const int64_t neon = has_neon_bf16() ? 6 : 5;
  return neon;
#endif
#if LORA_AMX
  static const bool amx = has_amx();
#else
  constexpr bool amx = false;
#endif
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("bmi2"))
    return !__builtin_cpu_supports("avx512bf16") ? 2 : amx ? 4 : 3;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return 1;
#endif
  return 0;
}

inline const Kernels& kernels_of(int64_t isa) {
  STD_TORCH_CHECK(0 <= isa && isa <= best_isa(), "isa: got ", isa, ", this CPU has 0 to ",
                  best_isa());
#if defined(__aarch64__)
  STD_TORCH_CHECK(isa == 0 || isa >= 5, "isa: got ", isa, ", this CPU has 0 and 5 to ", best_isa());
  if (isa == 6) return kNeonBf16;
  if (isa == 5) return kNeon;
#endif
#if LORA_AMX
  if (isa == 4) return kAmx;
#endif
#if defined(__x86_64__)
  if (isa == 3) return kAvx512Bf16;
  if (isa == 2) return kAvx512;
  if (isa == 1) return kAvx2;
#endif
  return kBase;
}

inline void check_tensor(const Tensor& t, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": must be a CPU tensor");
  STD_TORCH_CHECK(t.layout() == Layout::Strided, name, ": must be dense");
  STD_TORCH_CHECK(t.dim() == dimensions, name, ": must have ", dimensions, " dimensions, got ",
                  t.dim());
}

inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

// torch computes with tensors that start between two elements (files mapped into memory); these
// kernels read a copy.
inline Tensor aligned(const Tensor& t) { return is_aligned(t) ? t : torch::stable::clone(t); }

inline std::optional<Tensor> aligned(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional(aligned(*t)) : t;
}

inline void check_matrix(const Tensor& t, const char* name) {
  check_tensor(t, name, 2);
  STD_TORCH_CHECK(t.stride(0) >= 0 && t.stride(1) >= 0, name, ": negative stride");
}

inline void check_size(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_matrix(t, name);
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, ": must be [", rows, ", ",
                  columns, "], got [", t.size(0), ", ", t.size(1), "]");
}

inline void check_starts(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_aligned(t), name, ": must start at a multiple of its element size");
}

inline void check_columns(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(1) == 1 || t.stride(1) == 1, name,
                  ": the columns must be contiguous, got stride ", t.stride(1));
}

inline Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kHalf;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, ": must be float32, bfloat16 or float16");
  return Type::kFloat;
}

inline void check_type(const Tensor& t, const char* name, Type type, bool or_float) {
  const Type own = type_of(t, name);
  STD_TORCH_CHECK(own == type || (or_float && own == Type::kFloat), name,
                  ": must have the dtype of the rows", or_float ? " or float32" : "");
}

// Writing through strides that overlap would race.
inline void check_writable(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_aligned(t), name, ": must start at a multiple of its element size");
  const int64_t outer = t.stride(0), inner = t.stride(1), rows = t.size(0), columns = t.size(1);
  const bool apart =
      (columns <= 1 || inner > 0) && (rows <= 1 || outer > 0) &&
      (rows <= 1 || columns <= 1 || outer > (columns - 1) * inner || inner > (rows - 1) * outer);
  STD_TORCH_CHECK(apart, name, ": its elements overlap in memory");
}

inline std::optional<Dropout> dropout_of(int64_t threshold, const std::optional<Tensor>& seed,
                                         int64_t rows) {
  STD_TORCH_CHECK(0 <= threshold && threshold < 65536, "threshold: must be in [0, 65536), got ",
                  threshold);
  if (!seed.has_value()) return std::nullopt;
  check_tensor(*seed, "seed", seed->dim());
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long &&
                      (seed->numel() == 1 || seed->numel() == 3) && seed->is_contiguous(),
                  "seed: must be a contiguous int64 tensor of one element or of three");
  const Tensor read = aligned(*seed);
  const int64_t* const words = static_cast<const int64_t*>(read.const_data_ptr());
  const int64_t row = seed->numel() == 3 ? words[1] : 0, column = seed->numel() == 3 ? words[2] : 0;
  constexpr int64_t kRowLimit = int64_t{1} << 32;
  STD_TORCH_CHECK(0 <= row && row < kRowLimit && rows <= kRowLimit - row,
                  "rows: with dropout they end at 2^32, got ", rows, " from ", row, " on");
  STD_TORCH_CHECK(column >= 0 && column % 8 == 0 && column / 8 < kRowLimit,
                  "seed: its column must be a multiple of 8, got ", column);
  const uint64_t value = static_cast<uint64_t>(words[0]);
  return Dropout{{static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)},
                 static_cast<uint32_t>(threshold),
                 static_cast<uint32_t>(row),
                 static_cast<uint32_t>(column / 8)};
}

inline Rows view(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), type_of(t, name), t.size(1), t.stride(0), t.stride(1)};
}

inline Result result(Tensor& t, const char* name) {
  return {t.mutable_data_ptr(), type_of(t, name), t.stride(0), t.stride(1)};
}

// out = scale * values, rounded to `type`, in the caller's memory.
template <typename T>
inline void write(const float* values, int64_t count, float scale, T* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) out[i * stride] = static_cast<T>(values[i] * scale);
}

inline void write_any(const float* values, int64_t count, float scale, void* out, Type type,
                      int64_t offset, int64_t stride) {
  switch (type) {
    case Type::kFloat:
      return write(values, count, scale, static_cast<float*>(out) + offset, stride);
    case Type::kBFloat16:
      return write(values, count, scale, static_cast<BFloat16*>(out) + offset, stride);
    case Type::kHalf:
      return write(values, count, scale, static_cast<Half*>(out) + offset, stride);
  }
}

}  // namespace lora
