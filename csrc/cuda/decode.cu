// The private op of the decode kernel: checks first, then one launch on torch's current stream.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <mutex>
#include <optional>

#include "decode.cuh"

namespace lora {
namespace {

using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxExtent = int64_t{1} << 30;  // of a dimension: indices within one are ints
constexpr int64_t kMaxCluster = 8;
constexpr int kDevices = 64;  // whose attributes are remembered

void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "lora_kernels: ", what, ": ", cudaGetErrorString(status));
}

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns,
                  const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": must be a CUDA tensor");
  STD_TORCH_CHECK(t.layout() == Layout::Strided, name, ": must be dense");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name, ": must be on device ",
                  like.get_device_index(), " of x, got ", t.get_device_index());
  STD_TORCH_CHECK(t.dim() == 2, name, ": must have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, ": must be [", rows, ", ",
                  columns, "], got [", t.size(0), ", ", t.size(1), "]");
}

bool is_float(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type || t.scalar_type() == ScalarType::Float, name,
                  ": must have the dtype of x or float32");
  return t.scalar_type() == ScalarType::Float;
}

// Rows as 16-byte loads need them.
void check_rows(const Tensor& t, const char* name) {
  const int64_t words = 16 / t.element_size();
  STD_TORCH_CHECK(t.stride(1) == 1 && (t.size(0) == 1 || t.stride(0) % words == 0) &&
                      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
                  name,
                  ": rows must be contiguous and start at multiples of 16 bytes, got strides (",
                  t.stride(0), ", ", t.stride(1), ")");
}

void check_output(const Tensor& t, const char* name, int64_t rows, int64_t columns,
                  const Tensor& x) {
  check_matrix(t, name, rows, columns, x);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": must have the dtype of x");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
}

// Allows a kernel this much shared memory. Asking costs as much as a launch, so once per device.
template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes, int device, std::atomic<int>* allowed) {
  if (device < kDevices && allowed[device].load(std::memory_order_acquire) >= bytes) return;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "shared memory of the decode kernel");
  if (device < kDevices) allowed[device].store(bytes, std::memory_order_release);
}

template <typename T, typename A, int TILES, int HALVES>
void launch(const DecodeArguments& arguments, int threads, int cluster, int device) {
  using Shape = DecodeShape<TILES, HALVES>;
  const auto kernel = decode_kernel<T, A, TILES, HALVES>;
  const int bytes = Shape::shared_bytes(threads);
  static std::atomic<int> allowed[kDevices];
  allow_shared(kernel, bytes, device, allowed);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int tiles = (arguments.N + Shape::kRows - 1) / Shape::kRows;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((tiles + cluster - 1) / cluster * cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments), "launch of the decode kernel");
}

template <typename T, typename A>
void launch(const DecodeArguments& arguments, int rows, int threads, int cluster, int device) {
  if (rows == 16) {
    if (arguments.M <= 8) return launch<T, A, 1, 1>(arguments, threads, cluster, device);
    return launch<T, A, 1, 2>(arguments, threads, cluster, device);
  }
  if (arguments.M <= 8) return launch<T, A, 2, 1>(arguments, threads, cluster, device);
  return launch<T, A, 2, 2>(arguments, threads, cluster, device);
}

