// R of many matrices, and the gradients of their parametrisations, each in one cooperative launch.
//
// Items are slabs of columns of the matrices, a run of them to each block. Phase 1 sums products of a slab's
// columns. After a barrier of the grid every block adds up the slabs of its matrices, does their r x r
// mathematics (small_matrices.h), and in phase 2 weighs the columns of its slabs. Of a high rank one block
// does the mathematics, in the workspace, and there is a second barrier.
#pragma once

#include "reft_kernels/column_sums.cuh"
#include "reft_kernels/orthonormalize_table.h"

namespace reft_kernels {

template <bool kBackward>
struct Orthonormalize {
  static constexpr int kParts = kBackward ? 3 : 2;  // of a staged column: S V, B, the gradient

  const OrthonormalizeTask& task;
  const OrthonormalizeEntry* const matrices;
  char* const shared;
  const int thread;
  const int begin, end;  // items of the block
  int index = 0;         // of the matrix that an item is of
  MatrixLayout at;

  REFT_DEVICE Orthonormalize(const OrthonormalizeTask& all, const OrthonormalizeEntry* table)
      : task(all),
        matrices(table),
        shared(dynamic_shared()),
        thread(static_cast<int>(threadIdx.x)),
        begin(static_cast<int>(int64_t{all.items} * blockIdx.x / gridDim.x)),
        end(static_cast<int>(int64_t{all.items} * (blockIdx.x + 1) / gridDim.x)) {}

  // --- the matrix of an item

  REFT_DEVICE const OrthonormalizeEntry& matrix() const { return matrices[index]; }

