// One step of AdamW over some tensors, as plain pointers and numbers: what every kernel, on the CPU or a GPU,
// is given. Formulas: reft_kernels/backends/eager_orthonormal.py.
#pragma once

#include "reft_kernels/types.h"

namespace reft_kernels {

// Contiguous, of one type; [r, d] where the rows stay orthonormal, else [1, elements].
struct StiefelAdamWTensor {
  void* parameter = nullptr;
  const void* gradient = nullptr;
  void* exp_avg = nullptr;
  void* exp_avg_sq = nullptr;
  float* step = nullptr;  // steps taken so far
  int64_t d = 0;
  int32_t r = 1;
  bool orthonormal = false;
  double weight_decay = 0;  // without effect where orthonormal
};

struct StiefelAdamWParams {
  const StiefelAdamWTensor* tensors = nullptr;  // on the host
  int64_t count = 0;
  DType type = DType::kFloat32;  // or kFloat64
  double lr = 0;
  const void* lr_tensor = nullptr;  // where it is not null lr is what it points to
  DType lr_type = DType::kFloat32;  // or kFloat64
  double beta1 = 0, beta2 = 0, eps = 0;
  double max_norm = 0;     // counts where there is a norm
  double* norm = nullptr;  // of all gradients before clipping; null: they are not clipped
  bool riemannian = false;
  bool maximize = false;
  const float* grad_scale = nullptr;  // what the gradients were multiplied by; null: 1
  const float* found_inf = nullptr;   // not zero: nothing shall change; null: 0
  uint32_t* barrier = nullptr;        // CUDA: one word at rest, no other launch's at the same time
};

}  // namespace reft_kernels
