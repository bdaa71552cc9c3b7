// Stands in the place of plan_edit_forward, which is compiled under another name.
#include <algorithm>

#include "forced_plans.h"
#include "reft_kernels/edit_forward_tile.h"

namespace reft_kernels {

Plan planned_edit_forward(const EditForwardParams& params, const Device& device);

Plan plan_edit_forward(const EditForwardParams& params, const Device& device) {
  const on_cpu::Wishes& wish = on_cpu::forward_wishes;
  const Edit& e = params.edit;
  Device smaller = device;
  if (wish.shared_bytes >= 0) smaller.shared_bytes = static_cast<int>(wish.shared_bytes);
  const Plan planned = planned_edit_forward(params, smaller);
  on_cpu::last_plan = planned;
  if (!planned.refusal.empty() || planned.blocks == 0) return planned;

  Plan plan = planned;
  const bool vectors = forward_vectors(params);
  if (wish.kernel >= 0) plan.kernel = static_cast<Kernel>(wish.kernel);
  if (plan.kernel == Kernel::kForwardMma && !(is_half(e.h_type) && vectors && e.d % kMmaColumns == 0)) {
    plan.kernel = Kernel::kForwardRows;
  }
  const bool multiplies = e.W.data || e.subtract;
  if (plan.kernel == Kernel::kForwardCluster && !(vectors && multiplies && device.capability >= 90)) {
    plan.kernel = Kernel::kForwardRows;
  }
  if (wish.kernel >= 0 && plan.kernel != planned.kernel) plan.threads = 256;
  if (wish.threads >= 0) plan.threads = static_cast<int>(wish.threads);
  bool staged = vectors && wish.staged != 0;
  switch (plan.kernel) {
    case Kernel::kForwardMma:
      plan.cluster = wish.cluster > 1 && device.capability >= 90 ? static_cast<int>(wish.cluster) : 1;
      plan.tile_rows = kMmaRows;
      plan.rank_tile = 8;
      while (plan.rank_tile < 64 && (plan.rank_tile < e.r || plan.rank_tile < wish.rank_tile))
        plan.rank_tile *= 2;
      break;
    default:
      plan.cluster = 1;
      if (wish.rank_tile >= 0 && e.linear()) plan.rank_tile = static_cast<int>(wish.rank_tile);
      if (!e.linear()) plan.rank_tile = 4;
      if (plan.kernel == Kernel::kForwardCluster) {
        plan.cluster = wish.cluster > 1 ? static_cast<int>(wish.cluster) : 2;
        plan.rank_tile = std::max(plan.rank_tile, 4);
        staged = true;
      }
      if (wish.tile_rows >= 0) plan.tile_rows = static_cast<int>(wish.tile_rows);
      plan.tile_rows = std::min(plan.tile_rows, max_tile_rows(e.linear(), plan.rank_tile));
  }
  plan.blocks = (e.rows() + plan.tile_rows - 1) / plan.tile_rows * plan.cluster;
  plan.shared_bytes = static_cast<int>(forward_shared(e, plan, staged).total);
  if (plan.shared_bytes <= smaller.shared_bytes) on_cpu::last_plan = plan;
  return on_cpu::last_plan;
}

}  // namespace reft_kernels
