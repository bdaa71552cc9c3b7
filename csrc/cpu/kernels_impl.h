// The inner loops of kernels.h, compiled once for every instruction set: the including file names its
// namespace in REFT_KERNELS_ISA. All but the tables has internal linkage, and nothing of the standard library
// is instantiated, so that the linker cannot give one instruction set's code to another.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace reft_kernels::cpu::REFT_KERNELS_ISA {

// What a block holds in registers: rows x ranks sums in `down`, rows (or ranks, in `outer`) x vectors of
// columns else.
constexpr int kBlockRows = 4;
constexpr int kBlockRanks = kRegisters == 32 ? 4 : 2;
constexpr int kBlockVectors = kRegisters == 32 ? 4 : 2;

template <typename S>
REFT_INLINE const S* at(StripIn strip, int row) {
  return static_cast<const S*>(strip.row[row]) + strip.column;
}

template <typename S>
REFT_INLINE S* at(StripOut strip, int row) {
  return static_cast<S*>(strip.row[row]) + strip.column;
}

// Asks for the cache line at `at`, into the second level: a strip is used when some hundred others have been.
template <typename S>
REFT_INLINE void fetch(const S* at) {
  __builtin_prefetch(at, 0, 2);
}

// Whether element `i` begins a cache line, counted from where one begins.
template <typename S>
constexpr bool starts_line(int i) {
  return i * static_cast<int>(sizeof(S)) % 64 == 0;
}

// Calls `block` with the size, as a type, and the start of pieces of sizes 4, 2 and 1 that make up `count`.
template <int kSize>
struct Size {
  static constexpr int value = kSize;
};

template <int kLargest, typename Block>
REFT_INLINE void in_blocks(int count, const Block& block) {
  int begin = 0;
  for (; begin + kLargest <= count; begin += kLargest) block(Size<kLargest>(), begin);
  if constexpr (kLargest > 2) {
    if (begin + 2 <= count) {
      block(Size<2>(), begin);
      begin += 2;
    }
  }
  if constexpr (kLargest > 1) {
    if (begin < count) block(Size<1>(), begin);
  }
}

// --- weights in and gradients out

// to = from - minus, each with a sign of its own: only one of the two where the other is null.
template <typename T, typename S, typename M>
static void widen_from(const S* from, const M* minus, int64_t count, T* to) {
  constexpr int kStep = kLanes<T>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Vector<T> v = from != nullptr ? load<T>(from + i) : Vector<T>{};
    if (minus != nullptr) v -= load<T>(minus + i);
    store<T>(to + i, v);
  }
  const int rest = static_cast<int>(count - i);
  if (rest > 0) {
    Vector<T> v = from != nullptr ? load_some<T>(from + i, rest) : Vector<T>{};
    if (minus != nullptr) v -= load_some<T>(minus + i, rest);
    store_some<T>(to + i, v, rest);
  }
}

// Calls `use` with the address as a pointer to elements of that type.
template <typename Use>
REFT_INLINE void with_type(const void* address, DType type, const Use& use) {
  switch (type) {
    case DType::kFloat16:
      return use(static_cast<const Float16*>(address));
    case DType::kBFloat16:
      return use(static_cast<const BFloat16*>(address));
    case DType::kFloat64:
      return use(static_cast<const double*>(address));
    default:
      return use(static_cast<const float*>(address));
  }
}

template <typename T>
static void widen(const void* from, DType type, int64_t count, T* to) {
  with_type(from, type,
            [&](const auto* elements) { widen_from(elements, static_cast<const T*>(nullptr), count, to); });
}

template <typename T>
static void widen_difference(const void* from, DType type, const void* minus, DType minus_type, int64_t count,
                             T* to) {
  with_type(from, type, [&](const auto* elements) {
    if (type == minus_type) return widen_from(elements, static_cast<decltype(elements)>(minus), count, to);
    // Types that differ, in two passes: what was written first is in the cache.
    widen_from(elements, static_cast<const T*>(nullptr), count, to);
    with_type(minus, minus_type, [&](const auto* subtracted) { widen_from(to, subtracted, count, to); });
  });
}

