// What the launchers share: the device's properties, asked once, and the launch of a kernel as its plan says.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "reft_kernels/device.cuh"
#include "reft_kernels/edit_plan.h"

namespace reft_kernels::cuda {

inline std::string message_of(cudaError_t error, const char* during) {
  if (error == cudaSuccess) return "";
  return std::string(during) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

// Stands for all kernels when the runtime is asked what they were compiled for.
static REFT_KERNEL(32, 1) compiled_for_what() {}

// Of the current device, which has that number. Returns "" or what went wrong.
inline std::string device_of(int device, Device& found) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto place = known.find(device);
  if (place != known.end()) {
    found = place->second;
    return "";
  }
  int major = 0, minor = 0, multiprocessors = 0, shared = 0, l2 = 0;
  const std::pair<cudaDeviceAttr, int*> asked[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared},
      {cudaDevAttrL2CacheSize, &l2},
  };
  for (const auto& [attribute, value] : asked) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return message_of(error, "cudaDeviceGetAttribute");
  }
  // Code compiled for less than the device is (from PTX, at run time) can do no more than what it was
  // compiled for.
  cudaFuncAttributes compiled = {};
  const cudaError_t error =
      cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(&compiled_for_what));
  if (error != cudaSuccess) return message_of(error, "no kernel can be launched here");
  found.capability = std::min(10 * major + minor, compiled.ptxVersion);
  found.multiprocessors = multiprocessors;
  found.shared_bytes = shared;
  found.l2_bytes = l2;
  known.emplace(device, found);
  return "";
}

// Lets a kernel have more dynamic shared memory than it may have by itself; asked once for each kernel and
// device.
inline cudaError_t allow_shared_memory(const void* kernel, int device, int bytes) {
  constexpr int kByDefault = 48 * 1024;
  if (bytes <= kByDefault) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

// Enqueues the kernel and nothing else, so that it can be captured in a graph. Returns "" or what went wrong.
template <typename... Parameters>
std::string launch(void (*kernel)(Parameters...), const Plan& plan, int device, void* stream,
                   bool cooperative, const Parameters&... parameters) {
  const cudaError_t error =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), device, plan.shared_bytes);
  if (error != cudaSuccess) return message_of(error, "cudaFuncSetAttribute");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (plan.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(plan.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return message_of(cudaLaunchKernelEx(&config, kernel, parameters...), "launch");
}

}  // namespace reft_kernels::cuda
