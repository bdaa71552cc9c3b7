// reft_kernels._native: how the native library was built, and how it would launch its kernels on a GPU. Pure
// functions of their arguments: they need neither a GPU nor torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "reft_kernels/edit_plan.h"
#include "reft_kernels/matrix_plan.h"

namespace py = pybind11;

namespace reft_kernels {
namespace {

DType dtype_named(const std::string& name) {
  static const std::map<std::string, DType> types = {{"float16", DType::kFloat16},
                                                     {"bfloat16", DType::kBFloat16},
                                                     {"float32", DType::kFloat32},
                                                     {"float64", DType::kFloat64}};
  const auto found = types.find(name);
  if (found == types.end()) {
    throw std::invalid_argument("dtype: expected float16, bfloat16, float32 or float64, got '" + name + "'");
  }
  return found->second;
}

Activation activation_named(const std::string& name) {
  static const std::map<std::string, Activation> activations = {{"linear", Activation::kLinear},
                                                                {"relu", Activation::kRelu},
                                                                {"gelu", Activation::kGelu},
                                                                {"silu", Activation::kSilu},
                                                                {"tanh", Activation::kTanh}};
  const auto found = activations.find(name);
  if (found == activations.end()) {
    throw std::invalid_argument("activation: expected linear, relu, gelu, silu or tanh, got '" + name + "'");
  }
  return found->second;
}

// Stands for a tensor that is there, in a plan that never looks at it.
void* somewhere(bool aligned) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(aligned ? 0x10000 : 0x10002));
}

Edit edit_of(int64_t batch, int64_t length, std::optional<int64_t> slots, int64_t d, int r, int groups,
             const std::string& h, const std::string& R, const std::optional<std::string>& W,
             const std::string& activation, bool subtract, bool dropout) {
  Edit edit;
  edit.batch = batch;
  edit.length = length;
  edit.slots = slots.value_or(length);
  edit.d = d;
  edit.r = r;
  edit.groups = groups;
  edit.h_type = dtype_named(h);
  edit.R = {somewhere(true), dtype_named(R)};
  edit.accumulator =
      edit.h_type == DType::kFloat64 || edit.R.type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (W) edit.W = {somewhere(true), dtype_named(*W)};
  if (slots) edit.positions = {somewhere(true), DType::kInt64, {*slots, 1}};
  if (groups > 1) edit.group = {somewhere(true), DType::kInt64, {edit.slots, 1}};
  if (dropout) edit.seed = static_cast<const int64_t*>(somewhere(true));
  edit.activation = activation_named(activation);
  edit.subtract = subtract;
  return edit;
}

py::dict described(const Plan& plan) {
  py::dict out;
  out["kernel"] = plan.refusal.empty() ? name_of(plan.kernel) : "none";
  out["tile_rows"] = plan.tile_rows;
  out["rank_tile"] = plan.rank_tile;
  out["slab"] = plan.slab;
  out["cluster"] = plan.cluster;
  out["threads"] = plan.threads;
  out["blocks"] = plan.blocks;
  out["shared_bytes"] = plan.shared_bytes;
  out["chunk"] = plan.chunk;
  out["refusal"] = plan.refusal;
  return out;
}

py::dict plan_forward(int64_t batch, int64_t length, std::optional<int64_t> slots, int64_t d, int r,
                      int groups, const std::string& h, const std::string& R,
                      const std::optional<std::string>& W, const std::string& activation, bool subtract,
                      bool dropout, bool aligned, int capability, int multiprocessors, int shared_bytes,
                      int64_t l2_bytes) {
  EditForwardParams p;
  p.edit = edit_of(batch, length, slots, d, r, groups, h, R, W, activation, subtract, dropout);
  p.h = {somewhere(aligned), {length * d, d}};
  p.y = {somewhere(aligned), {length * d, d}};
  p.delta = somewhere(true);
  if (!p.edit.linear()) p.s = somewhere(true);
  return described(plan_edit_forward(p, {capability, multiprocessors, shared_bytes, l2_bytes}));
}

py::dict plan_backward(int64_t batch, int64_t length, std::optional<int64_t> slots, int64_t d, int r,
                       int groups, const std::string& h, const std::string& R,
                       const std::optional<std::string>& W, const std::string& activation, bool subtract,
                       bool dropout, bool aligned, int capability, int multiprocessors, int shared_bytes,
                       int64_t l2_bytes) {
  EditBackwardParams p;
  p.edit = edit_of(batch, length, slots, d, r, groups, h, R, W, activation, subtract, dropout);
  p.grad = {somewhere(aligned), {length * d, d}};
  p.dh = {somewhere(aligned), {length * d, d}};
  p.x = {somewhere(aligned), {length * d, d}};
  p.delta = p.gd = p.gs = somewhere(true);
  if (!p.edit.linear()) p.s = somewhere(true);
  p.dR = {somewhere(true), p.edit.R.type, false};
  if (W) p.dW = {somewhere(true), p.edit.W.type, false};
  return described(plan_edit_backward(p, {capability, multiprocessors, shared_bytes, l2_bytes}));
}

