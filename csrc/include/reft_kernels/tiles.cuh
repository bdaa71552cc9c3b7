// Device code that the edit's kernels share: elements as floats, the rows that slots name, sums over a warp,
// dropout.
#pragma once

#include <type_traits>

#include "reft_kernels/device.cuh"
#include "reft_kernels/edit_params.h"
#include "reft_kernels/philox.h"

namespace reft_kernels {

// --- elements

REFT_DEVICE float to_float(float x) {
  return x;
}
REFT_DEVICE float to_float(BFloat16 x) {
  return __bfloat162float(x);
}
REFT_DEVICE float to_float(Float16 x) {
  return __half2float(x);
}

// Rounds to nearest even.
template <typename T>
REFT_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

struct FloatPair {
  float low, high;
};

// Two elements of a 16-bit type in one word, the first in the low half.
template <typename T>
REFT_DEVICE FloatPair unpack_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return {__half2float(__ushort_as_half(static_cast<uint16_t>(word & 0xffffu))),
            __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)))};
  }
}

template <typename T>
REFT_DEVICE uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
  }
}

template <typename T>
constexpr int kElementsIn16Bytes = 16 / static_cast<int>(sizeof(T));

// Elements of 32 bits, or pairs of 16: words of 4 bytes to floats.
template <typename T, int kWords, int kCount>
REFT_DEVICE void unpack_words(const uint32_t (&word)[kWords], float (&to)[kCount], int first) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[first + i] = __uint_as_float(word[i]);
    } else {
      const FloatPair pair = unpack_pair<T>(word[i]);
      to[first + 2 * i] = pair.low;
      to[first + 2 * i + 1] = pair.high;
    }
  }
}

// What an access fetches: one element at any address, or 16 bytes.
template <int kCount, typename T>
using Fetched = std::conditional_t<kCount == 1, T, Vector16>;

template <int kCount, typename T>
REFT_DEVICE Fetched<kCount, T> fetch(const T* from) {
  if constexpr (kCount == 1) {
    return *from;
  } else {
    static_assert(kCount * sizeof(T) == 16);
    return load_16(from);
  }
}

template <int kCount, typename T>
REFT_DEVICE void floats_of(const Fetched<kCount, T>& fetched, float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = to_float(fetched);
  } else {
    unpack_words<T>(fetched.word, to, 0);
  }
}

// Consecutive elements as floats: one at any address, or 8 or a multiple of 16 bytes, aligned as far as 16
// bytes.
template <int kCount, typename T>
REFT_DEVICE void load_floats(const T* from, float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = to_float(*from);
  } else if constexpr (kCount * sizeof(T) == 8) {
    const Vector8 v = load_8(from);
    unpack_words<T>(v.word, to, 0);
  } else {
    static_assert(kCount * sizeof(T) % 16 == 0);
#pragma unroll
    for (int i = 0; i < kCount; i += kElementsIn16Bytes<T>) {
      const Vector16 v = load_16(from + i);
      unpack_words<T>(v.word, to, i);
    }
  }
}

// One element at any address, or 16 bytes.
template <int kCount, typename T>
REFT_DEVICE void store_floats(T* to, const float (&from)[kCount]) {
  if constexpr (kCount == 1) {
    *to = from_float<T>(from[0]);
  } else {
    static_assert(kCount * sizeof(T) == 16);
    Vector16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v.word[i] = __float_as_uint(from[i]);
      } else {
        v.word[i] = pack_pair<T>(from[2 * i], from[2 * i + 1]);
      }
    }
    store_16(to, v);
  }
}

template <int kCount, typename T>
REFT_DEVICE void store_fetched(T* to, const Fetched<kCount, T>& fetched) {
  if constexpr (kCount == 1) {
    *to = fetched;
  } else {
    store_16(to, fetched);
  }
}

// Element i of a small vector of any floating type: b, c or scale.
REFT_DEVICE float float_at(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(data)[i]);
    case DType::kFloat64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

