/* ps_cpu_elem - everything but products and attention, written once over ps_cpu_vec.h and compiled
 * by ps_cpu_avx2_elem.c and ps_cpu_avx512_elem.c: rounding inputs to 8 bits, norms, rope and the
 * cache, activations, the sum over experts, additions.
 *
 * Not here: what scalar code does well enough (the reference's embed, route, gather, merge).
 * Threads: tokens, or elements in whole steps, are shared out by index; a call too small to be
 * worth waking the others runs on the caller alone.
 */
#include "kernels/ps_cpu_quantize.h"

#include <math.h>
#include <string.h>

enum { SMALL = 1 << 14 }; /* floats: below it, waking threads costs more than the work */

static void run_sized(const ps_launch *launch, uint64_t n_floats, ps_pool_fn fn, void *ctx)
{
    if (n_floats < SMALL)
        fn(ctx, 0, 1);
    else
        ps_cpu_run(launch, fn, ctx);
}

static vf load_any(const float *p, uint64_t left)
{
    return left >= VF_N ? vf_load(p) : vf_load_n(p, (uint32_t)left);
}

static void store_any(float *p, vf a, uint64_t left)
{
    if (left >= VF_N)
        vf_store(p, a);
    else
        vf_store_n(p, a, (uint32_t)left);
}

/* ---- inputs in 8 bits ---- */

void PS_CPU_NAME(quantize)(const float *x, uint32_t n_cols, ps_xq out)
{
    const uint64_t n = ps_xq_cols(n_cols);
    for (uint64_t b = 0; b < n / 32; b++) {
        const uint64_t at = 32 * b;
        const block_sums s =
            quantize_block(x + ps_min_u64(at, n_cols), at < n_cols ? n_cols - at : 0, out.q + at);
        out.d[b] = s.d;
        out.s16[2 * b] = s.d * s.half[0];
        out.s16[2 * b + 1] = s.d * s.half[1];
        out.s32[b] = s.d * (s.half[0] + s.half[1]);
    }
}

/* ---- norm ---- */

typedef struct norm_job {
    const ps_norm_args *a;
    const float *x, *w, *b, *residual;
    float *out;
} norm_job;

enum { SUM_BLOCK = 256 }; /* floats added in float before a double takes over */

/* The sum of x, or of squares of x - mean. One huge channel among small ones, as real activations
 * have it, would swallow the others in a float. */
static double row_sum(const float *x, uint64_t n, bool squares, float mean)
{
    double total = 0;
    for (uint64_t at = 0; at < n; at += SUM_BLOCK) {
        const uint64_t end = ps_min_u64(at + SUM_BLOCK, n);
        vf sum = vf_zero();
        for (uint64_t i = at; i < end; i += VF_N) {
            vf v = load_any(x + i, end - i);
            if (!squares) {
                sum = vf_add(sum, v);
                continue;
            }
            v = vf_sub(v, vf_set(mean));
            if (end - i < VF_N) { /* what is beyond the row has no deviation from the mean */
                float edge[VF_N];
                vf_store(edge, v);
                memset(edge + (end - i), 0, (VF_N - (end - i)) * sizeof *edge);
                v = vf_load(edge);
            }
            sum = vf_fma(v, v, sum);
        }
        total += (double)vf_sum(sum);
    }
    return total;
}

static void norm_token(const norm_job *j, uint64_t t)
{
    const ps_norm_args *a = j->a;
    const float *x = j->x + t * a->ldx;
    const uint64_t n = a->n;
    float *out = j->out + t * a->ldo, mean = 0;
    if (a->kind == PS_NORM_LAYER) mean = (float)(row_sum(x, n, false, 0) / (double)n);
    const double var = row_sum(x, n, true, mean) / (double)n;
    const float scale = (float)(1.0 / sqrt(var + (double)a->eps));
    for (uint64_t i = 0; i < n; i += VF_N) {
        const uint64_t left = n - i;
        vf y = vf_mul(vf_sub(load_any(x + i, left), vf_set(mean)), vf_set(scale));
        y = vf_mul(y, load_any(j->w + i, left));
        if (j->b != NULL) y = vf_add(y, load_any(j->b + i, left));
        if (j->residual != NULL) y = vf_add(y, load_any(j->residual + t * a->ldo + i, left));
        store_any(out + i, y, left);
    }
}

