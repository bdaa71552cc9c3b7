// The backward of the edit on tensor cores: rows in half precision that can be read by 16 bytes, r up to 64.
//
// mma.sync multiplies bfloat16 and adds in float32. What is float32 counts as a sum of bfloat16 parts, and so
// does a float16, so that the products are as good as float32's wherever a result is float32: three parts of
// 8 bits are a float, two are a float16. Products of parts that are too small to count are left out.
//
// The order of the columns, or ranks, or slots that a product sums over is free as long as both factors have
// the same. It is chosen so that a lane finds what it needs side by side: tile t of 4 covers the columns 4 n
// + t of 32.
#pragma once

#include "reft_kernels/activation.h"
#include "reft_kernels/edit_backward_slab.cuh"

namespace reft_kernels {

// Fragments of an operand in so many parts; the part i is 2^-8 of part i - 1.
template <int kParts, int kWords>
struct Fragment {
  uint32_t part[kParts][kWords];
};

// Two floats, of one row or column, to word `word` of a fragment.
template <int kParts, int kWords>
REFT_DEVICE void set_word(Fragment<kParts, kWords>& to, int word, float low, float high) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) to.part[i][word] = take_bfloat16_pair(low, high);
}

// Two elements of H as they are stored.
template <typename H, int kParts, int kWords>
REFT_DEVICE void set_word(Fragment<kParts, kWords>& to, int word, uint32_t pair) {
  if constexpr (kParts == 1) {
    to.part[0][word] = pair;
  } else {
    const FloatPair floats = unpack_pair<H>(pair);
    set_word(to, word, floats.low, floats.high);
  }
}

// sum += left right, of the products those of size 2^(-8 (kParts - 1)) and more.
template <int kParts, int kLeft, int kRight>
REFT_DEVICE void multiply(float (&sum)[4], const Fragment<kLeft, 4>& left, const Fragment<kRight, 2>& right) {
#pragma unroll
  for (int size = kParts - 1; size >= 0; --size) {  // the small ones first
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      if (size - i >= 0 && size - i < kRight) mma_16x8x16<BFloat16>(sum, left.part[i], right.part[size - i]);
    }
  }
}

// Phase 1: a block takes 16 slots, its warps share the columns. Phase 2: the warps share the ranks by 16, and
// warps with the same ranks share the slots by 16; for dh each takes 16 slots and 32 columns.
template <typename H, typename TR, int kRanks, int kSlab>
struct BackwardMma {
  static constexpr int kRowParts = std::is_same_v<H, BFloat16> ? 1 : 2;      // of grad and x
  static constexpr int kRParts = std::is_same_v<TR, float> ? 3 : kRowParts;  // of R in phase 1
  static constexpr int kUpParts = 2;                                         // of all that is for dh
  static constexpr int kRankTiles = kRanks / 16, kSharers = kBackwardWarps / kRankTiles;
  static constexpr int kTiles = kSlab / 8;
  static constexpr int kRanksAtOnce =
      kRanks < 32 ? kRanks : 32;  // whose sums over warps are in shared memory at once

  const EditBackwardParams& p;
  const Edit& e;
  const BackwardTile& tile;
  char* const shared;
  const int thread, lane, warp, row, quad;  // of a fragment: lane / 4 and lane % 4
  SlabStream<H, true> stream;
  float dW[kTiles][4], dR[kTiles][4];
  float sum_gs[2], sum_gd[2];  // of ranks `row` and `row` + 8

  REFT_DEVICE BackwardMma(const EditBackwardParams& params, const BackwardTile& backward_tile)
      : p(params),
        e(params.edit),
        tile(backward_tile),
        shared(dynamic_shared()),
        thread(static_cast<int>(threadIdx.x)),
        lane(thread % 32),
        warp(thread / 32),
        row(lane / 4),
        quad(lane % 4),
        stream{params, params.edit, backward_tile, shared, thread, 0, 0, 0, 0} {}

  // --- phase 1

