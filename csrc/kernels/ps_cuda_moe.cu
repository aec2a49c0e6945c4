/* ps_cuda_moe - the launchers of routed experts: assignment by assignment in decode, grouped by
 * expert in prefill.
 *
 * Not here: the kernels below (ps_cuda_matvec.cu, ps_cuda_gemm.cu), routing (ps_cuda_route.cu).
 * Threads: launchers on the engine's thread. The host never learns who was routed where.
 */
#include "kernels/ps_cuda.cuh"
#include "kernels/ps_cuda_inner.h"
#include "kernels/ps_cuda_ops.h"

/* ---- gate and up of different formats: both lie in the workspace ---- */

typedef struct moe_act_params {
    ps_moe_up_args a;
    const float *gate, *up; /* [n_tok * k][n_ff] */
} moe_act_params;

/* Grid: x over columns, y over assignments in strides. */
static __global__ void __launch_bounds__(128) k_moe_act(const __grid_constant__ moe_act_params p)
{
    ps_dep_wait();
    const ps_moe_up_args &a = p.a;
    const uint32_t f = blockIdx.x * blockDim.x + threadIdx.x;
    if (f >= a.n_ff) return;
    for (uint64_t i = blockIdx.y; i < (uint64_t)a.n_tok * a.k; i += gridDim.y) {
        const uint32_t e = (uint32_t)((const int32_t *)a.ids.a)[i];
        if (((const uint64_t *)a.gate_ptrs.a)[e] == 0 || ((const uint64_t *)a.up_ptrs.a)[e] == 0)
            continue;
        float gate = p.gate[i * a.n_ff + f], up = p.up[i * a.n_ff + f];
        if (a.gate_bias.a != 0) gate += ((const float *)a.gate_bias.a)[(uint64_t)e * a.n_ff + f];
        if (a.up_bias.a != 0) up += ((const float *)a.up_bias.a)[(uint64_t)e * a.n_ff + f];
        ((float *)a.out.a)[i * a.n_ff + f] = ps_activate(a.act, gate, up);
    }
}

/* ---- one matrix, or a pair ---- */

typedef struct expert_call {
    const ps_launch *launch;
    const float *x;
    bool x_aligned;
    uint32_t n_x, ldx, n_cols; /* rows of x */
    bool decode;
    ps_cuda_layout x16; /* in ws, where not decode */
    ps_dptr ws;
    ps_rows rows;
} expert_call;

static ps_status run_experts(const expert_call *c, uint32_t fmt)
{
    if (c->decode) {
        ps_matvec_params p = {};
        p.x = c->x, p.ldx = c->ldx, p.x_aligned = c->x_aligned;
        p.n_tok = 1, p.n_cols = c->n_cols;
        p.rows = c->rows;
        if (ps_cuda_matvec_tok(fmt, c->n_cols, 1, c->launch->info->sm) == 0) return PS_EUNSUPPORTED;
        return ps_cuda_matvec(c->launch, fmt, 1, &p);
    }
    ps_to16_params x = {c->x, ps_ptr<uint16_t>(c->ws),
        ps_ptr<float>(ps_dptr_add(c->ws, c->x16.scale)), c->n_x, c->n_cols, c->ldx,
        (uint32_t)ps_cuda_pad_cols(c->n_cols), ps_cuda_is_bf16(fmt),
        c->x_aligned && c->n_cols % 4 == 0};
    const ps_status status = ps_cuda_to16_routed(c->launch, &x, &c->rows);
    if (status != PS_OK) return status;
    ps_gemm_params p = {};
    p.x16 = x.x16, p.scale = x.scale, p.ldx16 = x.ldx16;
    p.n_cols = c->n_cols;
    p.rows = c->rows;
    return ps_cuda_gemm(c->launch, fmt, &p);
}

static ps_status up_of_two_formats(
    const ps_moe_up_args *a, expert_call *c, const ps_cuda_moe_up_layout *l)
{
    const int sm = c->launch->info->sm;
    moe_act_params act = {*a, ps_ptr<const float>(ps_dptr_add(a->ws, l->gate)),
        ps_ptr<const float>(ps_dptr_add(a->ws, l->up))};
    c->rows.mode = PS_ROWS_EXPERT;
    c->rows.bias0 = c->rows.bias1 = NULL;
    c->rows.out = (float *)act.gate;
    c->decode = ps_cuda_moe_is_decode(a->fmt_gate, a->n_tok, sm);
    ps_status status = run_experts(c, a->fmt_gate);
    c->rows.w0 = c->rows.w1;
    c->rows.out = (float *)act.up;
    c->decode = ps_cuda_moe_is_decode(a->fmt_up, a->n_tok, sm);
    if (status == PS_OK) status = run_experts(c, a->fmt_up);
    if (status != PS_OK) return status;
    const uint64_t n_assign = (uint64_t)a->n_tok * a->k;
    const dim3 grid(ps_div_up(a->n_ff, 128), n_assign < 4096 ? (unsigned)n_assign : 4096);
    return ps_cuda_launch(c->launch, (const void *)k_moe_act, grid, 128, 0, &act);
}

