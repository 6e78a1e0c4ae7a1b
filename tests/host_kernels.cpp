// Runs a set of CPU kernels without torch, on this CPU or under an emulator. The argument names the
// set. Products are compared with sums in double; what must be equal bits on every CPU, decoded
// weights and dropout masks, is printed as a digest.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "low_rank.h"

using namespace lora;

namespace {

int failures = 0;

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  float uniform() { return static_cast<float>(next() & 0xFFFFFF) / 0x800000 - 1.f; }
};

uint64_t digest(uint64_t seed, const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) seed = (seed ^ p[i]) * 1099511628211ull;
  return seed;
}

template <typename T>
std::vector<T> random(Random& from, size_t count, float scale) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(from.uniform() * scale);
  return values;
}

// Relative to the size of all.
void compare(const char* what, const std::vector<double>& exact, const float* found,
             int64_t columns, int64_t pitch, double most) {
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double off = exact[i] - found[i / columns * pitch + i % columns];
    error += off * off;
    size += exact[i] * exact[i];
  }
  const double relative = std::sqrt(error / (size > 0 ? size : 1));
  if (relative <= most) return;
  std::printf("%s: error %.3g, expected at most %.3g\n", what, relative, most);
  ++failures;
}

template <typename T>
constexpr Type type_of() {
  return sizeof(T) == 4                ? Type::kFloat
         : std::is_same_v<T, BFloat16> ? Type::kBFloat16
                                       : Type::kHalf;
}

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// x W^T + low B^T of few rows, of a matrix in T; x in fp32, or in bf16 where that is taken.
template <typename T, typename X>
void multiply(const Kernels& k, int64_t M, int64_t N, int64_t K, int64_t r) {
  Random from{static_cast<uint64_t>(M * 7 + N * 3 + K)};
  const auto x = random<X>(from, M * K, 1.f);
  const auto w = random<T>(from, N * K, .1f);
  const auto b = random<T>(from, N * r, 1.f);
  const int64_t ranks = up(r, k.width);
  std::vector<float> low(M * ranks, 0.f), out(M * N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t j = 0; j < r; ++j) low[m * ranks + j] = from.uniform();
  Product p = {};
  p.x = x.data();
  p.type = type_of<X>();
  p.count = M;
  p.columns = p.pitch = p.matrix_pitch = K;
  p.matrix = w.data();
  p.matrix_type = p.rounded = type_of<T>();
  p.scale = 1.f;
  p.low = low.data();
  p.low_pitch = ranks;
  p.ranks = p.b_pitch = r;
  p.b = b.data();
  p.b_type = type_of<T>();
  p.out = out.data();
  p.out_type = Type::kFloat;
  p.out_pitch = N;
  k.multiply(p, 0, N);
  std::vector<double> exact(M * N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < K; ++i)
        sum += static_cast<double>(static_cast<float>(x[m * K + i])) *
               static_cast<float>(w[n * K + i]);
      for (int64_t j = 0; j < r; ++j)
        sum += static_cast<double>(low[m * ranks + j]) * static_cast<float>(b[n * r + j]);
      exact[m * N + n] = sum;
    }
  compare("multiply", exact, out.data(), N, N, 2e-6);
}

// x matrix of few rows.
template <typename T>
void combine(const Kernels& k, int64_t M, int64_t terms, int64_t columns) {
  Random from{static_cast<uint64_t>(M + terms * 5 + columns)};
  const auto x = random<float>(from, M * terms, 1.f);
  const auto w = random<T>(from, terms * columns, .1f);
  const int64_t pitch = up(columns, k.columns);
  std::vector<float> sum(M * pitch, 0.5f), out(M * columns);
  Combination c = {};
  c.x = x.data();
  c.x_row = terms;
  c.x_term = 1;
  c.count = M;
  c.terms = terms;
  c.matrix = w.data();
  c.matrix_type = c.rounded = type_of<T>();
  c.matrix_pitch = c.out_pitch = columns;
  c.scale = 2.f;
  c.sum = sum.data();
  c.sum_pitch = pitch;
  c.accumulate = true;
  c.out = out.data();
  c.out_type = Type::kFloat;
  k.combine(c, 0, M, 0, columns);
  std::vector<double> exact(M * columns);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t j = 0; j < columns; ++j) {
      double total = 0.5;
      for (int64_t t = 0; t < terms; ++t)
        total += 2. * x[m * terms + t] * static_cast<float>(w[t * columns + j]);
      exact[m * columns + j] = total;
    }
  compare("combine", exact, out.data(), columns, columns, 2e-6);
}

