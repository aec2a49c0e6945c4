/* ps_cuda_ops - the CUDA launchers, one an op, as the table names them. What they take is in
 * ps_ops.h.
 *
 * Threads: one thread a stream, as all launchers.
 */
#ifndef PS_CUDA_OPS_H
#define PS_CUDA_OPS_H

#include "kernels/ps_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

ps_status ps_cuda_embed(const ps_launch *launch, const void *args);
ps_status ps_cuda_norm(const ps_launch *launch, const void *args);
ps_status ps_cuda_matmul(const ps_launch *launch, const void *args);
ps_status ps_cuda_qkv_prep(const ps_launch *launch, const void *args);
ps_status ps_cuda_attn(const ps_launch *launch, const void *args);
ps_status ps_cuda_attn_merge(const ps_launch *launch, const void *args);
ps_status ps_cuda_act(const ps_launch *launch, const void *args);
ps_status ps_cuda_route(const ps_launch *launch, const void *args);
ps_status ps_cuda_gather_experts(const ps_launch *launch, const void *args);
ps_status ps_cuda_moe_up(const ps_launch *launch, const void *args);
ps_status ps_cuda_moe_down(const ps_launch *launch, const void *args);
ps_status ps_cuda_moe_combine(const ps_launch *launch, const void *args);
ps_status ps_cuda_add(const ps_launch *launch, const void *args);
ps_status ps_cuda_gather_rows(const ps_launch *launch, const void *args);
ps_status ps_cuda_softcap(const ps_launch *launch, const void *args);
ps_status ps_cuda_move(const ps_launch *launch, const void *args);

#ifdef __cplusplus
}
#endif
#endif
