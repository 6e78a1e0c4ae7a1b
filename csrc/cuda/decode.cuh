// y = x W^T + bias + s B^T with s = scaling x A^T for at most 16 rows of x, in one launch that
// reads W once. Knows no torch.
//
// A block owns kRows rows of W (columns of y). Its warps take K in turns of 128 bytes a row and
// keep what they asked for in shared memory that no other thread reads, so a thread waits for
// nothing but its own copies. A thread's 16 bytes are eight neighbours along K; which of them meet
// in one instruction is up to us as long as W and x agree, so they go into mma fragments as they
// lie. Partial sums meet in shared memory and are added in the order of the warps: same inputs,
// same bits.
//
// Every block needs all of s. Blocks that wait for others need flags that somebody cleared, which
// is a second launch or scratch that outlives the call; so each block computes s anew. What that
// costs is A from L2, r / kRows of what a block reads of W; from sm_90 on the blocks of a cluster
// share it out along K and read each other's sums. A comes before W: its sums travel while W is
// streamed.
#pragma once

#include <cstring>

#ifdef LORA_DEVICE_HEADER
#include LORA_DEVICE_HEADER
#else
#include "device.cuh"
#endif

namespace lora {

constexpr int kMaxRows = 16;  // of x
constexpr int kMaxThreads = 256;
constexpr int kMinThreads = 128;
constexpr int kStages = 4;       // items of a warp under way
constexpr int kTurnBytes = 128;  // of a row
constexpr int kRankChunk = 64;   // ranks of s at a time

// Strides in elements. Rows of x, W and A are contiguous, at addresses and strides that are
// multiples of 16 bytes; K is a multiple of 8.
struct DecodeArguments {
  const void *x, *weight, *a, *b, *bias;  // bias may be null
  void *y, *s;                            // contiguous [M,N] and [M,r]; s may be null
  int64_t x_row, weight_row, a_row, b_row, b_column, bias_stride;
  int M, N, K, r;
  float scale, high;               // of s, of s B^T
  bool b_is_float, bias_is_float;  // else of x's dtype
};

// TILES of 16 rows of W, HALVES of 8 rows of x.
template <int TILES, int HALVES>
struct DecodeShape {
  static constexpr int kRows = 16 * TILES, kColumns = 8 * HALVES, kSums = kRows * kColumns;
  static constexpr int kSlots = 4 * TILES + 2 * HALVES;  // of 16 bytes a thread, in a stage
  static constexpr int kOwn = kSums / kMinThreads;       // results of a thread, at most
  static constexpr int kLow = kRankChunk * kColumns;     // elements of a chunk of s

  static constexpr int shared_bytes(int threads) {
    return threads * kStages * kSlots * 16 + threads / 32 * kSums * 4 + 2 * kLow * 4;
  }
};

template <typename T>
LORA_DEVICE T narrow(float value);
template <>
LORA_DEVICE __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}
template <>
LORA_DEVICE __half narrow(float value) {
  return __float2half_rn(value);
}

LORA_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
LORA_DEVICE float widen(__half value) { return __half2float(value); }

template <typename T>
LORA_DEVICE uint32_t bits(T value) {
  uint16_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}

// Two fp32 values in bit patterns, rounded to T and packed.
template <typename T>
LORA_DEVICE uint32_t pack(uint32_t first, uint32_t second) {
  float values[2];
  memcpy(&values[0], &first, sizeof first);
  memcpy(&values[1], &second, sizeof second);
  return bits(narrow<T>(values[0])) | bits(narrow<T>(values[1])) << 16;
}

// Element `index` of T or fp32, as T has it.
template <typename T>
LORA_DEVICE float element(const void* from, bool is_float, int64_t index) {
  if (is_float) return widen(narrow<T>(static_cast<const float*>(from)[index]));
  return widen(static_cast<const T*>(from)[index]);
}

// One thread's side of a warp's way through its items: first its turns of A, run by run of kRows
// ranks, then those of W.
template <typename T, typename A, int TILES, int HALVES>
struct Pipeline {
  using Shape = DecodeShape<TILES, HALVES>;

