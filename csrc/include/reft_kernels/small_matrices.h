// The r x r mathematics of matrices with orthonormal rows, in float64, row by row: what lies between two
// passes over d. One text for a thread that is alone and for threads that share the work.
//
// A Team is handed to every function: `rank` and `size` of its threads, `sync` between what one writes and
// another reads, and kColumns, the elements of a row that one thread computes at once (a vector's on a CPU, 1
// where threads are many). All of a team's threads call, with the same arguments; each function ends with a
// `sync`, and begins with none. Results do not depend on the size, nor on kColumns.
//
// Formulas: reft_kernels/orthonormal_problem.py and reft_kernels/backends/eager_orthonormal.py.
#pragma once

#include <cstdint>

#include "reft_kernels/types.h"

// Never a function of its own, so that the linker cannot give code for one instruction set to another.
#if defined(__CUDACC__)
#define REFT_TEAM_INLINE __host__ __device__ __forceinline__
#else
#define REFT_TEAM_INLINE inline __attribute__((always_inline))
#endif

namespace reft_kernels {

// The left factor of a product: element (i, k) is at[i * row + k * step]. What is outside its part is zero
// and is not read.
enum class Part { kAll, kUpper, kLower };

struct LeftFactor {
  const double* at;
  int64_t row, step;
  Part part;
};

REFT_TEAM_INLINE LeftFactor whole(const double* a, int r) {
  return {a, r, 1, Part::kAll};
}
REFT_TEAM_INLINE LeftFactor upper(const double* a, int r) {
  return {a, r, 1, Part::kUpper};
}
REFT_TEAM_INLINE LeftFactor transposed(const double* a, int r) {
  return {a, 1, r, Part::kAll};
}
REFT_TEAM_INLINE LeftFactor transposed_upper(const double* a, int r) {
  return {a, 1, r, Part::kLower};
}

// Calls put(i, j, sum_k a(i, k) b[k, j]) for columns j of row i from `j` on. b is [r, r].
template <int kCount, typename Put>
REFT_TEAM_INLINE void multiply_piece(int r, const LeftFactor& a, const double* b, int i, int j,
                                     const Put& put) {
  double sum[kCount] = {};
  const int begin = a.part == Part::kUpper ? i : 0, end = a.part == Part::kLower ? i + 1 : r;
  for (int k = begin; k < end; ++k) {
    const double factor = a.at[i * a.row + k * a.step];
    for (int c = 0; c < kCount; ++c) sum[c] += factor * b[int64_t{k} * r + j + c];
  }
  for (int c = 0; c < kCount; ++c) put(i, j + c, sum[c]);
}

// Calls put(i, j, (a b)_ij) for every element.
template <typename Team, typename Put>
REFT_TEAM_INLINE void multiply(const Team& team, int r, const LeftFactor& a, const double* b,
                               const Put& put) {
  constexpr int kCount = Team::kColumns;
  const int pieces = r / kCount, rest = kCount > 1 ? r % kCount : 0, items = r * (pieces + rest);
  for (int item = team.rank(); item < items; item += team.size()) {
    const int i = item / (pieces + rest), piece = item % (pieces + rest);
    if (piece < pieces) {
      multiply_piece<kCount>(r, a, b, i, piece * kCount, put);
    } else {
      multiply_piece<1>(r, a, b, i, pieces * kCount + piece - pieces, put);
    }
  }
  team.sync();
}

// Columns j to j + kCount of T, see below.
template <int kCount>
REFT_TEAM_INLINE void invert_piece(int r, const double* gram, int64_t stride, int j, double* T) {
  for (int i = r - 1; i >= 0; --i) {
    double sum[kCount];
    for (int c = 0; c < kCount; ++c) sum[c] = i == j + c ? 1.0 : 0.0;
    const int end = j + kCount < r ? j + kCount : r;  // T is zero below
    for (int k = i + 1; k < end; ++k) {
      const double factor = gram[i * stride + k];
      for (int c = 0; c < kCount; ++c) sum[c] -= factor * T[int64_t{k} * r + j + c];
    }
    const double half = gram[i * stride + i] / 2;
    for (int c = 0; c < kCount; ++c) T[int64_t{i} * r + j + c] = sum[c] / half;
  }
}

// T [r, r], the inverse of the strict upper part of a Gram matrix plus half its diagonal; `gram` has `stride`
// elements from a row to the next, and its part below the diagonal is not read.
template <typename Team>
REFT_TEAM_INLINE void half_gram_inverse(const Team& team, int r, const double* gram, int64_t stride,
                                        double* T) {
  constexpr int kCount = Team::kColumns;
  const int pieces = r / kCount, rest = kCount > 1 ? r % kCount : 0;
  for (int piece = team.rank(); piece < pieces + rest; piece += team.size()) {
    if (piece < pieces) {
      invert_piece<kCount>(r, gram, stride, piece * kCount, T);
    } else {
      invert_piece<1>(r, gram, stride, pieces * kCount + piece - pieces, T);
    }
  }
  team.sync();
}

// What a matrix of rank r keeps from the forward for the backward, one after the other.
struct OrthonormalizeFactors {
  REFT_TEAM_INLINE OrthonormalizeFactors(double* at, int r)
      : T(at), C(at + int64_t{r} * r), T_B(at + 2 * int64_t{r} * r), M(at + 3 * int64_t{r} * r) {}
  double *T, *C, *T_B, *M;
};

// The first r rows of X, of the reflectors and the signs decide on a matrix's sign of each column and on its
// unit triangular tops.
template <typename E>
struct Tops {
  const E* X;           // [., r]
  const E* reflectors;  // [., r]
  const E* signs;       // [r]
  int r;

