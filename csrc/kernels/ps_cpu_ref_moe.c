/* ps_cpu_ref_moe - the reference of routing and experts: plain C in the order of the formula, sums
 * in double.
 *
 * Not here: speed.
 * Threads: rows of each expert, or tokens, or bytes of images are shared out by index; routing of a
 * call runs on one thread.
 */
#include "kernels/ps_cpu.h"

#include <math.h>
#include <string.h>

/* ---- route ---- */

/* The k best of one token, lowest index first among equals; `taken` holds n_expert zero bytes and
 * gets them back. Not a number compares false with everything, so ids stay in range whatever the
 * logits are. */
static void route_token(
    const ps_route_args *a, const float *logits, int32_t *ids, float *weights, uint8_t *taken)
{
    double max = -INFINITY, sum = 0, chosen = 0;
    for (uint32_t e = 0; e < a->n_expert; e++) max = fmax(max, (double)logits[e]);
    for (uint32_t e = 0; e < a->n_expert; e++) sum += exp((double)logits[e] - max);
    for (uint32_t r = 0; r < a->k; r++) {
        int64_t best = -1;
        for (uint32_t e = 0; e < a->n_expert; e++)
            if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
        taken[best] = 1;
        ids[r] = (int32_t)best;
        chosen += exp((double)logits[best] - max);
    }
    for (uint32_t r = 0; r < a->k; r++) {
        weights[r] = (float)(exp((double)logits[ids[r]] - max) / (a->renorm ? chosen : sum));
        taken[ids[r]] = 0;
    }
}

typedef struct route_job {
    const ps_route_args *a;
    const float *logits;
    int32_t *ids;
    float *weights;
    uint8_t *taken; /* [n_threads][n_expert], zero */
} route_job;

static void route_part(void *ctx, int i_thread, int n_threads)
{
    const route_job *j = ctx;
    const ps_route_args *a = j->a;
    uint64_t t, end;
    ps_cpu_share(a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++)
        route_token(a, j->logits + t * a->n_expert, j->ids + t * a->k, j->weights + t * a->k,
            j->taken + (uint64_t)i_thread * a->n_expert);
}

/* Counting sort: stable, so a group's assignments ascend. starts[e + 1] counts e, then becomes its
 * end. */
static void group_by_expert(
    const ps_route_args *a, const int32_t *ids, int32_t *order, int32_t *starts)
{
    const uint64_t n = (uint64_t)a->n_tok * a->k;
    memset(starts, 0, ((uint64_t)a->n_expert + 1) * sizeof *starts);
    for (uint64_t i = 0; i < n; i++) starts[ids[i] + 1]++;
    for (uint32_t e = 0; e < a->n_expert; e++) starts[e + 1] += starts[e];
    for (uint64_t i = 0; i < n; i++) order[starts[ids[i]]++] = (int32_t)i;
    for (uint32_t e = a->n_expert; e > 0; e--)
        starts[e] = starts[e - 1]; /* each start had moved to its end */
    starts[0] = 0;
}

ps_status ps_cpu_ref_route(const ps_launch *launch, const void *args)
{
    const ps_route_args *a = args;
    ps_status status = ps_op_check(PS_OP_ROUTE, a, NULL);
    if (status != PS_OK) return status;
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    const uint64_t n_taken = (uint64_t)ps_cpu_threads(launch) * a->n_expert;
    route_job j = {.a = a,
        .logits = ps_cpu_ptr(launch, a->logits),
        .ids = ps_cpu_ptr(launch, a->ids),
        .weights = ps_cpu_ptr(launch, a->weights),
        .taken = ps_cpu_take(&s, n_taken)};
    if (s.short_of) return PS_EINTERNAL;
    memset(j.taken, 0, n_taken);
    if (a->n_tok < 4) /* a few microseconds: not worth waking anybody */
        route_part(&j, 0, 1);
    else
        ps_cpu_run(launch, route_part, &j);
    group_by_expert(a, j.ids, ps_cpu_ptr(launch, a->order), ps_cpu_ptr(launch, a->starts));
    return PS_OK;
}

/* ---- gather ---- */

typedef struct gather_job {
    const ps_launch *launch;
    const ps_gather_experts_args *a;
} gather_job;

/* Of an assignment; UINT32_MAX where a pass that is given up has left no expert's number. */
static uint32_t expert_of(const ps_gather_experts_args *a, const int32_t *ids, uint64_t i)
{
    return (uint32_t)ids[i] < a->n_expert ? (uint32_t)ids[i] : UINT32_MAX;
}

