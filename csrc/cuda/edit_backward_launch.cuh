// The backward kernels of each type of h, compiled in files of their own.
#pragma once

#include "reft_kernels/edit_backward_kernels.cuh"

namespace reft_kernels::cuda {

BackwardKernel backward_rows_of_float32(const Edit& e, const BackwardTile& tile);
BackwardKernel backward_rows_of_bfloat16(const Edit& e, const BackwardTile& tile);
BackwardKernel backward_rows_of_float16(const Edit& e, const BackwardTile& tile);
BackwardKernel backward_mma_of_bfloat16(const Edit& e, const BackwardTile& tile);
BackwardKernel backward_mma_of_float16(const Edit& e, const BackwardTile& tile);

}  // namespace reft_kernels::cuda
