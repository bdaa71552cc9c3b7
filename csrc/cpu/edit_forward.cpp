// The forward edit on the CPU: tiles of rows of one group, each read twice, the second time from the cache.
#include <cstring>

#include "reft_kernels/activation.h"
#include "tiles.h"

namespace reft_kernels::cpu {

namespace {

// Of a strip: half of a small first-level cache.
constexpr int64_t kPanelBytes = 16 << 10;
// The rows of a tile, and the panels that are kept from tile to tile, share a second-level cache.
constexpr int64_t kTileBytes = 256 << 10;
constexpr int64_t kKeptPanelBytes = 256 << 10;

template <typename T>
class Forward {
 public:
  Forward(const EditForwardParams& params, const Slots& slots)
      : p_(params),
        edit_(params.edit),
        slots_(slots),
        kernels_(kernels_of<T>(edit_.h_type)),
        panels_(edit_, kernels_),
        down_ranks_(panels_.down_ranks()),
        strip_(strip_columns<T>(std::max(down_ranks_, edit_.r), edit_.d, kPanelBytes, 256)),
        keeps_panels_((down_ranks_ + edit_.r) * edit_.d * static_cast<int64_t>(sizeof(T)) <=
                          kKeptPanelBytes &&
                      slots.active() > kTileRows),
        tile_rows_(tile_rows(edit_.d * bytes_of(edit_.h_type), keeps_panels_ ? kTileBytes : 2 * kTileBytes)),
        stays_(keeps_panels_ || edit_.seed != nullptr ||
               (down_ranks_ + edit_.r) * static_cast<int64_t>(sizeof(T)) <
                   2 * tile_rows_ * bytes_of(edit_.h_type)) {
    if (!stays_) tile_rows_ = kManyRows;
    ahead_ = stays_ ? (edit_.d + 2 * strip_ - 1) / (2 * strip_) * strip_ : strip_;
  }

  void run(int64_t begin, int64_t end) const {
    Memory m(*this);
    Tile tiles[2];
    read_tile(tiles[0], begin, end);
    int64_t group = -1;
    for (int current = 0; tiles[current].rows > 0; current = 1 - current) {
      const Tile& tile = tiles[current];
      read_tile(tiles[1 - current], tile.end, end);
      if (tile.group != group) {
        group = tile.group;
        m.down_filled = m.up_filled = 0;
        biases(m, group);
      }
      edit_tile(m, tile, tiles[1 - current]);
    }
  }

 private:
  struct Tile {
    int64_t group;
    int64_t end;  // the active slot after it
    int rows;
    int64_t slot[kManyRows];
    int64_t row_number[kManyRows];
    const void* h[kManyRows];
    void* y[kManyRows];
  };

  struct Memory {
    explicit Memory(const Forward& forward) : f(forward), scratch(*this) {}
    void place(Scratch& s) {
      const int64_t rows = f.tile_rows_, r = f.edit_.r;
      const int64_t columns = f.keeps_panels_ ? f.edit_.d : f.strip_;
      s.take(down_panel, f.down_ranks_ * columns);
      s.take(up_panel, r * columns);
      s.take(sums, rows * f.down_ranks_);
      s.take(update, rows * r);
      s.take(bias, r);
      s.take(subtracted, r);
      if (f.edit_.seed != nullptr) s.take(wide, rows * f.strip_);
      if (wide != nullptr) {
        for (int64_t n = 0; n < rows; ++n) wide_row[n] = wide + n * f.strip_;
      }
    }

    const Forward& f;
    T* down_panel;
    T* up_panel;
    int64_t down_filled = 0, up_filled = 0;  // columns of kept panels that are there
    T* sums;                                 // W h and gamma R h, or A h
    T* update;                               // scale * delta
    T* bias;                                 // b, or e = b - gamma c
    T* subtracted;                           // gamma c
    T* wide = nullptr;                       // a strip in T
    void* wide_row[kTileRows];
    Scratch scratch;
  };

  void read_tile(Tile& tile, int64_t begin, int64_t end) const {
    tile.rows = 0;
    if (begin >= end) return;
    tile.group = slots_.group_of(begin);
    tile.end = std::min({begin + tile_rows_, slots_.group_end(tile.group), end});
    tile.rows = static_cast<int>(tile.end - begin);
    for (int n = 0; n < tile.rows; ++n) {
      tile.slot[n] = slots_[begin + n];
      const Place place = place_of(edit_, tile.slot[n]);
      tile.row_number[n] = place.batch * edit_.length + place.position;
      tile.h[n] = row_at(p_.h, place, edit_.h_type);
      tile.y[n] = row_at(p_.y, place, edit_.h_type);
    }
  }

