/* ps_cpu_moe - how the experts' matrices are divided on the CPU, whatever the instruction set. The
 * assignments of a call, grouped by expert, are taken in batches: all threads quantise or pack the
 * batch's inputs, then each thread computes its share of the rows of the experts in it.
 *
 * Not here: kernels, routing. Whether few or many tokens are meant follows from the call's shape,
 * never from where the router sent them.
 * Threads: forks over the launch's pool; every thread walks the same batches.
 */
#include "kernels/ps_cpu_kernels.h"

enum {
    CAP_GROUPS = PS_GEMM_BLOCK_TOK / PS_GEMM_GROUP, /* packed inputs of one batch */
    BLOCK_ROWS = 64, /* of gate and up computed before the activation joins them */
};

typedef struct job {
    const ps_cpu_kernels *k;
    const ps_launch *launch;
    const int32_t *order, *starts;
    const ps_dptr *w[2]; /* one address an expert; [1] is NULL but for gate and up */
    const float *bias[2];
    uint32_t fmt[2];
    uint64_t row_bytes[2];
    uint32_t n_expert, n_cols, n_rows;
    const float *x;
    uint64_t ldx;
    uint32_t per_row; /* assignments that share a row of x: k for up, 1 for down */
    float *out;       /* [assignment][n_rows] */
    uint32_t act;
    bool many;
    char *packed;         /* CAP_GROUPS groups, shared */
    uint64_t group_bytes; /* of one group, or of PS_GEMM_GROUP quantised rows */
    char *thread;         /* [n_threads][thread_bytes] */
    uint64_t thread_bytes;
} job;

typedef struct segment { /* assignments order[from .. to) of one expert */
    uint32_t e, group;   /* its inputs begin at this group */
    int32_t from, to;
} segment;

typedef struct batch {
    segment seg[CAP_GROUPS];
    uint32_t n, n_groups;
} batch;

static bool here(const job *j, uint32_t e)
{
    return !ps_dptr_is_null(j->w[0][e]) && (j->w[1] == NULL || !ps_dptr_is_null(j->w[1][e]));
}

/* The next batch from expert *e, position *at on; false when there is none. */
static bool next_batch(const job *j, uint32_t *e, int32_t *at, batch *b)
{
    b->n = b->n_groups = 0;
    for (; *e < j->n_expert && b->n_groups < CAP_GROUPS; *at = 0) {
        const int32_t from = *at > j->starts[*e] ? *at : j->starts[*e];
        int32_t to = j->starts[*e + 1];
        if (from >= to || !here(j, *e)) {
            ++*e;
            continue;
        }
        const int32_t room = (int32_t)(CAP_GROUPS - b->n_groups) * PS_GEMM_GROUP;
        const bool whole = to - from <= room;
        if (!whole) to = from + room;
        b->seg[b->n++] = (segment){.e = *e, .group = b->n_groups, .from = from, .to = to};
        b->n_groups += (uint32_t)(to - from + PS_GEMM_GROUP - 1) / PS_GEMM_GROUP;
        if (!whole) {
            *at = to;
            return true;
        }
        ++*e;
    }
    return b->n > 0;
}

static const float *input_row(const job *j, int32_t at)
{
    return j->x + (uint64_t)j->order[at] / j->per_row * j->ldx;
}

static void barrier(const job *j)
{
    if (j->launch->pool != NULL) ps_pool_barrier(j->launch->pool);
}

/* ---- inputs ---- */

static void convert_group(const job *j, const segment *s, uint32_t group)
{
    const int32_t first = s->from + (int32_t)(group - s->group) * PS_GEMM_GROUP;
    const int32_t left = s->to - first, n = left < PS_GEMM_GROUP ? left : PS_GEMM_GROUP;
    char *out = j->packed + group * j->group_bytes;
    const float *rows[PS_GEMM_GROUP];
    for (int32_t i = 0; i < n; i++) {
        rows[i] = input_row(j, first + i);
        if (!j->many)
            j->k->quantize(rows[i], j->n_cols,
                ps_xq_at(out + (uint64_t)i * ps_xq_bytes(j->n_cols), j->n_cols));
    }
    if (j->many) j->k->pack[j->fmt[0]]->pack(rows, (uint32_t)n, j->n_cols, out);
}

