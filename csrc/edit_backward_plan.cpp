// Chooses the backward kernel and its tile.
//
// The kernel, and with it the order of every sum, follows from the edit's sizes and types and from the slab.
// The grid, the chunk and the stages follow from the device besides, and change no bit.
#include <algorithm>
#include <numeric>

#include "edit_refusal.h"
#include "reft_kernels/edit_backward_tile.h"
#include "reft_kernels/edit_plan.h"

namespace reft_kernels {
namespace {

// The highest rank for which CUDA cores keep up with the memory where the cache holds all, and where it does
// not.
constexpr int kMaxRowsRank = 8, kMaxRowsRankOfMany = 2;
constexpr int64_t kManySlots = 2048;

std::string refusal_of(const EditBackwardParams& p, const Device& device) {
  const Edit& e = p.edit;
  const int64_t items = (e.d + 15) / 16 * e.groups;
  if (std::max({e.batch, e.length, e.slots, e.rows(), e.d, items}) > kMaxSlots) {
    return "takes batch, length, slots, d, and groups times d / 16 up to 2^29";
  }
  if (e.d < 1) return "takes rows of one element or more";
  return refusal_of(e, device);
}

Kernel kernel_of(const EditBackwardParams& p) {
  const int most = p.edit.rows() < kManySlots ? kMaxRowsRank : kMaxRowsRankOfMany;
  const bool mma = is_half(p.edit.h_type) && p.edit.r > most && backward_vectors(p);
  return mma ? Kernel::kBackwardMma : Kernel::kBackwardRows;
}

// Slots a chunk: what half of the L2 cache holds of grad and x, if that makes more than one chunk.
int64_t chunk_of(const Edit& e, const Plan& plan, const Device& device, int64_t items) {
  if (items > plan.blocks) return e.rows();  // a block's second item would read the first chunk again
  const int64_t step = std::lcm<int64_t>(plan.blocks * plan.tile_rows, kChunkStep);
  const int64_t fitting = device.l2_bytes / 2 / (2 * e.d * bytes_of(e.h_type));
  const int64_t chunk = std::max(step, fitting / step * step);
  return 2 * chunk <= e.rows() ? chunk : e.rows();
}

}  // namespace

Plan plan_edit_backward(const EditBackwardParams& params, const Device& device) {
  const Edit& e = params.edit;
  Plan plan;
  plan.blocks = 0;
  plan.refusal = refusal_of(params, device);
  if (!plan.refusal.empty() || e.rows() == 0) return plan;

  plan.kernel = kernel_of(params);
  plan.threads = kBackwardThreads;
  // One item a block where that is possible: then many slots can go chunk by chunk.
  plan.slab = (e.d + 31) / 32 * e.groups > device.multiprocessors ? 64 : 32;
  if (plan.kernel == Kernel::kBackwardMma) {
    plan.tile_rows = kMmaRows;
    plan.rank_tile = e.r <= 16 ? 16 : e.r <= 32 ? 32 : 64;
  } else {
    plan.tile_rows = static_cast<int>(std::clamp<int64_t>(
        (e.rows() + device.multiprocessors - 1) / device.multiprocessors, 1, kProjectRows));
    plan.rank_tile = e.r == 1 ? 1 : e.r == 2 ? 2 : e.r <= 4 ? 4 : 8;
  }
  plan.chunk = e.rows();
  BackwardTile tile = backward_tile(params, plan, device.shared_bytes);
  if (tile.slots == 0 && plan.slab == 64) {
    plan.slab = 32;
    tile = backward_tile(params, plan, device.shared_bytes);
  }
  if (tile.slots == 0) {
    plan.refusal = "takes more shared memory than a block of this device has";
    return plan;
  }
  plan.slab = tile.slab;
  plan.shared_bytes = static_cast<int>(tile.at.total);
  const int64_t items = (e.d + plan.slab - 1) / plan.slab * e.groups;
  const int64_t tiles = (e.rows() + plan.tile_rows - 1) / plan.tile_rows;
  plan.blocks = std::min<int64_t>(device.multiprocessors, std::max(tiles, items));
  plan.chunk = chunk_of(e, plan, device, items);
  return plan;
}

}  // namespace reft_kernels
