// The backward of the edit on CUDA cores: any type, any r up to 64, any d.
#pragma once

#include "reft_kernels/activation.h"
#include "reft_kernels/edit_backward_slab.cuh"

namespace reft_kernels {

// Sums the first kCount values over lanes that differ in the bits from kMask down, each lane keeping half of
// them at each step, until kLeft are left.
template <int kCount, int kMask, int kLeft, int kSize>
REFT_DEVICE void fold_some_lanes(float (&value)[kSize], int lane) {
  if constexpr (kCount > kLeft) {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane & kMask) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float mine = upper ? value[i + kHalf] : value[i];
      const float theirs = upper ? value[i] : value[i + kHalf];
      value[i] = mine + shuffle_xor(theirs, kMask);
    }
    fold_some_lanes<kHalf, kMask / 2, kLeft>(value, lane);
  }
}

// Phase 1: a block takes up to four slots at once, a thread every 256th piece of 16 bytes of their rows,
// which come to shared memory some pieces ahead. Phase 2: a thread has four or eight columns and kRanks ranks
// of every so-many-th slot; where r is more, neighbours in a warp share the ranks.
template <typename H, typename TR, int kRanks>
struct BackwardRows {
  static constexpr int kSums = kProjectRows * kRanks;
  static constexpr int kPiece = kElementsIn16Bytes<H>;
  static constexpr int kColumns = slab_columns(kRanks, sizeof(H));
  static_assert(kSums <= 32);

  const EditBackwardParams& p;
  const Edit& e;
  const BackwardTile& tile;
  char* const shared;
  const int thread, lane, warp;
  SlabStream<H, false> stream;
  const int column_lanes, slot_threads;   // threads that share a slot's columns; its columns and ranks
  const int my_column, my_rank, my_slot;  // in the slab, among the ranks, among the slots read at once
  float dW[kRanks][kColumns], dR[kRanks][kColumns];
  float sum_gs[kRanks], sum_gd[kRanks];

  REFT_DEVICE BackwardRows(const EditBackwardParams& params, const BackwardTile& backward_tile)
      : p(params),
        e(params.edit),
        tile(backward_tile),
        shared(dynamic_shared()),
        thread(static_cast<int>(threadIdx.x)),
        lane(thread % 32),
        warp(thread / 32),
        stream{params, params.edit, backward_tile, shared, thread, 0, 0, 0, 0},
        column_lanes(tile.slab / kColumns),
        slot_threads(column_lanes * tile.rank_groups),
        my_column(thread % column_lanes * kColumns),
        my_rank(thread / column_lanes % tile.rank_groups * kRanks),
        my_slot(thread / slot_threads) {}

  // --- phase 1

  REFT_DEVICE SlabSlot* project_slots() const {
    return reinterpret_cast<SlabSlot*>(shared + tile.at.project_slots);
  }

  // The part of the chunk's tiles that falls to this block.
  REFT_DEVICE void project(int begin, int end) {
    constexpr int kTiles = kBackwardThreads / kProjectRows;  // whose slots are looked up at once
    const int tiles = (end - begin + tile.rows - 1) / tile.rows, blocks = static_cast<int>(gridDim.x);
    for (int first = static_cast<int>(blockIdx.x); first < tiles; first += kTiles * blocks) {
      const int m = thread % kProjectRows, mine = first + thread / kProjectRows * blocks;
      sync_block();
      project_slots()[thread] = slab_slot(e, begin + mine * tile.rows + m, m < tile.rows ? end : 0);
      sync_block();
      const int count = min((tiles - first + blocks - 1) / blocks, kTiles);
      if (tile.vectors) {
        project_tiles<kPiece>(begin + first * tile.rows, count);
      } else {
        project_tiles<1>(begin + first * tile.rows, count);
      }
    }
  }

  // The steps of phase 1 in order: tiles, the ranks of each, the pieces of its rows.
  struct Step {
    int number, tile, rank, piece;
    REFT_DEVICE void advance(int pieces, int rank_steps) {
      ++number;
      if (++piece < pieces) return;
      piece = 0;
      if (++rank < rank_steps) return;
      rank = 0;
      ++tile;
    }
  };

