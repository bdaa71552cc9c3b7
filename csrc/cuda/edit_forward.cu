// The forward's entry: operands to plan to launch. The kernels of each type of h are compiled in a file of
// their own.
#include "launch.cuh"
#include "reft_kernels/device.cuh"
#include "reft_kernels/launch.h"

namespace reft_kernels::cuda {

template <typename H>
std::string launch_edit_forward(const EditForwardParams& params, const Plan& plan, int device, void* stream);

extern template std::string launch_edit_forward<float>(const EditForwardParams&, const Plan&, int, void*);
extern template std::string launch_edit_forward<BFloat16>(const EditForwardParams&, const Plan&, int, void*);
extern template std::string launch_edit_forward<Float16>(const EditForwardParams&, const Plan&, int, void*);

std::string cannot_launch(int device) {
  Device properties;
  return device_of(device, properties);
}

std::string edit_forward(const EditForwardParams& params, int device, void* stream) {
  Device properties;
  const std::string problem = device_of(device, properties);
  if (!problem.empty()) return problem;
  const Plan plan = plan_edit_forward(params, properties);
  if (!plan.refusal.empty()) return plan.refusal;
  if (plan.blocks == 0) return "";
  switch (params.edit.h_type) {
    case DType::kBFloat16:
      return launch_edit_forward<BFloat16>(params, plan, device, stream);
    case DType::kFloat16:
      return launch_edit_forward<Float16>(params, plan, device, stream);
    default:
      return launch_edit_forward<float>(params, plan, device, stream);
  }
}

}  // namespace reft_kernels::cuda