/* Where the image of an expert lies that is not resident; null of one that is, or is nowhere. */
static ps_dptr lies_at(const ps_dptr *mapped, const ps_dptr *shared, uint32_t e)
{
    return shared != NULL && !ps_dptr_is_null(shared[e]) ? shared[e] : mapped[e];
}

/* Whether assignment i is the first of a shared expert. */
static bool starts_shared(const ps_gather_experts_args *a, const int32_t *ids,
    const ps_dptr *shared, const ps_dptr *first, uint64_t i)
{
    const uint32_t e = expert_of(a, ids, i);
    return e != UINT32_MAX && first[e].a == i + 1 && !ps_dptr_is_null(shared[e]);
}

/* first[e]: 1 + the first assignment of expert e, 0 for those without; also for shared ones that
 * are the other side's. */
static void find_first(
    const ps_gather_experts_args *a, const int32_t *ids, const ps_dptr *shared, ps_dptr *first)
{
    const uint64_t n_assign = (uint64_t)a->n_tok * a->k;
    uint64_t n = 0, rank = 0;
    for (uint32_t e = 0; e < a->n_expert; e++) first[e].a = 0;
    for (uint64_t i = n_assign; i-- > 0;)
        if (expert_of(a, ids, i) != UINT32_MAX) first[ids[i]].a = i + 1;
    if (shared == NULL) return;
    for (uint64_t i = 0; i < n_assign; i++) n += starts_shared(a, ids, shared, first, i);
    const uint64_t n_gpu = PS_SHARE_OF(n, a->share);
    for (uint64_t i = 0; i < n_assign; i++)
        if (starts_shared(a, ids, shared, first, i) && (rank++ < n_gpu) == (a->rest != 0))
            first[ids[i]].a = 0;
}

/* The tables. That of `down` holds first assignments until its turn comes. */
static void place_images(const ps_launch *launch, const ps_gather_experts_args *a)
{
    const ps_dptr *mapped = ps_cpu_ptr(launch, a->mapped),
                  *resident = ps_cpu_ptr(launch, a->resident),
                  *shared = ps_cpu_ptr(launch, a->shared), none = {0};
    ps_dptr *gate = ps_cpu_ptr(launch, a->gate_ptrs), *up = ps_cpu_ptr(launch, a->up_ptrs),
            *down = ps_cpu_ptr(launch, a->down_ptrs);
    const bool stay = ps_dptr_is_null(a->slots);
    find_first(a, ps_cpu_ptr(launch, a->ids), shared, down);
    for (uint32_t e = 0; e < a->n_expert; e++) {
        const uint64_t first = down[e].a;
        ps_dptr image = lies_at(mapped, shared, e);
        if (ps_dptr_is_null(image))
            image = resident[e];
        else if (first == 0)
            image = none;
        else if (!stay)
            image = ps_dptr_add(a->slots, (first - 1) * a->image_bytes);
        const bool any = !ps_dptr_is_null(image);
        gate[e] = any ? ps_dptr_add(image, a->gate_at) : none;
        up[e] = any ? ps_dptr_add(image, a->up_at) : none;
        down[e] = any ? ps_dptr_add(image, a->down_at) : none;
    }
}

/* A thread's part of every image whose slot the tables name. */
static void gather_part(void *ctx, int i_thread, int n_threads)
{
    const gather_job *j = ctx;
    const ps_gather_experts_args *a = j->a;
    const int32_t *ids = ps_cpu_ptr(j->launch, a->ids);
    const ps_dptr *mapped = ps_cpu_ptr(j->launch, a->mapped),
                  *shared = ps_cpu_ptr(j->launch, a->shared),
                  *gate = ps_cpu_ptr(j->launch, a->gate_ptrs);
    char *slots = ps_cpu_ptr(j->launch, a->slots);
    uint64_t at, end;
    ps_cpu_share(a->image_bytes, 16, i_thread, n_threads, &at, &end);
    for (uint64_t i = 0; i < (uint64_t)a->n_tok * a->k && !ps_cpu_aborted(j->launch); i++) {
        const uint64_t slot = i * a->image_bytes;
        const uint32_t e = expert_of(a, ids, i);
        if (e == UINT32_MAX || gate[e].a != a->slots.a + slot + a->gate_at) continue;
        const char *image = ps_cpu_ptr(j->launch, lies_at(mapped, shared, e));
        if (image != NULL) memcpy(slots + slot + at, image + at, end - at);
    }
}

