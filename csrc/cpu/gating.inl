// Included after the vectors' load and store: h = act(g) u and its gradients, a piece of a row at a
// time in fp32. The loops over floats are the compiler's to make vectors of.

constexpr int64_t kPiece = 512;

// e^x to an ulp or two; for x out of range that of its ends, NaN for NaN.
inline float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  // The sum's low bits are the whole number nearest to x / log 2.
  const float shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t whole = __builtin_bit_cast(int32_t, shifted) - 0x4B400000;
  return p * __builtin_bit_cast(float, (whole + 127) << 23);
}

struct Activated {
  float value, slope;
};

template <Act kAct>
inline Activated activated(float x) {
  if constexpr (kAct == Act::kSilu) {
    const float s = 1.f / (1.f + exponential(-x));
    return {x * s, s * (1.f + x * (1.f - s))};
  } else if constexpr (kAct == Act::kGeluTanh) {
    constexpr float kScale = 0.797884561f, kCube = 0.044715f;
    const float inner = kScale * (x + kCube * x * x * x);
    const float t = 1.f - 2.f / (exponential(2.f * inner) + 1.f);
    const float half = 0.5f * (1.f + t);
    const float rise = kScale * (1.f + 3.f * kCube * x * x);
    return {x * half, half + 0.5f * x * (1.f - t * t) * rise};
  } else if constexpr (kAct == Act::kRelu) {
    return {x > 0.f ? x : 0.f, x > 0.f ? 1.f : 0.f};
  } else {
    const float kept = x > 0.f ? x : 0.f;
    return {kept * kept, 2.f * kept};
  }
}

template <typename T>
inline void widen(const T* from, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + W <= count; k += W) store(out + k, load(from + k));
  for (; k < count; ++k) out[k] = static_cast<float>(from[k]);
}

template <typename T>
inline void narrow(const float* from, int64_t count, T* out) {
  int64_t k = 0;
  for (; k + W <= count; k += W) store(out + k, load(from + k));
  for (; k < count; ++k) out[k] = static_cast<T>(from[k]);
}

template <Act kAct, typename T>
void gate_row(const Gating& p, int64_t row) {
  alignas(64) float g[kPiece], u[kPiece], d[kPiece];
  for (int64_t first = 0; first < p.columns; first += kPiece) {
    const int64_t count = p.columns - first < kPiece ? p.columns - first : kPiece;
    widen(static_cast<const T*>(p.g) + row * p.g_pitch + first, count, g);
    widen(static_cast<const T*>(p.u) + row * p.u_pitch + first, count, u);
    if (p.dh == nullptr) {
      for (int64_t k = 0; k < count; ++k) u[k] *= activated<kAct>(g[k]).value;
      narrow(u, count, static_cast<T*>(p.h) + row * p.h_pitch + first);
      continue;
    }
    widen(static_cast<const T*>(p.dh) + row * p.dh_pitch + first, count, d);
    for (int64_t k = 0; k < count; ++k) {
      const Activated a = activated<kAct>(g[k]);
      g[k] = d[k] * u[k] * a.slope;
      d[k] *= a.value;
    }
    narrow(g, count, static_cast<T*>(p.dg) + row * p.dg_pitch + first);
    narrow(d, count, static_cast<T*>(p.du) + row * p.du_pitch + first);
  }
}

template <typename T>
void gate_rows(const Gating& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) switch (p.act) {
      case Act::kSilu:
        gate_row<Act::kSilu, T>(p, row);
        break;
      case Act::kGeluTanh:
        gate_row<Act::kGeluTanh, T>(p, row);
        break;
      case Act::kRelu:
        gate_row<Act::kRelu, T>(p, row);
        break;
      case Act::kRelu2:
        gate_row<Act::kRelu2, T>(p, row);
        break;
    }
}

void gate(const Gating& p, int64_t first, int64_t last) {
  switch (p.type) {
    case Type::kFloat:
      return gate_rows<float>(p, first, last);
    case Type::kBFloat16:
      return gate_rows<BFloat16>(p, first, last);
    case Type::kHalf:
      return gate_rows<Half>(p, first, last);
  }
}
