#include "edit_forward_launch.cuh"

namespace reft_kernels::cuda {

template std::string launch_edit_forward<BFloat16>(const EditForwardParams&, const Plan&, int, void*);

}  // namespace reft_kernels::cuda
