// The private CPU ops of a whole layer for few rows, forward and backward: checks, shapes and all
// results in one call, so that a small layer costs one trip through the dispatcher.
#include "few_rows.h"

namespace lora {
namespace {

// Rows in the order in which codes of 4 bits are multiplied, where that is needed.
struct Spread {
  Spread(const Kernels& kernels, const Matrix& from, bool needed)
      : memory(needed ? from.rows * bytes(from) / 4 + 1 : 0), matrix(from) {
    if (!needed) return;
    const int64_t row = bytes(from), size = row / from.columns;
    for (int64_t m = 0; m < from.rows; ++m)
      std::memcpy(reinterpret_cast<char*>(memory.data) + m * row,
                  static_cast<const char*>(from.data) + m * from.pitch * size, row);
    matrix.data = memory.data;
    matrix.pitch = from.columns;
    (from.type == Type::kFloat ? kernels.spread : kernels.spread_bf16)(memory.data, from.rows,
                                                                       from.columns, from.columns);
  }
  static int64_t bytes(const Matrix& m) { return m.columns * size_of(m.type); }
  Scratch<4096> memory;
  Matrix matrix;
};

// sum [rows, columns] += what is there.
void add_rows(const Kernels& kernels, const Output& there, int64_t rows, int64_t columns,
              float* sum, int64_t pitch) {
  const Rows from = {there.data, there.type, columns, there.pitch, 1};
  const int64_t grain = std::max<int64_t>(1, kGrain / pitch);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Buffer row(pitch);
    for (int64_t m = begin; m < end; ++m) {
      kernels.load(from, m, 1, nullptr, row.data, up(columns, kernels.columns));
      for (int64_t k = 0; k < columns; ++k) sum[m * pitch + k] += row.data[k];
    }
  });
}

}  // namespace

void sums_of(const Kernels& kernels, const Matrix& rows, const Tensor& weight, float* sum,
             int64_t pitch) {
  const Type type = rows.type;
  const int64_t N = weight.size(0);
  const Weight W = read_weight(weight, N, rows.columns, type);
  const bool narrow = kernels.takes_bf16 && type == Type::kBFloat16;
  const bool wide = type != Type::kFloat && (!narrow || W.transposed || W.held.type != type);
  const Widened x(kernels, rows, nullptr, wide);
  if (!W.transposed)
    return multiply(kernels, product_of(x.matrix, W.held, type, {sum, Type::kFloat, pitch}), N);
  Combination c = combination_of(rows_of(x.matrix, true), W.held, type, 1.f);
  c.sum = sum;
  c.sum_pitch = pitch;
  combine(kernels, c, N);
}

