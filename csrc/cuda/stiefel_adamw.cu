// The entry of stiefel_adamw_step: operands to plan to launch.
#include "reft_kernels/stiefel_adamw.cuh"

#include "launch.cuh"
#include "reft_kernels/launch.h"
#include "reft_kernels/matrix_plan.h"

namespace reft_kernels::cuda {
namespace {

// The tensors that are, or are not, constrained, after those that the table has already.
template <typename Table>
void add_tensors(const StiefelAdamWParams& params, bool constrained, int64_t& partial, Table& table) {
  StiefelAdamWTask& task = table.task;
  for (int64_t i = 0; i < params.count; ++i) {
    const StiefelAdamWTensor& t = params.tensors[i];
    const auto items = static_cast<int32_t>(stiefel_items(t));
    if (t.orthonormal != constrained) continue;
    table.tensor[task.count++] = {static_cast<float*>(t.parameter),
                                  static_cast<const float*>(t.gradient),
                                  static_cast<float*>(t.exp_avg),
                                  static_cast<float*>(t.exp_avg_sq),
                                  t.step,
                                  t.d,
                                  t.r,
                                  task.items,
                                  static_cast<int32_t>(partial / kTileSums),
                                  static_cast<float>(t.weight_decay)};
    task.items += items;
    if (!constrained) continue;
    ++task.constrained;
    task.constrained_items += items;
    task.leads |= t.r > kMaxSharedSolveRank;
    partial += stiefel_workspace(t.d, t.r, params.riemannian).total;
  }
}

template <typename Table>
std::string launch_with(const StiefelAdamWParams& params, const MatrixPlan& plan, const Device& properties,
                        int device, void* stream, double* workspace) {
  Table table = {};
  StiefelAdamWTask& task = table.task;
  task.workspace = workspace;
  task.barrier = params.barrier;
  task.lr_tensor = params.lr_tensor;
  task.grad_scale = params.grad_scale;
  task.found_inf = params.found_inf;
  task.norm = params.norm;
  task.lr = params.lr;
  task.beta1 = params.beta1;
  task.beta2 = params.beta2;
  task.max_norm = params.max_norm;
  task.eps = static_cast<float>(params.eps);
  task.shared_bytes = properties.shared_bytes;
  task.lr_is_double = params.lr_type == DType::kFloat64;
  task.riemannian = params.riemannian;
  task.maximize = params.maximize;
  int64_t partial = stiefel_item_elements(plan.items);
  add_tensors(params, true, partial, table);
  add_tensors(params, false, partial, table);
  return launch(&stiefel_adamw_step_kernel<Table>, plan.launch, device, stream, true, table);
}

}  // namespace

std::string stiefel_adamw_step(const StiefelAdamWParams& params, int device, void* stream,
                               const Allocate& allocate) {
  Device properties;
  const std::string problem = device_of(device, properties);
  if (!problem.empty()) return problem;
  const MatrixPlan plan = plan_stiefel_adamw(params, properties);
  if (!plan.launch.refusal.empty()) return plan.launch.refusal;
  if (plan.launch.blocks == 0) return "";
  double* workspace = allocate(plan.workspace);
  const auto launch_it = plan.capacity == SmallStiefelAdamWTable::kMost
                             ? &launch_with<SmallStiefelAdamWTable>
                             : &launch_with<LargeStiefelAdamWTable>;
  return launch_it(params, plan, properties, device, stream, workspace);
}

}  // namespace reft_kernels::cuda
