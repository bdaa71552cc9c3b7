// From torch's tensors, by its stable ABI, to the plain operands of edit_params.h. The Python side has
// checked shapes, devices and layouts; what is checked here is what memory safety rests on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "reft_kernels/edit_params.h"

namespace reft_kernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return static_cast<DType>(type);
}

inline SlotTensor slot_tensor(const OptionalTensor& tensor, int64_t batch, int64_t slots) {
  if (not tensor) return {};
  STD_TORCH_CHECK(tensor->dim() == 2 and tensor->size(0) == batch and tensor->size(1) == slots,
                  "reft_kernels: expected one entry a slot");
  return {tensor->const_data_ptr(), dtype_of(*tensor), {tensor->stride(0), tensor->stride(1)}};
}

inline Weight weight(const OptionalTensor& tensor, int64_t elements) {
  if (not tensor) return {};
  STD_TORCH_CHECK(tensor->is_contiguous() and tensor->numel() == elements,
                  "reft_kernels: expected contiguous weights of one size");
  return {tensor->const_data_ptr(), dtype_of(*tensor)};
}

inline WeightGradient weight_gradient(const OptionalTensor& tensor, int64_t elements, bool add) {
  if (not tensor) return {};
  STD_TORCH_CHECK(tensor->is_contiguous() and tensor->numel() == elements,
                  "reft_kernels: expected contiguous gradients of their weights' sizes");
  return {tensor->mutable_data_ptr(), dtype_of(*tensor), add};
}

// h, y, grad or dh: [B, S, d] with unit inner stride.
template <typename Rows>
Rows rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3 and (tensor.stride(2) == 1 or tensor.size(2) <= 1),
                  "reft_kernels: expected [B, S, d] with unit inner stride");
  return {tensor.mutable_data_ptr(), {tensor.stride(0), tensor.stride(1)}};
}

// The weights and slots of an edit of rows [B, S, d] like `like`.
inline Edit edit_of(const Tensor& like, const Tensor& R, const OptionalTensor& W, const OptionalTensor& b,
                    const OptionalTensor& c, const OptionalTensor& positions, const OptionalTensor& group,
                    const OptionalTensor& scale, const OptionalTensor& seed, bool subtract,
                    int64_t activation, int64_t keep_threshold, double keep_scale, DType accumulator) {
  Edit edit;
  edit.batch = like.size(0);
  edit.length = like.size(1);
  edit.slots = positions ? positions->size(1) : edit.length;
  edit.d = like.size(2);
  STD_TORCH_CHECK(R.dim() == 3 and R.size(2) == edit.d, "reft_kernels: expected R of [G, r, d]");
  edit.groups = static_cast<int32_t>(R.size(0));
  edit.r = static_cast<int32_t>(R.size(1));
  edit.h_type = dtype_of(like);
  edit.accumulator = accumulator;
  const int64_t ranks = int64_t{edit.groups} * edit.r;
  edit.R = weight(R, ranks * edit.d);
  edit.W = weight(W, ranks * edit.d);
  edit.b = weight(b, ranks);
  if (subtract) edit.c = weight(c, ranks);
  edit.positions = slot_tensor(positions, edit.batch, edit.slots);
  edit.group = slot_tensor(group, edit.batch, edit.slots);
  edit.scale = slot_tensor(scale, edit.batch, edit.slots);
  if (seed) {
    STD_TORCH_CHECK(seed->numel() == 1 and dtype_of(*seed) == DType::kInt64,
                    "reft_kernels: expected an int64 seed");
    edit.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  edit.keep_threshold = static_cast<uint32_t>(keep_threshold);
  edit.keep_scale = keep_scale;
  edit.subtract = subtract;
  edit.activation = static_cast<Activation>(activation);
  return edit;
}

inline void* data_of(const OptionalTensor& tensor, int64_t elements, DType type) {
  if (not tensor) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() and tensor->numel() == elements and dtype_of(*tensor) == type,
                  "reft_kernels: expected a contiguous tensor of another size or type");
  return tensor->mutable_data_ptr();
}

