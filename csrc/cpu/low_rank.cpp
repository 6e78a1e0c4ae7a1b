// The private CPU ops of the low-rank half: checks first, then the rows in chunks over torch's own
// threads. Chunks follow from the shapes alone, so the bits of a result do not depend on the number
// of threads.
#include "checks.h"
#include "passes.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lora {
namespace {

constexpr int64_t kCacheBytes = 256 << 10;   // a block of widened rows, in a core's own cache
constexpr int64_t kPartialBytes = 32 << 20;  // all partial sums of a gradient
constexpr int64_t kChunkRows = 128, kMaxChunks = 64;
constexpr int64_t kNarrowRows = 128, kNarrowChunk = 512;  // where rows are not widened
constexpr int64_t kExpandedRows = 256;  // of a thread, at least, where it lays out the matrix

// ----------------------------------------------------------------------------------------- packing

float rounded(float value, Type type) {
  if (type == Type::kBFloat16) return static_cast<float>(static_cast<BFloat16>(value));
  if (type == Type::kHalf) return static_cast<float>(static_cast<Half>(value));
  return value;
}

// The rows of a rank-sized matrix, rounded to `type`, in a padded buffer.
void pack(const Kernels& kernels, const Rows& from, int64_t ranks, Type type, float* out,
          int64_t pitch) {
  const int64_t padded = up(ranks, kernels.ranks);
  torch::stable::parallel_for(0, padded, std::max<int64_t>(1, 32768 / pitch),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t j = begin; j < end; ++j) {
                                  float* row = out + j * pitch;
                                  if (j >= ranks) {
                                    std::fill(row, row + pitch, 0.f);
                                    continue;
                                  }
                                  kernels.load(from, j, 1, nullptr, row, pitch);
                                  if (from.type != type)
                                    for (int64_t k = 0; k < from.columns; ++k)
                                      row[k] = rounded(row[k], type);
                                }
                              });
}

// The same in tiles, as `expand` reads them.
void pack_tiles(const Kernels& kernels, const Rows& from, int64_t ranks, Type type, float* out,
                int64_t pitch) {
  const int64_t padded = up(ranks, kernels.ranks), width = kernels.columns;
  Buffer rows(padded * pitch);
  pack(kernels, from, ranks, type, rows.data, pitch);
  torch::stable::parallel_for(0, pitch / width, std::max<int64_t>(1, 32768 / (padded * width)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t tile = begin; tile < end; ++tile)
                                  for (int64_t j = 0; j < padded; ++j)
                                    std::memcpy(out + (tile * padded + j) * width,
                                                rows.data + j * pitch + tile * width,
                                                width * sizeof(float));
                              });
}

// Shares out the columns of a factor, `width` at a time: lay(part, its first column).
template <typename Lay>
void lay_out(const Factor& all, int64_t width, const Lay& lay) {
  const int64_t shares = (all.columns + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, 32768 / (all.terms * width));
  torch::stable::parallel_for(0, shares, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * width, bytes = size_of(all.type);
    Factor part = all;
    part.data = static_cast<const char*>(all.data) + first * all.column_stride * bytes;
    part.columns = std::min(all.columns, end * width) - first;
    lay(part, first);
  });
}

}  // namespace

// -------------------------------------------------------------------------------------------
// passes

