/* ps_cpu_avx2_attn - ps_cpu_attn.h with 8 floats a vector. */
#include "kernels/ps_cpu_avx2.h"
#include "kernels/ps_cpu_attn.h"
