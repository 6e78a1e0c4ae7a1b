// Stands in for csrc/cuda/device.cuh: a kernel's threads run as fibers of one host thread, taking
// turns at every barrier, in ascending order in one cluster and descending in the next. Copies land
// when they are waited for, on slots that are poisoned until then. Blocks of a cluster run together,
// clusters one after the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define LORA_DEVICE inline
#define LORA_KERNEL(threads) void

namespace lora {

using std::min;

struct Barrier {
  int threads = 0, arrived = 0, generation = 0;
};

struct Copy {
  uint4* to;
  const void* from;
  bool valid;
};

struct Warp {
  Barrier barrier;
  float left[2][16][16], right[2][16][8];  // of two products, one being read, one being written
};

struct Block {
  std::unique_ptr<uint4[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int thread, peer;
  bool done = false, arrived = false;  // at the cluster's barrier, not waited
  int product = 0, cluster_generation = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Grid {
  int block = 0, threads = 0, peers = 1;
  bool progress = false;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  std::vector<Block> blocks;  // of the cluster
  Barrier cluster;
  std::function<void()> kernel;
};

inline Grid grid;

inline void fail(const char* why) {
  std::fprintf(stderr, "%s: block %d peer %d thread %d\n", why, grid.block, grid.now->peer,
               grid.now->thread);
  std::exit(3);
}

inline Block& block() { return grid.blocks[grid.now->peer]; }

inline int arrive(Barrier& barrier) {
  const int target = barrier.generation + 1;
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    grid.progress = true;
  }
  return target;
}

inline void wait(const Barrier& barrier, int target) {
  while (barrier.generation < target) swapcontext(&grid.now->context, &grid.scheduler);
}

inline void sync(Barrier& barrier) { wait(barrier, arrive(barrier)); }

inline int thread_index() { return grid.now->thread; }
inline int thread_count() { return grid.threads; }
inline int block_index() { return grid.block + grid.now->peer; }
inline int peer_index() { return grid.now->peer; }
inline int peer_count() { return grid.peers; }
inline uint4* shared_memory() { return block().shared.get(); }
inline void sync_block() { sync(block().barrier); }
inline void arrive_cluster() {
  if (grid.now->arrived) fail("arrived twice at a cluster barrier");
  grid.now->arrived = true;
  grid.now->cluster_generation = arrive(grid.cluster);
}
inline void wait_cluster() {
  if (!grid.now->arrived) fail("waited for a cluster barrier without having arrived");
  grid.now->arrived = false;
  wait(grid.cluster, grid.now->cluster_generation);
}

inline float load_peer(const float* own, int peer) {
  const auto offset = reinterpret_cast<const char*>(own) -
                      reinterpret_cast<const char*>(shared_memory());
  return *reinterpret_cast<const float*>(
      reinterpret_cast<const char*>(grid.blocks[peer].shared.get()) + offset);
}

inline void copy_async(uint4* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("unaligned copy");
  std::memset(to, 0xff, sizeof *to);
  grid.now->open.push_back({to, from, valid});
}
inline uint64_t stream_policy() { return 0; }
inline void stream_async(uint4* to, const void* from, bool valid, uint64_t) {
  copy_async(to, from, valid);
}
inline void prefetch(const void*) {}

inline void commit_copies() {
  grid.now->groups.push_back(std::move(grid.now->open));
  grid.now->open.clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = grid.now->groups;
  while (groups.size() > PENDING) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, sizeof *copy.to);
      if (copy.valid) std::memcpy(copy.to, copy.from, sizeof *copy.to);
    }
    groups.erase(groups.begin());
  }
}

template <typename T>
float half_word(uint32_t word, int index) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * index);
  T value;
  std::memcpy(&value, &bits, sizeof bits);
  return static_cast<float>(value);
}

template <typename T>
void multiply(float (&sum)[4], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3,
              uint32_t right0, uint32_t right1) {
  Warp& warp = block().warps[thread_index() / 32];
  const int g = thread_index() % 32 / 4, t = thread_index() % 4, at = grid.now->product++ % 2;
  for (int e = 0; e < 2; ++e) {
    warp.left[at][g][2 * t + e] = half_word<T>(left0, e);
    warp.left[at][g + 8][2 * t + e] = half_word<T>(left1, e);
    warp.left[at][g][2 * t + 8 + e] = half_word<T>(left2, e);
    warp.left[at][g + 8][2 * t + 8 + e] = half_word<T>(left3, e);
    warp.right[at][2 * t + e][g] = half_word<T>(right0, e);
    warp.right[at][2 * t + 8 + e][g] = half_word<T>(right1, e);
  }
  sync(warp.barrier);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      sum[i] += warp.left[at][g + i / 2 * 8][k] * warp.right[at][k][2 * t + i % 2];
}

inline void run_fiber() {
  grid.kernel();
  if (grid.now->arrived) fail("gone before its peers had read");
  grid.now->done = grid.progress = true;
  swapcontext(&grid.now->context, &grid.scheduler);
}

// kernel() on `blocks` blocks of `threads` in clusters of `peers`.
inline void run_grid(int blocks, int threads, int peers, int shared_bytes,
                     std::function<void()> kernel) {
  grid.threads = threads;
  grid.peers = peers;
  grid.kernel = std::move(kernel);
  for (grid.block = 0; grid.block < blocks; grid.block += peers) {
    grid.cluster = {peers * threads};
    grid.blocks.clear();
    std::vector<Fiber> fibers(peers * threads);
    for (int peer = 0; peer < peers; ++peer) {
      Block made;
      made.shared.reset(new uint4[shared_bytes / sizeof(uint4)]);
      std::memset(static_cast<void*>(made.shared.get()), 0xff, shared_bytes);
      made.barrier.threads = threads;
      made.warps.resize(threads / 32);
      for (Warp& warp : made.warps) warp.barrier.threads = 32;
      grid.blocks.push_back(std::move(made));
    }
    for (int i = 0; i < peers * threads; ++i) {
      Fiber& fiber = fibers[i];
      fiber.thread = i % threads;
      fiber.peer = i / threads;
      fiber.stack.resize(64 << 10);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool left = true; left;) {
      left = grid.progress = false;
      for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[grid.block / peers % 2 ? fibers.size() - 1 - i : i];
        if (fiber.done) continue;
        left = true;
        grid.now = &fiber;
        swapcontext(&grid.scheduler, &fiber.context);
      }
      if (left && !grid.progress) fail("deadlock");
    }
  }
}

}  // namespace lora