template <typename T, typename S>
static void narrow_to(const T* from, const T* minus, int64_t count, bool add, S* to) {
  if constexpr (sizeof(S) > sizeof(T)) {  // what is there has more digits than T holds
    for (int64_t i = 0; i < count; ++i) {
      const T v = minus == nullptr ? from[i] : from[i] - minus[i];
      to[i] = add ? to[i] + static_cast<S>(v) : static_cast<S>(v);
    }
    return;
  }
  constexpr int kStep = kLanes<T>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Vector<T> v = load<T>(from + i);
    if (minus != nullptr) v -= load<T>(minus + i);
    if (add) v += load<T>(to + i);
    store<T>(to + i, v);
  }
  const int rest = static_cast<int>(count - i);
  if (rest > 0) {
    Vector<T> v = load_some<T>(from + i, rest);
    if (minus != nullptr) v -= load_some<T>(minus + i, rest);
    if (add) v += load_some<T>(to + i, rest);
    store_some<T>(to + i, v, rest);
  }
}

template <typename T>
static void narrow(const T* from, const T* minus, int64_t count, bool add, void* to, DType type) {
  with_type(to, type, [&](const auto* elements) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(elements)>>;
    narrow_to(from, minus, count, add, static_cast<S*>(to));
  });
}

template <typename T, typename S>
static void widen_rows(StripIn from, StripOut to, Shape shape) {
  for (int n = 0; n < shape.rows; ++n) {
    widen_from(at<S>(from, n), static_cast<const S*>(nullptr), shape.columns, at<T>(to, n));
  }
}

// --- down: dot products of rows with the panel's ranks

template <typename T, typename S, int kRows, int kRanks, int kFetch>
REFT_INLINE void down_block(const S* const (&x)[kRows], const S* const* next, int columns, const T* panel,
                            int64_t stride, T* sums, int64_t sums_stride) {
  constexpr int kStep = kLanes<T>, kSums = kRows * kRanks;
  Vector<T> sum[kSums];
  REFT_UNROLL
  for (int i = 0; i < kSums; ++i) sum[i] = Vector<T>{};
  const auto add = [&](const auto& load_x, const auto& load_panel) __attribute__((always_inline)) {
    Vector<T> a[kRanks];
    REFT_UNROLL
    for (int k = 0; k < kRanks; ++k) a[k] = load_panel(panel + k * stride);
    REFT_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const Vector<T> v = load_x(x[n]);
      REFT_UNROLL
      for (int k = 0; k < kRanks; ++k) sum[n * kRanks + k] += v * a[k];
    }
  };
  int j = 0;
  for (; j + kStep <= columns; j += kStep) {
    const auto whole = [j](const auto* from) __attribute__((always_inline)) { return load<T>(from + j); };
    add(whole, whole);
    REFT_UNROLL
    for (int n = 0; n < kFetch; ++n) fetch(next[n] + j);
  }
  if (j < columns) {
    const auto some = [j, columns](const auto* from)
                          __attribute__((always_inline)) { return load_some<T>(from + j, columns - j); };
    add(some, some);
  }
  constexpr int kAtOnce = kSums < kStep ? kSums : kStep;
  REFT_UNROLL
  for (int first = 0; first < kSums; first += kAtOnce) {
    Vector<T> part[kAtOnce];
    REFT_UNROLL
    for (int i = 0; i < kAtOnce; ++i) part[i] = sum[first + i];
    T total[kStep];
    store<T>(total, sum_lanes<T, kAtOnce>(part));
    for (int i = 0; i < kAtOnce; ++i) {
      const int n = (first + i) / kRanks, k = (first + i) % kRanks;
      sums[n * sums_stride + k] += total[i];
    }
  }
}

