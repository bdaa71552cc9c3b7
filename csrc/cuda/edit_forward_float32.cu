#include "edit_forward_launch.cuh"

namespace reft_kernels::cuda {

template std::string launch_edit_forward<float>(const EditForwardParams&, const Plan&, int, void*);

}  // namespace reft_kernels::cuda
