// The inner loops of matrices with orthonormal rows, as every instruction set has them, beside those of
// kernels.h. matrix_kernels_impl.h gives them bodies; the drivers cut the matrices into strips.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "reft_kernels/small_matrices.h"

namespace reft_kernels::cpu {

// What AdamW does to an element:
//
//   g = gradient * first_factor * second_factor,   m += (g - m) * (1 - beta1),   v = beta2 v + (1 - beta2)
//   g^2, p = decay * p - rate * m / (sqrt(v) * root_correction + eps)
template <typename T>
struct AdamWFactors {
  T first_factor, second_factor;
  T beta1, weight1;  // 1 - beta1
  T beta2, weight2;
  T decay;
  T rate;             // lr / (1 - beta1^t)
  T root_correction;  // 1 / sqrt(1 - beta2^t)
  T eps;
};

template <typename T>
struct MatrixKernels {
  // to[k, j] = from[j, k] for `columns` j and `ranks` k; `from` is contiguous, `to` has a stride.
  void (*ranks_to_rows)(const T* from, int columns, int ranks, T* to, int64_t stride);
  // And back.
  void (*rows_to_ranks)(const T* from, int64_t stride, int columns, int ranks, T* to);

  // to = from * first * second, rounded twice
  void (*scale)(const T* from, T first, T second, int64_t count, T* to);
  // The sum of (x * factor)^2, the products rounded to T, in double.
  double (*sum_squares)(const T* x, T factor, int64_t count);
  void (*adamw)(T* p, const T* gradient, T* m, T* v, int64_t count, const AdamWFactors<T>& factors);

  // See small_matrices.h.
  void (*orthonormalize_weights)(const Tops<T>& tops, const double* gram,
                                 const OrthonormalizeFactors& factors, T* u, double* head, double* work);
  void (*orthonormalize_backward_weights)(const Tops<T>& tops, const double* sums,
                                          const OrthonormalizeFactors& factors, T* u, double* head,
                                          double* work);
  double (*inverse_root)(int r, double* A, double* root, double* work);
};

// Of the instruction set that `instruction_set` names.
template <typename T>
const MatrixKernels<T>& matrix_kernels_of();

// For every instruction set that the library was built for.
#define REFT_KERNELS_DECLARE_ISA(ISA)          \
  namespace ISA {                              \
  template <typename T>                        \
  const MatrixKernels<T>* matrix_kernels_of(); \
  }

REFT_KERNELS_DECLARE_ISA(baseline)
REFT_KERNELS_DECLARE_ISA(avx2)
REFT_KERNELS_DECLARE_ISA(avx512)

#undef REFT_KERNELS_DECLARE_ISA

}  // namespace reft_kernels::cpu
