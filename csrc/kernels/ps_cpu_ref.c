/* ps_cpu_ref - the reference of every op but attention and experts (ps_cpu_ref_attn.c,
 * ps_cpu_ref_moe.c): plain C in the order of the formula, on inputs in float32 against dequantised
 * weights. Sums run in double, one after the other, so that what a faster variant is compared with
 * carries no rounding of its own worth speaking of.
 *
 * Not here: speed. This is also what a CPU without AVX2 runs.
 * Threads: rows, tokens or elements are shared out by index; no result depends on their number.
 */
#include "kernels/ps_cpu.h"

#include <math.h>
#include <string.h>

/* ---- embed ---- */

typedef struct embed_job {
    const ps_embed_args *a;
    const char *table;
    const int32_t *ids;
    float *out;
    uint64_t row_bytes;
} embed_job;

static void embed_part(void *ctx, int i_thread, int n_threads)
{
    const embed_job *j = ctx;
    const ps_embed_args *a = j->a;
    uint64_t t, end;
    ps_cpu_share(a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++) {
        float *out = j->out + t * a->n_cols;
        ps_dequant_row(
            (ps_fmt)a->fmt, j->table + (uint64_t)j->ids[t] * j->row_bytes, out, a->n_cols);
        for (uint32_t i = 0; i < a->n_cols; i++) out[i] *= a->scale;
    }
}

ps_status ps_cpu_ref_embed(const ps_launch *launch, const void *args)
{
    const ps_embed_args *a = args;
    ps_status status = ps_op_check(PS_OP_EMBED, a, NULL);
    if (status != PS_OK) return status;
    embed_job j = {.a = a,
        .table = ps_cpu_ptr(launch, a->table),
        .ids = ps_cpu_ptr(launch, a->ids),
        .out = ps_cpu_ptr(launch, a->out)};
    if (!ps_fmt_row_bytes(a->fmt, a->n_cols, &j.row_bytes)) return PS_EINTERNAL;
    /* One row is one thread's work. Where the rest of the model is on the GPU the others sleep
     * since the last token, and are not woken for nothing: in traces of that, with 14 threads, this
     * op took 200 us, against 5 while all are awake. */
    if (a->n_tok == 1)
        embed_part(&j, 0, 1);
    else
        ps_cpu_run(launch, embed_part, &j);
    return PS_OK;
}

/* ---- norm ---- */

typedef struct norm_job {
    const ps_norm_args *a;
    const float *x, *w, *b, *residual;
    float *out;
} norm_job;

static void norm_token(const norm_job *j, uint64_t t)
{
    const ps_norm_args *a = j->a;
    const float *x = j->x + t * a->ldx;
    float *out = j->out + t * a->ldo;
    double mean = 0, var = 0;
    if (a->kind == PS_NORM_LAYER) {
        for (uint32_t i = 0; i < a->n; i++) mean += (double)x[i];
        mean /= a->n;
    }
    for (uint32_t i = 0; i < a->n; i++) var += ((double)x[i] - mean) * ((double)x[i] - mean);
    const double scale = 1.0 / sqrt(var / a->n + (double)a->eps);
    for (uint32_t i = 0; i < a->n; i++) {
        double y = ((double)x[i] - mean) * scale * (double)j->w[i];
        if (j->b != NULL) y += (double)j->b[i];
        if (j->residual != NULL) y += (double)j->residual[t * a->ldo + i];
        out[i] = (float)y;
    }
}

static void norm_part(void *ctx, int i_thread, int n_threads)
{
    const norm_job *j = ctx;
    uint64_t t, end;
    ps_cpu_share(j->a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++) norm_token(j, t);
}

ps_status ps_cpu_ref_norm(const ps_launch *launch, const void *args)
{
    const ps_norm_args *a = args;
    ps_status status = ps_op_check(PS_OP_NORM, a, NULL);
    if (status != PS_OK) return status;
    norm_job j = {.a = a,
        .x = ps_cpu_ptr(launch, a->x),
        .w = ps_cpu_ptr(launch, a->w),
        .b = a->kind == PS_NORM_LAYER ? ps_cpu_ptr(launch, a->b) : NULL,
        .residual = ps_cpu_ptr(launch, a->residual),
        .out = ps_cpu_ptr(launch, a->out)};
    ps_cpu_run(launch, norm_part, &j);
    return PS_OK;
}

