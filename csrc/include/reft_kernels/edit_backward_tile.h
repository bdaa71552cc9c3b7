// What a backward kernel is told besides the operands, and how its shared memory is laid out: for the
// kernels, which run by it, and the plan, which counts by it.
#pragma once

#include "reft_kernels/edit_forward_tile.h"
#include "reft_kernels/edit_params.h"
#include "reft_kernels/edit_plan.h"

namespace reft_kernels {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardWarps = kBackwardThreads / 32;
constexpr int64_t kMaxSlots = 1 << 29;  // slots, batches, positions and groups count in 32 bits
constexpr int kProjectRows = 4;         // slots that the rows kernel has sums for in phase 1
constexpr int kSlabSlotBytes = 16;
constexpr int kMaxStages = 3;
constexpr int kChunkStep = 16;

// Columns of a thread of the rows kernel in phase 2: 16 bytes of a row, or 8 where more would need too many
// registers.
REFT_HOST_DEVICE constexpr int slab_columns(int rank_tile, int bytes) {
  return bytes == 2 && rank_tile <= 4 ? 8 : 4;
}

// Offsets in bytes.
struct BackwardShared {
  int project_slots;  // SlabSlot: the slots whose rows phase 1 projects
  int partial;        // float: its sums of each warp
  int ring;           // its rows
  int weights;        // of a slab
  int table;          // SlabSlot [stages + 1, slots]
  int stages;         // of grad, x and the ranks; at last the sums of each warp
  int stage_bytes;
  int x, ranks;  // inside a stage, where the rows of grad are first
  int64_t total;
};

struct BackwardTile {
  bool mma = false;
  int32_t rank_tile = 1;  // the kernel's template parameter
  int32_t rows = 1;       // slots of a tile of phase 1
  int32_t ring = 2;       // pieces of its rows in shared memory at once
  int32_t slab = 32;      // columns of an item of phase 2: 2 to the power of slab_bits
  int32_t slab_bits = 5;
  int32_t rank_groups = 1;  // rows kernel: threads that share a slot's ranks
  int32_t slots = 0;        // of a stage of phase 2
  int32_t stages = 2;
  int32_t row_stride = 0;   // bytes of a slot's columns in a stage, with padding
  int32_t rank_stride = 0;  // floats of a slot's ranks in a stage, with padding
  int32_t chunk = 0;        // slots between two grid barriers; a multiple of kChunkStep
  BackwardShared at;
  bool vectors =
      false;  // every row of grad, dh, x and R starts at a multiple of 16 bytes and is whole ones long
  bool rank_vectors = false;  // gd, gs and delta start at multiples of 16 bytes
};

// The arrays [N, r] that phase 2 reads: gs, gd where it is another, delta where it counts.
REFT_HOST_DEVICE bool reads_delta(const EditBackwardParams& p) {
  return p.dR.data || (p.rebuild && p.dW.data);
}
inline int rank_arrays(const EditBackwardParams& p) {
  return 1 + !p.edit.linear() + reads_delta(p);
}

inline BackwardShared backward_shared(const EditBackwardParams& p, const BackwardTile& tile) {
  const bool mma = tile.mma;
  const int ranks = tile.rank_tile * tile.rank_groups;
  BackwardShared at{};
  at.project_slots = 0;
  at.partial = (mma ? kMmaRows : kBackwardThreads) * kSlabSlotBytes;
  // mma: [warps, 16 slots, up to 32 ranks]; rows: [2, warps, up to 32 sums]
  const int sums = mma ? kMmaRows * (ranks < 32 ? ranks : 32) : 2 * 32;
  at.ring = at.partial + kBackwardWarps * sums * 4;
  at.weights = at.ring + (mma ? 0 : tile.ring * kProjectRows * kBackwardThreads * 16);
  at.table = at.weights + 2 * ranks * tile.slab * 4;
  at.stages = static_cast<int>(round_up(at.table + (tile.stages + 1) * tile.slots * kSlabSlotBytes, 128));
  at.x = tile.slots * tile.row_stride;
  at.ranks = 2 * at.x;
  at.stage_bytes =
      static_cast<int>(round_up(at.ranks + rank_arrays(p) * tile.slots * tile.rank_stride * 4, 128));
  const int64_t staged = static_cast<int64_t>(tile.stages) * at.stage_bytes;
  // mma: of dW and dR, [warps, 16 ranks, slab]; rows: of one of them, [warps, ranks, slab]
  const int64_t reduced = static_cast<int64_t>(kBackwardWarps) * (mma ? 2 * 16 : ranks) * tile.slab * 4;
  at.total = at.stages + (staged > reduced ? staged : reduced);
  return at;
}

inline bool backward_vectors(const EditBackwardParams& p) {
  const Edit& e = p.edit;
  const int64_t size = bytes_of(e.h_type);
  const auto rows = [size](const void* data, const int64_t (&stride)[2]) {
    return !data || (is_aligned(data, stride[0] * size) && is_aligned(data, stride[1] * size));
  };
  return rows(p.grad.data, p.grad.stride) && rows(p.dh.data, p.dh.stride) && rows(p.x.data, p.x.stride) &&
         is_aligned(e.R.data, e.d * bytes_of(e.R.type)) && is_aligned(nullptr, e.d * size);
}

// The tile of a plan, as near as there is one. As much is under way at once as the shared memory holds; no
// slots if it holds too little. Sums are the same bits all the same: what a slot's place among the threads
// depends on is its number.
inline BackwardTile backward_tile(const EditBackwardParams& p, const Plan& plan, int shared_bytes) {
  const Edit& e = p.edit;
  const int size = bytes_of(e.h_type);
  BackwardTile tile;
  tile.mma = plan.kernel == Kernel::kBackwardMma;
  tile.vectors = backward_vectors(p);
  tile.rank_vectors = is_aligned(p.gd, 0) && is_aligned(p.gs, 0) && is_aligned(p.delta, 0);
  int most_slots = 0, fewest_slots = 0;
  if (tile.mma) {
    tile.rank_tile = 16;
    while (tile.rank_tile < 64 && (tile.rank_tile < e.r || tile.rank_tile < plan.rank_tile))
      tile.rank_tile *= 2;
    tile.rows = kMmaRows;
    // A float16 in two parts needs more registers.
    const bool wide = e.h_type == DType::kBFloat16 || tile.rank_tile < 64;
    tile.slab = plan.slab >= 64 && wide ? 64 : 32;
    tile.row_stride = tile.slab * size + 16;
    tile.rank_stride = tile.rank_tile + 4;
    most_slots = 128;
    fewest_slots = 32;
  } else {
    while (tile.rank_tile < 8 && tile.rank_tile < plan.rank_tile) tile.rank_tile *= 2;
    while (tile.rank_tile * tile.rank_groups < e.r) tile.rank_groups *= 2;
    tile.rows = plan.tile_rows < kProjectRows ? plan.tile_rows : kProjectRows;
    tile.slab = plan.slab;
    const int columns = slab_columns(tile.rank_tile, size);
    // A slot's threads are of one warp, which holds 8 slots' at most, and no more than there are sums to
    // share.
    while (tile.slab * tile.rank_groups > 32 * columns) tile.slab /= 2;
    while (tile.slab * tile.rank_groups < 4 * columns || tile.slab * tile.rank_groups * tile.rank_tile < 32) {
      tile.slab *= 2;
    }
    if (tile.slab < 16) return tile;
    const int lanes = kBackwardThreads * columns / (tile.slab * tile.rank_groups);
    tile.row_stride = tile.slab * size;
    tile.rank_stride = e.r;
    most_slots = lanes * (size == 2 ? 16 : 8) / columns;
    fewest_slots = lanes;
  }
  tile.slab_bits = 0;
  while (1 << tile.slab_bits < tile.slab) ++tile.slab_bits;
  const int64_t chunk = plan.chunk < e.rows() ? plan.chunk : e.rows();
  tile.chunk = static_cast<int32_t>(round_up(chunk < 1 ? 1 : chunk, kChunkStep));
  for (tile.slots = most_slots; tile.slots >= fewest_slots; tile.slots /= 2) {
    for (tile.stages = kMaxStages; tile.stages >= 2; --tile.stages) {
      tile.ring = tile.stages;
      tile.at = backward_shared(p, tile);
      if (tile.at.total <= shared_bytes) return tile;
    }
  }
  tile.slots = 0;
  return tile;
}

}  // namespace reft_kernels
