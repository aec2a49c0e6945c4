/* ps_ops_workspace - how much device workspace the CUDA launchers want, for planning where there is
 * no GPU.
 *
 * Not here: the launchers, and the layouts that they share with this file (ps_cuda_paths.h).
 * Threads: pure functions.
 */
#include "kernels/ps_cuda_paths.h"

uint64_t ps_op_workspace_bytes(ps_op_kind kind, const void *args, int sm)
{
    switch (kind) {
    case PS_OP_MATMUL: return ps_cuda_matmul_layout(args, sm).total;
    case PS_OP_ATTN: return ps_cuda_attn_plan(args).total;
    case PS_OP_MOE_UP: return ps_cuda_moe_up_plan(args, sm).total;
    case PS_OP_MOE_DOWN: return ps_cuda_moe_down_plan(args, sm).total;
    default: return 0;
    }
}
