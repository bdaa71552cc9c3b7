#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "matrix_kernels.h"
#include "reft_kernels/launch.h"

namespace reft_kernels::cpu {

namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// REFT_KERNELS_CPU_ISA, "baseline" or "avx2", asks for less than the machine has.
Isa choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* asked = std::getenv("REFT_KERNELS_CPU_ISA");
  const auto asks_for = [asked](const char* name) {
    return asked != nullptr && std::strcmp(asked, name) == 0;
  };
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (!has_avx2 || asks_for("baseline")) return Isa::kBaseline;
  return has_avx512 && !asks_for("avx2") ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kBaseline;
#endif
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace

const char* instruction_set() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

template <typename T>
const Kernels<T>& kernels_of(DType h_type) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return *avx512::kernels_of<T>(h_type);
  if (isa() == Isa::kAvx2) return *avx2::kernels_of<T>(h_type);
#endif
  return *baseline::kernels_of<T>(h_type);
}

template const Kernels<float>& kernels_of<float>(DType h_type);
template const Kernels<double>& kernels_of<double>(DType h_type);

template <typename T>
const MatrixKernels<T>& matrix_kernels_of() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return *avx512::matrix_kernels_of<T>();
  if (isa() == Isa::kAvx2) return *avx2::matrix_kernels_of<T>();
#endif
  return *baseline::matrix_kernels_of<T>();
}

template const MatrixKernels<float>& matrix_kernels_of<float>();
template const MatrixKernels<double>& matrix_kernels_of<double>();

}  // namespace reft_kernels::cpu