static void norm_part(void *ctx, int i_thread, int n_threads)
{
    const norm_job *j = ctx;
    uint64_t t, end;
    ps_cpu_share(j->a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++) norm_token(j, t);
}

ps_status PS_CPU_NAME(norm)(const ps_launch *launch, const void *args)
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
    run_sized(launch, (uint64_t)a->n_tok * a->n, norm_part, &j);
    return PS_OK;
}

/* ---- activation ---- */

static vf act_value(uint32_t kind, vf g, vf u)
{
    switch (kind) {
    case PS_ACT_SILU: return vf_mul(vf_swish(g, 1.0f), u);
    case PS_ACT_GELU: { /* 0.5 (1 + tanh z) = 1 / (1 + e^-2z): nothing cancels where g is very
                           negative */
        const vf cubic = vf_mul(vf_mul(g, g), vf_mul(g, vf_set(0.044715f)));
        const vf z2 = vf_mul(vf_add(g, cubic), vf_set(1.59576912f)); /* 2 sqrt(2 / pi) */
        const vf e = vf_exp(vf_sub(vf_zero(), z2));
        return vf_mul(vf_div(g, vf_add(vf_set(1.0f), e)), u);
    }
    case PS_ACT_RELU2: {
        const vf p = vf_max(u, vf_zero());
        return vf_mul(p, p);
    }
    default: { /* PS_ACT_SWIGLU_OAI */
        const vf top = vf_set(7.0f), a = vf_min(g, top);
        const vf b = vf_max(vf_set(-7.0f), vf_min(u, top));
        return vf_mul(vf_swish(a, 1.702f), vf_add(b, vf_set(1.0f)));
    }
    }
}

void PS_CPU_NAME(act_row)(uint32_t kind, const float *gate, const float *up, float *out, uint64_t n)
{
    for (uint64_t i = 0; i < n; i += VF_N) {
        const vf u = load_any(up + i, n - i);
        store_any(out + i, act_value(kind, gate != NULL ? load_any(gate + i, n - i) : u, u), n - i);
    }
}

typedef struct act_job {
    const ps_act_args *a;
    const float *gate, *up;
    float *out;
} act_job;

static void act_part(void *ctx, int i_thread, int n_threads)
{
    const act_job *j = ctx;
    const ps_act_args *a = j->a;
    uint64_t i, end;
    /* A row's elements may fall to two threads, in whole vectors only if rows are whole vectors;
     * bits do not care. */
    ps_cpu_share((uint64_t)a->n_tok * a->n, 64, i_thread, n_threads, &i, &end);
    while (i < end) {
        const uint64_t t = i / a->n, c = i % a->n, n = ps_min_u64(a->n - c, end - i);
        PS_CPU_NAME(act_row)
        (a->kind, j->gate != NULL ? j->gate + t * a->ldg + c : NULL, j->up + t * a->ldu + c,
            j->out + t * a->ldo + c, n);
        i += n;
    }
}

ps_status PS_CPU_NAME(act)(const ps_launch *launch, const void *args)
{
    const ps_act_args *a = args;
    ps_status status = ps_op_check(PS_OP_ACT, a, NULL);
    if (status != PS_OK) return status;
    act_job j = {.a = a,
        .gate = a->kind == PS_ACT_RELU2 ? NULL : ps_cpu_ptr(launch, a->gate),
        .up = ps_cpu_ptr(launch, a->up),
        .out = ps_cpu_ptr(launch, a->out)};
    run_sized(launch, (uint64_t)a->n_tok * a->n * 4, act_part, &j);
    return PS_OK;
}