namespace {

std::optional<Dropout> rows_from(std::optional<Dropout> all, int64_t first) {
  if (all.has_value()) all->row += static_cast<uint32_t>(first);
  return all;
}

// Of a call's branch; its factors are those of s B^T and of what is kept of s.
struct Branch {
  const Matrix *A, *B;  // A null without one
  float scale, saved_scale;
};

struct Outputs {
  Output y, s;  // the latter without memory where it is not asked for
};

// Some rows of a layer, as `layer` gives them.
void layer_of_rows(const Kernels& kernels, const Matrix& rows, const Weight& W, const Branch& of,
                   const Dropout* drop, const void* bias, const Outputs& outputs) {
  const Type type = rows.type;
  const int64_t M = rows.rows, N = W.transposed ? W.held.columns : W.held.rows;
  const bool branch = of.A != nullptr;
  const Output &out = outputs.y, &saved = outputs.s;
  const int64_t r = branch ? of.A->rows : 0;
  // bf16 is multiplied as it is, where there are instructions for it and both sides are in bf16.
  const bool narrow = kernels.takes_bf16 && type == Type::kBFloat16, half = type != Type::kFloat;
  const bool packs = W.coded == nullptr && is_packed(kernels, type, M, N);
  const bool wide_x = half && !packs && (!narrow || W.transposed || W.held.type != type);
  const bool spread = W.coded != nullptr && W.coded->four;
  const bool wide_a = branch && half && !packs && (!narrow || of.A->type != type);
  const LaidOut laid(kernels, view_of(rows), packs ? M : 0);
  const Widened plain(kernels, rows, nullptr, wide_x || (wide_a && drop == nullptr));
  const Spread arranged(kernels, wide_x ? plain.matrix : rows, spread);
  const int64_t ranks = up(r, kernels.width);
  Scratch<1024> low(M * ranks);
  if (branch) {
    const Widened dropped(kernels, rows, drop, drop != nullptr);
    const Matrix& seen = drop != nullptr ? dropped.matrix : wide_a ? plain.matrix : rows;
    std::fill(low.data, low.data + M * ranks, 0.f);
    Product p = product_of(seen, *of.A, type, {low.data, Type::kFloat, ranks});
    p.scale = of.scale;
    multiply(kernels, p, r, packs && drop == nullptr ? &laid.arranged : nullptr);
    for (int64_t m = 0; saved.data != nullptr && m < M; ++m)
      write_any(low.data + m * ranks, r, of.saved_scale, saved.data, type, m * saved.pitch, 1);
  }
  const Matrix low_rows = {low.data, Type::kFloat, M, r, ranks};
  // A part of what is packed; but columns are added to a sum that begins with branch and bias.
  const bool part = branch && packs && (!W.transposed || bias == nullptr);
  const WithLow all(kernels, laid, part ? low_rows : Matrix{}, *of.B, true);
  const Arranged* const x = packs ? &all.arranged : nullptr;
  if (!W.transposed) {
    Product p = product_of(arranged.matrix, W.held, type, out);
    p.coded = W.coded;
    if (branch && !packs) add_low(p, low_rows, *of.B);
    p.bias = bias;
    return multiply(kernels, p, N, x);
  }
  const int64_t pitch = apart(N, kernels);
  const bool before = bias != nullptr || (branch && !part);
  Scratch<4096> sum(before || !packs ? M * pitch : 0);
  if (before) {
    Scratch<2048> wide_bias(bias != nullptr ? pitch : 0);
    if (bias != nullptr) kernels.load({bias, type, N, 0, 1}, 0, 1, nullptr, wide_bias.data, pitch);
    Product p = product_of(low_rows, *of.B, type, {sum.data, Type::kFloat, pitch});
    p.bias = bias != nullptr ? wide_bias.data : nullptr;
    multiply(kernels, p, N);
  }
  Combination c = combination_of(rows_of(wide_x ? plain.matrix : rows, true), W.held, type, 1.f);
  c.sum = sum.data;
  c.sum_pitch = pitch;
  c.accumulate = before;
  put_into(c, out);
  combine(kernels, c, N, x);
}

}  // namespace

Tensor layer(const Kernels& kernels, const Call& call, const Matrix& rows, const Weight& W) {
  const auto& [x, lora_a, lora_b, bias, scale, high, threshold, seed, s, into] = call;
  const Type type = rows.type;
  const int64_t M = rows.rows, K = rows.columns, N = W.transposed ? W.held.columns : W.held.rows;
  STD_TORCH_CHECK(lora_a.has_value() == lora_b.has_value(), "lora_a and lora_b go together");
  const bool branch = lora_a.has_value();
  STD_TORCH_CHECK(branch || (!s.has_value() && !seed.has_value()), "s and seed: are of a branch");
  int64_t r = 0;
  Matrix A = {}, B = {};
  if (branch) {
    check_tensor(*lora_a, "lora_a", 2);
    r = lora_a->size(0);
    STD_TORCH_CHECK(r >= 1, "lora_a: must have rows");
    A = read(*lora_a, "lora_a", r, K, type, true);
    B = read(*lora_b, "lora_b", N, r, type, true);
  }
  const void* const offset = read_bias(bias, N, type);
  const Output saved = s.has_value() ? written(*s, "s", M, r, type) : Output{};
  const std::optional<Dropout> dropout = dropout_of(threshold, seed, M);

  Tensor y = into.has_value() ? empty_matrix(x, 0, 0, false) : empty_rows(x, "x", N);
  const Output out = into.has_value() ? written(*into, "into", M, N, type, true)
                                      : Output{y.mutable_data_ptr(), type, N};
  STD_TORCH_CHECK(out.type == type || offset == nullptr,
                  "into: must have the dtype of x where there is a bias");
  if (M == 0) return y;
  const Branch of = {branch ? &A : nullptr, &B, static_cast<float>(scale * high),
                     static_cast<float>(1 / high)};
  const bool narrow = kernels.takes_bf16 && type == Type::kBFloat16;
  const int64_t step = narrow ? M : rows_at_once(kernels, M, K, W.transposed);
  for (int64_t first = 0; first < M; first += step) {
    const std::optional<Dropout> here = rows_from(dropout, first);
    layer_of_rows(kernels, rows_from(rows, first, step), W, of, here.has_value() ? &*here : nullptr,
                  offset, {rows_from(out, first), rows_from(saved, first)});
  }
  return y;
}

