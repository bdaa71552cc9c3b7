// What the two backward kernels share: the order of their work, and the stream of slots that phase 2 reads.
//
//     gd = scale * R g      gs = gd * f'(s)
//     dh = g + W^T gs - gamma R^T gd
//     dW = sum gs h^T       db = sum gs       dR = sum (scale delta) g^T - gamma sum gd h^T       dc = -gamma
//     sum gd
//
// Two reductions depend on one another: over the columns, for gd of each slot, then over the slots, for the
// weights. Phase 1 gives each block whole rows and leaves gd and gs in a workspace; a grid barrier; phase 2
// gives each block a slab of columns of one group, over all slots in order. Every sum has an order of its
// own, whatever the grid, the chunk and the timing: the gradients are the same bits at every run.
#pragma once

#include "reft_kernels/edit_backward_tile.h"
#include "reft_kernels/tiles.cuh"

namespace reft_kernels {

constexpr int kIdle = -1;    // group of a slot that edits nothing
constexpr int kNoSlot = -2;  // and of what is no slot

struct SlabSlot {
  int32_t batch, position, group;
  float scale;
};
static_assert(sizeof(SlabSlot) == kSlabSlotBytes);

REFT_DEVICE SlabSlot slab_slot(const Edit& e, int n, int end) {
  if (n >= end) return {0, 0, kNoSlot, 0.0f};
  const int slots = static_cast<int>(e.slots);
  const Slot slot = find_slot(e, n / slots, n % slots);
  const int32_t group = slot.live ? static_cast<int32_t>(slot.group) : kIdle;
  return {static_cast<int32_t>(slot.batch), static_cast<int32_t>(slot.position), group, slot.scale};
}

REFT_DEVICE int64_t row_offset(const int64_t (&stride)[2], const SlabSlot& slot) {
  return slot.batch * stride[0] + slot.position * stride[1];
}

// i % n for n from 2 to 4, of which the compiler knows none.
REFT_DEVICE int remainder(int i, int n) {
  return n == 3 ? i % 3 : i & (n - 1);
}

// Sets those of kCount elements of a slot's row to 0 that dropout drops: one, or four from a multiple of
// four.
template <int kCount, typename H>
REFT_DEVICE void drop_in_place(const Edit& e, const SlabSlot& slot, int column, H* to) {
  const uint64_t row = static_cast<uint64_t>(slot.batch * e.length + slot.position);
  const PhiloxBlock block = philox(static_cast<uint64_t>(*e.seed), row, static_cast<uint32_t>(column >> 2));
  if constexpr (kCount == 1) {
    const int c = column & 3;
    const uint32_t word = c == 0   ? block.word[0]
                          : c == 1 ? block.word[1]
                          : c == 2 ? block.word[2]
                                   : block.word[3];
    if ((word >> 1) < e.keep_threshold) *to = from_float<H>(0.0f);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if ((block.word[c] >> 1) < e.keep_threshold) to[c] = from_float<H>(0.0f);
    }
  }
}

// Until at most so many of the thread's own committed groups are under way.
REFT_DEVICE void wait_pending(int groups) {
  if (groups >= 2) {
    wait_async<2>();
  } else if (groups == 1) {
    wait_async<1>();
  } else {
    wait_async<0>();
  }
}
static_assert(kMaxStages <= 3);

template <typename T>
REFT_DEVICE void store_gradient_as(void* data, bool add, int64_t i, float value) {
  T* place = static_cast<T*>(data) + i;
  if constexpr (std::is_same_v<T, double>) {
    *place = add ? *place + value : value;
  } else {
    *place = from_float<T>(add ? to_float(*place) + value : value);
  }
}

REFT_DEVICE void store_gradient(const WeightGradient& gradient, int64_t i, float value) {
  switch (gradient.type) {
    case DType::kBFloat16:
      return store_gradient_as<BFloat16>(gradient.data, gradient.add, i, value);
    case DType::kFloat16:
      return store_gradient_as<Float16>(gradient.data, gradient.add, i, value);
    case DType::kFloat64:
      return store_gradient_as<double>(gradient.data, gradient.add, i, value);
    default:
      return store_gradient_as<float>(gradient.data, gradient.add, i, value);
  }
}

// The slots of a chunk, tile by tile of `tile.slots`, as the owner of a slab of one group's columns reads
// them: their columns of grad and x, and gs, gd and delta, some tiles ahead of their use.
template <typename H, bool kFillOthers>
struct SlabStream {
  static constexpr int kPiece = kElementsIn16Bytes<H>;

