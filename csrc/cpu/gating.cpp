// The private CPU op of gated activations: checks first, then the rows over torch's own threads.
#include "checks.h"

namespace lora {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of a thread, at least

struct Side {
  void* data;
  int64_t pitch;
};

Side side(const Tensor& t, const char* name, int64_t rows, int64_t columns, Type type) {
  check_size(t, name, rows, columns);
  check_type(t, name, type, false);
  check_columns(t, name);
  check_starts(t, name);
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0)};
}

Side output(const Tensor& t, const char* name, int64_t rows, int64_t columns, Type type) {
  check_writable(t, name);
  return side(t, name, rows, columns, type);
}

// h [M,I] = act(g) u; or of dh [M,I], which dg or du may be, dg = dh u act'(g), du = dh act(g).
void gate_cpu(const Tensor g, const Tensor u, const std::optional<Tensor> dh, int64_t act,
              int64_t isa, std::optional<Tensor> h, std::optional<Tensor> dg,
              std::optional<Tensor> du) {
  const Kernels& kernels = kernels_of(isa);
  check_matrix(g, "g");
  const Type type = type_of(g, "g");
  const int64_t M = g.size(0), I = g.size(1);
  STD_TORCH_CHECK(0 <= act && act < kActs, "act: must be in [0, ", kActs, "), got ", act);
  STD_TORCH_CHECK(dh.has_value() == dg.has_value() && dh.has_value() == du.has_value() &&
                      dh.has_value() != h.has_value(),
                  "h, or dh, dg and du: must be given");
  Gating p = {};
  p.type = type;
  p.act = static_cast<Act>(act);
  p.columns = I;
  const Side of_g = side(g, "g", M, I, type), of_u = side(u, "u", M, I, type);
  p.g = of_g.data, p.g_pitch = of_g.pitch;
  p.u = of_u.data, p.u_pitch = of_u.pitch;
  if (h.has_value()) {
    const Side to = output(*h, "h", M, I, type);
    p.h = to.data, p.h_pitch = to.pitch;
  } else {
    const Side from = side(*dh, "dh", M, I, type);
    const Side to_g = output(*dg, "dg", M, I, type), to_u = output(*du, "du", M, I, type);
    p.dh = from.data, p.dh_pitch = from.pitch;
    p.dg = to_g.data, p.dg_pitch = to_g.pitch;
    p.du = to_u.data, p.du_pitch = to_u.pitch;
  }
  if (I == 0) return;
  torch::stable::parallel_for(0, M, std::max<int64_t>(1, kGrain / I),
                              [&](int64_t begin, int64_t end) { kernels.gate(p, begin, end); });
}

}  // namespace
}  // namespace lora

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_gate_cpu", TORCH_BOX(&lora::gate_cpu));
}
