// The native ops for torch, by its stable ABI: one binary for every supported torch, with or without CUDA,
// and for every Python. Their schemas are in reft_kernels/backends/native_schemas.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "build_info.h"
#include "edit_operands.h"
#include "orthonormal_operands.h"
#include "reft_kernels/launch.h"

#if REFT_KERNELS_WITH_CUDA
// Lives in libtorch_cuda, which a torch for CPUs does not have: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace reft_kernels {
namespace {

void in_torchs_pool(int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  torch::stable::parallel_for(0, count, 1, work);
}

struct OnCpu {
  static void launch(const EditForwardParams& params, int) { cpu::edit_forward(params, in_torchs_pool); }
  static void launch(const EditBackwardParams& params, int) { cpu::edit_backward(params, in_torchs_pool); }
};

// The op on the CPU of a function of params and of one that makes operands, which hold params, of lists of
// tensors.
template <auto function, auto make_operands, typename Function = decltype(make_operands)>
struct OpOfLists;

template <auto function, auto make_operands, typename Operands, typename... Arguments>
struct OpOfLists<function, make_operands, Operands (*)(Arguments...)> {
  static void run(Arguments... arguments) {
    const Operands operands = make_operands(arguments...);
    function(operands.params, static_cast<int>(torch::stable::get_num_threads()), in_torchs_pool);
  }
};

#if REFT_KERNELS_WITH_CUDA

struct OnCuda {
  static void* stream_of(int device) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream, "reft_kernels: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
  }
  static void check(const std::string& error) { STD_TORCH_CHECK(error.empty(), "reft_kernels: ", error); }

  static void launch(const EditForwardParams& params, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cuda::edit_forward(params, device, stream_of(device)));
  }
  static void launch(const EditBackwardParams& params, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cuda::edit_backward(params, device, stream_of(device)));
  }
};

// As OpOfLists, on the device of the last operand, which is a barrier.
template <auto function, auto make_operands, typename Function = decltype(make_operands)>
struct CudaOpOfLists;

template <auto function, auto make_operands, typename Operands, typename... Arguments>
struct CudaOpOfLists<function, make_operands, Operands (*)(Arguments...)> {
  static void run(Arguments... arguments) {
    const Operands operands = make_operands(arguments...);
    const OptionalTensor& barrier = std::get<sizeof...(arguments) - 1>(std::tie(arguments...));
    STD_TORCH_CHECK(barrier, "reft_kernels: expected tensors on a GPU, with a barrier");
    const int device = barrier->get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    std::optional<Tensor> workspace;  // given back to torch, which keeps it until the stream has come so far
    OnCuda::check(function(operands.params, device, OnCuda::stream_of(device), [&](int64_t count) {
      workspace = torch::stable::new_empty(*barrier, {count}, torch::headeronly::ScalarType::Double);
      return static_cast<double*>(workspace->mutable_data_ptr());
    }));
  }
};

#endif

// The op of a machine and of a function that makes parameters of tensors, the first of which is on that
// machine.
template <typename Machine, auto make_params, typename Function = decltype(make_params)>
struct Op;

template <typename Machine, auto make_params, typename Params, typename... Arguments>
struct Op<Machine, make_params, Params (*)(const Tensor&, Arguments...)> {
  static void run(const Tensor& first, Arguments... others) {
    Machine::launch(make_params(first, others...), first.get_device_index());
  }
};

}  // namespace
}  // namespace reft_kernels

// For reft_kernels/backends/native.py: which schemas the implementations below are for.
extern "C" __attribute__((visibility("default"))) const char* reft_kernels_schemas() {
  return REFT_KERNELS_SCHEMAS;
}

// For reft_kernels/backends/cpu.py.
extern "C" __attribute__((visibility("default"))) const char* reft_kernels_instruction_set() {
  return reft_kernels::cpu::instruction_set();
}

// For reft_kernels/backends/cuda.py: why no kernel can be launched on a device, or "". The text is the
// thread's own.
extern "C" __attribute__((visibility("default"))) const char* reft_kernels_cannot_launch(int device) {
#if REFT_KERNELS_WITH_CUDA
  static thread_local std::string reason;
  const torch::stable::accelerator::DeviceGuard guard(device);
  reason = reft_kernels::cuda::cannot_launch(device);
  return reason.c_str();
#else
  static_cast<void>(device);
  return "built without CUDA";
#endif
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CPU, library) {
  using namespace reft_kernels;
  library.impl("native_edit_forward", TORCH_BOX((&Op<OnCpu, &forward_params>::run)));
  library.impl("native_edit_backward", TORCH_BOX((&Op<OnCpu, &backward_params>::run)));
  library.impl("native_orthonormalize_forward",
               TORCH_BOX((&OpOfLists<&cpu::orthonormalize_forward, &orthonormalize_forward_operands>::run)));
  library.impl(
      "native_orthonormalize_backward",
      TORCH_BOX((&OpOfLists<&cpu::orthonormalize_backward, &orthonormalize_backward_operands>::run)));
  library.impl("native_stiefel_adamw_step",
               TORCH_BOX((&OpOfLists<&cpu::stiefel_adamw_step, &stiefel_adamw_operands>::run)));
}

#if REFT_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CUDA, library) {
  using namespace reft_kernels;
  library.impl("native_edit_forward", TORCH_BOX((&Op<OnCuda, &forward_params>::run)));
  library.impl("native_edit_backward", TORCH_BOX((&Op<OnCuda, &backward_params>::run)));
  library.impl(
      "native_orthonormalize_forward",
      TORCH_BOX((&CudaOpOfLists<&cuda::orthonormalize_forward, &orthonormalize_forward_operands>::run)));
  library.impl(
      "native_orthonormalize_backward",
      TORCH_BOX((&CudaOpOfLists<&cuda::orthonormalize_backward, &orthonormalize_backward_operands>::run)));
  library.impl("native_stiefel_adamw_step",
               TORCH_BOX((&CudaOpOfLists<&cuda::stiefel_adamw_step, &stiefel_adamw_operands>::run)));
}
#endif
