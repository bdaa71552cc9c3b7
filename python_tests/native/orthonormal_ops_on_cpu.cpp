// The CUDA ops of matrices with orthonormal rows for tensors on the CPU, by the machine of fibers:
// reft_kernels_on_cpu::native_orthonormalize_forward, _backward and native_stiefel_adamw_step.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <vector>

#include "launches_on_cpu.h"
#include "orthonormal_operands.h"
#include "reft_kernels/launch.h"

namespace {

using namespace reft_kernels;

// Workspace that holds nothing of use, of the size that is asked for.
std::vector<double> workspace;

double* allocate(int64_t count) {
  workspace = std::vector<double>(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
  return workspace.data();
}

template <auto function, auto make_operands, typename Function = decltype(make_operands)>
struct Op;

template <auto function, auto make_operands, typename Operands, typename... Arguments>
struct Op<function, make_operands, Operands (*)(Arguments...)> {
  static void run(Arguments... arguments) {
    Operands operands = make_operands(arguments...);
    operands.params.barrier = &on_cpu::barrier;
    const std::string wrong = function(operands.params, on_cpu::device_number(), nullptr, allocate);
    STD_TORCH_CHECK(wrong.empty(), wrong);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_on_cpu, CPU, library) {
  library.impl("native_orthonormalize_forward",
               TORCH_BOX((&Op<&cuda::orthonormalize_forward, &orthonormalize_forward_operands>::run)));
  library.impl("native_orthonormalize_backward",
               TORCH_BOX((&Op<&cuda::orthonormalize_backward, &orthonormalize_backward_operands>::run)));
  library.impl("native_stiefel_adamw_step",
               TORCH_BOX((&Op<&cuda::stiefel_adamw_step, &stiefel_adamw_operands>::run)));
}
