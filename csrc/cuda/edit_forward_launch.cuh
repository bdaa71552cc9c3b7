// Launches the forward kernels of one type of h.
#pragma once

#include <string>

#include "launch.cuh"
#include "reft_kernels/edit_forward_kernels.cuh"

namespace reft_kernels::cuda {

template <typename H>
std::string launch_edit_forward(const EditForwardParams& params, const Plan& plan, int device, void* stream) {
  return with_edit_forward_kernel<H>(params, plan, [&](ForwardKernel kernel, const ForwardTile& tile) {
    return launch(kernel, plan, device, stream, false, params, tile);
  });
}

}  // namespace reft_kernels::cuda
