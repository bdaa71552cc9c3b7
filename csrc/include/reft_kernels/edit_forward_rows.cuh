// The forward of the edit on CUDA cores: any type, any r up to 64, any d.
//
// A block, or a cluster of blocks that share the columns, takes up to eight slots:
//   stage   the rows of h come to shared memory, all of them under way at once, each thread's own columns
//   sums    A h (f linear, A = W - gamma R) or W h and R h: a thread's columns in registers, then lanes,
//   warps, blocks delta   and s, stored; u = scale * delta for the block apply   y = D_p(h + R^T u)
// Weights are read once in `sums` and once in `apply` for all slots of the tile that share a group.
#pragma once

#include "reft_kernels/edit_forward_block.cuh"

namespace reft_kernels {

template <typename H, typename TR, typename TW, bool kLinear, int kRankTile, bool kCluster>
struct ForwardRows : ForwardBlock<kLinear, max_tile_rows(kLinear, kRankTile)> {
  static constexpr int kRows = max_tile_rows(kLinear, kRankTile);
  static constexpr int kProducts = products_of(kLinear);
  static constexpr int kSums = kRows * kRankTile;  // of one product
  static constexpr int kVector = kElementsIn16Bytes<H>;
  static_assert(kSums <= 32);

  using Block = ForwardBlock<kLinear, kRows>;
  using Block::begin;
  using Block::e;
  using Block::end;
  using Block::first;
  using Block::p;
  using Block::partial;
  using Block::ranks;
  using Block::slots;
  using Block::thread;
  using Block::threads;
  using Block::tile;
  using Block::u;

  uint64_t* const barrier;
  H* const stash;  // [rows, slice]

  REFT_DEVICE ForwardRows(const EditForwardParams& params, const ForwardTile& forward_tile, char* shared)
      : Block(params, forward_tile, shared, padded_ranks(params.edit.r), kCluster),
        barrier(reinterpret_cast<uint64_t*>(shared + Block::at.barrier)),
        stash(reinterpret_cast<H*>(shared + Block::at.stash)) {}

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
      partial[Block::place_of(thread / 32, m, product, k)] = sum[0];
    }
  }

  template <int kColumns>
  REFT_DEVICE void sum_groups(unsigned live) const {
    bool waited = false;
    int64_t group = 0;
    for (unsigned left = live, mine; left; left &= ~mine) {
      mine = Block::next_group(left, group);
      const int64_t offset = group * e.r * e.d;
      const TR* R = static_cast<const TR*>(e.R.data) + offset;
      const TW* W = e.W.data ? static_cast<const TW*>(e.W.data) + offset : nullptr;
      for (int k0 = 0; k0 < e.r; k0 += kRankTile) sum_ranks<kColumns>(R, W, k0, mine, waited);
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
      mine = Block::next_group(left, group);
      apply_group<kColumns>(static_cast<const TR*>(e.R.data) + group * e.r * e.d, mine);
    }
  }

  template <int kColumns>
  REFT_DEVICE void run(unsigned live, unsigned rank) const {
    const bool multiplies = Block::multiplies();
    const float bias = Block::bias_of(live, ranks, thread);
    if (multiplies) sum_groups<kColumns>(live);
    sync_block();
    if constexpr (kCluster) Block::exchange_sums(multiplies ? live : 0, rank);
    Block::find_delta(live, ranks, bias, kCluster, rank == 0);
    sync_block();
    apply_groups<kColumns>(live);
    if (p.copy_idle) Block::template copy_idle_rows<kColumns, H>(live);
  }
};

// Blocks of a multiprocessor: two where the registers suffice, so that one waits for its rows while the other
// computes.
constexpr int forward_rows_blocks(bool linear, int rank_tile) {
  return linear && rank_tile == 1 ? 2 : 1;
}

template <typename H, typename TR, typename TW, bool kLinear, int kRankTile, bool kCluster>
REFT_KERNEL(256, forward_rows_blocks(kLinear, kRankTile))
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
  task.find_slots();
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
