// Phase 2 of the backward edit: dh, dR and dW, in parallel over columns, so that each thread sums up the
// gradients of its own columns over all rows, in one order whatever the threads.
//
// A thread's columns are cut into slabs, whose sums stay in a second-level cache while the tiles of rows
// pass, and a slab into strips, whose sums stay in the first while a tile does.
#pragma once

#include "backward.h"

namespace reft_kernels::cpu {

template <typename T>
class BackwardColumns {
 public:
  explicit BackwardColumns(const Backward<T>& backward)
      : b_(backward),
        edit_(b_.edit),
        down_ranks_(b_.panels.down_ranks()),
        rebuilds_(b_.p.rebuild && b_.reads_x),
        shares_sum_(edit_.linear() && b_.wants_R && edit_.subtract),
        sums_gs_(b_.wants_W || shares_sum_),
        sums_gd_(!edit_.linear() && b_.wants_R && edit_.subtract),
        strip_(strip_columns<T>(std::min<int64_t>(kTileRows, b_.slots.active()) + 3 * edit_.r + down_ranks_,
                                edit_.d, kStripBytes, 64)),
        slab_(strips_in_slab() * strip_) {}

  void run(int64_t begin, int64_t end) const {
    Memory m(*this, std::min(slab_, end - begin));
    for (int64_t group = 0; group < edit_.groups; ++group) {
      for (int64_t column = begin; column < end; column += slab_) {
        slab(m, group, column, static_cast<int>(std::min(slab_, end - column)));
      }
    }
  }

 private:
  static constexpr int64_t kStripBytes = 32 << 10;
  static constexpr int64_t kSlabBytes = 384 << 10;

  int64_t strips_in_slab() const {
    // No sums wait for a second tile, and little else is repeated.
    if (b_.slots.active() <= kTileRows / 4) return 1;
    const int64_t strip_bytes =
        (3 * edit_.r + down_ranks_) * int64_t{strip_} * static_cast<int64_t>(sizeof(T));
    return std::max<int64_t>(kSlabBytes / strip_bytes, 1);
  }

  // A strip that begins at column `at` of a slab has its panel, and its sums, at `ranks * at`: [ranks,
  // columns].
  struct Memory {
    Memory(const BackwardColumns& columns, int64_t slab_columns)
        : f(columns), slab(slab_columns), scratch(*this) {}
    void place(Scratch& s) {
      const int64_t r = f.edit_.r;
      s.take(down_panel, f.down_ranks_ * slab);
      s.take(dR, r * slab);
      s.take(dW, r * slab);
      s.take(update, kTileRows * r);
      s.take(gs, kTileRows * r);
      s.take(gd, kTileRows * r);
      s.take(back, int64_t{kTileRows} * f.down_ranks_);
      if (f.rebuilds_) s.take(up_panel, r * slab);
      s.take(wide, int64_t{kTileRows} * f.strip_);
      if (wide != nullptr) wide_rows.point_to(wide, f.strip_);
    }

    const BackwardColumns& f;
    int64_t slab;
    T* down_panel;
    T* up_panel = nullptr;
    T* dR;      // sum of (scale * delta) g^T, and of what of -gd x^T is not in dW
    T* dW;      // sum of gs x^T
    T* update;  // scale * delta of a tile
    T* gs;
    T* gd;    // negative
    T* back;  // the factors of the `down` panel in dh
    T* wide;  // a strip of g after dropout, then of x
    WideRows<T> wide_rows;
    Scratch scratch;
  };

  void slab(Memory& m, int64_t group, int64_t column, int columns) const {
    const int64_t r = edit_.r;
    const int64_t group_begin = b_.slots.group_begin(group), group_end = b_.slots.group_end(group);
    const bool nothing_to_add = (!b_.wants_R || b_.p.dR.add) && (!b_.wants_W || b_.p.dW.add);
    if (group_begin == group_end && nothing_to_add) return;
    std::fill(m.dR, m.dR + r * columns, T(0));
    std::fill(m.dW, m.dW + r * columns, T(0));
    BackwardTile tiles[2];
    read_tile(b_, group_begin, group_end, kTileRows, tiles[0]);
    if (tiles[0].rows > 0) fill_panels(m, group, column, columns);
    for (int current = 0; tiles[current].rows > 0; current = 1 - current) {
      read_tile(b_, tiles[current].end, group_end, kTileRows, tiles[1 - current]);
      read_factors(m, tiles[current]);
      for (int at = 0; at < columns; at += strip_) {
        strip(m, tiles[current], tiles[1 - current], column, at, columns);
      }
    }
    for (int at = 0; at < columns; at += strip_) {
      const int count = std::min(strip_, columns - at);
      for (int k = 0; k < r; ++k) {
        const int64_t to = (group * r + k) * edit_.d + column + at, from = r * at + int64_t{k} * count;
        if (b_.wants_R) b_.deliver(b_.p.dR, to, count, m.dR + from, shares_sum_ ? m.dW + from : nullptr);
        if (b_.wants_W) b_.deliver(b_.p.dW, to, count, m.dW + from, nullptr);
      }
    }
  }