ps_status ps_cpu_ref_gather_experts(const ps_launch *launch, const void *args)
{
    const ps_gather_experts_args *a = args;
    ps_status status = ps_op_check(PS_OP_GATHER_EXPERTS, a, NULL);
    if (status != PS_OK) return status;
    gather_job j = {launch, a};
    place_images(launch, a);
    if (!ps_dptr_is_null(a->slots)) ps_cpu_run(launch, gather_part, &j);
    return PS_OK;
}

/* ---- experts ---- */

static double dot(const float *x, const float *w, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += (double)x[i] * (double)w[i];
    return sum;
}

typedef struct moe_job {
    const ps_launch *launch;
    const void *a; /* ps_moe_up_args or ps_moe_down_args */
    float *rows;   /* [n_threads][2][widest row]: dequantised */
} moe_job;

static void moe_up_row(
    const moe_job *j, uint32_t e, uint64_t f, const char *gate_w, const char *up_w, float *rows)
{
    const ps_moe_up_args *a = j->a;
    const int32_t *order = ps_cpu_ptr(j->launch, a->order),
                  *starts = ps_cpu_ptr(j->launch, a->starts);
    const float *x = ps_cpu_ptr(j->launch, a->x), *gate_bias = ps_cpu_ptr(j->launch, a->gate_bias);
    const float *up_bias = ps_cpu_ptr(j->launch, a->up_bias);
    float *out = ps_cpu_ptr(j->launch, a->out), *gate_row = rows, *up_row = rows + a->n_cols;
    ps_dequant_row((ps_fmt)a->fmt_gate, gate_w, gate_row, a->n_cols);
    ps_dequant_row((ps_fmt)a->fmt_up, up_w, up_row, a->n_cols);
    for (int32_t i = starts[e]; i < starts[e + 1]; i++) {
        const uint64_t as = (uint64_t)order[i], t = as / a->k;
        double g = dot(x + t * a->ldx, gate_row, a->n_cols);
        double u = dot(x + t * a->ldx, up_row, a->n_cols);
        if (gate_bias != NULL) g += (double)gate_bias[(uint64_t)e * a->n_ff + f];
        if (up_bias != NULL) u += (double)up_bias[(uint64_t)e * a->n_ff + f];
        out[as * a->n_ff + f] = (float)ps_cpu_ref_gate(a->act, g, u);
    }
}

static void moe_up_part(void *ctx, int i_thread, int n_threads)
{
    const moe_job *j = ctx;
    const ps_moe_up_args *a = j->a;
    const ps_dptr *gates = ps_cpu_ptr(j->launch, a->gate_ptrs),
                  *ups = ps_cpu_ptr(j->launch, a->up_ptrs);
    const int32_t *starts = ps_cpu_ptr(j->launch, a->starts);
    float *rows = j->rows + (uint64_t)i_thread * 2 * a->n_cols;
    uint64_t gate_bytes = 0, up_bytes = 0;
    if (!ps_fmt_row_bytes(a->fmt_gate, a->n_cols, &gate_bytes) ||
        !ps_fmt_row_bytes(a->fmt_up, a->n_cols, &up_bytes))
        return; /* checked by the launcher */
    for (uint32_t e = 0; e < a->n_expert && !ps_cpu_aborted(j->launch); e++) {
        const char *gate = ps_cpu_ptr(j->launch, gates[e]), *up = ps_cpu_ptr(j->launch, ups[e]);
        uint64_t f, end;
        if (starts[e] == starts[e + 1] || gate == NULL || up == NULL) continue;
        ps_cpu_share(a->n_ff, 1, i_thread, n_threads, &f, &end);
        for (; f < end; f++) moe_up_row(j, e, f, gate + f * gate_bytes, up + f * up_bytes, rows);
    }
}

ps_status ps_cpu_ref_moe_up(const ps_launch *launch, const void *args)
{
    const ps_moe_up_args *a = args;
    ps_status status = ps_op_check(PS_OP_MOE_UP, a, NULL);
    if (status != PS_OK) return status;
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    moe_job j = {.launch = launch, .a = a};
    j.rows = ps_cpu_take(&s, (uint64_t)ps_cpu_threads(launch) * 2 * a->n_cols * sizeof(float));
    if (s.short_of) return PS_EINTERNAL;
    ps_cpu_run(launch, moe_up_part, &j);
    return PS_OK;
}

