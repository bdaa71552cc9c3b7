// One AdamW step of many tensors, those with orthonormal rows retracted, in one cooperative launch.
//
// Items are slabs of the columns of constrained matrices, then pieces of all other tensors; every block has
// some of either. Where gradients are clipped or projected a first phase sums their squares and their
// products with the parameters. The next sums P P^T of the moved matrices P; the barrier after it is where
// unconstrained tensors take their steps. Then (P P^T)^(-1/2) is found (small_matrices.h), and the
// constrained ones are written. Nothing is written before it is known whether it shall be.
#pragma once

#include <cmath>

#include "reft_kernels/column_sums.cuh"
#include "reft_kernels/stiefel_adamw_table.h"

namespace reft_kernels {

struct SquareRoot {
  REFT_DEVICE double operator()(double x) const { return sqrt(x); }
};

// What the step of a tensor needs of its count.
struct alignas(16) AdamWFactors {
  float step_size;  // lr / (1 - beta1^t)
  float gain;       // 1 / sqrt(1 - beta2^t)
  float keep;       // 1 - lr * weight_decay
  float step;       // t, the count after this step
};

// x^n
REFT_DEVICE double integer_power(double x, int64_t n) {
  double power = 1.0;
#pragma unroll 1
  for (; n > 0; n >>= 1, x *= x) {
    if (n & 1) power *= x;
  }
  return power;
}

struct StiefelAdamW {
  const StiefelAdamWTask& task;
  const StiefelAdamWEntry* const tensors;
  char* const shared;
  const int thread;
  float unscale = 1.0f;  // what gradients are multiplied by
  float clip = 1.0f;     // and then by
  bool goes = true;      // where it is false nothing changes
  int index = 0;         // of the tensor that an item is of
  MatrixLayout at;

  REFT_DEVICE StiefelAdamW(const StiefelAdamWTask& all, const StiefelAdamWEntry* table)
      : task(all), tensors(table), shared(dynamic_shared()), thread(static_cast<int>(threadIdx.x)) {
    if (task.grad_scale) unscale = static_cast<float>(1.0 / static_cast<double>(*task.grad_scale));
    if (task.found_inf) goes = *task.found_inf == 0.0f;
  }

  // --- items

  struct Range {
    int begin, end;
  };
  REFT_DEVICE Range share(int first, int count) const {
    return {first + static_cast<int>(int64_t{count} * blockIdx.x / gridDim.x),
            first + static_cast<int>(int64_t{count} * (blockIdx.x + 1) / gridDim.x)};
  }
  REFT_DEVICE Range constrained_items() const { return share(0, task.constrained_items); }
  REFT_DEVICE Range free_items() const {
    return share(task.constrained_items, task.items - task.constrained_items);
  }

  REFT_DEVICE const StiefelAdamWEntry& tensor() const { return tensors[index]; }
  REFT_DEVICE bool constrained() const { return index < task.constrained; }

  REFT_DEVICE void find_tensor(int item) {
    int low = 0, high = task.count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tensors[middle].item <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    index = low;
  }

  REFT_DEVICE void find_matrix(int item) {
    find_tensor(item);
    at = stiefel_layout(tensor().r, task.riemannian, task.shared_bytes);
  }

  // --- the workspace: the factors and the squares of the items, then each constrained tensor's part

  REFT_DEVICE AdamWFactors* factors() const { return reinterpret_cast<AdamWFactors*>(task.workspace); }
  REFT_DEVICE double* squares() const { return task.workspace + 2 * int64_t{task.items}; }
  REFT_DEVICE double* own_workspace() const { return task.workspace + int64_t{tensor().partial} * kTileSums; }
  REFT_DEVICE StiefelWorkspace workspace() const {
    return stiefel_workspace(tensor().d, tensor().r, task.riemannian);
  }
  REFT_DEVICE double* scratch() const { return reinterpret_cast<double*>(shared); }

  // Every block finds the factors of its own items.
  REFT_DEVICE void find_factors(Range items) {
#pragma unroll 1
    for (int item = items.begin + thread; item < items.end; item += kMatrixThreads) {
      find_tensor(item);
      double lr = task.lr;
      if (task.lr_tensor) {
        lr = task.lr_is_double ? *static_cast<const double*>(task.lr_tensor)
                               : static_cast<double>(*static_cast<const float*>(task.lr_tensor));
      }
      const float step = *tensor().step + 1.0f;
      const auto t = static_cast<int64_t>(step);
      factors()[item] = {static_cast<float>(lr / (1.0 - integer_power(task.beta1, t))),
                         static_cast<float>(1.0 / sqrt(1.0 - integer_power(task.beta2, t))),
                         static_cast<float>(1.0 - lr * static_cast<double>(tensor().weight_decay)), step};
    }
  }

