// The backward's entry: operands to plan to launch.
#include "edit_backward_launch.cuh"
#include "launch.cuh"
#include "reft_kernels/launch.h"

namespace reft_kernels::cuda {
namespace {

BackwardKernel kernel_of(const Edit& e, const BackwardTile& tile) {
  switch (e.h_type) {
    case DType::kBFloat16:
      return tile.mma ? backward_mma_of_bfloat16(e, tile) : backward_rows_of_bfloat16(e, tile);
    case DType::kFloat16:
      return tile.mma ? backward_mma_of_float16(e, tile) : backward_rows_of_float16(e, tile);
    default:
      return backward_rows_of_float32(e, tile);
  }
}

}  // namespace

std::string edit_backward(const EditBackwardParams& params, int device, void* stream) {
  Device properties;
  const std::string problem = device_of(device, properties);
  if (!problem.empty()) return problem;
  const Plan plan = plan_edit_backward(params, properties);
  if (!plan.refusal.empty()) return plan.refusal;
  if (plan.blocks == 0) return "";
  const BackwardTile tile = backward_tile(params, plan, plan.shared_bytes);
  return launch(kernel_of(params.edit, tile), plan, device, stream, true, params, tile);
}

}  // namespace reft_kernels::cuda
