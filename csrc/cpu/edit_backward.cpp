// The backward edit on the CPU: two phases, over rows and over columns, and the gradients of the biases.
#include "backward_columns.h"
#include "backward_rows.h"

namespace reft_kernels::cpu {

namespace {

// db = sum gs, dc = -gamma sum gd; summed up tile by tile, like the other gradients.
template <typename T>
class BackwardBiases {
 public:
  explicit BackwardBiases(const Backward<T>& backward) : b_(backward), r_(b_.edit.r), scratch_(*this) {}

  void place(Scratch& s) {
    s.take(zero_, r_);
    s.take(sums_, r_);
    s.take(tile_, r_);
  }

  void run() const {
    const T* gd = static_cast<const T*>(b_.p.gd);
    const T* gs = b_.edit.linear() ? gd : static_cast<const T*>(b_.p.gs);
    std::fill_n(zero_, r_, T(0));
    for (int64_t group = 0; group < b_.edit.groups; ++group) {
      if (b_.p.db.data != nullptr) {
        sum(group, gs);
        b_.deliver(b_.p.db, group * r_, r_, sums_, nullptr);
      }
      if (b_.p.dc.data != nullptr) {
        if (b_.edit.subtract) sum(group, gd);
        b_.deliver(b_.p.dc, group * r_, r_, zero_, b_.edit.subtract ? sums_ : nullptr);
      }
    }
  }

 private:
  void sum(int64_t group, const T* values) const {
    std::fill_n(sums_, r_, T(0));
    const int64_t end = b_.slots.group_end(group);
    for (int64_t first = b_.slots.group_begin(group); first < end; first += kTileRows) {
      std::fill_n(tile_, r_, T(0));
      for (int64_t i = first; i < std::min(end, first + kTileRows); ++i) {
        const T* row = values + b_.slots[i] * r_;
        for (int64_t k = 0; k < r_; ++k) tile_[k] += row[k];
      }
      for (int64_t k = 0; k < r_; ++k) sums_[k] += tile_[k];
    }
  }

  const Backward<T>& b_;
  int64_t r_;
  T *zero_, *sums_, *tile_;
  Scratch scratch_;
};

template <typename T>
void backward(const EditBackwardParams& params, const ParallelFor& parallel_for) {
  const Edit& edit = params.edit;
  const Slots slots(edit);
  if (params.copy_idle && params.dh.data != nullptr) {
    copy_idle_rows(edit, slots, params.grad, params.dh, parallel_for);
  }
  const Backward<T> shared(params, slots);
  const int64_t active = slots.active();
  const double elements = static_cast<double>(active) * static_cast<double>(edit.d);
  if (shared.needs_gd && active > 0) {
    const BackwardRows<T> rows(shared);
    for_ranges(parallel_for, (active + kRowsAtOnce - 1) / kRowsAtOnce, elements * (edit.r + 2),
               [&](int64_t begin, int64_t end) {
                 rows.run(begin * kRowsAtOnce, std::min(end * kRowsAtOnce, active));
               });
  }
  if (params.db.data != nullptr || params.dc.data != nullptr) BackwardBiases<T>(shared).run();
  if ((shared.wants_h || shared.wants_R || shared.wants_W) && edit.d > 0) {
    const BackwardColumns<T> columns(shared);
    for_ranges(parallel_for, (edit.d + kColumnsAtOnce - 1) / kColumnsAtOnce, elements * (3 * edit.r + 4),
               [&](int64_t begin, int64_t end) {
                 columns.run(begin * kColumnsAtOnce, std::min(end * kColumnsAtOnce, edit.d));
               });
  }
}

}  // namespace

void edit_backward(const EditBackwardParams& params, const ParallelFor& parallel_for) {
  if (params.edit.accumulator == DType::kFloat64) {
    backward<double>(params, parallel_for);
  } else {
    backward<float>(params, parallel_for);
  }
}

}  // namespace reft_kernels::cpu