template <typename T, typename S>
static void down(StripIn strip, StripIn next_strip, Shape shape, Panel<T> panel, T* sums) {
  in_blocks<kBlockRows>(shape.rows, [&](auto rows, int n) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    const S *x[kRows], *next[kRows];
    for (int i = 0; i < kRows; ++i) {
      x[i] = at<S>(strip, n + i);
      next[i] = next_strip.row != nullptr ? at<S>(next_strip, n + i) : x[i];
    }
    in_blocks<kBlockRanks>(panel.ranks, [&](auto ranks, int k) __attribute__((always_inline)) {
      constexpr int kRanks = decltype(ranks)::value;
      const T* from = panel.data + k * panel.stride;
      T* to = sums + int64_t{n} * panel.ranks + k;
      const auto block = [&](auto fetched, int first) __attribute__((always_inline)) {
        down_block<T, S, kRows, kRanks, decltype(fetched)::value>(x, next + first, shape.columns, from,
                                                                  panel.stride, to, panel.ranks);
      };
      // Fetching is spread over the first two blocks of ranks, if there are as many.
      constexpr int kHalf = (kRows + 1) / 2;
      if (kRows < kBlockRows || next_strip.row == nullptr || k >= 2 * kBlockRanks) {
        block(Size<0>(), 0);
      } else if (k > 0) {
        block(Size<kRows - kHalf>(), kHalf);
      } else if (panel.ranks > kBlockRanks) {
        block(Size<kHalf>(), 0);
      } else {
        block(Size<kRows>(), 0);
      }
    });
  });
}

// --- up: rows plus a combination of the panel's ranks

struct Plus {
  template <typename T, typename H>
  REFT_INLINE Vector<T> of(Vector<T> x, Vector<T> update) {
    return x + update;
  }
};

struct Undo {  // the row before an update by Plus, as it was stored
  template <typename T, typename H>
  REFT_INLINE Vector<T> of(Vector<T> x, Vector<T> update) {
    return round_to<H, T>(x - update);
  }
};

// kCount: vectors of columns; 0: what is left of the columns, less than a vector.
template <typename T, typename In, typename Out, typename Combine, int kRows, int kCount>
REFT_INLINE void up_block(const In* const (&in)[kRows], const In* const (&next)[kRows],
                          Out* const (&out)[kRows], int64_t j, int left, const T* panel, int64_t stride,
                          int ranks, const T* u) {
  constexpr int kStep = kLanes<T>, kVectors = kCount > 0 ? kCount : 1;
  Vector<T> update[kRows][kVectors] = {};
  for (int k = 0; k < ranks; ++k) {
    Vector<T> a[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const T* from = panel + k * stride + j + v * kStep;
      a[v] = kCount > 0 ? load<T>(from) : load_some<T>(from, left);
    }
    for (int n = 0; n < kRows; ++n) {
      const Vector<T> factor = broadcast<Vector<T>>(u[n * ranks + k]);
      for (int v = 0; v < kVectors; ++v) update[n][v] += factor * a[v];
    }
  }
  REFT_UNROLL
  for (int n = 0; n < kRows; ++n) {
    REFT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const In* from = in[n] + j + v * kStep;
      Out* to = out[n] + j + v * kStep;
      const Vector<T> x = kCount > 0 ? load<T>(from) : load_some<T>(from, left);
      if (starts_line<In>(v * kStep)) fetch(next[n] + j + v * kStep);
      const Vector<T> y = Combine::template of<T, In>(x, update[n][v]);
      if constexpr (kCount > 0) {
        store<T>(to, y);
      } else {
        store_some<T>(to, y, left);
      }
    }
  }
}

template <typename T, typename In, typename Out, typename Combine>
static void up(StripIn from, StripIn next_strip, StripOut to, Shape shape, Panel<T> panel, const T* u) {
  constexpr int kStep = kLanes<T>;
  in_blocks<kBlockRows>(shape.rows, [&](auto rows, int n) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    const In *in[kRows], *next[kRows];
    Out* out[kRows];
    for (int i = 0; i < kRows; ++i) {
      in[i] = at<In>(from, n + i);
      next[i] = next_strip.row != nullptr ? at<In>(next_strip, n + i) : in[i];
      out[i] = at<Out>(to, n + i);
    }
    const T* factors = u + int64_t{n} * panel.ranks;
    int j = 0;
    for (; j + kBlockVectors * kStep <= shape.columns; j += kBlockVectors * kStep) {
      up_block<T, In, Out, Combine, kRows, kBlockVectors>(in, next, out, j, 0, panel.data, panel.stride,
                                                          panel.ranks, factors);
    }
    for (; j + kStep <= shape.columns; j += kStep) {
      up_block<T, In, Out, Combine, kRows, 1>(in, next, out, j, 0, panel.data, panel.stride, panel.ranks,
                                              factors);
    }
    if (j < shape.columns) {
      up_block<T, In, Out, Combine, kRows, 0>(in, next, out, j, shape.columns - j, panel.data, panel.stride,
                                              panel.ranks, factors);
    }
  });
}

