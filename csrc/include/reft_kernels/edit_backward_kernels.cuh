// Which backward kernel a tile means: every instantiation that exists is named here, and no other.
#pragma once

#include "reft_kernels/edit_backward_mma.cuh"
#include "reft_kernels/edit_backward_rows.cuh"

namespace reft_kernels {

using BackwardKernel = void (*)(EditBackwardParams, BackwardTile);

template <typename H, typename TR>
BackwardKernel backward_rows_kernel(int rank_tile) {
  switch (rank_tile) {
    case 1:
      return &edit_backward_rows<H, TR, 1>;
    case 2:
      return &edit_backward_rows<H, TR, 2>;
    case 4:
      return &edit_backward_rows<H, TR, 4>;
    default:
      return &edit_backward_rows<H, TR, 8>;
  }
}

// For rows of type H, which R is of too, or float32.
template <typename H>
BackwardKernel backward_rows_kernel(const Edit& e, const BackwardTile& tile) {
  if constexpr (sizeof(H) == 2) {
    if (is_half(e.R.type)) return backward_rows_kernel<H, H>(tile.rank_tile);
  }
  return backward_rows_kernel<H, float>(tile.rank_tile);
}

template <typename H, typename TR, int kRanks>
BackwardKernel backward_mma_kernel(int slab) {
  if constexpr (std::is_same_v<H, BFloat16> || kRanks < 64) {
    if (slab == 64) return &edit_backward_mma<H, TR, kRanks, 64>;
  }
  return &edit_backward_mma<H, TR, kRanks, 32>;
}

template <typename H, typename TR>
BackwardKernel backward_mma_kernel(const BackwardTile& tile) {
  switch (tile.rank_tile) {
    case 16:
      return backward_mma_kernel<H, TR, 16>(tile.slab);
    case 32:
      return backward_mma_kernel<H, TR, 32>(tile.slab);
    default:
      return backward_mma_kernel<H, TR, 64>(tile.slab);
  }
}

// For rows of type H, half precision, which R is of too, or float32.
template <typename H>
BackwardKernel backward_mma_kernel(const Edit& e, const BackwardTile& tile) {
  return is_half(e.R.type) ? backward_mma_kernel<H, H>(tile) : backward_mma_kernel<H, float>(tile);
}

}  // namespace reft_kernels
