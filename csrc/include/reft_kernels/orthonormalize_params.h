// The householder parametrisations of some matrices, as plain pointers and numbers: what every kernel, on the
// CPU or a GPU, is given. Formulas: reft_kernels/orthonormal_problem.py.
#pragma once

#include "reft_kernels/types.h"

namespace reft_kernels {

// Contiguous, of one type.
struct OrthonormalizeMatrix {
  const void* X = nullptr;           // [d, r]
  const void* reflectors = nullptr;  // [d, r]
  const void* signs = nullptr;       // [r]
  const void* grad = nullptr;        // backward: dL/dR [r, d]
  void* out = nullptr;               // forward: R [r, d]; backward: dL/dX [d, r]
  double* factors = nullptr;  // [4, r, r]: T, C, T_B and M, written by the forward, read by the backward
  int64_t d = 0;
  int32_t r = 0;
};

struct OrthonormalizeParams {
  const OrthonormalizeMatrix* matrices = nullptr;  // on the host
  int64_t count = 0;
  DType type = DType::kFloat32;  // or kFloat64
  uint32_t* barrier = nullptr;   // CUDA: one word at rest, no other launch's at the same time
};

}  // namespace reft_kernels
