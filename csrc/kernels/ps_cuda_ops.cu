/* ps_cuda_ops - the CUDA op table.
 *
 * Not here: any kernel.
 * Threads: constant data.
 */
#include "kernels/ps_cuda_ops.h"

const ps_op_table *ps_cuda_ops(void)
{
    /* In the order of ps_op_kind: C++ has no designators for arrays. */
    static const ps_op_table table = {
        "cuda", {ps_cuda_embed, ps_cuda_norm, ps_cuda_matmul, ps_cuda_qkv_prep, ps_cuda_attn,
                    ps_cuda_attn_merge, ps_cuda_act, ps_cuda_route, ps_cuda_gather_experts,
                    ps_cuda_moe_up, ps_cuda_moe_down, ps_cuda_moe_combine, ps_cuda_add,
                    ps_cuda_gather_rows, ps_cuda_softcap, ps_cuda_move}};
    static_assert(PS_OP_EMBED == 0 && PS_OP_MATMUL == 2 && PS_OP_ATTN_MERGE == 5 &&
                      PS_OP_ROUTE == 7 && PS_OP_GATHER_EXPERTS == 8 && PS_OP_MOE_COMBINE == 11 &&
                      PS_OP_SOFTCAP == 14 && PS_OP_MOVE == 15 && PS_OP_COUNT == 16,
        "the table follows the enum");
    return &table;
}
