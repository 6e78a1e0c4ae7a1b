// The private CPU ops of many branches, each of its own rows. Groups of more than `most_rows` are
// left out. Threads share out the groups, or the rows of one where it has most of them; a group's
// bits follow from its own rows alone.
#include "grouped.h"

#include <cmath>

namespace lora {

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns, Type type) {
  check_size(t, name, rows, columns);
  check_type(t, name, type, false);
  check_starts(t, name);
  check_columns(t, name);
}

Groups groups_of(const Kernels& kernels, Type type, int64_t rows, std::vector<int64_t> bounds,
                 int64_t most_rows, const std::optional<Tensor>& order, size_t count, double keep,
                 int64_t threshold, const std::optional<Tensor>& seeds) {
  STD_TORCH_CHECK(count >= 1 && bounds.size() == count + 2 && bounds[0] == 0, "bounds: must be ",
                  count + 2, " numbers from 0 on");
  for (size_t i = 0; i + 1 < bounds.size(); ++i)
    STD_TORCH_CHECK(bounds[i] <= bounds[i + 1], "bounds: must rise");
  STD_TORCH_CHECK(bounds.back() <= rows, "bounds: must end at most at ", rows);
  STD_TORCH_CHECK(0 <= threshold && threshold < 65536, "threshold: must be in [0, 65536), got ",
                  threshold);
  Groups groups = {
      kernels, type, std::move(bounds), most_rows, nullptr, keep, static_cast<uint32_t>(threshold),
      nullptr};
  const auto numbers = [](const Tensor& t, const char* name, int64_t size) {
    check_tensor(t, name, 1);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && is_aligned(t) &&
                        t.size(0) == size,
                    name, ": must be ", size, " contiguous int64");
    return static_cast<const int64_t*>(t.const_data_ptr());
  };
  if (order.has_value()) {
    groups.order = numbers(*order, "order", groups.bounds.back());
    for (int64_t i = 0; i < groups.bounds.back(); ++i)
      STD_TORCH_CHECK(0 <= groups.order[i] && groups.order[i] < rows, "order: must be rows, got ",
                      groups.order[i]);
  }
  if (seeds.has_value()) groups.seeds = numbers(*seeds, "seeds", static_cast<int64_t>(count));
  return groups;
}

void check_pairs(const std::vector<Tensor>& a, const std::vector<Tensor>& b, int64_t K, int64_t N,
                 Type type) {
  STD_TORCH_CHECK(a.size() == b.size(), "lora_a and lora_b: must be as many");
  for (size_t g = 0; g < a.size(); ++g) {
    check_matrix(a[g], "lora_a");
    const int64_t r = a[g].size(0);
    STD_TORCH_CHECK(r >= 1, "lora_a: must have rows");
    check_size(a[g], "lora_a", r, K);
    check_size(b[g], "lora_b", N, r);
    for (const Tensor& t : {a[g], b[g]}) {
      check_type(t, "lora_a, lora_b", type, true);
      STD_TORCH_CHECK(is_aligned(t), "lora_a, lora_b: must start at a multiple of their elements");
    }
  }
}

