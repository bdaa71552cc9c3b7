// How matrices with orthonormal rows are launched on a GPU: pure functions of their sizes and the device,
// used by the launchers and the tests.
#pragma once

#include <string>

#include "reft_kernels/edit_plan.h"
#include "reft_kernels/orthonormalize_params.h"
#include "reft_kernels/stiefel_adamw_params.h"

namespace reft_kernels {

struct MatrixPlan {
  Plan launch;            // its blocks, threads, shared_bytes and refusal
  int64_t items = 0;      // slabs of all matrices
  int64_t workspace = 0;  // float64 elements
  int64_t capacity = 0;   // of the table of matrices that the kernel is given
};

MatrixPlan plan_orthonormalize(const OrthonormalizeParams& params, bool backward, const Device& device);
MatrixPlan plan_stiefel_adamw(const StiefelAdamWParams& params, const Device& device);

}  // namespace reft_kernels
