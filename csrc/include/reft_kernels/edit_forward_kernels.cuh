// Which forward kernel a plan means: every instantiation that exists is named here, and no other.
#pragma once

#include <string>

#include "reft_kernels/edit_forward_mma.cuh"
#include "reft_kernels/edit_forward_rows.cuh"

namespace reft_kernels {

using ForwardKernel = void (*)(EditForwardParams, ForwardTile);

template <typename H, typename TR, typename TW, bool kCluster>
ForwardKernel forward_rows_kernel(bool linear, int rank_tile) {
  if (!linear) return &edit_forward_rows<H, TR, TW, false, 4, kCluster>;
  if (rank_tile == 8) return &edit_forward_rows<H, TR, TW, true, 8, kCluster>;
  if constexpr (!kCluster) {
    if (rank_tile == 1) return &edit_forward_rows<H, TR, TW, true, 1, kCluster>;
  }
  return &edit_forward_rows<H, TR, TW, true, 4, kCluster>;
}

template <typename H, typename TR, typename TW, bool kLinear>
ForwardKernel forward_mma_kernel(int rank_tile) {
  switch (rank_tile) {
    case 8:
      return &edit_forward_mma<H, TR, TW, kLinear, 8>;
    case 16:
      return &edit_forward_mma<H, TR, TW, kLinear, 16>;
    case 32:
      return &edit_forward_mma<H, TR, TW, kLinear, 32>;
    default:
      return &edit_forward_mma<H, TR, TW, kLinear, 64>;
  }
}

template <typename H, typename TR, typename TW>
ForwardKernel forward_kernel(const Edit& e, const Plan& plan) {
  if constexpr (sizeof(H) == 2) {
    if (plan.kernel == Kernel::kForwardMma) {
      return e.linear() ? forward_mma_kernel<H, TR, TW, true>(plan.rank_tile)
                        : forward_mma_kernel<H, TR, TW, false>(plan.rank_tile);
    }
  }
  return plan.kernel == Kernel::kForwardCluster
             ? forward_rows_kernel<H, TR, TW, true>(e.linear(), plan.rank_tile)
             : forward_rows_kernel<H, TR, TW, false>(e.linear(), plan.rank_tile);
}

// Calls launch(kernel, tile) with the kernel of a plan for rows of type H, which R and W are of too, or
// float32.
template <typename H, typename Launch>
auto with_edit_forward_kernel(const EditForwardParams& params, const Plan& plan, Launch&& launch) {
  const Edit& e = params.edit;
  const ForwardTile tile = forward_tile(params, plan);
  if constexpr (sizeof(H) == 2) {
    if (is_half(e.R.type)) return launch(forward_kernel<H, H, H>(e, plan), tile);
    if (e.W.data && is_half(e.W.type)) return launch(forward_kernel<H, float, H>(e, plan), tile);
  }
  return launch(forward_kernel<H, float, float>(e, plan), tile);
}

}  // namespace reft_kernels