void shrink(const Kernels& kernels, const Shrinking& p) {
  const Rows& from = p.rows;
  const Type type = from.type;
  const int64_t M = p.count, C = from.columns, r = p.ranks;
  const Dropout* const drop = p.dropout;
  const Narrow* const narrow =
      type == Type::kBFloat16 && from.column_stride == 1 ? kernels.narrow : nullptr;
  const int64_t pitch = up(C, kernels.columns);
  const int64_t ranks = up(r, narrow != nullptr ? narrow->columns : kernels.ranks);
  const bool direct =
      type == Type::kFloat && drop == nullptr && from.column_stride == 1 && pitch == C;
  const int64_t block = narrow != nullptr
                            ? kNarrowRows
                            : std::clamp<int64_t>(kCacheBytes / (4 * pitch) / 4 * 4, 4, kBlockRows);
  int64_t chunk = block;
  if (p.low != nullptr) {
    const int64_t most = std::clamp<int64_t>(kPartialBytes / (4 * ranks * pitch), 1, kMaxChunks);
    const int64_t half = std::clamp(M / 2, kChunkRows, kNarrowChunk);  // of few, for two threads
    const int64_t least = narrow != nullptr ? half : kChunkRows;
    chunk = up(std::max((M + most - 1) / most, least), block);
  }
  const int64_t chunks = (M + chunk - 1) / chunk;

  const bool wide_matrix = p.matrix != nullptr && narrow == nullptr;
  Buffer packed(wide_matrix ? ranks * pitch : 0);
  if (wide_matrix) pack(kernels, *p.matrix, r, type, packed.data, pitch);
  const bool tiles_matrix = p.matrix != nullptr && narrow != nullptr;
  BufferOf<BFloat16> tiles(tiles_matrix ? ranks * pitch : 0);
  if (tiles_matrix) {
    const Rows& m = *p.matrix;
    const int64_t terms = up(C, narrow->terms);
    lay_out({m.data, m.type, C, r, m.column_stride, m.row_stride}, narrow->columns,
            [&](const Factor& part, int64_t first) {
              narrow->lay_out_ranks(part, r, tiles.data + first * terms);
            });
  }
  Buffer partial(p.low != nullptr ? chunks * ranks * pitch : 0);
  const Rows& low_rows = p.low != nullptr ? *p.low : from;

  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Buffer wide(direct || narrow != nullptr ? 0 : block * pitch), s(block * ranks);
    Buffer u(block * ranks), turned(narrow != nullptr ? block * ranks : 0);
    std::fill(turned.data, turned.data + (narrow != nullptr ? block * ranks : 0), 0.f);
    BufferOf<BFloat16> dropped(narrow != nullptr && drop != nullptr ? block * pitch : 0);
    for (int64_t i = begin; i < end; ++i) {
      float* sum = partial.data + i * ranks * pitch;
      if (p.low != nullptr && narrow == nullptr) std::fill(sum, sum + ranks * pitch, 0.f);
      const int64_t last = std::min(M, (i + 1) * chunk);
      for (int64_t first = i * chunk; first < last; first += block) {
        const int64_t count = std::min(block, last - first);
        const float* z = wide.data;
        const BFloat16* half = dropped.data;
        int64_t stride = pitch;
        if (direct) {
          stride = from.row_stride;
          z = static_cast<const float*>(from.data) + first * stride;
        } else if (narrow == nullptr) {
          kernels.load(from, first, count, drop, wide.data, pitch);
        } else if (drop == nullptr) {
          stride = from.row_stride;
          half = static_cast<const BFloat16*>(from.data) + first * stride;
        } else {
          narrow->drop(from, first, count, *drop, dropped.data, pitch);
        }
        if (p.matrix != nullptr) {
          if (narrow == nullptr)
            kernels.shrink(z, stride, count, packed.data, pitch, ranks, s.data);
          else
            narrow->shrink(half, stride, count, C, tiles.data, r, s.data);
          for (int64_t m = 0; m < count; ++m)
            write_any(s.data + m * ranks, r, p.scale, p.shrunk.data, type,
                      (first + m) * p.shrunk.row_stride, p.shrunk.column_stride);
        }
        if (p.low != nullptr) {
          kernels.load(low_rows, first, count, nullptr, u.data, up(r, kernels.ranks));
          if (narrow == nullptr) {
            kernels.outer(z, stride, count, u.data, pitch, ranks, sum);
          } else {
            for (int64_t j = 0; j < r; ++j)
              for (int64_t m = 0; m < count; ++m)
                turned.data[j * block + m] = u.data[m * up(r, kernels.ranks) + j];
            Combination c = {};
            c.x = turned.data;
            c.narrow = true;
            c.x_row = block;
            c.x_term = 1;
            c.count = up(r, narrow->ranks);
            c.terms = count;
            c.matrix = half;
            c.matrix_type = type;
            c.matrix_pitch = stride;
            c.rounded = type;
            c.scale = 1.f;
            c.sum = sum;
            c.sum_pitch = pitch;
            c.accumulate = first > i * chunk;
            kernels.combine(c, 0, c.count, 0, C);
          }
        }
      }
    }
  });
  if (p.low == nullptr) return;

  constexpr int64_t kWidth = 64;
  torch::stable::parallel_for(0, (C + kWidth - 1) / kWidth, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t k = strip * kWidth, width = std::min(kWidth, C - k);
      for (int64_t j = 0; j < r; ++j) {
        float sum[kWidth] = {};
        for (int64_t i = 0; i < chunks; ++i) {
          const float* part = partial.data + (i * ranks + j) * pitch + k;
          for (int64_t c = 0; c < width; ++c) sum[c] += part[c];
        }
        write_any(sum, width, p.gradient_scale, p.gradient.data, p.gradient.type,
                  j * p.gradient.row_stride + k * p.gradient.column_stride,
                  p.gradient.column_stride);
      }
    }
  });
}

