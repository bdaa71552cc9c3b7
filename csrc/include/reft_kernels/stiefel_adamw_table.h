// What the stiefel_adamw_step kernel is given: a table of tensors by value, so that nothing is copied to the
// device.
#pragma once

#include "reft_kernels/column_sums.h"
#include "reft_kernels/stiefel_adamw_params.h"

namespace reft_kernels {

constexpr int kFlatItem = 4096;  // elements of an unconstrained tensor that a block takes at once

struct StiefelAdamWEntry {
  float* parameter;
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  float* step;
  int64_t d;  // columns; of an unconstrained tensor, its elements
  int32_t r;
  int32_t item;        // the first of its items among those of all tensors
  int32_t partial;     // where its part of the workspace begins, in units of 16 float64
  float weight_decay;  // of an unconstrained tensor
};

struct StiefelAdamWTask {
  double* workspace;
  uint32_t* barrier;
  const void* lr_tensor;
  const float* grad_scale;
  const float* found_inf;
  double* norm;
  double lr, beta1, beta2, max_norm;
  float eps;
  int32_t constrained;        // tensors whose rows stay orthonormal: they come first
  int32_t count;              // of all tensors
  int32_t constrained_items;  //
  int32_t items;
  int32_t shared_bytes;
  bool lr_is_double;
  bool riemannian;
  bool maximize;
  bool leads;  // some matrix has its r x r mathematics done by one block, in the workspace
};

template <int kCapacity>
struct StiefelAdamWTable {
  static constexpr int kMost = kCapacity;
  StiefelAdamWTask task;
  StiefelAdamWEntry tensor[kCapacity];
};

using SmallStiefelAdamWTable = StiefelAdamWTable<110>;
using LargeStiefelAdamWTable = StiefelAdamWTable<510>;
static_assert(sizeof(SmallStiefelAdamWTable) <= 8192 && sizeof(LargeStiefelAdamWTable) <= 32764);

// Quads of a staged column: of what is retracted, and with the tangent projection of the parameter besides.
REFT_HOST_DEVICE constexpr int stiefel_quads(int r, bool riemannian) {
  return (riemannian ? 2 : 1) * quads_of(r);
}

// Tiles of P P^T on and above its diagonal, and of gradient times parameter^T.
REFT_HOST_DEVICE constexpr int gram_tiles(int r) {
  return upper_tiles(quads_of(r));
}
REFT_HOST_DEVICE constexpr int tangent_tiles(int r) {
  return quads_of(r) * quads_of(r);
}

// Float64 elements of the inverse root: what it is of, itself, and the work of `inverse_root`.
REFT_HOST_DEVICE constexpr int inverse_root_elements(int r) {
  return 5 * r * r + r;
}

REFT_HOST_DEVICE int64_t stiefel_items(const StiefelAdamWTensor& t) {
  if (t.orthonormal) return slabs_of(t.d, t.r);
  return t.d == 0 ? 1 : (t.d + kFlatItem - 1) / kFlatItem;  // also one without elements takes its step
}

// Float64 elements of what the workspace begins with: of every item the factors of its step, and its squares.
REFT_HOST_DEVICE constexpr int64_t stiefel_item_elements(int64_t items) {
  return whole_tiles(3 * items);
}

// Of a constrained tensor's part of the workspace.
struct StiefelWorkspace {
  int64_t gram = 0, tangent = 0, root = 0, total = 0;  // `root` as `inverse_root_elements`, where r is high
};

REFT_HOST_DEVICE StiefelWorkspace stiefel_workspace(int64_t d, int r, bool riemannian) {
  StiefelWorkspace at;
  at.tangent = partials_of(d, r, gram_tiles(r));
  at.root = at.tangent + (riemannian ? partials_of(d, r, tangent_tiles(r)) : 0);
  at.total = at.root + (r > kMaxSharedSolveRank ? whole_tiles(inverse_root_elements(r)) : 0);
  return at;
}

// Weights: the inverse root in float64, and with the tangent projection its symmetric matrix in float32.
REFT_HOST_DEVICE MatrixLayout stiefel_layout(int r, bool riemannian, int shared_bytes) {
  const int padded = 4 * quads_of(r), weights = padded * padded * (riemannian ? 12 : 8);
  return matrix_layout(r, stiefel_quads(r, riemannian), gram_tiles(r), weights, inverse_root_elements(r) * 8,
                       shared_bytes);
}

}  // namespace reft_kernels
