/* ps_cuda_absent - the CUDA op table of builds without CUDA: there is none.
 *
 * Threads: constant.
 */
#include "kernels/ps_ops.h"

#ifndef PS_HAVE_CUDA
const ps_op_table *ps_cuda_ops(void)
{
    return NULL;
}
#else
typedef int ps_cuda_is_present; /* ISO C wants a declaration in every file */
#endif
