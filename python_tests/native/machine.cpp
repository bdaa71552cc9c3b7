#include "machine.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine_parts.h"

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

Machine* machine = nullptr;
Fiber* current = nullptr;
Races races;

namespace {

constexpr size_t kGuard = 4096;  // bytes around a block's shared memory
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr uint64_t kCanary = 0x6e6f207374616b63;  // at the end of every stack

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

void fiber_main() {
  entered(current->context);
  machine->run_thread();
}

}  // namespace

std::string symbol_of(const void* site) {
  Dl_info info;
  if (site == nullptr || dladdr(site, &info) == 0) return "";
  char command[4096];
  const auto offset = static_cast<const char*>(site) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -Cise '%s' 0x%tx 2>/dev/null", info.dli_fname, offset);
  std::string found;
  if (FILE* pipe = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, pipe)) found += std::string(line, std::strcspn(line, " \n")) + " ";
    pclose(pipe);
  }
  return found;
}

Machine::Machine(const Launch& launch, const std::function<void()>& kernel, uint64_t order)
    : launch_(launch), kernel_(kernel), order_(order), random_(order) {}

Machine::~Machine() {
  for (auto& block : blocks_) ASAN_UNPOISON_MEMORY_REGION(block->memory.data(), block->memory.size());
}

std::string Machine::run() {
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
          : std::min(clusters, std::max(1u, static_cast<unsigned>(device.multiprocessors) / launch_.cluster));
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
  if (error_.empty() && !stacks_hold()) error_ = "a thread of the simulation overflowed its stack";
  return error_;
}

void Machine::wait(const char* what, const void* site) {
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

void Machine::wake_all(std::vector<Fiber*>& fibers) {
  ready_.insert(ready_.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

void Machine::may_yield() {
  if (random_.below(2) == 0) return;
  ready_.push_back(current);
  wait("a turn", nullptr);
}

void Machine::fail(const std::string& what, const void* site) {
  Fiber& me = *current;
  error_ = what + " (thread " + std::to_string(me.thread) + " of block " + std::to_string(me.block->index) +
           ", order " + std::to_string(order_) + ", at " + symbol_of(site) + ")";
  switch_to(me.context, main_);
  __builtin_unreachable();
}

void Machine::run_thread() {
  kernel_();
  Fiber& me = *current;
  check_end();
  me.waits_for = nullptr;
  --unfinished_;
  Cluster& cluster = *me.block->cluster;
  if (++me.block->returned == launch_.threads && ++cluster.returned == launch_.cluster) done_ = &cluster;
  // `run` makes room for the next cluster, or sees that all others wait.
  if (done_ != nullptr || ready_.empty()) switch_to(me.context, main_);
  current = pick();
  switch_to(me.context, current->context);
  __builtin_unreachable();
}

// Of the current thread, and of its block if it is the last to return.
void Machine::check_end() {
  Fiber& me = *current;
  Block& block = *me.block;
  const auto under_way = [](const std::vector<Copy>& copies) { return !copies.empty(); };
  if (under_way(me.uncommitted) || std::any_of(me.groups.begin(), me.groups.end(), under_way)) {
    fail("returns while its asynchronous copies are under way", nullptr);
  }
  for (const Access& store : block.stores_from_cluster) {
    if (!races.before(store, me.clock)) {
      fail("returns before a barrier after another block's cluster_store", nullptr);
    }
  }
  if (block.returned + 1 < launch_.threads) return;
  for (const auto& [address, barrier] : block.bulk) {
    if (under_way(barrier.copies)) fail("the block returns while its bulk copies are under way", nullptr);
  }
  if (!guards_hold(block)) fail("wrote beyond the dynamic shared memory of its block", nullptr);
}

std::string Machine::named(std::string text) const {
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

Fiber* Machine::pick() {
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

bool Machine::starved(const Fiber& fiber) const {
  return fiber.block->index == starved_block_ &&
         (starved_warp_ == ~0u || fiber.thread / kLanes == starved_warp_);
}

void Machine::start_cluster() {
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

void Machine::start_fiber(Block& block, unsigned thread) {
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
  fiber->groups.clear();
  fiber->waits_for = "its start";
  *static_cast<uint64_t*>(fiber->context.stack) = kCanary;
  prepare(fiber->context, fiber_main);
  ++unfinished_;
  ready_.push_back(fiber);
}

void Machine::retire(Cluster* cluster) {
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

void Machine::guard(Block& block) {
  [[maybe_unused]] char* start = block.memory.data();
  [[maybe_unused]] char* end = start + block.memory.size();
  ASAN_POISON_MEMORY_REGION(start, block.shared - start);
  ASAN_POISON_MEMORY_REGION(block.shared + launch_.shared_bytes, end - block.shared - launch_.shared_bytes);
}

bool Machine::guards_hold(Block& block) {
  ASAN_UNPOISON_MEMORY_REGION(block.memory.data(), block.memory.size());
  const char* start = block.memory.data();
  const auto intact = [](char byte) { return byte == static_cast<char>(kPoison); };
  return std::all_of(start, static_cast<const char*>(block.shared), intact) &&
         std::all_of(static_cast<const char*>(block.shared) + launch_.shared_bytes,
                     start + block.memory.size(), intact);
}

std::string Machine::deadlock() const {
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

bool Machine::stacks_hold() const {
  return std::all_of(fibers_.begin(), fibers_.end(), [](const auto& fiber) {
    return *static_cast<const uint64_t*>(fiber->context.stack) == kCanary;
  });
}

std::string run(const Launch& launch, const std::function<void()>& kernel) {
  ++launch_count;
  Machine here(launch, kernel, seed++);
  machine = &here;
  std::string wrong = here.run();
  machine = nullptr;
  return wrong;
}

}  // namespace on_cpu