  void biases(const Memory& m, int64_t group) const {
    read_bias(edit_, kernels_, edit_.b, group, m.bias);
    if (!edit_.subtract) return;
    read_bias(edit_, kernels_, edit_.c, group, m.subtracted);
    if (edit_.linear()) {
      for (int k = 0; k < edit_.r; ++k) m.bias[k] -= m.subtracted[k];
    }
  }

  // A strip's panel: in its place in `memory` if panels are kept, else for this tile alone.
  template <typename Fill>
  Panel<T> panel_of(T* memory, int64_t ranks, int64_t column, Shape shape, int64_t& filled,
                    const Fill& fill) const {
    if (!keeps_panels_) return fill(shape, memory);
    T* const panel = memory + ranks * column;
    if (column < filled) return {panel, shape.columns, static_cast<int>(ranks)};
    filled = column + shape.columns;
    return fill({kTileRows, shape.columns}, panel);
  }

  // While one tile is edited the next is fetched, evenly: its first `ahead_` columns while rows are written,
  // the others when it has become the tile and its columns before them are multiplied. Of a tile that does
  // not stay in the cache it is always the next strip.
  void edit_tile(Memory& m, const Tile& tile, const Tile& next) const {
    if (down_ranks_ > 0) {
      std::fill(m.sums, m.sums + int64_t{tile.rows} * down_ranks_, T(0));
      for (int64_t column = 0; column < edit_.d; column += strip_) {
        const Shape shape{tile.rows, static_cast<int>(std::min<int64_t>(strip_, edit_.d - column))};
        const Panel<T> panel =
            panel_of(m.down_panel, down_ranks_, column, shape, m.down_filled,
                     [&](Shape filled, T* to) { return panels_.down(tile.group, column, filled, to); });
        const StripIn later{column + ahead_ < edit_.d ? tile.h : nullptr, column + ahead_};
        kernels_.down({tile.h, column}, later, shape, panel, m.sums);
      }
    }
    for (int n = 0; n < tile.rows; ++n) finish_row(m, n, tile.slot[n]);
    for (int64_t column = 0; column < edit_.d; column += strip_) {
      const Shape shape{tile.rows, static_cast<int>(std::min<int64_t>(strip_, edit_.d - column))};
      const Panel<T> panel =
          panel_of(m.up_panel, edit_.r, column, shape, m.up_filled,
                   [&](Shape filled, T* to) { return panels_.up(tile.group, column, filled, to); });
      if (p_.rows != nullptr) save_rows(tile, column, shape.columns);
      StripIn later{next.rows >= tile.rows && column < ahead_ ? next.h : nullptr, column};
      if (!stays_) later = {column + strip_ < edit_.d ? tile.h : nullptr, column + strip_};
      write_strip(m, tile, later, shape, column, panel);
    }
  }

  void write_strip(const Memory& m, const Tile& tile, StripIn next, Shape shape, int64_t column,
                   Panel<T> panel) const {
    const StripIn h{tile.h, column};
    const StripOut y{tile.y, column};
    if (edit_.seed == nullptr) {
      kernels_.up(h, next, y, shape, panel, m.update);
    } else {
      kernels_.up_to_wide(h, next, {m.wide_row, 0}, shape, panel, m.update);
      kernels_.drop_from_wide({m.wide_row, 0}, y, shape, dropout_of(edit_, tile.row_number, column));
    }
  }

  void save_rows(const Tile& tile, int64_t column, int columns) const {
    const int64_t element = bytes_of(edit_.h_type);
    for (int n = 0; n < tile.rows; ++n) {
      std::memcpy(static_cast<char*>(p_.rows) + (tile.slot[n] * edit_.d + column) * element,
                  static_cast<const char*>(tile.h[n]) + column * element,
                  static_cast<size_t>(columns * element));
    }
  }

  // From the row's sums its s, delta and scale * delta.
  void finish_row(const Memory& m, int n, int64_t slot) const {
    const int r = edit_.r;
    const T scale = scale_of(edit_, kernels_, slot);
    const T* sums = m.sums + int64_t{n} * down_ranks_;
    const T* product_W =
        edit_.linear() ? (down_ranks_ > 0 ? sums : nullptr) : (edit_.W.data ? sums : nullptr);
    const T* product_R = !edit_.linear() && edit_.subtract ? sums + panels_.subtracted_at() : nullptr;
    T* delta = static_cast<T*>(p_.delta) + slot * r;
    T* update = m.update + int64_t{n} * r;
    for (int k = 0; k < r; ++k) {
      const T s = product_W != nullptr ? product_W[k] + m.bias[k] : m.bias[k];
      if (p_.s != nullptr) static_cast<T*>(p_.s)[slot * r + k] = s;
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
  int down_ranks_;
  int strip_;  // columns
  bool keeps_panels_;
  int64_t tile_rows_;
  bool stays_;     // a tile stays in the second-level cache; else its weights, fetched anew, would cost more
  int64_t ahead_;  // columns
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
