// From torch's tensors to the plain operands of orthonormalize_params.h and stiefel_adamw_params.h, as
// edit_operands.h does for edits. What is checked here is what memory safety rests on.
#pragma once

#include <vector>

#include "edit_operands.h"
#include "reft_kernels/orthonormalize_params.h"
#include "reft_kernels/stiefel_adamw_params.h"

namespace reft_kernels {

using Tensors = std::vector<Tensor>;

// Of a contiguous tensor of so many elements of a type, on the device of another.
inline void* contiguous_data(const Tensor& tensor, const Tensor& beside, int64_t elements, DType type) {
  STD_TORCH_CHECK(tensor.is_contiguous() and tensor.numel() == elements and dtype_of(tensor) == type,
                  "reft_kernels: expected contiguous tensors of one type that belong together");
  STD_TORCH_CHECK(
      tensor.is_cuda() == beside.is_cuda() and tensor.get_device_index() == beside.get_device_index(),
      "reft_kernels: expected all tensors on one device");
  return tensor.mutable_data_ptr();
}

inline DType float_or_double(const Tensor& tensor) {
  const DType type = dtype_of(tensor);
  STD_TORCH_CHECK(type == DType::kFloat32 or type == DType::kFloat64,
                  "reft_kernels: expected float32 or float64");
  return type;
}

// Matrices of one call, and the memory that the parameters point to.
struct OrthonormalizeOperands {
  std::vector<OrthonormalizeMatrix> matrices;
  OrthonormalizeParams params;
};

// The word of a grid barrier, which only a GPU needs.
inline uint32_t* barrier_word(const OptionalTensor& barrier, const Tensor& beside) {
  STD_TORCH_CHECK(
      not beside.is_cuda() or (barrier and barrier->is_cuda() and dtype_of(*barrier) == DType::kInt32),
      "reft_kernels: expected an int32 barrier on the GPU");
  return barrier ? static_cast<uint32_t*>(barrier->mutable_data_ptr()) : nullptr;
}

// `grads`: empty in the forward. `out` holds R or dL/dX of all matrices, `factors` theirs, one after the
// other.
inline OrthonormalizeOperands orthonormalize_backward_operands(const Tensors& grads, const Tensors& X,
                                                               const Tensors& reflectors,
                                                               const Tensors& signs, const Tensor& factors,
                                                               const Tensor& out,
                                                               const OptionalTensor& barrier) {
  const size_t count = X.size();
  STD_TORCH_CHECK(count > 0 and reflectors.size() == count and signs.size() == count and
                      (grads.empty() or grads.size() == count),
                  "reft_kernels: expected as many tensors of each kind as matrices");
  OrthonormalizeOperands operands;
  operands.matrices.resize(count);
  const DType type = float_or_double(X[0]);
  int64_t elements = 0, factor_count = 0;
  for (size_t i = 0; i < count; ++i) {
    OrthonormalizeMatrix& a = operands.matrices[i];
    STD_TORCH_CHECK(X[i].dim() == 2, "reft_kernels: expected X of [d, r]");
    a.d = X[i].size(0);
    a.r = static_cast<int32_t>(X[i].size(1));
    STD_TORCH_CHECK(a.d >= a.r, "reft_kernels: expected no more columns of X than rows");
    a.X = contiguous_data(X[i], X[0], a.d * a.r, type);
    a.reflectors = contiguous_data(reflectors[i], X[0], a.d * a.r, type);
    a.signs = contiguous_data(signs[i], X[0], a.r, type);
    if (not grads.empty()) a.grad = contiguous_data(grads[i], X[0], a.d * a.r, type);
    elements += a.d * a.r;
    factor_count += int64_t{4} * a.r * a.r;
  }
  char* to = static_cast<char*>(contiguous_data(out, X[0], elements, type));
  double* factors_to = static_cast<double*>(contiguous_data(factors, X[0], factor_count, DType::kFloat64));
  for (OrthonormalizeMatrix& a : operands.matrices) {
    a.out = to;
    a.factors = factors_to;
    to += a.d * a.r * bytes_of(type);
    factors_to += int64_t{4} * a.r * a.r;
  }
  operands.params = {operands.matrices.data(), static_cast<int64_t>(count), type,
                     barrier_word(barrier, X[0])};
  return operands;
}

inline OrthonormalizeOperands orthonormalize_forward_operands(const Tensors& X, const Tensors& reflectors,
                                                              const Tensors& signs, const Tensor& R,
                                                              const Tensor& factors,
                                                              const OptionalTensor& barrier) {
  return orthonormalize_backward_operands({}, X, reflectors, signs, factors, R, barrier);
}

struct StiefelAdamWOperands {
  std::vector<StiefelAdamWTensor> tensors;
  StiefelAdamWParams params;
};

inline const float* scalar(const OptionalTensor& tensor, const Tensor& beside) {
  return tensor ? static_cast<const float*>(contiguous_data(*tensor, beside, 1, DType::kFloat32)) : nullptr;
}

inline StiefelAdamWOperands stiefel_adamw_operands(
    const Tensors& parameters, const Tensors& gradients, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
    const Tensors& steps, const std::vector<int64_t>& orthonormal, const std::vector<double>& weight_decays,
    double lr, const OptionalTensor& lr_tensor, double beta1, double beta2, double eps, double max_norm,
    bool riemannian, bool maximize, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
    const OptionalTensor& norm, const OptionalTensor& barrier) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(count > 0 and gradients.size() == count and exp_avgs.size() == count and
                      exp_avg_sqs.size() == count and steps.size() == count and
                      orthonormal.size() == count and weight_decays.size() == count,
                  "reft_kernels: expected as many tensors of each kind as parameters");
  StiefelAdamWOperands operands;
  operands.tensors.resize(count);
  StiefelAdamWParams& p = operands.params;
  p.type = float_or_double(parameters[0]);
  for (size_t i = 0; i < count; ++i) {
    StiefelAdamWTensor& a = operands.tensors[i];
    const int64_t elements = parameters[i].numel();
    a.orthonormal = orthonormal[i] != 0;
    a.d = elements;
    if (a.orthonormal) {
      STD_TORCH_CHECK(parameters[i].dim() == 2, "reft_kernels: expected orthonormal parameters of [r, d]");
      a.r = static_cast<int32_t>(parameters[i].size(0));
      a.d = parameters[i].size(1);
    }
    a.parameter = contiguous_data(parameters[i], parameters[0], elements, p.type);
    a.gradient = contiguous_data(gradients[i], parameters[0], elements, p.type);
    a.exp_avg = contiguous_data(exp_avgs[i], parameters[0], elements, p.type);
    a.exp_avg_sq = contiguous_data(exp_avg_sqs[i], parameters[0], elements, p.type);
    a.step = static_cast<float*>(contiguous_data(steps[i], parameters[0], 1, DType::kFloat32));
    a.weight_decay = weight_decays[i];
  }
  p.tensors = operands.tensors.data();
  p.count = static_cast<int64_t>(count);
  p.lr = lr;
  if (lr_tensor) {
    p.lr_type = float_or_double(*lr_tensor);
    p.lr_tensor = contiguous_data(*lr_tensor, parameters[0], 1, p.lr_type);
  }
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.max_norm = max_norm;
  if (norm) p.norm = static_cast<double*>(contiguous_data(*norm, parameters[0], 1, DType::kFloat64));
  p.riemannian = riemannian;
  p.maximize = maximize;
  p.grad_scale = scalar(grad_scale, parameters[0]);
  p.found_inf = scalar(found_inf, parameters[0]);
  p.barrier = barrier_word(barrier, parameters[0]);
  return operands;
}

}  // namespace reft_kernels
