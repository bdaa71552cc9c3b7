// Device code that the kernels of matrices with orthonormal rows share: staged columns, sums of their
// products over a slab, and sums over a block.
#pragma once

#include <type_traits>

#include "reft_kernels/block_team.cuh"
#include "reft_kernels/column_sums.h"
#include "reft_kernels/tiles.cuh"

namespace reft_kernels {

REFT_DEVICE bool aligned_16(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// --- staged columns

// Columns of a matrix, `quads` times four floats each. After every four columns lie 16 bytes that nobody
// uses, so that neither neighbouring columns nor every fourth of them are in the same banks.
struct Stage {
  float* at;
  int quads;
  REFT_DEVICE float* place(int column, int quad) const {
    return at + (column * quads + (column >> 2) + quad) * 4;
  }
};

// Four elements of each of four rows, the first at `from`, which are `stride` elements apart. Of them `rows`
// rows and `columns` columns are there, the others are 0.
REFT_DEVICE void load_square(const float* from, int64_t stride, int rows, int columns, bool vectors,
                             float (&value)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k, from += stride) {
    if (k < rows && vectors && columns >= 4) {
      load_floats(from, value[k]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) value[k][c] = k < rows && c < columns ? from[c] : 0.0f;
    }
  }
}

REFT_DEVICE void store_square(float* to, int64_t stride, int rows, int columns, bool vectors,
                              const float (&value)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k, to += stride) {
    if (k < rows && vectors && columns >= 4) {
      store_floats(to, value[k]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (k < rows && c < columns) to[c] = value[k][c];
      }
    }
  }
}

// Puts rows of four columns, [row of the quad][column], where columns are staged.
REFT_DEVICE void stage_square(const Stage& stage, int column, int quad, const float (&value)[4][4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float turned[4] = {value[0][c], value[1][c], value[2][c], value[3][c]};
    store_floats(stage.place(column + c, quad), turned);
  }
}

// --- sums over the columns of a slab

// Sums the first kCount values over kMask * 2 neighbouring lanes, each keeping half of them at each step
// while it has more than one.
template <int kCount, int kMask>
REFT_DEVICE void fold_lanes(double (&value)[kTileSums], int lane) {
  if constexpr (kMask > 0) {
    static_assert(kCount > 1);
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane & kMask) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const double mine = upper ? value[i + kHalf] : value[i];
      const double theirs = upper ? value[i] : value[i + kHalf];
      value[i] = mine + shuffle_xor(theirs, kMask);
    }
    fold_lanes<kHalf, kMask / 2>(value, lane);
  }
}

// What is summed: products of quads of staged columns, tile by tile.
struct TileSums {
  int r;
  int tiles;
  int groups;
  int chunk;        // columns staged at once
  double* partial;  // [groups, tiles, 16] of the slab
  int in_double;    // columns of the slab, the first of them, that are summed in float64 whatever E is; a
                    // multiple of 4
};

// Sums of products: in float64, or as a float32 and what that has lost, which costs no float64 a product.
template <typename E>
struct Accumulator {
  E sum[kTileSums] = {};
  float lost[std::is_same_v<E, float> ? kTileSums : 1] = {};

  REFT_DEVICE void add(int i, E term) {
    if constexpr (std::is_same_v<E, float>) {  // Knuth's sum of two, exact
      const float before = sum[i], after = before + term, other = after - before;
      lost[i] += (before - (after - other)) + (term - other);
      sum[i] = after;
    } else {
      sum[i] += term;
    }
  }

  REFT_DEVICE double total(int i) const {
    if constexpr (std::is_same_v<E, float>) {
      return static_cast<double>(sum[i]) + static_cast<double>(lost[i]);
    } else {
      return sum[i];
    }
  }
};

// Columns whose products a thread sums in E alone.
constexpr int kPlainColumns = 16;

// sum += the products of quads a and b of four staged columns, [4, 4] row by row.
template <typename E>
REFT_DEVICE void add_products_of_quads(const Stage& stage, int a, int b, int column, E (&sum)[kTileSums]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float x[4], y[4];
    load_floats(stage.place(column + c, a), x);
    load_floats(stage.place(column + c, b), y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[4 * i + j] += static_cast<E>(x[i]) * static_cast<E>(y[j]);
    }
  }
}

// Adds the lane's share of the products of quads a and b over staged columns from `begin` to `end`, multiples
// of 4.
template <typename E, int kLanes>
REFT_DEVICE void add_run(const Stage& stage, int a, int b, int begin, int end, Accumulator<E>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int first = begin + 4 * lane; first < end; first += kPlainColumns * kLanes) {
    E part[kTileSums] = {};
    const int last = min(first + kPlainColumns * kLanes, end);
#pragma unroll 1
    for (int column = first; column < last; column += 4 * kLanes)
      add_products_of_quads(stage, a, b, column, part);
#pragma unroll
    for (int i = 0; i < kTileSums; ++i) sums.add(i, part[i]);
  }
}

// The same with every sum in float64.
template <int kLanes>
REFT_DEVICE void add_run_in_double(const Stage& stage, int a, int b, int end, Accumulator<float>& sums) {
  double sum[kTileSums] = {};
#pragma unroll 1
  for (int column = 4 * (static_cast<int>(threadIdx.x) % kLanes); column < end; column += 4 * kLanes) {
    add_products_of_quads(stage, a, b, column, sum);
  }
#pragma unroll
  for (int i = 0; i < kTileSums; ++i) {
    const auto rounded = static_cast<float>(sum[i]);
    sums.add(i, rounded);
    sums.lost[i] += static_cast<float>(sum[i] - static_cast<double>(rounded));
  }
}

