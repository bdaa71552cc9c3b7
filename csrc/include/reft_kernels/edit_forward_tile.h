// What a forward kernel is told besides the operands, and how its shared memory is laid out: for the kernels,
// which run by it, and the plan, which counts by it.
#pragma once

#include "reft_kernels/edit_params.h"
#include "reft_kernels/edit_plan.h"

namespace reft_kernels {

struct ForwardTile {
  int32_t rows = 1;     // slots of a tile
  int32_t cluster = 1;  // blocks of a tile
  int32_t slice = 0;    // columns of a block
  bool staged = false;  // the tile's rows are held in shared memory, and all is accessed by 16 bytes
};

constexpr int kMmaRows = 16;     // of the mma kernel
constexpr int kMmaColumns = 32;  // that a warp of the mma kernel takes at once
constexpr int kSlotBytes = 32;

REFT_HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Slots of a tile of the rows kernel at most: a thread holds a sum for each of them and each rank of the rank
// tile.
REFT_HOST_DEVICE constexpr int max_tile_rows(bool linear, int rank_tile) {
  return !linear || rank_tile > 4 ? 4 : 8;
}

// Products of a row with weights: with A = W - gamma R where f is linear, with W and with R else.
REFT_HOST_DEVICE constexpr int products_of(bool linear) {
  return linear ? 1 : 2;
}

// Columns of each block where a cluster shares a row: a multiple of 64, so that they start at a cache line.
REFT_HOST_DEVICE constexpr int64_t slice_columns(int64_t d, int cluster) {
  return cluster == 1 ? d : round_up((d + cluster - 1) / cluster, 64);
}

// Offsets in bytes.
struct ForwardShared {
  int slots;     // Slot [rows]
  int barrier;   // of the bulk copies
  int partial;   // float [warps, rows, products, ranks]
  int exchange;  // float [cluster, rows, products, ranks]; written by the whole cluster
  int u;         // float [rows, ranks]: scale * delta
  int stash;     // the rows before the edit
  int64_t total;
};

// `ranks`: r with its padding; `stash_bytes`: 0 where the rows are not staged.
REFT_HOST_DEVICE constexpr ForwardShared forward_shared(int rows, int products, int ranks, int warps,
                                                        int cluster, int64_t stash_bytes) {
  const int sums = rows * products * ranks * 4;
  ForwardShared at{};
  at.slots = 0;
  at.barrier = rows * kSlotBytes;
  at.partial = static_cast<int>(round_up(at.barrier + 8, 16));
  at.exchange = at.partial + warps * sums;
  at.u = at.exchange + (cluster > 1 ? cluster * sums : 0);
  at.stash = static_cast<int>(round_up(at.u + rows * ranks * 4, 128));
  at.total = at.stash + stash_bytes;
  return at;
}

// Ranks in shared memory: whole groups of four, which are read at once, or of eight and a gap against bank
// conflicts.
REFT_HOST_DEVICE constexpr int padded_ranks(int r) {
  return static_cast<int>(round_up(r, 4));
}
REFT_HOST_DEVICE constexpr int padded_mma_ranks(int rank_tile) {
  return rank_tile + 8;
}

inline bool is_aligned(const void* data, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

// Whether all can be accessed by 16 bytes: every row of h, y, `rows`, R and W starts at a multiple of them
// and is some of them long.
inline bool forward_vectors(const EditForwardParams& p) {
  const Edit& e = p.edit;
  const int64_t size = bytes_of(e.h_type);
  const auto rows = [&e, size](const void* data, const int64_t (&stride)[2]) {
    return is_aligned(data, (e.batch > 1 ? stride[0] : 0) * size) &&
           is_aligned(data, (e.length > 1 ? stride[1] : 0) * size);
  };
  return is_aligned(p.rows, e.d * size) && rows(p.h.data, p.h.stride) && rows(p.y.data, p.y.stride) &&
         is_aligned(e.R.data, e.d * bytes_of(e.R.type)) && is_aligned(e.W.data, e.d * bytes_of(e.W.type));
}

// The layout under a plan.
inline ForwardShared forward_shared(const Edit& e, const Plan& plan, bool staged) {
  const int ranks = plan.kernel == Kernel::kForwardMma ? padded_mma_ranks(plan.rank_tile) : padded_ranks(e.r);
  const int64_t stash = plan.tile_rows * slice_columns(e.d, plan.cluster) * bytes_of(e.h_type);
  return forward_shared(plan.tile_rows, products_of(e.linear()), ranks, plan.threads / 32, plan.cluster,
                        staged ? stash : 0);
}

inline ForwardTile forward_tile(const EditForwardParams& params, const Plan& plan) {
  ForwardTile tile;
  tile.rows = plan.tile_rows;
  tile.cluster = plan.cluster;
  tile.slice = static_cast<int32_t>(slice_columns(params.edit.d, plan.cluster));
  tile.staged = forward_vectors(params) && plan.shared_bytes >= forward_shared(params.edit, plan, true).total;
  return tile;
}

}  // namespace reft_kernels
