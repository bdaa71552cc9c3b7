// One vector of the widest kind that the file is compiled for, with loads and stores of every storage type.
// Included by kernels_impl.h and matrix_kernels_impl.h alone: whatever it defines lies in the namespace of
// one instruction set, without linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define REFT_INLINE static inline __attribute__((always_inline))

// Before a loop over an array of vectors that is to stay in registers.
#if defined(__clang__)
#define REFT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define REFT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace reft_kernels::cpu::REFT_KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

template <typename T, int kCount>
struct PackOf {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T, int kCount>
using Pack = typename PackOf<T, kCount>::Type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
using Vector = Pack<T, kLanes<T>>;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
REFT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename P, typename S>
REFT_INLINE P load_bits(const S* from) {
  P p;
  std::memcpy(&p, from, sizeof p);
  return p;
}

// x in every lane. (Adding to zero would be an addition: it makes +0 of -0.)
template <typename V, typename E>
REFT_INLINE V broadcast(E x) {
  return x - V{};
}

// Halves of words, without sign, and back. (Left to themselves compilers take detours to the widest vectors.)
template <int kCount>
REFT_INLINE Pack<uint32_t, kCount> widen_halves(const void* from) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16)
    return (Pack<uint32_t, 16>)_mm512_maskz_cvtepu16_epi32(0xffff, load_bits<__m256i>(from));
#endif
#if defined(__AVX2__)
  if constexpr (kCount == 8) return (Pack<uint32_t, 8>)_mm256_cvtepu16_epi32(load_bits<__m128i>(from));
#endif
  return __builtin_convertvector(load_bits<Pack<uint16_t, kCount>>(from), Pack<uint32_t, kCount>);
}

template <int kCount>
REFT_INLINE void store_low_halves(void* to, Pack<uint32_t, kCount> words) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
    std::memcpy(to, &halves, sizeof halves);
    return;
  }
#endif
  const auto halves = __builtin_convertvector(words, Pack<uint16_t, kCount>);
  std::memcpy(to, &halves, sizeof halves);
}

// --- kCount floats from any storage type and back; rounding to the nearest, ties to even

template <int kCount>
REFT_INLINE Pack<float, kCount> floats(const float* from) {
  return load_bits<Pack<float, kCount>>(from);
}

template <int kCount>
REFT_INLINE Pack<float, kCount> floats(const double* from) {
  float narrowed[kCount];
  for (int i = 0; i < kCount; ++i) narrowed[i] = static_cast<float>(from[i]);
  return load_bits<Pack<float, kCount>>(narrowed);
}

template <int kCount>
REFT_INLINE Pack<float, kCount> floats(const BFloat16* from) {
  return bit_cast<Pack<float, kCount>>(widen_halves<kCount>(from) << 16);
}

template <int kCount>
REFT_INLINE Pack<float, kCount> floats(const Float16* from) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) return (Pack<float, 16>)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(from));
#endif
#if defined(__F16C__)
  if constexpr (kCount == 8) return (Pack<float, 8>)_mm256_cvtph_ps(load_bits<__m128i>(from));
  if constexpr (kCount == 4) return (Pack<float, 4>)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__aarch64__)
  if constexpr (kCount == 4) return (Pack<float, 4>)vcvt_f32_f16(load_bits<float16x4_t>(from));
#endif
  using U = Pack<uint32_t, kCount>;
  using F = Pack<float, kCount>;
  const U half = widen_halves<kCount>(from);
  const U magnitude = (half & 0x7fffu) << 13;
  const U exponent = magnitude & (0x7c00u << 13);
  const U normal = magnitude + (112u << 23);
  const U special = magnitude + (224u << 23);  // infinities and NaN
  // A subnormal is what the number 2^-14 + itself has beyond 2^-14.
  const F least = bit_cast<F>(U{} + (113u << 23));
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude + (113u << 23)) - least);
  const U finite = exponent == 0u ? subnormal : normal;
  return bit_cast<F>((exponent == (0x7c00u << 13) ? special : finite) | ((half & 0x8000u) << 16));
}

template <int kCount>
REFT_INLINE void store_floats(float* to, Pack<float, kCount> v) {
  std::memcpy(to, &v, sizeof v);
}

template <int kCount>
REFT_INLINE void store_floats(double* to, Pack<float, kCount> v) {
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<double>(v[i]);
}

template <int kCount>
REFT_INLINE void store_floats(BFloat16* to, Pack<float, kCount> v) {
  using U = Pack<uint32_t, kCount>;
  const U bits = bit_cast<U>(v);
  const U rounding = ((bits >> 16) & 1u) + 0x7fffu;
  store_low_halves<kCount>(to,
                           (v == v ? bits + rounding : bits) >> 16);  // what arithmetic gives is a quiet NaN
}

template <int kCount>
REFT_INLINE void store_floats(Float16* to, Pack<float, kCount> v) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof halves);
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (kCount == 8) {
    const __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof halves);
    return;
  }
  if constexpr (kCount == 4) {
    const __m128i halves = _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, 8);
    return;
  }