  // --- an element

  REFT_DEVICE float descent(float gradient) const {
    const float g = unscale * gradient * clip;
    return task.maximize ? -g : g;
  }

  // Moves the moments, and returns what the parameter loses.
  REFT_DEVICE float adam(const AdamWFactors& f, float g, float& first, float& second) const {
    const auto beta2 = static_cast<float>(task.beta2), rest1 = static_cast<float>(1.0 - task.beta1);
    const auto rest2 = static_cast<float>(1.0 - task.beta2);
    // As torch.lerp has it, exact at both ends.
    first = rest1 < 0.5f ? first + rest1 * (g - first) : g - (g - first) * (1.0f - rest1);
    second = second * beta2 + rest2 * g * g;
    return f.step_size * (first / (sqrtf(second) * f.gain + task.eps));
  }

  // --- squares of gradients

  REFT_DEVICE double square_of(float gradient) const {
    const double g = static_cast<double>(unscale * gradient);
    return g * g;
  }

  REFT_DEVICE void store_square_sum(int item, double sum) const {
    sum = sum_over_block(sum, scratch());
    if (thread == 0) squares()[item] = sum;
  }

  // Decides whether the step is taken and by what gradients are multiplied, once all squares are there.
  REFT_DEVICE void clip_gradients() {
    double sum = 0.0;
#pragma unroll 1
    for (int item = thread; item < task.items; item += kMatrixThreads) {
      sum += load_from_other_block(squares() + item);
    }
    const double norm = sqrt(sum_over_block(sum, scratch()));
    if (blockIdx.x == 0 && thread == 0) *task.norm = norm;
    goes = goes && norm - norm == 0.0;
    clip = static_cast<float>(fmin(task.max_norm / (norm + 1e-6), 1.0));
  }

  // Whether the tensor of the item takes its step: all of its gradient is finite.
  REFT_DEVICE bool matrix_goes() const {
    double sum = 0.0;
    const int slabs = slabs_of(tensor().d, tensor().r);
#pragma unroll 1
    for (int slab = thread % 32; slab < slabs; slab += 32) {
      sum += load_from_other_block(squares() + tensor().item + slab);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return goes && sum - sum == 0.0;
  }

  // --- unconstrained tensors

  // Four elements of a piece, [the vector][element].
  static constexpr int kVectors = kFlatItem / kMatrixThreads / 4;

  REFT_DEVICE int64_t flat_begin(int item) const { return int64_t{item - tensor().item} * kFlatItem; }

  REFT_DEVICE bool flat_vectors() const {
    const StiefelAdamWEntry& t = tensor();
    return aligned_16(t.parameter) && aligned_16(t.gradient) && aligned_16(t.exp_avg) &&
           aligned_16(t.exp_avg_sq);
  }

  REFT_DEVICE static void load_some(const float* from, int64_t left, bool vectors, float (&value)[4]) {
    if (vectors && left >= 4) {
      load_floats(from, value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = i < left ? from[i] : 0.0f;
    }
  }

  REFT_DEVICE static void store_some(float* to, int64_t left, bool vectors, const float (&value)[4]) {
    if (vectors && left >= 4) {
      store_floats(to, value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < left) to[i] = value[i];
      }
    }
  }

  REFT_DEVICE void square_free_item(int item) {
    find_tensor(item);
    const bool vectors = flat_vectors();
    double sum = 0.0;
    const int64_t begin = flat_begin(item);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = begin + (v * kMatrixThreads + thread) * 4;
      float g[4];
      load_some(tensor().gradient + i, tensor().d - i, vectors, g);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += square_of(g[c]);
    }
    store_square_sum(item, sum);
  }

