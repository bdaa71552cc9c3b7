// The operands of one edit, as plain pointers and numbers: what every kernel, on the CPU or a GPU, is given.
//
//   y = D_p( h + scale * R^T delta ),   delta = f(s) - gamma * (R h + c),   s = W h + b
//
// Strides count elements. Rows have unit inner stride. Null pointers stand for operands that are not there.
// Slot n of N = batch * slots is batch row n / slots, slot n % slots; it names row `positions[...]` of that
// batch row, or row n % slots where there are no positions. A slot whose position lies outside [0, length) or
// whose group lies outside [0, groups) is idle: it edits nothing.
#pragma once

#include "reft_kernels/types.h"

namespace reft_kernels {

// A tensor per slot, [batch, slots].
struct SlotTensor {
  const void* data = nullptr;
  DType type = DType::kInt64;
  int64_t stride[2] = {0, 0};
};

// A weight: R and W are [groups, r, d], b and c [groups, r], contiguous.
struct Weight {
  const void* data = nullptr;
  DType type = DType::kFloat32;
};

// The gradient of a weight, contiguous. With `add` it is added to what is there.
struct WeightGradient {
  void* data = nullptr;
  DType type = DType::kFloat32;
  bool add = false;
};

// [batch, length, d]; the innermost stride is 1.
struct RowsIn {
  const void* data = nullptr;
  int64_t stride[2] = {0, 0};
};

struct RowsOut {
  void* data = nullptr;
  int64_t stride[2] = {0, 0};
};

struct Edit {
  int64_t batch = 0;   // B
  int64_t length = 0;  // S
  int64_t slots = 0;   // P; S where there are no positions
  int64_t d = 0;
  int32_t r = 0;
  int32_t groups = 1;  // G

  DType h_type = DType::kFloat32;
  DType accumulator = DType::kFloat32;  // of delta, s, gd, gs and every sum

  Weight R, W, b, c;
  SlotTensor positions, group, scale;

  const int64_t* seed = nullptr;  // of dropout; null: no dropout
  uint32_t keep_threshold = 0;    // an element is kept if its word, shifted right by one, is not below this
  double keep_scale = 1.0;        // 1 / (1 - dropout)

  bool subtract = true;  // gamma
  Activation activation = Activation::kLinear;

  REFT_HOST_DEVICE int64_t rows() const { return batch * slots; }  // N
  REFT_HOST_DEVICE bool linear() const { return activation == Activation::kLinear; }
};

struct EditForwardParams {
  Edit edit;
  RowsIn h;
  RowsOut y;              // may be h itself. With positions its other rows already are those of h
  void* delta = nullptr;  // [N, r]; zeros in idle slots
  void* s = nullptr;      // [N, r]; zeros in idle slots. Null where f is linear
  void* rows =
      nullptr;  // [N, d], the rows before the edit, in the type of h. Idle slots: not written. Or null
  bool copy_idle = false;  // without positions, out of place: idle rows of y are to be copied from h
};

struct EditBackwardParams {
  Edit edit;
  RowsIn grad;  // dL/dy [B, S, d], of h's type
  RowsOut dh;   // may be grad itself; data null: not asked for
  RowsIn x;     // h [B, S, d] before the edit; or its named rows [N, d] (stride[1] is d); or y (rebuild)
  bool x_is_rows = false;
  bool rebuild = false;         // x is y: the row before the edit is y - scale R^T delta, rounded to h's type
  const void* delta = nullptr;  // [N, r]
  const void* s = nullptr;      // [N, r]; null where f is linear
  void* gd = nullptr;           // [N, r], workspace: scale * R g
  void* gs = nullptr;           // [N, r], workspace: gd * f'(s); the same as gd where f is linear
  WeightGradient dR, dW, db, dc;  // data null: not asked for
  bool copy_idle = false;       // without positions, dh not grad: idle rows of dh are to be copied from grad
  uint32_t* barrier = nullptr;  // CUDA: one word at rest, no other launch's at the same time
};

}  // namespace reft_kernels
