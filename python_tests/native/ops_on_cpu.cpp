// The CUDA ops for tensors on the CPU, by the machine of fibers: reft_kernels_on_cpu::native_edit_forward and
// _backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "edit_operands.h"
#include "forced_plans.h"
#include "launches_on_cpu.h"
#include "reft_kernels/launch.h"

namespace on_cpu {

Wishes forward_wishes, backward_wishes;
reft_kernels::Plan last_plan;

}  // namespace on_cpu

namespace {

using namespace reft_kernels;

void check(const std::string& wrong) {
  STD_TORCH_CHECK(wrong.empty(), wrong);
}

void launch(const EditForwardParams& params) {
  check(cuda::edit_forward(params, on_cpu::device_number(), nullptr));
}

void launch(EditBackwardParams params) {
  params.barrier = &on_cpu::barrier;
  check(cuda::edit_backward(params, on_cpu::device_number(), nullptr));
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
