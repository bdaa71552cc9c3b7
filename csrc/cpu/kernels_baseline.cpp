// Every x86-64 (SSE2) or aarch64 (NEON).
#define REFT_KERNELS_ISA baseline
#include "kernels_impl.h"