// --- outer: sums over rows

template <typename T, typename H, int kRanks, int kCount, int kFetch>
REFT_INLINE void outer_block(StripIn strip, StripIn next, int rows, int64_t j, int left, const T* u,
                             int64_t u_stride, T* sums, int64_t sums_stride) {
  constexpr int kStep = kLanes<T>, kVectors = kCount > 0 ? kCount : 1;
  Vector<T> sum[kRanks][kVectors] = {};
  for (int n = 0; n < rows; ++n) {
    const T* x = at<T>(strip, n) + j;
    Vector<T> value[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      value[v] = kCount > 0 ? load<T>(x + v * kStep) : load_some<T>(x + v * kStep, left);
    }
    for (int v = 0; v < kFetch; ++v) {
      if (starts_line<H>(v * kStep)) fetch(at<H>(next, n) + j + v * kStep);
    }
    for (int k = 0; k < kRanks; ++k) {
      const Vector<T> factor = broadcast<Vector<T>>(u[n * u_stride + k]);
      for (int v = 0; v < kVectors; ++v) sum[k][v] += factor * value[v];
    }
  }
  REFT_UNROLL
  for (int k = 0; k < kRanks; ++k) {
    REFT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* to = sums + k * sums_stride + j + v * kStep;
      if constexpr (kCount > 0) {
        store<T>(to, load<T>(to) + sum[k][v]);
      } else {
        store_some<T>(to, load_some<T>(to, left) + sum[k][v], left);
      }
    }
  }
}

template <typename T, typename H>
static void outer(StripIn strip, StripIn next, Shape shape, const T* u, int64_t u_stride, int ranks, T* sums,
                  int64_t sums_stride) {
  constexpr int kStep = kLanes<T>;
  in_blocks<kBlockRows>(ranks, [&](auto block, int k) __attribute__((always_inline)) {
    constexpr int kRanks = decltype(block)::value;
    T* to = sums + k * sums_stride;
    int j = 0;
    for (; j + kBlockVectors * kStep <= shape.columns; j += kBlockVectors * kStep) {
      const auto whole = [&](auto fetched, int first) __attribute__((always_inline)) {
        outer_block<T, H, kRanks, kBlockVectors, decltype(fetched)::value>(
            strip, {next.row, next.column + first * kStep}, shape.rows, j, 0, u + k, u_stride, to,
            sums_stride);
      };
      constexpr int kHalf = kBlockVectors / 2;
      if (next.row == nullptr || k >= 2 * kBlockRows) {
        whole(Size<0>(), 0);
      } else if (k > 0) {
        whole(Size<kBlockVectors - kHalf>(), kHalf);
      } else if (ranks > kBlockRows) {
        whole(Size<kHalf>(), 0);
      } else {
        whole(Size<kBlockVectors>(), 0);
      }
    }
    for (; j + kStep <= shape.columns; j += kStep) {
      outer_block<T, H, kRanks, 1, 0>(strip, next, shape.rows, j, 0, u + k, u_stride, to, sums_stride);
    }
    if (j < shape.columns) {
      outer_block<T, H, kRanks, 0, 0>(strip, next, shape.rows, j, shape.columns - j, u + k, u_stride, to,
                                      sums_stride);
    }
  });
}

// --- dropout

constexpr int kWordsAtOnce = 4 * kWordLanes;