  // D
  REFT_TEAM_INLINE double diagonal(int k) const { return X[int64_t{k} * r + k] < E(0) ? -1.0 : 1.0; }
  REFT_TEAM_INLINE double sign(int j) const { return static_cast<double>(signs[j]); }
  REFT_TEAM_INLINE double V(int j, int k) const { return unit(X, j, k); }
  REFT_TEAM_INLINE double B(int j, int k) const {
    return static_cast<double>(reflectors[int64_t{j} * r + k]);
  }

 private:
  REFT_TEAM_INLINE double unit(const E* from, int j, int k) const {
    return j > k ? static_cast<double>(from[int64_t{j} * r + k]) : j == k ? 1.0 : 0.0;
  }
};

// From the Gram matrix [2r, 2r] of U = [S V, B], of which the part above the diagonal and the diagonal itself
// are read: the factors, and the weights u [r, 2r] of pass 2,
//
//   R[k, :] = (S E D)[:, k]^T + sum_i u[k, i] U[:, i]^T,     u = -[C D; K]^T,
//   C = T V_top^T,   K = T_B (B_top^T S D - M C D)
//
// `work` has 2 r^2 elements.
template <typename Team, typename E, typename U>
REFT_TEAM_INLINE void orthonormalize_weights(const Team& team, const Tops<E>& tops, const double* gram,
                                             const OrthonormalizeFactors& f, U* u, double* work) {
  const int r = tops.r;
  const int64_t count = int64_t{r} * r;
  double *top = work, *right = work + count;
  for (int64_t e = team.rank(); e < count; e += team.size()) {
    const int i = static_cast<int>(e / r), j = static_cast<int>(e % r);
    top[e] = tops.V(j, i);
    f.M[e] = gram[j * int64_t{2} * r + r + i];
  }
  half_gram_inverse(team, r, gram, 2 * r, f.T);
  half_gram_inverse(team, r, gram + int64_t{2} * r * r + r, 2 * r, f.T_B);
  multiply(team, r, upper(f.T, r), top, [&](int i, int j, double value) {
    f.C[int64_t{i} * r + j] = value;
    u[int64_t{j} * 2 * r + i] = static_cast<U>(-value * tops.diagonal(j));
  });
  multiply(team, r, whole(f.M, r), f.C, [&](int i, int j, double value) {
    right[int64_t{i} * r + j] = (tops.B(j, i) * tops.sign(j) - value) * tops.diagonal(j);
  });
  multiply(team, r, upper(f.T_B, r), right,
           [&](int i, int j, double value) { u[int64_t{j} * 2 * r + r + i] = static_cast<U>(-value); });
}

// From sums [r, 2r], of which row k is the products of grad[k, :] with U: the weights u [r, 3r] and `head`
// [r, r] of pass 2,
//
//   dX[j, k] = s_j (sum_i u[k, i] [S V, B, grad^T][j, i]) + head[j, k]      where j > k, else 0,
//
// s_j being signs[j] and 1 from r on, and head 0 there:
//
//   L = T_B^T B^T grad^T,   dC = -(V^T S grad^T - M^T L) D,   N = -T^T dC V_top T^T,
//   dV = S [B, -grad^T] [L D C^T; D C^T] + V (n + n^T),   head = dC^T T
//
// with n the strict upper part of N plus half its diagonal. `work` has 4 r^2 elements.
template <typename Team, typename E, typename U>
REFT_TEAM_INLINE void orthonormalize_backward_weights(const Team& team, const Tops<E>& tops,
                                                      const double* sums, const OrthonormalizeFactors& f,
                                                      U* u, double* head, double* work) {
  const int r = tops.r;
  const int64_t count = int64_t{r} * r, row = int64_t{3} * r;
  double *L = work, *dC = work + count, *right = work + 2 * count, *left = work + 3 * count;
  for (int64_t e = team.rank(); e < count; e += team.size()) {
    const int i = static_cast<int>(e / r), j = static_cast<int>(e % r);
    right[e] = sums[j * int64_t{2} * r + r + i];  // B^T grad^T
  }
  team.sync();
  multiply(team, r, transposed_upper(f.T_B, r), right,
           [&](int i, int j, double value) { L[int64_t{i} * r + j] = value; });
  multiply(team, r, transposed(f.M, r), L, [&](int i, int j, double value) {
    dC[int64_t{i} * r + j] = (value - sums[j * int64_t{2} * r + i]) * tops.diagonal(j);
  });
  for (int64_t e = team.rank(); e < count; e += team.size()) {
    const int i = static_cast<int>(e / r), j = static_cast<int>(e % r);
    right[e] = tops.V(i, j);
    left[e] = tops.diagonal(i) * f.C[int64_t{j} * r + i];  // D C^T
    u[j * row + 2 * r + i] = static_cast<U>(-left[e]);
  }
  team.sync();
  multiply(team, r, whole(L, r), left,
           [&](int i, int k, double value) { u[k * row + r + i] = static_cast<U>(value); });
  multiply(team, r, transposed(dC, r), f.T,
           [&](int j, int k, double value) { head[int64_t{j} * r + k] = value; });
  // L and D C^T are done with: their memory is that of the factors of N.
  multiply(team, r, whole(dC, r), right,
           [&](int i, int j, double value) { left[int64_t{i} * r + j] = value; });
  multiply(team, r, transposed_upper(f.T, r), left,
           [&](int i, int j, double value) { L[int64_t{i} * r + j] = value; });
  for (int64_t e = team.rank(); e < count; e += team.size()) {
    right[e] = f.T[e % r * r + e / r];
  }
  team.sync();
  multiply(team, r, whole(L, r), right, [&](int i, int j, double value) {
    if (i > j) return;
    u[j * row + i] = static_cast<U>(-value);
    u[i * row + j] = static_cast<U>(-value);
  });
}

// The largest sum of a row of |a|; `sums` has r elements.
template <typename Team>
REFT_TEAM_INLINE double largest_row_sum(const Team& team, int r, const double* a, double* sums) {
  for (int i = team.rank(); i < r; i += team.size()) {
    double sum = 0;
    for (int j = 0; j < r; ++j) {
      const double value = a[int64_t{i} * r + j];
      sum += value < 0 ? -value : value;
    }
    sums[i] = sum;
  }
  team.sync();
  double largest = 0;
  for (int i = 0; i < r; ++i) largest = sums[i] > largest || sums[i] != sums[i] ? sums[i] : largest;
  team.sync();
  return largest;
}

constexpr int kInverseRootIterations = 30;

// A^(-1/2) of a symmetric positive definite A [r, r], which is lost, by the coupled Newton-Schulz iteration
// (Higham, Functions of Matrices, 2008, 6.35). It ends when the next step would change nothing; 30 steps
// serve for condition numbers up to 1e8. `work` has 3 r^2 + r elements. `square_root` is that of the library.
//
// Returns the norm, the largest sum of a row, of what A / its norm is off the identity.
template <typename Team, typename SquareRoot>
REFT_TEAM_INLINE double inverse_root(const Team& team, int r, double* A, double* root, double* work,
                                     const SquareRoot& square_root) {
  const int64_t count = int64_t{r} * r;
  double *Y = A, *Z = root, *step = work, *next_Y = work + count, *next_Z = work + 2 * count;
  double* sums = work + 3 * count;
  const double scale = largest_row_sum(team, r, A, sums);
  for (int64_t e = team.rank(); e < count; e += team.size()) {
    Y[e] /= scale;
    Z[e] = e / r == e % r ? 1.0 : 0.0;
  }
  team.sync();
  double first_off = 0;
  for (int iteration = 0; iteration < kInverseRootIterations; ++iteration) {
    multiply(team, r, whole(Z, r), Y,
             [&](int i, int j, double value) { step[int64_t{i} * r + j] = (i == j ? 1.0 : 0.0) - value; });
    const double off = largest_row_sum(team, r, step, sums);
    if (iteration == 0) first_off = off;
    for (int64_t e = team.rank(); e < count; e += team.size()) {
      step[e] = (e / r == e % r ? 1.0 : 0.0) + step[e] / 2;
    }
    team.sync();
    multiply(team, r, whole(step, r), Z,
             [&](int i, int j, double value) { next_Z[int64_t{i} * r + j] = value; });
    double* swapped = Z;
    Z = next_Z;
    next_Z = swapped;
    if (off < 1e-8) break;  // what is off is squared
    multiply(team, r, whole(Y, r), step,
             [&](int i, int j, double value) { next_Y[int64_t{i} * r + j] = value; });
    swapped = Y;
    Y = next_Y;
    next_Y = swapped;
  }
  const double factor = 1 / square_root(scale);
  for (int64_t e = team.rank(); e < count; e += team.size()) root[e] = Z[e] * factor;
  team.sync();
  return first_off;
}

}  // namespace reft_kernels