struct Weight {
  std::vector<uint8_t> codes, scale_codes;
  std::vector<float> table, scale, zero, outer_table, outer_scale;
  Coded coded = {};
};

// Of 4 bits with scales in 8 bits, or with zeros; or of 8 bits.
Weight weight(int64_t N, int64_t K, int kind) {
  Random from{static_cast<uint64_t>(N + K + kind)};
  Weight w;
  const int64_t blocks = kind == 2 ? N : N * K / 64;
  w.codes.resize(kind == 2 ? N * K : N * K / 2);
  for (uint8_t& code : w.codes) code = static_cast<uint8_t>(from.next());
  w.table = random<float>(from, 16, 1.f);
  w.scale = random<float>(from, blocks, .1f);
  w.zero = random<float>(from, blocks, 1.f);
  w.outer_table = random<float>(from, 256, 1.f);
  w.outer_scale = random<float>(from, blocks / 16 + 1, .1f);
  w.scale_codes.resize(blocks);
  for (uint8_t& code : w.scale_codes) code = static_cast<uint8_t>(from.next());
  Coded& c = w.coded;
  c.codes = w.codes.data();
  c.four = kind != 2;
  c.columns = K;
  c.block = kind == 2 ? K : 64;
  c.table = w.table.data();
  c.factor = kind == 2 ? 0.125f : 1.f;
  if (kind == 0) {
    c.scale_codes = w.scale_codes.data();
    c.outer_table = w.outer_table.data();
    c.outer_scale = w.outer_scale.data();
    c.offset = 0.3f;
    c.outer_block = 16;
  } else {
    c.scale = w.scale.data();
    c.zero = kind == 1 ? w.zero.data() : nullptr;
  }
  return w;
}

template <typename T>
uint64_t decode(const Kernels& k, const Weight& w, int64_t N, int64_t K, uint64_t seed) {
  std::vector<T> out(N * K);
  k.decode(w.coded, 0, N, 0, K, out.data(), type_of<T>(), K);
  return digest(seed, out.data(), out.size() * sizeof(T));
}

template <typename X>
void multiply_coded(const Kernels& k, int64_t M, int64_t N, int64_t K, int kind) {
  const Weight w = weight(N, K, kind);
  Random from{static_cast<uint64_t>(M)};
  auto x = random<X>(from, M * K, 1.f);
  const auto plain = x;
  std::vector<float> dense(N * K), out(M * N);
  k.decode(w.coded, 0, N, 0, K, dense.data(), Type::kFloat, K);
  constexpr bool kNarrow = sizeof(X) == 2;
  if (w.coded.four) (kNarrow ? k.spread_bf16 : k.spread)(x.data(), M, K, K);
  Product p = {};
  p.x = x.data();
  p.type = type_of<X>();
  p.count = M;
  p.columns = p.pitch = K;
  p.rounded = type_of<X>();
  p.scale = 1.f;
  p.out = out.data();
  p.out_type = Type::kFloat;
  p.out_pitch = N;
  p.coded = &w.coded;
  k.multiply(p, 0, N);
  std::vector<double> exact(M * N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < K; ++i)
        sum += static_cast<double>(static_cast<float>(plain[m * K + i])) * dense[n * K + i];
      exact[m * N + n] = sum;
    }
  compare("multiply_coded", exact, out.data(), N, N, kNarrow && kind != 2 ? 3e-3 : 2e-6);
}

// Rows, dropped: the same bits everywhere.
uint64_t masks(const Kernels& k, uint64_t seed) {
  const int64_t rows = 5, columns = 1300, pitch = up(columns, k.columns);
  const std::vector<float> ones(rows * columns, 1.f);
  std::vector<float> out(rows * pitch);
  const Dropout dropout = {{0x01234567u, 0x89ABCDEFu}, 20000, 7, 3};
  k.load({ones.data(), Type::kFloat, columns, columns, 1}, 0, rows, &dropout, out.data(), pitch);
  for (int64_t m = 0; m < rows; ++m) seed = digest(seed, &out[m * pitch], columns * sizeof(float));
  return seed;
}

