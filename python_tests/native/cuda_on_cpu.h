// The names of csrc/include/reft_kernels/device.cuh, for a CPU.
#pragma once

#include <type_traits>

#include "machine.h"
#include "numbers.h"

#define REFT_KERNEL(THREADS, BLOCKS_PER_MULTIPROCESSOR) inline void
#define REFT_DEVICE [[gnu::always_inline]] inline
#define REFT_GRID_CONSTANT const

// Objects whose one member reads as a number. Not macros: launch configurations have members of these names.
template <unsigned (*kRead)()>
struct OneDimension {
  struct {
    operator unsigned() const { return kRead(); }
  } x;
};
inline constexpr OneDimension<on_cpu::thread_index> threadIdx{};
inline constexpr OneDimension<on_cpu::block_index> blockIdx{};
inline constexpr OneDimension<on_cpu::block_size> blockDim{};
inline constexpr OneDimension<on_cpu::grid_size> gridDim{};

namespace reft_kernels {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

using on_cpu::bulk_barrier_init;
using on_cpu::bulk_copy;
using on_cpu::bulk_expect;
using on_cpu::bulk_wait;
using on_cpu::cluster_arrive;
using on_cpu::cluster_rank;
using on_cpu::cluster_store;
using on_cpu::cluster_wait;
using on_cpu::commit_async;
using on_cpu::copy_async_16;
using on_cpu::dynamic_shared;
using on_cpu::grid_arrive;
using on_cpu::grid_wait;
using on_cpu::shuffle;
using on_cpu::shuffle_xor;
using on_cpu::sync_block;
using on_cpu::sync_warp;

REFT_DEVICE Vector8 load_8(const void* address) {
  const auto v = on_cpu::load_8(address);
  return {{v.word[0], v.word[1]}};
}

REFT_DEVICE Vector16 load_16(const void* address) {
  const auto v = on_cpu::load_16(address);
  return {{v.word[0], v.word[1], v.word[2], v.word[3]}};
}

REFT_DEVICE void store_8(void* address, const Vector8& v) {
  on_cpu::store_8(address, {{v.word[0], v.word[1]}});
}

REFT_DEVICE void store_16(void* address, const Vector16& v) {
  on_cpu::store_16(address, {{v.word[0], v.word[1], v.word[2], v.word[3]}});
}

REFT_DEVICE float load_from_other_block(const float* address) {
  return *address;
}
REFT_DEVICE double load_from_other_block(const double* address) {
  return *address;
}

// As two words: what the machine exchanges are words.
REFT_DEVICE double shuffle_xor(double value, int mask) {
  const auto bits = __builtin_bit_cast(uint64_t, value);
  const auto exchanged = [mask](uint64_t word) {
    return uint64_t{__float_as_uint(shuffle_xor(__uint_as_float(static_cast<uint32_t>(word)), mask))};
  };
  const uint64_t low = exchanged(bits), high = exchanged(bits >> 32);
  return __builtin_bit_cast(double, high << 32 | low);
}

template <int kPending>
REFT_DEVICE void wait_async() {
  on_cpu::wait_async(kPending);
}

template <typename T>
REFT_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // Copies, so that the kernel's own arrays need no addresses.
  float sum[4] = {d[0], d[1], d[2], d[3]};
  const uint32_t left[4] = {a[0], a[1], a[2], a[3]}, right[2] = {b[0], b[1]};
  const bool bfloat16 = std::is_same<T, BFloat16>::value;
  on_cpu::mma_16x8x16(sum, left, right, bfloat16 ? on_cpu::float_of_bfloat16 : on_cpu::float_of_float16);
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
}

}  // namespace reft_kernels
