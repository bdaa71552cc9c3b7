#include "tiles.h"

#include <cstring>
#include <memory>
#include <new>

namespace reft_kernels::cpu {

namespace {

constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
};

}  // namespace

char* thread_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char, Release> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
    size = bytes;
  }
  return memory.get();
}

void copy_idle_rows(const Edit& edit, const Slots& slots, const RowsIn& from, const RowsOut& to,
                    const ParallelFor& parallel_for) {
  const std::vector<int64_t>& idle = slots.idle();
  const int64_t count = static_cast<int64_t>(idle.size());
  for_ranges(parallel_for, count, static_cast<double>(count * edit.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Place place = place_of(edit, idle[i]);
      std::memcpy(row_at(to, place, edit.h_type), row_at(from, place, edit.h_type),
                  static_cast<size_t>(edit.d * bytes_of(edit.h_type)));
    }
  });
}

}  // namespace reft_kernels::cpu