ps_status ps_cuda_moe_up(const ps_launch *launch, const void *args)
{
    const ps_moe_up_args *a = (const ps_moe_up_args *)args;
    const ps_status status = ps_op_check(PS_OP_MOE_UP, a, NULL);
    if (status != PS_OK) return status;
    const ps_cuda_moe_up_layout l = ps_cuda_moe_up_plan(a, launch->info->sm);
    const uint64_t n_assign = (uint64_t)a->n_tok * a->k;
    if (a->ids.a == 0 || a->ws_bytes < l.total || n_assign > INT32_MAX) return PS_EINTERNAL;
    expert_call c = {};
    c.launch = launch;
    c.x = ps_ptr<const float>(a->x);
    c.x_aligned = ps_rows_aligned(a->x, a->ldx);
    c.n_x = a->n_tok, c.ldx = a->ldx, c.n_cols = a->n_cols;
    c.x16 = l.x16;
    c.ws = a->ws;
    ps_rows *r = &c.rows;
    r->mode = PS_ROWS_PAIR;
    r->ids = ps_ptr<const int32_t>(a->ids);
    r->order = ps_ptr<const int32_t>(a->order), r->starts = ps_ptr<const int32_t>(a->starts);
    r->w0 = ps_ptr<const uint64_t>(a->gate_ptrs), r->w1 = ps_ptr<const uint64_t>(a->up_ptrs);
    r->bias0 = ps_ptr<const float>(a->gate_bias), r->bias1 = ps_ptr<const float>(a->up_bias);
    r->out = ps_ptr<float>(a->out);
    r->n_expert = a->n_expert, r->n_rows = a->n_ff, r->n_assign = (uint32_t)n_assign;
    r->act = a->act, r->x_div = a->k, r->n_here = a->n_here;
    if (a->fmt_gate != a->fmt_up) return up_of_two_formats(a, &c, &l);
    c.decode = ps_cuda_moe_is_decode(a->fmt_gate, a->n_tok, launch->info->sm);
    return run_experts(&c, a->fmt_gate);
}

ps_status ps_cuda_moe_down(const ps_launch *launch, const void *args)
{
    const ps_moe_down_args *a = (const ps_moe_down_args *)args;
    const ps_status status = ps_op_check(PS_OP_MOE_DOWN, a, NULL);
    if (status != PS_OK) return status;
    expert_call c = {};
    c.x16 = ps_cuda_moe_down_plan(a, launch->info->sm);
    const uint64_t n_assign = (uint64_t)a->n_tok * a->k;
    if (a->ids.a == 0 || a->ws_bytes < c.x16.total || n_assign > INT32_MAX) return PS_EINTERNAL;
    c.launch = launch;
    c.x = ps_ptr<const float>(a->h);
    c.x_aligned = ps_rows_aligned(a->h, a->n_ff);
    c.n_x = (uint32_t)n_assign, c.ldx = a->n_ff, c.n_cols = a->n_ff;
    c.decode = ps_cuda_moe_is_decode(a->fmt, a->n_tok, launch->info->sm);
    c.ws = a->ws;
    ps_rows *r = &c.rows;
    r->mode = PS_ROWS_EXPERT;
    r->ids = ps_ptr<const int32_t>(a->ids);
    r->order = ps_ptr<const int32_t>(a->order), r->starts = ps_ptr<const int32_t>(a->starts);
    r->w0 = ps_ptr<const uint64_t>(a->down_ptrs);
    r->bias0 = ps_ptr<const float>(a->bias);
    r->out = ps_ptr<float>(a->y);
    r->n_expert = a->n_expert, r->n_rows = a->n_rows, r->n_assign = (uint32_t)n_assign;
    r->x_div = 1, r->n_here = a->n_here;
    return run_experts(&c, a->fmt);
}
