// The forward of bfloat16 rows, R in float32 and W in bfloat16, by one kernel of each kind: what mutants are
// built of.
#include "cuda/launch.cuh"
#include "reft_kernels/edit_forward_mma.cuh"
#include "reft_kernels/edit_forward_rows.cuh"
#include "reft_kernels/launch.h"

namespace reft_kernels::cuda {
namespace {

using ForwardKernel = void (*)(EditForwardParams, ForwardTile);

ForwardKernel kernel_of(const Plan& plan, bool linear) {
  using H = BFloat16;
  switch (plan.kernel) {
    case Kernel::kForwardMma:
      return linear ? &edit_forward_mma<H, float, H, true, 16> : &edit_forward_mma<H, float, H, false, 16>;
    case Kernel::kForwardCluster:
      return linear ? &edit_forward_rows<H, float, H, true, 4, true>
                    : &edit_forward_rows<H, float, H, false, 4, true>;
    default:
      return linear ? &edit_forward_rows<H, float, H, true, 4, false>
                    : &edit_forward_rows<H, float, H, false, 4, false>;
  }
}

}  // namespace

std::string edit_forward(const EditForwardParams& params, int device, void* stream) {
  Device properties;
  device_of(device, properties);
  const Plan plan = plan_edit_forward(params, properties);
  return launch(kernel_of(plan, params.edit.linear()), plan, device, stream, false, params,
                forward_tile(params, plan));
}

}  // namespace reft_kernels::cuda
