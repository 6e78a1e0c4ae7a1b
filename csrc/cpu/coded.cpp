// The private CPU ops on a weight of few bits: a whole layer for few rows, and its values.
#include <vector>

#include "few_rows.h"

namespace lora {
namespace {

// A weight of few bits as the ops take it; what is not given of 4 bits is so of int8.
struct CodedTensors {
  const Tensor &codes, &scales;
  const std::optional<Tensor>&zero, &table, &outer_table, &outer_scale, &offset;
  double factor;
  const std::vector<int64_t>& sizes;
};

template <typename T>
const T* read_all(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  check_tensor(t, name, t.dim());
  check_starts(t, name);
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, name,
                  ": must be contiguous, of its dtype, and have ", count, " elements");
  return static_cast<const T*>(t.const_data_ptr());
}

const float* read_floats(const std::optional<Tensor>& t, const char* name, int64_t count) {
  return t.has_value() ? read_all<float>(*t, name, ScalarType::Float, count) : nullptr;
}

Coded read_coded(const CodedTensors& given) {
  constexpr int64_t kWhole = 64;  // columns that the kernels take at a time
  const std::vector<int64_t>& sizes = given.sizes;
  STD_TORCH_CHECK(sizes.size() == 4 && *std::min_element(sizes.begin(), sizes.end()) >= 1,
                  "sizes: must be N, K, block and outer_block");
  const int64_t N = sizes[0], K = sizes[1], block = sizes[2];
  Coded c = {};
  c.columns = K;
  c.factor = static_cast<float>(given.factor);
  c.four = given.table.has_value();
  if (!c.four) {
    c.codes = read_all<int8_t>(given.codes, "codes", ScalarType::Char, N * K);
    c.block = K;
    c.scale = read_all<float>(given.scales, "scale", ScalarType::Float, N);
    c.zero = read_floats(given.zero, "zero", N);
    return c;
  }
  STD_TORCH_CHECK(block % kWhole == 0 && K % block == 0,
                  "codes: must have rows of whole blocks of a multiple of ", kWhole, " columns");
  const int64_t blocks = N * (K / block);
  c.codes = read_all<uint8_t>(given.codes, "codes", ScalarType::Byte, N * K / 2);
  c.block = block;
  c.outer_block = sizes[3];
  c.table = read_floats(given.table, "table", 16);
  c.zero = read_floats(given.zero, "zero", blocks);
  if (!given.outer_table.has_value()) {
    c.scale = read_all<float>(given.scales, "scale", ScalarType::Float, blocks);
    return c;
  }
  STD_TORCH_CHECK(given.outer_scale.has_value() && given.offset.has_value(),
                  "outer_table: must come with outer_scale and offset");
  c.scale_codes = read_all<uint8_t>(given.scales, "scale", ScalarType::Byte, blocks);
  c.outer_table = read_floats(given.outer_table, "outer_table", 256);
  c.outer_scale = read_floats(given.outer_scale, "outer_scale", (blocks + sizes[3] - 1) / sizes[3]);
  c.offset = *read_floats(given.offset, "offset", 1);
  return c;
}

// A layer of a weight of few bits, `sizes` N, K, columns of a block, blocks of an outer one.
Tensor linear_coded_cpu(const Tensor x, const Tensor codes, const Tensor scales,
                        const std::optional<Tensor> zero, const std::optional<Tensor> table,
                        const std::optional<Tensor> outer_table,
                        const std::optional<Tensor> outer_scale, const std::optional<Tensor> offset,
                        double factor, std::vector<int64_t> sizes,
                        const std::optional<Tensor> lora_a, const std::optional<Tensor> lora_b,
                        const std::optional<Tensor> bias, double scale, double high,
                        int64_t threshold, const std::optional<Tensor> seed, int64_t isa,
                        std::optional<Tensor> s) {
  const Kernels& kernels = kernels_of(isa);
  const Matrix rows = read_rows(x, "x");
  const Coded coded =
      read_coded({codes, scales, zero, table, outer_table, outer_scale, offset, factor, sizes});
  STD_TORCH_CHECK(coded.columns == rows.columns, "x: must have ", coded.columns, " columns");
  STD_TORCH_CHECK(coded.four || coded.zero == nullptr, "zero: must not be given of int8");
  const Weight W = {{nullptr, rows.type, sizes[0], sizes[1], sizes[1]}, false, &coded};
  std::optional<Tensor> into;
  return layer(kernels, {x, lora_a, lora_b, bias, scale, high, threshold, seed, s, into}, rows, W);
}

// Fills out with rows from `row` on and columns from `column` on, at ends of blocks.
void decode_cpu(const Tensor codes, const Tensor scales, const std::optional<Tensor> zero,
                const std::optional<Tensor> table, const std::optional<Tensor> outer_table,
                const std::optional<Tensor> outer_scale, const std::optional<Tensor> offset,
                double factor, std::vector<int64_t> sizes, int64_t row, int64_t column, int64_t isa,
                Tensor out) {
  const Kernels& kernels = kernels_of(isa);
  const Coded coded =
      read_coded({codes, scales, zero, table, outer_table, outer_scale, offset, factor, sizes});
  check_matrix(out, "out");
  const int64_t count = out.size(0), columns = out.size(1);
  STD_TORCH_CHECK(
      0 <= row && row + count <= sizes[0] && 0 <= column && column + columns <= sizes[1],
      "out: must lie within the weight [", sizes[0], ", ", sizes[1], "]");
  STD_TORCH_CHECK(!coded.four || (column % coded.block == 0 && columns % coded.block == 0),
                  "out: must begin and end with blocks of ", coded.block, " columns");
  const Output to = written(out, "out", count, columns, type_of(out, "out"));
  const int64_t bytes = size_of(to.type);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    kernels.decode(coded, row + begin, row + end, column, column + columns,
                   static_cast<char*>(to.data) + begin * to.pitch * bytes, to.type, to.pitch);
  });
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_linear_coded_cpu", TORCH_BOX(&lora::linear_coded_cpu));
  m.impl("_decode_cpu", TORCH_BOX(&lora::decode_cpu));
}