namespace {

Rows transposed(const Tensor& t, const char* name) {
  const Rows rows = view(t, name);
  return {rows.data, rows.type, t.size(0), rows.column_stride, rows.row_stride};
}

// y rows of group g += high_g * s_g B_g^T, with s_g = scale_g * drop(x) A_g^T, which fills s [M,r],
// where it is given, in the order of the groups.
void add_grouped_cpu(Tensor y, const Tensor x, const std::vector<Tensor> lora_a,
                     const std::vector<Tensor> lora_b, const std::optional<Tensor> order,
                     const std::vector<int64_t> bounds, int64_t most_rows,
                     const std::vector<double> scale, const std::vector<double> high,
                     int64_t threshold, const std::optional<Tensor> seeds, int64_t isa,
                     std::optional<Tensor> s) {
  const Kernels& kernels = kernels_of(isa);
  check_matrix(x, "x");
  const Type type = type_of(x, "x");
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1);
  check_rows(x, "x", M, K, type);
  check_rows(y, "y", M, N, type);
  check_writable(y, "y");
  STD_TORCH_CHECK(K >= 1 && N >= 1, "x, y: must have columns");
  check_pairs(lora_a, lora_b, K, N, type);
  const Groups groups =
      groups_of(kernels, type, M, bounds, most_rows, order, lora_a.size(), 1., threshold, seeds);
  STD_TORCH_CHECK(scale.size() == lora_a.size() && high.size() == lora_a.size(),
                  "scale, high: must be one of each group");
  if (s.has_value()) {
    check_rows(*s, "s", M, s->size(1), type);
    check_writable(*s, "s");
    for (const Tensor& a : lora_a)
      STD_TORCH_CHECK(a.size(0) <= s->size(1), "s: must have the columns of every rank");
  }
  for_each(groups, [&](int64_t g) {
    const int64_t count = groups.count(g), r = lora_a[g].size(0);
    const Own own(groups, g, view(x, "x")), out(groups, g, view(y, "y"));
    BufferOf<char> kept(s.has_value() ? 0 : count * r * size_of(type));
    const int64_t pitch = s.has_value() ? s->stride(0) : r;
    void* const low = s.has_value() ? static_cast<char*>(s->mutable_data_ptr()) +
                                          groups.begin(g) * pitch * size_of(type)
                                    : kept.data;
    const Rows a = view(lora_a[g], "lora_a");
    const std::optional<Dropout> dropout = groups.dropout(g);
    Shrinking first = {own.rows, count, r, &a};
    first.scale = static_cast<float>(scale[g]);
    first.dropout = dropout.has_value() ? &*dropout : nullptr;
    first.shrunk = {low, type, pitch, 1};
    shrink(kernels, first);
    Expanding second = {{low, type, r, pitch, 1}, transposed(lora_b[g], "lora_b"), count, r};
    second.scale = static_cast<float>(high[g]);
    second.accumulate = true;
    second.out = out.result();
    expand(kernels, second);
    out.put(groups, g, y);
  });
}

// Of each group, where it is asked for (of size 0 where not): dA = ds^T drop(x), dB = high dy^T s,
// with ds = scaling * dy B; dx += drop'(ds A), where it is given. keep is the factor of what
// dropout keeps.
void backward_grouped_cpu(std::optional<Tensor> dx, const Tensor dy, const std::optional<Tensor> x,
                          const std::vector<Tensor> lora_a, const std::vector<Tensor> lora_b,
                          const std::optional<Tensor> s, const std::optional<Tensor> order,
                          const std::vector<int64_t> bounds, int64_t most_rows,
                          const std::vector<double> scaling, const std::vector<double> high,
                          double keep, int64_t threshold, const std::optional<Tensor> seeds,
                          int64_t isa, std::vector<Tensor> d_a, std::vector<Tensor> d_b) {
  const Kernels& kernels = kernels_of(isa);
  check_matrix(dy, "dy");
  const Type type = type_of(dy, "dy");
  const int64_t M = dy.size(0), N = dy.size(1);
  check_rows(dy, "dy", M, N, type);
  STD_TORCH_CHECK(!lora_a.empty(), "lora_a: must be one of each group");
  check_matrix(lora_a[0], "lora_a");
  const int64_t K = lora_a[0].size(1);
  STD_TORCH_CHECK(K >= 1 && N >= 1, "dy, lora_a: must have columns");
  check_pairs(lora_a, lora_b, K, N, type);
  const Groups groups =
      groups_of(kernels, type, M, bounds, most_rows, order, lora_a.size(), keep, threshold, seeds);
  STD_TORCH_CHECK(scaling.size() == lora_a.size() && high.size() == lora_a.size() &&
                      d_a.size() == lora_a.size() && d_b.size() == lora_a.size(),
                  "scaling, high, d_a, d_b: must be one of each group");
  if (dx.has_value()) {
    check_rows(*dx, "dx", M, K, type);
    check_writable(*dx, "dx");
  }
  for (size_t g = 0; g < d_a.size(); ++g) {
    const int64_t r = lora_a[g].size(0);
    if (d_a[g].numel() > 0) {
      STD_TORCH_CHECK(x.has_value(), "x: must be given for dA");
      check_rows(*x, "x", M, K, type);
      check_size(d_a[g], "d_a", r, K);
      check_type(d_a[g], "d_a", type, true);
      check_writable(d_a[g], "d_a");
    }
    if (d_b[g].numel() > 0) {
      STD_TORCH_CHECK(s.has_value(), "s: must be given for dB");
      check_rows(*s, "s", M, s->size(1), type);
      STD_TORCH_CHECK(r <= s->size(1), "s: must have the columns of every rank");
      check_size(d_b[g], "d_b", N, r);
      check_type(d_b[g], "d_b", type, true);
      check_writable(d_b[g], "d_b");
    }
  }
  for_each(groups, [&](int64_t g) {
    const int64_t count = groups.count(g), r = lora_a[g].size(0);
    const bool need_a = d_a[g].numel() > 0, need_b = d_b[g].numel() > 0;
    if (!need_a && !need_b && !dx.has_value()) return;
    const bool low = need_a || dx.has_value();
    BufferOf<char> ds(low ? count * r * size_of(type) : 0);
    const Rows own_ds = {ds.data, type, r, r, 1}, b = transposed(lora_b[g], "lora_b");
    {
      const Own own(groups, g, view(dy, "dy"));
      Rows own_s = {};
      if (need_b) {
        own_s = view(*s, "s");
        own_s.data = static_cast<const char*>(own_s.data) +
                     groups.begin(g) * own_s.row_stride * size_of(type);
        own_s.columns = r;
      }
      Shrinking p = {own.rows, count, r, low ? &b : nullptr, need_b ? &own_s : nullptr};
      p.scale = static_cast<float>(scaling[g]);
      p.gradient_scale = static_cast<float>(high[g]);
      p.shrunk = {ds.data, type, r, 1};
      if (need_b) {
        const Result of_b = result(d_b[g], "d_b");
        p.gradient = {of_b.data, of_b.type, of_b.column_stride, of_b.row_stride};
      }
      if (low || need_b) shrink(kernels, p);
    }
    const std::optional<Dropout> dropout = groups.dropout(g);
    if (need_a) {
      const Own own(groups, g, view(*x, "x"));
      Shrinking p = {own.rows, count, r, nullptr, &own_ds};
      p.gradient_scale = static_cast<float>(groups.keep);
      p.dropout = dropout.has_value() ? &*dropout : nullptr;
      p.gradient = result(d_a[g], "d_a");
      shrink(kernels, p);
    }
    if (dx.has_value()) {
      const Own out(groups, g, view(*dx, "dx"));
      Expanding p = {own_ds, view(lora_a[g], "lora_a"), count, r};
      p.scale = static_cast<float>(groups.keep);
      p.dropout = dropout.has_value() ? &*dropout : nullptr;
      p.accumulate = true;
      p.out = out.result();
      expand(kernels, p);
      out.put(groups, g, *dx);
    }
  });
}

