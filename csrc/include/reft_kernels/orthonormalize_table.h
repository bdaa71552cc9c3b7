// What the orthonormalize kernels are given: a table of matrices by value, so that nothing is copied to the
// device.
#pragma once

#include "reft_kernels/column_sums.h"
#include "reft_kernels/orthonormalize_params.h"

namespace reft_kernels {

struct OrthonormalizeEntry {
  const float* X;
  const float* reflectors;
  const float* signs;
  const float* grad;  // backward
  float* out;
  double* factors;
  int32_t d;
  int32_t r;
  int32_t item;     // its first slab among those of all matrices
  int32_t partial;  // where its part of the workspace begins, in units of 16 float64
};

struct OrthonormalizeTask {
  double* workspace;
  uint32_t* barrier;
  int32_t count;  // of matrices
  int32_t items;
  int32_t shared_bytes;
  bool leads;  // some matrix has its r x r mathematics done by one block, in the workspace
};

template <int kCapacity>
struct OrthonormalizeTable {
  static constexpr int kMost = kCapacity;
  OrthonormalizeTask task;
  OrthonormalizeEntry matrix[kCapacity];
};

// Kernel parameters are 4 KiB, or 32,764 bytes, which takes more of the driver.
using SmallOrthonormalizeTable = OrthonormalizeTable<63>;
using LargeOrthonormalizeTable = OrthonormalizeTable<511>;
static_assert(sizeof(SmallOrthonormalizeTable) <= 4096 && sizeof(LargeOrthonormalizeTable) <= 32764);

// Quads of a staged column: of S V and B, and in the backward of the gradient.
REFT_HOST_DEVICE constexpr int orthonormalize_quads(int r, bool backward) {
  return (backward ? 3 : 2) * quads_of(r);
}

// Tiles of the sums: the Gram matrix of [S V, B] on and above its diagonal; backward: of grad^T with [S V,
// B].
REFT_HOST_DEVICE constexpr int orthonormalize_tiles(int r, bool backward) {
  return backward ? 2 * quads_of(r) * quads_of(r) : upper_tiles(2 * quads_of(r));
}

// Where the r x r mathematics has its operands, in float64 elements; see orthonormalize_weights, whose Gram
// matrix the others lie over, and orthonormalize_backward_weights.
struct OrthonormalizeSolve {
  int work, sums, u, head, factors, total;
};

REFT_HOST_DEVICE constexpr OrthonormalizeSolve orthonormalize_solve(int r, bool backward) {
  const int n = r * r;
  return backward ? OrthonormalizeSolve{0, 4 * n, 6 * n, 8 * n, 0, 9 * n}
                  : OrthonormalizeSolve{0, n, 3 * n, 4 * n, 5 * n, 9 * n};
}

// Float64 elements of a matrix's part of the workspace, a multiple of 16: the sums of its slabs, and where
// its rank is high the r x r mathematics.
REFT_HOST_DEVICE constexpr int64_t orthonormalize_workspace(int64_t d, int r, bool backward) {
  const int64_t sums = partials_of(d, r, orthonormalize_tiles(r, backward));
  return sums + (r > kMaxSharedSolveRank ? whole_tiles(orthonormalize_solve(r, backward).total) : 0);
}

REFT_HOST_DEVICE MatrixLayout orthonormalize_layout(int r, bool backward, int shared_bytes) {
  const int padded = 4 * quads_of(r);
  const int squares =
      (backward ? 3 : 2) + (r <= kMaxSharedSolveRank ? 1 : 0);  // u, and head where it is found here
  const int weights = squares * padded * padded * 4;
  return matrix_layout(r, orthonormalize_quads(r, backward), orthonormalize_tiles(r, backward), weights,
                       orthonormalize_solve(r, backward).total * 8, shared_bytes);
}

}  // namespace reft_kernels