/* ---- matmul ---- */

typedef struct matmul_job {
    const ps_launch *launch;
    const ps_matmul_args *a;
    float *rows; /* [n_threads][n_cols], one dequantised row each */
} matmul_job;

static void matmul_row(
    const matmul_job *j, const ps_matmul_part *p, uint64_t r, uint64_t row_bytes, float *row)
{
    const ps_matmul_args *a = j->a;
    const float *x = ps_cpu_ptr(j->launch, a->x), *bias = ps_cpu_ptr(j->launch, p->bias);
    const char *w = ps_cpu_ptr(j->launch, p->w);
    float *y = ps_cpu_ptr(j->launch, p->y);
    ps_dequant_row((ps_fmt)p->fmt, w + r * row_bytes, row, a->n_cols);
    for (uint64_t t = 0; t < a->n_tok; t++) {
        double sum = bias != NULL ? (double)bias[r] : 0.0;
        for (uint32_t c = 0; c < a->n_cols; c++) sum += (double)x[t * a->ldx + c] * (double)row[c];
        float *out = &y[t * p->ldy + r];
        *out = (float)(a->add ? (double)*out + sum : sum);
    }
}

static void matmul_part(void *ctx, int i_thread, int n_threads)
{
    const matmul_job *j = ctx;
    const ps_matmul_args *a = j->a;
    float *row = j->rows + (uint64_t)i_thread * a->n_cols;
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const ps_matmul_part *p = &a->part[i];
        uint64_t r, end, row_bytes = 0;
        if (!ps_fmt_row_bytes(p->fmt, a->n_cols, &row_bytes)) return; /* checked by the launcher */
        ps_cpu_share(p->n_rows, 1, i_thread, n_threads, &r, &end);
        for (; r < end && !ps_cpu_aborted(j->launch); r++) matmul_row(j, p, r, row_bytes, row);
    }
}

ps_status ps_cpu_ref_matmul(const ps_launch *launch, const void *args)
{
    const ps_matmul_args *a = args;
    ps_status status = ps_op_check(PS_OP_MATMUL, a, NULL);
    if (status != PS_OK) return status;
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    matmul_job j = {.launch = launch, .a = a};
    j.rows = ps_cpu_take(&s, (uint64_t)ps_cpu_threads(launch) * a->n_cols * sizeof(float));
    if (s.short_of) return PS_EINTERNAL;
    ps_cpu_run(launch, matmul_part, &j);
    return PS_OK;
}

/* ---- activation ---- */

typedef struct act_job {
    const ps_act_args *a;
    const float *gate, *up;
    float *out;
} act_job;

double ps_cpu_ref_gate(uint32_t kind, double g, double u)
{
    switch (kind) {
    case PS_ACT_SILU: return g / (1.0 + exp(-g)) * u;
    case PS_ACT_GELU: {
        const double c = 0.79788456080286535588; /* sqrt(2 / pi) */
        return 0.5 * g * (1.0 + tanh(c * (g + 0.044715 * g * g * g))) * u;
    }
    case PS_ACT_RELU2: return u > 0 ? u * u : 0;
    default: /* PS_ACT_SWIGLU_OAI */
        g = g < 7.0 ? g : 7.0;
        u = u < -7.0 ? -7.0 : u > 7.0 ? 7.0 : u;
        return g / (1.0 + exp(-1.702 * g)) * (u + 1.0);
    }
}

static void act_part(void *ctx, int i_thread, int n_threads)
{
    const act_job *j = ctx;
    const ps_act_args *a = j->a;
    uint64_t i, end;
    ps_cpu_share((uint64_t)a->n_tok * a->n, 1, i_thread, n_threads, &i, &end);
    for (; i < end; i++) {
        const uint64_t t = i / a->n, c = i % a->n;
        const double g = j->gate != NULL ? (double)j->gate[t * a->ldg + c] : 0.0;
        j->out[t * a->ldo + c] = (float)ps_cpu_ref_gate(a->kind, g, (double)j->up[t * a->ldu + c]);
    }
}

