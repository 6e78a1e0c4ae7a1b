// The private CPU ops of many rows of many adapters on one weight, forward and backward, where
// products are packed: rows are laid out in the order of their groups, for all products with them,
// and the branch of a group is a part of the product of its rows. Without dropout. A row's bits
// follow from itself and its group's tensors alone.
#include <algorithm>
#include <cmath>

#include "grouped.h"

namespace lora {
namespace {

// Rows of a group that a thread takes at a time.
constexpr int64_t kPieceRows = 64;

struct Piece {
  int64_t group, first, last;
};

// What both ops have of their groups.
struct Many {
  const Kernels& kernels;
  const Groups& groups;
  std::vector<Matrix> a, b;
  int64_t pitch;  // of the low-rank results of all rows

  int64_t count() const { return static_cast<int64_t>(a.size()); }
  int64_t served() const { return groups.bounds.back(); }
  const int64_t* places(int64_t first) const {
    return groups.order != nullptr ? groups.order + first : nullptr;
  }
  // A matrix, or a result, from row `first` of the order on, as `places` count its rows.
  Matrix from(const Matrix& all, int64_t first) const {
    return groups.order != nullptr ? all : rows_from(all, first, all.rows);
  }
  Output from(const Output& all, int64_t first) const {
    return groups.order != nullptr ? all : rows_from(all, first);
  }
};

// Of a pair that has been checked.
Matrix matrix_of(const Tensor& t, const char* name) {
  check_columns(t, name);
  return {t.const_data_ptr(), type_of(t, name), t.size(0), t.size(1), t.stride(0)};
}

Many many_of(const Kernels& kernels, const Groups& groups, const std::vector<Tensor>& lora_a,
             const std::vector<Tensor>& lora_b) {
  Many many = {kernels, groups, {}, {}, 0};
  for (size_t g = 0; g < lora_a.size(); ++g) {
    many.a.push_back(matrix_of(lora_a[g], "lora_a"));
    many.b.push_back(matrix_of(lora_b[g], "lora_b"));
    many.pitch = std::max(many.pitch, up(many.a[g].rows, kernels.width));
  }
  return many;
}

void check_packed(const Kernels& kernels, Type type, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(is_packed(kernels, type, rows, columns), "rows: products of [", rows, ", ",
                  columns, "] are not packed");
}

// Calls of(piece) for the rows first .. last of the order that have groups.
template <class Of>
void for_pieces(const Many& many, int64_t first, int64_t last, int64_t columns, const Of& of) {
  std::vector<Piece> pieces;
  for (int64_t g = 0; g < many.count(); ++g) {
    const int64_t end = std::min(last, many.groups.bounds[g + 1]);
    for (int64_t m = std::max(first, many.groups.begin(g)); m < end; m += kPieceRows)
      pieces.push_back({g, m, std::min(end, m + kPieceRows)});
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  const int64_t work = (last - first) * columns * many.pitch / std::max<int64_t>(1, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / (work + 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) of(pieces[i]);
                              });
}

// The branches of rows that are laid out, from `first` of the order on, as parts of their product:
// low [count, pitch] times b of each group.
struct Parts {
  Parts(const Many& many, const LaidOut& x, int64_t first, const float* low,
        const std::vector<Matrix>& b, bool by_rows)
      : arranged(x.arranged),
        memory((arranged.count + many.kernels.packed->rows * many.count()) * many.pitch) {
    const Packed& packed = *many.kernels.packed;
    float* to = memory.data;
    for (int64_t g = 0; g < many.count(); ++g) {
      const int64_t begin = std::max(first, many.groups.begin(g)), r = many.a[g].rows;
      const int64_t count = std::min(first + arranged.count, many.groups.bounds[g + 1]) - begin;
      if (count <= 0) continue;
      const int64_t tiles = (count + packed.rows - 1) / packed.rows;
      packed.lay_out({low + (begin - first) * many.pitch, Type::kFloat, r, many.pitch, 1}, nullptr,
                     count, 0, tiles, to);
      parts.push_back({begin - first, count, to, r, b[g].data, b[g].type, b[g].pitch, by_rows});
      to += tiles * packed.rows * r;
    }
    arranged.parts = parts.data();
    arranged.part_count = static_cast<int64_t>(parts.size());
  }
  Arranged arranged;
  Buffer memory;
  std::vector<Part> parts;
};

// A pass of rows x through the weight and the branches, each `first` and then `second`. Rows of
// these matrices are columns of what they give, or where not `by_rows` their columns.
struct Pass {
  const Matrix& x;
  const std::vector<Matrix>&first, &second;
  std::vector<float> scale;
  bool by_rows;
  Output out;  // [M, columns]; without memory where the first results alone are asked for
  int64_t columns;
  const void* bias;
};

// low [served, pitch] = scale_g * x first_g and out = x W + low second_g + bias, of rows past the
// last segment zero.
void compute(const Many& many, const Weight& W, const Pass& pass, float* low) {
  const Kernels& kernels = many.kernels;
  const Packed& packed = *kernels.packed;
  const Type type = many.groups.type;
  const int64_t terms = pass.x.columns, served = many.served();
  const int64_t step = rows_at_once(kernels, served, terms, true);
  for (int64_t first = 0; first < served; first += step) {
    const int64_t count = std::min(step, served - first);
    const auto product = [&](const Matrix& m, float scale, const Output& to) {
      Product p = product_of({nullptr, Type::kFloat, count, terms, terms}, m, type, to);
      p.scale = scale;
      return p;
    };
    const auto combination = [&](const Matrix& m, float scale, const Output& to) {
      Combination c = combination_of({nullptr, 0, 0, count, terms, false}, m, type, scale);
      put_into(c, to);
      return c;
    };
    const LaidOut laid(kernels, view_of(many.from(pass.x, first)), count, many.places(first));
    Arranged plain = laid.arranged;
    plain.places = nullptr;
    const Output lows = {low + first * many.pitch, Type::kFloat, many.pitch};
    for_pieces(many, first, first + count, terms, [&](const Piece& piece) {
      const int64_t g = piece.group;
      const Range range = {piece.first - first, piece.last - first, 0, many.a[g].rows};
      if (pass.by_rows)
        packed.multiply(product(pass.first[g], pass.scale[g], lows), plain, range);
      else
        packed.combine(combination(pass.first[g], pass.scale[g], lows), plain, range);
    });
    if (pass.out.data == nullptr) continue;
    const Parts parts(many, laid, first, low + first * many.pitch, pass.second, pass.by_rows);
    const Output to = many.from(pass.out, first);
    if (pass.by_rows != W.transposed) {
      Product p = product(W.held, 1.f, to);
      p.bias = pass.bias;
      multiply(kernels, p, pass.columns, &parts.arranged);
    } else {
      combine(kernels, combination(W.held, 1.f, to), pass.columns, &parts.arranged);
    }
  }
  const Output& out = pass.out;
  const int64_t size = size_of(out.type);
  for (int64_t m = served; out.data != nullptr && m < pass.x.rows; ++m)
    std::memset(static_cast<char*>(out.data) + m * out.pitch * size, 0, pass.columns * size);
}

// y [..., N] = x W^T + bias + scale_g * high_g * (x A_g^T) B_g^T, of rows past the last segment
// zero; fills s [M,r], where it is given, with scale_g * x A_g^T in the order of the groups.
Tensor linear_packed_cpu(const Tensor x, const Tensor weight, const std::vector<Tensor> lora_a,
                         const std::vector<Tensor> lora_b, const std::optional<Tensor> order,
                         const std::vector<int64_t> bounds, const std::optional<Tensor> bias,
                         const std::vector<double> scale, const std::vector<double> high,
                         int64_t isa, std::optional<Tensor> s) {
  const Kernels& kernels = kernels_of(isa);
  const Matrix rows = read_rows(x, "x");
  const Type type = rows.type;
  const int64_t M = rows.rows, K = rows.columns;
  check_tensor(weight, "weight", 2);
  const int64_t N = weight.size(0);
  check_packed(kernels, type, M, N);
  const Weight W = read_weight(weight, N, K, type);
  STD_TORCH_CHECK(!W.transposed || !bias.has_value(),
                  "weight: its rows must be contiguous where there is a bias");
  check_pairs(lora_a, lora_b, K, N, type);
  const Groups groups =
      groups_of(kernels, type, M, bounds, M, order, lora_a.size(), 1., 0, std::nullopt);
  const Many many = many_of(kernels, groups, lora_a, lora_b);
  STD_TORCH_CHECK(scale.size() == lora_a.size() && high.size() == lora_a.size(),
                  "scale, high: must be one of each group");
  for (size_t g = 0; g < scale.size(); ++g)
    STD_TORCH_CHECK(std::isfinite(scale[g] * high[g]), "scale, high: must be finite");
  const void* const offset = read_bias(bias, N, type);
  Output saved = {};
  if (s.has_value()) {
    saved = written(*s, "s", M, s->size(1), type);
    for (const Matrix& a : many.a)
      STD_TORCH_CHECK(a.rows <= s->size(1), "s: must have the columns of every rank");
  }
  Tensor y = empty_rows(x, "x", N);
  std::vector<float> factors;
  for (size_t g = 0; g < scale.size(); ++g)
    factors.push_back(static_cast<float>(scale[g] * high[g]));
  Buffer low(many.served() * many.pitch);
  compute(many, W,
          {rows, many.a, many.b, factors, true, {y.mutable_data_ptr(), type, N}, N, offset},
          low.data);
  if (saved.data == nullptr) return y;
  for_pieces(many, 0, many.served(), 1, [&](const Piece& piece) {
    for (int64_t m = piece.first; m < piece.last; ++m)
      write_any(low.data + m * many.pitch, many.a[piece.group].rows,
                static_cast<float>(1 / high[piece.group]), saved.data, type, m * saved.pitch, 1);
  });
  return y;
}

// (dx [..., K], dA and dB of each group), each of size 0 where it is not asked for. With
// ds_g = scaling_g * dy B_g: dx = dy W + ds_g A_g, dA_g = ds_g^T x, dB_g = high_g * dy^T s; zero of
// rows past the last segment and of groups without rows.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> linear_packed_backward_cpu(
    const Tensor dy, const std::optional<Tensor> x, const Tensor weight,
    const std::vector<Tensor> lora_a, const std::vector<Tensor> lora_b,
    const std::optional<Tensor> s, const std::optional<Tensor> order,
    const std::vector<int64_t> bounds, const std::vector<double> scaling,
    const std::vector<double> high, int64_t isa, bool need_x, const std::vector<bool> need_a,
    const std::vector<bool> need_b) {
  const Kernels& kernels = kernels_of(isa);
  const Matrix DY = read_rows(dy, "dy");
  const Type type = DY.type;
  const int64_t M = DY.rows, N = DY.columns;
  check_tensor(weight, "weight", 2);
  const int64_t K = weight.size(1);
  check_packed(kernels, type, M, K);
  const Weight W = read_weight(weight, N, K, type);
  check_pairs(lora_a, lora_b, K, N, type);
  const size_t G = lora_a.size();
  const Groups groups = groups_of(kernels, type, M, bounds, M, order, G, 1., 0, std::nullopt);
  const Many many = many_of(kernels, groups, lora_a, lora_b);
  STD_TORCH_CHECK(
      scaling.size() == G && high.size() == G && need_a.size() == G && need_b.size() == G,
      "scaling, high, need_a, need_b: must be one of each group");
  const bool any_a = std::find(need_a.begin(), need_a.end(), true) != need_a.end();
  const bool any_b = std::find(need_b.begin(), need_b.end(), true) != need_b.end();
  STD_TORCH_CHECK(!any_a || x.has_value(), "x: must be given for dA");
  STD_TORCH_CHECK(!any_b || s.has_value(), "s: must be given for dB");
  const Matrix X = any_a ? read_rows(*x, "x") : Matrix{};
  STD_TORCH_CHECK(!any_a || (X.rows == M && X.columns == K && X.type == type), "x: must be [", M,
                  ", ", K, "] in the dtype of dy");
  Matrix S = {};
  if (any_b) {
    check_tensor(*s, "s", 2);
    S = read(*s, "s", M, s->size(1), type, false);
  }
  std::vector<Tensor> d_a, d_b;
  for (size_t g = 0; g < G; ++g) {
    STD_TORCH_CHECK(!need_b[g] || many.a[g].rows <= S.columns,
                    "s: must have the columns of every rank");
    d_a.push_back(empty_matrix(lora_a[g], many.a[g].rows, K, need_a[g]));
    d_b.push_back(empty_matrix(lora_b[g], N, many.a[g].rows, need_b[g]));
  }
  Tensor dx = need_x ? empty_rows(dy, "dy", K) : empty_matrix(dy, 0, 0, false);
  const Output DX = {need_x ? dx.mutable_data_ptr() : nullptr, type, K};
  const bool lows = need_x || any_a;
  Buffer ds(lows ? many.served() * many.pitch : 0);
  if (lows)
    compute(many, W, {DY, many.b, many.a, {scaling.begin(), scaling.end()}, false, DX, K, nullptr},
            ds.data);

  for_each(groups, [&](int64_t g) {
    const int64_t count = groups.count(g), r = many.a[g].rows, first = groups.begin(g);
    const auto own_rows = [&](const Own& own) {
      return Matrix{own.rows.data, type, count, own.rows.columns, own.rows.row_stride};
    };
    // sum [r, columns] = low^T rows.
    const auto combined = [&](const Matrix& low, const Matrix& all, Type rounded, float scale,
                              const Buffer& sum, const Output& out) {
      const Own own(groups, g, view_of(all));
      Combination c = combination_of(columns_of(low), own_rows(own), rounded, scale);
      c.sum = sum.data;
      c.sum_pitch = apart(all.columns, kernels);
      put_into(c, out);
      combine(kernels, c, all.columns);
    };
    if (need_b[g]) {
      const Buffer sum(r * apart(N, kernels));
      Matrix own_s = rows_from(S, first, count);
      own_s.columns = r;
      const Widened low(kernels, own_s, nullptr, type != Type::kFloat);
      combined(low.matrix, DY, type, static_cast<float>(high[g]), sum, {});
      put_columns(sum.data, apart(N, kernels), r, N,
                  {d_b[g].mutable_data_ptr(), many.b[g].type, r});
    }
    if (need_a[g]) {
      const Buffer sum(r * apart(K, kernels));
      combined({ds.data + first * many.pitch, Type::kFloat, count, r, many.pitch}, X, Type::kFloat,
               1.f, sum, {d_a[g].mutable_data_ptr(), many.a[g].type, K});
    }
  });
  for (size_t g = 0; g < G; ++g) {
    if (groups.count(g) > 0) continue;
    for (Tensor* t : {&d_a[g], &d_b[g]})
      if (t->numel() > 0) std::memset(t->mutable_data_ptr(), 0, t->numel() * t->element_size());
  }
  return {dx, d_a, d_b};
}

// From how many rows on, and beyond how many columns, products are packed; 0 and 0 where they never
// are.
std::tuple<int64_t, int64_t> cpu_packed(int64_t isa) {
  const Packed* const packed = kernels_of(isa).packed;
  return packed == nullptr ? std::tuple<int64_t, int64_t>{0, 0}
                           : std::tuple<int64_t, int64_t>{packed->least_rows, packed->columns};
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_packed", TORCH_BOX(&lora::cpu_packed));
  m.impl("_linear_packed_cpu", TORCH_BOX(&lora::linear_packed_cpu));
  m.impl("_linear_packed_backward_cpu", TORCH_BOX(&lora::linear_packed_backward_cpu));
}
