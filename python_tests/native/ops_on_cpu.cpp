// The CUDA ops for tensors on the CPU, by the machine of fibers: reft_kernels_on_cpu::native_edit_forward and
// _backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "edit_operands.h"
#include "forced_plans.h"
#include "machine.h"
#include "reft_kernels/launch.h"

namespace on_cpu {

Wishes forward_wishes, backward_wishes;
reft_kernels::Plan last_plan;

}  // namespace on_cpu

namespace {

using namespace reft_kernels;

uint32_t barrier = 0;  // of all launches, one after the other

// The launchers ask each device once for its properties: another device, another number.
int number_of(const on_cpu::Device& device) {
  static std::vector<on_cpu::Device> known;
  const auto same = [&](const on_cpu::Device& other) {
    return device.capability == other.capability && device.multiprocessors == other.multiprocessors &&
           device.shared_bytes == other.shared_bytes && device.l2_bytes == other.l2_bytes;
  };
  const auto found = std::find_if(known.begin(), known.end(), same);
  const auto number = static_cast<int>(found - known.begin());
  if (found == known.end()) known.push_back(device);
  return number;
}

void check(const std::string& wrong) {
  STD_TORCH_CHECK(wrong.empty(), wrong);
}

void launch(const EditForwardParams& params) {
  check(cuda::edit_forward(params, number_of(on_cpu::device), nullptr));
}

void launch(EditBackwardParams params) {
  params.barrier = &barrier;
  check(cuda::edit_backward(params, number_of(on_cpu::device), nullptr));
}

template <auto make_params, typename Function = decltype(make_params)>
struct Op;

template <auto make_params, typename Params, typename... Arguments>
struct Op<make_params, Params (*)(Arguments...)> {
  static void run(Arguments... arguments) { launch(make_params(arguments...)); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_on_cpu, CPU, library) {
  library.impl("native_edit_forward", TORCH_BOX((&Op<&forward_params>::run)));
  library.impl("native_edit_backward", TORCH_BOX((&Op<&backward_params>::run)));
}

#pragma GCC visibility push(default)
extern "C" {

void on_cpu_device(int capability, int multiprocessors, int shared_bytes, int64_t l2_bytes) {
  on_cpu::device = {capability, multiprocessors, shared_bytes, l2_bytes};
}

void on_cpu_seed(uint64_t seed) {
  on_cpu::seed = seed;
}
uint64_t on_cpu_launches() {
  return on_cpu::launch_count;
}
uint32_t on_cpu_barrier() {
  return barrier;
}

// The fields of Wishes in their order.
void on_cpu_force(bool forward, const int64_t* wish) {
  on_cpu::Wishes& w = forward ? on_cpu::forward_wishes : on_cpu::backward_wishes;
  for (int64_t* field : {&w.kernel, &w.tile_rows, &w.rank_tile, &w.slab, &w.cluster, &w.threads, &w.blocks,
                         &w.chunk, &w.staged, &w.shared_bytes}) {
    *field = *wish++;
  }
}

// kernel, tile_rows, rank_tile, slab, cluster, threads, blocks, chunk, shared_bytes of the last launch.
void on_cpu_last_plan(int64_t* plan) {
  const Plan& p = on_cpu::last_plan;
  const int64_t fields[] = {static_cast<int64_t>(p.kernel),
                            p.tile_rows,
                            p.rank_tile,
                            p.slab,
                            p.cluster,
                            p.threads,
                            p.blocks,
                            p.chunk,
                            p.shared_bytes};
  std::copy(std::begin(fields), std::end(fields), plan);
}
}
#pragma GCC visibility pop