  REFT_DEVICE void step_free_item(int item) {
    find_tensor(item);
    const StiefelAdamWEntry& t = tensor();
    const bool vectors = flat_vectors();
    const AdamWFactors f = factors()[item];
    const int64_t begin = flat_begin(item);
    float g[kVectors][4], w[kVectors][4], first[kVectors][4], second[kVectors][4];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = begin + (v * kMatrixThreads + thread) * 4, left = t.d - i;
      load_some(t.gradient + i, left, vectors, g[v]);
      load_some(t.parameter + i, left, vectors, w[v]);
      load_some(t.exp_avg + i, left, vectors, first[v]);
      load_some(t.exp_avg_sq + i, left, vectors, second[v]);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = begin + (v * kMatrixThreads + thread) * 4, left = t.d - i;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float lost = adam(f, descent(g[v][c]), first[v][c], second[v][c]);
        w[v][c] = w[v][c] * f.keep - lost;
      }
      store_some(t.parameter + i, left, vectors, w[v]);
      store_some(t.exp_avg + i, left, vectors, first[v]);
      store_some(t.exp_avg_sq + i, left, vectors, second[v]);
    }
  }

  // --- constrained tensors: four rows and four columns to a thread

  REFT_DEVICE int quads() const { return quads_of(tensor().r); }
  REFT_DEVICE int width() const { return 4 * quads(); }
  REFT_DEVICE Stage stage() const {
    return {reinterpret_cast<float*>(shared + at.stage), stiefel_quads(tensor().r, task.riemannian)};
  }
  REFT_DEVICE int first_column(int item) const { return (item - tensor().item) * slab_of(tensor().r); }
  REFT_DEVICE int columns(int item) const {
    return static_cast<int>(min(int64_t{slab_of(tensor().r)}, tensor().d - first_column(item)));
  }

  REFT_DEVICE void load_rows(const float* from, int j, int quad, int count, float (&value)[4][4]) const {
    const int64_t d = tensor().d;
    load_square(from + 4 * quad * d + j, d, tensor().r - 4 * quad, count, d % 4 == 0 && aligned_16(from),
                value);
  }
  REFT_DEVICE void store_rows(float* to, int j, int quad, int count, const float (&value)[4][4]) const {
    const int64_t d = tensor().d;
    store_square(to + 4 * quad * d + j, d, tensor().r - 4 * quad, count, d % 4 == 0 && aligned_16(to), value);
  }

  // The gradient and the parameter of a chunk of columns, side by side.
  REFT_DEVICE void stage_for_tangent(int first, int count) const {
    const int q = quads(), fours = (count + 3) / 4;
    sync_block();
#pragma unroll 1
    for (int v = thread; v < fours * q; v += kMatrixThreads) {
      const int column = v % fours * 4, quad = v / fours;
      float g[4][4], w[4][4];
      load_rows(tensor().gradient, first + column, quad, count - column, g);
      load_rows(tensor().parameter, first + column, quad, count - column, w);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) g[k][c] *= unscale;
      }
      stage_square(stage(), column, quad, g);
      stage_square(stage(), column, q + quad, w);
    }
    sync_block();
  }

  REFT_DEVICE void square_matrix_item(int item) {
    find_matrix(item);
    const int q = quads(), first = first_column(item), count = columns(item), fours = (count + 3) / 4;
    double sum = 0.0;
#pragma unroll 1
    for (int v = thread; v < fours * q; v += kMatrixThreads) {
      float g[4][4];
      load_rows(tensor().gradient, first + v % fours * 4, v / fours, count - v % fours * 4, g);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum += square_of(g[k][c]);
      }
    }
    store_square_sum(item, sum);
  }

  REFT_DEVICE TileSums sums_of(int item, int tiles, double* partial) const {
    const int r = tensor().r, groups = groups_of(r, tiles);
    return {r, tiles, groups, at.chunk, partial + int64_t{item - tensor().item} * groups * tiles * kTileSums,
            0};
  }

  REFT_DEVICE void sum_tangent(int item) {
    find_matrix(item);
    const int first = first_column(item), q = quads();
    int staged = -1;
    sum_slab<double>(
        sums_of(item, tangent_tiles(tensor().r), own_workspace() + workspace().tangent), stage(),
        columns(item),
        [&](int from, int n) {
          if (from == staged) return;
          stage_for_tangent(first + from, n);
          staged = from;
        },
        [&](int tile, int* a, int* b) {
          *a = tile / q;
          *b = q + tile % q;
        });
  }

  // (A + A^T) / 2 for A = gradient parameter^T.
  REFT_DEVICE float* symmetric() const {
    return reinterpret_cast<float*>(shared + at.weights + width() * width() * 8);
  }

  // Of the slabs' sums; where ranks are filled up, zeros. `work` has r^2 elements.
  REFT_DEVICE void find_symmetric(double* work) const {
    const int r = tensor().r, q = quads(), n = width(), tiles = tangent_tiles(r);
    sync_block();
    total_of_slabs(own_workspace() + workspace().tangent, slabs_of(tensor().d, r) * groups_of(r, tiles),
                   tiles, [&](int tile, int element, double total) {
                     const int i = 4 * (tile / q) + element / 4, j = 4 * (tile % q) + element % 4;
                     if (i < r && j < r) work[i * r + j] = total;
                   });
    sync_block();
    const double factor = task.maximize ? -0.5 * clip : 0.5 * clip;
    for (int e = thread; e < n * n; e += kMatrixThreads) {
      const int i = e / n, j = e % n;
      symmetric()[e] =
          i < r && j < r ? static_cast<float>(factor * (work[i * r + j] + work[j * r + i])) : 0.0f;
    }
    sync_block();
  }

  // Stages P, the moved parameter, of a chunk of columns, and returns the squares of the gradient that the
  // thread has read. With kWrite the moments are written.
  template <bool kWrite>
  REFT_DEVICE double stage_moved(const AdamWFactors& f, int first, int count) const {
    double squares = 0.0;
    const int q = quads(), fours = (count + 3) / 4;
    sync_block();
    if (task.riemannian) {
#pragma unroll 1
      for (int v = thread; v < fours * q; v += kMatrixThreads) {
        const int column = v % fours * 4, quad = v / fours;
        float w[4][4];
        load_rows(tensor().parameter, first + column, quad, count - column, w);
        stage_square(stage(), column, q + quad, w);
      }
      sync_block();
    }
#pragma unroll 1
    for (int v = thread; v < fours * q; v += kMatrixThreads) {
      const int column = v % fours * 4, quad = v / fours, j = first + column, left = count - column;
      float g[4][4], w[4][4], one[4][4], two[4][4];
      load_rows(tensor().gradient, j, quad, left, g);
      load_rows(tensor().parameter, j, quad, left, w);
      load_rows(tensor().exp_avg, j, quad, left, one);
      load_rows(tensor().exp_avg_sq, j, quad, left, two);
      float normal[4][4] = {};  // what is not tangent
      if (task.riemannian) {
        const Stage parameter = {stage().place(0, q), stage().quads};
        add_weighted(parameter, column, symmetric(), width(), quad, q, normal);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          squares += square_of(g[k][c]);
          w[k][c] -= adam(f, descent(g[k][c]) - normal[k][c], one[k][c], two[k][c]);
          if (4 * quad + k >= tensor().r || c >= left) w[k][c] = 0.0f;
        }
      }
      stage_square(stage(), column, quad, w);
      if constexpr (kWrite) {
        store_rows(tensor().exp_avg, j, quad, left, one);
        store_rows(tensor().exp_avg_sq, j, quad, left, two);
      }
    }
    sync_block();
    return squares;
  }

  REFT_DEVICE void sum_moved(int item, bool squares_too) {
    find_matrix(item);
    if (!goes) return;
    if (task.riemannian) find_symmetric(reinterpret_cast<double*>(shared + at.solve));
    const AdamWFactors f = factors()[item];
    const int first = first_column(item);
    int staged = -1, squared = 0;
    double squares = 0.0;
    sum_slab<double>(
        sums_of(item, gram_tiles(tensor().r), own_workspace()), stage(), columns(item),
        [&](int from, int n) {
          if (from == staged) return;
          const double sum = stage_moved<false>(f, first + from, n);
          if (from == squared) {  // a slab may be staged again and again
            squares += sum;
            squared += n;
          }
          staged = from;
        },
        [](int tile, int* a, int* b) { quads_of_upper_tile(tile, a, b); });
    if (squares_too) store_square_sum(item, squares);
  }

  // (P P^T)^(-1/2) [r, r] in the second part of `work`, of inverse_root_elements.
  REFT_DEVICE void find_root(double* work) const {
    const int r = tensor().r, tiles = gram_tiles(r);
    sync_block();
    total_of_slabs(own_workspace(), slabs_of(tensor().d, r) * groups_of(r, tiles), tiles,
                   [&](int tile, int element, double total) {
                     int a, b;
                     quads_of_upper_tile(tile, &a, &b);
                     const int i = 4 * a + element / 4, j = 4 * b + element % 4;
                     if (i > j || j >= r) return;
                     work[i * r + j] = total;
                     work[j * r + i] = total;
                   });
    sync_block();
    inverse_root(BlockTeam(), r, work, work + r * r, work + 2 * r * r, SquareRoot());
  }

  REFT_DEVICE bool leads() const { return tensor().r > kMaxSharedSolveRank; }

  REFT_DEVICE void lead(Range items) {
    for (int item = items.begin; item < items.end; ++item) {
      find_matrix(item);
      if (leads() && item == tensor().item && matrix_goes()) find_root(own_workspace() + workspace().root);
    }
  }

  // The inverse root where the columns' products want it, and the symmetric matrix again, which it may lie
  // over.
  REFT_DEVICE void find_weights() const {
    const int r = tensor().r, n = width();
    auto* solve = reinterpret_cast<double*>(shared + at.solve);
    auto* to = reinterpret_cast<double*>(shared + at.weights);
    if (!leads()) find_root(solve);
    const double* root = (leads() ? own_workspace() + workspace().root : solve) + r * r;
    sync_block();
    for (int e = thread; e < n * n; e += kMatrixThreads) {
      const int i = e / n, j = e % n;
      to[e] = i >= r || j >= r ? 0.0 : leads() ? load_from_other_block(root + i * r + j) : root[i * r + j];
    }
    if (task.riemannian) find_symmetric(solve);
    sync_block();
  }

  REFT_DEVICE void retract_item(int item, int* solved) {
    find_matrix(item);
    if (!matrix_goes()) return;
    if (index != *solved) find_weights();
    *solved = index;
    const AdamWFactors f = factors()[item];
    const int first = first_column(item), count = columns(item), q = quads();
#pragma unroll 1
    for (int from = 0; from < count; from += at.chunk) {
      const int n = min(at.chunk, count - from), fours = (n + 3) / 4;
      stage_moved<true>(f, first + from, n);
#pragma unroll 1
      for (int v = thread; v < fours * q; v += kMatrixThreads) {
        const int column = v % fours * 4, quad = v / fours;
        double sum[4][4] = {};
        add_weighted(stage(), column, reinterpret_cast<const double*>(shared + at.weights), width(), quad, q,
                     sum);
        float rounded[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int c = 0; c < 4; ++c) rounded[k][c] = static_cast<float>(sum[k][c]);
        }
        store_rows(tensor().parameter, first + from + column, quad, n - column, rounded);
      }
    }
    if (item == tensor().item && thread == 0) *tensor().step = f.step;
  }

  REFT_DEVICE void count_free_items(Range items) {
#pragma unroll 1
    for (int item = items.begin + thread; item < items.end; item += kMatrixThreads) {
      find_tensor(item);
      if (item == tensor().item) *tensor().step = factors()[item].step;
    }
  }
};