template <typename E, int kLanes, typename StageChunk, typename QuadsOf>
REFT_DEVICE void sum_slab_by(const TileSums& s, const Stage& stage, int columns,
                             const StageChunk& stage_chunk, const QuadsOf& quads) {
  const int thread = static_cast<int>(threadIdx.x), team = thread / kLanes, run = run_of(s.r);
  const int group = s.groups > 1 ? team / s.tiles : 0;
#pragma unroll 1
  for (int first = 0; first < s.tiles; first += kMatrixThreads / kLanes) {
    const int tile = s.groups > 1 ? team % s.tiles : first + team;
    const bool active = tile < s.tiles && group < s.groups;
    int a = 0, b = 0;
    if (active) quads(tile, &a, &b);
    Accumulator<E> sums;
#pragma unroll 1
    for (int begin = 0; begin < columns; begin += s.chunk) {
      const int count = min(s.chunk, columns - begin);
      stage_chunk(begin, count);
      const int padded = (count + 3) & ~3, in_double = min(max(s.in_double - begin, 0), padded);
      if constexpr (std::is_same_v<E, float>) {
        if (active && group == 0) add_run_in_double<kLanes>(stage, a, b, in_double, sums);
      }
#pragma unroll 1
      for (int at = 0; at < count; at += run * s.groups) {
        const int mine = max(at + group * run, in_double);
        add_run<E, kLanes>(stage, a, b, mine, active ? min(at + (group + 1) * run, padded) : 0, sums);
      }
    }
    double total[kTileSums];
#pragma unroll
    for (int i = 0; i < kTileSums; ++i) total[i] = sums.total(i);
    fold_lanes<kTileSums, kLanes / 2>(total, thread % kLanes);
    if (active) {
      double* to = s.partial + (group * s.tiles + tile) * kTileSums + thread % kLanes * (kTileSums / kLanes);
#pragma unroll
      for (int i = 0; i < kTileSums / kLanes; ++i) to[i] = total[i];
    }
  }
}

// Writes the partial sums of a slab of so many columns. `stage_chunk(begin, count)` stages columns of it and
// syncs the block before and after; `quads(tile, &a, &b)` says which quads a tile multiplies. E is the type
// of products and of their sums over a run.
template <typename E, typename StageChunk, typename QuadsOf>
REFT_DEVICE void sum_slab(const TileSums& s, const Stage& stage, int columns, const StageChunk& stage_chunk,
                          const QuadsOf& quads) {
  switch (lanes_of(s.r)) {
    case 16:
      return sum_slab_by<E, 16>(s, stage, columns, stage_chunk, quads);
    case 4:
      return sum_slab_by<E, 4>(s, stage, columns, stage_chunk, quads);
    default:
      return sum_slab_by<E, 1>(s, stage, columns, stage_chunk, quads);
  }
}

// The quads of a tile on or above the diagonal.
REFT_DEVICE void quads_of_upper_tile(int tile, int* a, int* b) {
  int column = 0;
  while (upper_tiles(column + 1) <= tile) ++column;
  *b = column;
  *a = tile - upper_tiles(column);
}

// Calls put(tile, element of the tile, sum over all slabs), after a grid barrier.
template <typename Put>
REFT_DEVICE void total_of_slabs(const double* partial, int parts, int tiles, const Put& put) {
  constexpr int kAtOnce = 8;  // loads under way
  const int count = tiles * kTileSums;
#pragma unroll 1
  for (int v = static_cast<int>(threadIdx.x); v < count; v += kMatrixThreads) {
    double total = 0.0;
#pragma unroll 1
    for (int part = 0; part < parts; part += kAtOnce) {
      double value[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        value[i] = part + i < parts ? load_from_other_block(partial + int64_t{part + i} * count + v) : 0.0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total += value[i];
    }
    put(v / kTileSums, v % kTileSums, total);
  }
}

// --- products of staged columns with a small matrix

// sum[k][c] += sum_i weights[i, 4 quad + k] staged[column + c][i], for i below 4 quads of the stage;
// `weights` has `width` elements a row.
template <typename E>
REFT_DEVICE void add_weighted(const Stage& stage, int column, const E* weights, int width, int quad,
                              int quads, E (&sum)[4][4]) {
#pragma unroll 1
  for (int q = 0; q < quads; ++q) {
    float x[4][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) load_floats(stage.place(column + c, q), x[c]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const E* row = weights + (4 * q + i) * width + 4 * quad;
      E weight[4];
      if constexpr (std::is_same_v<E, float>) {
        load_floats(row, weight);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) weight[k] = row[k];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[k][c] += weight[k] * static_cast<E>(x[c][i]);
      }
    }
  }
}

// --- sums over a block

// The sum over all threads, for all of them. `scratch` has an element a warp, and is free again afterwards.
REFT_DEVICE double sum_over_block(double value, double* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (thread % 32 == 0) scratch[thread / 32] = value;
  sync_block();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kMatrixThreads / 32; ++warp) total += scratch[warp];
  sync_block();
  return total;
}

}  // namespace reft_kernels
