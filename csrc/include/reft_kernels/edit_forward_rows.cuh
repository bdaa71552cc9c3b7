// The forward of the edit on CUDA cores: any type, any r up to 64, any d.
//
// A block, or a cluster of blocks that share the columns, takes up to eight slots:
//   stage   the rows of h come to shared memory, all of them under way at once, each thread's own columns
//   sums    A h (f linear, A = W - gamma R) or W h and R h: a thread's columns in registers, then lanes,
//   warps, blocks delta   and s, stored; u = scale * delta for the block apply   y = D_p(h + R^T u)
// Weights are read once in `sums` and once in `apply` for all slots of the tile that share a group.
#pragma once

#include "reft_kernels/activation.h"
#include "reft_kernels/edit_forward_tile.h"
#include "reft_kernels/tiles.cuh"

namespace reft_kernels {

// What delta and s are made of: the products of a row with the weights, for one rank.
struct DeltaTerms {
  float delta, s;
};

// `product`: A h, or W h and R h.
template <bool kLinear>
REFT_DEVICE DeltaTerms delta_of(const Edit& e, int64_t group, int k,
                                const float (&product)[kLinear ? 1 : 2]) {
  const int64_t i = group * e.r + k;
  const float b = e.b.data ? float_at(e.b.data, e.b.type, i) : 0.0f;
  const float c = e.subtract && e.c.data ? float_at(e.c.data, e.c.type, i) : 0.0f;
  if constexpr (kLinear) {
    return {product[0] + (b - c), 0.0f};
  } else {
    const float s = product[0] + b;
    const float f = activate(s, e.activation);
    return {e.subtract ? f - (product[1] + c) : f, s};
  }
}

template <typename H, typename TR, typename TW, bool kLinear, int kRankTile, bool kCluster>
struct ForwardRows {
  static constexpr int kProducts = kLinear ? 1 : 2;
  static constexpr int kRows = max_tile_rows(kLinear, kRankTile);
  static constexpr int kSums = kRows * kRankTile;  // of one product
  static constexpr int kVector = kElementsIn16Bytes<H>;
  static_assert(kSums <= 32 && sizeof(Slot) <= kSlotBytes);

  const EditForwardParams& p;
  const Edit& e;
  const ForwardTile& tile;
  const int thread, threads, warps;
  const ForwardShared at;
  Slot* const slots;
  uint64_t* const barrier;
  float *const partial, *const exchange, *const u;
  H* const stash;   // [rows, slice]
  const int ranks;  // r, padded
  int64_t first;    // slot of the tile
  int rows;         // slots of the tile
  int begin, end;   // columns of the block

  REFT_DEVICE ForwardRows(const EditForwardParams& params, const ForwardTile& forward_tile, char* shared)
      : p(params),
        e(params.edit),
        tile(forward_tile),
        thread(static_cast<int>(threadIdx.x)),
        threads(static_cast<int>(blockDim.x)),
        warps(threads / 32),
        at(forward_shared(tile.rows, kProducts, padded_ranks(e.r), warps, tile.cluster, 0)),
        slots(reinterpret_cast<Slot*>(shared + at.slots)),
        barrier(reinterpret_cast<uint64_t*>(shared + at.barrier)),
        partial(reinterpret_cast<float*>(shared + at.partial)),
        exchange(reinterpret_cast<float*>(shared + at.exchange)),
        u(reinterpret_cast<float*>(shared + at.u)),
        stash(reinterpret_cast<H*>(shared + at.stash)),
        ranks(padded_ranks(e.r)) {
    const unsigned cluster = kCluster ? tile.cluster : 1;
    first = static_cast<int64_t>(blockIdx.x / cluster) * tile.rows;
    const int64_t left = e.rows() - first;
    rows = left < tile.rows ? static_cast<int>(left) : tile.rows;
    begin = 0;
    end = static_cast<int>(e.d);
    if constexpr (kCluster) {
      begin = static_cast<int>(blockIdx.x % cluster) * tile.slice;
      if (begin > end) begin = end;
      if (end - begin > tile.slice) end = begin + tile.slice;
    }
  }

