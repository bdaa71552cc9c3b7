// Small kernels, one for each thing that device.cuh offers, and each with its faults: what the machine must
// do and see.
#include <cuda_runtime.h>

#include <cmath>
#include <string>
#include <vector>

#include "reft_kernels/device.cuh"

namespace {

using namespace reft_kernels;

// `broken` is the number of the line that is left out or changed; 0: none.

// Sums of 256 numbers: in warps by shuffles, among warps in shared memory. Twice, to reuse the memory.
REFT_KERNEL(256, 1) toy_reduce(const float* in, float* out, int broken) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  const unsigned warp = threadIdx.x / 32;
  for (int round = 0; round < 2; ++round) {
    float sum = in[round * blockDim.x + threadIdx.x];
    for (int mask = 16; mask > 0; mask /= 2) {
      if (broken == 3 && threadIdx.x == 40 && mask == 4) continue;
      sum += shuffle_xor(sum, mask);
    }
    if (threadIdx.x % 32 == 0) sums[warp] = sum;
    if (broken != 1) sync_block();
    float total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += sums[i];
    out[round * blockDim.x + threadIdx.x] = total;
    if (broken == 4 && threadIdx.x == 7) return;
    if (broken == 6 && threadIdx.x < 64) {
      sync_block();
    } else if (broken != 2) {
      sync_block();
    }
    if (broken == 5 && threadIdx.x == 0) sums[blockDim.x / 32] = 0;
  }
}

// Lane 5 tells the others through shared memory, and by a shuffle.
REFT_KERNEL(64, 1) toy_warp(float* out, int broken) {
  float* words = reinterpret_cast<float*>(dynamic_shared());
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 5) words[warp] = 2.0f + warp;
  if (broken != 1) sync_warp();
  out[threadIdx.x] = words[warp] * shuffle(static_cast<float>(lane), 5);
}

// Every block writes a part, and adds up all parts after a barrier; as often as `rounds` says, on one word.
REFT_KERNEL(64, 1) toy_grid(float* parts, float* out, uint32_t* word, int rounds, int broken) {
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 33) parts[blockIdx.x] = static_cast<float>((round + 1) * (blockIdx.x + 1));
    if (broken != 1) {
      const unsigned ticket = grid_arrive(word);
      grid_wait(word, ticket);
    }
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += load_from_other_block(parts + i);
    if (threadIdx.x == 0) out[round * gridDim.x + blockIdx.x] = sum;
    if (broken != 2) {
      const unsigned ticket = grid_arrive(word);
      if (broken == 3 && threadIdx.x == 0) parts[blockIdx.x] = 0;  // between arriving and waiting
      grid_wait(word, ticket);
    }
  }
}

// Copies two tiles by two groups of copies, the second under way while the first is used.
REFT_KERNEL(64, 1) toy_copy(const float* in, float* out, int broken) {
  auto* tiles = reinterpret_cast<float*>(dynamic_shared());  // [2][256]
  for (int tile = 0; tile < 2; ++tile) {
    copy_async_16(tiles + 256 * tile + 4 * threadIdx.x,
                  in + 256 * tile + 4 * threadIdx.x + (broken == 5 ? 1 : 0));
    commit_async();
  }
  for (int tile = 0; tile < 2; ++tile) {
    if (tile == 0 && broken != 1) wait_async<1>();
    if (tile == 1 && broken != 2) wait_async<0>();
    if (broken != 3) sync_block();
    for (int i = 0; i < 4; ++i)
      out[256 * tile + 64 * i + threadIdx.x] = tiles[256 * tile + 255 - 64 * i - threadIdx.x];
    if (broken == 4) copy_async_16(tiles + 4 * threadIdx.x, in + 4 * threadIdx.x);
  }
  if (broken == 4) {
    commit_async();
    wait_async<0>();
  }
}