static void convert_batch(const job *j, const batch *b, int i_thread, int n_threads)
{
    uint64_t g, end;
    uint32_t s = 0;
    ps_cpu_share(b->n_groups, 1, i_thread, n_threads, &g, &end);
    for (; g < end; g++) {
        while (s + 1 < b->n && b->seg[s + 1].group <= g) s++;
        convert_group(j, &b->seg[s], (uint32_t)g);
    }
}

/* ---- few tokens ---- */

static void gemv(const job *j, const segment *s, int which, int32_t at, uint32_t n, uint64_t row,
    uint64_t end, float *const *y)
{
    ps_gemv g = {.w = ps_cpu_ptr(j->launch, j->w[which][s->e]),
        .row_bytes = j->row_bytes[which],
        .n_cols = j->n_cols,
        .n_x = n,
        .row0 = row};
    if (j->bias[which] != NULL) g.bias = j->bias[which] + (uint64_t)s->e * j->n_rows;
    for (uint32_t i = 0; i < n; i++) {
        const uint64_t index = (uint64_t)(at - s->from) + i;
        g.x[i] = ps_fmt_is_float(j->fmt[which])
                     ? (const void *)input_row(j, at + (int32_t)i)
                     : j->packed + s->group * j->group_bytes + index * ps_xq_bytes(j->n_cols);
        g.y[i] = y[i];
    }
    j->k->gemv[j->fmt[which]](&g, row, end);
}

/* Rows [row, end), at most BLOCK_ROWS where there is an activation, of one segment. */
static void few_rows(const job *j, const segment *s, uint64_t row, uint64_t end)
{
    float gate[PS_CPU_GEMV_MAX_TOK][BLOCK_ROWS], up[PS_CPU_GEMV_MAX_TOK][BLOCK_ROWS];
    for (int32_t at = s->from; at < s->to; at += PS_CPU_GEMV_MAX_TOK) {
        const int32_t left = s->to - at;
        const uint32_t n = left < PS_CPU_GEMV_MAX_TOK ? (uint32_t)left : PS_CPU_GEMV_MAX_TOK;
        float *out[PS_CPU_GEMV_MAX_TOK], *g[PS_CPU_GEMV_MAX_TOK], *u[PS_CPU_GEMV_MAX_TOK];
        for (uint32_t i = 0; i < n; i++) {
            out[i] = j->out + (uint64_t)j->order[at + (int32_t)i] * j->n_rows + row;
            g[i] = gate[i], u[i] = up[i];
        }
        if (j->w[1] == NULL) {
            gemv(j, s, 0, at, n, row, end, out);
            continue;
        }
        gemv(j, s, 0, at, n, row, end, g);
        gemv(j, s, 1, at, n, row, end, u);
        for (uint32_t i = 0; i < n; i++) j->k->act(j->act, gate[i], up[i], out[i], end - row);
    }
}

/* ---- many tokens ---- */

static void gemm(const job *j, const segment *s, int which, uint64_t row, uint64_t end,
    float *const *y, void *scratch)
{
    ps_gemm g = {.w = ps_cpu_ptr(j->launch, j->w[which][s->e]),
        .row_bytes = j->row_bytes[which],
        .fmt = j->fmt[which],
        .n_cols = j->n_cols,
        .x = j->packed + s->group * j->group_bytes,
        .n_x = (uint32_t)(s->to - s->from),
        .y = y,
        .row0 = row,
        .scratch = scratch};
    if (j->bias[which] != NULL) g.bias = j->bias[which] + (uint64_t)s->e * j->n_rows;
    j->k->gemm[j->fmt[which]](&g, row, end);
}

