// The forward edit on the CPU: tiles of rows of one group, each read twice, the second time from the cache.
#include <cstring>

#include "reft_kernels/activation.h"
#include "tiles.h"

namespace reft_kernels::cpu {

namespace {

constexpr int64_t kPanelBytes = 16 << 10;  // half of a small first-level cache
constexpr int64_t kTileBytes = 512 << 10;  // rows of a tile: what a second-level cache holds

template <typename T>
class Forward {
 public:
  Forward(const EditForwardParams& params, const Slots& slots)
      : p_(params),
        edit_(params.edit),
        slots_(slots),
        kernels_(kernels_of<T>(edit_.h_type)),
        panels_(edit_, kernels_),
        columns_(strip_columns<T>(std::max(panels_.down_ranks(), edit_.r), kPanelBytes, 256, 2048)),
        tile_rows_(std::clamp<int64_t>(
            kTileBytes / (edit_.d * bytes_of(edit_.h_type)) / kRowsAtOnce * kRowsAtOnce, 8, kTileRows)) {}

  void run(int64_t begin, int64_t end) const {
    Memory memory(*this);
    for (int64_t i = begin; i < end;) {
      const int64_t group = slots_.group_of(i);
      const int64_t group_end = std::min(slots_.group_end(group), end);
      biases(memory, group);
      for (; i < group_end; i += tile_rows_) {
        tile(memory, group, i, static_cast<int>(std::min(tile_rows_, group_end - i)));
      }
      i = group_end;
    }
  }

 private:
  struct Memory {
    explicit Memory(const Forward& forward) : f(forward), scratch(*this) {}
    void place(Scratch& s) {
      const int64_t rows = f.tile_rows_, ranks = std::max(f.panels_.down_ranks(), f.edit_.r);
      s.take(panel, ranks * f.columns_);
      s.take(sums, rows * ranks);
      s.take(update, rows * f.edit_.r);
      s.take(bias, f.edit_.r);
      s.take(subtracted, f.edit_.r);
      if (f.edit_.seed != nullptr) s.take(wide, rows * f.columns_);
    }

    const Forward& f;
    T* panel;
    T* sums;            // W h and gamma R h, or A h
    T* update;          // scale * delta
    T* bias;            // b, or e = b - gamma c
    T* subtracted;      // gamma c
    T* wide = nullptr;  // a strip in T
    const void* h[kTileRows];
    void* y[kTileRows];
    void* wide_row[kTileRows];
    int64_t slot[kTileRows];
    int64_t row_number[kTileRows];
    Scratch scratch;
  };

  void biases(const Memory& m, int64_t group) const {
    std::fill(m.bias, m.bias + edit_.r, T(0));
    std::fill(m.subtracted, m.subtracted + edit_.r, T(0));
    panels_.bias(edit_.b, group, false, m.bias);
    if (edit_.subtract) panels_.bias(edit_.c, group, edit_.linear(), edit_.linear() ? m.bias : m.subtracted);
  }

