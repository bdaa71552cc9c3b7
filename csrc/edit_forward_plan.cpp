// Chooses the forward kernel and its tile.
//
// All weights are read by every tile, from L2: that traffic, not the rows' own, bounds all but the largest
// launches, so that tiles should be tall; but tall tiles are few, and leave multiprocessors idle unless a
// cluster shares each. What is best follows from a count of the bytes and multiplications, which the
// candidates are compared by. All of it takes a fraction of a microsecond
// (python_tests/native/plans_test.cpp), so that it is done anew at every launch.
#include <algorithm>
#include <cmath>

#include "edit_refusal.h"
#include "reft_kernels/edit_forward_tile.h"
#include "reft_kernels/edit_plan.h"

namespace reft_kernels {
namespace {

// Per cycle and multiprocessor, of an H100; only their proportions matter.
constexpr double kL1Bytes = 64;
constexpr double kL2Bytes = 25;
constexpr double kMemoryBytes = 13;
constexpr double kFmas = 128;
constexpr double kMmaFmas = 1024;
constexpr double kFetchCycles = 600;    // from asking L2 for weights to having them
constexpr double kBlockCycles = 2000;   // to find the slots, have their rows, add up the warps and store
constexpr double kClusterCycles = 400;  // to add up a cluster's blocks,
constexpr double kPeerCycles = 50;      // for each of them

double times_in(double part, double whole) {
  return std::ceil(whole / part);
}

// How many times a warp asks for weights and waits for them.
double fetches_of(const Edit& e, const Plan& plan, int64_t columns) {
  if (plan.kernel == Kernel::kForwardMma) {
    const double times = times_in(kMmaColumns * (plan.threads / 32), static_cast<double>(columns));
    return times * std::max(plan.rank_tile / 16.0, 0.5);  // twice that many, each fetched one ahead
  }
  const double times = times_in(plan.threads * 16 / bytes_of(e.h_type), static_cast<double>(columns));
  return times * (times_in(plan.rank_tile, e.r) + times_in(4, e.r));
}

// Blocks that a multiprocessor holds at once.
double resident_blocks(const Edit& e, const Device& device, const Plan& plan) {
  constexpr int kRegisters = 65536, kReservedBytes = 1024;
  const bool slim =
      plan.kernel == Kernel::kForwardMma ? plan.rank_tile <= 16 : e.linear() && plan.rank_tile == 1;
  const int by_registers = kRegisters / (plan.threads * (slim ? 128 : 224));
  const int by_memory = (device.shared_bytes + kReservedBytes) / (plan.shared_bytes + kReservedBytes);
  return std::max(1, std::min(by_registers, by_memory));
}

// Cycles that a plan takes: what the busiest part of the GPU needs for all blocks, or what it takes for all
// to have had their turn, if that is longer.
double cycles_of(const EditForwardParams& params, const Device& device, const Plan& plan, bool staged) {
  const Edit& e = params.edit;
  const double size = bytes_of(e.h_type), N = static_cast<double>(e.rows()), d = static_cast<double>(e.d);
  const double columns = d / plan.cluster, sms = device.multiprocessors;
  const double slots = std::min<double>(plan.tile_rows, N);
  // Every group of a tile costs it a pass over that group's weights; how many it has is not known here.
  const double passes = e.group.data ? std::min<double>(slots, e.groups) : 1;
  const double weights = columns * e.r * passes;
  const double weight_bytes =
      weights * ((e.W.data ? bytes_of(e.W.type) : 0) + (e.subtract ? 2 : 1) * bytes_of(e.R.type));
  const double row_bytes = slots * columns * size * ((staged ? 2 : 3) + (params.rows ? 1 : 0));
  const double products = products_of(e.linear()) + 1;
  double multiplying = slots * columns * e.r * products / kFmas;
  if (plan.kernel == Kernel::kForwardMma) {
    const bool floats = e.R.type == DType::kFloat32;  // to be taken apart
    const double parts = floats ? 3 : 2, operations = floats ? 6 : 2;
    const double padded = columns * plan.rank_tile * passes * products;
    multiplying = plan.tile_rows * padded * parts / kMmaFmas + padded * operations / kFmas;
  }
  const double fetching = (weight_bytes + row_bytes) / kL1Bytes;
  const double waiting = fetches_of(e, plan, slice_columns(e.d, plan.cluster)) * passes * kFetchCycles;
  const double exchanging = plan.cluster > 1 ? kClusterCycles + kPeerCycles * plan.cluster : 0;
  const double turn = kBlockCycles + fetching + multiplying + waiting + exchanging;

  const double blocks = static_cast<double>(plan.blocks);
  const double turns = std::ceil(blocks / (sms * resident_blocks(e, device, plan)));
  const double memory = N * d * size * 2 / (kMemoryBytes * sms);
  const double l2 = blocks * (weight_bytes + row_bytes) / (kL2Bytes * sms);
  const double busiest = std::ceil(blocks / sms) * std::max(fetching, multiplying);
  return std::max({memory, l2, busiest, turns * turn}) + turn / 100;  // of equals, the shorter blocks
}

class Chooser {
 public:
  Chooser(const EditForwardParams& params, const Device& device)
      : params_(params), device_(device), vectors_(forward_vectors(params)) {}