#elif defined(__aarch64__)
  if constexpr (kCount == 4) {
    const float16x4_t halves = vcvt_f16_f32((float32x4_t)v);
    std::memcpy(to, &halves, sizeof halves);
    return;
  }
#endif
  using U = Pack<uint32_t, kCount>;
  using F = Pack<float, kCount>;
  const U bits = bit_cast<U>(v);
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const U normal = (magnitude + 0xfffu - (112u << 23) + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 2^-1 lets the sum's own rounding cut a subnormal to its bits.
  const U half = U{} + (126u << 23);
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + bit_cast<F>(half)) - half;
  const U large = v != v ? U{} + 0x7e00u : U{} + 0x7c00u;
  const U small = magnitude < (113u << 23) ? subnormal : normal;
  store_low_halves<kCount>(to, (magnitude >= (143u << 23) ? large : small) | (sign >> 16));
}

// --- vectors of the accumulator's type from any storage type and back

template <typename T, typename S>
REFT_INLINE Vector<T> load(const S* from) {
  if constexpr (sizeof(T) == 4) {
    return floats<kLanes<T>>(from);
  } else if constexpr (sizeof(S) == 8) {
    return load_bits<Vector<T>>(from);
  } else {
    return __builtin_convertvector(floats<kLanes<T>>(from), Vector<T>);
  }
}

template <typename T, typename S>
REFT_INLINE void store(S* to, Vector<T> v) {
  if constexpr (sizeof(T) == 4) {
    store_floats<kLanes<T>>(to, v);
  } else if constexpr (sizeof(S) == 8) {
    std::memcpy(to, &v, sizeof v);
  } else {
    store_floats<kLanes<T>>(to, __builtin_convertvector(v, Pack<float, kLanes<T>>));
  }
}

// The first `count` lanes; the others are zero.
template <typename T, typename S>
REFT_INLINE Vector<T> load_some(const S* from, int count) {
  S some[kLanes<T>] = {};
  std::memcpy(some, from, static_cast<size_t>(count) * sizeof(S));
  return load<T>(some);
}

template <typename T, typename S>
REFT_INLINE void store_some(S* to, Vector<T> v, int count) {
  S some[kLanes<T>];
  store<T>(some, v);
  std::memcpy(to, some, static_cast<size_t>(count) * sizeof(S));
}

// As if stored as an S and loaded.
template <typename S, typename T>
REFT_INLINE Vector<T> round_to(Vector<T> v) {
  S rounded[kLanes<T>];
  store<T>(rounded, v);
  return load<T>(rounded);
}

// --- sums over lanes

// Halves the parts of kWidth lanes of a and of b by adding their upper to their lower half: a's parts, then
// b's.
template <int kWidth, typename T, size_t... kLane>
REFT_INLINE Vector<T> fold(Vector<T> a, Vector<T> b, std::index_sequence<kLane...>) {
  constexpr int kHalf = kLanes<T> / 2, kPart = kWidth / 2;
  constexpr auto from = [](int lane) {
    return lane / kHalf * kLanes<T> + lane % kHalf / kPart * kWidth + lane % kHalf % kPart;
  };
  return __builtin_shufflevector(a, b, from(kLane)...) +
         __builtin_shufflevector(a, b, (from(kLane) + kPart)...);
}

// Lane i of the result is the sum of the lanes of v[i], which for every v is added up in the same order.
template <typename T, int kCount, int kWidth = kLanes<T>>
REFT_INLINE Vector<T> sum_lanes(const Vector<T> (&v)[kCount]) {
  static_assert(kCount <= kWidth);
  if constexpr (kWidth == 1) {
    return v[0];
  } else {
    constexpr int kFolded = (kCount + 1) / 2;
    Vector<T> folded[kFolded];
    for (int i = 0; i < kFolded; ++i) {
      const Vector<T> second = 2 * i + 1 < kCount ? v[2 * i + 1 < kCount ? 2 * i + 1 : 0] : Vector<T>{};
      folded[i] = fold<kWidth, T>(v[2 * i], second, std::make_index_sequence<kLanes<T>>());
    }
    return sum_lanes<T, kFolded, kWidth / 2>(folded);
  }
}

// --- the products of the lower halves of 64-bit lanes

using Words = Pack<uint64_t, kVectorBytes / 8>;
constexpr int kWordLanes = kVectorBytes / 8;

// 0, 1, 2, ...
REFT_INLINE Words count_lanes() {
  static constexpr uint64_t kCount[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return load_bits<Words>(kCount);
}

// a[0], b[0], a[1], b[1], ...
template <size_t... kLane>
REFT_INLINE void store_in_turns(void* to, Words a, Words b, std::index_sequence<kLane...>) {
  constexpr auto from = [](int lane) { return lane / 2 + lane % 2 * kWordLanes; };
  const Words low = __builtin_shufflevector(a, b, from(kLane)...);
  const Words high = __builtin_shufflevector(a, b, (from(kLane) + kWordLanes / 2)...);
  std::memcpy(to, &low, sizeof low);
  std::memcpy(static_cast<char*>(to) + sizeof low, &high, sizeof high);
}

REFT_INLINE Words multiply_low_words(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

}  // namespace reft_kernels::cpu::REFT_KERNELS_ISA