ps_status ps_cpu_ref_act(const ps_launch *launch, const void *args)
{
    const ps_act_args *a = args;
    ps_status status = ps_op_check(PS_OP_ACT, a, NULL);
    if (status != PS_OK) return status;
    act_job j = {.a = a,
        .gate = a->kind == PS_ACT_RELU2 ? NULL : ps_cpu_ptr(launch, a->gate),
        .up = ps_cpu_ptr(launch, a->up),
        .out = ps_cpu_ptr(launch, a->out)};
    ps_cpu_run(launch, act_part, &j);
    return PS_OK;
}

/* ---- the small ones: bound by memory or tiny, so one thread each ---- */

ps_status ps_cpu_ref_add(const ps_launch *launch, const void *args)
{
    const ps_add_args *a = args;
    ps_status status = ps_op_check(PS_OP_ADD, a, NULL);
    if (status != PS_OK) return status;
    const float *p = ps_cpu_ptr(launch, a->a), *q = ps_cpu_ptr(launch, a->b);
    float *out = ps_cpu_ptr(launch, a->out);
    for (uint64_t i = 0; i < a->n; i++) out[i] = p[i] + q[i];
    return PS_OK;
}

ps_status ps_cpu_ref_gather_rows(const ps_launch *launch, const void *args)
{
    const ps_gather_rows_args *a = args;
    ps_status status = ps_op_check(PS_OP_GATHER_ROWS, a, NULL);
    if (status != PS_OK) return status;
    const float *x = ps_cpu_ptr(launch, a->x);
    const int32_t *rows = ps_cpu_ptr(launch, a->rows);
    float *out = ps_cpu_ptr(launch, a->out);
    for (uint64_t i = 0; i < a->n_rows; i++)
        memcpy(out + i * a->n, x + (uint64_t)rows[i] * a->n, (uint64_t)a->n * sizeof(float));
    return PS_OK;
}

ps_status ps_cpu_ref_move(const ps_launch *launch, const void *args)
{
    const ps_move_args *a = args;
    ps_status status = ps_op_check(PS_OP_MOVE, a, NULL);
    if (status != PS_OK) return status;
    memcpy(ps_cpu_ptr(launch, a->out), ps_cpu_ptr(launch, a->x), a->n * sizeof(uint32_t));
    return PS_OK;
}

ps_status ps_cpu_ref_softcap(const ps_launch *launch, const void *args)
{
    const ps_softcap_args *a = args;
    ps_status status = ps_op_check(PS_OP_SOFTCAP, a, NULL);
    if (status != PS_OK) return status;
    float *x = ps_cpu_ptr(launch, a->x);
    const double cap = (double)a->cap;
    for (uint64_t i = 0; i < a->n; i++) x[i] = (float)(cap * tanh((double)x[i] / cap));
    return PS_OK;
}

/* ---- the table ---- */

const ps_op_table *ps_cpu_ref_table(void)
{
    static const ps_op_table table = {.name = "ref",
        .op = {[PS_OP_EMBED] = ps_cpu_ref_embed,
            [PS_OP_NORM] = ps_cpu_ref_norm,
            [PS_OP_MATMUL] = ps_cpu_ref_matmul,
            [PS_OP_QKV_PREP] = ps_cpu_ref_qkv_prep,
            [PS_OP_ATTN] = ps_cpu_ref_attn,
            [PS_OP_ATTN_MERGE] = ps_cpu_ref_attn_merge,
            [PS_OP_ACT] = ps_cpu_ref_act,
            [PS_OP_ROUTE] = ps_cpu_ref_route,
            [PS_OP_GATHER_EXPERTS] = ps_cpu_ref_gather_experts,
            [PS_OP_MOE_UP] = ps_cpu_ref_moe_up,
            [PS_OP_MOE_DOWN] = ps_cpu_ref_moe_down,
            [PS_OP_MOE_COMBINE] = ps_cpu_ref_moe_combine,
            [PS_OP_ADD] = ps_cpu_ref_add,
            [PS_OP_GATHER_ROWS] = ps_cpu_ref_gather_rows,
            [PS_OP_SOFTCAP] = ps_cpu_ref_softcap,
            [PS_OP_MOVE] = ps_cpu_ref_move}};
    return &table;
}