  REFT_DEVICE void find_matrix(int item) {
    int low = 0, high = task.count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (matrices[middle].item <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    index = low;
    at = orthonormalize_layout(matrix().r, kBackward, task.shared_bytes);
  }

  REFT_DEVICE int tiles() const { return orthonormalize_tiles(matrix().r, kBackward); }
  REFT_DEVICE int quads() const { return quads_of(matrix().r); }
  REFT_DEVICE int width() const { return 4 * quads(); }
  REFT_DEVICE int parts() const { return slabs_of(matrix().d, matrix().r) * groups_of(matrix().r, tiles()); }
  REFT_DEVICE bool leads() const { return matrix().r > kMaxSharedSolveRank; }

  REFT_DEVICE double* partial() const { return task.workspace + int64_t{matrix().partial} * kTileSums; }
  // Of a high rank.
  REFT_DEVICE double* solve_in_workspace() const {
    return partial() + int64_t{parts()} * tiles() * kTileSums;
  }

  REFT_DEVICE Stage stage() const { return {reinterpret_cast<float*>(shared + at.stage), kParts * quads()}; }
  // [i, k]: what staged element i of a column adds to element k of its result.
  REFT_DEVICE float* weights() const { return reinterpret_cast<float*>(shared + at.weights); }
  REFT_DEVICE float* head() const { return weights() + kParts * width() * width(); }

  // --- staging

  // Elements 4 quad to 4 quad + 3 of column j: of V below its diagonal, or of B.
  REFT_DEVICE void load_quad(const float* from, int j, int quad, float (&value)[4]) const {
    const int r = matrix().r;
    const float* first = from + int64_t{j} * r + 4 * quad;
    if (r % 4 == 0 && aligned_16(from)) {
      load_floats(first, value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = 4 * quad + i < r ? first[i] : 0.0f;
    }
  }

  // Columns from `first` on, and zeros up to a multiple of 4 of them.
  REFT_DEVICE void stage_chunk(int first, int count) const {
    const OrthonormalizeEntry& m = matrix();
    const Stage to = stage();
    const int q = quads(), r = m.r, padded = (count + 3) & ~3;
    sync_block();
#pragma unroll 2
    for (int v = thread; v < padded * q; v += kMatrixThreads) {
      const int column = v / q, quad = v % q, j = first + column;
      float x[4] = {}, b[4] = {};
      if (column < count) {
        load_quad(m.X, j, quad, x);
        load_quad(m.reflectors, j, quad, b);
        if (j < r) {
          const float sign = m.signs[j];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int k = 4 * quad + i;
            x[i] = k < j ? sign * x[i] : k == j ? sign : 0.0f;
          }
        }
      }
      store_floats(to.place(column, quad), x);
      store_floats(to.place(column, q + quad), b);
    }
    if constexpr (kBackward) {
      const int fours = padded / 4;
      const bool vectors = m.d % 4 == 0 && aligned_16(m.grad);
#pragma unroll 1
      for (int v = thread; v < fours * q; v += kMatrixThreads) {
        const int column = v % fours * 4, quad = v / fours;
        float value[4][4];
        load_square(m.grad + int64_t{4} * quad * m.d + first + column, m.d, r - 4 * quad, count - column,
                    vectors, value);
        stage_square(to, column, 2 * q + quad, value);
      }
    }
    sync_block();
  }

  // --- phase 1

  REFT_DEVICE int first_column(int item) const { return (item - matrix().item) * slab_of(matrix().r); }
  REFT_DEVICE int columns(int item) const {
    return min(slab_of(matrix().r), matrix().d - first_column(item));
  }

  REFT_DEVICE void sum_item(int item) {
    find_matrix(item);
    const int first = first_column(item), q = quads(), count = tiles(), groups = groups_of(matrix().r, count);
    double* to = partial() + int64_t{item - matrix().item} * groups * count * kTileSums;
    int staged = -1;
    sum_slab<float>(
        {matrix().r, count, groups, at.chunk, to, first == 0 ? width() : 0}, stage(), columns(item),
        [&](int from, int n) {
          if (from == staged) return;
          stage_chunk(first + from, n);
          staged = from;
        },
        [&](int tile, int* a, int* b) {
          if constexpr (kBackward) {
            *a = 2 * q + tile / (2 * q);
            *b = tile % (2 * q);
          } else {
            quads_of_upper_tile(tile, a, b);
          }
        });
  }

  // --- the r x r mathematics

  REFT_DEVICE Tops<float> tops() const {
    return {matrix().X, matrix().reflectors, matrix().signs, matrix().r};
  }

  // From the sums of all slabs the weights of pass 2, as small_matrices.h has them, in `work`; `keeps`: the
  // forward's factors are written for the backward.
  REFT_DEVICE void solve(double* work, bool keeps) const {
    const int r = matrix().r, q = quads();
    const OrthonormalizeSolve place = orthonormalize_solve(r, kBackward);
    double* sums = work + place.sums;
    float* u = reinterpret_cast<float*>(work + place.u);
    sync_block();
    total_of_slabs(partial(), parts(), tiles(), [&](int tile, int element, double total) {
      int a, b;
      if constexpr (kBackward) {
        a = tile / (2 * q);
        b = tile % (2 * q);
      } else {
        quads_of_upper_tile(tile, &a, &b);
      }
      const int i = 4 * (a % q) + element / 4, j = 4 * (b % q) + element % 4;
      if (i < r && j < r) sums[(a / q * r + i) * 2 * r + b / q * r + j] = total;
    });
    sync_block();
    if constexpr (kBackward) {
      orthonormalize_backward_weights(BlockTeam(), tops(), sums, OrthonormalizeFactors(matrix().factors, r),
                                      u, work + place.head, work + place.work);
    } else {
      double* factors = work + place.factors;
      orthonormalize_weights(BlockTeam(), tops(), sums, OrthonormalizeFactors(factors, r), u,
                             work + place.head, work + place.work);
      if (!keeps) return;
      for (int e = thread; e < 4 * r * r; e += kMatrixThreads) matrix().factors[e] = factors[e];
    }
  }

  // Lays out the weights for the columns' products, with zeros where ranks are filled up. `load` reads what
  // `solve` wrote, perhaps in another block.
  template <typename Load>
  REFT_DEVICE void spread_weights(const double* work, const Load& load) const {
    const int r = matrix().r, n = width();
    const OrthonormalizeSolve place = orthonormalize_solve(r, kBackward);
    const float* u = reinterpret_cast<const float*>(work + place.u);
    for (int e = thread; e < kParts * n * n; e += kMatrixThreads) {
      const int part = e / (n * n), i = e / n % n, k = e % n;
      weights()[e] = i < r && k < r ? load(u + k * kParts * r + part * r + i) : 0.0f;
    }
    if (!leads()) {
      for (int e = thread; e < r * r; e += kMatrixThreads) {
        head()[e] = static_cast<float>(work[place.head + e]);
      }
    }
    sync_block();
  }

  REFT_DEVICE void lead() {
    for (int item = begin; item < end; ++item) {
      find_matrix(item);
      if (leads() && item == matrix().item) solve(solve_in_workspace(), true);
    }
  }

  REFT_DEVICE void find_weights(bool keeps) const {
    if (leads()) {
      sync_block();
      spread_weights(solve_in_workspace(), [](const float* from) { return load_from_other_block(from); });
    } else {
      auto* work = reinterpret_cast<double*>(shared + at.solve);
      solve(work, keeps);
      spread_weights(work, [](const float* from) { return *from; });
    }
  }

  // --- phase 2

  REFT_DEVICE void weigh_item(int item, int* solved) {
    find_matrix(item);
    // The weights of a matrix serve all of the block's slabs of it.
    if (index != *solved) find_weights(item == matrix().item);
    *solved = index;
    const bool staged = at.resident && end - begin == 1;
    const int first = first_column(item), count = columns(item);
#pragma unroll 1
    for (int from = 0; from < count; from += at.chunk) {
      const int n = min(at.chunk, count - from);
      if (!staged) stage_chunk(first + from, n);
      weigh_chunk(first + from, n);
    }
  }

  REFT_DEVICE void weigh_chunk(int first, int count) const {
    const int q = quads(), fours = (count + 3) / 4;
#pragma unroll 1
    for (int v = thread; v < fours * q; v += kMatrixThreads) {
      // Neighbouring threads write neighbouring memory: R [r, d] row by row, dX [d, r] column by column.
      const int column = (kBackward ? v / q : v % fours) * 4, quad = kBackward ? v % q : v / fours;
      float sum[4][4] = {};
      add_weighted(stage(), column, weights(), width(), quad, kParts * q, sum);
      if constexpr (kBackward) {
        store_gradient(first + column, quad, count - column, sum);
      } else {
        store_rows(first + column, quad, count - column, sum);
      }
    }
  }

  // Element [i, j] of the head, which may have been found by another block.
  REFT_DEVICE float head_at(int i, int j) const {
    const int e = i * matrix().r + j;
    if (!leads()) return head()[e];
    return static_cast<float>(
        load_from_other_block(solve_in_workspace() + orthonormalize_solve(matrix().r, kBackward).head + e));
  }

  // R of four ranks and as many as four columns, from j on.
  REFT_DEVICE void store_rows(int j, int quad, int count, float (&sum)[4][4]) const {
    const OrthonormalizeEntry& m = matrix();
    if (j < m.r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (j + c < m.r && 4 * quad + k < m.r) sum[k][c] = head_at(4 * quad + k, j + c);
        }
      }
    }
    store_square(m.out + int64_t{4} * quad * m.d + j, m.d, m.r - 4 * quad, count,
                 m.d % 4 == 0 && aligned_16(m.out), sum);
  }

