// What the kernels ask of the device beyond plain C++. The tests stand in for this file and run the
// kernels on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define LORA_DEVICE __device__ __forceinline__
#define LORA_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace lora {

LORA_DEVICE int thread_index() { return threadIdx.x; }
LORA_DEVICE int thread_count() { return blockDim.x; }
LORA_DEVICE int block_index() { return blockIdx.x; }
LORA_DEVICE void sync_block() { __syncthreads(); }

LORA_DEVICE uint4* shared_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}

// ------------------------------------------------------------------------------------------ copies

// 16 bytes to shared memory without waiting, zeros and no access where not `valid`. A thread sees
// its own copies after wait_copies alone.
LORA_DEVICE void copy_async(uint4* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same for what is read once: first to leave L2.
LORA_DEVICE void stream_async(uint4* to, const void* from, bool valid, uint64_t policy) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address),
               "l"(from), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

LORA_DEVICE uint64_t stream_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

LORA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `PENDING` groups of this thread have arrived.
template <int PENDING>
LORA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

LORA_DEVICE void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// ----------------------------------------------------------------------------------------- product

// sum[16,8] += left[16,16] right[16,8] over a warp. With g = lane / 4 and t = lane % 4, a word
// holds two neighbours along the reduction: left0 row g at 2t, left1 row g + 8 at 2t, left2 and
// left3 the same at 2t + 8; right0 column g at 2t, right1 at 2t + 8. sum: row g at 2t and 2t + 1,
// then row g + 8.
template <typename T>
LORA_DEVICE void multiply(float (&sum)[4], uint32_t left0, uint32_t left1, uint32_t left2,
                          uint32_t left3, uint32_t right0, uint32_t right1);

template <>
LORA_DEVICE void multiply<__nv_bfloat16>(float (&sum)[4], uint32_t left0, uint32_t left1,
                                         uint32_t left2, uint32_t left3, uint32_t right0,
                                         uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));
}

template <>
LORA_DEVICE void multiply<__half>(float (&sum)[4], uint32_t left0, uint32_t left1, uint32_t left2,
                                  uint32_t left3, uint32_t right0, uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));
}

// ----------------------------------------------------------------------------------------- cluster

// Blocks that see each other's shared memory, from sm_90 on; before it every block is alone.

LORA_DEVICE int peer_index() {
#if __CUDA_ARCH__ >= 900
  uint32_t index;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(index));
  return static_cast<int>(index);
#else
  return 0;
#endif
}

LORA_DEVICE int peer_count() {
#if __CUDA_ARCH__ >= 900
  uint32_t count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return static_cast<int>(count);
#else
  return 1;
#endif
}

// What was written before arriving is seen after waiting.
LORA_DEVICE void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

LORA_DEVICE void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// What a peer has at `own`, an address in this block's shared memory.
LORA_DEVICE float load_peer(const float* own, int peer) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  float value;
  asm volatile(
      "{\n .reg .u32 there;\n mapa.shared::cluster.u32 there, %1, %2;\n"
      " ld.shared::cluster.f32 %0, [there];\n}"
      : "=f"(value)
      : "r"(address), "r"(peer)
      : "memory");
  return value;
#else
  return *own;
#endif
}

}  // namespace lora
