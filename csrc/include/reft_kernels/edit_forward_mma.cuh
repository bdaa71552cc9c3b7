// The forward of the edit on tensor cores: h in 16 bits, d a multiple of 32, every row at a multiple of 16
// bytes.
//
// A block, or a cluster of blocks that share the columns, takes 16 slots. Its warps go through the columns 32
// at a time:
//   stage   a lane's 16 bytes of row g and of row g + 8 come to its own place in shared memory (g = lane / 4)
//   sums    A h or W h and R h, [16, 8] for every 8 ranks
//   delta   and s, stored; u = scale * delta for the block
//   apply   y = D_p(h + R^T u)
// A sum over columns may take them in any order, and the products of different columns are independent. So
// columns are dealt out as they lie in memory: lane (g, q) has columns 8q .. 8q + 7 of rows g and g + 8,
// which are its words of two mma operands in `sums`, and the accumulators of four in `apply`. Nothing is
// moved between lanes.
//
// Weights in float32 keep their precision. In `sums` they are taken apart into three bfloat16, which is
// exact; h in float16 then is two bfloat16, exact too. In `apply` the float32 u and R are two bfloat16 each,
// which leaves relative errors of 2^-16, far below the rounding of y. Weights in h's own type go into `sums`
// as they are, W and R apart: their products are exact. What is not finite may turn from an infinity into a
// NaN; it stays in its row and group.
#pragma once

#include "reft_kernels/edit_forward_block.cuh"

namespace reft_kernels {

// Eight consecutive elements.
template <typename T>
struct EightElements {
  static constexpr int kFetches = 8 / kElementsIn16Bytes<T>;
  Vector16 part[kFetches];

  REFT_DEVICE void fetch_from(const T* from) {
#pragma unroll
    for (int i = 0; i < kFetches; ++i) part[i] = load_16(from + i * kElementsIn16Bytes<T>);
  }

  REFT_DEVICE void to_floats(float (&to)[8]) const {
#pragma unroll
    for (int i = 0; i < kFetches; ++i) unpack_words<T>(part[i].word, to, i * kElementsIn16Bytes<T>);
  }
};

// Four consecutive elements.
template <typename T>
struct FourElements {
  std::conditional_t<sizeof(T) == 4, Vector16, Vector8> part;

  REFT_DEVICE void fetch_from(const T* from) {
    if constexpr (sizeof(T) == 4) {
      part = load_16(from);
    } else {
      part = load_8(from);
    }
  }

  REFT_DEVICE void to_floats(float (&to)[4]) const { unpack_words<T>(part.word, to, 0); }
};

template <typename H, typename TR, typename TW, bool kLinear, int kRankTile>
struct ForwardMma : ForwardBlock<kLinear, kMmaRows> {
  static constexpr int kProducts = products_of(kLinear);
  static constexpr int kEights = kRankTile / 8;  // mma tiles of ranks in `sums`
  // Of which so many are fetched at once: as many as registers are left for.
  static constexpr int kTogether = kRankTile == 8 || (!kLinear && kRankTile != 32) ? 1 : 2;
  static constexpr int kSteps = kRankTile < 16 ? 1 : kRankTile / 16;  // over ranks in `apply`
  static constexpr int kStepRanks = kRankTile < 16 ? 2 : 4;           // of a lane in a step
  static constexpr bool kHalfR = sizeof(TR) == 2;
  static constexpr bool kHalfW = sizeof(TW) == 2;
  // Whether h is needed in bfloat16 parts: float16 beside weights in float32.
  static constexpr bool kPartsOfH = std::is_same_v<H, Float16> && !kHalfR;
  static_assert(sizeof(H) == 2 && (kHalfW || !kHalfR));

  using Block = ForwardBlock<kLinear, kMmaRows>;
  using Block::begin;
  using Block::e;
  using Block::end;
  using Block::first;
  using Block::p;
  using Block::partial;
  using Block::ranks;
  using Block::slots;
  using Block::thread;
  using Block::tile;
  using Block::u;
  using Block::warps;