  // dX of four ranks and as many as four columns, from j on.
  REFT_DEVICE void store_gradient(int j, int quad, int count, const float (&sum)[4][4]) const {
    const OrthonormalizeEntry& m = matrix();
    const bool vectors = m.r % 4 == 0 && aligned_16(m.out);
    float turned[4][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) turned[c][k] = sum[k][c];
      if (j + c >= m.r || c >= count) continue;
      const float sign = m.signs[j + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = 4 * quad + i;
        turned[c][i] = k < j + c ? sign * turned[c][i] + head_at(j + c, k) : 0.0f;
      }
    }
    store_square(m.out + int64_t{j} * m.r + 4 * quad, m.r, count, m.r - 4 * quad, vectors, turned);
  }
};

template <bool kBackward, typename Table>
REFT_KERNEL(kMatrixThreads, 1)
orthonormalize_kernel(REFT_GRID_CONSTANT Table table) {
  Orthonormalize<kBackward> work(table.task, table.matrix);
#pragma unroll 1
  for (int item = work.begin; item < work.end; ++item) work.sum_item(item);
  grid_wait(table.task.barrier, grid_arrive(table.task.barrier));
  if (table.task.leads) {
    work.lead();
    grid_wait(table.task.barrier, grid_arrive(table.task.barrier));
  }
  int solved = -1;
#pragma unroll 1
  for (int item = work.begin; item < work.end; ++item) work.weigh_item(item, &solved);
}

}  // namespace reft_kernels