namespace {

Tensor linear_cpu(const Tensor x, const Tensor weight, const std::optional<Tensor> lora_a,
                  const std::optional<Tensor> lora_b, const std::optional<Tensor> bias,
                  double scale, double high, int64_t threshold, const std::optional<Tensor> seed,
                  int64_t isa, std::optional<Tensor> s, std::optional<Tensor> into) {
  const Kernels& kernels = kernels_of(isa);
  const Matrix rows = read_rows(x, "x");
  check_tensor(weight, "weight", 2);
  const int64_t N = weight.size(0);
  STD_TORCH_CHECK(N >= 1, "weight: must have rows");
  const Weight W = read_weight(weight, N, rows.columns, rows.type);
  return layer(kernels, {x, lora_a, lora_b, bias, scale, high, threshold, seed, s, into}, rows, W);
}

// (dx [..., K], dA, dB) of dy [..., N], each of size 0 where it is not asked for. With
// ds = scaling * dy B: dx = dy W + drop'(ds A), dA = ds^T drop(x), dB = high * dy^T s; keep is the
// factor of what dropout keeps. Where `into` [M,K] is given, in the dtype of dy or fp32, dx is put
// there, or where `adds` added to what is there, and not returned.
std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(
    const Tensor dy, const std::optional<Tensor> x, const Tensor weight, const Tensor lora_a,
    const Tensor lora_b, const std::optional<Tensor> s, double scaling, double high, double keep,
    int64_t threshold, const std::optional<Tensor> seed, int64_t isa, bool need_x, bool need_a,
    bool need_b, std::optional<Tensor> into, bool adds) {
  const Kernels& kernels = kernels_of(isa);
  const Matrix DY = read_rows(dy, "dy");
  const int64_t M = DY.rows, N = DY.columns;
  const Type type = DY.type;
  check_tensor(lora_a, "lora_a", 2);
  const int64_t r = lora_a.size(0), K = lora_a.size(1);
  STD_TORCH_CHECK(M >= 1 && r >= 1 && K >= 1, "dy, lora_a: must have rows and columns, got [", M,
                  ", ", N, "], [", r, ", ", K, "]");
  STD_TORCH_CHECK(!need_a || x.has_value(), "x: must be given for dA");
  STD_TORCH_CHECK(!need_b || s.has_value(), "s: must be given for dB");
  const Weight W = read_weight(weight, N, K, type);
  const Matrix A = read(lora_a, "lora_a", r, K, type, true);
  const Matrix B = read(lora_b, "lora_b", N, r, type, true);
  const Matrix X = need_a ? read_rows(*x, "x") : Matrix{};
  STD_TORCH_CHECK(!need_a || (X.rows == M && X.columns == K && X.type == type), "x: must be [", M,
                  ", ", K, "] in the dtype of dy");
  const Matrix S = need_b ? read(*s, "s", M, r, type, false) : Matrix{};
  const std::optional<Dropout> dropout = dropout_of(threshold, seed, M);

  std::tuple<Tensor, Tensor, Tensor> results = {
      need_x && !into.has_value() ? empty_rows(dy, "dy", K) : empty_matrix(dy, 0, 0, false),
      empty_matrix(lora_a, r, K, need_a), empty_matrix(lora_b, N, r, need_b)};
  const Output DX = into.has_value() ? written(*into, "into", M, K, type, true)
                                     : Output{std::get<0>(results).mutable_data_ptr(), type, K};
  const Output DA = {std::get<1>(results).mutable_data_ptr(), A.type, K};
  const Output DB = {std::get<2>(results).mutable_data_ptr(), B.type, r};
  const bool low = need_x || need_a;
  const int64_t ranks = up(r, kernels.columns), pitch = apart(K, kernels);
  const int64_t step = rows_at_once(kernels, M, K, true);
  // Memory for the sums of as many terms as there are rows: none where they end in registers.
  const bool keeps_sums = M > kernels.terms;
  // Of what is packed dB is formed by rows of s, which leaves dy where it lies.
  const bool turned = is_packed(kernels, type, M, K);
  const int64_t pitch_b = turned ? apart(N, kernels) : ranks;
  Scratch<2048> sum_b(!need_b ? 0 : turned ? r * pitch_b : keeps_sums ? N * ranks : 0);
  Scratch<2048> sum_a(need_a && keeps_sums ? r * pitch : 0);
  // Adds the rows' part to a gradient, which the last ones give.
  const auto add = [&](Combination c, float* sum, int64_t sum_pitch, const Output* out,
                       int64_t first, int64_t columns) {
    c.sum = sum;
    c.sum_pitch = sum_pitch;
    c.accumulate = first > 0;
    if (first + step >= M && out != nullptr) put_into(c, *out);
    combine(kernels, c, columns);
  };
  for (int64_t first = 0; first < M; first += step) {
    const Matrix dys = rows_from(DY, first, step);
    const int64_t count = dys.rows;
    const std::optional<Dropout> here = rows_from(dropout, first);
    const Dropout* const drop = here.has_value() ? &*here : nullptr;
    const bool packs = turned && is_packed(kernels, type, count, K);
    const Widened wide(kernels, dys, nullptr, !packs && (type != Type::kFloat || count > 4));
    const LaidOut laid(kernels, view_of(dys), packs ? count : 0);
    const Arranged* const left = packs ? &laid.arranged : nullptr;
    Scratch<1024> ds(low ? count * ranks : 0);
    const Matrix DS = {ds.data, Type::kFloat, count, r, ranks};
    if (low) {
      Combination c =
          combination_of(rows_of(wide.matrix, true), B, type, static_cast<float>(scaling * keep));
      c.sum = ds.data;
      c.sum_pitch = ranks;
      combine(kernels, c, r, left);
    }
    if (need_b) {
      const Matrix own = rows_from(S, first, step);
      const Widened low(kernels, own, nullptr, turned && type != Type::kFloat);
      const Factors x = columns_of(turned ? low.matrix : wide.matrix);
      const Combination c = combination_of(x, turned ? dys : own, type, static_cast<float>(high));
      if (turned)
        add(c, sum_b.data, pitch_b, nullptr, first, N);
      else
        add(c, keeps_sums ? sum_b.data : nullptr, pitch_b, &DB, first, r);
    }
    if (need_a) {
      const Widened dropped(kernels, rows_from(X, first, step), drop, drop != nullptr);
      add(combination_of(columns_of(DS), dropped.matrix, Type::kFloat, 1.f),
          keeps_sums ? sum_a.data : nullptr, pitch, &DA, first, K);
    }
    if (!need_x) continue;
    const Output out = rows_from(DX, first);
    const bool onto = into.has_value() && adds, before = drop != nullptr || onto || !packs;
    Scratch<4096> sum(before ? count * pitch : 0);
    const WithLow all(kernels, laid, before ? Matrix{} : DS, A, false);
    const Arranged* const all_left = packs ? &all.arranged : nullptr;
    if (before) {
      Combination term = combination_of(rows_of(DS, false), A, type, 1.f);
      term.sum = sum.data;
      term.sum_pitch = pitch;
      combine(kernels, term, K);
    }
    if (drop != nullptr)
      kernels.load({sum.data, Type::kFloat, K, pitch, 1}, 0, count, drop, sum.data, pitch);
    if (onto) add_rows(kernels, out, count, K, sum.data, pitch);
    if (W.transposed) {
      const bool narrow =
          kernels.takes_bf16 && type == Type::kBFloat16 && W.held.type == Type::kBFloat16;
      Product p = product_of(narrow ? dys : wide.matrix, W.held, type, out);
      p.sum = before ? sum.data : nullptr;
      p.sum_pitch = pitch;
      multiply(kernels, p, K, all_left);
    } else {
      Combination c = combination_of(rows_of(wide.matrix, true), W.held, type, 1.f);
      c.sum = sum.data;
      c.sum_pitch = pitch;
      c.accumulate = before;
      put_into(c, out);
      combine(kernels, c, K, all_left);
    }
  }
  if (need_b && turned) put_columns(sum_b.data, pitch_b, r, N, DB);
  return results;
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_linear_cpu", TORCH_BOX(&lora::linear_cpu));
  m.impl("_linear_backward_cpu", TORCH_BOX(&lora::linear_backward_cpu));
}
