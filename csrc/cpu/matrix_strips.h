// How a matrix [r, d], or [d, r], is cut along d: into chunks, which are what threads share, and those into
// strips, whose sums are short enough for float32.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "matrix_work.h"
#include "tiles.h"

namespace reft_kernels::cpu {

constexpr int kGramRows = 4;  // that are multiplied with a panel at once

// Some r x r matrices in scratch memory.
struct WorkMatrices {
  WorkMatrices(int64_t count, int64_t r) : WorkMatrices(count * r * r) {}
  explicit WorkMatrices(int64_t all) : elements(all), scratch(*this) {}
  void place(Scratch& s) { s.take(at, elements); }

  int64_t elements;
  double* at;
  Scratch scratch;
};

inline int64_t chunks_of(int64_t d) {
  return (d + chunk_columns(d) - 1) / chunk_columns(d);
}

// The columns of a strip of so many rows of E, which divide a chunk's: no more than 256, so that float32 sums
// over them keep their digits, and such that they stay in the cache.
template <typename E>
int64_t strip_of(int64_t rows) {
  constexpr int64_t kStripBytes = 192 << 10;
  int64_t columns = 256;
  while (columns > 64 && columns * rows * static_cast<int64_t>(sizeof(E)) > kStripBytes) columns /= 2;
  return columns;
}

// From a row of a strip to the next, in scratch memory: a cache line more, so that the rows' beginnings do
// not compete for the same places of the cache.
template <typename E>
int64_t padded_stride(int64_t columns) {
  return columns + 64 / static_cast<int64_t>(sizeof(E));
}

template <typename Strip>
void for_strips_of_chunk(int64_t d, int64_t strip_columns, int64_t chunk, const Strip& strip) {
  const int64_t begin = chunk * chunk_columns(d), end = std::min(d, begin + chunk_columns(d));
  for (int64_t column = begin; column < end; column += strip_columns) {
    strip(column, static_cast<int>(std::min(strip_columns, end - column)));
  }
}

template <typename T>
void add_to(const T* from, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(from[i]);
}

// Adds the upper part of the Gram matrix of a panel's rows to `sums` [ranks, ranks], some of what is below it
// too. `rows` has room for kGramRows, `products` for kGramRows * ranks.
template <typename T>
void add_gram(const Kernels<T>& kernels, Panel<T> panel, const void** rows, int columns, T* products,
              double* sums) {
  for (int first = 0; first < panel.ranks; first += kGramRows) {
    const int count = std::min(kGramRows, panel.ranks - first), ranks = panel.ranks - first;
    for (int n = 0; n < count; ++n) rows[n] = panel.data + (first + n) * panel.stride;
    std::fill_n(products, int64_t{count} * ranks, T(0));
    kernels.down_wide({rows, 0}, {nullptr, 0}, {count, columns},
                      {panel.data + first * panel.stride, panel.stride, ranks}, products);
    for (int n = 0; n < count; ++n) {
      add_to(products + int64_t{n} * ranks, ranks, sums + int64_t{first + n} * panel.ranks + first);
    }
  }
}

}  // namespace reft_kernels::cpu
