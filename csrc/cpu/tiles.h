// What the forward and the backward driver share: how an edit is cut up, panels of weights, and scratch
// memory.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "reft_kernels/launch.h"
#include "slots.h"

namespace reft_kernels::cpu {

constexpr int kTileRows = 32;       // rows whose strips share a first-level cache, at most
constexpr int kManyRows = 256;      // rows that share a panel, at most
constexpr int64_t kRowsAtOnce = 4;  // rows that a thread takes at least, where there are as many
constexpr int kColumnsAtOnce = 32;  // columns that a thread takes at least: whole cache lines

// Aligned memory of this thread's own, kept for the next call. A later call may move it.
char* thread_scratch(int64_t bytes);

// Cuts thread_scratch into arrays: `take` is called twice for each in the same order, first to count the
// bytes.
class Scratch {
 public:
  template <typename Layout>
  explicit Scratch(Layout& layout) {
    layout.place(*this);
    base_ = thread_scratch(used_);
    used_ = 0;
    layout.place(*this);
  }

  template <typename E>
  void take(E*& array, int64_t count) {
    array = base_ == nullptr ? nullptr : reinterpret_cast<E*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

// The columns of a strip: such that `ranks` of them in T fill about so many bytes, and that d is cut evenly.
template <typename T>
int strip_columns(int64_t ranks, int64_t d, int64_t bytes, int64_t least) {
  const int64_t fit =
      std::max(bytes / (std::max<int64_t>(ranks, 1) * static_cast<int64_t>(sizeof(T))), least);
  const int64_t strips = std::max<int64_t>((d + fit - 1) / fit, 1);
  return static_cast<int>(((d + strips - 1) / strips + 63) / 64 * 64);
}

// The rows of a tile: such that they fill about so many bytes.
inline int64_t tile_rows(int64_t row_bytes, int64_t bytes) {
  return std::clamp<int64_t>(bytes / std::max<int64_t>(row_bytes, 1) / kRowsAtOnce * kRowsAtOnce, 8,
                             kTileRows);
}

// Calls work(0, count), through parallel_for only if the arithmetic is worth the threads.
template <typename Work>
void for_ranges(const ParallelFor& parallel_for, int64_t count, double multiplications, const Work& work) {
  if (multiplications < 1e6 || count < 2) {
    work(0, count);
  } else {
    parallel_for(count, work);
  }
}

// The two matrices of an edit: `up`, R, and `down`, which is A = W - gamma R where f is linear, else W and
// gamma R one below the other. Whatever is zero is left out.
template <typename T>
class Panels {
 public:
  Panels(const Edit& edit, const Kernels<T>& kernels)
      : edit_(edit),
        kernels_(kernels),
        has_W_(edit.W.data != nullptr),
        down_ranks_(edit.linear() ? (has_W_ || edit.subtract ? edit.r : 0)
                                  : (has_W_ ? edit.r : 0) + (edit.subtract ? edit.r : 0)) {}

  int down_ranks() const { return down_ranks_; }
  // Where gamma R begins in a `down` panel that is not one product.
  int subtracted_at() const { return has_W_ ? edit_.r : 0; }

  // A strip's panels, in `memory`; for a few rows R itself is taken where it has the type.
  Panel<T> up(int64_t group, int64_t column, Shape shape, T* memory) const {
    if (shape.rows <= kFewRows && edit_.R.type == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)) {
      return {static_cast<const T*>(at(edit_.R, group, 0, column)), edit_.d, edit_.r};
    }
    fill(edit_.R, group, column, shape.columns, memory);
    return {memory, shape.columns, edit_.r};
  }

  Panel<T> down(int64_t group, int64_t column, Shape shape, T* memory) const {
    const int64_t columns = shape.columns;
    if (edit_.linear() && edit_.subtract) {
      for (int k = 0; k < edit_.r; ++k) {
        kernels_.widen_difference(at(edit_.W, group, k, column), edit_.W.type, at(edit_.R, group, k, column),
                                  edit_.R.type, columns, memory + k * columns);
      }
    } else {
      if (has_W_) fill(edit_.W, group, column, columns, memory);
      if (edit_.subtract) fill(edit_.R, group, column, columns, memory + subtracted_at() * columns);
    }
    return {memory, columns, down_ranks_};
  }

 private:
  static constexpr int kFewRows = 8;

  const void* at(const Weight& weight, int64_t group, int64_t k, int64_t column) const {
    if (weight.data == nullptr) return nullptr;
    return static_cast<const char*>(weight.data) +
           ((group * edit_.r + k) * edit_.d + column) * bytes_of(weight.type);
  }

  void fill(const Weight& weight, int64_t group, int64_t column, int64_t columns, T* to) const {
    for (int k = 0; k < edit_.r; ++k) {
      kernels_.widen(at(weight, group, k, column), weight.type, columns, to + k * columns);
    }
  }

  const Edit& edit_;
  const Kernels<T>& kernels_;
  bool has_W_;
  int down_ranks_;
};

// A bias, b or c, of one group: zeros where there is none.
template <typename T>
void read_bias(const Edit& edit, const Kernels<T>& kernels, const Weight& bias, int64_t group, T* to) {
  if (bias.data == nullptr) {
    std::fill_n(to, edit.r, T(0));
  } else {
    kernels.widen(static_cast<const char*>(bias.data) + group * edit.r * bytes_of(bias.type), bias.type,
                  edit.r, to);
  }
}

// scale of a slot; 1 where there is none.
template <typename T>
T scale_of(const Edit& edit, const Kernels<T>& kernels, int64_t slot) {
  T scale = T(1);
  if (edit.scale.data != nullptr) {
    const int64_t at = slot / edit.slots * edit.scale.stride[0] + slot % edit.slots * edit.scale.stride[1];
    kernels.widen(static_cast<const char*>(edit.scale.data) + at * bytes_of(edit.scale.type), edit.scale.type,
                  1, &scale);
  }
  return scale;
}

inline Dropout dropout_of(const Edit& edit, const int64_t* row_number, int64_t column) {
  return {row_number, column, static_cast<uint64_t>(*edit.seed), edit.keep_threshold, edit.keep_scale};
}

// Without positions the rows of idle slots are copied.
void copy_idle_rows(const Edit& edit, const Slots& slots, const RowsIn& from, const RowsOut& to,
                    const ParallelFor& parallel_for);

}  // namespace reft_kernels::cpu
