// x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define REFT_KERNELS_ISA avx2
#include "matrix_kernels_impl.h"
#endif
