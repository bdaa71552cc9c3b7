// Philox4x32-10 (Salmon et al., 2011), the counter-based generator of dropout masks; twin of
// reft_kernels/philox.py.
//
// The element in column j of row n of h takes word j % 4 of the block with key `seed` and counter
// (j / 4, n mod 2^32, n div 2^32, 0).
#pragma once

#include "reft_kernels/types.h"

namespace reft_kernels {

struct PhiloxBlock {
  uint32_t word[4];
};

REFT_HOST_DEVICE PhiloxBlock philox(uint64_t seed, uint64_t row, uint32_t block) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace reft_kernels
