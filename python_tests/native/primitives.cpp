// The functions that kernels call, and those that the compiler calls at every access of theirs.
#include <algorithm>
#include <cstring>

#include "machine_parts.h"

namespace on_cpu {

namespace {

// --- collectives

struct Shuffle {
  float value;
  int argument;  // a mask or a lane
  float result;
};

struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

Warp& warp_of(const Fiber& fiber) {
  return fiber.block->warps[fiber.thread / kLanes];
}

template <typename Finish>
void warp_collective(const char* what, void* operand, const void* site, const Finish& finish) {
  Fiber& me = *current;
  Warp& warp = warp_of(me);
  if (warp.lanes.empty()) {
    warp.collective = what;
  } else if (warp.collective != what) {
    machine->fail(std::string("reaches ") + what + " while other lanes of its warp are in " + warp.collective,
                  site);
  }
  warp.operand[me.thread % kLanes] = operand;
  warp.lanes.push_back(&me);
  if (warp.lanes.size() < kLanes) return machine->wait(what, site);
  finish(warp);
  warp.lanes.pop_back();
  machine->wake_all(warp.lanes);
  machine->may_yield();
}

// Whether two places are one in the source: a compiler may have copied it.
bool same_source(const void* one, const void* other) {
  static std::map<std::pair<const void*, const void*>, bool> known;
  if (one == other) return true;
  const auto [place, is_new] = known.try_emplace({one, other});
  if (is_new) place->second = symbol_of(one) == symbol_of(other);
  return place->second;
}

void sync_block(const void* site) {
  Fiber& me = *current;
  std::vector<Fiber*>& all = me.block->in_sync;
  me.site = site;
  if (!all.empty() && !same_source(all.front()->site, site)) {
    machine->fail(
        "reaches a sync_block while others of its block are at that of " + symbol_of(all.front()->site),
        site);
  }
  all.push_back(&me);
  if (all.size() < machine->launch().threads) return machine->wait("sync_block", site);
  for (Fiber* fiber : all) {
    ++fiber->clock.arrived.block;
    ++fiber->clock.waited.block;
  }
  all.pop_back();
  machine->wake_all(all);
  machine->may_yield();
}

float shuffled(const char* what, float value, int argument, const void* site) {
  Shuffle own{value, argument, 0};
  warp_collective(what, &own, site, [&](Warp& warp) {
    const bool by_mask = what[7] == '_';
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      auto& to = *static_cast<Shuffle*>(warp.operand[lane]);
      if (by_mask && to.argument != argument)
        machine->fail("shuffle_xor with another mask than other lanes", site);
      const unsigned from =
          by_mask ? lane ^ static_cast<unsigned>(to.argument) : static_cast<unsigned>(to.argument);
      to.result = static_cast<Shuffle*>(warp.operand[from % kLanes])->value;
    }
  });
  return own.result;
}

// --- memory

void check_aligned(const void* address, size_t bytes, const void* site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    machine->fail("an access of " + std::to_string(bytes) + " bytes that is not aligned to them", site);
  }
}

void check_shared(const void* address, size_t bytes, const void* site) {
  const char* start = current->block->shared;
  const char* from = static_cast<const char*>(address);
  if (from < start || from + bytes > start + machine->launch().shared_bytes) {
    machine->fail("not within the shared memory of its block", site);
  }
}

void on_access(const void* address, size_t bytes, bool write, const void* site) {
  Fiber* me = current;
  if (me == nullptr) return;  // the host's code
  const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(me->context.stack);
  if (offset < me->context.bytes) return;
  machine->check(write ? races.write(me->clock, address, bytes) : races.read(me->clock, address, bytes),
                 site);
}

Copy start_copy(void* shared, const void* global, size_t bytes, const void* site) {
  if (bytes == 0 || bytes % 16 != 0) machine->fail("a copy of " + std::to_string(bytes) + " bytes", site);
  check_aligned(shared, 16, site);
  check_aligned(global, 16, site);
  check_shared(shared, bytes, site);
  const char* from = static_cast<const char*>(global);
  Copy copy{static_cast<char*>(shared), from, std::vector<char>(from, from + bytes), 0};
  on_access(global, bytes, false, site);
  machine->check(races.start_copy(current->clock, shared, bytes, &copy.number), site);
  std::memset(shared, kPoison, bytes);
  return copy;
}

void land(const Copy& copy, const void* site) {
  if (std::memcmp(copy.from, copy.bytes.data(), copy.bytes.size()) != 0) {
    machine->fail("what a copy reads was written before the copy was waited for", site);
  }
  std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
}

BulkBarrier& bulk_barrier(uint64_t* barrier, const void* site) {
  if (device.capability < 90) machine->fail("no bulk copies below compute capability 9.0", site);
  on_access(barrier, 8, false, site);
  const auto found = current->block->bulk.find(barrier);
  if (found == current->block->bulk.end())
    machine->fail("a barrier of bulk copies that was not initialised", site);
  return found->second;
}