// y [M,N] = x [M,K] weight [N,K]^T + bias [N] + high s lora_b [N,r]^T with
// s [M,r] = scale x lora_a^T. A block takes `rows` rows of the weight with `warps` warps, `cluster`
// blocks share out s.
void decode_cuda(const Tensor x, const Tensor weight, const Tensor lora_a, const Tensor lora_b,
                 const std::optional<Tensor> bias, double scale, double high, int64_t rows,
                 int64_t warps, int64_t cluster, std::optional<Tensor> s, Tensor y) {
  STD_TORCH_CHECK(x.is_cuda(), "x: must be a CUDA tensor");
  STD_TORCH_CHECK(x.layout() == Layout::Strided, "x: must be dense");
  STD_TORCH_CHECK(x.dim() == 2, "x: must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2, "weight: must have 2 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(lora_a.dim() == 2, "lora_a: must have 2 dimensions, got ", lora_a.dim());
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = lora_a.size(0);
  STD_TORCH_CHECK(1 <= M && M <= kMaxRows, "x: must have 1 to ", kMaxRows, " rows, got ", M);
  STD_TORCH_CHECK(8 <= K && K < kMaxExtent && K % 8 == 0,
                  "x: its columns must be a multiple of 8 below 2^30, got ", K);
  STD_TORCH_CHECK(1 <= N && N < kMaxExtent, "weight: must have 1 to 2^30 rows, got ", N);
  STD_TORCH_CHECK(1 <= r && r < kMaxExtent, "lora_a: must have 1 to 2^30 rows, got ", r);
  check_matrix(weight, "weight", N, K, x);
  check_matrix(lora_a, "lora_a", r, K, x);
  check_matrix(lora_b, "lora_b", N, r, x);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "x: must be bfloat16 or float16");
  STD_TORCH_CHECK(weight.scalar_type() == type, "weight: must have the dtype of x");
  const bool a_is_float = is_float(lora_a, "lora_a", type);
  check_rows(x, "x");
  check_rows(weight, "weight");
  check_rows(lora_a, "lora_a");
  if (bias.has_value())
    STD_TORCH_CHECK(bias->is_cuda() && bias->get_device_index() == x.get_device_index() &&
                        bias->layout() == Layout::Strided && bias->dim() == 1 && bias->size(0) == N,
                    "bias: must have ", N, " elements on the device of x");
  check_output(y, "y", M, N, x);
  if (s.has_value()) check_output(*s, "s", M, r, x);
  STD_TORCH_CHECK(rows == 16 || rows == 32, "rows: must be 16 or 32, got ", rows);
  STD_TORCH_CHECK(warps == 4 || warps == 8, "warps: must be 4 or 8, got ", warps);
  STD_TORCH_CHECK(1 <= cluster && cluster <= kMaxCluster && (cluster & (cluster - 1)) == 0,
                  "cluster: must be 1, 2, 4 or 8, got ", cluster);

  DecodeArguments arguments{};
  arguments.x = x.const_data_ptr();
  arguments.weight = weight.const_data_ptr();
  arguments.a = lora_a.const_data_ptr();
  arguments.b = lora_b.const_data_ptr();
  arguments.y = y.mutable_data_ptr();
  arguments.s = s.has_value() ? s->mutable_data_ptr() : nullptr;
  arguments.x_row = x.stride(0);
  arguments.weight_row = weight.stride(0);
  arguments.a_row = lora_a.stride(0);
  arguments.b_row = lora_b.stride(0);
  arguments.b_column = lora_b.stride(1);
  arguments.b_is_float = is_float(lora_b, "lora_b", type);
  if (bias.has_value()) {
    arguments.bias = bias->const_data_ptr();
    arguments.bias_stride = bias->stride(0);
    arguments.bias_is_float = is_float(*bias, "bias", type);
  }
  arguments.M = static_cast<int>(M);
  arguments.N = static_cast<int>(N);
  arguments.K = static_cast<int>(K);
  arguments.r = static_cast<int>(r);
  arguments.scale = static_cast<float>(scale);
  arguments.high = static_cast<float>(high);

  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int threads = static_cast<int>(warps) * 32, blocks = static_cast<int>(cluster);
  const int height = static_cast<int>(rows);
  if (type == ScalarType::BFloat16) {
    if (a_is_float) return launch<__nv_bfloat16, float>(arguments, height, threads, blocks, device);
    return launch<__nv_bfloat16, __nv_bfloat16>(arguments, height, threads, blocks, device);
  }
  if (a_is_float) return launch<__half, float>(arguments, height, threads, blocks, device);
  return launch<__half, __half>(arguments, height, threads, blocks, device);
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("_decode_cuda", TORCH_BOX(&lora::decode_cuda));
}
