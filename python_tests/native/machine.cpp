#include "machine.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "fiber.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(address)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(address)
#endif

namespace on_cpu {

Device device;
uint64_t seed = 0;
uint64_t launch_count = 0;

namespace {

constexpr unsigned kLanes = 32;
constexpr int kPoison = 0xff;  // bytes of a NaN in every type
constexpr size_t kGuard = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Block;
struct Fiber;

// A copy to shared memory that is under way.
struct Copy {
  char* to;
  const char* from;
  std::vector<char> bytes;  // what stood at `from` when it started
  uint32_t number;          // in the race detector
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  unsigned thread = 0;
  Clock clock;
  const char* waits_for = "";            // null: it has returned
  const void* site = nullptr;            // where it waits
  std::vector<Copy> uncommitted;         // by copy_async_16
  std::deque<std::vector<Copy>> groups;  // committed
};

struct Warp {
  const char* collective = nullptr;  // the one that lanes are in
  std::vector<Fiber*> lanes;         // that have come
  std::array<void*, kLanes> operand{};
};

// mbarrier: one arrival and as many bytes as it announces end a phase.
struct BulkBarrier {
  unsigned phase = 0;
  bool expecting = false;
  int64_t missing = 0;  // bytes announced and not yet asked for
  std::vector<Copy> copies;
  std::vector<uint32_t> last_copies;  // of the phase that ended last
};

struct Block {
  unsigned index = 0;
  std::vector<char> memory;
  char* shared = nullptr;
  std::vector<Warp> warps;
  std::vector<Fiber*> in_sync;
  unsigned returned = 0;
  std::map<const void*, BulkBarrier> bulk;
  std::vector<Fiber*> in_bulk_wait;
  std::vector<Access> stores_from_cluster;
  unsigned cluster_rank = 0;
  struct Cluster* cluster = nullptr;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0;  // threads, at the barrier under way
  unsigned phase = 0;    // barriers that have ended
  std::vector<Fiber*> waiting;
  unsigned returned = 0;  // blocks
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du) {}
  size_t below(size_t count) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<size_t>((static_cast<unsigned __int128>(state_ * 0x9E3779B97F4A7C15u) * count) >> 64);
  }

 private:
  uint64_t state_;
};

std::string symbol_of(const void* site) {
  Dl_info info;
  if (site == nullptr || dladdr(site, &info) == 0) return "";
  char command[4096];
  const auto offset = static_cast<const char*>(site) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -Cise '%s' 0x%tx 2>/dev/null", info.dli_fname, offset);
  std::string found;
  if (FILE* pipe = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, pipe)) found += line;
    pclose(pipe);
  }
  std::replace(found.begin(), found.end(), '\n', ' ');
  return found;
}

// The stacks of all fibers, kept for the next launch.
class Stacks {
 public:
  void* get(size_t index) {
    while (chunks_.size() <= index / kChunk) {
      void* memory = mmap(nullptr, kChunk * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) return nullptr;
      chunks_.push_back(static_cast<char*>(memory));
    }
    return chunks_[index / kChunk] + index % kChunk * kStackBytes;
  }

 private:
  static constexpr size_t kChunk = 256;
  std::vector<char*> chunks_;
};

Stacks stacks;
Races races;
Fiber* current = nullptr;