void expand(const Kernels& kernels, const Expanding& p) {
  const Type type = p.out.type;
  const int64_t M = p.count, C = p.matrix.columns, r = p.ranks;
  const int64_t pitch = up(C, kernels.columns), ranks = up(r, kernels.ranks);
  if (kernels.narrow != nullptr && type == Type::kBFloat16 && p.low.column_stride == 1) {
    const Narrow& narrow = *kernels.narrow;
    const Rows& m = p.matrix;
    const int64_t step = pitch * narrow.terms;
    BufferOf<BFloat16> tiles(up(r, narrow.terms) / narrow.terms * step);
    lay_out({m.data, m.type, r, C, m.row_stride, m.column_stride}, narrow.columns,
            [&](const Factor& part, int64_t first) {
              narrow.lay_out(part, tiles.data + first * narrow.terms, narrow.columns * narrow.terms,
                             step);
            });
    const Expansion expansion = {static_cast<const BFloat16*>(p.low.data),
                                 p.low.row_stride,
                                 r,
                                 tiles.data,
                                 step,
                                 p.scale,
                                 p.bias,
                                 p.dropout,
                                 p.accumulate,
                                 static_cast<BFloat16*>(p.out.data),
                                 p.out.row_stride,
                                 C};
    constexpr int64_t kRows = 16;
    torch::stable::parallel_for(
        0, (M + kRows - 1) / kRows, kExpandedRows / kRows, [&](int64_t begin, int64_t end) {
          kernels.narrow->expand(expansion, begin * kRows, std::min(M, end * kRows));
        });
    return;
  }
  Buffer packed(ranks * pitch);
  pack_tiles(kernels, p.matrix, r, type, packed.data, pitch);
  constexpr int64_t kBlock = kExpandRows;
  torch::stable::parallel_for(0, (M + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    Buffer u(kBlock * ranks);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kBlock, count = std::min(kBlock, M - first);
      kernels.load(p.low, first, count, nullptr, u.data, ranks);
      for (int64_t e = 0; e < count * ranks; ++e) u.data[e] *= p.scale;
      kernels.expand(u.data, first, count, ranks, packed.data, p.bias, p.dropout, p.accumulate,
                     p.out.data, type, C, p.out.row_stride);
    }
  });
}

namespace {

// --------------------------------------------------------------------------------------------- ops

int64_t cpu_isa() { return best_isa(); }

// Whether AMD made the processor, whose products of fp32 by torch are slower than others'.
bool cpu_is_amd() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  constexpr unsigned kAuth = 0x68747541, kEnti = 0x69746e65, kCamd = 0x444d4163;
  return __get_cpuid(0, &a, &b, &c, &d) != 0 && b == kAuth && d == kEnti && c == kCamd;
#else
  return false;
#endif
}

// From one read of rows [M,C]: shrunk [M,r] = scale * drop(rows) matrix^T and
// gradient [r,C] = gradient_scale * low^T drop(rows), each where its operand and output are given.
void shrink_cpu(const Tensor rows, const std::optional<Tensor> matrix,
                const std::optional<Tensor> low, double scale, double gradient_scale,
                int64_t threshold, const std::optional<Tensor> seed, int64_t isa,
                std::optional<Tensor> shrunk, std::optional<Tensor> gradient) {
  const Kernels& kernels = kernels_of(isa);
  check_matrix(rows, "rows");
  const Type type = type_of(rows, "rows");
  const int64_t M = rows.size(0), C = rows.size(1);
  STD_TORCH_CHECK(matrix.has_value() == shrunk.has_value(), "matrix and shrunk go together");
  STD_TORCH_CHECK(low.has_value() == gradient.has_value(), "low and gradient go together");
  STD_TORCH_CHECK(matrix.has_value() || low.has_value(), "matrix or low: one must be given");
  if (matrix.has_value()) check_matrix(*matrix, "matrix");
  if (low.has_value()) check_matrix(*low, "low");
  const int64_t r = matrix.has_value() ? matrix->size(0) : low->size(1);
  STD_TORCH_CHECK(r >= 1 && C >= 1, "rank and columns: must be at least 1, got ", r, ", ", C);
  if (matrix.has_value()) {
    check_size(*matrix, "matrix", r, C);
    check_type(*matrix, "matrix", type, true);
    check_size(*shrunk, "shrunk", M, r);
    check_type(*shrunk, "shrunk", type, false);
    check_writable(*shrunk, "shrunk");
  }
  if (low.has_value()) {
    check_size(*low, "low", M, r);
    check_type(*low, "low", type, false);
    check_size(*gradient, "gradient", r, C);
    check_type(*gradient, "gradient", type, true);
    check_writable(*gradient, "gradient");
  }
  const std::optional<Dropout> dropout = dropout_of(threshold, seed, M);
  const Dropout* drop = dropout.has_value() ? &*dropout : nullptr;

  const Tensor read = aligned(rows);
  const std::optional<Tensor> read_matrix = aligned(matrix), read_low = aligned(low);
  const Rows m = matrix.has_value() ? view(*read_matrix, "matrix") : Rows{};
  const Rows l = low.has_value() ? view(*read_low, "low") : Rows{};
  Shrinking p = {view(read, "rows"), M, r};
  p.matrix = matrix.has_value() ? &m : nullptr;
  p.low = low.has_value() ? &l : nullptr;
  p.scale = static_cast<float>(scale);
  p.gradient_scale = static_cast<float>(gradient_scale);
  p.dropout = drop;
  if (matrix.has_value()) p.shrunk = result(*shrunk, "shrunk");
  if (low.has_value()) p.gradient = result(*gradient, "gradient");
  shrink(kernels, p);
}