/* ---- head norms, rope and the cache ---- */

enum { MAX_ROT = 512 };

typedef struct prep_job {
    const ps_launch *launch;
    const ps_qkv_prep_args *a;
    uint64_t kv_row_bytes;
} prep_job;

/* Sine and cosine of n angles in plain loops that the compiler turns into vectors. Angles are
 * reduced in double, so positions of millions keep float accuracy; polynomials on |r| <= pi / 4
 * with errors below 1e-7. */
static void sincos_many(const double *angle, uint32_t n, float mag, float *sine, float *cosine)
{
    for (uint32_t i = 0; i < n; i++) {
        const double turns = angle[i] * 0.63661977236758134308; /* 2 / pi */
        const double whole = floor(turns + 0.5);
        const float r = (float)((turns - whole) * 1.57079632679489661923);
        const float z = r * r;
        const float s =
            ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
        const float c =
            ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z *
                z -
            0.5f * z + 1.0f;
        const double quadrant = whole - 4.0 * floor(whole * 0.25); /* 0, 1, 2 or 3 */
        const int odd = quadrant == 1.0 || quadrant == 3.0;
        const float sign_s = quadrant >= 2.0 ? -mag : mag;
        const float sign_c = quadrant == 1.0 || quadrant == 2.0 ? -mag : mag;
        sine[i] = sign_s * (odd ? c : s);
        cosine[i] = sign_c * (odd ? s : c);
    }
}

/* cosine and sine for each pair of token t; interleaved: both floats of a pair carry them, the sine
 * with the sign that the float's formula has. */
static void rope_table(const prep_job *j, uint64_t t, float *cosine, float *sine)
{
    const ps_qkv_prep_args *a = j->a;
    const float *freq = ps_cpu_ptr(j->launch, a->freq);
    const int32_t *pos = ps_cpu_ptr(j->launch, a->pos),
                  *rope_pos = ps_cpu_ptr(j->launch, a->rope_pos);
    const uint32_t half = a->n_rot / 2;
    double angle[MAX_ROT / 2];
    if (a->rope == PS_ROPE_MROPE) {
        uint32_t i = 0;
        for (uint32_t s = 0; s < 4; s++)
            for (uint32_t n = 0; n < a->sections[s]; n++, i++)
                angle[i] = (double)rope_pos[(uint64_t)s * a->n_tok + t] * (double)freq[i];
    } else {
        for (uint32_t i = 0; i < half; i++) angle[i] = (double)pos[t] * (double)freq[i];
    }
    sincos_many(angle, half, a->mag, sine, cosine);
    if (a->rope != PS_ROPE_INTERLEAVED) return;
    for (uint32_t i = half; i-- > 0;) {
        cosine[2 * i] = cosine[2 * i + 1] = cosine[i];
        sine[2 * i + 1] = sine[i];
        sine[2 * i] = -sine[i];
    }
}

static void rope_head(const ps_qkv_prep_args *a, const float *cosine, const float *sine, float *x)
{
    const uint32_t half = a->n_rot / 2;
    if (a->rope == PS_ROPE_INTERLEAVED) {
        for (uint32_t i = 0; i < a->n_rot; i += VF_N) {
            const vf v = load_any(x + i, a->n_rot - i), c = load_any(cosine + i, a->n_rot - i);
            const vf s = vf_mul(vf_swap_pairs(v), load_any(sine + i, a->n_rot - i));
            store_any(x + i, vf_fma(v, c, s), a->n_rot - i);
        }
        return;
    }
    for (uint32_t i = 0; i < half; i += VF_N) {
        const uint32_t left = half - i;
        const vf p = load_any(x + i, left), q = load_any(x + half + i, left);
        const vf c = load_any(cosine + i, left), s = load_any(sine + i, left);
        store_any(x + i, vf_sub(vf_mul(p, c), vf_mul(q, s)), left);
        store_any(x + half + i, vf_fma(p, s, vf_mul(q, c)), left);
    }
}

