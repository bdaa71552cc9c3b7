// What both the host's and the device's code is written in: element types, and the macros that name them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define REFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define REFT_HOST_DEVICE inline
#endif

namespace reft_kernels {

// Element types of tensors, by the numbers that torch gives its own (c10::ScalarType).
enum class DType : int32_t {
  kInt32 = 3,
  kInt64 = 4,
  kFloat16 = 5,
  kFloat32 = 6,
  kFloat64 = 7,
  kBFloat16 = 15,
};

REFT_HOST_DEVICE constexpr int bytes_of(DType type) {
  switch (type) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    default:
      return 8;
  }
}

REFT_HOST_DEVICE constexpr bool is_half(DType type) {
  return type == DType::kFloat16 || type == DType::kBFloat16;
}

// f of the edit.
enum class Activation : int32_t { kLinear = 0, kRelu = 1, kGelu = 2, kSilu = 3, kTanh = 4 };

}  // namespace reft_kernels
