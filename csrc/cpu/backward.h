// What the two phases of the backward edit share.
#pragma once

#include "tiles.h"

namespace reft_kernels::cpu {

template <typename T>
struct Backward {
  Backward(const EditBackwardParams& params, const Slots& active)
      : p(params),
        edit(params.edit),
        slots(active),
        kernels(kernels_of<T>(edit.h_type)),
        panels(edit, kernels),
        wants_h(p.dh.data != nullptr),
        wants_R(p.dR.data != nullptr),
        wants_W(p.dW.data != nullptr),
        reads_x(wants_W || (wants_R && edit.subtract)),
        needs_gd((wants_h && panels.down_ranks() > 0) || reads_x || p.db.data != nullptr ||
                 p.dc.data != nullptr) {}

  // With `add` into what is there; `at` and `count` are elements.
  void deliver(const WeightGradient& to, int64_t at, int64_t count, const T* value, const T* minus) const {
    kernels.narrow(value, minus, count, to.add, static_cast<char*>(to.data) + at * bytes_of(to.type),
                   to.type);
  }

  const EditBackwardParams& p;
  const Edit& edit;
  const Slots& slots;
  const Kernels<T>& kernels;
  const Panels<T> panels;
  const bool wants_h, wants_R, wants_W;
  const bool reads_x;
  const bool needs_gd;
};

struct BackwardTile {
  int64_t group;
  int64_t end;   // the active slot after it
  int rows = 0;  // 0: none
  int64_t slot[kManyRows];
  int64_t row_number[kManyRows];
  const void* grad[kManyRows];
  const void* x[kManyRows];
  void* dh[kManyRows];
};

// The tile that begins at an active slot and ends before `end` and within its group, of at most `rows` rows.
template <typename T>
void read_tile(const Backward<T>& b, int64_t begin, int64_t end, int64_t rows, BackwardTile& tile) {
  tile.rows = 0;
  if (begin >= end) return;
  const Edit& edit = b.edit;
  tile.group = b.slots.group_of(begin);
  tile.end = std::min({begin + rows, b.slots.group_end(tile.group), end});
  tile.rows = static_cast<int>(tile.end - begin);
  for (int n = 0; n < tile.rows; ++n) {
    const int64_t slot = b.slots[begin + n];
    const Place place = place_of(edit, slot);
    tile.slot[n] = slot;
    tile.row_number[n] = place.batch * edit.length + place.position;
    tile.grad[n] = row_at(b.p.grad, place, edit.h_type);
    if (b.reads_x) tile.x[n] = row_at(b.p.x, b.p.x_is_rows ? Place{0, slot} : place, edit.h_type);
    if (b.wants_h) tile.dh[n] = row_at(b.p.dh, place, edit.h_type);
  }
}

// Row pointers into a strip of kTileRows rows in T.
template <typename T>
struct WideRows {
  void point_to(T* memory, int64_t columns) {
    for (int n = 0; n < kTileRows; ++n) row[n] = memory + n * columns;
  }
  void* row[kTileRows];
};

}  // namespace reft_kernels::cpu
