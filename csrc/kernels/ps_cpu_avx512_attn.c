/* ps_cpu_avx512_attn - ps_cpu_attn.h with 16 floats a vector. */
#include "kernels/ps_cpu_avx512.h"
#include "kernels/ps_cpu_attn.h"
