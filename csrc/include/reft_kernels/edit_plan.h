// How an edit is launched on a GPU: pure functions of its sizes and the device, used by the launchers and the
// tests.
#pragma once

#include <string>

#include "reft_kernels/edit_params.h"

namespace reft_kernels {

struct Device {
  int capability = 90;            // 10 * major + minor
  int multiprocessors = 132;      //
  int shared_bytes = 227 * 1024;  // dynamic shared memory that a block may have
  int64_t l2_bytes = 50 << 20;
};

enum class Kernel : int32_t {
  kForwardRows,     // K1: CUDA cores, rows held in shared memory
  kForwardCluster,  // K2: the same, a row's columns spread over a cluster of blocks (sm_90 and newer)
  kForwardMma,      // K3: tensor cores, half precision
  kBackwardRows,    // K4, K5: CUDA cores
  kBackwardMma,     // K4, K5: tensor cores, half precision
};

const char* name_of(Kernel kernel);

struct Plan {
  Kernel kernel = Kernel::kForwardRows;
  int tile_rows = 1;     // slots that a block takes at once (backward: in phase 1)
  int rank_tile = 1;     // ranks at once; a template parameter of the kernel
  int slab = 0;          // backward: columns that a block owns in phase 2
  int cluster = 1;       // blocks in a cluster
  int threads = 256;     // in a block
  int64_t blocks = 1;    // in the grid
  int shared_bytes = 0;  // dynamic shared memory of a block
  int64_t chunk = 0;     // backward: slots between two grid barriers
  std::string refusal;   // why no kernel takes the edit; empty if one does
};

Plan plan_edit_forward(const EditForwardParams& params, const Device& device);
Plan plan_edit_backward(const EditBackwardParams& params, const Device& device);

}  // namespace reft_kernels
