#include "edit_backward_launch.cuh"

namespace reft_kernels::cuda {

BackwardKernel backward_mma_of_bfloat16(const Edit& e, const BackwardTile& tile) {
  return backward_mma_kernel<BFloat16>(e, tile);
}

}  // namespace reft_kernels::cuda
