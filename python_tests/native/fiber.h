// Switching between stacks.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace on_cpu {

struct Context {
  void* stack = nullptr;  // lowest address; null: the thread's own
  size_t bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
};

// Makes `context` start `entry`, which must not return, on its stack when it is next switched to.
void prepare(Context& context, void (*entry)());

// Continues `to`. Returns when something switches back to `from`.
void switch_to(Context& from, Context& to);

// The first thing that `entry` does on the stack of `context`.
void entered(Context& context);

}  // namespace on_cpu
