#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the registers that a callee must keep on the old stack, and the stack pointer where the first
// argument points.
extern "C" void on_cpu_switch(void** from, void* to);
asm(R"(
.text
.globl on_cpu_switch
.hidden on_cpu_switch
.type on_cpu_switch, @function
on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size on_cpu_switch, . - on_cpu_switch
)");
#endif

namespace on_cpu {

namespace {

#if defined(__SANITIZE_ADDRESS__)
Context* left;  // by the last switch
#endif

void jump(Context& from, Context& to) {
#if defined(__x86_64__)
  on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

}  // namespace

void prepare(Context& context, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(context.stack, context.bytes);
#endif
  context.fake_stack = nullptr;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(context.stack) + context.bytes);
  *--top = 0;  // where `entry` would return to; at a call the stack pointer is 8 past a multiple of 16
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.stack;
  context.registers.uc_stack.ss_size = context.bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
  jump(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  jump(from, to);
#endif
}

void entered([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(context.fake_stack, &stack, &bytes);
  if (left->stack == nullptr) {  // the thread's own stack, to which it will be switched back
    left->stack = const_cast<void*>(stack);
    left->bytes = bytes;
  }
#endif
}

}  // namespace on_cpu
