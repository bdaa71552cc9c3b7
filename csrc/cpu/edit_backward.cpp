// The backward edit on the CPU, in two phases: gd and gs for all rows, in parallel over rows; then everything
// else in parallel over columns, so that each thread sums the gradients of its own columns of R and W over
// all rows, in one order whatever the threads.
#include "reft_kernels/activation.h"
#include "tiles.h"

namespace reft_kernels::cpu {

namespace {

constexpr int64_t kPanelBytes = 16 << 10;  // of phase 1
constexpr int64_t kSlabBytes =
    24 << 10;  // the panel and the sums of phase 2, which stay in a first-level cache

template <typename T>
class Backward {
 public:
  Backward(const EditBackwardParams& params, const Slots& slots)
      : p_(params),
        edit_(params.edit),
        slots_(slots),
        kernels_(kernels_of<T>(edit_.h_type)),
        panels_(edit_, kernels_),
        wants_R_(p_.dR.data != nullptr),
        wants_W_(p_.dW.data != nullptr),
        wants_h_(p_.dh.data != nullptr),
        reads_x_(wants_W_ || (wants_R_ && edit_.subtract)),
        columns_(strip_columns<T>(edit_.r, kPanelBytes, 256, 2048)),
        slab_(strip_columns<T>(2 * edit_.r + panels_.down_ranks(), kSlabBytes, 64, 1024)) {}

  bool needs_gd() const {
    return (wants_h_ && panels_.down_ranks() > 0) || reads_x_ || p_.db.data != nullptr ||
           p_.dc.data != nullptr;
  }
  bool has_phase_2() const { return wants_h_ || wants_R_ || wants_W_; }

  // gd and gs of active slots begin to end.
  void rows(int64_t begin, int64_t end) const {
    Memory m(*this, columns_);
    for (int64_t i = begin; i < end;) {
      const int64_t group = slots_.group_of(i);
      const int64_t group_end = std::min(slots_.group_end(group), end);
      for (; i < group_end; i += kTileRows) {
        rows_tile(m, group, i, static_cast<int>(std::min<int64_t>(kTileRows, group_end - i)));
      }
      i = group_end;
    }
  }

  // Columns begin to end of dh, dR and dW.
  void columns(int64_t begin, int64_t end) const {
    Memory m(*this, slab_);
    for (int64_t group = 0; group < edit_.groups; ++group) {
      for (int64_t column = begin; column < end; column += slab_) {
        slab(m, group, column, static_cast<int>(std::min<int64_t>(slab_, end - column)));
      }
    }
  }

  // db and dc.
  void biases() const {
    if (p_.db.data == nullptr && p_.dc.data == nullptr) return;
    Memory m(*this, 0);
    for (int64_t group = 0; group < edit_.groups; ++group) {
      std::fill(m.zero, m.zero + edit_.r, T(0));
      if (p_.db.data != nullptr) {
        sum_rows(m, group, static_cast<const T*>(p_.gs));
        deliver(p_.db, group * edit_.r, edit_.r, m.sums, nullptr);
      }
      if (p_.dc.data != nullptr) {
        if (edit_.subtract) {
          sum_rows(m, group, static_cast<const T*>(p_.gd));
        } else {
          std::fill(m.sums, m.sums + edit_.r, T(0));
        }
        deliver(p_.dc, group * edit_.r, edit_.r, m.zero, m.sums);
      }
    }
  }

 private:
  struct Memory {
    Memory(const Backward& backward, int columns) : b(backward), strip_columns(columns), scratch(*this) {}
    void place(Scratch& s) {
      const int64_t r = b.edit_.r;
      s.take(panel, std::max<int64_t>(r, b.panels_.down_ranks()) * strip_columns);
      s.take(sums, kTileRows * r);
      s.take(zero, r);
      s.take(update, kTileRows * r);
      s.take(gs, kTileRows * r);
      s.take(gd, kTileRows * r);
      s.take(back, kTileRows * b.panels_.down_ranks());
      s.take(dR, r * strip_columns);
      s.take(dW, r * strip_columns);
      if (b.edit_.seed != nullptr) s.take(g_wide, int64_t{kTileRows} * strip_columns);
      if (b.p_.rebuild) {
        s.take(up_panel, r * strip_columns);
        s.take(x_wide, int64_t{kTileRows} * strip_columns);
      }
    }

    const Backward& b;
    int strip_columns;
    T* panel;
    T* up_panel = nullptr;
    T* sums;  // of a tile's rows with R, or over rows
    T* zero;
    T* update;  // scale * delta
    T* gs;
    T* gd;
    T* back;  // the factors of the `down` panel in dh
    T* dR;    // sum of (scale * delta) g^T, and of what of -gd x^T is not in dW
    T* dW;    // sum of gs x^T
    T* g_wide = nullptr;
    T* x_wide = nullptr;
    const void* grad[kTileRows];
    const void* x[kTileRows];
    void* dh[kTileRows];
    void* g_wide_row[kTileRows];
    void* x_wide_row[kTileRows];
    int64_t slot[kTileRows];
    int64_t row_number[kTileRows];
    Scratch scratch;
  };

