// Which edits no GPU kernel takes, forward or backward.
#pragma once

#include <string>

#include "reft_kernels/edit_plan.h"

namespace reft_kernels {

constexpr int kMaxRank = 64;

inline std::string name_of(DType type) {
  switch (type) {
    case DType::kFloat16:
      return "float16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "type " + std::to_string(static_cast<int>(type));
  }
}

// Why no kernel takes the edit on the device; empty if one may.
inline std::string refusal_of(const Edit& e, const Device& device) {
  if (device.capability < 80) {
    return "needs compute capability 8.0 or newer, the device has " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  }
  if (e.r < 1 || e.r > kMaxRank) return "takes ranks 1 to 64, got " + std::to_string(e.r);
  const bool h_taken = e.h_type == DType::kFloat32 || is_half(e.h_type);
  const auto is_float_or_h = [&e](DType type) { return type == DType::kFloat32 || type == e.h_type; };
  const bool W_taken =
      !e.W.data || e.W.type == e.R.type || (e.R.type == DType::kFloat32 && is_float_or_h(e.W.type));
  if (!h_taken || e.accumulator != DType::kFloat32 || !is_float_or_h(e.R.type) || !W_taken) {
    return "takes h in float32, bfloat16 or float16 with R and W in float32 or both in the type of h, or R "
           "in "
           "float32 and W in the type of h; got h " +
           name_of(e.h_type) + ", R " + name_of(e.R.type) + (e.W.data ? ", W " + name_of(e.W.type) : "");
  }
  return "";
}

}  // namespace reft_kernels
