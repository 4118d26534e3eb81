// The GPU instructions of row_cluster.cu that no CPU has, one tiny function each.
// tests/kernels/cuda_emulation.h has the same names for g++, so that everything else runs in tests without a GPU.
#pragma once
#include <cstdint>

#define DEVICE static __device__ __forceinline__

DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- the cluster ----------------------------------------------------------------------------------------------------

DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// What this thread did before it arrives is seen by every thread of the cluster that has waited.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Only says that this block's memory may be used from now on.
DEVICE void cluster_started() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }

// The same place in the shared memory of another block of the cluster.
template <typename T>
DEVICE T* in_block(T* p, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(there);
}

// ---- bulk copies from device to shared memory, and the barriers that count their bytes ------------------------------

DEVICE void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes the barriers this thread initialised known to the copy engine.
DEVICE void barrier_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// bytes, and both addresses, are multiples of 16.
DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Until the barrier's first phase is over: all the bytes it expects are there.
DEVICE void barrier_wait(uint64_t* barrier) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  } while (!done);
}

// ---- arithmetic and stores ------------------------------------------------------------------------------------------

// 2^x to 2 units in the last place, exactly 1 at 0; results below 2^-126 are 0.
DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 unit in the last place.
DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two bf16, rounded to nearest even, the first in the lower half.
DEVICE uint32_t bf16_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// To memory that a bulk load may have read before.
template <typename T>
DEVICE void store(void* to, T value) {
  *static_cast<T*>(to) = value;
}
