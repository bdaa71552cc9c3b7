#include "races.h"

#include <algorithm>

namespace on_cpu {

void Races::reset(uint32_t threads, uint32_t cluster) {
  threads_ = threads;
  cluster_ = cluster;
  pages_.clear();
  used_ = 0;
  last_ = nullptr;
  copies_.clear();
  seen_by_ = 0;
}

void Races::forget(const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = start; at < start + bytes; at += kCellBytes) cell(at) = Cell();
}

Races::Cell& Races::cell(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (last_ == nullptr || number != last_number_) {
    Page*& page = pages_[number];
    if (page == nullptr) {
      if (used_ == pool_.size()) pool_.push_back(std::make_unique<Page>());
      page = pool_[used_++].get();
      *page = Page();
    }
    last_number_ = number;
    last_ = page;
  }
  return last_->cell[address % kPageBytes / kCellBytes];
}

bool Races::before(const Access& access, const Clock& now) const {
  if (access.thread == now.thread) return true;
  if (now.waited.grid > access.arrived.grid) return true;
  const uint32_t there = access.thread - 1, here = now.thread - 1;
  const uint32_t block = there / threads_, own = here / threads_;
  if (block / cluster_ == own / cluster_ && now.waited.cluster > access.arrived.cluster) return true;
  if (block != own) return false;
  return now.waited.block > access.arrived.block ||
         (there / 32 == here / 32 && now.waited.warp > access.arrived.warp);
}

bool Races::written_before(const Access& write, const Clock& now) const {
  if (write.thread == 0) return true;
  if (write.thread != kCopy) return before(write, now);
  const uint32_t copy = write.arrived.block;
  if (seen_by_ == now.thread && seen_copy_ == copy) return true;
  const auto& all = copies_[copy];
  if (std::none_of(all.begin(), all.end(), [&](const Access& seen) { return before(seen, now); }))
    return false;
  seen_by_ = now.thread;
  seen_copy_ = copy;
  return true;
}

std::string Races::describe(const char* verb, uintptr_t address, const char* other_verb,
                            const Access& other) const {
  std::string who = "a copy that is not waited for";
  if (other.thread != kCopy) {
    who = "thread " + std::to_string((other.thread - 1) % threads_) + " of block " +
          std::to_string((other.thread - 1) / threads_);
  }
  return std::string("race: ") + verb + " " + std::to_string(address) + ", which " + who + " " + other_verb +
         ", with no barrier in between";
}

std::string Races::read(const Clock& now, const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = start & ~uintptr_t{kCellBytes - 1}; at < start + bytes; at += kCellBytes) {
    Cell& c = cell(at);
    if (!written_before(c.write, now)) return describe("reads", at, "writes", c.write);
    Access* slot = nullptr;
    for (Access& r : c.read) {
      if (r.thread == now.thread) slot = &r;
    }
    for (Access& r : c.read) {
      if (slot == nullptr && (r.thread == 0 || before(r, now))) slot = &r;
    }
    if (slot == nullptr) slot = &c.read[random_() % 2];
    *slot = {now.thread, now.arrived};
  }
  return "";
}

std::string Races::write(const Clock& now, const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = start & ~uintptr_t{kCellBytes - 1}; at < start + bytes; at += kCellBytes) {
    Cell& c = cell(at);
    if (!written_before(c.write, now)) return describe("writes", at, "writes", c.write);
    for (const Access& r : c.read) {
      if (r.thread != 0 && !before(r, now)) return describe("writes", at, "reads", r);
    }
    c = Cell{{now.thread, now.arrived}, {}};
  }
  return "";
}

std::string Races::start_copy(const Clock& now, const void* to, size_t bytes, uint32_t* copy) {
  std::string wrong = write(now, to, bytes);
  *copy = static_cast<uint32_t>(copies_.size());
  copies_.emplace_back();
  const auto start = reinterpret_cast<uintptr_t>(to);
  Access by_copy{kCopy, {}};
  by_copy.arrived.block = *copy;
  for (uintptr_t at = start; at < start + bytes; at += kCellBytes) cell(at).write = by_copy;
  return wrong;
}

void Races::see_copy(const Clock& now, uint32_t copy) {
  // Threads that see it later and arrive at a barrier together with one in the list add nothing.
  copies_[copy].push_back({now.thread, now.arrived});
}

}  // namespace on_cpu
