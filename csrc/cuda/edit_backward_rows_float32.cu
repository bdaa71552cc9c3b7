#include "edit_backward_launch.cuh"

namespace reft_kernels::cuda {

BackwardKernel backward_rows_of_float32(const Edit& e, const BackwardTile& tile) {
  return backward_rows_kernel<float>(e, tile);
}

}  // namespace reft_kernels::cuda