// d = a b by one warp; a [16, 16] and b [16, 8] row by row.
template <typename T>
REFT_KERNEL(32, 1)
toy_mma(const float* a, const float* b, float* d, int broken) {
  const unsigned g = threadIdx.x / 4, q = threadIdx.x % 4;
  const auto pair = [](float x, float y) {
    const T low = T(x), high = T(y);
    return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
  };
  uint32_t left[4], right[2];
  for (unsigned w = 0; w < 4; ++w) {
    const float* at = a + (g + 8 * (w % 2)) * 16 + 2 * q + 8 * (w / 2);
    left[w] = pair(at[0], at[1]);
  }
  for (unsigned w = 0; w < 2; ++w) {
    const float* at = b + (2 * q + 8 * w) * 8 + g;
    right[w] = pair(at[0], at[8]);
  }
  float sum[4] = {0, 0, 0, 0};
  if (broken != 1 || threadIdx.x != 3) mma_16x8x16<T>(sum, left, right);
  for (unsigned i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = sum[i];
}

// Each block of a cluster writes its rank, and the round, to all.
REFT_KERNEL(32, 1) toy_cluster(float* out, int broken) {
  auto* ranks = reinterpret_cast<float*>(dynamic_shared());
  const unsigned size = 4, rank = cluster_rank();
  if (broken != 1) {
    cluster_arrive();
    cluster_wait();
  }
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x < size) cluster_store(ranks + rank, threadIdx.x, static_cast<float>(10 * round + rank));
    cluster_arrive();
    if (broken != 2) cluster_wait();
    float sum = 0;
    for (unsigned i = 0; i < size; ++i) sum += ranks[i];
    if (threadIdx.x == 0) out[round * gridDim.x + blockIdx.x] = sum;
    if (broken == 2) cluster_wait();
    if (broken == 3) continue;
    cluster_arrive();
    cluster_wait();
  }
  if (broken == 4 && rank == 0) cluster_store(ranks, 1, 0.0f);
}

// Three tiles through two buffers by bulk copies.
REFT_KERNEL(64, 1) toy_bulk(const float* in, float* out, int broken) {
  auto* barriers = reinterpret_cast<uint64_t*>(dynamic_shared());  // [2]
  auto* tiles = reinterpret_cast<float*>(dynamic_shared() + 128);  // [2][256]
  if (threadIdx.x == 0 && broken != 7) {
    bulk_barrier_init(barriers);
    bulk_barrier_init(barriers + 1);
  }
  if (broken != 1) sync_block();
  const auto fetch = [&](unsigned tile) {
    if (threadIdx.x != (broken == 1 ? 63 : 0)) return;
    bulk_expect(barriers + tile % 2, broken == 2 ? 1008 : 1024);
    bulk_copy(tiles + 256 * (tile % 2), in + 256 * tile, 512, barriers + tile % 2);
    if (broken != 3)
      bulk_copy(tiles + 256 * (tile % 2) + 128, in + 256 * tile + 128, 512, barriers + tile % 2);
  };
  fetch(0);
  fetch(1);
  for (unsigned tile = 0; tile < 3; ++tile) {
    if (broken != 4) bulk_wait(barriers + tile % 2, broken == 5 ? 0 : tile / 2);
    for (int i = 0; i < 4; ++i) {
      out[256 * tile + 64 * i + threadIdx.x] = tiles[256 * (tile % 2) + 255 - 64 * i - threadIdx.x];
    }
    if (broken != 6) sync_block();
    if (tile == 0) fetch(2);
  }
}

// Some more blocks than the device has room for.
REFT_KERNEL(32, 1) toy_blocks(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(gridDim.x);
}

template <typename... Parameters, typename... Arguments>
std::string launch(unsigned blocks, unsigned threads, size_t shared, bool cooperative, unsigned cluster,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config;
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.attrs = attributes;
  config.numAttrs = 2;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::vector<float> numbers(size_t count) {
  std::vector<float> v(count);
  for (size_t i = 0; i < count; ++i) v[i] = static_cast<float>((i * 37 + 11) % 64) - 20;
  return v;
}

std::string compare(const std::vector<float>& got, const std::vector<float>& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(got[i] == expected[i])) return "wrong result";
  }
  return "";
}

std::string reduce(int broken) {
  const std::vector<float> in = numbers(512);
  std::vector<float> out(512, NAN), expected(512, 0.0f);
  for (size_t i = 0; i < 512; ++i) {
    for (size_t k = 0; k < 256; ++k) expected[i] += in[i / 256 * 256 + k];
  }
  const std::string wrong =
      launch(1, 256, 8 * sizeof(float), false, 1, toy_reduce, in.data(), out.data(), broken);
  return wrong.empty() ? compare(out, expected) : wrong;
}

std::string warp(int broken) {
  std::vector<float> out(64, NAN), expected(64);
  for (size_t i = 0; i < 64; ++i) expected[i] = 5.0f * (2.0f + static_cast<float>(i / 32));
  const std::string wrong = launch(1, 64, 8, false, 1, toy_warp, out.data(), broken);
  return wrong.empty() ? compare(out, expected) : wrong;
}