inline EditForwardParams forward_params(const Tensor& h, const Tensor& y, const Tensor& delta,
                                        const OptionalTensor& s, const OptionalTensor& rows, const Tensor& R,
                                        const OptionalTensor& W, const OptionalTensor& b,
                                        const OptionalTensor& c, const OptionalTensor& positions,
                                        const OptionalTensor& group, const OptionalTensor& scale,
                                        const OptionalTensor& seed, bool subtract, int64_t activation,
                                        int64_t keep_threshold, double keep_scale, bool copy_idle) {
  EditForwardParams p;
  p.edit = edit_of(h, R, W, b, c, positions, group, scale, seed, subtract, activation, keep_threshold,
                   keep_scale, dtype_of(delta));
  const int64_t n = p.edit.rows();
  p.h = rows_of<RowsIn>(h);
  p.y = rows_of<RowsOut>(y);
  p.delta = data_of(delta, n * p.edit.r, p.edit.accumulator);
  p.s = data_of(s, n * p.edit.r, p.edit.accumulator);
  STD_TORCH_CHECK(p.edit.linear() == (p.s == nullptr), "reft_kernels: s goes with an activation");
  p.rows = data_of(rows, n * p.edit.d, p.edit.h_type);
  p.copy_idle = copy_idle;
  return p;
}

// Bits of `add`: 0 dR, 1 dW, 2 db, 3 dc.
inline EditBackwardParams backward_params(const Tensor& grad, const OptionalTensor& dh, const Tensor& x,
                                          const Tensor& R, const OptionalTensor& W, const OptionalTensor& b,
                                          const OptionalTensor& c, const OptionalTensor& positions,
                                          const OptionalTensor& group, const OptionalTensor& scale,
                                          const OptionalTensor& seed, bool subtract, int64_t activation,
                                          int64_t keep_threshold, double keep_scale, const Tensor& delta,
                                          const OptionalTensor& s, const Tensor& gd, const OptionalTensor& gs,
                                          const OptionalTensor& dR, const OptionalTensor& dW,
                                          const OptionalTensor& db, const OptionalTensor& dc, int64_t add,
                                          bool rebuild, bool copy_idle, const OptionalTensor& barrier) {
  EditBackwardParams p;
  p.edit = edit_of(grad, R, W, b, c, positions, group, scale, seed, subtract, activation, keep_threshold,
                   keep_scale, dtype_of(delta));
  const Edit& edit = p.edit;
  const int64_t n = edit.rows(), ranks = int64_t{edit.groups} * edit.r;
  p.grad = rows_of<RowsIn>(grad);
  if (dh) p.dh = rows_of<RowsOut>(*dh);
  STD_TORCH_CHECK(dtype_of(x) == edit.h_type, "reft_kernels: expected the gradient and h of one type");
  p.x_is_rows = x.dim() == 2;
  if (p.x_is_rows) {
    p.x = {data_of(x, n * edit.d, edit.h_type), {edit.slots * edit.d, edit.d}};
  } else {
    p.x = rows_of<RowsIn>(x);
  }
  p.rebuild = rebuild;
  p.delta = data_of(delta, n * edit.r, edit.accumulator);
  p.s = data_of(s, n * edit.r, edit.accumulator);
  p.gd = data_of(gd, n * edit.r, edit.accumulator);
  p.gs = gs ? data_of(gs, n * edit.r, edit.accumulator) : p.gd;
  STD_TORCH_CHECK(edit.linear() == (p.s == nullptr) and edit.linear() == (p.gs == p.gd),
                  "reft_kernels: s and gs go with an activation");
  p.dR = weight_gradient(dR, ranks * edit.d, add & 1);
  p.dW = weight_gradient(dW, ranks * edit.d, add & 2);
  p.db = weight_gradient(db, ranks, add & 4);
  p.dc = weight_gradient(dc, ranks, add & 8);
  p.copy_idle = copy_idle;
  STD_TORCH_CHECK(
      not grad.is_cuda() or (barrier and barrier->is_cuda() and dtype_of(*barrier) == DType::kInt32),
      "reft_kernels: expected an int32 barrier on the GPU");
  p.barrier = barrier ? static_cast<uint32_t*>(barrier->mutable_data_ptr()) : nullptr;
  return p;
}

}  // namespace reft_kernels