// The words of kWordLanes consecutive blocks of philox.h, in order: a block in each lane, of which the lower
// half counts.
REFT_INLINE void philox_words(uint64_t seed, uint64_t row, uint32_t first_block, uint32_t* words) {
  Words c0 = count_lanes() + first_block, c1 = broadcast<Words>(row), c2 = broadcast<Words>(row >> 32),
        c3 = {};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words a = multiply_low_words(c0, Words{} + 0xD2511F53u);
    const Words b = multiply_low_words(c2, Words{} + 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ (Words{} + k0);
    c2 = (a >> 32) ^ c3 ^ (Words{} + k1);
    c1 = b;
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  store_in_turns(words, (c0 & 0xffffffffu) | (c1 << 32), (c2 & 0xffffffffu) | (c3 << 32),
                 std::make_index_sequence<kWordLanes>());
}

// x / (1 - p) where kept, else 0, whatever x is.
template <typename T>
REFT_INLINE Vector<T> keep(Vector<T> x, const uint32_t* words, uint32_t threshold, T keep_scale) {
  const auto word = load_bits<Pack<int32_t, kLanes<T>>>(words);
  const auto kept = (bit_cast<Pack<int32_t, kLanes<T>>>(bit_cast<Pack<uint32_t, kLanes<T>>>(word) >> 1) >=
                     static_cast<int32_t>(threshold));
  const Vector<T> scaled = x * keep_scale;
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vector<T>>(bit_cast<Pack<int32_t, kLanes<T>>>(scaled) & kept);
  } else {
    using Mask = Pack<int64_t, kLanes<T>>;
    return bit_cast<Vector<T>>(bit_cast<Mask>(scaled) & __builtin_convertvector(kept, Mask));
  }
}

template <typename T, typename In, typename Out>
static void drop(StripIn from, StripOut to, Shape shape, const Dropout& dropout) {
  constexpr int kStep = kLanes<T>;
  const T keep_scale = static_cast<T>(dropout.keep_scale);
  for (int n = 0; n < shape.rows; ++n) {
    const In* in = at<In>(from, n);
    Out* out = at<Out>(to, n);
    for (int first = 0; first < shape.columns; first += kWordsAtOnce) {
      uint32_t words[kWordsAtOnce];
      philox_words(dropout.seed, static_cast<uint64_t>(dropout.row_number[n]),
                   static_cast<uint32_t>((dropout.column + first) / 4), words);
      const int end = first + kWordsAtOnce < shape.columns ? first + kWordsAtOnce : shape.columns;
      int j = first;
      for (; j + kStep <= end; j += kStep) {
        store<T>(out + j, keep<T>(load<T>(in + j), words + (j - first), dropout.keep_threshold, keep_scale));
      }
      if (j < end) {
        const Vector<T> x = load_some<T>(in + j, end - j);
        store_some<T>(out + j, keep<T>(x, words + (j - first), dropout.keep_threshold, keep_scale), end - j);
      }
    }
  }
}

// --- the tables

template <typename T, typename H>
constexpr Kernels<T> kTable = {
    &widen<T>,    &widen_difference<T>, &narrow<T>,         &widen_rows<T, H>,  &down<T, H>,
    &down<T, T>,  &up<T, H, H, Plus>,   &up<T, T, H, Plus>, &up<T, H, T, Plus>, &up<T, H, T, Undo>,
    &outer<T, H>, &drop<T, H, T>,       &drop<T, T, H>,
};

template <>
const Kernels<float>* kernels_of<float>(DType h_type) {
  switch (h_type) {
    case DType::kFloat16:
      return &kTable<float, Float16>;
    case DType::kBFloat16:
      return &kTable<float, BFloat16>;
    default:
      return &kTable<float, float>;
  }
}

template <>
const Kernels<double>* kernels_of<double>(DType h_type) {
  switch (h_type) {
    case DType::kFloat16:
      return &kTable<double, Float16>;
    case DType::kBFloat16:
      return &kTable<double, BFloat16>;
    case DType::kFloat32:
      return &kTable<double, float>;
    default:
      return &kTable<double, double>;
  }
}

}  // namespace reft_kernels::cpu::REFT_KERNELS_ISA