static void many_rows(const job *j, const segment *s, uint64_t row, uint64_t end, char *scratch)
{
    float *out[PS_GEMM_BLOCK_TOK] = {NULL};
    float *gate[PS_GEMM_BLOCK_TOK] = {NULL}, *up[PS_GEMM_BLOCK_TOK] = {NULL};
    float *block = (float *)(scratch + j->k->gemm_scratch_bytes);
    const uint32_t n = (uint32_t)(s->to - s->from);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = j->out + (uint64_t)j->order[s->from + (int32_t)i] * j->n_rows + row;
        gate[i] = block + (uint64_t)i * 2 * BLOCK_ROWS;
        up[i] = gate[i] + BLOCK_ROWS;
    }
    if (j->w[1] == NULL) {
        gemm(j, s, 0, row, end, out, scratch);
        return;
    }
    gemm(j, s, 0, row, end, gate, scratch);
    gemm(j, s, 1, row, end, up, scratch);
    for (uint32_t i = 0; i < n; i++) j->k->act(j->act, gate[i], up[i], out[i], end - row);
}

/* ---- a call ---- */

/* Few tokens: the rows of all segments in one line, of which a thread has one stretch. Memory likes
 * stretches: a share of every expert instead would begin anew twice an expert. */
static void few_part(const job *j, const batch *b, int i_thread, int n_threads)
{
    const uint64_t step = j->w[1] != NULL ? BLOCK_ROWS : j->n_rows;
    const uint64_t quads = ps_div_up_u64(j->n_rows, 4);
    uint64_t quad, quad_end;
    ps_cpu_share(b->n * quads, 1, i_thread, n_threads, &quad, &quad_end);
    while (quad < quad_end && !ps_cpu_aborted(j->launch)) {
        const uint64_t s = quad / quads, left = ps_min_u64(quad_end - quad, (s + 1) * quads - quad);
        const uint64_t row = quad % quads * 4, end = ps_min_u64(row + left * 4, j->n_rows);
        for (uint64_t r = row; r < end; r += step)
            few_rows(j, &b->seg[s], r, ps_min_u64(r + step, end));
        quad += left;
    }
}

/* Many tokens: a share of the rows of every expert, as experts differ in tokens. */
static void many_part(const job *j, const batch *b, int i_thread, int n_threads)
{
    char *scratch = j->thread + (uint64_t)i_thread * j->thread_bytes;
    const uint64_t step = j->w[1] != NULL ? BLOCK_ROWS : j->n_rows;
    uint64_t row, end;
    ps_cpu_share(j->n_rows, j->k->gemm_rows, i_thread, n_threads, &row, &end);
    for (uint32_t s = 0; s < b->n && !ps_cpu_aborted(j->launch); s++)
        for (uint64_t r = row; r < end; r += step)
            many_rows(j, &b->seg[s], r, ps_min_u64(r + step, end), scratch);
}

static void moe_part(void *ctx, int i_thread, int n_threads)
{
    const job *j = ctx;
    const bool converts =
        j->many || !ps_fmt_is_float(j->fmt[0]) || (j->w[1] != NULL && !ps_fmt_is_float(j->fmt[1]));
    uint32_t e = 0;
    int32_t at = 0;
    batch b;
    for (bool more = next_batch(j, &e, &at, &b); more;) {
        if (converts) {
            convert_batch(j, &b, i_thread, n_threads);
            barrier(j);
        }
        (j->many ? many_part : few_part)(j, &b, i_thread, n_threads);
        more = next_batch(j, &e, &at, &b);
        if (more && converts) barrier(j); /* the inputs are overwritten next */
    }
}

