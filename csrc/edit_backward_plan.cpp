// Chooses the backward kernel and its tile.
//
// What decides the bits of a result, the kernel and the number of threads among which a sum is divided,
// follows from sizes and types alone. The grid, the chunk and the stages follow from the device and the
// number of slots.
#include <algorithm>
#include <numeric>

#include "reft_kernels/edit_backward_tile.h"
#include "reft_kernels/edit_plan.h"

namespace reft_kernels {
namespace {

// Slabs are narrow as long as about so many blocks share them: the multiprocessors of the GPUs at hand.
constexpr int64_t kUsualBlocks = 132;

constexpr int kMaxRowsRank = 8;  // above, tensor cores multiply what they can

bool is_float(DType type) {
  return type == DType::kFloat32 || is_half(type);
}

std::string refusal_of(const EditBackwardParams& p, const Device& device) {
  const Edit& e = p.edit;
  if (device.capability < 80) {
    return "needs compute capability 8.0 or newer, the device has " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  }
  if (e.d < 1) return "takes rows of one element or more";
  if (e.r < 1 || e.r > kMaxBackwardRank) return "takes ranks 1 to 64, got " + std::to_string(e.r);
  const bool R_taken = e.R.type == DType::kFloat32 || e.R.type == e.h_type;
  if (!is_float(e.h_type) || !R_taken || (e.W.data && !is_float(e.W.type)) ||
      e.accumulator != DType::kFloat32) {
    return "takes h, R and W in float32, bfloat16 or float16, R in float32 or the type of h";
  }
  const int64_t items = (e.d + 15) / 16 * e.groups;
  if (std::max({e.batch, e.length, e.slots, e.rows(), e.d, items}) > kMaxSlots) {
    return "takes sizes up to 2^29: batch, length, d, slots, and groups times d / 16";
  }
  return "";
}

Kernel kernel_of(const EditBackwardParams& p) {
  const bool mma = is_half(p.edit.h_type) && p.edit.r > kMaxRowsRank && backward_vectors(p);
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
  plan.slab = (e.d + 31) / 32 * e.groups > kUsualBlocks ? 64 : 32;
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