  void fill_panels(Memory& m, int64_t group, int64_t column, int columns) const {
    for (int at = 0; at < columns; at += strip_) {
      const int count = std::min(strip_, columns - at);
      if (b_.wants_h)
        b_.panels.down(group, column + at, {kTileRows, count}, m.down_panel + int64_t{down_ranks_} * at);
      if (m.up_panel != nullptr)
        b_.panels.up(group, column + at, {kTileRows, count}, m.up_panel + int64_t{edit_.r} * at);
    }
  }

  // What the forward and phase 1 left of a tile's rows, row by row.
  void read_factors(const Memory& m, const BackwardTile& tile) const {
    const int r = edit_.r;
    const T* delta = static_cast<const T*>(b_.p.delta);
    const T* gd = static_cast<const T*>(b_.p.gd);
    const T* gs = edit_.linear() ? gd : static_cast<const T*>(b_.p.gs);
    for (int n = 0; n < tile.rows; ++n) {
      const int64_t from = tile.slot[n] * r, to = int64_t{n} * r;
      const T scale = scale_of(edit_, b_.kernels, tile.slot[n]);
      for (int k = 0; k < r; ++k) m.update[to + k] = scale * delta[from + k];
      if (!b_.needs_gd) continue;
      for (int k = 0; k < r; ++k) {
        m.gs[to + k] = gs[from + k];
        m.gd[to + k] = -gd[from + k];
      }
      T* back = m.back + int64_t{n} * down_ranks_;
      if (edit_.linear()) {
        std::copy_n(m.gs + to, down_ranks_, back);  // r of them or none
      } else {
        if (edit_.W.data != nullptr) std::copy_n(m.gs + to, r, back);
        if (edit_.subtract) std::copy_n(m.gd + to, r, back + b_.panels.subtracted_at());
      }
    }
  }

  // The strip that begins at column `at` of a slab. Meanwhile the next is fetched.
  void strip(Memory& m, const BackwardTile& tile, const BackwardTile& next_tile, int64_t slab, int at,
             int slab_columns) const {
    const Kernels<T>& kernels = b_.kernels;
    const int r = edit_.r, columns = std::min(strip_, slab_columns - at);
    const int64_t column = slab + at;
    const Shape shape{tile.rows, columns};
    const bool same_tile = at + strip_ < slab_columns;
    const bool fetches = same_tile || next_tile.rows >= tile.rows;
    const BackwardTile& fetched = same_tile ? tile : next_tile;
    const int64_t next_column = same_tile ? column + strip_ : slab;
    const StripIn next_g{fetches ? fetched.grad : nullptr, next_column};
    const StripIn next_x{fetches ? fetched.x : nullptr, next_column};

    // Every strip is made wide in the same memory: rows that are some power of two apart would push one
    // another out of the first-level cache.
    const StripIn wide{m.wide_rows.row, 0};
    const StripOut to_wide{m.wide_rows.row, 0};
    T* const dR = m.dR + int64_t{r} * at;
    T* const dW = m.dW + int64_t{r} * at;
    if (edit_.seed != nullptr) {
      kernels.drop_to_wide({tile.grad, column}, to_wide, shape, dropout_of(edit_, tile.row_number, column));
    } else {
      kernels.widen_rows({tile.grad, column}, to_wide, shape);
    }
    if (b_.wants_R) kernels.outer(wide, next_g, shape, m.update, r, r, dR, columns);
    if (b_.wants_h) {
      const Panel<T> panel{m.down_panel + int64_t{down_ranks_} * at, columns, down_ranks_};
      kernels.up_from_wide(wide, {}, {tile.dh, column}, shape, panel, m.back);
    }
    if (!b_.reads_x) return;
    if (rebuilds_) {
      const Panel<T> panel{m.up_panel + int64_t{r} * at, columns, r};
      kernels.undo_up_to_wide({tile.x, column}, {}, to_wide, shape, panel, m.update);
    } else {
      kernels.widen_rows({tile.x, column}, to_wide, shape);
    }
    if (sums_gs_) kernels.outer(wide, next_x, shape, m.gs, r, r, dW, columns);
    if (sums_gd_) kernels.outer(wide, {}, shape, m.gd, r, r, dR, columns);
  }

  const Backward<T>& b_;
  const Edit& edit_;
  int down_ranks_;
  bool rebuilds_;  // x is y: rows are rebuilt, strip by strip. To correct sums of y instead would lose digits
  bool shares_sum_;  // where f is linear gd is gs, and dW's sum is part of dR
  bool sums_gs_;     // sum gs x^T is needed
  bool sums_gd_;     // sum gd x^T is needed on its own
  int strip_;        // columns
  int64_t slab_;     // columns
};

}  // namespace reft_kernels::cpu
