// The r x r mathematics of matrices with orthonormal rows, in float64, row by row: what lies between two
// passes over d. One text for a thread that is alone and for threads that share the work.
//
// A Team is handed to every function: `rank` and `size` of its threads, `sync` between what one writes and
// another reads, and Row, the elements of a row that one thread computes at once: a vector of doubles on a
// CPU, double itself where threads are many. All of a team's threads call, with the same arguments; each
// function ends with a `sync`, and begins with none. Results do not depend on the size, nor on Row.
//
// Formulas: reft_kernels/orthonormal_problem.py and reft_kernels/backends/eager_orthonormal.py.
#pragma once

#include <cstdint>
#include <cstring>

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

template <typename Row>
constexpr int kColumnsOf = static_cast<int>(sizeof(Row) / sizeof(double));

REFT_TEAM_INLINE double element(double row, int) {
  return row;
}
template <typename Row>
REFT_TEAM_INLINE double element(const Row& row, int column) {
  return row[column];
}

template <typename Row>
REFT_TEAM_INLINE Row load_row(const double* from) {
  Row row;
  memcpy(&row, from, sizeof row);
  return row;
}

// The columns of a matrix, cut into pieces of kCount Rows, of one Row and of one double.
template <typename Row_, int kCount_>
struct Piece {
  using Row = Row_;
  static constexpr int kCount = kCount_;
  static constexpr int kColumns = kCount * kColumnsOf<Row>;
};

template <typename Row, int kCount>
REFT_TEAM_INLINE int pieces_of(int r) {
  constexpr int kColumns = Piece<Row, kCount>::kColumns;
  if constexpr (kColumns == 1) {
    return r;
  } else if constexpr (kCount > 1) {
    return r / kColumns + pieces_of<Row, 1>(r % kColumns);
  } else {
    return r / kColumns + r % kColumns;
  }
}

// Calls `work` with the piece of a number and its first column.
template <typename Row, int kCount, typename Work>
REFT_TEAM_INLINE void with_piece(int r, int number, int first, const Work& work) {
  constexpr int kColumns = Piece<Row, kCount>::kColumns;
  const int pieces = (r - first) / kColumns;
  if (number < pieces) {
    work(Piece<Row, kCount>(), first + number * kColumns);
  } else if constexpr (kCount > 1) {
    with_piece<Row, 1>(r, number - pieces, first + pieces * kColumns, work);
  } else if constexpr (kColumns > 1) {
    with_piece<double, 1>(r, number - pieces, first + pieces * kColumns, work);
  }
}

// Enough to hide a multiplication's latency; one where there are other threads for that.
template <typename Team>
constexpr int kRowsAtOnceOf = kColumnsOf<typename Team::Row> > 1 ? 4 : 1;

// Calls put(i, j, (a b)_ij) for the columns j of a piece from `first` on; b is [r, r].
template <typename Row, int kCount, typename Put>
REFT_TEAM_INLINE void multiply_piece(int r, const LeftFactor& a, const double* b, int i, int first,
                                     const Put& put) {
  constexpr int kColumns = kColumnsOf<Row>;
  Row sum[kCount] = {};
  const int begin = a.part == Part::kUpper ? i : 0, end = a.part == Part::kLower ? i + 1 : r;
  for (int k = begin; k < end; ++k) {
    const double factor = a.at[i * a.row + k * a.step];
    const double* row = b + int64_t{k} * r + first;
    for (int n = 0; n < kCount; ++n) sum[n] += factor * load_row<Row>(row + n * kColumns);
  }
  for (int n = 0; n < kCount; ++n) {
    for (int c = 0; c < kColumns; ++c) put(i, first + n * kColumns + c, element(sum[n], c));
  }
}