// The two passes over many rows.
void passes(const Kernels& k) {
  Random from{5};
  const int64_t count = 37, columns = up(70, k.columns), ranks = up(5, k.ranks);
  const auto rows = random<float>(from, count * columns, 1.f);
  const auto matrix = random<float>(from, ranks * columns, 1.f);
  const auto low = random<float>(from, count * ranks, 1.f);
  std::vector<float> shrunk(count * ranks), outer(ranks * columns, 0.f);
  k.shrink(rows.data(), columns, count, matrix.data(), columns, ranks, shrunk.data());
  k.outer(rows.data(), columns, count, low.data(), columns, ranks, outer.data());
  std::vector<double> of_shrink(count * ranks), of_outer(ranks * columns);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t j = 0; j < ranks; ++j)
      for (int64_t i = 0; i < columns; ++i) {
        of_shrink[m * ranks + j] +=
            static_cast<double>(rows[m * columns + i]) * matrix[j * columns + i];
        of_outer[j * columns + i] +=
            static_cast<double>(low[m * ranks + j]) * rows[m * columns + i];
      }
  compare("shrink", of_shrink, shrunk.data(), ranks, ranks, 2e-6);
  compare("outer", of_outer, outer.data(), columns, columns, 2e-6);
}

// h = act(g) u and its gradients, rows of a wider matrix, du over dh.
void gate(const Kernels& k) {
  Random from{11};
  const int64_t count = 3, columns = 1030, pitch = 2 * columns;
  const auto both = random<float>(from, count * pitch, 6.f);
  const auto gradient = random<float>(from, count * columns, 1.f);
  for (int act = 0; act < kActs; ++act) {
    std::vector<float> h(count * columns), dg(count * columns), dh = gradient;
    Gating p = {};
    p.act = static_cast<Act>(act);
    p.columns = columns;
    p.g = both.data();
    p.u = both.data() + columns;
    p.g_pitch = p.u_pitch = pitch;
    p.h = h.data();
    p.h_pitch = columns;
    k.gate(p, 0, count);
    p.dh = p.du = dh.data();
    p.dg = dg.data();
    p.dh_pitch = p.du_pitch = p.dg_pitch = columns;
    k.gate(p, 0, count);
    std::vector<double> of_h, of_g, of_u;
    for (int64_t i = 0; i < count * columns; ++i) {
      const int64_t at = i / columns * pitch + i % columns;
      const double x = both[at], u = both[at + columns], d = gradient[i];
      const double s = 1 / (1 + std::exp(-x)), c = 0.7978845608028654;
      const double t = std::tanh(c * (x + 0.044715 * x * x * x)), kept = x > 0 ? x : 0;
      const double value[] = {x * s, 0.5 * x * (1 + t), kept, kept * kept};
      const double slope[] = {
          s * (1 + x * (1 - s)),
          0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x), x > 0 ? 1. : 0.,
          2 * kept};
      of_h.push_back(value[act] * u);
      of_g.push_back(d * u * slope[act]);
      of_u.push_back(d * value[act]);
    }
    compare("gate", of_h, h.data(), columns, columns, 3e-7);
    compare("gate, dg", of_g, dg.data(), columns, columns, 1e-6);
    compare("gate, du", of_u, dh.data(), columns, columns, 3e-7);
  }
}

const Kernels* find(const std::string& name) {
  if (name == "base") return &kBase;
#if defined(__aarch64__)
  if (name == "neon") return &kNeon;
  if (name == "neon_bf16") return &kNeonBf16;
#endif
#if defined(__x86_64__)
  if (name == "avx2") return &kAvx2;
#endif
  return nullptr;
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels* const kernels = count == 2 ? find(arguments[1]) : nullptr;
  if (kernels == nullptr) return 2;
  const Kernels& k = *kernels;
  uint64_t bits = 1469598103934665603ull;
  for (int64_t M : {1, 2, 3, 5, 9})
    for (int64_t K : {64, 192, 1101}) {
      multiply<float, float>(k, M, 13, K, 3);
      multiply<Half, float>(k, M, 13, K, 3);
      multiply<BFloat16, float>(k, M, 13, K, 3);
      if (k.takes_bf16) multiply<BFloat16, BFloat16>(k, M, 13, K, 3);
      combine<float>(k, M, K, 75);
      combine<BFloat16>(k, M, K, 75);
      combine<Half>(k, M, K, 33);
    }
  for (int kind : {0, 1, 2}) {
    for (int64_t M : {1, 3, 8}) {
      multiply_coded<float>(k, M, 11, 1344, kind);
      if (k.takes_bf16) multiply_coded<BFloat16>(k, M, 11, 1344, kind);
    }
    const Weight w = weight(9, 1344, kind);
    bits = decode<float>(k, w, 9, 1344, bits);
    bits = decode<BFloat16>(k, w, 9, 1344, bits);
    bits = decode<Half>(k, w, 9, 1344, bits);
  }
  passes(k);
  gate(k);
  std::printf("bits %016" PRIx64 "\n", masks(k, bits));
  return failures == 0 ? 0 : 1;
}
