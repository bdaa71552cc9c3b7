#include "slots.h"

#include <algorithm>

namespace reft_kernels::cpu {

Slots::Slots(const Edit& edit)
    : in_order_(edit.positions.data == nullptr && edit.group.data == nullptr),
      group_end_(std::max(edit.groups, 1), 0) {
  const int64_t count = edit.rows();
  if (in_order_) {
    std::fill(group_end_.begin(), group_end_.end(), count);
    return;
  }
  std::vector<int32_t> group(count);  // -1: idle
  for (int64_t batch = 0, n = 0; batch < edit.batch; ++batch) {
    for (int64_t slot = 0; slot < edit.slots; ++slot, ++n) {
      const int64_t position = edit.positions.data ? read_integer(edit.positions, batch, slot) : slot;
      const int64_t g = edit.group.data ? read_integer(edit.group, batch, slot) : 0;
      const bool idle = position < 0 || position >= edit.length || g < 0 || g >= edit.groups;
      group[n] = idle ? -1 : static_cast<int32_t>(g);
      if (idle) {
        idle_.push_back(n);
      } else {
        ++group_end_[g];
      }
    }
  }
  std::vector<int64_t> next(group_end_.size(), 0);  // where a group's next slot goes: a counting sort
  for (size_t g = 1; g < group_end_.size(); ++g) {
    next[g] = group_end_[g - 1];
    group_end_[g] += group_end_[g - 1];
  }
  order_.resize(group_end_.back());
  for (int64_t n = 0; n < count; ++n) {
    const int32_t g = group[n];
    if (g >= 0) order_[next[g]++] = n;
  }
}

int64_t Slots::group_of(int64_t i) const {
  return std::upper_bound(group_end_.begin(), group_end_.end(), i) - group_end_.begin();
}

}  // namespace reft_kernels::cpu
