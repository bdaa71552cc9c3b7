// The inner loops of matrix_kernels.h, compiled once for every instruction set, as those of kernels_impl.h
// are and under the same rules.
#pragma once

#include "matrix_kernels.h"
#include "vec.h"

namespace reft_kernels::cpu::REFT_KERNELS_ISA {

// --- transposition of a strip's columns, which have `ranks` elements each

// kRows rows of kCount elements each, one after the other.
template <typename T, int kCount, int kRows, size_t... kLane>
REFT_INLINE Pack<T, kCount * kRows> joined(Pack<T, kCount * kRows / 2> a, Pack<T, kCount * kRows / 2> b,
                                           std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, kLane...);
}

template <typename T, int kCount, int kRows>
REFT_INLINE Pack<T, kCount * kRows> load_rows(const T* from, int64_t stride) {
  if constexpr (kRows == 1) {
    return load_bits<Pack<T, kCount>>(from);
  } else {
    return joined<T, kCount, kRows>(load_rows<T, kCount, kRows / 2>(from, stride),
                                    load_rows<T, kCount, kRows / 2>(from + kRows / 2 * stride, stride),
                                    std::make_index_sequence<kCount * kRows>());
  }
}

template <typename T, int kCount, int kRows>
REFT_INLINE void store_rows(T* to, int64_t stride, Vector<T> v) {
  if (kRows == 1 || stride == kCount) return store<T>(to, v);
  T elements[kLanes<T>];
  std::memcpy(elements, &v, sizeof v);
  REFT_UNROLL
  for (int i = 0; i < kRows; ++i) std::memcpy(to + i * stride, elements + i * kCount, kCount * sizeof(T));
}

// Lanes of a and b: kFirst, kFirst + 2, ...
template <int kFirst, typename T, size_t... kLane>
REFT_INLINE Vector<T> every_second(Vector<T> a, Vector<T> b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + kFirst)...);
}

// In turns a lane of a and one of b, from lane kFirst on.
template <int kFirst, typename T, size_t... kLane>
REFT_INLINE Vector<T> in_turns(Vector<T> a, Vector<T> b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes<T>)...);
}

// Vectors that hold kLanes columns of kCount ranks, column by column, become such that hold a rank each. A
// step moves the lowest bit of an element's place to the top.
template <typename T, int kCount>
REFT_INLINE void split_ranks(Vector<T> (&v)[kCount]) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>();
  REFT_UNROLL
  for (int step = 1; step < kCount; step *= 2) {
    Vector<T> next[kCount];
    REFT_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      next[i] = every_second<0, T>(v[2 * i], v[2 * i + 1], lanes);
      next[i + kCount / 2] = every_second<1, T>(v[2 * i], v[2 * i + 1], lanes);
    }
    REFT_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] = next[i];
  }
}

template <typename T, int kCount>
REFT_INLINE void join_ranks(Vector<T> (&v)[kCount]) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>();
  REFT_UNROLL
  for (int step = 1; step < kCount; step *= 2) {
    Vector<T> next[kCount];
    REFT_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = in_turns<0, T>(v[i], v[i + kCount / 2], lanes);
      next[2 * i + 1] = in_turns<kLanes<T> / 2, T>(v[i], v[i + kCount / 2], lanes);
    }
    REFT_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] = next[i];
  }
}

// kCount ranks of kLanes columns.
template <typename T, int kCount>
REFT_INLINE void ranks_to_rows_block(const T* from, int ranks, T* to, int64_t stride) {
  constexpr int kRows = kLanes<T> / kCount;
  Vector<T> v[kCount];
  REFT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const T* at = from + i * kRows * int64_t{ranks};
    v[i] = ranks == kCount ? load<T>(at) : load_rows<T, kCount, kRows>(at, ranks);
  }
  split_ranks<T, kCount>(v);
  REFT_UNROLL
  for (int k = 0; k < kCount; ++k) store<T>(to + k * stride, v[k]);
}

template <typename T, int kCount>
REFT_INLINE void rows_to_ranks_block(const T* from, int64_t stride, int ranks, T* to) {
  constexpr int kRows = kLanes<T> / kCount;
  Vector<T> v[kCount];
  REFT_UNROLL
  for (int k = 0; k < kCount; ++k) v[k] = load<T>(from + k * stride);
  join_ranks<T, kCount>(v);
  REFT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    store_rows<T, kCount, kRows>(to + i * kRows * int64_t{ranks}, ranks, v[i]);
  }
}

