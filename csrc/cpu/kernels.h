// The inner loops of an edit, as every instruction set has them: small matrix products on a strip, which is
// some rows times some columns of them. kernels_impl.h gives them bodies; the drivers cut the edit into
// strips.
//
// T is the accumulator's type, float or double. A panel is a strip of weights in T, [ranks, columns] with
// `stride` elements from a rank to the next. The order in which a value is summed up depends on the columns
// of the strip alone, so that any cut into rows gives the same bits.
#pragma once

#include <cstdint>

#include "reft_kernels/types.h"

namespace reft_kernels::cpu {

// Row n of a strip begins at element `column` of row[n].
struct StripIn {
  const void* const* row;
  int64_t column;
};

struct StripOut {
  void* const* row;
  int64_t column;
};

struct Shape {
  int rows;
  int columns;
};

template <typename T>
struct Panel {
  const T* data;
  int64_t stride;
  int ranks;
};

// Dropout, see philox.h. `row_number` counts the rows of h, for each row of the strip.
struct Dropout {
  const int64_t* row_number;
  int64_t column;  // of the strip's first element in the row; a multiple of 4
  uint64_t seed;
  uint32_t keep_threshold;
  double keep_scale;
};

// Rows are of the type of h or, "wide", of type T.
template <typename T>
struct Kernels {
  // to = from
  void (*widen)(const void* from, DType type, int64_t count, T* to);
  // to = from - minus; from may be null
  void (*widen_difference)(const void* from, DType type, const void* minus, DType minus_type, int64_t count,
                           T* to);
  // to = from - minus, or to += from - minus with one rounding; minus may be null.
  void (*narrow)(const T* from, const T* minus, int64_t count, bool add, void* to, DType type);

  // to = from, wide
  void (*widen_rows)(StripIn from, StripOut to, Shape shape);

  // sums[n, k] += x[n] . panel[k]; sums are [rows, ranks]. The strip `next`, of the same shape, is fetched
  // into the cache meanwhile; without rows nothing is.
  using Down = void (*)(StripIn x, StripIn next, Shape shape, Panel<T> panel, T* sums);
  Down down, down_wide;

  // out[n] = in[n] + sum_k u[n, k] panel[k]; u is [rows, ranks]; `next` as above, of the type of `in`
  using Up = void (*)(StripIn in, StripIn next, StripOut out, Shape shape, Panel<T> panel, const T* u);
  Up up, up_from_wide, up_to_wide;
  Up undo_up_to_wide;  // in[n] - sum_k u[n, k] panel[k], rounded to the type of h, then wide

  // sums[k] += sum_n u[n, k] x[n], x wide, and `next` as above, of the type of h; u has the row stride
  // `u_stride`, sums [ranks, columns] the stride `sums_stride`
  void (*outer)(StripIn x, StripIn next, Shape shape, const T* u, int64_t u_stride, int ranks, T* sums,
                int64_t sums_stride);

  // out = D_p(in)
  using Drop = void (*)(StripIn in, StripOut out, Shape shape, const Dropout& dropout);
  Drop drop_to_wide, drop_from_wide;
};

// Of the instruction set that `instruction_set` names.
template <typename T>
const Kernels<T>& kernels_of(DType h_type);

// For every instruction set that the library was built for.
#define REFT_KERNELS_DECLARE_ISA(ISA)         \
  namespace ISA {                             \
  template <typename T>                       \
  const Kernels<T>* kernels_of(DType h_type); \
  }

REFT_KERNELS_DECLARE_ISA(baseline)
REFT_KERNELS_DECLARE_ISA(avx2)
REFT_KERNELS_DECLARE_ISA(avx512)

#undef REFT_KERNELS_DECLARE_ISA

}  // namespace reft_kernels::cpu
