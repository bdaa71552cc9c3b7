// What machine.cpp and primitives.cpp share: the state of a launch.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"
#include "races.h"

namespace on_cpu {

constexpr unsigned kLanes = 32;
constexpr int kPoison = 0xff;  // bytes of a NaN in every type

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
  const void* site = nullptr;            // in the code: where it waits
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

// The source lines of a place in the code.
std::string symbol_of(const void* site);

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& kernel, uint64_t order);
  ~Machine();

  // Returns "" or what went wrong.
  std::string run();

  // What a fiber is: the kernel, and what is checked at its end.
  [[noreturn]] void run_thread();

  // Lets others run until someone wakes the current fiber.
  void wait(const char* what, const void* site);
  void wake_all(std::vector<Fiber*>& fibers);

  // The last to come of a collective may go on at once, or after others.
  void may_yield();

  // Ends the launch. `site` is where in the kernel.
  [[noreturn]] void fail(const std::string& what, const void* site);

  // The same if the race detector found something.
  void check(const std::string& wrong, const void* site) {
    if (__builtin_expect(!wrong.empty(), 0)) fail(named(wrong), site);
  }

  const Launch& launch() const { return launch_; }

  std::vector<Fiber*> at_grid_barrier;

 private:
  Fiber* pick();
  bool starved(const Fiber& fiber) const;
  void start_cluster();
  void start_fiber(Block& block, unsigned thread);
  void retire(Cluster* cluster);
  void guard(Block& block);
  bool guards_hold(Block& block);
  bool stacks_hold() const;
  std::string deadlock() const;
  std::string named(std::string text) const;
  void check_end();

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

// Of the launch under way; null where there is none.
extern Machine* machine;
extern Fiber* current;
extern Races races;

}  // namespace on_cpu