static void head_norm(float *x, const float *w, uint32_t n, float eps)
{
    vf var = vf_zero();
    for (uint32_t i = 0; i < n; i += VF_N) {
        const vf v = load_any(x + i, n - i);
        var = vf_fma(v, v, var);
    }
    const vf scale = vf_set(1.0f / sqrtf(vf_sum(var) / (float)n + eps));
    for (uint32_t i = 0; i < n; i += VF_N)
        store_any(
            x + i, vf_mul(vf_mul(load_any(x + i, n - i), scale), load_any(w + i, n - i)), n - i);
}

static void store_row(uint32_t fmt, const float *x, char *row, uint32_t n)
{
    uint32_t i = 0;
    if (fmt == PS_FMT_F16)
        for (; i + VF_N <= n; i += VF_N) vf_store_f16(row + 2 * i, vf_load(x + i));
    if (i < n) ps_quant_row((ps_fmt)fmt, x + i, row + 2 * (uint64_t)i, n - i);
}

/* The cache row of token t for KV head h, or -1 where its page is on the other side. */
static int64_t cache_row(const prep_job *j, uint64_t t, uint32_t h)
{
    const ps_kv_view *kv = &j->a->kv;
    const int32_t *pos = ps_cpu_ptr(j->launch, j->a->pos), *seq = ps_cpu_ptr(j->launch, j->a->seq);
    const int32_t *table = ps_cpu_ptr(j->launch, kv->table);
    const uint64_t p = (uint64_t)pos[t];
    const int32_t page = table[(uint64_t)seq[t] * kv->max_pages + p / kv->page_tok];
    if (page < 0) return -1;
    return (int64_t)(((uint64_t)page * kv->n_kv_head + h) * kv->page_tok + p % kv->page_tok);
}

static void prep_token(const prep_job *j, uint64_t t)
{
    const ps_qkv_prep_args *a = j->a;
    const uint32_t d = a->kv.head_dim;
    float *q = ps_cpu_ptr(j->launch, a->q), *k = ps_cpu_ptr(j->launch, a->k);
    const float *v = ps_cpu_ptr(j->launch, a->v);
    const float *q_norm = ps_cpu_ptr(j->launch, a->q_norm),
                *k_norm = ps_cpu_ptr(j->launch, a->k_norm);
    char *k_cache = ps_cpu_ptr(j->launch, a->kv.k), *v_cache = ps_cpu_ptr(j->launch, a->kv.v);
    float cosine[MAX_ROT], sine[MAX_ROT];
    if (a->rope != PS_ROPE_NONE) rope_table(j, t, cosine, sine);
    for (uint32_t h = 0; q != NULL && h < a->n_head; h++) {
        float *head = q + t * a->ldq + (uint64_t)h * d;
        if (q_norm != NULL) head_norm(head, q_norm, d, a->eps);
        if (a->rope != PS_ROPE_NONE) rope_head(a, cosine, sine, head);
    }
    for (uint32_t h = 0; h < a->kv.n_kv_head; h++) {
        float *head = k + t * a->ldk + (uint64_t)h * d;
        if (k_norm != NULL) head_norm(head, k_norm, d, a->eps);
        if (a->rope != PS_ROPE_NONE) rope_head(a, cosine, sine, head);
        const int64_t row = k_cache != NULL ? cache_row(j, t, h) : -1;
        if (row < 0) continue;
        store_row(a->kv.fmt, head, k_cache + (uint64_t)row * j->kv_row_bytes, d);
        store_row(a->kv.fmt, v + t * a->ldv + (uint64_t)h * d,
            v_cache + (uint64_t)row * j->kv_row_bytes, d);
    }
}

static void prep_part(void *ctx, int i_thread, int n_threads)
{
    const prep_job *j = ctx;
    uint64_t t, end;
    ps_cpu_share(j->a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++) prep_token(j, t);
}

