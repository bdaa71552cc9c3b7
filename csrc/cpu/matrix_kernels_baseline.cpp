// Every x86-64 (SSE2) or aarch64 (NEON).
#define REFT_KERNELS_ISA baseline
#include "matrix_kernels_impl.h"