static ps_status run(job *j, uint32_t n_tok, uint32_t k)
{
    const ps_cpu_kernels *kernels = j->k;
    j->many = n_tok > PS_CPU_GEMV_MAX_TOK &&
              (uint64_t)n_tok * k > (uint64_t)PS_CPU_GEMV_MAX_TOK * j->n_expert;
    j->group_bytes = j->many ? kernels->pack[j->fmt[0]]->group_bytes(j->n_cols)
                             : PS_GEMM_GROUP * ps_xq_bytes(j->n_cols);
    j->thread_bytes = j->many ? kernels->gemm_scratch_bytes +
                                    (uint64_t)PS_GEMM_BLOCK_TOK * 2 * BLOCK_ROWS * sizeof(float)
                              : 0;
    ps_cpu_scratch s = ps_cpu_scratch_of(j->launch);
    const uint64_t n_groups =
        ps_min_u64(CAP_GROUPS, ps_div_up_u64((uint64_t)n_tok * k, PS_GEMM_GROUP) + j->n_expert);
    j->packed = ps_cpu_take(&s, n_groups * j->group_bytes);
    j->thread = ps_cpu_take(&s, (uint64_t)ps_cpu_threads(j->launch) * j->thread_bytes);
    if (s.short_of) return PS_EINTERNAL;
    ps_cpu_run(j->launch, moe_part, j);
    return PS_OK;
}

ps_status ps_cpu_moe_up(const ps_cpu_kernels *k, const ps_launch *launch, const ps_moe_up_args *a)
{
    ps_status status = ps_op_check(PS_OP_MOE_UP, a, NULL);
    if (status != PS_OK) return status;
    /* One packing serves both: gate and up of different kinds are nothing that files contain. */
    if (k->pack[a->fmt_gate] != k->pack[a->fmt_up]) return ps_cpu_ref_moe_up(launch, a);
    job j = {.k = k,
        .launch = launch,
        .order = ps_cpu_ptr(launch, a->order),
        .starts = ps_cpu_ptr(launch, a->starts),
        .w = {ps_cpu_ptr(launch, a->gate_ptrs), ps_cpu_ptr(launch, a->up_ptrs)},
        .bias = {ps_cpu_ptr(launch, a->gate_bias), ps_cpu_ptr(launch, a->up_bias)},
        .fmt = {a->fmt_gate, a->fmt_up},
        .n_expert = a->n_expert,
        .n_cols = a->n_cols,
        .n_rows = a->n_ff,
        .x = ps_cpu_ptr(launch, a->x),
        .ldx = a->ldx,
        .per_row = a->k,
        .out = ps_cpu_ptr(launch, a->out),
        .act = a->act};
    if (!ps_fmt_row_bytes(a->fmt_gate, a->n_cols, &j.row_bytes[0]) ||
        !ps_fmt_row_bytes(a->fmt_up, a->n_cols, &j.row_bytes[1]))
        return PS_EINTERNAL;
    return run(&j, a->n_tok, a->k);
}

ps_status ps_cpu_moe_down(
    const ps_cpu_kernels *k, const ps_launch *launch, const ps_moe_down_args *a)
{
    ps_status status = ps_op_check(PS_OP_MOE_DOWN, a, NULL);
    if (status != PS_OK) return status;
    job j = {.k = k,
        .launch = launch,
        .order = ps_cpu_ptr(launch, a->order),
        .starts = ps_cpu_ptr(launch, a->starts),
        .w = {ps_cpu_ptr(launch, a->down_ptrs), NULL},
        .bias = {ps_cpu_ptr(launch, a->bias), NULL},
        .fmt = {a->fmt, a->fmt},
        .n_expert = a->n_expert,
        .n_cols = a->n_ff,
        .n_rows = a->n_rows,
        .x = ps_cpu_ptr(launch, a->h),
        .ldx = a->n_ff,
        .per_row = 1,
        .out = ps_cpu_ptr(launch, a->y)};
    if (!ps_fmt_row_bytes(a->fmt, a->n_ff, &j.row_bytes[0])) return PS_EINTERNAL;
    return run(&j, a->n_tok, a->k);
}