void fiber_main();

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& kernel, uint64_t order)
      : launch_(launch), kernel_(kernel), order_(order), random_(order) {}

  std::string run() {
    if (launch_.threads == 0 || launch_.threads > 1024 || launch_.threads % kLanes != 0)
      return "bad block size";
    if (launch_.blocks == 0 || launch_.blocks % launch_.cluster != 0)
      return "the grid is not a multiple of the cluster";
    races.reset(launch_.threads, launch_.cluster);
    const unsigned clusters = launch_.blocks / launch_.cluster;
    for (unsigned i = 0; i < clusters; ++i) pending_.push_back(i);
    // As on a GPU, blocks wait for room in no order; only a cooperative launch has all of them at once.
    for (size_t i = clusters; i > 1; --i) std::swap(pending_[i - 1], pending_[random_.below(i)]);
    const unsigned resident =
        launch_.cooperative
            ? clusters
            : std::min(clusters,
                       std::max(1u, static_cast<unsigned>(device.multiprocessors) / launch_.cluster));
    for (unsigned i = 0; i < resident; ++i) start_cluster();
    while ((unfinished_ > 0 || done_ != nullptr) && error_.empty()) {
      if (done_ != nullptr) {
        retire(done_);
        done_ = nullptr;
        if (!pending_.empty()) start_cluster();
        continue;
      }
      if (ready_.empty()) {
        error_ = deadlock();
        break;
      }
      current = pick();
      switch_to(main_, current->context);
    }
    current = nullptr;
    return error_;
  }

  void call_kernel() { kernel_(); }

  // --- waiting

  // Lets others run until someone wakes the fiber.
  void wait(const char* what, const void* site) {
    Fiber& me = *current;
    me.waits_for = what;
    me.site = site;
    if (ready_.empty()) {  // `run` says that it is a deadlock
      switch_to(me.context, main_);
      return;
    }
    Fiber* next = pick();
    current = next;
    if (next != &me) switch_to(me.context, next->context);
  }

  void wake(Fiber* fiber) { ready_.push_back(fiber); }

  void wake_all(std::vector<Fiber*>& fibers) {
    for (Fiber* fiber : fibers) wake(fiber);
    fibers.clear();
  }

  // The last to come of a collective may go on at once, or after others.
  void yield() {
    wake(current);
    wait("a turn", nullptr);
  }

  [[noreturn]] void fail(const std::string& what, const void* site) {
    Fiber& me = *current;
    error_ = what + " (thread " + std::to_string(me.thread) + " of block " + std::to_string(me.block->index) +
             ", order " + std::to_string(order_) + ", at " + symbol_of(site) + ")";
    switch_to(me.context, main_);
    __builtin_unreachable();
  }

  void check(const std::string& wrong, const void* site) {
    if (__builtin_expect(!wrong.empty(), 0)) fail(where(wrong), site);
  }

  // --- the end of a thread

  [[noreturn]] void returned() {
    Fiber& me = *current;
    Block& block = *me.block;
    if (!me.uncommitted.empty() ||
        std::any_of(me.groups.begin(), me.groups.end(), [](auto& g) { return !g.empty(); })) {
      fail("returns while its asynchronous copies are under way", nullptr);
    }
    for (const Access& store : block.stores_from_cluster) {
      if (!races.before(store, me.clock))
        fail("returns before a barrier after another block's cluster_store", nullptr);
    }
    me.waits_for = nullptr;
    --unfinished_;
    if (++block.returned == launch_.threads) {
      for (auto& [address, barrier] : block.bulk) {
        if (!barrier.copies.empty()) fail("the block returns while its bulk copies are under way", nullptr);
      }
      if (!guards_hold(block)) fail("wrote beyond the dynamic shared memory of its block", nullptr);
      if (++block.cluster->returned == launch_.cluster) done_ = block.cluster;
    }
    if (done_ != nullptr || ready_.empty())
      switch_to(me.context, main_);  // `run` makes room for the next cluster
    current = pick();
    switch_to(me.context, current->context);
    __builtin_unreachable();
  }

  const Launch& launch() const { return launch_; }
  size_t random(size_t count) { return random_.below(count); }

  std::vector<Fiber*> at_grid_barrier;

  std::string where(std::string text) const {
    // Addresses within shared memory are named as such.
    size_t start = text.find_first_of("0123456789");
    if (start == std::string::npos) return text;
    const size_t end = text.find_first_not_of("0123456789", start);
    const auto address = static_cast<uintptr_t>(std::stoull(text.substr(start, end - start)));
    for (const auto& cluster : clusters_) {
      for (const Block* block : cluster->blocks) {
        const auto base = reinterpret_cast<uintptr_t>(block->shared);
        if (address >= base && address < base + launch_.shared_bytes) {
          return text.replace(start, end - start,
                              "byte " + std::to_string(address - base) + " of the shared memory of block " +
                                  std::to_string(block->index));
        }
      }
    }
    char hexadecimal[40];
    std::snprintf(hexadecimal, sizeof hexadecimal, "global memory at 0x%zx", static_cast<size_t>(address));
    return text.replace(start, end - start, hexadecimal);
  }

 private:
  Fiber* pick() {
    // Three kinds of order: at random; the latest first, so that some run far ahead; at random, but for a
    // warp or a block, another from time to time, that runs only when nothing else can.
    size_t i = ready_.size() - 1;
    const uint64_t kind = order_ % 3;
    if (kind != 1) i = random_.below(ready_.size());
    if (kind == 2) {
      if (random_.below(256) == 0) {
        starved_block_ = static_cast<unsigned>(random_.below(launch_.blocks));
        starved_warp_ =
            random_.below(2) == 0 ? ~0u : static_cast<unsigned>(random_.below(launch_.threads / kLanes));
      }
      for (int attempt = 0; attempt < 8 && starved(*ready_[i]); ++attempt) i = random_.below(ready_.size());
    }
    Fiber* fiber = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    return fiber;
  }

  bool starved(const Fiber& fiber) const {
    return fiber.block->index == starved_block_ &&
           (starved_warp_ == ~0u || fiber.thread / kLanes == starved_warp_);
  }

  void start_cluster() {
    const unsigned index = pending_.back();
    pending_.pop_back();
    clusters_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_.back();
    for (unsigned rank = 0; rank < launch_.cluster; ++rank) {
      blocks_.push_back(std::make_unique<Block>());
      Block& block = *blocks_.back();
      block.index = index * launch_.cluster + rank;
      block.cluster_rank = rank;
      block.cluster = &cluster;
      block.warps.resize(launch_.threads / kLanes);
      // A multiple of 128, as is promised, and of nothing larger.
      block.memory.assign(launch_.shared_bytes + 2 * kGuard + 256, static_cast<char>(kPoison));
      auto start = reinterpret_cast<uintptr_t>(block.memory.data()) + kGuard;
      start = (start + 255) / 256 * 256 - 128;
      if (start < reinterpret_cast<uintptr_t>(block.memory.data()) + kGuard) start += 256;
      block.shared = reinterpret_cast<char*>(start);
      races.forget(block.shared, launch_.shared_bytes);
      cluster.blocks.push_back(&block);
      guard(block);
      for (unsigned thread = 0; thread < launch_.threads; ++thread) start_fiber(block, thread);
    }
  }

  void start_fiber(Block& block, unsigned thread) {
    Fiber* fiber;
    if (free_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>());
      fiber = fibers_.back().get();
      fiber->context.stack = stacks.get(fibers_.size() - 1);
      fiber->context.bytes = kStackBytes;
    } else {
      fiber = free_.back();
      free_.pop_back();
    }
    fiber->block = &block;
    fiber->thread = thread;
    fiber->clock = Clock();
    fiber->clock.thread = block.index * launch_.threads + thread + 1;
    fiber->waits_for = "its start";
    *static_cast<uint64_t*>(fiber->context.stack) = kCanary;
    prepare(fiber->context, fiber_main);
    ++unfinished_;
    ready_.push_back(fiber);
  }

  void retire(Cluster* cluster) {
    for (auto& fiber : fibers_) {
      if (fiber->block != nullptr && fiber->block->cluster == cluster) {
        free_.push_back(fiber.get());
        fiber->block = nullptr;
      }
    }
    for (auto it = blocks_.begin(); it != blocks_.end();)
      it = (*it)->cluster == cluster ? blocks_.erase(it) : it + 1;
    for (auto it = clusters_.begin(); it != clusters_.end();)
      it = it->get() == cluster ? clusters_.erase(it) : it + 1;
  }

  void guard(Block& block) {
    [[maybe_unused]] char* start = block.memory.data();
    [[maybe_unused]] char* end = start + block.memory.size();
    ASAN_POISON_MEMORY_REGION(start, block.shared - start);
    ASAN_POISON_MEMORY_REGION(block.shared + launch_.shared_bytes, end - block.shared - launch_.shared_bytes);
  }

  bool guards_hold(Block& block) {
    ASAN_UNPOISON_MEMORY_REGION(block.memory.data(), block.memory.size());
    const char* start = block.memory.data();
    const auto intact = [](char byte) { return byte == static_cast<char>(kPoison); };
    return std::all_of(start, static_cast<const char*>(block.shared), intact) &&
           std::all_of(static_cast<const char*>(block.shared) + launch_.shared_bytes,
                       start + block.memory.size(), intact);
  }

  std::string deadlock() const {
    std::map<std::string, std::pair<unsigned, const Fiber*>> waiting;
    unsigned done = 0;
    for (const auto& fiber : fibers_) {
      if (fiber->block == nullptr) continue;
      if (fiber->waits_for == nullptr) {
        ++done;
        continue;
      }
      auto& [count, first] =
          waiting[fiber->waits_for + std::string(" of block ") + std::to_string(fiber->block->index)];
      if (count++ == 0) first = fiber.get();
    }
    std::string text = "deadlock (order " + std::to_string(order_) + "):";
    size_t shown = 0;
    for (const auto& [what, who] : waiting) {
      if (++shown > 4) break;
      text += " " + std::to_string(who.first) + " threads wait for " + what + ", thread " +
              std::to_string(who.second->thread) + " among them, at " + symbol_of(who.second->site) + ";";
    }
    return text + " " + std::to_string(done) + " threads of these blocks have returned";
  }

 public:
  static constexpr uint64_t kCanary = 0x6e6f207374616b63;

  // To be called when `run` has ended, however it ended.
  ~Machine() {
    for (auto& block : blocks_) ASAN_UNPOISON_MEMORY_REGION(block->memory.data(), block->memory.size());
  }

  bool stacks_hold() const {
    return std::all_of(fibers_.begin(), fibers_.end(), [](const auto& fiber) {
      return *static_cast<const uint64_t*>(fiber->context.stack) == kCanary;
    });
  }

 private:
  const Launch launch_;
  const std::function<void()>& kernel_;
  const uint64_t order_;
  Random random_;
  Context main_;
  std::string error_;
  std::vector<unsigned> pending_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_, free_;
  size_t unfinished_ = 0;
  unsigned starved_block_ = ~0u, starved_warp_ = 0;
  Cluster* done_ = nullptr;  // all of whose threads have returned
};

Machine* machine = nullptr;

void fiber_main() {
  entered(current->context);
  machine->call_kernel();
  machine->returned();
}

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
  if (machine->random(2) == 0) machine->yield();
}

void sync_block(const void* site) {
  Fiber& me = *current;
  std::vector<Fiber*>& all = me.block->in_sync;
  all.push_back(&me);
  if (all.size() < machine->launch().threads) return machine->wait("sync_block", site);
  for (Fiber* fiber : all) {
    ++fiber->clock.arrived.block;
    ++fiber->clock.waited.block;
  }
  all.pop_back();
  machine->wake_all(all);
  if (machine->random(2) == 0) machine->yield();
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

std::string run(const Launch& launch, const std::function<void()>& kernel) {
  ++launch_count;
  Machine here(launch, kernel, seed++);
  machine = &here;
  std::string wrong = here.run();
  machine = nullptr;
  if (wrong.empty() && !here.stacks_hold()) wrong = "a thread of the simulation overflowed its stack";
  return wrong;
}

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
