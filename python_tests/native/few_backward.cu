// The backward of bfloat16 rows and R in float32, by one kernel of each kind: what mutants are built of.
#include "cuda/launch.cuh"
#include "reft_kernels/edit_backward_mma.cuh"
#include "reft_kernels/edit_backward_rows.cuh"
#include "reft_kernels/launch.h"

namespace reft_kernels::cuda {

std::string edit_backward(const EditBackwardParams& params, int device, void* stream) {
  Device properties;
  device_of(device, properties);
  const Plan plan = plan_edit_backward(params, properties);
  const auto kernel = plan.kernel == Kernel::kBackwardMma ? &edit_backward_mma<BFloat16, float, 16, 32>
                                                          : &edit_backward_rows<BFloat16, float, 4>;
  return launch(kernel, plan, device, stream, true, params, backward_tile(params, plan, plan.shared_bytes));
}

}  // namespace reft_kernels::cuda
