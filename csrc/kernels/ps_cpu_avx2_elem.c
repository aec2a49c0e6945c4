/* ps_cpu_avx2_elem - ps_cpu_elem.h with 8 floats a vector. */
#include "kernels/ps_cpu_avx2.h"
#include "kernels/ps_cpu_elem.h"