  Vector16* const stash;  // [column blocks, 2, lanes]
  const int warp, lane, g, q;

  REFT_DEVICE ForwardMma(const EditForwardParams& params, const ForwardTile& forward_tile, char* shared)
      : Block(params, forward_tile, shared, padded_mma_ranks(kRankTile), forward_tile.cluster > 1),
        stash(reinterpret_cast<Vector16*>(shared + Block::at.stash)),
        warp(thread / 32),
        lane(thread % 32),
        g(lane / 4),
        q(lane % 4) {}

  REFT_DEVICE int column_blocks() const { return (end - begin) / kMmaColumns; }

  // The lane's columns of its row g (half 0) or g + 8 (half 1) in a column block; null where the slot is
  // idle.
  REFT_DEVICE const H* lane_row(unsigned live, int half) const {
    const int m = g + 8 * half;
    return live >> m & 1 ? row_of<H>(p.h, slots[m]) + (begin + 8 * q) : nullptr;
  }

  REFT_DEVICE Vector16* stash_of(int block, int half) const { return stash + (block * 2 + half) * 32 + lane; }

  // --- stage

  REFT_DEVICE void stage(unsigned live) const {
    if (!tile.staged) return;
    const H* const row[2] = {lane_row(live, 0), lane_row(live, 1)};
    for (int i = warp; i < column_blocks(); i += warps) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row[half]) copy_async_16(stash_of(i, half), row[half] + i * kMmaColumns);
      }
    }
    commit_async();
  }

  // A lane reads only what it staged itself.
  REFT_DEVICE Vector16 columns(const H* row, int block, int half) const {
    if (!row) return {};
    if (tile.staged) return load_16(stash_of(block, half));
    return load_16(row + block * kMmaColumns);
  }

  // Where a rank begins in its group's weights, which have fewer than 2^31 elements.
  REFT_DEVICE int rank_offset(int k) const { return (k < e.r ? k : e.r - 1) * static_cast<int>(e.d); }

  // --- sums

  // The weights of some mma tiles of ranks in one column block, as they are in memory.
  struct SumWeights {
    EightElements<TR> R[kTogether];
    EightElements<TW> W[kTogether];
  };

  // R and W at the lane's first column. Ranks from r on repeat the last one; their sums are not used. What is
  // not there stays zero.
  REFT_DEVICE void fetch_weights(SumWeights& weights, const TR* R, const TW* W, int block, int eight) const {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int offset = rank_offset((eight + i) * 8 + g) + block * kMmaColumns;
      if (W) weights.W[i].fetch_from(W + offset);
      if (e.subtract) weights.R[i].fetch_from(R + offset);
    }
  }

  // The mma operands of 16 rows and 32 columns: of columns 8q .. 8q + 3 of every lane, and of 8q + 4 .. 8q
  // + 7.
  struct RowOperands {
    uint32_t whole[2][4];
    uint32_t high[2][4], low[2][4];  // parts, if kPartsOfH
  };

  REFT_DEVICE RowOperands row_operands(const Vector16 (&h)[2]) const {
    RowOperands rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = h[half].word[i];
        rows.whole[i / 2][2 * (i % 2) + half] = word;
        if constexpr (kPartsOfH) {
          FloatPair pair = unpack_pair<H>(word);
          rows.high[i / 2][2 * (i % 2) + half] = take_bfloat16_pair(pair.low, pair.high);
          rows.low[i / 2][2 * (i % 2) + half] = take_bfloat16_pair(pair.low, pair.high);
        }
      }
    }
    return rows;
  }

  // Weights as they are multiplied: in float32 and to be taken apart, or as the words of mma operands.
  template <typename T>
  using Factors = std::conditional_t<sizeof(T) == 4, float[kTogether][8], uint32_t[kTogether][4]>;

  template <typename T>
  REFT_DEVICE void factors_of(Factors<T>& factors, const EightElements<T> (&weights)[kTogether]) const {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if constexpr (sizeof(T) == 4) {
        weights[n].to_floats(factors[n]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) factors[n][i] = weights[n].part[0].word[i];
      }
    }
  }

  // sum += rows weights^T, or -=, of kTogether tiles of ranks.
  template <bool kMinus>
  REFT_DEVICE void multiply(float (&sum)[kTogether][4], const RowOperands& rows,
                            const uint32_t (&weights)[kTogether][4]) const {
    constexpr uint32_t kSigns = kMinus ? 0x80008000u : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const uint32_t b[2] = {weights[n][2 * i] ^ kSigns, weights[n][2 * i + 1] ^ kSigns};
        mma_16x8x16<H>(sum[n], rows.whole[i], b);
      }
    }
  }

  // The same for weights in float32. Each mma waits for the one before it in its tile of ranks, so that tiles
  // take turns.
  template <bool kMinus>
  REFT_DEVICE void multiply(float (&sum)[kTogether][4], const RowOperands& rows,
                            float (&weights)[kTogether][8]) const {
    static_assert(!kMinus);
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      uint32_t word[kTogether][4];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) word[n][i] = take_bfloat16_pair(weights[n][2 * i], weights[n][2 * i + 1]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          const uint32_t b[2] = {word[n][2 * i], word[n][2 * i + 1]};
          mma_16x8x16<BFloat16>(sum[n], kPartsOfH ? rows.high[i] : rows.whole[i], b);
        }
        if constexpr (kPartsOfH) {
          // The last part times the low one is below what float32 holds.
          if (part == 2) continue;
#pragma unroll
          for (int n = 0; n < kTogether; ++n) {
            const uint32_t b[2] = {word[n][2 * i], word[n][2 * i + 1]};
            mma_16x8x16<BFloat16>(sum[n], rows.low[i], b);
          }
        }
      }
    }
  }

  // The products of a column block with kTogether tiles of ranks; then `fetch` replaces the weights, while
  // the products are under way. They are summed by themselves and then added, which rounds once for 32
  // columns and not, as tensor cores do, cuts off a little with each mma.
  template <typename Fetch>
  REFT_DEVICE void add_products(float (&sum)[kProducts][kEights][4], int eight, const RowOperands& rows,
                                const SumWeights& weights, Fetch&& fetch) const {
    float some[kProducts][kTogether][4] = {};
    Factors<TR> b;
    factors_of<TR>(b, weights.R);
    Factors<TW> a;
    factors_of<TW>(a, weights.W);
    if constexpr (kLinear && !kHalfR) {
      float A[kTogether][8];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        float w[8];
        weights.W[n].to_floats(w);
#pragma unroll
        for (int i = 0; i < 8; ++i) A[n][i] = w[i] - b[n][i];
      }
      fetch();
      multiply<false>(some[0], rows, A);
    } else {
      fetch();
      if (e.W.data) multiply<false>(some[0], rows, a);
      if (e.subtract) multiply<kLinear>(some[kProducts - 1], rows, b);
    }
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[product][eight + n][i] += some[product][n][i];
      }
    }
  }

  // All ranks of one group's slots, `mine` of the `live` ones, into `partial`.
  REFT_DEVICE void sum_group(int64_t group, unsigned live, unsigned mine) const {
    const int64_t offset = group * e.r * e.d + begin + 8 * q;
    const TR* const R = static_cast<const TR*>(e.R.data) + offset;
    const TW* const W = e.W.data ? static_cast<const TW*>(e.W.data) + offset : nullptr;
    const H* const row[2] = {lane_row(live, 0), lane_row(live, 1)};
    float sum[kProducts][kEights][4] = {};
    const int count = column_blocks();
    SumWeights weights = {};
    if (warp < count) fetch_weights(weights, R, W, warp, 0);
    wait_async<0>();
    for (int block = warp; block < count; block += warps) {
      const Vector16 h[2] = {columns(row[0], block, 0), columns(row[1], block, 1)};
      const RowOperands rows = row_operands(h);
#pragma unroll
      for (int eight = 0; eight < kEights; eight += kTogether) {
        add_products(sum, eight, rows, weights, [&] {
          if (eight + kTogether < kEights) {
            fetch_weights(weights, R, W, block, eight + kTogether);
          } else if (block + warps < count) {
            fetch_weights(weights, R, W, block + warps, 0);
          }
        });
      }
    }
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = g + 8 * half;
        if (!(mine >> m & 1)) continue;
#pragma unroll
        for (int n = 0; n < kEights; ++n) {
          const int place = Block::place_of(warp, m, product, n * 8 + 2 * q);
          store_8(partial + place, {{__float_as_uint(sum[product][n][2 * half]),
                                     __float_as_uint(sum[product][n][2 * half + 1])}});
        }
      }
    }
  }

  // --- apply

  // Of R what the lane has in one step: four columns, 4g .. 4g + 3, of ranks 2q, 2q + 1 and, of 16, 2q + 8,
  // 2q + 9.
  struct ApplyWeights {
    FourElements<TR> R[kStepRanks];
  };

  // R at the lane's first column. u is zero from rank r on.
  REFT_DEVICE void fetch_weights(ApplyWeights& weights, const TR* R, int block, int step) const {
#pragma unroll
    for (int i = 0; i < kStepRanks; ++i) {
      weights.R[i].fetch_from(R + rank_offset(step * 16 + 2 * q + i % 2 + i / 2 * 8) + block * kMmaColumns);
    }
  }

  // u [16 slots, ranks] as mma operands in two bfloat16 parts. With 8 ranks the low parts stand where ranks 8
  // .. 15 would, and need no products of their own.
  struct UOperands {
    uint32_t high[kSteps][4], low[kSteps][4];
  };

  REFT_DEVICE UOperands u_operands() const {
    UOperands operands;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kStepRanks; ++i) {
        const Vector8 v = load_8(u + (g + 8 * (i % 2)) * ranks + step * 16 + 2 * q + i / 2 * 8);
        float a = __uint_as_float(v.word[0]), b = __uint_as_float(v.word[1]);
        operands.high[step][i] = take_bfloat16_pair(a, b);
        const uint32_t low = pack_pair<BFloat16>(a, b);
        if constexpr (kStepRanks == 2) {
          operands.high[step][i + 2] = low;
        } else {
          operands.low[step][i] = low;
        }
      }
    }
    return operands;
  }

  // sum [16 slots, 4 x 8 columns] += u R for the ranks of a step. Column n of tile t is column 4n + t of the
  // block.
  // `fetch` replaces the weights while the products are under way.
  template <typename Fetch>
  REFT_DEVICE void add_step(float (&sum)[4][4], const UOperands& operands, const ApplyWeights& weights,
                            int step, Fetch&& fetch) const {
    uint32_t high[4][2], low[4][2];
#pragma unroll
    for (int i = 0; i < kStepRanks; i += 2) {
      float a[4], b[4];
      weights.R[i].to_floats(a);
      weights.R[i + 1].to_floats(b);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        high[t][i / 2] = take_bfloat16_pair(a[t], b[t]);
        low[t][i / 2] = pack_pair<BFloat16>(a[t], b[t]);
        if constexpr (kStepRanks == 2) {
          high[t][1] = high[t][0];
          low[t][1] = low[t][0];
        }
      }
    }
    fetch();
