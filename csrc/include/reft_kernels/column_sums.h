// How the GPU kernels of matrices with orthonormal rows cut their work: a matrix of d columns goes to blocks
// in slabs, a slab is staged in shared memory chunk by chunk, and runs of its columns are dealt out among
// groups of threads, each of which sums their products.
//
// Slabs, runs and groups follow from the rank alone, and with them the order of every sum: neither the
// device, nor the grid, nor the other matrices of a launch change a bit. The chunk follows from the shared
// memory besides.
#pragma once

#include "reft_kernels/types.h"

namespace reft_kernels {

constexpr int kMatrixThreads = 256;      // in a block
constexpr int kMaxMatrixRank = 64;       //
constexpr int kMaxSharedSolveRank = 32;  // up to which the r x r mathematics is done in shared memory
constexpr int kScratchBytes = 128;       // of shared memory, for sums over a block
constexpr int kTileSums = 16;            // sums are taken over tiles of 4 x 4

REFT_HOST_DEVICE constexpr int quads_of(int r) {
  return (r + 3) / 4;
}

// Columns of a slab.
REFT_HOST_DEVICE constexpr int slab_of(int r) {
  return r <= 8 ? 1024 : 512;
}

REFT_HOST_DEVICE constexpr int slabs_of(int64_t d, int r) {
  return static_cast<int>((d + slab_of(r) - 1) / slab_of(r));
}

// Columns of a run, the least that is staged at once.
REFT_HOST_DEVICE constexpr int run_of(int r) {
  return r <= 8 ? 256 : r <= 32 ? 64 : 32;
}

// Threads that share a tile of sums, each taking some of a run's columns.
REFT_HOST_DEVICE constexpr int lanes_of(int r) {
  return r <= 8 ? 16 : r <= 16 ? 4 : 1;
}

// Groups of threads among which the runs of a slab are dealt out, where the tiles are few.
REFT_HOST_DEVICE constexpr int groups_of(int r, int tiles) {
  const int threads = tiles * lanes_of(r), runs = slab_of(r) / run_of(r);
  const int fitting = 4 * threads <= kMatrixThreads ? 4 : 2 * threads <= kMatrixThreads ? 2 : 1;
  return fitting < runs ? fitting : runs;
}

// Tiles on and above the diagonal of a square of so many quads a side: tile b (b + 1) / 2 + a is that of
// quads a <= b.
REFT_HOST_DEVICE constexpr int upper_tiles(int quads) {
  return quads * (quads + 1) / 2;
}

// Float64 sums that the slabs of a matrix leave.
REFT_HOST_DEVICE constexpr int64_t partials_of(int64_t d, int r, int tiles) {
  return int64_t{slabs_of(d, r)} * groups_of(r, tiles) * tiles * kTileSums;
}

// So many elements, rounded up to tiles.
REFT_HOST_DEVICE constexpr int64_t whole_tiles(int64_t elements) {
  return (elements + kTileSums - 1) / kTileSums * kTileSums;
}

// Bytes of so many staged columns, a multiple of 4, of so many quads each.
REFT_HOST_DEVICE constexpr int staged_bytes(int columns, int quads) {
  return (columns * quads + columns / 4) * 16;
}

// Where things are in a block's shared memory.
struct MatrixLayout {
  int weights = 0;        // of pass 2
  int solve = 0;          // the r x r mathematics, if it is done there
  int stage = 0;          // staged columns
  int chunk = 0;          // columns staged at once
  bool resident = false;  // a slab stays staged while the r x r mathematics is done
  int total = 0;
};

REFT_HOST_DEVICE constexpr int aligned_16(int bytes) {
  return (bytes + 15) / 16 * 16;
}

// For slabs of rank r of which columns have `quads` quads, whose products are summed over `tiles` tiles.
REFT_HOST_DEVICE MatrixLayout matrix_layout(int r, int quads, int tiles, int weight_bytes, int solve_bytes,
                                            int shared_bytes) {
  MatrixLayout at;
  at.weights = kScratchBytes;
  at.solve = at.weights + aligned_16(weight_bytes);
  const int solved = at.solve + (r <= kMaxSharedSolveRank ? aligned_16(solve_bytes) : 0);
  at.chunk = slab_of(r);
  at.resident = solved + staged_bytes(at.chunk, quads) <= shared_bytes;
  at.stage = at.resident ? solved : at.solve;
  const int least = run_of(r) * groups_of(r, tiles);
  while (at.chunk > least && at.stage + staged_bytes(at.chunk, quads) > shared_bytes) at.chunk /= 2;
  const int end = at.stage + staged_bytes(at.chunk, quads);
  at.total = end > solved ? end : solved;
  return at;
}

}  // namespace reft_kernels