  // A thread takes kWidth columns at once.
  template <int kWidth>
  REFT_DEVICE void project_tiles(int first_slot, int count) {
    const int pieces = static_cast<int>((e.d + kBackwardThreads * kWidth - 1) / (kBackwardThreads * kWidth));
    const int rank_steps = (e.r + kRanks - 1) / kRanks;
    Step ahead{0, 0, 0, 0}, now{0, 0, 0, 0};
    for (int i = 1; i < tile.ring; ++i) {
      stage_pieces<kWidth>(ahead, count);
      ahead.advance(pieces, rank_steps);
    }
    while (now.tile < count) {
      const SlabSlot* slots = project_slots() + now.tile * kProjectRows;
      const int n = first_slot + now.tile * static_cast<int>(gridDim.x) * tile.rows;
      const int k0 = now.rank * kRanks;
      float sum[kSums];
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum[j] = 0.0f;
      do {
        stage_pieces<kWidth>(ahead, count);
        ahead.advance(pieces, rank_steps);
        const int j = (now.piece * kBackwardThreads + thread) * kWidth;
        if (j < e.d) add_piece<kWidth>(slots, now.number, k0, j, sum);
        now.advance(pieces, rank_steps);
      } while (now.piece != 0);
      store_ranks(slots, n, k0, now.number / pieces % 2, sum);
    }
  }

  // The thread's own place for 16 bytes of a row.
  REFT_DEVICE H* piece_place(int step, int m) const {
    const int index = (remainder(step, tile.ring) * kProjectRows + m) * kBackwardThreads + thread;
    return reinterpret_cast<H*>(shared + tile.at.ring + index * 16);
  }

  template <int kWidth>
  REFT_DEVICE void stage_pieces(const Step& step, int count) const {
    const int j = (step.piece * kBackwardThreads + thread) * kWidth;
    if (step.tile < count && j < e.d) {
      const SlabSlot* slots = project_slots() + step.tile * kProjectRows;
#pragma unroll
      for (int m = 0; m < kProjectRows; ++m) {
        const SlabSlot slot = slots[m];
        if (slot.group < 0) continue;
        const H* from = static_cast<const H*>(p.grad.data) + row_offset(p.grad.stride, slot) + j;
        if constexpr (kWidth == 1) {
          *piece_place(step.number, m) = *from;
        } else {
          copy_async_16(piece_place(step.number, m), from);
        }
      }
    }
    commit_async();
  }

