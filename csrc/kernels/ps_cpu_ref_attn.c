/* ps_cpu_ref_attn - the reference of attention and of what feeds it: head norms, rope, the cache,
 * the merge of partial attentions. Plain C in the order of the formula, sums in double.
 *
 * Not here: speed.
 * Threads: tokens, or (token, head) pairs, are shared out by index.
 */
#include "kernels/ps_cpu.h"

#include <math.h>

/* ---- qkv_prep ---- */

typedef struct prep_job {
    const ps_launch *launch;
    const ps_qkv_prep_args *a;
    uint64_t kv_row_bytes;
} prep_job;

static void head_norm(float *x, const float *w, uint32_t n, float eps)
{
    double var = 0;
    for (uint32_t i = 0; i < n; i++) var += (double)x[i] * (double)x[i];
    const double scale = 1.0 / sqrt(var / n + (double)eps);
    for (uint32_t i = 0; i < n; i++) x[i] = (float)((double)x[i] * scale * (double)w[i]);
}

/* Position that turns pair i: the token's place, or for M-RoPE that of the section which holds i.
 */
static int32_t rope_position(const prep_job *j, uint64_t t, uint32_t i)
{
    const ps_qkv_prep_args *a = j->a;
    const int32_t *pos = ps_cpu_ptr(j->launch, a->pos),
                  *rope_pos = ps_cpu_ptr(j->launch, a->rope_pos);
    if (a->rope != PS_ROPE_MROPE) return pos[t];
    uint32_t section = 0, first = 0;
    while (section < 3 && i >= first + a->sections[section]) first += a->sections[section++];
    return rope_pos[(uint64_t)section * a->n_tok + t];
}

static void rope_head(const prep_job *j, uint64_t t, float *x)
{
    const ps_qkv_prep_args *a = j->a;
    const float *freq = ps_cpu_ptr(j->launch, a->freq);
    const uint32_t half = a->n_rot / 2;
    if (a->rope == PS_ROPE_NONE) return;
    for (uint32_t i = 0; i < half; i++) {
        const double angle = (double)rope_position(j, t, i) * (double)freq[i];
        const double c = cos(angle) * (double)a->mag, s = sin(angle) * (double)a->mag;
        float *p = a->rope == PS_ROPE_INTERLEAVED ? x + 2 * i : x + i;
        float *q = a->rope == PS_ROPE_INTERLEAVED ? x + 2 * i + 1 : x + half + i;
        const double x0 = (double)*p, x1 = (double)*q;
        *p = (float)(x0 * c - x1 * s);
        *q = (float)(x0 * s + x1 * c);
    }
}

static void store_head(const prep_job *j, uint64_t t, uint32_t h, const float *k, const float *v)
{
    const ps_kv_view *kv = &j->a->kv;
    const int32_t *pos = ps_cpu_ptr(j->launch, j->a->pos), *seq = ps_cpu_ptr(j->launch, j->a->seq);
    const int32_t *table = ps_cpu_ptr(j->launch, kv->table);
    char *k_cache = ps_cpu_ptr(j->launch, kv->k), *v_cache = ps_cpu_ptr(j->launch, kv->v);
    if (k_cache == NULL) return;
    const uint64_t p = (uint64_t)pos[t];
    const int32_t page = table[(uint64_t)seq[t] * kv->max_pages + p / kv->page_tok];
    if (page < 0) return; /* that page is on the other side */
    const uint64_t row = ((uint64_t)page * kv->n_kv_head + h) * kv->page_tok + p % kv->page_tok;
    ps_quant_row((ps_fmt)kv->fmt, k, k_cache + row * j->kv_row_bytes, kv->head_dim);
    ps_quant_row((ps_fmt)kv->fmt, v, v_cache + row * j->kv_row_bytes, kv->head_dim);
}

