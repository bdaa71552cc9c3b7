// A GPU made of fibers: every thread of every resident block is one, all in one thread of the CPU, which goes
// from one to another only where they wait for each other, in an order drawn from a seed.
//
// What it reports, as the message of a failed launch: threads that wait for ever; collectives that the lanes
// of a warp do not reach together; races on memory (races.h); misaligned and misused copies; writes beyond
// the shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#pragma GCC visibility push(default)

namespace on_cpu {

// --- for the host

struct Device {
  int capability = 90;  // 10 * major + minor
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;
  int64_t l2_bytes = 50 << 20;
};

struct Launch {
  unsigned blocks = 1;
  unsigned threads = 32;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

extern Device device;
extern uint64_t seed;          // of the order of the next launch; every launch then takes the next number
extern uint64_t launch_count;  // since the library was loaded

// Runs `kernel` once in every thread; returns "" or what went wrong.
std::string run(const Launch& launch, const std::function<void()>& kernel);

// --- for kernels

[[gnu::const]] unsigned thread_index();
[[gnu::const]] unsigned block_index();
[[gnu::const]] unsigned block_size();
[[gnu::const]] unsigned grid_size();
[[gnu::const]] char* dynamic_shared();
void sync_block();
void sync_warp();
float shuffle_xor(float value, int mask);
float shuffle(float value, int lane);

struct Words2 {
  uint32_t word[2];
};
struct Words4 {
  uint32_t word[4];
};
Words2 load_8(const void* address);
Words4 load_16(const void* address);
void store_8(void* address, Words2 value);
void store_16(void* address, Words4 value);

void copy_async_16(void* shared, const void* global);
void commit_async();
void wait_async(int pending);

// d += a b, the fragments laid out as in device.cuh.
void mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2], float (*to_float)(uint16_t));

unsigned cluster_rank();
void cluster_arrive();
void cluster_wait();
void cluster_store(float* local, unsigned rank, float value);

void bulk_barrier_init(uint64_t* barrier);
void bulk_expect(uint64_t* barrier, unsigned bytes);
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier);
void bulk_wait(uint64_t* barrier, unsigned parity);

unsigned grid_arrive(uint32_t* word);
void grid_wait(uint32_t* word, unsigned ticket);

}  // namespace on_cpu

#pragma GCC visibility pop
