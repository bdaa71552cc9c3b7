// What the forward's kernels share: a tile of slots, and the way from the warps' products to delta, s and u.
#pragma once

#include "reft_kernels/activation.h"
#include "reft_kernels/edit_forward_tile.h"
#include "reft_kernels/tiles.cuh"

namespace reft_kernels {

struct DeltaTerms {
  float delta, s;
};

// `product`: A h (f linear, A = W - gamma R), or W h and R h; for one rank.
template <bool kLinear>
REFT_DEVICE DeltaTerms delta_of(const Edit& e, float b, float c,
                                const float (&product)[products_of(kLinear)]) {
  if constexpr (kLinear) {
    return {product[0] + (b - c), 0.0f};
  } else {
    const float s = product[0] + b;
    const float f = activate(s, e.activation);
    return {e.subtract ? f - (product[1] + c) : f, s};
  }
}

// A block's part of a tile of up to kRows slots. Its members are for all threads of the block together.
template <bool kLinear, int kRows>
struct ForwardBlock {
  static constexpr int kProducts = products_of(kLinear);
  static_assert(sizeof(Slot) <= kSlotBytes);

  const EditForwardParams& p;
  const Edit& e;
  const ForwardTile& tile;
  const int thread, threads, warps;
  const int ranks;  // r with its padding
  const ForwardShared at;
  Slot* const slots;
  float *const partial, *const exchange, *const u;
  int64_t first;   // slot of the tile
  int rows;        // slots of the tile
  int begin, end;  // columns of the block

  REFT_DEVICE ForwardBlock(const EditForwardParams& params, const ForwardTile& forward_tile, char* shared,
                           int padded_ranks, bool clusters)
      : p(params),
        e(params.edit),
        tile(forward_tile),
        thread(static_cast<int>(threadIdx.x)),
        threads(static_cast<int>(blockDim.x)),
        warps(threads / 32),
        ranks(padded_ranks),
        at(forward_shared(tile.rows, kProducts, ranks, warps, clusters ? tile.cluster : 1, 0)),
        slots(reinterpret_cast<Slot*>(shared + at.slots)),
        partial(reinterpret_cast<float*>(shared + at.partial)),
        exchange(reinterpret_cast<float*>(shared + at.exchange)),
        u(reinterpret_cast<float*>(shared + at.u)) {
    const unsigned cluster = clusters ? static_cast<unsigned>(tile.cluster) : 1u;
    first = static_cast<int64_t>(blockIdx.x / cluster) * tile.rows;
    const int64_t left = e.rows() - first;
    rows = left < tile.rows ? static_cast<int>(left) : tile.rows;
    begin = 0;
    end = static_cast<int>(e.d);
    if (clusters) {
      begin = static_cast<int>(blockIdx.x % cluster) * tile.slice;
      if (begin > end) begin = end;
      if (end - begin > tile.slice) end = begin + tile.slice;
    }
  }

  // Where not, delta is a bias alone.
  REFT_DEVICE bool multiplies() const { return e.W.data || e.subtract; }

  REFT_DEVICE void find_slots() const {
    if (thread < rows) slots[thread] = find_slot(e, first + thread);
  }

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
    group = 0;
    if (!e.group.data) return left;
    unsigned mine = 0;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (!(left >> m & 1)) continue;
      if (!mine) group = slots[m].group;
      if (slots[m].group == group) mine |= 1u << m;
    }
    return mine;
  }

  // Where a product stands in `partial`, counted in warps, or in `exchange`, counted in blocks.
  REFT_DEVICE int place_of(int contributor, int m, int product, int k) const {
    return ((contributor * tile.rows + m) * kProducts + product) * ranks + k;
  }

  // The sum over warps, in their order.
  REFT_DEVICE float block_sum(int m, int product, int k) const {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += partial[place_of(w, m, product, k)];
    return total;
  }

  // Gives every block of the cluster this one's sums. Follows a cluster_arrive of every thread.
  REFT_DEVICE void exchange_sums(unsigned live, unsigned rank) const {
    cluster_wait();  // the others have begun: their shared memory is there
    for (int i = thread; i < rows * kProducts * e.r; i += threads) {
      const int k = i % e.r, product = i / e.r % kProducts, m = i / e.r / kProducts;
      if (!(live >> m & 1)) continue;
      const float total = block_sum(m, product, k);
      float* place = exchange + place_of(static_cast<int>(rank), m, product, k);
      for (int other = 0; other < tile.cluster; ++other)
        cluster_store(place, static_cast<unsigned>(other), total);
    }
    sync_warp();
    cluster_arrive();
    cluster_wait();
  }

  // The sum over the cluster's blocks, in their order.
  REFT_DEVICE float cluster_sum(int m, int product, int k) const {
    float total = 0.0f;
    for (int other = 0; other < tile.cluster; ++other) total += exchange[place_of(other, m, product, k)];
    return total;
  }

  // b of slot `i / count` and rank `i % count`; zero where there is none.
  REFT_DEVICE float bias_of(unsigned live, int count, int i) const {
    const int k = i % count, m = i / count;
    if (m >= rows || k >= e.r || !(live >> m & 1) || !e.b.data) return 0.0f;
    return float_at(e.b.data, e.b.type, slots[m].group * e.r + k);
  }

  // u of `count` ranks, at least r, for the block; delta and s to memory if the block `stores` them. `bias`
  // is the thread's own, number `thread`, which it asked for before there were sums to wait for.
  REFT_DEVICE void find_delta(unsigned live, int count, float bias, bool clusters, bool stores) const {
    for (int i = thread; i < rows * count; i += threads) {
      const int k = i % count, m = i / count;
      const float b = i == thread ? bias : bias_of(live, count, i);
      DeltaTerms terms{0.0f, 0.0f};
      float scaled = 0.0f;
      if (k < e.r && (live >> m & 1)) {
        float product[kProducts] = {};
        if (multiplies()) {
#pragma unroll
          for (int j = 0; j < kProducts; ++j)
            product[j] = clusters ? cluster_sum(m, j, k) : block_sum(m, j, k);
        }
        const bool has_c = e.c.data && e.subtract;
        const float c = has_c ? float_at(e.c.data, e.c.type, slots[m].group * e.r + k) : 0.0f;
        terms = delta_of<kLinear>(e, b, c, product);
        scaled = slots[m].scale * terms.delta;
      }
      u[m * ranks + k] = scaled;
      if (k < e.r && stores) {
        static_cast<float*>(p.delta)[(first + m) * e.r + k] = terms.delta;
        if constexpr (!kLinear) static_cast<float*>(p.s)[(first + m) * e.r + k] = terms.s;
      }
    }
  }

  // Idle rows of y as they are in h, by kColumns at once.
  template <int kColumns, typename H>
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
};

}  // namespace reft_kernels
