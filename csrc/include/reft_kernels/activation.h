// f and f' of the edit; twin of `activate` and `activation_slope` in reft_kernels/reference.py.
#pragma once

#include <cmath>

#include "reft_kernels/types.h"

namespace reft_kernels {

template <typename T>
REFT_HOST_DEVICE T sigmoid(T s) {
  return T(1) / (T(1) + std::exp(-s));
}

// f(s). NaN in, NaN out.
template <typename T>
REFT_HOST_DEVICE T activate(T s, Activation f) {
  switch (f) {
    case Activation::kRelu:
      return s < T(0) ? T(0) : s;
    case Activation::kGelu:
      return T(0.5) * s * (T(1) + std::erf(s * T(0.70710678118654752440)));
    case Activation::kSilu:
      return s / (T(1) + std::exp(-s));
    case Activation::kTanh:
      return std::tanh(s);
    default:
      return s;
  }
}

// f'(s); 0 at the kink of relu.
template <typename T>
REFT_HOST_DEVICE T activation_slope(T s, Activation f) {
  switch (f) {
    case Activation::kRelu:
      return s > T(0) ? T(1) : T(0);
    case Activation::kGelu:
      return T(0.5) * (T(1) + std::erf(s * T(0.70710678118654752440))) +
             s * std::exp(T(-0.5) * s * s) * T(0.39894228040143267794);
    case Activation::kSilu: {
      const T p = sigmoid(s);
      return p * (T(1) + s * (T(1) - p));
    }
    case Activation::kTanh: {
      const T t = std::tanh(s);
      return T(1) - t * t;
    }
    default:
      return T(1);
  }
}

}  // namespace reft_kernels