  const EditBackwardParams& p;
  const Edit& e;
  const BackwardTile& tile;
  char* const shared;
  const int thread;
  int group, column;  // of the item; the first column
  int begin, end;     // slots of the chunk

  REFT_DEVICE bool needs_grad() const { return p.dh.data || p.dR.data; }
  REFT_DEVICE bool needs_x() const { return p.dW.data || (p.dR.data && e.subtract); }

  REFT_DEVICE int tiles() const { return (end - begin + tile.slots - 1) / tile.slots; }

  REFT_DEVICE SlabSlot* table(int i) const {
    return reinterpret_cast<SlabSlot*>(shared + tile.at.table) + remainder(i, tile.stages + 1) * tile.slots;
  }
  REFT_DEVICE char* stage(int i) const {
    return shared + tile.at.stages + remainder(i, tile.stages) * tile.at.stage_bytes;
  }
  REFT_DEVICE H* grad_row(int i, int slot) const {
    return reinterpret_cast<H*>(stage(i) + slot * tile.row_stride);
  }
  REFT_DEVICE H* x_row(int i, int slot) const {
    return reinterpret_cast<H*>(stage(i) + tile.at.x + slot * tile.row_stride);
  }
  REFT_DEVICE float* rank_array(int i, int which) const {
    return reinterpret_cast<float*>(stage(i) + tile.at.ranks) + which * tile.slots * tile.rank_stride;
  }
  REFT_DEVICE const float* gs(int i, int slot) const { return rank_array(i, 0) + slot * tile.rank_stride; }
  REFT_DEVICE const float* gd(int i, int slot) const {
    return rank_array(i, e.linear() ? 0 : 1) + slot * tile.rank_stride;
  }
  REFT_DEVICE const float* delta(int i, int slot) const {
    return rank_array(i, e.linear() ? 1 : 2) + slot * tile.rank_stride;
  }

  // --- rows

  REFT_DEVICE void stage_piece(H* to, const H* row, int j) const {
    if (row && tile.vectors) {
      if (j < e.d) copy_async_16(to, row + j);
    } else if (row || kFillOthers) {
#pragma unroll 1
      for (int c = 0; c < kPiece; ++c) to[c] = row && j + c < e.d ? row[j + c] : from_float<H>(0.0f);
    }
  }

  REFT_DEVICE void stage_rows(int i) const {
    if (i >= tiles()) return;
    const SlabSlot* slots = table(i);
#pragma unroll 1
    for (int q = thread * kPiece; q < tile.slots << tile.slab_bits; q += kBackwardThreads * kPiece) {
      const int slot = q >> tile.slab_bits, j = q & (tile.slab - 1);
      const SlabSlot row = slots[slot];
      const bool own = row.group == group;
      if (needs_grad()) {
        const H* from = static_cast<const H*>(p.grad.data) + row_offset(p.grad.stride, row);
        stage_piece(grad_row(i, slot) + j, own ? from : nullptr, column + j);
      }
      if (needs_x()) {
        const int64_t n = begin + i * tile.slots + slot;
        const int64_t offset = p.x_is_rows ? n * p.x.stride[1] : row_offset(p.x.stride, row);
        stage_piece(x_row(i, slot) + j, own ? static_cast<const H*>(p.x.data) + offset : nullptr, column + j);
      }
    }
  }

  // --- ranks

  REFT_DEVICE void stage_rank_array(float* to, const void* data, int first, int slots) const {
    const float* from = static_cast<const float*>(data) + static_cast<int64_t>(first) * e.r;
    if (tile.rank_vectors && tile.rank_stride == e.r) {
      const int count = slots * e.r;
      const int pieces = count / 4 * 4;
#pragma unroll 1
      for (int q = thread * 4; q < pieces; q += kBackwardThreads * 4) copy_async_16(to + q, from + q);
      if (thread < count - pieces) to[pieces + thread] = load_from_other_block(from + pieces + thread);
    } else if (tile.rank_vectors && e.r % 4 == 0) {
      const int pieces = e.r / 4;
#pragma unroll 1
      for (int q = thread; q < slots * pieces; q += kBackwardThreads) {
        const int slot = q / pieces, k = q % pieces * 4;
        copy_async_16(to + slot * tile.rank_stride + k, from + slot * e.r + k);
      }
    } else {
#pragma unroll 1
      for (int q = thread; q < slots * e.r; q += kBackwardThreads) {
        to[q / e.r * tile.rank_stride + q % e.r] = load_from_other_block(from + q);
      }
    }
  }

