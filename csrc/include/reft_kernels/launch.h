// What csrc/torch_library.cpp calls.
#pragma once

#include <functional>
#include <string>

#include "reft_kernels/edit_params.h"
#include "reft_kernels/orthonormalize_params.h"
#include "reft_kernels/stiefel_adamw_params.h"

namespace reft_kernels {

namespace cpu {

// Calls `work(begin, end)` on disjoint ranges that cover [0, count), on several threads at once or one after
// another. The results do not depend on how many or in what order.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& work)>;

void edit_forward(const EditForwardParams& params, const ParallelFor& parallel_for);
void edit_backward(const EditBackwardParams& params, const ParallelFor& parallel_for);

// `threads` is how many `parallel_for` has.
void orthonormalize_forward(const OrthonormalizeParams& params, int threads, const ParallelFor& parallel_for);
void orthonormalize_backward(const OrthonormalizeParams& params, int threads,
                             const ParallelFor& parallel_for);
void stiefel_adamw_step(const StiefelAdamWParams& params, int threads, const ParallelFor& parallel_for);

// The instruction set that is used on this machine: "avx512", "avx2", "neon" or "baseline".
const char* instruction_set();

}  // namespace cpu

namespace cuda {

// Why no kernel of the library can be launched on a device, the current one; "" if they can.
std::string cannot_launch(int device);

// On the current device; `stream` is a cudaStream_t. Returns "" or what went wrong.
std::string edit_forward(const EditForwardParams& params, int device, void* stream);
std::string edit_backward(const EditBackwardParams& params, int device, void* stream);

// Memory for so many float64 on the device, which lasts until what is enqueued afterwards has run.
using Allocate = std::function<double*(int64_t count)>;

std::string orthonormalize_forward(const OrthonormalizeParams& params, int device, void* stream,
                                   const Allocate& allocate);
std::string orthonormalize_backward(const OrthonormalizeParams& params, int device, void* stream,
                                    const Allocate& allocate);
std::string stiefel_adamw_step(const StiefelAdamWParams& params, int device, void* stream,
                               const Allocate& allocate);

}  // namespace cuda

}  // namespace reft_kernels