static void prep_part(void *ctx, int i_thread, int n_threads)
{
    const prep_job *j = ctx;
    const ps_qkv_prep_args *a = j->a;
    const uint32_t d = a->kv.head_dim;
    float *q = ps_cpu_ptr(j->launch, a->q), *k = ps_cpu_ptr(j->launch, a->k);
    const float *v = ps_cpu_ptr(j->launch, a->v);
    const float *q_norm = ps_cpu_ptr(j->launch, a->q_norm),
                *k_norm = ps_cpu_ptr(j->launch, a->k_norm);
    uint64_t t, end;
    ps_cpu_share(a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++) {
        for (uint32_t h = 0; q != NULL && h < a->n_head; h++) {
            float *head = q + t * a->ldq + (uint64_t)h * d;
            if (q_norm != NULL) head_norm(head, q_norm, d, a->eps);
            rope_head(j, t, head);
        }
        for (uint32_t h = 0; h < a->kv.n_kv_head; h++) {
            float *head = k + t * a->ldk + (uint64_t)h * d;
            if (k_norm != NULL) head_norm(head, k_norm, d, a->eps);
            rope_head(j, t, head);
            store_head(j, t, h, head, v + t * a->ldv + (uint64_t)h * d);
        }
    }
}

ps_status ps_cpu_ref_qkv_prep(const ps_launch *launch, const void *args)
{
    const ps_qkv_prep_args *a = args;
    ps_status status = ps_op_check(PS_OP_QKV_PREP, a, NULL);
    if (status != PS_OK) return status;
    prep_job j = {.launch = launch, .a = a};
    if (!ps_dptr_is_null(a->kv.k) && !ps_fmt_row_bytes(a->kv.fmt, a->kv.head_dim, &j.kv_row_bytes))
        return PS_EINTERNAL;
    ps_cpu_run(launch, prep_part, &j);
    return PS_OK;
}

/* ---- attn ---- */

typedef struct attn_job {
    const ps_launch *launch;
    const ps_attn_args *a;
    uint64_t kv_row_bytes;
    double *work; /* [n_threads][max_kv + 2 * head_dim]: scores, a key or value row, the sum of
                     values */
} attn_job;

/* The cache row of position p of sequence s for KV head h; UINT64_MAX where its page is on the
 * other side. */
static uint64_t kv_row(const attn_job *j, int32_t s, uint32_t h, uint64_t p)
{
    const ps_kv_view *kv = &j->a->kv;
    const int32_t *table = ps_cpu_ptr(j->launch, kv->table);
    const int32_t page = table[(uint64_t)s * kv->max_pages + p / kv->page_tok];
    if (page < 0) return UINT64_MAX;
    return ((uint64_t)page * kv->n_kv_head + h) * kv->page_tok + p % kv->page_tok;
}

static double score_of(const attn_job *j, const float *q, const float *k)
{
    double s = 0;
    for (uint32_t i = 0; i < j->a->kv.head_dim; i++) s += (double)q[i] * (double)k[i];
    s *= (double)j->a->scale;
    if (j->a->softcap > 0) s = (double)j->a->softcap * tanh(s / (double)j->a->softcap);
    return s;
}

static void attn_head(const attn_job *j, uint64_t t, uint32_t h, double *work)
{
    const ps_attn_args *a = j->a;
    const uint32_t d = a->kv.head_dim, kv_h = h / (a->n_head / a->kv.n_kv_head);
    const int32_t s = ((const int32_t *)ps_cpu_ptr(j->launch, a->seq))[t];
    const uint64_t pos = (uint64_t)((const int32_t *)ps_cpu_ptr(j->launch, a->pos))[t];
    const float *q = (const float *)ps_cpu_ptr(j->launch, a->q) + t * a->ldq + (uint64_t)h * d;
    const float *sinks = ps_cpu_ptr(j->launch, a->sinks);
    const char *k = ps_cpu_ptr(j->launch, a->kv.k), *v = ps_cpu_ptr(j->launch, a->kv.v);
    float *out = (float *)ps_cpu_ptr(j->launch, a->out) + t * a->ldo + (uint64_t)h * d;
    float *ml = ps_cpu_ptr(j->launch, a->ml);
    double *scores = work, *acc = work + a->max_kv;
    float *row = (float *)(acc + d);

    const uint64_t first = a->window > 0 && pos >= a->window ? pos - a->window + 1 : 0;
    double max = sinks != NULL ? (double)sinks[h] : -INFINITY, sum = 0;
    for (uint64_t p = first; p <= pos; p++) {
        const uint64_t r = kv_row(j, s, kv_h, p);
        scores[p - first] = -INFINITY;
        if (r == UINT64_MAX) continue;
        ps_dequant_row((ps_fmt)a->kv.fmt, k + r * j->kv_row_bytes, row, d);
        scores[p - first] = score_of(j, q, row);
        max = fmax(max, scores[p - first]);
    }
    for (uint32_t i = 0; i < d; i++) acc[i] = 0;
    if (sinks != NULL) sum = exp((double)sinks[h] - max);
    for (uint64_t p = first; p <= pos; p++) {
        const uint64_t r = kv_row(j, s, kv_h, p);
        if (r == UINT64_MAX) continue;
        const double e = exp(scores[p - first] - max);
        sum += e;
        ps_dequant_row((ps_fmt)a->kv.fmt, v + r * j->kv_row_bytes, row, d);
        for (uint32_t i = 0; i < d; i++) acc[i] += e * (double)row[i];
    }
    for (uint32_t i = 0; i < d; i++) out[i] = sum > 0 ? (float)(acc[i] / sum) : 0.0f;
    if (ml != NULL) {
        ml[(t * a->n_head + h) * 2] = (float)max;
        ml[(t * a->n_head + h) * 2 + 1] = (float)sum;
    }
}