REFT_DEVICE int64_t integer_at(const void* data, DType type, int64_t i) {
  return type == DType::kInt32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

// --- slots

// The row that a slot names.
struct Slot {
  int64_t batch;
  int64_t position;
  int64_t group;
  float scale;
  bool live;  // edits its row; where not, the rest is zero but for batch and position
};

REFT_DEVICE Slot find_slot(const Edit& edit, int64_t batch, int64_t i) {
  Slot slot;
  slot.batch = batch;
  slot.position = i;
  if (edit.positions.data) {
    const SlotTensor& t = edit.positions;
    slot.position = integer_at(t.data, t.type, slot.batch * t.stride[0] + i * t.stride[1]);
  }
  slot.group = 0;
  if (edit.group.data) {
    const SlotTensor& t = edit.group;
    slot.group = integer_at(t.data, t.type, slot.batch * t.stride[0] + i * t.stride[1]);
  }
  slot.live =
      slot.position >= 0 && slot.position < edit.length && slot.group >= 0 && slot.group < edit.groups;
  slot.scale = slot.live ? 1.0f : 0.0f;
  if (slot.live && edit.scale.data) {
    const SlotTensor& t = edit.scale;
    slot.scale = float_at(t.data, t.type, slot.batch * t.stride[0] + i * t.stride[1]);
  }
  if (!slot.live) slot.group = 0;
  return slot;
}

REFT_DEVICE Slot find_slot(const Edit& edit, int64_t n) {
  if (((n | edit.slots) >> 32) == 0) {  // a division of 64 bits is slow
    const uint32_t batch = static_cast<uint32_t>(n) / static_cast<uint32_t>(edit.slots);
    return find_slot(edit, batch, n - batch * edit.slots);
  }
  return find_slot(edit, n / edit.slots, n % edit.slots);
}

// The first element of a slot's row; only of live slots, or where there are no positions.
template <typename T>
REFT_DEVICE const T* row_of(const RowsIn& rows, const Slot& slot) {
  return static_cast<const T*>(rows.data) + (slot.batch * rows.stride[0] + slot.position * rows.stride[1]);
}

template <typename T>
REFT_DEVICE T* row_of(const RowsOut& rows, const Slot& slot) {
  return static_cast<T*>(rows.data) + (slot.batch * rows.stride[0] + slot.position * rows.stride[1]);
}

// --- sums

template <int kCount, int kMask, int kSize>
REFT_DEVICE void fold_over_lanes(float (&value)[kSize], int lane) {
  if constexpr (kMask > 0) {
    if constexpr (kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = (lane & kMask) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float mine = upper ? value[i + kHalf] : value[i];
        const float theirs = upper ? value[i] : value[i + kHalf];
        value[i] = mine + shuffle_xor(theirs, kMask);
      }
      fold_over_lanes<kHalf, kMask / 2>(value, lane);
    } else {
      value[0] += shuffle_xor(value[0], kMask);
      fold_over_lanes<1, kMask / 2>(value, lane);
    }
  }
}

// Sums the first kCount values, a power of two up to 32, each over the lanes of the warp. Lane l then has in
// value[0] the sum of value number l * kCount / 32. With every exchange the values that a lane still cares
// for are halved, so that 32 sums cost 31 shuffles and not 160.
template <int kCount, int kSize>
REFT_DEVICE void sum_over_lanes(float (&value)[kSize], int lane) {
  static_assert(kCount <= 32 && kCount <= kSize && (kCount & (kCount - 1)) == 0);
  fold_over_lanes<kCount, 16>(value, lane);
}

// --- dropout

// D_p of consecutive elements of row `row` of h, counted over its batches, from `column`: one, or a multiple
// of 4.
template <int kCount>
REFT_DEVICE void drop_elements(const Edit& edit, int64_t row, int64_t column, float (&value)[kCount]) {
  const uint64_t seed = static_cast<uint64_t>(*edit.seed);
  const float keep_scale = static_cast<float>(edit.keep_scale);
  if constexpr (kCount == 1) {
    const PhiloxBlock block = philox(seed, static_cast<uint64_t>(row), static_cast<uint32_t>(column >> 2));
    const int j = static_cast<int>(column & 3);
    const uint32_t word = j == 0   ? block.word[0]
                          : j == 1 ? block.word[1]
                          : j == 2 ? block.word[2]
                                   : block.word[3];
    value[0] = (word >> 1) >= edit.keep_threshold ? value[0] * keep_scale : 0.0f;
  } else {
    static_assert(kCount % 4 == 0);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const PhiloxBlock block =
          philox(seed, static_cast<uint64_t>(row), static_cast<uint32_t>((column + i) >> 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        value[i + j] = (block.word[j] >> 1) >= edit.keep_threshold ? value[i + j] * keep_scale : 0.0f;
      }
    }
  }
}

// --- floats as sums of bfloat16, for the tensor cores

// Takes from each of two floats the part that a bfloat16 holds, and returns both parts in one word. Cut off,
// not rounded: three parts in a row are the whole float, and none overflows.
REFT_DEVICE uint32_t take_bfloat16_pair(float& low, float& high) {
  const uint32_t a = __float_as_uint(low), b = __float_as_uint(high) & 0xffff0000u;
  low -= __uint_as_float(a & 0xffff0000u);
  high -= __uint_as_float(b);
  return (a >> 16) | b;
}

}  // namespace reft_kernels