ps_status PS_CPU_NAME(qkv_prep)(const ps_launch *launch, const void *args)
{
    const ps_qkv_prep_args *a = args;
    ps_status status = ps_op_check(PS_OP_QKV_PREP, a, NULL);
    if (status != PS_OK) return status;
    prep_job j = {.launch = launch, .a = a};
    if (!ps_dptr_is_null(a->kv.k) && !ps_fmt_row_bytes(a->kv.fmt, a->kv.head_dim, &j.kv_row_bytes))
        return PS_EINTERNAL;
    const uint64_t n = (uint64_t)a->n_tok * (a->n_head + a->kv.n_kv_head) * a->kv.head_dim;
    run_sized(launch, a->n_tok > 1 ? n : 0, prep_part, &j);
    return PS_OK;
}

/* ---- the sum over experts ---- */

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
    const uint64_t n = a->n;
    uint64_t t, end;
    ps_cpu_share(a->n_tok, 1, i_thread, n_threads, &t, &end);
    for (; t < end; t++)
        for (uint64_t c = 0; c < n; c += VF_N) {
            vf sum = residual != NULL ? load_any(residual + t * n + c, n - c) : vf_zero();
            for (uint64_t as = t * a->k; as < (t + 1) * a->k; as++) {
                const float *rows = ps_dptr_is_null(downs[ids[as]]) ? y_other : y;
                sum = vf_fma(vf_set(weights[as]), load_any(rows + as * n + c, n - c), sum);
            }
            store_any(out + t * n + c, sum, n - c);
        }
}

ps_status PS_CPU_NAME(moe_combine)(const ps_launch *launch, const void *args)
{
    const ps_moe_combine_args *a = args;
    ps_status status = ps_op_check(PS_OP_MOE_COMBINE, a, NULL);
    if (status != PS_OK) return status;
    if (!ps_cpu_combine_complete(launch, a)) return PS_EINTERNAL;
    combine_job j = {launch, a};
    run_sized(launch, (uint64_t)a->n_tok * a->n * a->k, combine_part, &j);
    return PS_OK;
}

/* ---- element by element ---- */

typedef struct elem_job {
    const float *a, *b; /* b NULL: softcap of a */
    float *out;
    uint64_t n;
    float cap;
} elem_job;

static void elem_part(void *ctx, int i_thread, int n_threads)
{
    const elem_job *j = ctx;
    uint64_t i, end;
    ps_cpu_share(j->n, 64, i_thread, n_threads, &i, &end);
    const vf cap = vf_set(j->cap), inv = vf_set(1.0f / j->cap);
    for (; i < end; i += VF_N) {
        vf v = load_any(j->a + i, end - i);
        if (j->b != NULL)
            v = vf_add(v, load_any(j->b + i, end - i));
        else
            v = vf_mul(cap, vf_tanh(vf_mul(v, inv)));
        store_any(j->out + i, v, end - i);
    }
}

ps_status PS_CPU_NAME(add)(const ps_launch *launch, const void *args)
{
    const ps_add_args *a = args;
    ps_status status = ps_op_check(PS_OP_ADD, a, NULL);
    if (status != PS_OK) return status;
    elem_job j = {.a = ps_cpu_ptr(launch, a->a),
        .b = ps_cpu_ptr(launch, a->b),
        .out = ps_cpu_ptr(launch, a->out),
        .n = a->n,
        .cap = 1};
    run_sized(launch, a->n, elem_part, &j);
    return PS_OK;
}

ps_status PS_CPU_NAME(softcap)(const ps_launch *launch, const void *args)
{
    const ps_softcap_args *a = args;
    ps_status status = ps_op_check(PS_OP_SOFTCAP, a, NULL);
    if (status != PS_OK) return status;
    float *x = ps_cpu_ptr(launch, a->x);
    elem_job j = {.a = x, .out = x, .n = a->n, .cap = a->cap};
    run_sized(launch, a->n * 4, elem_part, &j);
    return PS_OK;
}