  REFT_DEVICE SlabSlot* project_slots() const {
    return reinterpret_cast<SlabSlot*>(shared + tile.at.project_slots);
  }
  REFT_DEVICE float* partial() const { return reinterpret_cast<float*>(shared + tile.at.partial); }

  REFT_DEVICE void project(int begin, int end) {
    for (int first = begin + static_cast<int>(blockIdx.x) * kMmaRows; first < end;
         first += static_cast<int>(gridDim.x) * kMmaRows) {
      sync_block();
      if (thread < kMmaRows) project_slots()[thread] = slab_slot(e, first + thread, end);
      sync_block();
      store_idle(first);
      int done = kIdle;  // groups up to here
      for (int group = next_group(done); group >= 0; group = next_group(done)) {
        project_group(first, group);
        done = group;
      }
    }
  }

  // The lowest group above `last` among the tile's slots; kIdle if there is none.
  REFT_DEVICE int next_group(int last) const {
    int next = kIdle;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      const int group = project_slots()[m].group;
      if (group > last && (next == kIdle || group < next)) next = group;
    }
    return next;
  }

  REFT_DEVICE void store_idle(int first) const {
#pragma unroll 1
    for (int q = thread; q < kMmaRows * kRanks; q += kBackwardThreads) {
      const int m = q / kRanks, k = q % kRanks;
      if (project_slots()[m].group != kIdle || k >= e.r) continue;
      const int64_t i = static_cast<int64_t>(first + m) * e.r + k;
      static_cast<float*>(p.gd)[i] = 0.0f;
      static_cast<float*>(p.gs)[i] = 0.0f;
    }
  }

  REFT_DEVICE void project_group(int first, int group) const {
    const H* rows[2];
    SlabSlot slots[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      slots[i] = project_slots()[row + 8 * i];
      const H* from = static_cast<const H*>(p.grad.data) + row_offset(p.grad.stride, slots[i]);
      rows[i] = slots[i].group == group ? from : nullptr;
    }
    const TR* R = static_cast<const TR*>(e.R.data) + static_cast<int64_t>(group) * e.r * e.d;
    float sum[kRanks / 8][4] = {};
    [[maybe_unused]] constexpr int kAtOnce = 64 / kRanks;  // steps whose loads are few enough registers
#pragma unroll kAtOnce
    for (int step = warp; step * 16 < e.d; step += kBackwardWarps) {
      const int j = step * 16 + quad * 4;
      Fragment<kRowParts, 4> left;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vector8 g{{0, 0}};
        if (rows[i] && j < e.d) g = load_8(rows[i] + j);
        if (e.seed && rows[i]) drop(slots[i], j, g);
        set_word<H>(left, i, g.word[0]);
        set_word<H>(left, 2 + i, g.word[1]);
      }
#pragma unroll
      for (int t = 0; t < kRanks / 8; ++t) {
        const int k = 8 * t + row;
        Fragment<kRParts, 2> right;
        load_R(R + static_cast<int64_t>(k) * e.d + j, k < e.r && j < e.d, right);
        multiply<3>(sum[t], left, right);
      }
    }
    store_ranks(first, group, sum);
  }

  // Four columns of one rank.
  REFT_DEVICE static void load_R(const TR* from, bool inside, Fragment<kRParts, 2>& to) {
    if constexpr (std::is_same_v<TR, float>) {
      float R[4] = {};
      if (inside) load_floats(from, R);
      set_word(to, 0, R[0], R[1]);
      set_word(to, 1, R[2], R[3]);
    } else {
      const Vector8 R = inside ? load_8(from) : Vector8{{0, 0}};
      set_word<TR>(to, 0, R.word[0]);
      set_word<TR>(to, 1, R.word[1]);
    }
  }

  REFT_DEVICE void drop(const SlabSlot& slot, int j, Vector8& value) const {
    const uint64_t number = static_cast<uint64_t>(slot.batch * e.length + slot.position);
    const PhiloxBlock block = philox(static_cast<uint64_t>(*e.seed), number, static_cast<uint32_t>(j >> 2));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if ((block.word[c] >> 1) < e.keep_threshold) value.word[c / 2] &= c % 2 ? 0xffffu : 0xffff0000u;
    }
  }

  // gd and gs of a group's slots, from the warps' sums.
  REFT_DEVICE void store_ranks(int first, int group, const float (&sum)[kRanks / 8][4]) const {
#pragma unroll
    for (int k0 = 0; k0 < kRanks; k0 += kRanksAtOnce) {
#pragma unroll
      for (int t = 0; t < kRanksAtOnce / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = row + i / 2 * 8, k = 8 * t + 2 * quad + i % 2;
          partial()[(warp * kMmaRows + m) * kRanksAtOnce + k] = sum[k0 / 8 + t][i];
        }
      }
      sync_block();
#pragma unroll 1
      for (int q = thread; q < kMmaRows * kRanksAtOnce; q += kBackwardThreads) {
        const SlabSlot slot = project_slots()[q / kRanksAtOnce];
        const int k = k0 + q % kRanksAtOnce;
        if (slot.group != group || k >= e.r) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kBackwardWarps; ++w) total += partial()[w * kMmaRows * kRanksAtOnce + q];
        const int64_t i = static_cast<int64_t>(first + q / kRanksAtOnce) * e.r + k;
        store_rank(e.seed ? slot.scale * static_cast<float>(e.keep_scale) * total : slot.scale * total, i);
      }
      sync_block();
    }
  }

  REFT_DEVICE void store_rank(float gd, int64_t i) const {
    static_cast<float*>(p.gd)[i] = gd;
    if (e.linear()) return;
    static_cast<float*>(p.gs)[i] = gd * activation_slope(static_cast<const float*>(p.s)[i], e.activation);
  }

  // --- phase 2: weights for dh, as fragments [ranks / 16, tiles, parts, lane]: W, or A where f is linear,
  // then R

  REFT_DEVICE Vector8* weights(int which, int step, int t, int part) const {
    const int index = ((which * kRankTiles + step) * kTiles + t) * kUpParts + part;
    return reinterpret_cast<Vector8*>(shared + tile.at.weights) + index * 32 + lane;
  }

  REFT_DEVICE void begin_item(int group, int column) {
    stream.group = group;
    stream.column = column;
    sum_gs[0] = sum_gs[1] = sum_gd[0] = sum_gd[1] = 0.0f;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dW[t][i] = dR[t][i] = 0.0f;
    }