  // Where not, delta is a bias alone.
  REFT_DEVICE bool multiplies() const { return e.W.data || e.subtract; }

  REFT_DEVICE unsigned live_slots() const {
    unsigned live = 0;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows && slots[m].live) live |= 1u << m;
    }
    return live;
  }

  // Of the slots in `left` those of the first one's group, which is returned in `group`.
  REFT_DEVICE unsigned next_group(unsigned left, int64_t& group) const {
    unsigned mine = 0;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (!(left >> m & 1)) continue;
      if (!mine) group = slots[m].group;
      if (slots[m].group == group) mine |= 1u << m;
    }
    return mine;
  }

  // --- stage

  REFT_DEVICE void stage(unsigned live) const {
    if constexpr (kCluster) {
      if (thread != 0) return;
      const unsigned bytes = static_cast<unsigned>(end - begin) * sizeof(H);
      unsigned count = 0;
      for (unsigned left = live; left; left &= left - 1) ++count;
      bulk_expect(barrier, count * bytes);
      if (bytes == 0) return;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (live >> m & 1)
          bulk_copy(stash + m * tile.slice, row_of<H>(p.h, slots[m]) + begin, bytes, barrier);
      }
    } else {
      if (!tile.staged) return;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (!(live >> m & 1)) continue;
        const H* row = row_of<H>(p.h, slots[m]);
        for (int j = thread * kVector; j < end; j += threads * kVector) {
          copy_async_16(stash + m * tile.slice + j, row + j);
        }
      }
      commit_async();
    }
  }

  // Before the first use of what `stage` brings. A thread reads what it staged itself, or what the barrier
  // tells of.
  REFT_DEVICE void wait_for_rows() const {
    if constexpr (kCluster) {
      bulk_wait(barrier, 0);
    } else {
      wait_async<0>();
    }
  }

  template <int kColumns>
  REFT_DEVICE const H* columns(int m, int j) const {
    if constexpr (kColumns > 1) {
      return stash + m * tile.slice + (j - begin);
    } else {
      return row_of<H>(p.h, slots[m]) + j;
    }
  }

  // --- sums

  // One group's slots: their products with ranks k0 .. k0 + kRankTile, into `partial`.
  template <int kColumns>
  REFT_DEVICE void sum_ranks(const TR* R, const TW* W, int k0, unsigned mine, bool& waited) const {
    const int some = e.r - k0;
    float sum[kProducts][kSums];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum[i][j] = 0.0f;
    }
    for (int j = begin + thread * kColumns; j < end; j += threads * kColumns) {
      float weight[kProducts][kRankTile][kColumns];
#pragma unroll
      for (int k = 0; k < kRankTile; ++k) {
        const int64_t row = static_cast<int64_t>(k0 + k) * e.d + j;
        float a[kColumns] = {}, b[kColumns] = {};
        if (W && k < some) load_floats(W + row, a);
        if (e.subtract && k < some) load_floats(R + row, b);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if constexpr (kLinear) {
            weight[0][k][i] = a[i] - b[i];
          } else {
            weight[0][k][i] = a[i];
            weight[1][k][i] = b[i];
          }
        }
      }
      if (!waited) wait_for_rows();
      waited = true;
      Fetched<kColumns, H> fetched[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (mine >> m & 1) fetched[m] = fetch<kColumns>(columns<kColumns>(m, j));
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (!(mine >> m & 1)) continue;
        float h[kColumns];
        floats_of<kColumns, H>(fetched[m], h);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
#pragma unroll
          for (int k = 0; k < kRankTile; ++k) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[i][m * kRankTile + k] += weight[i][k][c] * h[c];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      if (tile.rows == 1) {
        sum_lanes<kRankTile>(sum[i], i, k0, mine);
      } else {
        sum_lanes<kSums>(sum[i], i, k0, mine);
      }
    }
  }

  template <int kCount>
  REFT_DEVICE void sum_lanes(float (&sum)[kSums], int product, int k0, unsigned mine) const {
    const int lane = thread % 32;
    sum_over_lanes<kCount>(sum, lane);
    const int value = lane * kCount / 32, m = value / kRankTile, k = k0 + value % kRankTile;
    if (lane % (32 / kCount) == 0 && k < e.r && (mine >> m & 1)) {
      partial[((thread / 32 * tile.rows + m) * kProducts + product) * ranks + k] = sum[0];
    }
  }

  template <int kColumns>
  REFT_DEVICE void sum_groups(unsigned live) const {
    bool waited = false;
    int64_t group = 0;
    for (unsigned left = live, mine; left; left &= ~mine) {
      mine = next_group(left, group);
      const int64_t offset = group * e.r * e.d;
      const TR* R = static_cast<const TR*>(e.R.data) + offset;
      const TW* W = e.W.data ? static_cast<const TW*>(e.W.data) + offset : nullptr;
      for (int k0 = 0; k0 < e.r; k0 += kRankTile) sum_ranks<kColumns>(R, W, k0, mine, waited);
    }
  }

  // --- delta

  // The sum over warps, in their order.
  REFT_DEVICE float block_sum(int m, int product, int k) const {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += partial[((w * tile.rows + m) * kProducts + product) * ranks + k];
    return total;
  }

  // Gives every block of the cluster this one's sums.
  REFT_DEVICE void exchange_sums(unsigned live, unsigned rank) const {
    cluster_wait();  // the others have begun: their shared memory is there
    for (int i = thread; i < rows * kProducts * e.r; i += threads) {
      const int k = i % e.r, product = i / e.r % kProducts, m = i / e.r / kProducts;
      if (!(live >> m & 1)) continue;
      const float total = block_sum(m, product, k);
      float* place = exchange + ((static_cast<int>(rank) * tile.rows + m) * kProducts + product) * ranks + k;
      for (int other = 0; other < tile.cluster; ++other)
        cluster_store(place, static_cast<unsigned>(other), total);
    }
    sync_warp();
    cluster_arrive();
    cluster_wait();
  }

  REFT_DEVICE float whole_sum(int m, int product, int k) const {
    if constexpr (kCluster) {
      float total = 0.0f;
      for (int other = 0; other < tile.cluster; ++other) {
        total += exchange[((other * tile.rows + m) * kProducts + product) * ranks + k];
      }
      return total;
    } else {
      return block_sum(m, product, k);
    }
  }

  REFT_DEVICE void store_delta(unsigned live, bool stores) const {
    for (int i = thread; i < rows * ranks; i += threads) {
      const int k = i % ranks, m = i / ranks;
      DeltaTerms terms{0.0f, 0.0f};
      float scaled = 0.0f;
      if (k < e.r && (live >> m & 1)) {
        float product[kProducts] = {};
        if (multiplies()) {
#pragma unroll
          for (int j = 0; j < kProducts; ++j) product[j] = whole_sum(m, j, k);
        }
        terms = delta_of<kLinear>(e, slots[m].group, k, product);
        scaled = slots[m].scale * terms.delta;
      }
      u[m * ranks + k] = scaled;
      if (k < e.r && stores) {
        static_cast<float*>(p.delta)[(first + m) * e.r + k] = terms.delta;
        if constexpr (!kLinear) static_cast<float*>(p.s)[(first + m) * e.r + k] = terms.s;
      }
    }
  }

  // --- apply

  template <int kColumns>
  REFT_DEVICE void apply_group(const TR* R, unsigned mine) const {
    constexpr int kRanks = kRankTile < 4 ? kRankTile : 4;
    for (int j = begin + thread * kColumns; j < end; j += threads * kColumns) {
      float sum[kRows][kColumns] = {};
      for (int k0 = 0; k0 < e.r; k0 += kRanks) {
        float weight[kRanks][kColumns] = {};
#pragma unroll
        for (int k = 0; k < kRanks; ++k) {
          if (k0 + k < e.r) load_floats(R + static_cast<int64_t>(k0 + k) * e.d + j, weight[k]);
        }
        float factor[kRows][kRanks];
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          if (mine >> m & 1) load_floats(u + m * ranks + k0, factor[m]);
        }
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          if (!(mine >> m & 1)) continue;
#pragma unroll
          for (int k = 0; k < kRanks; ++k) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[m][c] += factor[m][k] * weight[k][c];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (mine >> m & 1) store_row(slots[m], m, j, sum[m]);
      }
    }
  }

  template <int kColumns>
  REFT_DEVICE void store_row(const Slot& slot, int m, int j, float (&y)[kColumns]) const {
    const Fetched<kColumns, H> fetched = fetch<kColumns>(columns<kColumns>(m, j));
    float h[kColumns];
    floats_of<kColumns, H>(fetched, h);
    if (p.rows) store_fetched<kColumns>(static_cast<H*>(p.rows) + (first + m) * e.d + j, fetched);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) y[c] += h[c];
    if (e.seed) drop_elements(e, slot.batch * e.length + slot.position, j, y);
    store_floats(row_of<H>(p.y, slot) + j, y);
  }

  template <int kColumns>
  REFT_DEVICE void apply_groups(unsigned live) const {
    wait_for_rows();
    int64_t group = 0;
    for (unsigned left = live, mine; left; left &= ~mine) {
      mine = next_group(left, group);
      apply_group<kColumns>(static_cast<const TR*>(e.R.data) + group * e.r * e.d, mine);
    }
  }

  template <int kColumns>
  REFT_DEVICE void copy_idle_rows(unsigned live) const {
    for (int m = 0; m < rows; ++m) {
      if (live >> m & 1) continue;
      const H* from = row_of<H>(p.h, slots[m]);
      H* to = row_of<H>(p.y, slots[m]);
      for (int j = begin + thread * kColumns; j < end; j += threads * kColumns) {
        store_fetched<kColumns>(to + j, fetch<kColumns>(from + j));
      }
    }
  }

  template <int kColumns>
  REFT_DEVICE void run(unsigned live, unsigned rank) const {
    if (multiplies()) sum_groups<kColumns>(live);
    sync_block();
    if constexpr (kCluster) exchange_sums(multiplies() ? live : 0, rank);
    store_delta(live, rank == 0);
    sync_block();
    apply_groups<kColumns>(live);
    if (p.copy_idle) copy_idle_rows<kColumns>(live);
  }
};

template <typename H, typename TR, typename TW, bool kLinear, int kRankTile, bool kCluster>
REFT_KERNEL(256, 1)
edit_forward_rows(REFT_GRID_CONSTANT EditForwardParams params, REFT_GRID_CONSTANT ForwardTile tile) {
  using Rows = ForwardRows<H, TR, TW, kLinear, kRankTile, kCluster>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kCluster) return;  // no clusters there: never launched
#endif
  const Rows task(params, tile, dynamic_shared());
  unsigned rank = 0;
  if constexpr (kCluster) {
    rank = cluster_rank();
    if (task.thread == 0) bulk_barrier_init(task.barrier);
    sync_warp();
    cluster_arrive();
  }
  if (task.thread < task.rows) task.slots[task.thread] = find_slot(task.e, task.first + task.thread);
  sync_block();
  const unsigned live = task.live_slots();
  task.stage(live);
  if (kCluster || tile.staged) {
    task.template run<Rows::kVector>(live, rank);
  } else {
    task.template run<1>(live, rank);
  }
}

}  // namespace reft_kernels
