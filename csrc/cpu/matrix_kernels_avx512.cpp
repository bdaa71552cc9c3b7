// x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#define REFT_KERNELS_ISA avx512
#include "matrix_kernels_impl.h"
#endif
