#include "edit_backward_launch.cuh"

namespace reft_kernels::cuda {

BackwardKernel backward_mma_of_float16(const Edit& e, const BackwardTile& tile) {
  return backward_mma_kernel<Float16>(e, tile);
}

}  // namespace reft_kernels::cuda
