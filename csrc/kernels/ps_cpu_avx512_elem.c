/* ps_cpu_avx512_elem - ps_cpu_elem.h with 16 floats a vector. */
#include "kernels/ps_cpu_avx512.h"
#include "kernels/ps_cpu_elem.h"
