// As much of CUDA's runtime as the launchers call, for the machine in machine.h.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>

#include "machine.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

namespace on_cpu {

inline std::string last_error;
inline std::map<const void*, size_t> shared_limit;  // of kernels, where more than the usual
inline constexpr size_t kUsualShared = 48 << 10;
inline constexpr unsigned kThreadsOfMultiprocessor = 2048;
inline constexpr size_t kReservedShared = 1024;  // of each block

inline cudaError_t failed(std::string why) {
  last_error = std::move(why);
  return cudaErrorLaunchFailure;
}

inline int blocks_per_multiprocessor(unsigned threads, size_t shared) {
  const size_t by_shared =
      (static_cast<size_t>(device.shared_bytes) + kReservedShared) / (shared + kReservedShared);
  const size_t by_threads = kThreadsOfMultiprocessor / (threads == 0 ? 1 : threads);
  return static_cast<int>(by_shared < by_threads ? by_shared : by_threads);
}

}  // namespace on_cpu

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : on_cpu::last_error.c_str();
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaError";
}
struct cudaFuncAttributes {
  int ptxVersion = 0;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = on_cpu::device.capability;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const on_cpu::Device& d = on_cpu::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = static_cast<int>(d.l2_bytes);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.capability % 10;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_bytes;
      break;
    default:
      return on_cpu::failed("an attribute of the device that is not known here");
  }
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > on_cpu::device.shared_bytes)
      return on_cpu::failed("more shared memory than a block can have");
    size_t& limit = on_cpu::shared_limit[reinterpret_cast<const void*>(function)];
    if (limit < static_cast<size_t>(value)) limit = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads, size_t shared) {
  *blocks = on_cpu::blocks_per_multiprocessor(static_cast<unsigned>(threads), shared);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... given) {
  on_cpu::Launch launch;
  launch.blocks = config->gridDim.x;
  launch.threads = config->blockDim.x;
  launch.shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) launch.cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
  }
  if (config->gridDim.y * config->gridDim.z * config->blockDim.y * config->blockDim.z != 1) {
    return on_cpu::failed("a grid of one dimension was expected");
  }
  const auto limit = on_cpu::shared_limit.find(reinterpret_cast<const void*>(kernel));
  if (launch.shared_bytes > (limit == on_cpu::shared_limit.end() ? on_cpu::kUsualShared : limit->second)) {
    return on_cpu::failed("more shared memory than was set for the kernel");
  }
  if (launch.cluster > 1 && on_cpu::device.capability < 90)
    return on_cpu::failed("no clusters on this device");
  const int resident = on_cpu::blocks_per_multiprocessor(launch.threads, launch.shared_bytes);
  if (launch.cooperative &&
      static_cast<int64_t>(launch.blocks) > int64_t{resident} * on_cpu::device.multiprocessors) {
    return on_cpu::failed("too many blocks for a cooperative launch");
  }
  std::string wrong = on_cpu::run(launch, [&] { kernel(Parameters(given)...); });
  return wrong.empty() ? cudaSuccess : on_cpu::failed(std::move(wrong));
}