  REFT_DEVICE void stage_ranks(int i) const {
    if (i >= tiles()) return;
    const int first = begin + i * tile.slots;
    const int slots = min(end - first, tile.slots);
    int which = 0;
    if (!e.linear()) stage_rank_array(rank_array(i, which++), p.gs, first, slots);
    stage_rank_array(rank_array(i, which++), p.gd, first, slots);
    if (reads_delta(p)) stage_rank_array(rank_array(i, which), p.delta, first, slots);
  }

  // --- the stream

  REFT_DEVICE SlabSlot slot_of(int i) const {
    const int n = begin + i * tile.slots + thread;
    return thread < tile.slots ? slab_slot(e, n, end) : SlabSlot{0, 0, kNoSlot, 0.0f};
  }

  // Before the grid barrier: what phase 1 does not write.
  REFT_DEVICE void open(int from, int to) {
    begin = from;
    end = to;
#pragma unroll 1
    for (int i = 0; i < tile.stages; ++i) {
      const SlabSlot slot = slot_of(i);
      if (thread < tile.slots) table(i)[thread] = slot;
    }
    sync_block();
#pragma unroll 1
    for (int i = 0; i < tile.stages; ++i) stage_rows(i);
  }

  // And after it, what it does.
  REFT_DEVICE void open_ranks() const {
#pragma unroll 1
    for (int i = 0; i < tile.stages; ++i) {
      stage_ranks(i);
      commit_async();
    }
  }

  // Tile i has come, and its elements of grad that dropout drops are 0; the others are not scaled.
  REFT_DEVICE void wait_for(int i, const SlabSlot& next) const {
    wait_pending(tile.stages - 1);
    sync_block();
    if (thread < tile.slots) table(i + tile.stages)[thread] = next;
    if (e.seed && needs_grad()) {
      drop_columns(i);
      sync_block();
    }
  }

  REFT_DEVICE void advance(int i) const {
    sync_block();
    stage_rows(i + tile.stages);
    stage_ranks(i + tile.stages);
    commit_async();
  }

  REFT_DEVICE void drop_columns(int i) const {
    const SlabSlot* slots = table(i);
#pragma unroll 1
    for (int q = thread * 4; q < tile.slots << tile.slab_bits; q += kBackwardThreads * 4) {
      const int slot = q >> tile.slab_bits, j = q & (tile.slab - 1);
      const SlabSlot row = slots[slot];
      if (row.group == group && column + j < e.d) drop_in_place<4>(e, row, column + j, grad_row(i, slot) + j);
    }
  }

  REFT_DEVICE void copy_idle_rows(int i) const {
    const SlabSlot* slots = table(i);
#pragma unroll 1
    for (int q = thread; q < tile.slots << tile.slab_bits; q += kBackwardThreads) {
      const SlabSlot row = slots[q >> tile.slab_bits];
      const int j = column + (q & (tile.slab - 1));
      if (row.group != kIdle || j >= e.d) continue;
      const H* from = static_cast<const H*>(p.grad.data) + row_offset(p.grad.stride, row);
      static_cast<H*>(p.dh.data)[row_offset(p.dh.stride, row) + j] = from[j];
    }
  }
};

// Both phases. With more than one chunk a block does its part of phase 1 of the next chunk before phase 2 of
// this one, so that it seldom waits at the barrier between them, and phase 2 finds in the cache what phase 1
// has read.
template <typename Task>
REFT_DEVICE void run_backward(Task& task) {
  const EditBackwardParams& p = task.p;
  const BackwardTile& tile = task.tile;
  const int rows = static_cast<int>(p.edit.rows());
  const int slabs = static_cast<int>((p.edit.d + tile.slab - 1) >> tile.slab_bits),
            items = slabs * p.edit.groups;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  unsigned ticket = 0;
  // A block without an item has a turn too: it is needed at the barriers.
  for (int item = block; item == block || item < items; item += blocks) {
    const bool first = item == block, owns = item < items;
    if (owns) task.begin_item(item / slabs, item % slabs << tile.slab_bits);
    for (int begin = first ? -tile.chunk : 0; begin < rows; begin += tile.chunk) {
      const int end = begin + tile.chunk;
      if (begin >= 0) {
        if (owns) task.stream.open(begin, min(end, rows));
        if (first) grid_wait(p.barrier, ticket);
        if (owns) task.stream.open_ranks();
      }
      if (first && end < rows) {
        task.project(end, min(end + tile.chunk, rows));
        ticket = grid_arrive(p.barrier);
      }
      if (begin >= 0 && owns) task.sum_chunk();
    }
    if (owns) task.finish_item();
  }
}

}  // namespace reft_kernels