// Calls `block` with the size, as a type, and the first rank of blocks of kLargest ranks, then of halves of
// it.
template <int kSize>
struct BlockSize {
  static constexpr int value = kSize;
};

template <int kLargest, typename Block>
REFT_INLINE void in_halving_blocks(int begin, int ranks, const Block& block) {
  for (; begin + kLargest <= ranks; begin += kLargest) block(BlockSize<kLargest>(), begin);
  if constexpr (kLargest > 1) in_halving_blocks<kLargest / 2>(begin, ranks, block);
}

// Column by column outside, so that memory is gone through once and in order. As many columns are fetched
// meanwhile: of the next strip, if there is one.
template <typename T>
static void ranks_to_rows(const T* from, int columns, int ranks, T* to, int64_t stride) {
  constexpr int kStep = kLanes<T>, kLine = 64 / static_cast<int>(sizeof(T));
  const int64_t ahead = columns * int64_t{ranks};
  int j = 0;
  for (; j + kStep <= columns; j += kStep) {
    const T* const at = from + j * int64_t{ranks};
    for (int i = 0; i < kStep * ranks; i += kLine) __builtin_prefetch(at + ahead + i, 0, 3);
    in_halving_blocks<kStep>(0, ranks, [&](auto size, int k) __attribute__((always_inline)) {
      ranks_to_rows_block<T, decltype(size)::value>(at + k, ranks, to + k * stride + j, stride);
    });
  }
  for (; j < columns; ++j) {
    for (int k = 0; k < ranks; ++k) to[k * stride + j] = from[j * int64_t{ranks} + k];
  }
}

template <typename T>
static void rows_to_ranks(const T* from, int64_t stride, int columns, int ranks, T* to) {
  constexpr int kStep = kLanes<T>;
  int j = 0;
  for (; j + kStep <= columns; j += kStep) {
    in_halving_blocks<kStep>(0, ranks, [&](auto size, int k) __attribute__((always_inline)) {
      rows_to_ranks_block<T, decltype(size)::value>(from + k * stride + j, stride, ranks,
                                                    to + j * int64_t{ranks} + k);
    });
  }
  for (; j < columns; ++j) {
    for (int k = 0; k < ranks; ++k) to[j * int64_t{ranks} + k] = from[k * stride + j];
  }
}

// --- element by element

template <typename T>
static void scale(const T* from, T first, T second, int64_t count, T* to) {
  constexpr int kStep = kLanes<T>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store<T>(to + i, load<T>(from + i) * first * second);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store_some<T>(to + i, load_some<T>(from + i, rest) * first * second, rest);
}

REFT_INLINE Vector<double> square(Vector<double> x) {
  return x * x;
}

template <typename T>
static double sum_squares(const T* x, T factor, int64_t count) {
  // Of floats a vector has two of doubles.
  constexpr int kStep = kLanes<T>, kHalves = kStep / kLanes<double>, kSums = 4;
  Vector<double> sums[kSums] = {};
  const auto add = [&](Vector<T> v, int at) __attribute__((always_inline)) {
    v *= factor;
    if constexpr (kHalves == 1) {
      sums[at] += square(v);
    } else {
      Pack<T, kLanes<double>> half[2];
      std::memcpy(half, &v, sizeof v);
      sums[2 * (at % (kSums / 2))] += square(__builtin_convertvector(half[0], Vector<double>));
      sums[2 * (at % (kSums / 2)) + 1] += square(__builtin_convertvector(half[1], Vector<double>));
    }
  };
  int64_t i = 0;
  for (; i + kSums * kStep <= count; i += kSums * kStep) {
    REFT_UNROLL
    for (int s = 0; s < kSums; ++s) add(load<T>(x + i + s * kStep), s);
  }
  for (; i + kStep <= count; i += kStep) add(load<T>(x + i), 0);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) add(load_some<T>(x + i, rest), 0);
  const Vector<double> lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) total += lanes[lane];
  return total;
}