py::dict described(const MatrixPlan& plan) {
  py::dict out;
  out["items"] = plan.items;
  out["threads"] = plan.launch.threads;
  out["blocks"] = plan.launch.blocks;
  out["shared_bytes"] = plan.launch.shared_bytes;
  out["workspace"] = plan.workspace;
  out["capacity"] = plan.capacity;
  out["refusal"] = plan.launch.refusal;
  return out;
}

using Sizes = std::vector<std::pair<int64_t, int>>;

py::dict plan_matrices(const Sizes& sizes, bool backward, const std::string& dtype, int capability,
                       int multiprocessors, int shared_bytes) {
  std::vector<OrthonormalizeMatrix> matrices(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) std::tie(matrices[i].d, matrices[i].r) = sizes[i];
  OrthonormalizeParams p;
  p.matrices = matrices.data();
  p.count = static_cast<int64_t>(matrices.size());
  p.type = dtype_named(dtype);
  return described(plan_orthonormalize(p, backward, {capability, multiprocessors, shared_bytes, 0}));
}

py::dict plan_step(const Sizes& constrained, const std::vector<int64_t>& rest, bool riemannian,
                   const std::string& dtype, int capability, int multiprocessors, int shared_bytes) {
  std::vector<StiefelAdamWTensor> tensors(constrained.size() + rest.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    StiefelAdamWTensor& t = tensors[i];
    t.orthonormal = i < constrained.size();
    if (t.orthonormal) {
      std::tie(t.d, t.r) = constrained[i];
    } else {
      t.d = rest[i - constrained.size()];
    }
  }
  StiefelAdamWParams p;
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  p.type = dtype_named(dtype);
  p.riemannian = riemannian;
  return described(plan_stiefel_adamw(p, {capability, multiprocessors, shared_bytes, 0}));
}

py::dict build_info() {
  py::dict out;
  out["schemas"] = REFT_KERNELS_SCHEMAS;
  out["version"] = REFT_KERNELS_VERSION;
  out["compiler"] = REFT_KERNELS_COMPILER;
  out["flags"] = REFT_KERNELS_FLAGS;
  out["torch"] = REFT_KERNELS_TORCH_VERSION;
  out["torch_target"] = REFT_KERNELS_TORCH_TARGET;
  out["cuda"] = REFT_KERNELS_CUDA_VERSION;
  out["cuda_architectures"] = REFT_KERNELS_CUDA_ARCHITECTURES;
  out["cuda_reason"] = REFT_KERNELS_CUDA_REASON;
  return out;
}

template <typename Function>
void define_plan(py::module_& module, const char* name, Function function, const char* doc) {
  module.def(name, function, py::kw_only(), py::arg("batch"), py::arg("length"),
             py::arg("slots") = py::none(), py::arg("d"), py::arg("r"), py::arg("groups") = 1,
             py::arg("h") = "bfloat16", py::arg("R") = "float32", py::arg("W") = "float32",
             py::arg("activation") = "linear", py::arg("subtract") = true, py::arg("dropout") = false,
             py::arg("aligned") = true, py::arg("capability") = 90, py::arg("multiprocessors") = 132,
             py::arg("shared_bytes") = 227 << 10, py::arg("l2_bytes") = int64_t{50} << 20, doc);
}

}  // namespace
}  // namespace reft_kernels

PYBIND11_MODULE(_native, module) {
  using namespace reft_kernels;
  module.doc() = "How the native library was built, and how it would launch its kernels on a GPU.";
  module.def("build_info", &build_info,
             "Versions, compiler, flags and CUDA architectures of the build; `cuda_reason` says why there is "
             "no CUDA.");
  define_plan(module, "plan_edit_forward", &plan_forward,
              "The launch of a forward of an edit of [batch, length, d] at `slots` positions a batch row "
              "(None: all), "
              "on a device of those properties; `refusal` says why no kernel takes it.");
  define_plan(module, "plan_edit_backward", &plan_backward, "As plan_edit_forward, for the backward.");
  module.def(
      "plan_orthonormalize", &plan_matrices, py::kw_only(), py::arg("sizes"), py::arg("backward") = false,
      py::arg("dtype") = "float32", py::arg("capability") = 90, py::arg("multiprocessors") = 132,
      py::arg("shared_bytes") = 227 << 10,
      "The launch of orthonormalize_forward or _backward of matrices of sizes (d, r), on a device of those "
      "properties; `refusal` says why no kernel takes them.");
  module.def(
      "plan_stiefel_adamw", &plan_step, py::kw_only(), py::arg("constrained"), py::arg("rest"),
      py::arg("riemannian") = false, py::arg("dtype") = "float32", py::arg("capability") = 90,
      py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 227 << 10,
      "The launch of stiefel_adamw_step of orthonormal matrices of sizes (d, r) and of other tensors of so "
      "many elements.");
}