static void moe_down_part(void *ctx, int i_thread, int n_threads)
{
    const moe_job *j = ctx;
    const ps_moe_down_args *a = j->a;
    const ps_dptr *downs = ps_cpu_ptr(j->launch, a->down_ptrs);
    const int32_t *order = ps_cpu_ptr(j->launch, a->order),
                  *starts = ps_cpu_ptr(j->launch, a->starts);
    const float *h = ps_cpu_ptr(j->launch, a->h), *bias = ps_cpu_ptr(j->launch, a->bias);
    float *y = ps_cpu_ptr(j->launch, a->y), *row = j->rows + (uint64_t)i_thread * a->n_ff;
    uint64_t row_bytes = 0;
    if (!ps_fmt_row_bytes(a->fmt, a->n_ff, &row_bytes)) return; /* checked by the launcher */
    for (uint32_t e = 0; e < a->n_expert && !ps_cpu_aborted(j->launch); e++) {
        const char *w = ps_cpu_ptr(j->launch, downs[e]);
        uint64_t r, end;
        if (starts[e] == starts[e + 1] || w == NULL) continue;
        ps_cpu_share(a->n_rows, 1, i_thread, n_threads, &r, &end);
        for (; r < end; r++) {
            ps_dequant_row((ps_fmt)a->fmt, w + r * row_bytes, row, a->n_ff);
            const double b = bias != NULL ? (double)bias[(uint64_t)e * a->n_rows + r] : 0.0;
            for (int32_t i = starts[e]; i < starts[e + 1]; i++) {
                const uint64_t as = (uint64_t)order[i];
                y[as * a->n_rows + r] = (float)(b + dot(h + as * a->n_ff, row, a->n_ff));
            }
        }
    }
}

ps_status ps_cpu_ref_moe_down(const ps_launch *launch, const void *args)
{
    const ps_moe_down_args *a = args;
    ps_status status = ps_op_check(PS_OP_MOE_DOWN, a, NULL);
    if (status != PS_OK) return status;
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    moe_job j = {.launch = launch, .a = a};
    j.rows = ps_cpu_take(&s, (uint64_t)ps_cpu_threads(launch) * a->n_ff * sizeof(float));
    if (s.short_of) return PS_EINTERNAL;
    ps_cpu_run(launch, moe_down_part, &j);
    return PS_OK;
}

/* ---- combine ---- */

typedef struct combine_job {
    const ps_launch *launch;
    const ps_moe_combine_args *a;
} combine_job;

static void combine_part(void *ctx, int i_thread, int n_threads)
{
    const combine_job *j = ctx;
    const ps_moe_combine_args *a = j->a;
    const float *y = ps_cpu_ptr(j->launch, a->y), *y_other = ps_cpu_ptr(j->launch, a->y_other);
    const float *weights = ps_cpu_ptr(j->launch, a->weights),
                *residual = ps_cpu_ptr(j->launch, a->residual);
    const ps_dptr *downs = ps_cpu_ptr(j->launch, a->down_ptrs);
    const int32_t *ids = ps_cpu_ptr(j->launch, a->ids);
    float *out = ps_cpu_ptr(j->launch, a->out);
    uint64_t i, end;
    ps_cpu_share((uint64_t)a->n_tok * a->n, 1, i_thread, n_threads, &i, &end);
    for (; i < end; i++) {
        const uint64_t t = i / a->n, c = i % a->n;
        double sum = residual != NULL ? (double)residual[i] : 0.0;
        for (uint32_t r = 0; r < a->k; r++) {
            const uint64_t as = t * a->k + r;
            const float *rows = ps_dptr_is_null(downs[ids[as]]) ? y_other : y;
            sum += (double)weights[as] * (double)rows[as * a->n + c];
        }
        out[i] = (float)sum;
    }
}

bool ps_cpu_combine_complete(const ps_launch *launch, const ps_moe_combine_args *a)
{
    const ps_dptr *downs = ps_cpu_ptr(launch, a->down_ptrs);
    const int32_t *ids = ps_cpu_ptr(launch, a->ids);
    const uint64_t n = (uint64_t)a->n_tok * a->k;
    if (!ps_dptr_is_null(a->y_other)) return true;
    for (uint64_t i = 0; i < n; i++)
        if (ps_dptr_is_null(downs[ids[i]])) return false;
    return true;
}

ps_status ps_cpu_ref_moe_combine(const ps_launch *launch, const void *args)
{
    const ps_moe_combine_args *a = args;
    ps_status status = ps_op_check(PS_OP_MOE_COMBINE, a, NULL);
    if (status != PS_OK) return status;
    if (!ps_cpu_combine_complete(launch, a)) return PS_EINTERNAL;
    combine_job j = {launch, a};
    ps_cpu_run(launch, combine_part, &j);
    return PS_OK;
}