  void read_places(Memory& m, int64_t first, int rows) const {
    for (int n = 0; n < rows; ++n) {
      m.slot[n] = slots_[first + n];
      const Place place = place_of(edit_, m.slot[n]);
      m.grad[n] = row_at(p_.grad, place, edit_.h_type);
      m.row_number[n] = place.batch * edit_.length + place.position;
      if (wants_h_) m.dh[n] = row_at(p_.dh, place, edit_.h_type);
      if (reads_x_) {
        m.x[n] = row_at(p_.x, p_.x_is_rows ? Place{0, m.slot[n]} : place, edit_.h_type);
      }
      if (m.g_wide != nullptr) m.g_wide_row[n] = m.g_wide + int64_t{n} * m.strip_columns;
      if (m.x_wide != nullptr) m.x_wide_row[n] = m.x_wide + int64_t{n} * m.strip_columns;
    }
  }

  void rows_tile(Memory& m, int64_t group, int64_t first, int rows) const {
    const int r = edit_.r;
    read_places(m, first, rows);
    std::fill(m.sums, m.sums + int64_t{rows} * r, T(0));
    for (int64_t column = 0; column < edit_.d; column += columns_) {
      const Shape shape{rows, static_cast<int>(std::min<int64_t>(columns_, edit_.d - column))};
      const Panel<T> panel = panels_.up(group, column, shape.columns, m.panel);
      if (edit_.seed == nullptr) {
        kernels_.down({m.grad, column}, shape, panel, m.sums);
      } else {
        kernels_.drop_to_wide({m.grad, column}, {m.g_wide_row, 0}, shape,
                              dropout_of(edit_, m.row_number, column));
        kernels_.down_wide({m.g_wide_row, 0}, shape, panel, m.sums);
      }
    }
    for (int n = 0; n < rows; ++n) {
      const T scale = scale_of(edit_, kernels_, m.slot[n]);
      const int64_t at = m.slot[n] * r;
      for (int k = 0; k < r; ++k) {
        const T gd = scale * m.sums[int64_t{n} * r + k];
        static_cast<T*>(p_.gd)[at + k] = gd;
        if (!edit_.linear()) {
          static_cast<T*>(p_.gs)[at + k] =
              gd * activation_slope(static_cast<const T*>(p_.s)[at + k], edit_.activation);
        }
      }
    }
  }

  // What phase 1 and the forward left of a tile's rows, row by row.
  void read_factors(const Memory& m, int rows) const {
    const int r = edit_.r, down_ranks = panels_.down_ranks();
    const T* saved_delta = static_cast<const T*>(p_.delta);
    const T* saved_gd = static_cast<const T*>(p_.gd);
    const T* saved_gs = edit_.linear() ? saved_gd : static_cast<const T*>(p_.gs);
    const bool with_gd = needs_gd();
    for (int n = 0; n < rows; ++n) {
      const int64_t from = m.slot[n] * r, to = int64_t{n} * r;
      const T scale = scale_of(edit_, kernels_, m.slot[n]);
      for (int k = 0; k < r; ++k) m.update[to + k] = scale * saved_delta[from + k];
      if (!with_gd) continue;
      T* back = m.back + int64_t{n} * down_ranks;
      for (int k = 0; k < r; ++k) {
        const T gd = saved_gd[from + k], gs = saved_gs[from + k];
        m.gs[to + k] = gs;
        m.gd[to + k] = -gd;
        if (edit_.linear()) {
          if (down_ranks > 0) back[k] = gs;
        } else {
          if (edit_.W.data != nullptr) back[k] = gs;
          if (edit_.subtract) back[panels_.subtracted_at() + k] = -gd;
        }
      }
    }
  }

