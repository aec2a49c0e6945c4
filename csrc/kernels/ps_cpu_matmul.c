/* ps_cpu_matmul - how a matmul is divided on the CPU, whatever the instruction set: inputs are
 * quantised or packed once by all threads, then each thread computes its share of every part's
 * rows.
 *
 * Not here: kernels. A call's results depend on its shape only through the choice between the two
 * ways below.
 * Threads: forks over the launch's pool; work is divided by index.
 */
#include "kernels/ps_cpu_kernels.h"

typedef struct job {
    const ps_cpu_kernels *k;
    const ps_launch *launch;
    const ps_matmul_args *a;
    char *x;      /* inputs as kernels read them, shared */
    char *thread; /* [n_threads][gemm_scratch_bytes] */
} job;

static void barrier(const job *j)
{
    if (j->launch->pool != NULL) ps_pool_barrier(j->launch->pool);
}

static const float *input_row(const job *j, uint64_t t)
{
    return (const float *)ps_cpu_ptr(j->launch, j->a->x) + t * j->a->ldx;
}

static uint64_t row_bytes_of(const job *j, const ps_matmul_part *p)
{
    uint64_t n = 0;
    return ps_fmt_row_bytes(p->fmt, j->a->n_cols, &n) ? n : 0;
}

/* ---- few tokens ---- */

/* Rows between two looks at the abort word: some hundred microseconds of reading. */
enum { ROWS_A_LOOK = 512 };

static void gemv_rows(const job *j, const ps_matmul_part *p, int i_thread, int n_threads)
{
    const ps_matmul_args *a = j->a;
    ps_gemv g = {.w = ps_cpu_ptr(j->launch, p->w),
        .row_bytes = row_bytes_of(j, p),
        .n_cols = a->n_cols,
        .n_x = a->n_tok,
        .bias = ps_cpu_ptr(j->launch, p->bias),
        .add = a->add != 0};
    for (uint32_t t = 0; t < a->n_tok; t++) {
        g.x[t] = ps_fmt_is_float(p->fmt) ? (const void *)input_row(j, t)
                                         : j->x + t * ps_xq_bytes(a->n_cols);
        g.y[t] = (float *)ps_cpu_ptr(j->launch, p->y) + (uint64_t)t * p->ldy;
    }
    uint64_t r, end;
    ps_cpu_share(p->n_rows, 4, i_thread, n_threads, &r, &end);
    for (; r < end && !ps_cpu_aborted(j->launch); r += ROWS_A_LOOK)
        j->k->gemv[p->fmt](&g, r, ps_min_u64(r + ROWS_A_LOOK, end));
}

static void gemv_part(void *ctx, int i_thread, int n_threads)
{
    const job *j = ctx;
    const ps_matmul_args *a = j->a;
    bool quantised = false;
    for (uint32_t i = 0; i < a->n_parts; i++) quantised |= !ps_fmt_is_float(a->part[i].fmt);
    if (quantised) {
        uint64_t t, end;
        ps_cpu_share(a->n_tok, 1, i_thread, n_threads, &t, &end);
        for (; t < end; t++) {
            const ps_xq x = ps_xq_at(j->x + t * ps_xq_bytes(a->n_cols), a->n_cols);
            j->k->quantize(input_row(j, t), a->n_cols, x);
        }
        barrier(j);
    }
    for (uint32_t i = 0; i < a->n_parts; i++) gemv_rows(j, &a->part[i], i_thread, n_threads);
}

/* ---- many tokens ---- */

static void pack_block(
    const job *j, const ps_pack *pack, uint64_t tok, uint64_t tok_end, int i_thread, int n_threads)
{
    const uint64_t n_groups = ps_div_up_u64(tok_end - tok, PS_GEMM_GROUP);
    uint64_t g, end;
    ps_cpu_share(n_groups, 1, i_thread, n_threads, &g, &end);
    for (; g < end; g++) {
        const float *rows[PS_GEMM_GROUP];
        const uint64_t first = tok + g * PS_GEMM_GROUP;
        const uint64_t n = ps_min_u64(tok_end - first, PS_GEMM_GROUP);
        for (uint64_t i = 0; i < n; i++) rows[i] = input_row(j, first + i);
        pack->pack(rows, (uint32_t)n, j->a->n_cols, j->x + g * pack->group_bytes(j->a->n_cols));
    }
}

