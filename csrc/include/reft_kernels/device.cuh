// The only operations of a GPU that the kernels use beyond plain C++: each a function, so that the tests can
// give another body to each of them and run the very same kernels on a CPU (REFT_KERNELS_ON_CPU).
//
// Kernels have no static shared memory: all of it is carved out of `dynamic_shared()`, whose size the plan
// gives.
#pragma once

#include "reft_kernels/types.h"

namespace reft_kernels {

struct alignas(16) Vector16 {  // 16 bytes, the widest access
  uint32_t word[4];
};

struct alignas(8) Vector8 {
  uint32_t word[2];
};

}  // namespace reft_kernels

#if defined(REFT_KERNELS_ON_CPU)

#include "cuda_on_cpu.h"  // python_tests/native

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define REFT_KERNEL(THREADS, BLOCKS_PER_MULTIPROCESSOR) \
  __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
#define REFT_DEVICE __device__ __forceinline__
#define REFT_GRID_CONSTANT const __grid_constant__

namespace reft_kernels {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// --- a block's own memory and its threads

REFT_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

REFT_DEVICE void sync_block() {
  __syncthreads();
}
REFT_DEVICE void sync_warp() {
  __syncwarp();
}

// All 32 lanes call these together.
REFT_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
REFT_DEVICE double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
REFT_DEVICE float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// --- memory

REFT_DEVICE Vector16 load_16(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}

REFT_DEVICE Vector8 load_8(const void* address) {
  const uint2 v = *static_cast<const uint2*>(address);
  return {{v.x, v.y}};
}

REFT_DEVICE void store_16(void* address, const Vector16& v) {
  *static_cast<uint4*>(address) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

REFT_DEVICE void store_8(void* address, const Vector8& v) {
  *static_cast<uint2*>(address) = make_uint2(v.word[0], v.word[1]);
}

// A load from the L2 cache, past L1: of what another block wrote in this launch, before a grid barrier.
REFT_DEVICE float load_from_other_block(const float* address) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

REFT_DEVICE double load_from_other_block(const double* address) {
  double value;
  asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(value) : "l"(address) : "memory");
  return value;
}

// Global to shared memory, 16 bytes, without passing through registers. Both addresses are multiples of 16.
REFT_DEVICE void copy_async_16(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
REFT_DEVICE void commit_async() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of the thread's own committed groups are under way; a sync makes them others'.
template <int kPending>
REFT_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores: d += a b for a [16, 16], b [16, 8], d [16, 8], spread over a warp as PTX's m16n8k16 has
// it
//     (g = lane / 4, q = lane % 4):
//     a: word 0 is row g, columns 2q and 2q+1; 1: row g+8; 2: row g, columns 2q+8, 2q+9; 3: row g+8, same
//     columns b: word 0 is column g, rows 2q and 2q+1; 1: rows 2q+8, 2q+9 d: 0, 1: row g, columns 2q and
//     2q+1; 2, 3: row g+8

template <typename T>
REFT_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
REFT_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
REFT_DEVICE void mma_16x8x16<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- clusters of blocks (sm_90 and newer)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

REFT_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of every block of the cluster; what was written to shared memory before is seen after.
REFT_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
REFT_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to where `local`, an address in this block's shared memory, is in the block of another rank.
REFT_DEVICE void cluster_store(float* local, unsigned rank, float value) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(local));
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n st.shared::cluster.f32 [there], "
      "%2;\n}\n" ::"r"(here),
      "r"(rank), "f"(value)
      : "memory");
}

// --- bulk copies, global to shared memory: addresses and sizes are multiples of 16

REFT_DEVICE void bulk_barrier_init(uint64_t* barrier) {  // one thread, then a sync of the block
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n fence.mbarrier_init.release.cluster;" ::"r"(here)
               : "memory");
}

// One thread: the barrier's phase ends when so many bytes have come.
REFT_DEVICE void bulk_expect(uint64_t* barrier, unsigned bytes) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}\n" ::"r"(here),
      "r"(bytes)
      : "memory");
}

REFT_DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(global), "r"(bytes), "r"(here)
      : "memory");
}

// Waits until the phase of that parity (0 for the first) has ended.
REFT_DEVICE void bulk_wait(uint64_t* barrier, unsigned parity) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @done bra over;\n bra again;\n over:\n}\n" ::"r"(here),
      "r"(parity)
      : "memory");
}

#else  // so that what is never launched there compiles

REFT_DEVICE unsigned cluster_rank() {
  return 0;
}
REFT_DEVICE void cluster_arrive() {}
REFT_DEVICE void cluster_wait() {}
REFT_DEVICE void cluster_store(float*, unsigned, float) {}
REFT_DEVICE void bulk_barrier_init(uint64_t*) {}
REFT_DEVICE void bulk_expect(uint64_t*, unsigned) {}
REFT_DEVICE void bulk_copy(void*, const void*, unsigned, uint64_t*) {}
REFT_DEVICE void bulk_wait(uint64_t*, unsigned) {}

#endif

// --- a barrier of the whole grid, which must be launched cooperatively. The word keeps its state but for the
// top bit,
//     so that it is zeroed once in its life. Every thread of every block calls both; work in between
//     overlaps.

// Returns what `grid_wait` takes. What the block wrote before is seen by every block after its wait.
REFT_DEVICE unsigned grid_arrive(uint32_t* word) {
  unsigned ticket = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(ticket)
                 : "l"(word), "r"(step)
                 : "memory");
  }
  return ticket;
}

REFT_DEVICE void grid_wait(uint32_t* word, unsigned ticket) {
  if (threadIdx.x == 0) {
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    } while (((ticket ^ now) & 0x80000000u) == 0);
  }
  __syncthreads();
}

}  // namespace reft_kernels

#endif