  void tile(Memory& m, int64_t group, int64_t first, int rows) const {
    for (int n = 0; n < rows; ++n) {
      m.slot[n] = slots_[first + n];
      const Place place = place_of(edit_, m.slot[n]);
      m.h[n] = row_at(p_.h, place, edit_.h_type);
      m.y[n] = row_at(p_.y, place, edit_.h_type);
      m.row_number[n] = place.batch * edit_.length + place.position;
      if (m.wide != nullptr) m.wide_row[n] = m.wide + int64_t{n} * columns_;
      if (p_.rows != nullptr) {
        const int64_t bytes = edit_.d * bytes_of(edit_.h_type);
        std::memcpy(static_cast<char*>(p_.rows) + m.slot[n] * bytes, m.h[n], static_cast<size_t>(bytes));
      }
    }
    const int down_ranks = panels_.down_ranks();
    std::fill(m.sums, m.sums + int64_t{rows} * down_ranks, T(0));
    if (down_ranks > 0) {
      for (int64_t column = 0; column < edit_.d; column += columns_) {
        const int columns = static_cast<int>(std::min<int64_t>(columns_, edit_.d - column));
        kernels_.down({m.h, column}, {rows, columns}, panels_.down(group, column, columns, m.panel), m.sums);
      }
    }
    for (int n = 0; n < rows; ++n) finish_row(m, n);
    for (int64_t column = 0; column < edit_.d; column += columns_) {
      const int columns = static_cast<int>(std::min<int64_t>(columns_, edit_.d - column));
      const Panel<T> panel = panels_.up(group, column, columns, m.panel);
      const StripIn h{m.h, column};
      const StripOut y{m.y, column};
      if (edit_.seed == nullptr) {
        kernels_.up(h, y, {rows, columns}, panel, m.update);
      } else {
        kernels_.up_to_wide(h, {m.wide_row, 0}, {rows, columns}, panel, m.update);
        kernels_.drop_from_wide({m.wide_row, 0}, y, {rows, columns}, dropout_of(edit_, m.row_number, column));
      }
    }
  }

  // From the row's sums its s, delta and scale * delta.
  void finish_row(const Memory& m, int n) const {
    const int r = edit_.r, down_ranks = panels_.down_ranks();
    const T scale = scale_of(edit_, kernels_, m.slot[n]);
    const T* sums = m.sums + int64_t{n} * down_ranks;
    const T* product_W = edit_.linear() ? (down_ranks > 0 ? sums : nullptr) : (edit_.W.data ? sums : nullptr);
    const T* product_R = !edit_.linear() && edit_.subtract ? sums + panels_.subtracted_at() : nullptr;
    T* delta = static_cast<T*>(p_.delta) + m.slot[n] * r;
    T* update = m.update + int64_t{n} * r;
    for (int k = 0; k < r; ++k) {
      const T s = product_W != nullptr ? product_W[k] + m.bias[k] : m.bias[k];
      if (p_.s != nullptr) static_cast<T*>(p_.s)[m.slot[n] * r + k] = s;
      T value = activate(s, edit_.activation);
      if (product_R != nullptr) value -= product_R[k] + m.subtracted[k];
      delta[k] = value;
      update[k] = scale * value;
    }
  }

  const EditForwardParams& p_;
  const Edit& edit_;
  const Slots& slots_;
  const Kernels<T>& kernels_;
  Panels<T> panels_;
  int columns_;  // of a strip
  int64_t tile_rows_;
};

template <typename T>
void forward(const EditForwardParams& params, const ParallelFor& parallel_for) {
  const Edit& edit = params.edit;
  const Slots slots(edit);
  for (const int64_t slot : slots.idle()) {
    std::fill_n(static_cast<T*>(params.delta) + slot * edit.r, edit.r, T(0));
    if (params.s != nullptr) std::fill_n(static_cast<T*>(params.s) + slot * edit.r, edit.r, T(0));
  }
  if (params.copy_idle) copy_idle_rows(edit, slots, params.h, params.y, parallel_for);
  const int64_t active = slots.active();
  if (active == 0 || edit.d == 0) return;
  const Forward<T> edit_forward(params, slots);
  for_ranges(parallel_for, (active + kRowsAtOnce - 1) / kRowsAtOnce,
             static_cast<double>(active) * static_cast<double>(edit.d) * (2 * edit.r + 4),
             [&](int64_t begin, int64_t end) {
               edit_forward.run(begin * kRowsAtOnce, std::min(end * kRowsAtOnce, active));
             });
}

}  // namespace

void edit_forward(const EditForwardParams& params, const ParallelFor& parallel_for) {
  if (params.edit.accumulator == DType::kFloat64) {
    forward<double>(params, parallel_for);
  } else {
    forward<float>(params, parallel_for);
  }
}

}  // namespace reft_kernels::cpu