#pragma unroll 1
    for (int q = warp; q < kRankTiles * kTiles; q += kBackwardWarps) {
      const int step = q / kTiles, t = q % kTiles;
      const int j = column + t / 4 * 32 + row * 4 + t % 4;
      float A[4], R[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = step * 16 + quad * 4 + i;
        const bool inside = k < e.r && j < e.d;
        const int64_t index = (static_cast<int64_t>(group) * e.r + k) * e.d + j;
        R[i] = inside ? to_float(static_cast<const TR*>(e.R.data)[index]) : 0.0f;
        A[i] = inside && e.W.data ? float_at(e.W.data, e.W.type, index) : 0.0f;
        if (e.linear() && e.subtract) A[i] -= R[i];
      }
      store_weights(0, step, t, A);
      store_weights(1, step, t, R);
    }
  }

  REFT_DEVICE void store_weights(int which, int step, int t, const float (&weight)[4]) const {
    Fragment<kUpParts, 2> fragment;
    set_word(fragment, 0, weight[0], weight[1]);
    set_word(fragment, 1, weight[2], weight[3]);
#pragma unroll
    for (int i = 0; i < kUpParts; ++i)
      store_8(weights(which, step, t, i), {{fragment.part[i][0], fragment.part[i][1]}});
  }

  // --- phase 2

  REFT_DEVICE void sum_chunk() {
    const int tiles = stream.tiles();
    for (int i = 0; i < tiles; ++i) {
      const SlabSlot next = stream.slot_of(i + tile.stages);
      stream.wait_for(i, next);
      if (p.rebuild && stream.needs_x()) {
        rebuild_rows(i);
        sync_block();
      }
      if (stream.needs_x() || p.dR.data || p.db.data || p.dc.data) sum_tile(i);
      if (p.dh.data) store_dh(i);
      if (p.copy_idle && stream.group == 0) stream.copy_idle_rows(i);
      stream.advance(i);
    }
  }

  // Who sums 16 slots depends on their number alone.
  REFT_DEVICE void sum_tile(int i) {
    const int sharer = warp / kRankTiles, rank = warp % kRankTiles * 16 + row;
    const int first = (sharer - (stream.begin + i * tile.slots) / 16) & (kSharers - 1);
    const bool precise = std::is_same_v<TR, float> || is_wide(p.dR) || is_wide(p.dW);
#pragma unroll 1
    for (int sub = first; sub < tile.slots / 16; sub += kSharers) {
      if (precise) {
        add_slots<3>(i, sub * 16, rank);
      } else if constexpr (!std::is_same_v<TR, float>) {
        add_slots<2>(i, sub * 16, rank);
      }
    }
  }

  REFT_DEVICE static bool is_wide(const WeightGradient& gradient) {
    return gradient.data && !is_half(gradient.type);
  }

  template <int kParts>
  REFT_DEVICE void add_slots(int i, int first, int rank) {
    const SlabSlot* slots = stream.table(i) + first;
    Fragment<kParts, 4> gs, gd, u;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // slots 2 quad and 2 quad + 1, and those 8 further on
      const int slot = 2 * quad + 8 * pair;
      const SlabSlot one = slots[slot], two = slots[slot + 1];
      const bool own_one = one.group == stream.group, own_two = two.group == stream.group;
      const float gain = e.seed ? static_cast<float>(e.keep_scale) : 1.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int word = 2 * pair + half, k = rank + 8 * half;
        const float gs_one = own_one ? stream.gs(i, first + slot)[k] : 0.0f;
        const float gs_two = own_two ? stream.gs(i, first + slot + 1)[k] : 0.0f;
        set_word(gs, word, gs_one, gs_two);
        sum_gs[half] += gs_one + gs_two;
        if (!e.linear()) {
          const float gd_one = own_one ? stream.gd(i, first + slot)[k] : 0.0f;
          const float gd_two = own_two ? stream.gd(i, first + slot + 1)[k] : 0.0f;
          set_word(gd, word, -gd_one, -gd_two);
          sum_gd[half] += gd_one + gd_two;
        }
        if (p.dR.data) {
          const float u_one = own_one ? stream.delta(i, first + slot)[k] * one.scale * gain : 0.0f;
          const float u_two = own_two ? stream.delta(i, first + slot + 1)[k] * two.scale * gain : 0.0f;
          set_word(u, word, u_one, u_two);
        }
      }
    }
    const bool cross = p.dR.data && e.subtract && !e.linear();