  void slab(Memory& m, int64_t group, int64_t column, int columns) const {
    const int r = edit_.r;
    // Where f is linear gd is gs, and one sum serves dW and dR.
    const bool sums_gs = wants_W_ || (edit_.linear() && wants_R_ && edit_.subtract);
    const bool sums_gd = !edit_.linear() && wants_R_ && edit_.subtract;
    std::fill(m.dR, m.dR + int64_t{r} * columns, T(0));
    std::fill(m.dW, m.dW + int64_t{r} * columns, T(0));
    const int64_t group_end = slots_.group_end(group);
    Panel<T> down{}, up{};
    if (slots_.group_begin(group) < group_end) {
      if (wants_h_) down = panels_.down(group, column, columns, m.panel);
      if (p_.rebuild && reads_x_) up = panels_.up(group, column, columns, m.up_panel);
    }
    for (int64_t first = slots_.group_begin(group); first < group_end; first += kTileRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, group_end - first));
      const Shape shape{rows, columns};
      read_places(m, first, rows);
      read_factors(m, rows);
      const StripIn grad{m.grad, column};
      const StripIn g = edit_.seed == nullptr ? grad : StripIn{m.g_wide_row, 0};
      if (edit_.seed != nullptr) {
        kernels_.drop_to_wide(grad, {m.g_wide_row, 0}, shape, dropout_of(edit_, m.row_number, column));
      }
      if (wants_R_) {
        (edit_.seed == nullptr ? kernels_.outer : kernels_.outer_wide)(g, shape, m.update, r, r, m.dR,
                                                                       columns);
      }
      if (reads_x_) {
        StripIn x{m.x, column};
        auto outer = kernels_.outer;
        if (p_.rebuild) {
          kernels_.undo_up_to_wide(x, {m.x_wide_row, 0}, shape, up, m.update);
          x = {m.x_wide_row, 0};
          outer = kernels_.outer_wide;
        }
        if (sums_gs) outer(x, shape, m.gs, r, r, m.dW, columns);
        if (sums_gd) outer(x, shape, m.gd, r, r, m.dR, columns);
      }
      if (wants_h_) {
        (edit_.seed == nullptr ? kernels_.up : kernels_.up_from_wide)(g, {m.dh, column}, shape, down, m.back);
      }
    }
    for (int k = 0; k < r; ++k) {
      const int64_t at = (group * r + k) * edit_.d + column, from = int64_t{k} * columns;
      const T* common = sums_gs && edit_.linear() && edit_.subtract ? m.dW + from : nullptr;
      if (wants_R_) deliver(p_.dR, at, columns, m.dR + from, common);
      if (wants_W_) deliver(p_.dW, at, columns, m.dW + from, nullptr);
    }
  }

  // m.sums = sum over the group's rows of [N, r], by tiles.
  void sum_rows(const Memory& m, int64_t group, const T* values) const {
    const int r = edit_.r;
    std::fill(m.sums, m.sums + r, T(0));
    const int64_t group_end = slots_.group_end(group);
    for (int64_t first = slots_.group_begin(group); first < group_end; first += kTileRows) {
      std::fill(m.gs, m.gs + r, T(0));
      for (int64_t i = first; i < std::min(group_end, first + kTileRows); ++i) {
        const T* row = values + slots_[i] * r;
        for (int k = 0; k < r; ++k) m.gs[k] += row[k];
      }
      for (int k = 0; k < r; ++k) m.sums[k] += m.gs[k];
    }
  }

  void deliver(const WeightGradient& to, int64_t at, int64_t count, const T* value, const T* minus) const {
    kernels_.narrow(value, minus, count, to.add, static_cast<char*>(to.data) + at * bytes_of(to.type),
                    to.type);
  }

  const EditBackwardParams& p_;
  const Edit& edit_;
  const Slots& slots_;
  const Kernels<T>& kernels_;
  Panels<T> panels_;
  bool wants_R_, wants_W_, wants_h_;
  bool reads_x_;
  int columns_;  // of a strip in phase 1
  int slab_;     // of one in phase 2
};

template <typename T>
void backward(const EditBackwardParams& params, const ParallelFor& parallel_for) {
  const Edit& edit = params.edit;
  const Slots slots(edit);
  if (params.copy_idle && params.dh.data != nullptr) {
    copy_idle_rows(edit, slots, params.grad, params.dh, parallel_for);
  }
  const Backward<T> edit_backward(params, slots);
  const int64_t active = slots.active();
  const double elements = static_cast<double>(active) * static_cast<double>(edit.d);
  if (edit_backward.needs_gd() && active > 0) {
    for_ranges(parallel_for, (active + kRowsAtOnce - 1) / kRowsAtOnce, elements * (edit.r + 2),
               [&](int64_t begin, int64_t end) {
                 edit_backward.rows(begin * kRowsAtOnce, std::min(end * kRowsAtOnce, active));
               });
  }
  edit_backward.biases();
  if (edit_backward.has_phase_2() && edit.d > 0) {
    for_ranges(parallel_for, (edit.d + kColumnsAtOnce - 1) / kColumnsAtOnce, elements * (3 * edit.r + 4),
               [&](int64_t begin, int64_t end) {
                 edit_backward.columns(begin * kColumnsAtOnce, std::min(end * kColumnsAtOnce, edit.d));
               });
  }
}

}  // namespace

void edit_backward(const EditBackwardParams& params, const ParallelFor& parallel_for) {
  if (params.edit.accumulator == DType::kFloat64) {
    backward<double>(params, parallel_for);
  } else {
    backward<float>(params, parallel_for);
  }
}

}  // namespace reft_kernels::cpu