static void gemm_rows(const job *j, const ps_matmul_part *p, uint64_t tok, uint64_t tok_end,
    int i_thread, int n_threads)
{
    const ps_matmul_args *a = j->a;
    float *y[PS_GEMM_BLOCK_TOK];
    for (uint64_t t = tok; t < tok_end; t++)
        y[t - tok] = (float *)ps_cpu_ptr(j->launch, p->y) + t * p->ldy;
    const ps_gemm g = {.w = ps_cpu_ptr(j->launch, p->w),
        .row_bytes = row_bytes_of(j, p),
        .fmt = p->fmt,
        .n_cols = a->n_cols,
        .x = j->x,
        .n_x = (uint32_t)(tok_end - tok),
        .y = y,
        .bias = ps_cpu_ptr(j->launch, p->bias),
        .add = a->add != 0,
        .scratch = j->thread + (uint64_t)i_thread * j->k->gemm_scratch_bytes};
    uint64_t r, end;
    ps_cpu_share(p->n_rows, j->k->gemm_rows, i_thread, n_threads, &r, &end);
    for (; r < end && !ps_cpu_aborted(j->launch); r += ROWS_A_LOOK)
        j->k->gemm[p->fmt](&g, r, ps_min_u64(r + ROWS_A_LOOK, end));
}

/* Parts that want their inputs packed alike share one packing. */
static void gemm_part(void *ctx, int i_thread, int n_threads)
{
    const job *j = ctx;
    const ps_matmul_args *a = j->a;
    for (uint64_t tok = 0; tok < a->n_tok; tok += PS_GEMM_BLOCK_TOK) {
        const uint64_t tok_end = ps_min_u64(tok + PS_GEMM_BLOCK_TOK, a->n_tok);
        bool done[PS_MATMUL_PARTS] = {false};
        for (uint32_t i = 0; i < a->n_parts; i++) {
            const ps_pack *pack = j->k->pack[a->part[i].fmt];
            if (done[i]) continue;
            pack_block(j, pack, tok, tok_end, i_thread, n_threads);
            barrier(j);
            for (uint32_t m = i; m < a->n_parts; m++) {
                if (j->k->pack[a->part[m].fmt] != pack) continue;
                gemm_rows(j, &a->part[m], tok, tok_end, i_thread, n_threads);
                done[m] = true;
            }
            barrier(j); /* the packed inputs are overwritten next */
        }
    }
}

ps_status ps_cpu_matmul(const ps_cpu_kernels *k, const ps_launch *launch, const ps_matmul_args *a)
{
    ps_status status = ps_op_check(PS_OP_MATMUL, a, NULL);
    if (status != PS_OK) return status;
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    job j = {.k = k, .launch = launch, .a = a};
    if (a->n_tok <= PS_CPU_GEMV_MAX_TOK) {
        j.x = ps_cpu_take(&s, a->n_tok * ps_xq_bytes(a->n_cols));
        if (s.short_of) return PS_EINTERNAL;
        ps_cpu_run(launch, gemv_part, &j);
        return PS_OK;
    }
    const uint64_t n_tok = ps_min_u64(a->n_tok, PS_GEMM_BLOCK_TOK);
    uint64_t group_bytes = 0;
    for (uint32_t i = 0; i < a->n_parts; i++)
        group_bytes = ps_max_u64(group_bytes, k->pack[a->part[i].fmt]->group_bytes(a->n_cols));
    j.x = ps_cpu_take(&s, ps_div_up_u64(n_tok, PS_GEMM_GROUP) * group_bytes);
    j.thread = ps_cpu_take(&s, (uint64_t)ps_cpu_threads(launch) * k->gemm_scratch_bytes);
    if (s.short_of) return PS_EINTERNAL;
    ps_cpu_run(launch, gemm_part, &j);
    return PS_OK;
}
