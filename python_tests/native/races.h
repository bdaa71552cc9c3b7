// Finds accesses of two threads to the same memory, one of them a write, that no barrier puts in an order.
//
// The kernels are compiled with -fsanitize=thread, which has the compiler call a function at every access;
// those functions are here, in place of ThreadSanitizer's. Barriers are the only order between threads, and
// each joins all threads of a warp, block, cluster or grid: an access comes before what another thread does
// now if that thread has waited for a barrier, common to the two, at which the first had not yet arrived when
// it made the access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace on_cpu {

// How many barriers of each kind a thread has passed.
struct Epoch {
  uint32_t warp = 0;
  uint32_t block = 0;
  uint16_t cluster = 0;
  uint16_t grid = 0;
};

struct Clock {
  uint32_t thread = 0;  // in the grid, counted from 1
  Epoch arrived;
  Epoch waited;
};

struct Access {
  uint32_t thread = 0;  // 0: none
  Epoch arrived;
};

class Races {
 public:
  // Of a launch of so many threads a block and blocks a cluster.
  void reset(uint32_t threads, uint32_t cluster);

  // The memory is another block's from now on.
  void forget(const void* address, size_t bytes);

  // Returns "" or what is wrong with an access that a thread makes now.
  std::string read(const Clock& now, const void* address, size_t bytes);
  std::string write(const Clock& now, const void* address, size_t bytes);

  // A copy that a thread starts now, and that others see who wait for it, or meet at a barrier one who did.
  std::string start_copy(const Clock& now, const void* to, size_t bytes, uint32_t* copy);
  void see_copy(const Clock& now, uint32_t copy);

  bool before(const Access& access, const Clock& now) const;

 private:
  struct Cell {
    Access write;  // thread kCopy: by the copy whose number is arrived.block
    Access read[2];
  };
  static constexpr uint32_t kCopy = 0xffffffff;
  static constexpr unsigned kCellBytes = 2, kPageBytes = 4096;
  struct Page {
    Cell cell[kPageBytes / kCellBytes];
  };

  Cell& cell(uintptr_t address);
  bool written_before(const Access& write, const Clock& now) const;
  std::string describe(const char* verb, uintptr_t address, const char* other_verb,
                       const Access& other) const;

  uint32_t threads_ = 32, cluster_ = 1;
  std::unordered_map<uintptr_t, Page*> pages_;
  std::vector<std::unique_ptr<Page>> pool_;
  size_t used_ = 0;
  uintptr_t last_number_ = 0;
  Page* last_ = nullptr;
  std::vector<std::vector<Access>> copies_;       // who has waited for each
  mutable uint32_t seen_copy_ = 0, seen_by_ = 0;  // a copy that a thread was found to have seen
  std::minstd_rand random_;
};

}  // namespace on_cpu
