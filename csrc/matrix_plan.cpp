// How matrices with orthonormal rows are spread over a GPU. The order of every sum follows from the rank of a
// matrix alone (column_sums.h); what is chosen here changes no bit.
#include "reft_kernels/matrix_plan.h"

#include <algorithm>
#include <limits>

#include "edit_refusal.h"
#include "reft_kernels/orthonormalize_table.h"
#include "reft_kernels/stiefel_adamw_table.h"

namespace reft_kernels {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

std::string refusal_of(DType type, int64_t count, int64_t capacity, const char* what, const Device& device) {
  if (device.capability < 80) {
    return "needs compute capability 8.0 or newer, the device has " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  }
  if (type != DType::kFloat32) return "takes float32, got " + name_of(type);
  if (count > capacity) {
    return "takes up to " + std::to_string(capacity) + " " + what + " at once, got " + std::to_string(count);
  }
  return "";
}

std::string refusal_of_size(int64_t d, int r) {
  if (r < 1 || r > kMaxMatrixRank) return "takes ranks 1 to 64, got " + std::to_string(r);
  if (d < r || d > kMost) return "takes d from r to 2^31 - 1, got " + std::to_string(d);
  return "";
}

void spread(MatrixPlan& plan, int shared_bytes, const Device& device) {
  plan.launch.shared_bytes = shared_bytes;
  plan.launch.threads = kMatrixThreads;
  plan.launch.blocks = std::min<int64_t>(device.multiprocessors, plan.items);
  if (plan.items > kMost || plan.workspace / kTileSums > kMost)
    plan.launch.refusal = "takes less than 2^31 slabs";
  if (shared_bytes > device.shared_bytes) {
    plan.launch.refusal = "takes more shared memory than a block of this device has";
  }
}

}  // namespace

MatrixPlan plan_orthonormalize(const OrthonormalizeParams& params, bool backward, const Device& device) {
  MatrixPlan plan;
  plan.launch.blocks = 0;
  plan.launch.refusal =
      refusal_of(params.type, params.count, LargeOrthonormalizeTable::kMost, "matrices", device);
  if (!plan.launch.refusal.empty()) return plan;
  plan.capacity = params.count <= SmallOrthonormalizeTable::kMost ? SmallOrthonormalizeTable::kMost
                                                                  : LargeOrthonormalizeTable::kMost;
  int shared = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const OrthonormalizeMatrix& m = params.matrices[i];
    plan.launch.refusal = refusal_of_size(m.d, m.r);
    if (!plan.launch.refusal.empty()) return plan;
    plan.items += slabs_of(m.d, m.r);
    plan.workspace += orthonormalize_workspace(m.d, m.r, backward);
    shared = std::max(shared, orthonormalize_layout(m.r, backward, device.shared_bytes).total);
  }
  spread(plan, shared, device);
  return plan;
}

MatrixPlan plan_stiefel_adamw(const StiefelAdamWParams& params, const Device& device) {
  MatrixPlan plan;
  plan.launch.blocks = 0;
  plan.launch.refusal =
      refusal_of(params.type, params.count, LargeStiefelAdamWTable::kMost, "tensors", device);
  if (!plan.launch.refusal.empty()) return plan;
  plan.capacity = params.count <= SmallStiefelAdamWTable::kMost ? SmallStiefelAdamWTable::kMost
                                                                : LargeStiefelAdamWTable::kMost;
  int shared = kScratchBytes;
  for (int64_t i = 0; i < params.count; ++i) {
    const StiefelAdamWTensor& t = params.tensors[i];
    if (t.orthonormal) {
      plan.launch.refusal = refusal_of_size(t.d, t.r);
      if (!plan.launch.refusal.empty()) return plan;
      plan.workspace += stiefel_workspace(t.d, t.r, params.riemannian).total;
      shared = std::max(shared, stiefel_layout(t.r, params.riemannian, device.shared_bytes).total);
    }
    plan.items += stiefel_items(t);
  }
  plan.workspace += stiefel_item_elements(plan.items);
  spread(plan, shared, device);
  return plan;
}

}  // namespace reft_kernels