  // Takes the candidate if it fits the device and beats those before.
  void offer(Kernel kernel, int tile_rows, int rank_tile, int cluster) {
    const Edit& e = params_.edit;
    const bool mma = kernel == Kernel::kForwardMma;
    const int64_t tiles = (e.rows() + tile_rows - 1) / tile_rows;
    // Clusters are for tiles that leave multiprocessors idle; pairs, also for tiles that leave no room for a
    // second one.
    if (cluster > (mma ? 2 : 1) && tiles * (cluster / 2) >= device_.multiprocessors) return;
    Plan plan;
    plan.kernel = kernel;
    plan.tile_rows = tile_rows;
    plan.rank_tile = rank_tile;
    plan.cluster = cluster;
    plan.blocks = tiles * cluster;
    plan.threads = threads_for(slice_columns(e.d, cluster), kernel);
    if (plan.blocks > INT32_MAX) return;
    bool staged = vectors_;
    plan.shared_bytes = shared_bytes(plan, staged);
    if (staged && plan.shared_bytes > device_.shared_bytes) {
      // Where no tile's rows fit they are read twice: by the mma kernel as ever, by the rows kernel in single
      // elements.
      if (!mma && (found_ || cluster > 1)) return;
      staged = false;
      plan.shared_bytes = shared_bytes(plan, false);
    }
    if (plan.shared_bytes > device_.shared_bytes) return;
    const double cycles = cycles_of(params_, device_, plan, staged);
    if (found_ && cycles >= cycles_) return;
    found_ = true;
    cycles_ = cycles;
    best_ = plan;
  }

  bool found() const { return found_; }
  const Plan& best() const { return best_; }
  bool vectors() const { return vectors_; }

 private:
  int shared_bytes(const Plan& plan, bool staged) const {
    return static_cast<int>(std::min<int64_t>(forward_shared(params_.edit, plan, staged).total, INT32_MAX));
  }

  // As many as the block's columns keep busy.
  int threads_for(int64_t columns, Kernel kernel) const {
    const int64_t at_once = kernel == Kernel::kForwardMma ? 1
                            : vectors_                    ? 16 / bytes_of(params_.edit.h_type)
                                                          : 1;
    return static_cast<int>(std::clamp<int64_t>(round_up(columns / at_once, 32), 64, 256));
  }

  const EditForwardParams& params_;
  const Device& device_;
  const bool vectors_;
  bool found_ = false;
  double cycles_ = 0;
  Plan best_;
};

}  // namespace

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kForwardRows:
      return "forward_rows";
    case Kernel::kForwardCluster:
      return "forward_cluster";
    case Kernel::kForwardMma:
      return "forward_mma";
    case Kernel::kBackwardRows:
      return "backward_rows";
    case Kernel::kBackwardMma:
      return "backward_mma";
  }
  return "";
}

Plan plan_edit_forward(const EditForwardParams& params, const Device& device) {
  const Edit& e = params.edit;
  Plan refused;
  refused.blocks = 0;
  refused.refusal = refusal_of(e, device);
  if (e.d > INT32_MAX / 2) refused.refusal = "takes rows shorter than 2^30, got " + std::to_string(e.d);
  if (!refused.refusal.empty() || e.rows() == 0) return refused;

  Chooser chooser(params, device);
  const bool multiplies = e.W.data || e.subtract;
  const bool clusters = device.capability >= 90 && chooser.vectors() && multiplies && e.d >= 512;
  const int widest = clusters ? 8 : 1;
  for (int rows = 1; rows <= 8; rows *= 2) {
    const int rank_tile = !e.linear() ? 4 : e.r == 1 ? 1 : e.r <= 4 || rows == 8 ? 4 : 8;
    if (rows > max_tile_rows(e.linear(), rank_tile)) break;
    chooser.offer(Kernel::kForwardRows, rows, rank_tile, 1);
    for (int cluster = 2; cluster <= widest; cluster *= 2) {
      chooser.offer(Kernel::kForwardCluster, rows, std::max(rank_tile, 4), cluster);
    }
  }
  if (is_half(e.h_type) && chooser.vectors() && e.d > 0 && e.d % kMmaColumns == 0 && e.r * e.d <= INT32_MAX) {
    const int rank_tile = e.r <= 8 ? 8 : e.r <= 16 ? 16 : e.r <= 32 ? 32 : 64;
    for (int cluster = 1; cluster <= widest; cluster *= 2) {
      chooser.offer(Kernel::kForwardMma, kMmaRows, rank_tile, cluster);
    }
  }
  if (chooser.found()) return chooser.best();
  refused.refusal = "takes fewer rows, got " + std::to_string(e.rows());
  return refused;
}

}  // namespace reft_kernels
