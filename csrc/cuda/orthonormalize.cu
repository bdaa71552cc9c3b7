// The entries of orthonormalize: operands to plan to launch.
#include "reft_kernels/orthonormalize.cuh"

#include "launch.cuh"
#include "reft_kernels/launch.h"
#include "reft_kernels/matrix_plan.h"

namespace reft_kernels::cuda {
namespace {

template <bool kBackward, typename Table>
std::string launch_with(const OrthonormalizeParams& params, const MatrixPlan& plan, const Device& properties,
                        int device, void* stream, double* workspace) {
  Table table = {};
  table.task = {workspace, params.barrier,          static_cast<int32_t>(params.count),
                0,         properties.shared_bytes, false};
  int64_t partial = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const OrthonormalizeMatrix& m = params.matrices[i];
    table.matrix[i] = {static_cast<const float*>(m.X),
                       static_cast<const float*>(m.reflectors),
                       static_cast<const float*>(m.signs),
                       static_cast<const float*>(m.grad),
                       static_cast<float*>(m.out),
                       m.factors,
                       static_cast<int32_t>(m.d),
                       m.r,
                       table.task.items,
                       static_cast<int32_t>(partial / kTileSums)};
    table.task.items += slabs_of(m.d, m.r);
    table.task.leads |= m.r > kMaxSharedSolveRank;
    partial += orthonormalize_workspace(m.d, m.r, kBackward);
  }
  return launch(&orthonormalize_kernel<kBackward, Table>, plan.launch, device, stream, true, table);
}

template <bool kBackward>
std::string run(const OrthonormalizeParams& params, int device, void* stream, const Allocate& allocate) {
  Device properties;
  const std::string problem = device_of(device, properties);
  if (!problem.empty()) return problem;
  const MatrixPlan plan = plan_orthonormalize(params, kBackward, properties);
  if (!plan.launch.refusal.empty()) return plan.launch.refusal;
  if (plan.launch.blocks == 0) return "";
  double* workspace = allocate(plan.workspace);
  const auto launch_it = plan.capacity == SmallOrthonormalizeTable::kMost
                             ? &launch_with<kBackward, SmallOrthonormalizeTable>
                             : &launch_with<kBackward, LargeOrthonormalizeTable>;
  return launch_it(params, plan, properties, device, stream, workspace);
}

}  // namespace

std::string orthonormalize_forward(const OrthonormalizeParams& params, int device, void* stream,
                                   const Allocate& allocate) {
  return run<false>(params, device, stream, allocate);
}

std::string orthonormalize_backward(const OrthonormalizeParams& params, int device, void* stream,
                                    const Allocate& allocate) {
  return run<true>(params, device, stream, allocate);
}

}  // namespace reft_kernels::cuda