// A group's rows as the products of few rows take them: where they lie, or a copy, widened where a
// matrix of the type is multiplied in fp32.
struct Few {
  Few(const Groups& groups, int64_t g, const Matrix& x, Type matrix)
      : wide(x.type != Type::kFloat && !(groups.kernels.takes_bf16 && x.type == Type::kBFloat16 &&
                                         matrix == Type::kBFloat16)),
        pitch(wide ? up(x.columns, groups.kernels.columns) : x.columns),
        memory(wide || groups.order != nullptr
                   ? groups.count(g) * pitch * (wide ? 4 : size_of(x.type))
                   : 0),
        rows(x) {
    const int64_t size = size_of(x.type);
    const auto row = [&](int64_t m) {
      const int64_t at = groups.begin(g) + m;
      return static_cast<const char*>(x.data) +
             (groups.order != nullptr ? groups.order[at] : at) * x.pitch * size;
    };
    rows.rows = groups.count(g);
    if (!wide && groups.order == nullptr) {
      rows.data = row(0);
      return;
    }
    for (int64_t m = 0; m < rows.rows; ++m) {
      if (wide)
        groups.kernels.load({row(m), x.type, x.columns, 0, 1}, 0, 1, nullptr,
                            reinterpret_cast<float*>(memory.data) + m * pitch, pitch);
      else
        std::memcpy(memory.data + m * pitch * size, row(m), x.columns * size);
    }
    rows.data = memory.data;
    rows.type = wide ? Type::kFloat : x.type;
    rows.pitch = pitch;
  }
  const bool wide;
  const int64_t pitch;
  BufferOf<char> memory;
  Matrix rows;
};