  const DecodeArguments& p;
  uint4* ring;      // this thread's slots
  int group, quad;  // lane / 4 and lane % 4
  int column;       // of y, the block's first
  int unit, units;  // which turns of A, of how many
  int warp, warps;  // which turns of W
  uint64_t policy;
  int run = 0, turn = 0;  // next to be asked for; past the last run comes W
  int filled = 0, used = 0;

  template <typename E>
  static constexpr int kTurn = kTurnBytes / sizeof(E);

  LORA_DEVICE int runs() const { return (p.r + Shape::kRows - 1) / Shape::kRows; }
  LORA_DEVICE bool has_a() const { return unit * kTurn<A> < p.K; }
  LORA_DEVICE uint4* slots(int stage) const { return ring + stage * Shape::kSlots * 32; }

  LORA_DEVICE void begin() {
    run = has_a() ? 0 : runs();
    turn = run < runs() ? unit : warp;
    for (int i = 0; i < kStages - 1; ++i) ask();
  }

  // The 128 bytes from element k on of kRows rows, and of x what they meet.
  template <typename E, bool ONCE>
  LORA_DEVICE void ask_for(const void* from, int64_t stride, int row, int rows, int k) {
    uint4* const to = slots(filled);
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const int own = row + 8 * i + group;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        // Two bytes: 8 elements of either half. Four: both halves of the same 8 elements.
        const int at = k + (sizeof(E) == 2 ? 32 * c + 8 * quad : 8 * quad + 4 * c);
        const bool valid = own < rows && at < p.K;
        const E* source = static_cast<const E*>(from) + (valid ? own * stride + at : 0);
        if (ONCE) {
          stream_async(to + 32 * (2 * i + c), source, valid, policy);
        } else {
          copy_async(to + 32 * (2 * i + c), source, valid);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      const int own = 8 * h + group;
#pragma unroll
      for (int c = 0; c < kTurn<E> / 32; ++c) {
        const int at = k + 32 * c + 8 * quad;
        const bool valid = own < p.M && at < p.K;
        const T* source = static_cast<const T*>(p.x) + (valid ? own * p.x_row + at : 0);
        copy_async(to + 32 * (4 * TILES + 2 * h + c), source, valid);
      }
    }
  }

  LORA_DEVICE void ask() {
    if (run < runs()) {
      ask_for<A, false>(p.a, p.a_row, run * Shape::kRows, p.r, turn * kTurn<A>);
      turn += units;
      if (turn * kTurn<A> >= p.K) {
        ++run;
        turn = run < runs() ? unit : warp;
      }
    } else if (turn * kTurn<T> < p.K) {
      ask_for<T, true>(p.weight, p.weight_row, column, p.N, turn * kTurn<T>);
      turn += warps;
    }
    commit_copies();
    filled = filled + 1 == kStages ? 0 : filled + 1;
  }

  // Eight neighbours along K of a slot pair, in T.
  template <typename E>
  LORA_DEVICE uint4 words(const uint4* at, int c) const {
    if (sizeof(E) == 2) return at[32 * c];
    const uint4 low = at[0], high = at[32];
    return uint4{pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y),
                 pack<T>(high.z, high.w)};
  }

  // The next item, which must be of E, into the sums.
  template <typename E>
  LORA_DEVICE void take(float (&sums)[TILES][HALVES][4]) {
    wait_copies<kStages - 2>();
    ask();
    const uint4* const from = slots(used);
    used = used + 1 == kStages ? 0 : used + 1;
#pragma unroll
    for (int c = 0; c < kTurn<E> / 32; ++c) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const uint4 top = words<E>(from + 32 * 4 * tile, c);
        const uint4 bottom = words<E>(from + 32 * (4 * tile + 2), c);
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
          const uint4 x = from[32 * (4 * TILES + 2 * h + c)];
          multiply<T>(sums[tile][h], top.x, bottom.x, top.y, bottom.y, x.x, x.y);
          multiply<T>(sums[tile][h], top.z, bottom.z, top.w, bottom.w, x.z, x.w);
        }
      }
    }
  }

  // The sums to [kRows,kColumns].
  LORA_DEVICE void leave(const float (&sums)[TILES][HALVES][4], float* to) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int h = 0; h < HALVES; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * tile + 8 * (i / 2) + group;
          to[row * Shape::kColumns + 8 * h + 2 * quad + i % 2] = sums[tile][h][i];
        }
  }
};