// Calls put(i, j, (a b)_ij) for every element; b is [r, r].
template <typename Team, typename Put>
REFT_TEAM_INLINE void multiply(const Team& team, int r, const LeftFactor& a, const double* b,
                               const Put& put) {
  using Row = typename Team::Row;
  constexpr int kCount = kRowsAtOnceOf<Team>;
  const int pieces = pieces_of<Row, kCount>(r), items = r * pieces;
  for (int item = team.rank(); item < items; item += team.size()) {
    with_piece<Row, kCount>(r, item % pieces, 0, [&](auto piece, int first) {
      using P = decltype(piece);
      multiply_piece<typename P::Row, P::kCount>(r, a, b, item / pieces, first, put);
    });
  }
  team.sync();
}

// T [r, r], the inverse of the strict upper part of a Gram matrix plus half its diagonal; `gram` has `stride`
// elements from a row to the next, and its part below the diagonal is not read.
template <typename Team>
REFT_TEAM_INLINE void half_gram_inverse(const Team& team, int r, const double* gram, int64_t stride,
                                        double* T) {
  using Row = typename Team::Row;
  const int pieces = pieces_of<Row, 1>(r);
  for (int number = team.rank(); number < pieces; number += team.size()) {
    with_piece<Row, 1>(r, number, 0, [&](auto piece, int j) {
      using P = decltype(piece);
      const int end = j + P::kColumns;  // T is zero below
      for (int i = r - 1; i >= end; --i) {
        for (int c = 0; c < P::kColumns; ++c) T[int64_t{i} * r + j + c] = 0;
      }
      for (int i = end - 1; i >= 0; --i) {
        double* to = T + int64_t{i} * r + j;
        for (int c = 0; c < P::kColumns; ++c) to[c] = i == j + c ? 1.0 : 0.0;
        auto sum = load_row<typename P::Row>(to);
        for (int k = i + 1; k < end; ++k) {
          sum -= gram[i * stride + k] * load_row<typename P::Row>(T + int64_t{k} * r + j);
        }
        sum *= 1 / (gram[i * stride + i] / 2);
        memcpy(to, &sum, sizeof sum);
      }
    });
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
// are read: the factors, the weights u [r, 2r] of pass 2 and its first r columns, `head` [r, r],
//
//   R[k, j] = sum_i u[k, i] U[j, i]    where j >= r,    u = -[C D; K]^T,
//   R[k, j] = head[k, j]               else,            head = (S (E D - V C D) - B K)^T,
//   C = T V_top^T,   K = T_B (B_top^T S D - M C D)
//
// The head has R's large elements, differences of larger ones: not for float32. `work` has 3 r^2 elements.
// Once T and T_B are there `gram` is not read again, and u, head and `work` but for its first r^2 elements
// are not written before: they may lie over it.
template <typename Team, typename E, typename U>
REFT_TEAM_INLINE void orthonormalize_weights(const Team& team, const Tops<E>& tops, const double* gram,
                                             const OrthonormalizeFactors& f, U* u, double* head,
                                             double* work) {
  const int r = tops.r;
  const int count = r * r;
  double *top = work, *right = work + count, *K = work + 2 * count;
  for (int e = team.rank(); e < count; e += team.size()) {
    const int i = e / r, j = e % r;
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
  multiply(team, r, upper(f.T_B, r), right, [&](int i, int j, double value) {
    K[int64_t{i} * r + j] = value;
    u[int64_t{j} * 2 * r + r + i] = static_cast<U>(-value);
  });
  multiply(team, r, transposed(f.C, r), top, [&](int k, int j, double value) {
    head[int64_t{k} * r + j] = tops.sign(j) * tops.diagonal(k) * ((j == k ? 1.0 : 0.0) - value);
  });
  for (int e = team.rank(); e < count; e += team.size()) {
    right[e] = tops.B(e % r, e / r);
  }
  team.sync();
  multiply(team, r, transposed(K, r), right,
           [&](int k, int j, double value) { head[int64_t{k} * r + j] -= value; });
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
  const int count = r * r;
  const int64_t row = int64_t{3} * r;
  double *L = work, *dC = work + count, *right = work + 2 * count, *left = work + 3 * count;
  for (int e = team.rank(); e < count; e += team.size()) {
    const int i = e / r, j = e % r;
    right[e] = sums[j * int64_t{2} * r + r + i];  // B^T grad^T
  }
  team.sync();
  multiply(team, r, transposed_upper(f.T_B, r), right,
           [&](int i, int j, double value) { L[int64_t{i} * r + j] = value; });
  multiply(team, r, transposed(f.M, r), L, [&](int i, int j, double value) {
    dC[int64_t{i} * r + j] = (value - sums[j * int64_t{2} * r + i]) * tops.diagonal(j);
  });
  for (int e = team.rank(); e < count; e += team.size()) {
    const int i = e / r, j = e % r;
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
  for (int e = team.rank(); e < count; e += team.size()) {
    right[e] = f.T[e % r * r + e / r];
  }
  team.sync();
  multiply(team, r, whole(L, r), right, [&](int i, int j, double value) {
    if (i > j) return;
    u[j * row + i] = static_cast<U>(-value);
    u[i * row + j] = static_cast<U>(-value);
  });
}

// The largest sum of a column of |a|; `sums` has r elements.
template <typename Team>
REFT_TEAM_INLINE double largest_column_sum(const Team& team, int r, const double* a, double* sums) {
  using Row = typename Team::Row;
  const int pieces = pieces_of<Row, 1>(r);
  for (int number = team.rank(); number < pieces; number += team.size()) {
    with_piece<Row, 1>(r, number, 0, [&](auto piece, int j) {
      using P = decltype(piece);
      typename P::Row sum = {};
      for (int i = 0; i < r; ++i) {
        const auto row = load_row<typename P::Row>(a + int64_t{i} * r + j);
        sum += row < 0 ? -row : row;
      }
      memcpy(sums + j, &sum, sizeof sum);
    });
  }
  team.sync();
  double largest = 0;
  for (int j = 0; j < r; ++j) largest = sums[j] > largest || sums[j] != sums[j] ? sums[j] : largest;
  team.sync();
  return largest;
}

constexpr int kInverseRootIterations = 30;

// A^(-1/2) of a symmetric positive definite A [r, r], which is lost, by the coupled Newton-Schulz iteration
// (Higham, Functions of Matrices, 2008, 6.35). It ends when the next step would change nothing; 30 steps
// serve for condition numbers up to 1e8. `work` has 3 r^2 + r elements. `square_root` is that of the library.
//
// Returns the norm, the largest sum of a column, of what A / its norm is off the identity.
template <typename Team, typename SquareRoot>
REFT_TEAM_INLINE double inverse_root(const Team& team, int r, double* A, double* root, double* work,
                                     const SquareRoot& square_root) {
  const int count = r * r;
  double *Y = A, *Z = root, *step = work, *next_Y = work + count, *next_Z = work + 2 * count;
  double* sums = work + 3 * count;
  const double scale = largest_column_sum(team, r, A, sums);
  for (int e = team.rank(); e < count; e += team.size()) {
    Y[e] /= scale;
    Z[e] = e / r == e % r ? 1.0 : 0.0;
  }
  team.sync();
  double first_off = 0;
  for (int iteration = 0; iteration < kInverseRootIterations; ++iteration) {
    multiply(team, r, whole(Z, r), Y,
             [&](int i, int j, double value) { step[int64_t{i} * r + j] = (i == j ? 1.0 : 0.0) - value; });
    const double off = largest_column_sum(team, r, step, sums);
    if (iteration == 0) first_off = off;
    for (int e = team.rank(); e < count; e += team.size()) {
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
  for (int e = team.rank(); e < count; e += team.size()) root[e] = Z[e] * factor;
  team.sync();
  return first_off;
}

}  // namespace reft_kernels