template <typename Table>
REFT_KERNEL(kMatrixThreads, 1)
stiefel_adamw_step_kernel(REFT_GRID_CONSTANT Table table) {
  const StiefelAdamWTask& task = table.task;
  StiefelAdamW work(task, table.tensor);
  const StiefelAdamW::Range matrices = work.constrained_items(), rest = work.free_items();
  const bool clips = task.norm != nullptr, projects = task.riemannian && task.constrained > 0;
  work.find_factors(matrices);
  work.find_factors(rest);
  sync_block();
  if (clips) {
#pragma unroll 1
    for (int item = matrices.begin; item < matrices.end; ++item) work.square_matrix_item(item);
#pragma unroll 1
    for (int item = rest.begin; item < rest.end; ++item) work.square_free_item(item);
  }
  if (projects) {
#pragma unroll 1
    for (int item = matrices.begin; item < matrices.end; ++item) work.sum_tangent(item);
  }
  if (clips || projects) grid_wait(task.barrier, grid_arrive(task.barrier));
  if (clips) work.clip_gradients();
#pragma unroll 1
  for (int item = matrices.begin; item < matrices.end; ++item) work.sum_moved(item, !clips);
  // Every block has read the counts before any is written.
  const unsigned ticket = grid_arrive(task.barrier);
  if (work.goes) {
#pragma unroll 1
    for (int item = rest.begin; item < rest.end; ++item) work.step_free_item(item);
  }
  grid_wait(task.barrier, ticket);
  if (work.goes) work.count_free_items(rest);
  if (task.leads) {
    work.lead(matrices);
    grid_wait(task.barrier, grid_arrive(task.barrier));
  }
  int solved = -1;
#pragma unroll 1
  for (int item = matrices.begin; item < matrices.end; ++item) work.retract_item(item, &solved);
}

}  // namespace reft_kernels