template <typename T, typename A, int TILES, int HALVES>
LORA_KERNEL(kMaxThreads)
decode_kernel(const DecodeArguments p) {
  using Shape = DecodeShape<TILES, HALVES>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kSums = Shape::kSums;
  const int thread = thread_index(), threads = thread_count();
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int peer = peer_index(), peers = peer_count();
  const int column = block_index() * kRows;

  uint4* const memory = shared_memory();
  float* const partial = reinterpret_cast<float*>(memory + threads * kStages * Shape::kSlots);
  float* const share = partial + warps * kSums;  // what this block adds to s, read by its peers
  float* const low = share + Shape::kLow;        // s, rounded
  Pipeline<T, A, TILES, HALVES> items{p,
                                      memory + warp * 32 * kStages * Shape::kSlots + lane,
                                      lane / 4,
                                      lane % 4,
                                      column,
                                      peer * warps + warp,
                                      peers * warps,
                                      warp,
                                      warps,
                                      stream_policy()};
  items.begin();
  for (int i = thread; i < kRows && column + i < p.N; i += threads)
    for (int rank = 0; rank < p.r; rank += 64) {
      const int64_t index = (column + i) * p.b_row + rank * p.b_column;
      prefetch(static_cast<const char*>(p.b) + index * (p.b_is_float ? 4 : 2));
    }

  const auto sum_of_warps = [&](int i) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += partial[w * kSums + i];
    return sum;
  };
  // Result i of a thread: row i % kRows of W, row i / kRows of x.
  float own[Shape::kOwn] = {};
  for (int first = 0; first < p.r; first += kRankChunk) {
    const int ranks = min(kRankChunk, p.r - first);
    for (int run = 0; run < ranks; run += kRows) {
      float sums[TILES][HALVES][4] = {};
      for (int turn = items.unit; turn * items.template kTurn<A> < p.K; turn += items.units)
        items.template take<A>(sums);
      items.leave(sums, partial + warp * kSums);
      sync_block();
      for (int i = thread; i < kSums; i += threads) share[run * kColumns + i] = sum_of_warps(i);
      sync_block();
    }
    arrive_cluster();
    if (first + kRankChunk >= p.r) {
      float sums[TILES][HALVES][4] = {};
      for (int turn = warp; turn * items.template kTurn<T> < p.K; turn += warps)
        items.template take<T>(sums);
      items.leave(sums, partial + warp * kSums);
    }
    wait_cluster();
    for (int i = thread; i < ranks * kColumns; i += threads) {
      float sum = 0.f;
      for (int other = 0; other < peers; ++other) sum += load_peer(share + i, other);
      const T rounded = narrow<T>(sum * p.scale);
      low[i] = widen(rounded);
      const int row = i % kColumns, rank = first + i / kColumns;
      if (p.s != nullptr && column == 0 && row < p.M)
        static_cast<T*>(p.s)[static_cast<int64_t>(row) * p.r + rank] = rounded;
    }
    arrive_cluster();
    sync_block();
#pragma unroll
    for (int o = 0; o < Shape::kOwn; ++o) {
      const int i = thread + o * threads, n = column + i % kRows, m = i / kRows;
      if (m >= p.M || n >= p.N) continue;
#pragma unroll 4
      for (int rank = 0; rank < ranks; ++rank) {
        const int64_t index = n * p.b_row + (first + rank) * p.b_column;
        own[o] += low[rank * kColumns + m] * element<T>(p.b, p.b_is_float, index);
      }
    }
    wait_cluster();  // no share is overwritten, and no block gone, before its peers have read
  }
#pragma unroll
  for (int o = 0; o < Shape::kOwn; ++o) {
    const int i = thread + o * threads, n = column + i % kRows, m = i / kRows;
    if (m >= p.M || n >= p.N) continue;
    float sum = sum_of_warps(i % kRows * kColumns + m) + p.high * own[o];
    if (p.bias != nullptr) sum += element<T>(p.bias, p.bias_is_float, n * p.bias_stride);
    static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.N + n] = narrow<T>(sum);
  }
}

}  // namespace lora
