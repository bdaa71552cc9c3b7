// How the work on some matrices is shared out among threads: in phases, of which each goes through a matrix
// in chunks, adds up what the chunks have summed, and does the small mathematics that the next phase needs.
//
// A matrix stays with one thread, in its cache from phase to phase, where that keeps all threads busy; else
// each phase's chunks are shared out. Sums are added chunk by chunk in the same order either way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "reft_kernels/launch.h"

namespace reft_kernels::cpu {

constexpr int kMaxChunks = 16;
constexpr int64_t kChunkStep = 512;  // a chunk's columns are a multiple of it

inline int64_t chunk_columns(int64_t columns) {
  const int64_t steps = (columns + kMaxChunks * kChunkStep - 1) / (kMaxChunks * kChunkStep);
  return std::max<int64_t>(steps, 1) * kChunkStep;
}

// The matrices of some work: `Work` has
//
//   int64_t count() const, double cost(m) const          in multiplications or so
//   int phases() const, int64_t chunks(m, phase) const   0 where a matrix has no such phase
//   int64_t sums(m) const, int64_t state(m) const        elements and bytes that a matrix needs
//   void run(m, phase, chunk, const char* state, double* sums) const     adds to sums, which are zero
//   void finish(m, phase, char* state, double* sums) const   of a matrix that has the phase, with the sums of
//   all chunks
template <typename Work>
class SharedOut {
 public:
  SharedOut(const Work& work, int threads, const ParallelFor& parallel_for)
      : work_(work), parallel_for_(parallel_for) {
    double total = 0;
    for (int64_t m = 0; m < work.count(); ++m) total += work.cost(m);
    threads_ = total < kWorthThreads ? 1 : std::max(threads, 1);
    whole_ = divide(total);
  }

  void run() const {
    if (whole_) {
      run_whole();
    } else {
      run_split();
    }
  }

 private:
  static constexpr double kWorthThreads = 1e5;
  static constexpr double kBalanced = 1.3;

  // Ranges of matrices for the threads, of about the same cost; whether that is balanced.
  bool divide(double total) {
    std::vector<double> load(static_cast<size_t>(threads_));
    begin_.assign(static_cast<size_t>(threads_) + 1, work_.count());
    double before = 0;
    size_t thread = 0;
    begin_[0] = 0;
    for (int64_t m = 0; m < work_.count(); ++m) {
      const double cost = work_.cost(m), share = (before + cost / 2) / std::max(total, 1.0) * threads_;
      while (thread + 1 < load.size() && share >= static_cast<double>(thread + 1)) begin_[++thread] = m;
      load[thread] += cost;
      before += cost;
    }
    return *std::max_element(load.begin(), load.end()) <= kBalanced * total / threads_;
  }

  void one_matrix(int64_t m, char* state, double* sums, double* part) const {
    const int64_t count = work_.sums(m);
    for (int phase = 0; phase < work_.phases(); ++phase) {
      const int64_t chunks = work_.chunks(m, phase);
      if (chunks == 0) continue;
      std::fill_n(sums, count, 0.0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::fill_n(part, count, 0.0);
        work_.run(m, phase, chunk, state, part);
        add(part, count, sums);
      }
      work_.finish(m, phase, state, sums);
    }
  }

  void run_whole() const {
    int64_t sums = 0, state = 0;
    for (int64_t m = 0; m < work_.count(); ++m) {
      sums = std::max(sums, work_.sums(m));
      state = std::max(state, work_.state(m));
    }
    const auto range = [&](int64_t first, int64_t last) {
      const std::unique_ptr<double[]> memory(new double[static_cast<size_t>(2 * sums)]);
      const std::unique_ptr<double[]> states(new double[static_cast<size_t>((state + 7) / 8)]);
      for (int64_t thread = first; thread < last; ++thread) {
        for (int64_t m = begin_[static_cast<size_t>(thread)]; m < begin_[static_cast<size_t>(thread) + 1];
             ++m) {
          one_matrix(m, reinterpret_cast<char*>(states.get()), memory.get(), memory.get() + sums);
        }
      }
    };
    if (threads_ == 1) {
      range(0, 1);
    } else {
      parallel_for_(threads_, range);
    }
  }

  struct Item {
    int64_t matrix, chunk;
  };

  void run_split() const {
    const int64_t count = work_.count();
    std::vector<int64_t> state_at(static_cast<size_t>(count)), sums_at(static_cast<size_t>(count));
    int64_t state = 0, sums = 0;
    for (int64_t m = 0; m < count; ++m) {
      state_at[static_cast<size_t>(m)] = state;
      sums_at[static_cast<size_t>(m)] = sums;
      state += (work_.state(m) + 7) / 8;
      int64_t most = 0;
      for (int phase = 0; phase < work_.phases(); ++phase) most = std::max(most, work_.chunks(m, phase));
      sums += (most + 1) * work_.sums(m);
    }
    const std::unique_ptr<double[]> states(new double[static_cast<size_t>(state)]);
    const std::unique_ptr<double[]> memory(new double[static_cast<size_t>(sums)]);
    const auto state_of = [&](int64_t m) {
      return reinterpret_cast<char*>(states.get() + state_at[static_cast<size_t>(m)]);
    };
    // A matrix's sums, and behind them those of its chunks.
    const auto sums_of = [&](int64_t m, int64_t chunk) {
      return memory.get() + sums_at[static_cast<size_t>(m)] + (chunk + 1) * work_.sums(m);
    };
    std::vector<Item> items;
    for (int phase = 0; phase < work_.phases(); ++phase) {
      items.clear();
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t chunk = 0; chunk < work_.chunks(m, phase); ++chunk) items.push_back({m, chunk});
      }
      parallel_for_(static_cast<int64_t>(items.size()), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Item item = items[static_cast<size_t>(i)];
          double* part = sums_of(item.matrix, item.chunk);
          std::fill_n(part, work_.sums(item.matrix), 0.0);
          work_.run(item.matrix, phase, item.chunk, state_of(item.matrix), part);
        }
      });
      parallel_for_(count, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
          const int64_t chunks = work_.chunks(m, phase);
          if (chunks == 0) continue;
          double* total = sums_of(m, -1);
          std::fill_n(total, work_.sums(m), 0.0);
          for (int64_t chunk = 0; chunk < chunks; ++chunk) add(sums_of(m, chunk), work_.sums(m), total);
          work_.finish(m, phase, state_of(m), total);
        }
      });
    }
  }

  static void add(const double* part, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += part[i];
  }

  const Work& work_;
  const ParallelFor& parallel_for_;
  int threads_;
  bool whole_;
  std::vector<int64_t> begin_;  // of each thread's matrices, and their end
};

}  // namespace reft_kernels::cpu
