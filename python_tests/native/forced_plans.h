// Plans of the launchers, some of their fields set by a test.
#pragma once

#include <cstdint>

#include "reft_kernels/edit_plan.h"

namespace on_cpu {

// What a test asks for; -1: as planned. Where the kernels cannot do it, the plan is as near as they can.
struct Wishes {
  int64_t kernel = -1, tile_rows = -1, rank_tile = -1, slab = -1, cluster = -1, threads = -1, blocks = -1,
          chunk = -1;
  int64_t staged = -1;        // 0: forward: rows are read twice
  int64_t shared_bytes = -1;  // as much for a block at most
};

extern Wishes forward_wishes, backward_wishes;
extern reft_kernels::Plan last_plan;

}  // namespace on_cpu
