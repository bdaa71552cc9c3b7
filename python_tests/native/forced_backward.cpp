// Stands in the place of plan_edit_backward, which is compiled under another name.
#include <algorithm>

#include "forced_plans.h"
#include "reft_kernels/edit_backward_tile.h"

namespace reft_kernels {

Plan planned_edit_backward(const EditBackwardParams& params, const Device& device);

Plan plan_edit_backward(const EditBackwardParams& params, const Device& device) {
  const on_cpu::Wishes& wish = on_cpu::backward_wishes;
  const Edit& e = params.edit;
  Device smaller = device;
  if (wish.shared_bytes >= 0) smaller.shared_bytes = static_cast<int>(wish.shared_bytes);
  const Plan planned = planned_edit_backward(params, smaller);
  on_cpu::last_plan = planned;
  if (!planned.refusal.empty() || planned.blocks == 0) return planned;

  Plan plan = planned;
  if (wish.kernel >= 0) plan.kernel = static_cast<Kernel>(wish.kernel);
  if (plan.kernel == Kernel::kBackwardMma && !(is_half(e.h_type) && backward_vectors(params))) {
    plan.kernel = Kernel::kBackwardRows;
  }
  if (wish.tile_rows >= 0) plan.tile_rows = static_cast<int>(wish.tile_rows);
  if (wish.rank_tile >= 0) plan.rank_tile = static_cast<int>(wish.rank_tile);
  if (wish.slab >= 0) plan.slab = static_cast<int>(wish.slab);
  if (wish.chunk >= 0) plan.chunk = wish.chunk;
  if (wish.blocks >= 0) plan.blocks = std::min<int64_t>(wish.blocks, device.multiprocessors);
  const BackwardTile tile = backward_tile(params, plan, smaller.shared_bytes);  // as near as there is one
  if (tile.slots == 0) return planned;
  plan.tile_rows = tile.rows;
  plan.rank_tile = tile.rank_tile;
  plan.slab = tile.slab;
  plan.chunk = tile.chunk;
  plan.shared_bytes = static_cast<int>(tile.at.total);
  on_cpu::last_plan = plan;
  return plan;
}

}  // namespace reft_kernels