#if defined(__AVX512F__)
REFT_INLINE Pack<float, 16> square_root(Pack<float, 16> x) {
  return (Pack<float, 16>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
}
REFT_INLINE Pack<double, 8> square_root(Pack<double, 8> x) {
  return (Pack<double, 8>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
}
#elif defined(__AVX2__)
REFT_INLINE Pack<float, 8> square_root(Pack<float, 8> x) {
  return (Pack<float, 8>)_mm256_sqrt_ps((__m256)x);
}
REFT_INLINE Pack<double, 4> square_root(Pack<double, 4> x) {
  return (Pack<double, 4>)_mm256_sqrt_pd((__m256d)x);
}
#elif defined(__x86_64__)
REFT_INLINE Pack<float, 4> square_root(Pack<float, 4> x) {
  return (Pack<float, 4>)_mm_sqrt_ps((__m128)x);
}
REFT_INLINE Pack<double, 2> square_root(Pack<double, 2> x) {
  return (Pack<double, 2>)_mm_sqrt_pd((__m128d)x);
}
#else
template <typename V>
REFT_INLINE V square_root(V x) {
  for (size_t lane = 0; lane < sizeof x / sizeof x[0]; ++lane) {
    x[lane] = sizeof x[0] == 4 ? __builtin_sqrtf(static_cast<float>(x[lane])) : __builtin_sqrt(x[lane]);
  }
  return x;
}
#endif

template <typename T>
static void adamw(T* p, const T* gradient, T* m, T* v, int64_t count, const AdamWFactors<T>& f) {
  constexpr int kStep = kLanes<T>;
  const auto step = [&f](const auto& read, const auto& write, T* p_at, const T* g_at, T* m_at,
                         T* v_at) __attribute__((always_inline)) {
    const Vector<T> g = read(g_at) * f.first_factor * f.second_factor;
    const Vector<T> old_m = read(m_at);
    // From the nearer end, as torch.lerp: a weight of 1 gives g itself.
    const Vector<T> new_m = f.weight1 < T(0.5) ? old_m + (g - old_m) * f.weight1 : g - (g - old_m) * f.beta1;
    const Vector<T> new_v = read(v_at) * f.beta2 + g * f.weight2 * g;
    const Vector<T> denominator = square_root(new_v) * f.root_correction + f.eps;
    write(p_at, read(p_at) * f.decay - new_m / denominator * f.rate);
    write(m_at, new_m);
    write(v_at, new_v);
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    step([](const T* from) __attribute__((always_inline)) { return load<T>(from); },
         [](T* to, Vector<T> x) __attribute__((always_inline)) { store<T>(to, x); }, p + i, gradient + i,
         m + i, v + i);
  }
  const int rest = static_cast<int>(count - i);
  if (rest > 0) {
    step([rest](const T* from) __attribute__((always_inline)) { return load_some<T>(from, rest); },
         [rest](T* to, Vector<T> x) __attribute__((always_inline)) { store_some<T>(to, x, rest); }, p + i,
         gradient + i, m + i, v + i);
  }
}

// --- the mathematics between the passes

struct Alone {
  using Row = Vector<double>;
  int rank() const { return 0; }
  int size() const { return 1; }
  void sync() const {}
};

template <typename T>
static void weights(const Tops<T>& tops, const double* gram, const OrthonormalizeFactors& factors, T* u,
                    double* head, double* work) {
  orthonormalize_weights(Alone(), tops, gram, factors, u, head, work);
}

template <typename T>
static void backward_weights(const Tops<T>& tops, const double* sums, const OrthonormalizeFactors& factors,
                             T* u, double* head, double* work) {
  orthonormalize_backward_weights(Alone(), tops, sums, factors, u, head, work);
}

static double root(int r, double* A, double* root, double* work) {
  return inverse_root(Alone(), r, A, root, work, [](double x) { return __builtin_sqrt(x); });
}

// --- the tables

template <typename T>
constexpr MatrixKernels<T> kMatrixTable = {
    &ranks_to_rows<T>, &rows_to_ranks<T>,    &scale<T>, &sum_squares<T>, &adamw<T>,
    &weights<T>,       &backward_weights<T>, &root,
};

template <>
const MatrixKernels<float>* matrix_kernels_of<float>() {
  return &kMatrixTable<float>;
}

template <>
const MatrixKernels<double>* matrix_kernels_of<double>() {
  return &kMatrixTable<double>;
}

}  // namespace reft_kernels::cpu::REFT_KERNELS_ISA