std::string grid(int broken) {
  static uint32_t word = 0;  // one for all launches: it comes to rest
  if (broken != 0) word = 0;
  const int rounds = 3, blocks = 5;
  std::vector<float> parts(blocks, NAN), out(blocks * rounds, NAN), expected(blocks * rounds);
  for (int i = 0; i < blocks * rounds; ++i) expected[i] = static_cast<float>((i / blocks + 1) * 15);
  const std::string wrong =
      launch(blocks, 64, 0, broken != 4, 1, toy_grid, parts.data(), out.data(), &word, rounds, broken);
  if (broken == 0 && (word & 0x7fffffff) != 0) return "the word is not at rest";
  return wrong.empty() ? compare(out, expected) : wrong;
}

std::string copy(int broken) {
  alignas(16) static float in[516];
  const std::vector<float> values = numbers(516);
  std::vector<float> out(512, NAN), expected(512);
  for (size_t i = 0; i < 516; ++i) in[i] = values[i];
  for (size_t i = 0; i < 512; ++i) expected[i] = in[i / 256 * 256 + 255 - i % 256];
  const std::string wrong = launch(1, 64, 512 * sizeof(float), false, 1, toy_copy,
                                   static_cast<const float*>(in), out.data(), broken);
  return wrong.empty() ? compare(out, expected) : wrong;
}

template <typename T>
std::string mma(int broken) {
  const std::vector<float> a = numbers(256), b = numbers(128);
  std::vector<float> d(128, NAN), expected(128, 0.0f);
  for (size_t i = 0; i < 128; ++i) {
    for (size_t k = 0; k < 16; ++k) expected[i] += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
  }
  const std::string wrong = launch(1, 32, 0, false, 1, toy_mma<T>, a.data(), b.data(), d.data(), broken);
  return wrong.empty() ? compare(d, expected) : wrong;
}

std::string cluster(int broken) {
  std::vector<float> out(24, NAN), expected(24);
  for (size_t i = 0; i < 24; ++i) expected[i] = i < 12 ? 6 : 46;
  const std::string wrong = launch(12, 32, 16, false, 4, toy_cluster, out.data(), broken);
  return wrong.empty() ? compare(out, expected) : wrong;
}

std::string bulk(int broken) {
  alignas(16) static float in[768];
  const std::vector<float> values = numbers(768);
  std::vector<float> out(768, NAN), expected(768);
  for (size_t i = 0; i < 768; ++i) in[i] = values[i];
  for (size_t i = 0; i < 768; ++i) expected[i] = in[i / 256 * 256 + 255 - i % 256];
  const std::string wrong =
      launch(1, 64, 128 + 2048, false, 1, toy_bulk, static_cast<const float*>(in), out.data(), broken);
  return wrong.empty() ? compare(out, expected) : wrong;
}

std::string blocks() {
  std::vector<float> out(32 * 37, NAN);
  const std::string wrong = launch(37, 32, 0, false, 1, toy_blocks, out.data());
  return wrong.empty() ? compare(out, std::vector<float>(32 * 37, 37.0f)) : wrong;
}

}  // namespace

// Runs a kernel, one line of it broken unless 0, in the order of a seed: "" or what was wrong.
extern "C" [[gnu::visibility("default")]] const char* run_toy(const char* kernel, int broken,
                                                              uint64_t order) {
  static std::string result;
  const std::string name = kernel;
  on_cpu::seed = order;
  on_cpu::device = on_cpu::Device();
  on_cpu::device.multiprocessors = 8;
  result = name == "reduce"         ? reduce(broken)
           : name == "warp"         ? warp(broken)
           : name == "grid"         ? grid(broken)
           : name == "copy"         ? copy(broken)
           : name == "mma_bfloat16" ? mma<BFloat16>(broken)
           : name == "mma_float16"  ? mma<Float16>(broken)
           : name == "cluster"      ? cluster(broken)
           : name == "bulk"         ? bulk(broken)
           : name == "blocks"       ? blocks()
                                    : "no such kernel";
  return result.c_str();
}

// Rounds to half precision and back: by both types, for their test.
extern "C" [[gnu::visibility("default")]] void round_to_half(const float* in, uint16_t* bfloat16,
                                                             uint16_t* float16, float* from_bfloat16,
                                                             float* from_float16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bfloat16[i] = __float2bfloat16_rn(in[i]).bits;
    float16[i] = __float2half_rn(in[i]).bits;
    from_bfloat16[i] = __ushort_as_bfloat16(static_cast<uint16_t>(i));
    from_float16[i] = __ushort_as_half(static_cast<uint16_t>(i));
  }
}