static void attn_part(void *ctx, int i_thread, int n_threads)
{
    const attn_job *j = ctx;
    const ps_attn_args *a = j->a;
    double *work = j->work + (uint64_t)i_thread * ((uint64_t)a->max_kv + 2 * a->kv.head_dim);
    uint64_t i, end;
    ps_cpu_share((uint64_t)a->n_tok * a->n_head, 1, i_thread, n_threads, &i, &end);
    for (; i < end && !ps_cpu_aborted(j->launch); i++)
        attn_head(j, i / a->n_head, (uint32_t)(i % a->n_head), work);
}

ps_status ps_cpu_ref_attn(const ps_launch *launch, const void *args)
{
    const ps_attn_args *a = args;
    ps_status status = ps_op_check(PS_OP_ATTN, a, NULL);
    if (status != PS_OK) return status;
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    attn_job j = {.launch = launch, .a = a};
    const uint64_t n_work = (uint64_t)a->max_kv + 2 * a->kv.head_dim;
    j.work = ps_cpu_take(&s, (uint64_t)ps_cpu_threads(launch) * n_work * sizeof(double));
    if (s.short_of || !ps_fmt_row_bytes(a->kv.fmt, a->kv.head_dim, &j.kv_row_bytes))
        return PS_EINTERNAL;
    ps_cpu_run(launch, attn_part, &j);
    return PS_OK;
}

/* ---- attn_merge ---- */

typedef struct merge_job {
    const ps_attn_merge_args *args;
    const float *a, *b, *ml_a, *ml_b;
    float *out;
} merge_job;

static void merge_part(void *ctx, int i_thread, int n_threads)
{
    const merge_job *j = ctx;
    const uint32_t d = j->args->head_dim;
    uint64_t i, end;
    ps_cpu_share((uint64_t)j->args->n_tok * j->args->n_head, 1, i_thread, n_threads, &i, &end);
    for (; i < end; i++) {
        const double max = fmax((double)j->ml_a[2 * i], (double)j->ml_b[2 * i]);
        const double l_a = (double)j->ml_a[2 * i + 1], l_b = (double)j->ml_b[2 * i + 1];
        /* A part without keys has weight 0; its maximum of -inf must not meet another -inf in a
         * difference. */
        const double w_a = l_a > 0 ? l_a * exp((double)j->ml_a[2 * i] - max) : 0;
        const double w_b = l_b > 0 ? l_b * exp((double)j->ml_b[2 * i] - max) : 0;
        const double sum = w_a + w_b;
        for (uint64_t c = i * d; c < (i + 1) * d; c++)
            j->out[c] =
                sum > 0 ? (float)((w_a * (double)j->a[c] + w_b * (double)j->b[c]) / sum) : 0.0f;
    }
}

ps_status ps_cpu_ref_attn_merge(const ps_launch *launch, const void *args)
{
    const ps_attn_merge_args *a = args;
    ps_status status = ps_op_check(PS_OP_ATTN_MERGE, a, NULL);
    if (status != PS_OK) return status;
    merge_job j = {.args = a,
        .a = ps_cpu_ptr(launch, a->a),
        .b = ps_cpu_ptr(launch, a->b),
        .ml_a = ps_cpu_ptr(launch, a->ml_a),
        .ml_b = ps_cpu_ptr(launch, a->ml_b),
        .out = ps_cpu_ptr(launch, a->out)};
    ps_cpu_run(launch, merge_part, &j);
    return PS_OK;
}