#pragma unroll
    for (int t = 0; t < 4; ++t) mma_16x8x16<BFloat16>(sum[t], operands.high[step], high[t]);
    if constexpr (kStepRanks == 4) {
#pragma unroll
      for (int t = 0; t < 4; ++t) mma_16x8x16<BFloat16>(sum[t], operands.low[step], high[t]);
    }
    if constexpr (!std::is_same_v<TR, BFloat16>) {
#pragma unroll
      for (int t = 0; t < 4; ++t) mma_16x8x16<BFloat16>(sum[t], operands.high[step], low[t]);
    }
  }

  REFT_DEVICE const TR* apply_R(int64_t group) const {
    return static_cast<const TR*>(e.R.data) + (group * e.r * e.d + begin + 4 * g);
  }

  // `weights`: of the warp's first column block, fetched before.
  REFT_DEVICE void apply_group(int64_t group, unsigned mine, const UOperands& operands,
                               ApplyWeights weights) const {
    const TR* const R = apply_R(group);
    const H* const row[2] = {lane_row(mine, 0), lane_row(mine, 1)};
    const int count = column_blocks();
    for (int block = warp; block < count; block += warps) {
      float sum[4][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_step(sum, operands, weights, step, [&] {
          if (step + 1 < kSteps) {
            fetch_weights(weights, R, block, step + 1);
          } else if (block + warps < count) {
            fetch_weights(weights, R, block + warps, 0);
          }
        });
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!row[half]) continue;
        float y[8];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          y[t] = sum[t][2 * half];
          y[t + 4] = sum[t][2 * half + 1];
        }
        store_row(row[half], block, half, y);
      }
    }
  }

  REFT_DEVICE void store_row(const H* row, int block, int half, float (&y)[8]) const {
    const int m = g + 8 * half, j = begin + block * kMmaColumns + 8 * q;
    const Slot& slot = slots[m];
    const Vector16 fetched = columns(row, block, half);
    float h[8];
    floats_of<8, H>(fetched, h);
    if (p.rows) store_16(static_cast<H*>(p.rows) + (first + m) * e.d + j, fetched);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] += h[i];
    if (e.seed) drop_elements(e, slot.batch * e.length + slot.position, j, y);
    store_floats(row_of<H>(p.y, slot) + j, y);
  }

  REFT_DEVICE void run() const {
    const bool clusters = tile.cluster > 1, multiplies = Block::multiplies();
    unsigned rank = 0;
    if (clusters) {
      rank = cluster_rank();
      cluster_arrive();
    }
    Block::find_slots();
    sync_block();
    const unsigned live = Block::live_slots();
    stage(live);
    const float bias = Block::bias_of(live, kRankTile, thread);
    int64_t group = 0;
    if (multiplies) {
      for (unsigned left = live, mine; left; left &= ~mine) {
        mine = Block::next_group(left, group);
        sum_group(group, live, mine);
      }
    }
    // R for the first products of `apply` comes while delta is found.
    unsigned mine = Block::next_group(live, group);
    ApplyWeights weights = {};
    if (warp < column_blocks()) fetch_weights(weights, apply_R(group), warp, 0);
    sync_block();
    if (clusters) Block::exchange_sums(multiplies ? live : 0, rank);
    Block::find_delta(live, kRankTile, bias, clusters, rank == 0);
    sync_block();
    wait_async<0>();
    const UOperands operands = u_operands();
    for (unsigned left = live; left;) {
      apply_group(group, mine, operands, weights);
      left &= ~mine;
      if (!left) break;
      mine = Block::next_group(left, group);
      if (warp < column_blocks()) fetch_weights(weights, apply_R(group), warp, 0);
    }
    if (p.copy_idle) Block::template copy_idle_rows<8, H>(live);
  }
};

// Blocks of a multiprocessor: two where the registers suffice, so that one waits for its rows while the other
// computes.
template <typename TR>
constexpr int forward_mma_blocks(bool linear, int rank_tile) {
  return rank_tile <= 16 || (rank_tile == 32 && linear && sizeof(TR) == 2) ? 2 : 1;
}

template <typename H, typename TR, typename TW, bool kLinear, int kRankTile>
REFT_KERNEL(256, forward_mma_blocks<TR>(kLinear, kRankTile))
edit_forward_mma(REFT_GRID_CONSTANT EditForwardParams params, REFT_GRID_CONSTANT ForwardTile tile) {
  ForwardMma<H, TR, TW, kLinear, kRankTile>(params, tile, dynamic_shared()).run();
}

}  // namespace reft_kernels
