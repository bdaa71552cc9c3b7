// Phase 1 of the backward edit: gd = scale * R g and gs = gd * f'(s), in parallel over rows.
#pragma once

#include "backward.h"
#include "reft_kernels/activation.h"

namespace reft_kernels::cpu {

template <typename T>
class BackwardRows {
 public:
  explicit BackwardRows(const Backward<T>& backward)
      : b_(backward),
        edit_(b_.edit),
        strip_(strip_columns<T>(edit_.r, edit_.d, kPanelBytes, 256)),
        tile_rows_(edit_.seed == nullptr &&
                           edit_.r * static_cast<int64_t>(sizeof(T)) >= kTileRows * bytes_of(edit_.h_type)
                       ? kManyRows
                       : kTileRows) {}

  // Of active slots begin to end.
  void run(int64_t begin, int64_t end) const {
    Memory m(*this);
    BackwardTile tiles[2];
    read_tile(b_, begin, end, tile_rows_, tiles[0]);
    for (int current = 0; tiles[current].rows > 0; current = 1 - current) {
      read_tile(b_, tiles[current].end, end, tile_rows_, tiles[1 - current]);
      multiply(m, tiles[current], tiles[1 - current]);
      finish(m, tiles[current]);
    }
  }

 private:
  static constexpr int64_t kPanelBytes = 16 << 10;  // half of a small first-level cache

  struct Memory {
    explicit Memory(const BackwardRows& rows) : f(rows), scratch(*this) {}
    void place(Scratch& s) {
      s.take(panel, int64_t{f.edit_.r} * f.strip_);
      s.take(sums, f.tile_rows_ * f.edit_.r);
      if (f.edit_.seed != nullptr) {
        s.take(wide, int64_t{kTileRows} * f.strip_);
        if (wide != nullptr) wide_rows.point_to(wide, f.strip_);
      }
    }

    const BackwardRows& f;
    T* panel;
    T* sums;  // R g
    T* wide = nullptr;
    WideRows<T> wide_rows;
    Scratch scratch;
  };

  // While one strip is multiplied the next is fetched.
  void multiply(Memory& m, const BackwardTile& tile, const BackwardTile& next_tile) const {
    std::fill(m.sums, m.sums + int64_t{tile.rows} * edit_.r, T(0));
    for (int64_t column = 0; column < edit_.d; column += strip_) {
      const Shape shape{tile.rows, static_cast<int>(std::min<int64_t>(strip_, edit_.d - column))};
      const Panel<T> panel = b_.panels.up(tile.group, column, shape, m.panel);
      const StripIn g{tile.grad, column};
      if (edit_.seed != nullptr) {
        const StripOut wide{m.wide_rows.row, 0};
        b_.kernels.drop_to_wide(g, wide, shape, dropout_of(edit_, tile.row_number, column));
        b_.kernels.down_wide({m.wide_rows.row, 0}, {}, shape, panel, m.sums);
      } else {
        StripIn next{tile.grad, column + strip_};
        if (next.column >= edit_.d) next = {next_tile.rows >= tile.rows ? next_tile.grad : nullptr, 0};
        b_.kernels.down(g, next, shape, panel, m.sums);
      }
    }
  }

  void finish(const Memory& m, const BackwardTile& tile) const {
    const int r = edit_.r;
    for (int n = 0; n < tile.rows; ++n) {
      const T scale = scale_of(edit_, b_.kernels, tile.slot[n]);
      const T* sums = m.sums + int64_t{n} * r;
      const int64_t at = tile.slot[n] * r;
      T* gd = static_cast<T*>(b_.p.gd) + at;
      for (int k = 0; k < r; ++k) gd[k] = scale * sums[k];
      if (edit_.linear()) continue;
      T* gs = static_cast<T*>(b_.p.gs) + at;
      const T* s = static_cast<const T*>(b_.p.s) + at;
      for (int k = 0; k < r; ++k) gs[k] = gd[k] * activation_slope(s[k], edit_.activation);
    }
  }

  const Backward<T>& b_;
  const Edit& edit_;
  int strip_;          // columns
  int64_t tile_rows_;  // many where a panel has no fewer bytes than their strip has else
};

}  // namespace reft_kernels::cpu