// Whether the phase of that parity has ended, which it does now if it can.
bool phase_ended(BulkBarrier& barrier, unsigned parity, const void* site) {
  if ((barrier.phase & 1) != parity) return true;
  if (!barrier.expecting || barrier.missing != 0) return false;
  barrier.last_copies.clear();
  for (const Copy& copy : barrier.copies) {
    land(copy, site);
    barrier.last_copies.push_back(copy.number);
  }
  barrier.copies.clear();
  barrier.expecting = false;
  ++barrier.phase;
  return true;
}

void check_cluster(const void* site) {
  if (device.capability < 90) machine->fail("no clusters below compute capability 9.0", site);
}

}  // namespace

unsigned thread_index() {
  return current->thread;
}
unsigned block_index() {
  return current->block->index;
}
unsigned block_size() {
  return machine->launch().threads;
}
unsigned grid_size() {
  return machine->launch().blocks;
}
char* dynamic_shared() {
  return current->block->shared;
}

void sync_block() {
  sync_block(__builtin_return_address(0));
}

void sync_warp() {
  warp_collective("sync_warp", nullptr, __builtin_return_address(0), [](Warp& warp) {
    for (Fiber* fiber : warp.lanes) {
      ++fiber->clock.arrived.warp;
      ++fiber->clock.waited.warp;
    }
  });
}

float shuffle_xor(float value, int mask) {
  return shuffled("shuffle_xor", value, mask, __builtin_return_address(0));
}
float shuffle(float value, int lane) {
  return shuffled("shuffle", value, lane, __builtin_return_address(0));
}

Words2 load_8(const void* address) {
  check_aligned(address, 8, __builtin_return_address(0));
  on_access(address, 8, false, __builtin_return_address(0));
  Words2 value;
  std::memcpy(&value, address, 8);
  return value;
}

Words4 load_16(const void* address) {
  check_aligned(address, 16, __builtin_return_address(0));
  on_access(address, 16, false, __builtin_return_address(0));
  Words4 value;
  std::memcpy(&value, address, 16);
  return value;
}

void store_8(void* address, Words2 value) {
  check_aligned(address, 8, __builtin_return_address(0));
  on_access(address, 8, true, __builtin_return_address(0));
  std::memcpy(address, &value, 8);
}

void store_16(void* address, Words4 value) {
  check_aligned(address, 16, __builtin_return_address(0));
  on_access(address, 16, true, __builtin_return_address(0));
  std::memcpy(address, &value, 16);
}

void copy_async_16(void* shared, const void* global) {
  current->uncommitted.push_back(start_copy(shared, global, 16, __builtin_return_address(0)));
}

void commit_async() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void wait_async(int pending) {
  auto& groups = current->groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      land(copy, __builtin_return_address(0));
      races.see_copy(current->clock, copy.number);
    }
  }
}

void mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2], float (*to_float)(uint16_t)) {
  Fragments own{d, a, b};
  warp_collective("mma", &own, __builtin_return_address(0), [&](Warp& warp) {
    float left[16][16], right[16][8];
    const auto half = [&](uint32_t word, unsigned i) {
      return to_float(static_cast<uint16_t>(word >> (16 * i)));
    };
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const auto& f = *static_cast<Fragments*>(warp.operand[lane]);
      const unsigned g = lane / 4, q = lane % 4;
      for (unsigned i = 0; i < 2; ++i) {
        for (unsigned w = 0; w < 4; ++w) left[g + 8 * (w % 2)][2 * q + i + 8 * (w / 2)] = half(f.a[w], i);
        for (unsigned w = 0; w < 2; ++w) right[2 * q + i + 8 * w][g] = half(f.b[w], i);
      }
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const auto& f = *static_cast<Fragments*>(warp.operand[lane]);
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (unsigned k = 0; k < 16; ++k) f.d[i] += left[row][k] * right[k][column];
      }
    }
  });
}

unsigned cluster_rank() {
  check_cluster(__builtin_return_address(0));
  return current->block->cluster_rank;
}

void cluster_arrive() {
  const void* site = __builtin_return_address(0);
  check_cluster(site);
  Fiber& me = *current;
  if (me.clock.arrived.cluster != me.clock.waited.cluster) machine->fail("cluster_arrive twice", site);
  ++me.clock.arrived.cluster;
  Cluster& cluster = *me.block->cluster;
  if (++cluster.arrived < machine->launch().threads * machine->launch().cluster) return;
  cluster.arrived = 0;
  ++cluster.phase;
  machine->wake_all(cluster.waiting);
}

void cluster_wait() {
  const void* site = __builtin_return_address(0);
  check_cluster(site);
  Fiber& me = *current;
  if (me.clock.arrived.cluster == me.clock.waited.cluster)
    machine->fail("cluster_wait without cluster_arrive", site);
  while (me.block->cluster->phase < me.clock.arrived.cluster) {
    me.block->cluster->waiting.push_back(&me);
    machine->wait("cluster_wait", site);
  }
  me.clock.waited.cluster = me.clock.arrived.cluster;
}

