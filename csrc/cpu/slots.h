// Which rows an edit touches, in the order in which they are worked on.
#pragma once

#include <vector>

#include "reft_kernels/edit_params.h"

namespace reft_kernels::cpu {

// A row of a [batch, length, d] tensor.
struct Place {
  int64_t batch;
  int64_t position;
};

inline int64_t read_integer(const SlotTensor& tensor, int64_t batch, int64_t slot) {
  const int64_t at = batch * tensor.stride[0] + slot * tensor.stride[1];
  return tensor.type == DType::kInt32 ? static_cast<const int32_t*>(tensor.data)[at]
                                      : static_cast<const int64_t*>(tensor.data)[at];
}

inline Place place_of(const Edit& edit, int64_t slot) {
  const int64_t batch = slot / edit.slots, in_batch = slot % edit.slots;
  if (edit.positions.data == nullptr) return {batch, in_batch};
  return {batch, read_integer(edit.positions, batch, in_batch)};
}

inline const char* row_at(const RowsIn& rows, Place place, DType type) {
  return static_cast<const char*>(rows.data) +
         (place.batch * rows.stride[0] + place.position * rows.stride[1]) * bytes_of(type);
}

inline char* row_at(const RowsOut& rows, Place place, DType type) {
  return static_cast<char*>(rows.data) +
         (place.batch * rows.stride[0] + place.position * rows.stride[1]) * bytes_of(type);
}

// The slots that are not idle, those of a group together and in their own order.
class Slots {
 public:
  explicit Slots(const Edit& edit);

  int64_t active() const { return group_end_.back(); }
  int64_t operator[](int64_t i) const { return in_order_ ? i : order_[i]; }
  const std::vector<int64_t>& idle() const { return idle_; }

  int64_t group_begin(int64_t g) const { return g == 0 ? 0 : group_end_[g - 1]; }
  int64_t group_end(int64_t g) const { return group_end_[g]; }
  // The group of active slot i.
  int64_t group_of(int64_t i) const;

 private:
  bool in_order_;
  std::vector<int64_t> order_;
  std::vector<int64_t> idle_;
  std::vector<int64_t> group_end_;
};

}  // namespace reft_kernels::cpu