#pragma unroll
    for (int block = 0; block < kSlab / 32; ++block) {
      Fragment<kRowParts, 2> right[4];
      if (stream.needs_x()) {
        load_columns(stream.x_row(i, first), block, right);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          multiply<kParts>(dW[4 * block + t], gs, right[t]);
          if (cross) multiply<kParts>(dR[4 * block + t], gd, right[t]);
        }
      }
      if (p.dR.data) {
        load_columns(stream.grad_row(i, first), block, right);
#pragma unroll
        for (int t = 0; t < 4; ++t) multiply<kParts>(dR[4 * block + t], u, right[t]);
      }
    }
  }

  // Of 16 slots' rows that start at `from`, the columns 4 row + t of the block for tile t.
  REFT_DEVICE void load_columns(const H* from, int block, Fragment<kRowParts, 2> (&to)[4]) const {
    const char* place = reinterpret_cast<const char*>(from + block * 32 + row * 4);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const Vector8 one = load_8(place + (2 * quad + 8 * pair) * tile.row_stride);
      const Vector8 two = load_8(place + (2 * quad + 8 * pair + 1) * tile.row_stride);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t a = one.word[t / 2], b = two.word[t / 2];
        set_word<H>(to[t], pair, t % 2 ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16));
      }
    }
  }

  // --- rows plus R^T u: dh, and x from y

  // The sub-tile and block of columns that the warp takes in turn `turn`; none: false.
  struct Unit {
    int slot, block;
  };
  REFT_DEVICE int units() const { return tile.slots / 16 * (kSlab / 32); }
  REFT_DEVICE static Unit unit(int q) { return {q / (kSlab / 32) * 16, q % (kSlab / 32)}; }

  // sum[t][i] is of row `row` (i < 2) or `row` + 8, and of column 8 quad + t (i even) or 4 further on.
  REFT_DEVICE void load_unit(const H* from, const bool (&own)[2], float factor, float (&sum)[4][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value[8] = {};
      const char* place = reinterpret_cast<const char*>(from + quad * 8) + (row + 8 * half) * tile.row_stride;
      if (own[half]) load_floats(reinterpret_cast<const H*>(place), value);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        sum[t][2 * half] = factor * value[t];
        sum[t][2 * half + 1] = factor * value[t + 4];
      }
    }
  }

  REFT_DEVICE static Vector16 pack_unit(const float (&sum)[4][4], int half) {
    Vector16 to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = i % 2 * 2, column = 2 * half + i / 2;
      to.word[i] = pack_pair<H>(sum[t][column], sum[t + 1][column]);
    }
    return to;
  }

  // sum += u weight, u being factor * from[slot], of which there are 16.
  REFT_DEVICE void add_up(const float* from, const float (&factor)[2], const bool (&own)[2], int which,
                          int block, float (&sum)[4][4]) const {
#pragma unroll 1
    for (int step = 0; step < kRankTiles; ++step) {
      Fragment<kUpParts, 4> left;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = step * 16 + quad * 4;
        float u[4] = {};
        if (own[half]) load_floats(from + (row + 8 * half) * tile.rank_stride + k, u);
#pragma unroll
        for (int c = 0; c < 4; ++c) u[c] = k + c < e.r ? factor[half] * u[c] : 0.0f;
        set_word(left, half, u[0], u[1]);
        set_word(left, 2 + half, u[2], u[3]);
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        Fragment<kUpParts, 2> right;
#pragma unroll
        for (int i = 0; i < kUpParts; ++i) {
          const Vector8 words = load_8(weights(which, step, 4 * block + t, i));
          right.part[i][0] = words.word[0];
          right.part[i][1] = words.word[1];
        }
        multiply<kUpParts>(sum[t], left, right);
      }
    }
  }

  REFT_DEVICE void store_dh(int i) const {
#pragma unroll 1
    for (int q = warp; q < units(); q += kBackwardWarps) {
      const Unit at = unit(q);
      const SlabSlot slots[2] = {stream.table(i)[at.slot + row], stream.table(i)[at.slot + row + 8]};
      const bool own[2] = {slots[0].group == stream.group, slots[1].group == stream.group};
      float sum[4][4];
      const float gain = e.seed ? static_cast<float>(e.keep_scale) : 1.0f;
      load_unit(stream.grad_row(i, at.slot) + at.block * 32, own, gain, sum);
      const float plus[2] = {1.0f, 1.0f}, minus[2] = {-1.0f, -1.0f};
      if (e.W.data || (e.linear() && e.subtract)) add_up(stream.gs(i, at.slot), plus, own, 0, at.block, sum);
      if (e.subtract && !e.linear()) add_up(stream.gd(i, at.slot), minus, own, 1, at.block, sum);
      const int j = stream.column + at.block * 32 + quad * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        H* to = static_cast<H*>(p.dh.data) + row_offset(p.dh.stride, slots[half]) + j;
        if (own[half] && j < e.d) store_16(to, pack_unit(sum, half));
      }
    }
  }

  // y - R^T u, rounded as h was, in the place of y.
  REFT_DEVICE void rebuild_rows(int i) const {
#pragma unroll 1
    for (int q = warp; q < units(); q += kBackwardWarps) {
      const Unit at = unit(q);
      const SlabSlot slots[2] = {stream.table(i)[at.slot + row], stream.table(i)[at.slot + row + 8]};
      const bool own[2] = {slots[0].group == stream.group, slots[1].group == stream.group};
      float sum[4][4];
      load_unit(stream.x_row(i, at.slot) + at.block * 32, own, 1.0f, sum);
      const float minus[2] = {-slots[0].scale, -slots[1].scale};
      add_up(stream.delta(i, at.slot), minus, own, 1, at.block, sum);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        H* to = stream.x_row(i, at.slot + row + 8 * half) + at.block * 32 + quad * 8;
        if (own[half]) store_16(to, pack_unit(sum, half));
      }
    }
  }

  // --- the sums' end

  REFT_DEVICE float* reduced(int which) const {
    return reinterpret_cast<float*>(shared + tile.at.stages) + which * kBackwardWarps * 16 * kSlab;
  }

  REFT_DEVICE void store_sums(const float (&sum)[kTiles][4], int which) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = row + i / 2 * 8, column = t / 4 * 32 + 8 * quad + i % 2 * 4 + t % 4;
        reduced(which)[(warp * 16 + k) * kSlab + column] = sum[t][i];
      }
    }
  }

  // Over the warps that share the rank.
  REFT_DEVICE float total(int which, int k, int column) const {
    float sum = 0.0f;
#pragma unroll
    for (int sharer = 0; sharer < kSharers; ++sharer) {
      sum += reduced(which)[((sharer * kRankTiles + k / 16) * 16 + k % 16) * kSlab + column];
    }
    return sum;
  }

  REFT_DEVICE void finish_item() {
    if (stream.needs_x()) store_sums(dW, 0);
    if (p.dR.data) store_sums(dR, 1);
    sync_block();
#pragma unroll 1
    for (int q = thread; q < kRanks * kSlab; q += kBackwardThreads) {
      const int k = q / kSlab, column = q % kSlab, j = stream.column + column;
      if (k >= e.r || j >= e.d) continue;
      const int64_t i = (static_cast<int64_t>(stream.group) * e.r + k) * e.d + j;
      const float W_sum = stream.needs_x() ? total(0, k, column) : 0.0f;
      if (p.dW.data) store_gradient(p.dW, i, W_sum);
      if (p.dR.data) {
        const float R_sum = total(1, k, column);
        store_gradient(p.dR, i, e.linear() && e.subtract ? R_sum - W_sum : R_sum);
      }
    }
    sync_block();
    if (stream.column == 0) finish_vectors();
  }

  REFT_DEVICE void finish_vectors() const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float gs = sum_gs[half], gd = e.linear() ? sum_gs[half] : sum_gd[half];
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        gs += shuffle_xor(gs, mask);
        gd += shuffle_xor(gd, mask);
      }
      if (quad == 0) {
        reduced(0)[warp * 16 + row + 8 * half] = gs;
        reduced(1)[warp * 16 + row + 8 * half] = gd;
      }
    }
    sync_block();
    if (thread < e.r) {
      float gs = 0.0f, gd = 0.0f;
#pragma unroll
      for (int sharer = 0; sharer < kSharers; ++sharer) {
        const int i = (sharer * kRankTiles + thread / 16) * 16 + thread % 16;
        gs += reduced(0)[i];
        gd += reduced(1)[i];
      }
      const int64_t i = static_cast<int64_t>(stream.group) * e.r + thread;
      if (p.db.data) store_gradient(p.db, i, gs);
      if (p.dc.data) store_gradient(p.dc, i, -gd);
    }
  }
};

template <typename H, typename TR, int kRanks, int kSlab>
REFT_KERNEL(kBackwardThreads, 1)
edit_backward_mma(REFT_GRID_CONSTANT EditBackwardParams params, REFT_GRID_CONSTANT BackwardTile tile) {
  BackwardMma<H, TR, kRanks, kSlab> task(params, tile);
  run_backward(task);
}

}  // namespace reft_kernels