  // Slots of one group at a time: R is read once for all of them.
  template <int kWidth>
  REFT_DEVICE void add_piece(const SlabSlot* slots, int step, int k0, int j, float (&sum)[kSums]) const {
    constexpr int kPart = kWidth == 1 ? 1 : 4;
    unsigned left = 0;
#pragma unroll
    for (int m = 0; m < kProjectRows; ++m) left |= slots[m].group >= 0 ? 1u << m : 0u;
    while (left) {
      const int group = slots[(left & 1) ? 0 : (left & 2) ? 1 : (left & 4) ? 2 : 3].group;
#pragma unroll
      for (int part = 0; part < kWidth; part += kPart) {
        float R[kRanks][kPart] = {};
        const TR* from =
            static_cast<const TR*>(e.R.data) + (static_cast<int64_t>(group) * e.r + k0) * e.d + j + part;
#pragma unroll
        for (int k = 0; k < kRanks; ++k, from += e.d) {
          if (k0 + k < e.r) load_floats(from, R[k]);
        }
        if (part == 0) wait_for_piece<kWidth>(slots, step, group, j);
#pragma unroll
        for (int m = 0; m < kProjectRows; ++m) {
          if (slots[m].group != group) continue;
          float g[kPart];
          load_floats(piece_place(step, m) + part, g);
#pragma unroll
          for (int k = 0; k < kRanks; ++k) {
#pragma unroll
            for (int c = 0; c < kPart; ++c) sum[m * kRanks + k] += R[k][c] * g[c];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kProjectRows; ++m) left &= slots[m].group == group ? ~(1u << m) : ~0u;
    }
  }

  // The pieces of a group's slots have come, and what dropout drops of them is 0; the rest is not scaled.
  template <int kWidth>
  REFT_DEVICE void wait_for_piece(const SlabSlot* slots, int step, int group, int j) const {
    wait_pending(tile.ring - 1);
    if (!e.seed) return;
#pragma unroll 1
    for (int m = 0; m < kProjectRows; ++m) {
      if (slots[m].group != group) continue;
#pragma unroll 1
      for (int c = 0; c < kWidth; c += 4) {
        drop_in_place<kWidth == 1 ? 1 : 4>(e, slots[m], j + c, piece_place(step, m) + c);
      }
    }
  }

  // Sums over the block, and gd and gs of the tile whose first slot is n. `turn` alternates between two
  // places for the sums of warps, so that one barrier is enough.
  REFT_DEVICE void store_ranks(const SlabSlot* slots, int n, int k0, int turn, float (&sum)[kSums]) const {
    float* partial = reinterpret_cast<float*>(shared + tile.at.partial) + turn * kBackwardWarps * kSums;
    sum_over_lanes<kSums>(sum, lane);
    if (lane % (32 / kSums) == 0) partial[warp * kSums + lane * kSums / 32] = sum[0];
    sync_block();
    if (thread >= kSums) return;
    const int m = thread / kRanks, k = k0 + thread % kRanks;
    const SlabSlot slot = slots[m];
    if (slot.group == kNoSlot || k >= e.r) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kBackwardWarps; ++w) total += partial[w * kSums + thread];
    const int64_t i = static_cast<int64_t>(n + m) * e.r + k;
    const float gain = e.seed ? slot.scale * static_cast<float>(e.keep_scale) : slot.scale;
    const float gd = slot.group < 0 ? 0.0f : gain * total;
    static_cast<float*>(p.gd)[i] = gd;
    if (!e.linear()) {
      const float slope =
          slot.group < 0 ? 0.0f : activation_slope(static_cast<const float*>(p.s)[i], e.activation);
      static_cast<float*>(p.gs)[i] = gd * slope;
    }
  }

  // --- phase 2

  // What dh needs of the weights, [ranks, slab]: W, or A where f is linear, and after it R.
  REFT_DEVICE float* weights(int which) const {
    return reinterpret_cast<float*>(shared + tile.at.weights) + which * kRanks * tile.rank_groups * tile.slab;
  }

  REFT_DEVICE void begin_item(int group, int column) {
    stream.group = group;
    stream.column = column;
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
      sum_gs[k] = sum_gd[k] = 0.0f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) dW[k][c] = dR[k][c] = 0.0f;
    }
    const int ranks = kRanks * tile.rank_groups;
#pragma unroll 1
    for (int q = thread; q < ranks << tile.slab_bits; q += kBackwardThreads) {
      const int k = q >> tile.slab_bits, j = column + (q & (tile.slab - 1));
      const bool inside = k < e.r && j < e.d;
      const int64_t i = (static_cast<int64_t>(group) * e.r + k) * e.d + j;
      const float R = inside ? to_float(static_cast<const TR*>(e.R.data)[i]) : 0.0f;
      float W = inside && e.W.data ? float_at(e.W.data, e.W.type, i) : 0.0f;
      if (e.linear() && e.subtract) W -= R;
      weights(0)[q] = W;
      weights(1)[q] = R;
    }
  }

  REFT_DEVICE void load_weight(int which, int k, float (&to)[kColumns]) const {
    load_floats(weights(which) + (my_rank + k) * tile.slab + my_column, to);
  }

  // What most edits ask for, whose loop over slots is short of questions: f linear and every gradient, in
  // rows that can be read by 16 bytes, no dropout, nothing to rebuild, and all ranks in one thread.
  REFT_DEVICE bool usual() const {
    return e.linear() && p.dh.data && p.dR.data && p.dW.data && tile.vectors && !e.seed && !p.rebuild &&
           e.r == kRanks;
  }

  REFT_DEVICE void sum_chunk() {
    float A[kRanks][kColumns];
    const int tiles = stream.tiles();
    for (int i = 0; i < tiles; ++i) {
      const SlabSlot next = stream.slot_of(i + tile.stages);
      stream.wait_for(i, next);
      if (i == 0) {
#pragma unroll
        for (int k = 0; k < kRanks; ++k) load_weight(0, k, A[k]);
      }
      if (usual()) {
        sum_tile<true>(i, A);
      } else {
        sum_tile<false>(i, A);
      }
      if (p.copy_idle && stream.group == 0) stream.copy_idle_rows(i);
      stream.advance(i);
    }
  }

  template <bool kUsual>
  REFT_DEVICE void load_ranks(const float* from, float (&to)[kRanks]) const {
    if (kUsual || (e.r % kRanks == 0 && my_rank < e.r)) {
      load_floats(from, to);
    } else {
#pragma unroll
      for (int k = 0; k < kRanks; ++k) to[k] = my_rank + k < e.r ? from[k] : 0.0f;
    }
  }

  template <bool kUsual>
  REFT_DEVICE void sum_tile(int i, const float (&A)[kRanks][kColumns]) {
    const bool linear = kUsual || e.linear(), needs_dh = kUsual || p.dh.data, needs_dR = kUsual || p.dR.data;
    const bool needs_x = kUsual || stream.needs_x(), needs_grad = kUsual || stream.needs_grad();
    const bool rebuilds = !kUsual && p.rebuild && needs_x, drops = !kUsual && e.seed;
    const bool needs_u = needs_dR || rebuilds, crosses = needs_dR && e.subtract && !linear;
    const SlabSlot* slots = stream.table(i);
    const H *grad_rows = stream.grad_row(i, 0) + my_column, *x_rows = stream.x_row(i, 0) + my_column;
    const float *gs_rows = stream.gs(i, 0) + my_rank, *gd_rows = stream.gd(i, 0) + my_rank;
    const float* delta_rows = stream.delta(i, 0) + my_rank;
    const int lanes = kBackwardThreads / slot_threads;
    // A slot's thread depends on its number alone.
#pragma unroll 1
    for (int slot = (my_slot - stream.begin) & (lanes - 1); slot < tile.slots; slot += lanes) {
      const SlabSlot row = slots[slot];
      const bool own = row.group == stream.group;
      if (kUsual && !own) continue;
      const int at = slot << tile.slab_bits, rank_at = slot * e.r;
      float gs[kRanks] = {}, gd[kRanks] = {}, u[kRanks] = {};  // u = scale * delta
      float dh[kColumns] = {}, x[kColumns] = {};
      if (own) {
        load_ranks<kUsual>(gs_rows + rank_at, gs);
        if (!linear) load_ranks<kUsual>(gd_rows + rank_at, gd);
        if (needs_u) {
          load_ranks<kUsual>(delta_rows + rank_at, u);
#pragma unroll
          for (int k = 0; k < kRanks; ++k) u[k] *= row.scale;
        }
      }
      if (needs_x) {
        if (own && (my_rank == 0 || !rebuilds)) load_floats(x_rows + at, x);
        if (rebuilds) {  // y - R^T u, rounded as h was
          if (own) subtract_up(u, x);
          sum_over_rank_groups(x);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) x[c] = to_float(from_float<H>(x[c]));
        }
        if (own) add_products(gs, x, 1.0f, dW);
        if (own && crosses) add_products(gd, x, -1.0f, dR);
      }
      if (own && needs_grad) {
        float g[kColumns];
        load_floats(grad_rows + at, g);
        if (drops) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) g[c] *= static_cast<float>(e.keep_scale);
        }
        if (needs_dR) add_products(u, g, 1.0f, dR);
        if (kUsual || my_rank == 0) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) dh[c] = g[c];
        }
      }
      if (own && stream.column == 0) {
#pragma unroll
        for (int k = 0; k < kRanks; ++k) {
          sum_gs[k] += gs[k];
          if (!linear) sum_gd[k] += gd[k];
        }
      }
      if (needs_dh) {
        if (own && (e.W.data || (linear && e.subtract))) add_up(gs, A, dh);
        if (own && e.subtract && !linear) subtract_up(gd, dh);
        if (!kUsual) sum_over_rank_groups(dh);
        if (own && (kUsual || my_rank == 0)) store_dh<kUsual>(row, dh);
      }
    }
  }

  // sum += factor * u x^T
  REFT_DEVICE static void add_products(const float (&u)[kRanks], const float (&x)[kColumns], float factor,
                                       float (&sum)[kRanks][kColumns]) {
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[k][c] += factor * u[k] * x[c];
    }
  }

  // x += A^T u
  REFT_DEVICE static void add_up(const float (&u)[kRanks], const float (&A)[kRanks][kColumns],
                                 float (&x)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c] += u[k] * A[k][c];
    }
  }

  // x -= R^T u
  REFT_DEVICE void subtract_up(const float (&u)[kRanks], float (&x)[kColumns]) const {
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
      float R[kColumns];
      load_weight(1, k, R);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c] -= u[k] * R[c];
    }
  }

  REFT_DEVICE void sum_over_rank_groups(float (&value)[kColumns]) const {
#pragma unroll 1
    for (int mask = column_lanes; mask < slot_threads; mask *= 2) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) value[c] += shuffle_xor(value[c], mask);
    }
  }

  template <bool kUsual>
  REFT_DEVICE void store_dh(const SlabSlot& row, const float (&dh)[kColumns]) const {
    const int j = stream.column + my_column;
    H* to = static_cast<H*>(p.dh.data) + row_offset(p.dh.stride, row) + j;
    if (kUsual || tile.vectors) {
      if (j >= e.d) return;
      if constexpr (kColumns * sizeof(H) == 8) {
        store_8(to, {{pack_pair<H>(dh[0], dh[1]), pack_pair<H>(dh[2], dh[3])}});
      } else {
        store_floats(to, dh);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (j + c < e.d) to[c] = from_float<H>(dh[c]);
      }
    }
  }

  // --- the sums' end

  REFT_DEVICE float* reduced() const { return reinterpret_cast<float*>(shared + tile.at.stages); }

  REFT_DEVICE float sum_over_slot_lanes(float value) const {
#pragma unroll 1
    for (int mask = slot_threads; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
    return value;
  }

  // Sums over the lanes with the same columns and ranks, of which there are 2 to the power of kSteps. As many
  // of the sums as each lane is left with go to its warp's place for [ranks, slab].
  template <int kSteps>
  REFT_DEVICE void store_lane_sums(const float (&sum)[kRanks][kColumns]) const {
    constexpr int kCount = kRanks * kColumns, kLeft = kCount >> kSteps;
    if constexpr (kLeft > 0) {
      float value[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] = sum[i / kColumns][i % kColumns];
      fold_some_lanes<kCount, 16, kLeft>(value, lane);
      const int first = (lane >> (5 - kSteps)) * kLeft;
      constexpr int kWidth = kLeft < kColumns ? kLeft : kColumns;
      const int k = my_rank + first / kColumns, column = my_column + first % kColumns;
      float* place = reduced() + ((warp * kRanks * tile.rank_groups + k) << tile.slab_bits) + column;
#pragma unroll
      for (int i = 0; i < kLeft; i += kWidth, place += tile.slab) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) place[c] = value[i + c];
      }
    }
  }

  // Sums over the threads with the same columns and ranks; the thread's share of [ranks, slab] goes to `to`.
  static constexpr int kOutputs = 4;
  REFT_DEVICE void reduce(const float (&sum)[kRanks][kColumns], float (&to)[kOutputs]) const {
    const int count = kRanks * tile.rank_groups << tile.slab_bits;
    sync_block();
    if (slot_threads == 4) {
      store_lane_sums<3>(sum);
    } else if (slot_threads == 8) {
      store_lane_sums<2>(sum);
    } else if (slot_threads == 16) {
      store_lane_sums<1>(sum);
    } else {
      store_lane_sums<0>(sum);
    }
    sync_block();
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const int q = thread + j * kBackwardThreads;
      to[j] = 0.0f;
      if (q >= count) continue;
#pragma unroll
      for (int w = 0; w < kBackwardWarps; ++w) to[j] += reduced()[w * count + q];
    }
  }

  REFT_DEVICE void finish_item() {
    float W_sums[kOutputs] = {}, R_sums[kOutputs] = {};
    if (stream.needs_x()) reduce(dW, W_sums);
    if (p.dR.data) reduce(dR, R_sums);
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const int q = thread + j * kBackwardThreads;
      const int k = q >> tile.slab_bits, column = stream.column + (q & (tile.slab - 1));
      if (k >= e.r || column >= e.d) continue;
      const int64_t i = (static_cast<int64_t>(stream.group) * e.r + k) * e.d + column;
      if (p.dW.data) store_gradient(p.dW, i, W_sums[j]);
      if (p.dR.data) store_gradient(p.dR, i, e.linear() && e.subtract ? R_sums[j] - W_sums[j] : R_sums[j]);
    }
    if (stream.column == 0) {
      finish_vector(p.db, sum_gs, 1.0f);
#pragma unroll
      for (int k = 0; k < kRanks; ++k) sum_gd[k] = e.linear() ? sum_gs[k] : sum_gd[k];
      finish_vector(p.dc, sum_gd, -1.0f);
    }
  }

  REFT_DEVICE void finish_vector(const WeightGradient& gradient, const float (&sum)[kRanks],
                                 float factor) const {
    if (!gradient.data) return;
    const int ranks = kRanks * tile.rank_groups;
    sync_block();
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
      const float total = sum_over_slot_lanes(sum[k]);
      if (lane < slot_threads && my_column == 0) reduced()[warp * ranks + my_rank + k] = total;
    }
    sync_block();
    if (thread >= e.r) return;
    float total = 0.0f;
    for (int w = 0; w < kBackwardWarps; ++w) total += reduced()[w * ranks + thread];
    store_gradient(gradient, static_cast<int64_t>(stream.group) * e.r + thread, factor * total);
  }
};

template <typename H, typename TR, int kRanks>
REFT_KERNEL(kBackwardThreads, 1)
edit_backward_rows(REFT_GRID_CONSTANT EditBackwardParams params, REFT_GRID_CONSTANT BackwardTile tile) {
  BackwardRows<H, TR, kRanks> task(params, tile);
  run_backward(task);
}

}  // namespace reft_kernels