// out [M,C] = scale * drop'(low [M,r] matrix [r,C]) + bias + out where `accumulate`.
void expand_cpu(const Tensor low, const Tensor matrix, const std::optional<Tensor> bias,
                double scale, int64_t threshold, const std::optional<Tensor> seed, bool accumulate,
                int64_t isa, Tensor out) {
  const Kernels& kernels = kernels_of(isa);
  check_matrix(low, "low");
  const int64_t M = low.size(0), r = low.size(1);
  check_matrix(matrix, "matrix");
  const int64_t C = matrix.size(1);
  STD_TORCH_CHECK(r >= 1 && C >= 1, "rank and columns: must be at least 1, got ", r, ", ", C);
  check_size(matrix, "matrix", r, C);
  check_size(out, "out", M, C);
  const Type type = type_of(out, "out");
  check_type(low, "low", type, false);
  check_type(matrix, "matrix", type, true);
  check_writable(out, "out");
  check_columns(out, "out");
  if (bias.has_value()) {
    check_tensor(*bias, "bias", 1);
    STD_TORCH_CHECK(bias->size(0) == C, "bias: must have ", C, " elements, got ", bias->size(0));
    check_type(*bias, "bias", type, true);
  }
  const std::optional<Dropout> dropout = dropout_of(threshold, seed, M);

  const Tensor read_low = aligned(low), read_matrix = aligned(matrix);
  const std::optional<Tensor> read_bias = aligned(bias);
  const int64_t pitch = up(C, kernels.columns);
  Buffer offset(bias.has_value() ? pitch : 0);
  if (bias.has_value())
    kernels.load({read_bias->const_data_ptr(), type_of(*bias, "bias"), C, 0, read_bias->stride(0)},
                 0, 1, nullptr, offset.data, pitch);
  Expanding p = {view(read_low, "low"), view(read_matrix, "matrix"), M, r};
  p.bias = bias.has_value() ? offset.data : nullptr;
  p.scale = static_cast<float>(scale);
  p.dropout = dropout.has_value() ? &*dropout : nullptr;
  p.accumulate = accumulate;
  p.out = result(out, "out");
  expand(kernels, p);
}

// out [M,C] = scale * drop(rows).
void drop_cpu(const Tensor rows, double scale, int64_t threshold, const std::optional<Tensor> seed,
              int64_t isa, Tensor out) {
  const Kernels& kernels = kernels_of(isa);
  check_matrix(rows, "rows");
  const Type type = type_of(rows, "rows");
  const int64_t M = rows.size(0), C = rows.size(1);
  check_size(out, "out", M, C);
  check_type(out, "out", type, false);
  check_writable(out, "out");
  const std::optional<Dropout> dropout = dropout_of(threshold, seed, M);
  const Dropout* const drop = dropout.has_value() ? &*dropout : nullptr;
  const Tensor read = aligned(rows);
  const Rows from = view(read, "rows");
  const auto to = result(out, "out");
  const int64_t pitch = up(C, kernels.columns);
  torch::stable::parallel_for(0, M, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, pitch)),
                              [&](int64_t begin, int64_t end) {
                                Buffer row(pitch);
                                for (int64_t m = begin; m < end; ++m) {
                                  kernels.load(from, m, 1, drop, row.data, pitch);
                                  write_any(row.data, C, static_cast<float>(scale), to.data, type,
                                            m * to.row_stride, to.column_stride);
                                }
                              });
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&lora::cpu_isa));
  m.impl("_cpu_is_amd", TORCH_BOX(&lora::cpu_is_amd));
  m.impl("_shrink_cpu", TORCH_BOX(&lora::shrink_cpu));
  m.impl("_expand_cpu", TORCH_BOX(&lora::expand_cpu));
  m.impl("_drop_cpu", TORCH_BOX(&lora::drop_cpu));
}