// y [..., N] = x W^T + bias + scaling_g * (x A_g^T) B_g^T of few rows x [..., K], rounded once;
// rows past the last segment are zero.
Tensor linear_grouped_cpu(const Tensor x, const Tensor weight, const std::vector<Tensor> lora_a,
                          const std::vector<Tensor> lora_b, const std::optional<Tensor> order,
                          const std::vector<int64_t> bounds, const std::optional<Tensor> bias,
                          const std::vector<double> scaling, int64_t isa) {
  const Kernels& kernels = kernels_of(isa);
  const Matrix rows = read_rows(x, "x");
  const Type type = rows.type;
  const int64_t M = rows.rows, K = rows.columns, size = size_of(type);
  check_tensor(weight, "weight", 2);
  const int64_t N = weight.size(0);
  STD_TORCH_CHECK(N >= 1, "weight: must have rows");
  check_pairs(lora_a, lora_b, K, N, type);
  int64_t most = 0;
  for (size_t g = 0; g < lora_a.size(); ++g) {
    check_columns(lora_a[g], "lora_a");
    check_columns(lora_b[g], "lora_b");
    most = std::max(most, lora_a[g].size(0));
  }
  const Groups groups =
      groups_of(kernels, type, M, bounds, M, order, lora_a.size(), 1., 0, std::nullopt);
  STD_TORCH_CHECK(scaling.size() == lora_a.size(), "scaling: must be one of each group");
  for (const double factor : scaling)
    STD_TORCH_CHECK(std::isfinite(factor), "scaling: must be finite");
  const void* const offset = read_bias(bias, N, type);
  Tensor y = empty_rows(x, "x", N);
  if (M == 0) return y;
  char* const out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t pitch = apart(N, kernels), G = static_cast<int64_t>(lora_a.size());
  Buffer sum(M * pitch);
  sums_of(kernels, rows, weight, sum.data, pitch);
  // Rows of the result from sums and, where it is given, the low-rank part of a group's.
  const auto put = [&](int64_t at, int64_t count, Product p) {
    const int64_t step = groups.order != nullptr ? 1 : count;
    p.type = p.matrix_type = Type::kFloat;  // of no columns
    p.rounded = type;
    p.scale = 1.f;
    p.count = step;
    p.bias = offset;
    p.sum_pitch = pitch;
    p.out_type = type;
    p.out_pitch = N;
    for (int64_t m = 0; m < count; m += step) {
      const int64_t row = groups.order != nullptr ? groups.order[at + m] : at + m;
      p.sum = sum.data + row * pitch;
      p.out = out + row * N * size;
      multiply(kernels, p, N);
      if (p.low != nullptr) p.low += p.low_pitch;
    }
  };
  const auto branch = [&](int64_t g) {
    const int64_t count = groups.count(g), r = lora_a[g].size(0), ranks = up(r, kernels.width);
    const Rows a = view(lora_a[g], "lora_a"), b = view(lora_b[g], "lora_b");
    const Few own(groups, g, rows, a.type);
    Scratch<1024> low(count * ranks);
    std::fill(low.data, low.data + count * ranks, 0.f);
    Product p = {};
    p.x = own.rows.data;
    p.type = own.rows.type;
    p.count = count;
    p.columns = K;
    p.pitch = own.rows.pitch;
    p.matrix = a.data;
    p.matrix_type = a.type;
    p.matrix_pitch = a.row_stride;
    p.rounded = type;
    p.scale = static_cast<float>(scaling[g]);
    p.out = low.data;
    p.out_type = Type::kFloat;
    p.out_pitch = ranks;
    multiply(kernels, p, r);
    Product second = {};
    add_low(second, {low.data, Type::kFloat, count, r, ranks},
            {b.data, b.type, N, r, b.row_stride});
    put(groups.begin(g), count, second);
  };
  if (groups.begin(G) * most * (K + N) < kSerial) {
    for (int64_t g = 0; g < G; ++g)
      if (groups.takes(g)) branch(g);
  } else {
    for_each(groups, branch);
  }
  if (groups.count(G) > 0) put(groups.begin(G), groups.count(G), {});
  std::memset(out + groups.bounds.back() * N * size, 0, (M - groups.bounds.back()) * N * size);
  return y;
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_linear_grouped_cpu", TORCH_BOX(&lora::linear_grouped_cpu));
  m.impl("_add_grouped_cpu", TORCH_BOX(&lora::add_grouped_cpu));
  m.impl("_backward_grouped_cpu", TORCH_BOX(&lora::backward_grouped_cpu));
}