void cluster_store(float* local, unsigned rank, float value) {
  const void* site = __builtin_return_address(0);
  check_cluster(site);
  Fiber& me = *current;
  check_aligned(local, 4, site);
  check_shared(local, 4, site);
  if (rank >= machine->launch().cluster) machine->fail("a rank beyond the cluster", site);
  Block& other = *me.block->cluster->blocks[rank];
  if (&other != me.block) {
    if (me.clock.waited.cluster == 0)
      machine->fail("cluster_store to a block that may not have started", site);
    auto& stores = other.stores_from_cluster;
    if (stores.empty() || stores.back().thread != me.clock.thread ||
        stores.back().arrived.cluster != me.clock.arrived.cluster) {
      stores.push_back({me.clock.thread, me.clock.arrived});
    }
  }
  float* there = reinterpret_cast<float*>(other.shared + (reinterpret_cast<char*>(local) - me.block->shared));
  on_access(there, 4, true, site);
  *there = value;
}

void bulk_barrier_init(uint64_t* barrier) {
  const void* site = __builtin_return_address(0);
  check_aligned(barrier, 8, site);
  check_shared(barrier, 8, site);
  on_access(barrier, 8, true, site);
  current->block->bulk[barrier] = BulkBarrier();
}

void bulk_expect(uint64_t* address, unsigned bytes) {
  const void* site = __builtin_return_address(0);
  BulkBarrier& barrier = bulk_barrier(address, site);
  if (barrier.expecting) machine->fail("bulk_expect again before the phase has been waited for", site);
  barrier.expecting = true;
  barrier.missing += bytes;
  machine->wake_all(current->block->in_bulk_wait);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* address) {
  const void* site = __builtin_return_address(0);
  BulkBarrier& barrier = bulk_barrier(address, site);
  barrier.copies.push_back(start_copy(shared, global, bytes, site));
  barrier.missing -= bytes;
  if (barrier.expecting && barrier.missing < 0) machine->fail("copies more bytes than are expected", site);
  machine->wake_all(current->block->in_bulk_wait);
}

void bulk_wait(uint64_t* address, unsigned parity) {
  const void* site = __builtin_return_address(0);
  BulkBarrier& barrier = bulk_barrier(address, site);
  while (!phase_ended(barrier, parity, site)) {
    current->block->in_bulk_wait.push_back(current);
    machine->wait("bulk_wait", site);
  }
  for (const uint32_t copy : barrier.last_copies) races.see_copy(current->clock, copy);
}

unsigned grid_arrive(uint32_t* word) {
  const void* site = __builtin_return_address(0);
  if (!machine->launch().cooperative)
    machine->fail("a grid barrier in a launch that is not cooperative", site);
  Fiber& me = *current;
  sync_block(site);
  ++me.clock.arrived.grid;
  unsigned ticket = 0;
  if (me.thread == 0) {
    ticket = *word;
    *word += me.block->index == 0 ? 0x80000000u - (machine->launch().blocks - 1) : 1u;
    machine->wake_all(machine->at_grid_barrier);
  }
  return ticket;
}

void grid_wait(uint32_t* word, unsigned ticket) {
  const void* site = __builtin_return_address(0);
  Fiber& me = *current;
  while (me.thread == 0 && ((ticket ^ *word) & 0x80000000u) == 0) {
    machine->at_grid_barrier.push_back(&me);
    machine->wait("grid_wait", site);
  }
  sync_block(site);
  me.clock.waited.grid = me.clock.arrived.grid;
}

}  // namespace on_cpu

// What the compiler calls at memory accesses.
#pragma GCC visibility push(default)
#define ON_ACCESS(NAME, BYTES, WRITE)                                      \
  extern "C" void __tsan_##NAME(void* address) {                           \
    on_cpu::on_access(address, BYTES, WRITE, __builtin_return_address(0)); \
  }
ON_ACCESS(read1, 1, false)
ON_ACCESS(read2, 2, false)
ON_ACCESS(read4, 4, false)
ON_ACCESS(read8, 8, false)
ON_ACCESS(read16, 16, false)
ON_ACCESS(write1, 1, true)
ON_ACCESS(write2, 2, true)
ON_ACCESS(write4, 4, true)
ON_ACCESS(write8, 8, true)
ON_ACCESS(write16, 16, true)
ON_ACCESS(unaligned_read2, 2, false)
ON_ACCESS(unaligned_read4, 4, false)
ON_ACCESS(unaligned_read8, 8, false)
ON_ACCESS(unaligned_read16, 16, false)
ON_ACCESS(unaligned_write2, 2, true)
ON_ACCESS(unaligned_write4, 4, true)
ON_ACCESS(unaligned_write8, 8, true)
ON_ACCESS(unaligned_write16, 16, true)
extern "C" {
void __tsan_read_range(void* address, size_t bytes) {
  on_cpu::on_access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  on_cpu::on_access(address, bytes, true, __builtin_return_address(0));
}
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#pragma GCC visibility pop
