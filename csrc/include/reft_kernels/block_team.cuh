// The team of small_matrices.h that the threads of a block are, and what such a team does in ways of its own:
// products by tiles, and triangular inverses by halves.
#pragma once

#include "reft_kernels/column_sums.h"
#include "reft_kernels/device.cuh"
#include "reft_kernels/small_matrices.h"

namespace reft_kernels {

struct BlockTeam {
  using Row = double;
  REFT_DEVICE int rank() const { return static_cast<int>(threadIdx.x); }
  REFT_DEVICE int size() const { return kMatrixThreads; }
  REFT_DEVICE void sync() const { sync_block(); }
};

// Up to which rank a thread has one element of a product: above, 4 x 4 of them.
constexpr int kElementRank = 16;
static_assert(kElementRank * kElementRank <= kMatrixThreads);
static_assert(kMaxMatrixRank * kMaxMatrixRank <= 16 * kMatrixThreads);

template <typename Put>
REFT_DEVICE void multiply_tile(int r, const LeftFactor& a, const double* b, int i0, int j0, const Put& put) {
  double sum[4][4] = {};
  const int begin = a.part == Part::kUpper ? i0 : 0, end = a.part == Part::kLower ? min(i0 + 4, r) : r;
#pragma unroll 1
  for (int k = begin; k < end; ++k) {
    double left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i0 + i;
      const bool inside = row < r && (a.part == Part::kAll || (a.part == Part::kUpper ? k >= row : k <= row));
      left[i] = inside ? a.at[row * a.row + k * a.step] : 0.0;
      right[i] = j0 + i < r ? b[k * r + j0 + i] : 0.0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i0 + i < r && j0 + j < r) put(i0 + i, j0 + j, sum[i][j]);
    }
  }
}

template <typename Put>
REFT_DEVICE void multiply(const BlockTeam& team, int r, const LeftFactor& a, const double* b,
                          const Put& put) {
  const int thread = team.rank();
  if (r <= kElementRank) {
    if (thread < r * r) multiply_piece<double, 1>(r, a, b, thread / r, thread % r, put);
  } else {
    const int q = quads_of(r);
    if (thread < q * q) multiply_tile(r, a, b, 4 * (thread / q), 4 * (thread % q), put);
  }
  team.sync();
}

// Of [A, B; 0, C] the inverse is [A', -A' B C'; 0, C']: diagonal blocks of 1, 2, 4 ... are inverted, all at
// once. What is between the two products lies, turned over, below the diagonal of T.
REFT_DEVICE void half_gram_inverse(const BlockTeam& team, int r, const double* gram, int64_t stride,
                                   double* T) {
  const int thread = team.rank(), row = static_cast<int>(stride);
  if (thread < r) T[thread * r + thread] = 2.0 / gram[thread * row + thread];
  team.sync();
#pragma unroll 1
  for (int log = 0; 1 << log < r; ++log) {
    const int size = 1 << log, pairs = (r + 2 * size - 1) >> (log + 1), count = pairs << (2 * log);
#pragma unroll 1
    for (int product = 0; product < 2; ++product) {
#pragma unroll 1
      for (int e = thread; e < count; e += kMatrixThreads) {
        const int first = (e >> (2 * log)) * 2 * size, middle = first + size;
        const int i = first + ((e >> log) & (size - 1)), j = middle + (e & (size - 1));
        if (j >= r) continue;
        double sum = 0.0;
        if (product == 0) {
          for (int k = middle; k <= j; ++k) sum += gram[i * row + k] * T[k * r + j];
          T[j * r + i] = sum;
        } else {
          for (int k = i; k < middle; ++k) sum += T[i * r + k] * T[j * r + k];
          T[i * r + j] = -sum;
        }
      }
      team.sync();
    }
  }
  for (int e = thread; e < r * r; e += kMatrixThreads) {
    if (e / r > e % r) T[e] = 0.0;
  }
  team.sync();
}

}  // namespace reft_kernels
