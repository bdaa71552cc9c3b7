// What the ops of the machine of fibers share: its device's number, its barrier's word, and their failures.
#pragma once

#include <cstdint>
#include <string>

namespace on_cpu {

extern uint32_t barrier;  // of all launches, one after the other

// The launchers ask each device once for its properties: another device, another number.
int device_number();

}  // namespace on_cpu
