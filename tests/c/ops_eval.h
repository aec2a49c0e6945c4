/* ops_eval - the ops evaluated from their formulas in double, apart from the code of csrc/kernels:
 * what the reference table itself is judged by. Whole matrices are dequantised first and sums run
 * over them in the formula's own shape.
 *
 * Not here: EMBED, ADD, MOVE, GATHER_ROWS, SOFTCAP and ATTN_MERGE's tables of cases (ops_cases.h).
 * Threads: the test's thread.
 */
#ifndef OPS_EVAL_H
#define OPS_EVAL_H

#include "ops_rig.h"

#include <complex.h>

static inline void *ops_ptr(ps_dptr p)
{
    return (void *)(uintptr_t)p.a;
}

static inline float *ops_dequant(const void *src, uint32_t fmt, uint64_t n)
{
    float *x = ps_alloc(n, sizeof *x);
    if (x == NULL) exit(2);
    ps_dequant_row((ps_fmt)fmt, src, x, n);
    return x;
}

static inline double ops_sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static inline double ops_act_value(uint32_t kind, double g, double u)
{
    if (kind == PS_ACT_SILU) return g * ops_sigmoid(g) * u;
    if (kind == PS_ACT_RELU2) return fmax(u, 0) * fmax(u, 0);
    if (kind == PS_ACT_GELU) /* tanh(z) = 2 sigmoid(2z) - 1 */
        return g * ops_sigmoid(2 * sqrt(2 / acos(-1)) * (g + 0.044715 * g * g * g)) * u;
    g = fmin(g, 7), u = fmax(-7, fmin(u, 7));
    return g * ops_sigmoid(1.702 * g) * (u + 1);
}

static inline void ops_eval_matmul(ps_matmul_args *a)
{
    const float *x = ops_ptr(a->x);
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const ps_matmul_part *p = &a->part[i];
        float *w = ops_dequant(ops_ptr(p->w), p->fmt, (uint64_t)p->n_rows * a->n_cols);
        float *y = ops_ptr(p->y), *bias = ops_ptr(p->bias);
        for (uint32_t t = 0; t < a->n_tok; t++)
            for (uint32_t r = 0; r < p->n_rows; r++) {
                double sum = 0;
                for (uint32_t c = 0; c < a->n_cols; c++)
                    sum += (double)x[(uint64_t)t * a->ldx + c] *
                           (double)w[(uint64_t)r * a->n_cols + c];
                float *out = &y[(uint64_t)t * p->ldy + r];
                if (bias != NULL) sum += (double)bias[r];
                *out = (float)((a->add ? (double)*out : 0) + sum);
            }
        ps_free(w);
    }
}

static inline void ops_eval_norm(ps_norm_args *a)
{
    const float *w = ops_ptr(a->w), *b = ops_ptr(a->b);
    for (uint64_t t = 0; t < a->n_tok; t++) {
        const float *x = (float *)ops_ptr(a->x) + t * a->ldx, *res = ops_ptr(a->residual);
        float *out = (float *)ops_ptr(a->out) + t * a->ldo;
        double s1 = 0, s2 = 0;
        for (uint32_t i = 0; i < a->n; i++) s1 += (double)x[i] / a->n;
        if (a->kind == PS_NORM_RMS) s1 = 0;
        for (uint32_t i = 0; i < a->n; i++) s2 += pow((double)x[i] - s1, 2) / a->n;
        for (uint32_t i = 0; i < a->n; i++) {
            double y = ((double)x[i] - s1) / sqrt(s2 + (double)a->eps) * (double)w[i];
            if (b != NULL) y += (double)b[i];
            if (res != NULL) y += (double)res[t * a->ldo + i];
            out[i] = (float)y;
        }
    }
}

/* Rotation as a product of complex numbers. */
static inline void ops_eval_rope(const ps_qkv_prep_args *a, uint32_t t, float *x)
{
    const float *freq = ops_ptr(a->freq);
    const int32_t *pos = ops_ptr(a->pos), *rope_pos = ops_ptr(a->rope_pos);
    if (a->rope == PS_ROPE_NONE) return;
    for (uint32_t i = 0; i < a->n_rot / 2; i++) {
        double p = pos[t];
        if (a->rope == PS_ROPE_MROPE) {
            const uint32_t ends[3] = {a->sections[0], a->sections[0] + a->sections[1],
                a->sections[0] + a->sections[1] + a->sections[2]};
            p = rope_pos[(i < ends[0] ? 0 : i < ends[1] ? 1 : i < ends[2] ? 2 : 3) * a->n_tok + t];
        }
        const bool inter = a->rope == PS_ROPE_INTERLEAVED;
        float *re = inter ? &x[2 * i] : &x[i], *im = inter ? &x[2 * i + 1] : &x[i + a->n_rot / 2];
        const double complex z =
            ((double)*re + I * (double)*im) * (double)a->mag * cexp(I * p * (double)freq[i]);
        *re = (float)creal(z), *im = (float)cimag(z);
    }
}

static inline void ops_eval_head_norm(float *x, const float *w, uint32_t n, double eps)
{
    double s = 0;
    for (uint32_t i = 0; i < n; i++) s += (double)x[i] * (double)x[i] / n;
    for (uint32_t i = 0; i < n; i++) x[i] = (float)((double)x[i] * (double)w[i] / sqrt(s + eps));
}

static inline void *ops_cache_row(
    const ps_kv_view *kv, ps_dptr side, int32_t seq, int32_t pos, uint32_t h)
{
    uint64_t row_bytes = 0;
    ps_fmt_row_bytes(kv->fmt, kv->head_dim, &row_bytes);
    const int32_t *table = ops_ptr(kv->table);
    const int32_t page = table[seq * (int64_t)kv->max_pages + pos / (int64_t)kv->page_tok];
    if (page < 0) return NULL;
    const uint64_t row =
        ((uint64_t)page * kv->n_kv_head + h) * kv->page_tok + (uint64_t)pos % kv->page_tok;
    return (char *)ops_ptr(side) + row * row_bytes;
}

static inline void ops_eval_prep(ps_qkv_prep_args *a)
{
    const uint32_t d = a->kv.head_dim;
    const int32_t *pos = ops_ptr(a->pos), *seq = ops_ptr(a->seq);
    for (uint32_t t = 0; t < a->n_tok; t++) {
        for (uint32_t h = 0; ops_ptr(a->q) != NULL && h < a->n_head; h++) {
            float *q = (float *)ops_ptr(a->q) + (uint64_t)t * a->ldq + (uint64_t)h * d;
            if (ops_ptr(a->q_norm)) ops_eval_head_norm(q, ops_ptr(a->q_norm), d, (double)a->eps);
            ops_eval_rope(a, t, q);
        }
        for (uint32_t h = 0; h < a->kv.n_kv_head; h++) {
            float *k = (float *)ops_ptr(a->k) + (uint64_t)t * a->ldk + (uint64_t)h * d;
            const float *v = (float *)ops_ptr(a->v) + (uint64_t)t * a->ldv + (uint64_t)h * d;
            if (ops_ptr(a->k_norm)) ops_eval_head_norm(k, ops_ptr(a->k_norm), d, (double)a->eps);
            ops_eval_rope(a, t, k);
            if (ops_ptr(a->kv.k) == NULL) continue;
            void *k_row = ops_cache_row(&a->kv, a->kv.k, seq[t], pos[t], h);
            void *v_row = ops_cache_row(&a->kv, a->kv.v, seq[t], pos[t], h);
            if (k_row == NULL) continue;
            ps_quant_row((ps_fmt)a->kv.fmt, k, k_row, d);
            ps_quant_row((ps_fmt)a->kv.fmt, v, v_row, d);
        }
    }
}

/* Softmax over every key of the sequence, with the masked ones and the sink as terms of their own.
 */
static inline void ops_eval_attn(ps_attn_args *a)
{
    const uint32_t d = a->kv.head_dim, group = a->n_head / a->kv.n_kv_head;
    const int32_t *pos = ops_ptr(a->pos), *seq = ops_ptr(a->seq);
    const float *sinks = ops_ptr(a->sinks);
    double *s = ps_alloc(a->max_kv, sizeof *s);
    if (s == NULL) exit(2);
    for (uint64_t t = 0; t < a->n_tok; t++)
        for (uint32_t h = 0; h < a->n_head; h++) {
            const float *q = (float *)ops_ptr(a->q) + t * a->ldq + (uint64_t)h * d;
            float *out = (float *)ops_ptr(a->out) + t * a->ldo + (uint64_t)h * d,
                  *ml = ops_ptr(a->ml);
            double max = sinks ? (double)sinks[h] : -INFINITY, sum = 0, acc[512] = {0};
            for (int32_t p = 0; p < (int32_t)a->max_kv; p++) {
                const void *row = ops_cache_row(&a->kv, a->kv.k, seq[t], p, h / group);
                s[p] = -INFINITY;
                if (p > pos[t] || (a->window && pos[t] - p >= (int32_t)a->window) || row == NULL)
                    continue;
                float *k = ops_dequant(row, a->kv.fmt, d);
                s[p] = 0;
                for (uint32_t i = 0; i < d; i++)
                    s[p] += (double)a->scale * (double)q[i] * (double)k[i];
                if (a->softcap > 0) s[p] = (double)a->softcap * tanh(s[p] / (double)a->softcap);
                max = fmax(max, s[p]);
                ps_free(k);
            }
            if (sinks) sum = exp((double)sinks[h] - max);
            for (int32_t p = 0; p < (int32_t)a->max_kv; p++) {
                if (isinf(s[p])) continue;
                float *v =
                    ops_dequant(ops_cache_row(&a->kv, a->kv.v, seq[t], p, h / group), a->kv.fmt, d);
                for (uint32_t i = 0; i < d; i++) acc[i] += exp(s[p] - max) * (double)v[i];
                sum += exp(s[p] - max);
                ps_free(v);
            }
            for (uint32_t i = 0; i < d; i++) out[i] = sum > 0 ? (float)(acc[i] / sum) : 0;
            if (ml != NULL)
                ml[(t * a->n_head + h) * 2] = (float)max,
                                         ml[(t * a->n_head + h) * 2 + 1] = (float)sum;
        }
    ps_free(s);
}

static inline void ops_eval_merge(ps_attn_merge_args *a)
{
    const float *x = ops_ptr(a->a), *y = ops_ptr(a->b), *ma = ops_ptr(a->ml_a),
                *mb = ops_ptr(a->ml_b);
    float *out = ops_ptr(a->out);
    for (uint64_t i = 0; i < (uint64_t)a->n_tok * a->n_head * a->head_dim; i++) {
        const uint64_t h =
            i / a->head_dim * 2; /* the share of a part: its log-sum-exp against the other's */
        const double la = (double)ma[h] + log((double)ma[h + 1]),
                     lb = (double)mb[h] + log((double)mb[h + 1]);
        const double share = isinf(la) ? (isinf(lb) ? 0 : 0) : isinf(lb) ? 1 : ops_sigmoid(la - lb);
        const double rest = isinf(la) && isinf(lb) ? 0 : 1 - share;
        out[i] = (float)(share * (double)x[i] + rest * (double)y[i]);
    }
}

static inline void ops_eval_act(ps_act_args *a)
{
    const float *gate = ops_ptr(a->gate), *up = ops_ptr(a->up);
    float *out = ops_ptr(a->out);
    for (uint64_t t = 0; t < a->n_tok; t++)
        for (uint32_t i = 0; i < a->n; i++)
            out[t * a->ldo + i] = (float)ops_act_value(
                a->kind, gate ? (double)gate[t * a->ldg + i] : 0, (double)up[t * a->ldu + i]);
}

static inline void ops_eval_route(ps_route_args *a)
{
    int32_t *ids = ops_ptr(a->ids), *order = ops_ptr(a->order), *starts = ops_ptr(a->starts),
            at = 0;
    float *weights = ops_ptr(a->weights);
    for (uint32_t t = 0; t < a->n_tok; t++) {
        const float *l = (float *)ops_ptr(a->logits) + (uint64_t)t * a->n_expert;
        double all = 0, chosen = 0;
        for (uint32_t e = 0; e < a->n_expert; e++) all += exp((double)l[e]);
        for (uint32_t e = 0; e < a->n_expert; e++) { /* rank: how many are better */
            uint32_t rank = 0;
            for (uint32_t f = 0; f < a->n_expert; f++)
                rank += l[f] > l[e] || (l[f] == l[e] && f < e);
            if (rank >= a->k) continue;
            ids[t * a->k + rank] = (int32_t)e;
            weights[t * a->k + rank] = (float)(exp((double)l[e]) / all);
            chosen += exp((double)l[e]) / all;
        }
        for (uint32_t r = 0; a->renorm && r < a->k; r++)
            weights[t * a->k + r] = (float)((double)weights[t * a->k + r] / chosen);
    }
    for (uint32_t e = 0; e < a->n_expert; e++) {
        starts[e] = at;
        for (uint32_t i = 0; i < a->n_tok * a->k; i++)
            if (ids[i] == (int32_t)e) order[at++] = (int32_t)i;
    }
    starts[a->n_expert] = at;
}

/* The first assignment of expert e; n: none. */
static inline uint64_t ops_first_of(const ps_gather_experts_args *a, uint32_t e)
{
    const int32_t *ids = ops_ptr(a->ids);
    uint64_t i = 0, n = (uint64_t)a->n_tok * a->k;
    while (i < n && ids[i] != (int32_t)e) i++;
    return i;
}

/* Of the shared experts that are routed, how many begin before expert e, and whether that makes it
 * one of this call's. */
static inline bool ops_shared_here(
    const ps_gather_experts_args *a, const ps_dptr *shared, uint32_t e)
{
    const uint64_t none = (uint64_t)a->n_tok * a->k;
    uint32_t n = 0, rank = 0;
    for (uint32_t f = 0; f < a->n_expert; f++) {
        if (ops_ptr(shared[f]) == NULL || ops_first_of(a, f) == none) continue;
        n++;
        rank += ops_first_of(a, f) < ops_first_of(a, e);
    }
    /* The number of the GPU's that makes the later of both sides earliest. */
    const double share = a->share / 65536.0;
    uint32_t n_gpu = 0;
    while (n_gpu < n && (n_gpu + 1) * (1 - share) <= (n - n_gpu) * share) n_gpu++;
    const bool gpu = rank < n_gpu;
    return a->rest ? !gpu : gpu;
}

static inline void ops_eval_gather(ps_gather_experts_args *a)
{
    const ps_dptr *mapped = ops_ptr(a->mapped), *shared = ops_ptr(a->shared);
    for (uint32_t e = 0; e < a->n_expert; e++) {
        const uint64_t i = ops_first_of(a, e);
        ps_dptr image = ((ps_dptr *)ops_ptr(a->resident))[e], from = mapped[e];
        bool here = true;
        if (shared != NULL && ops_ptr(shared[e]) != NULL) {
            from = shared[e];
            here = ops_shared_here(a, shared, e);
        }
        if (ops_ptr(from) != NULL) {
            here = here && i < (uint64_t)a->n_tok * a->k;
            image = (ps_dptr){0};
            if (here) image = from;
            if (here && ops_ptr(a->slots) != NULL) {
                image = ps_dptr_add(a->slots, i * a->image_bytes);
                memcpy(ops_ptr(image), ops_ptr(from), a->image_bytes);
            }
        }
        const bool any = ops_ptr(image) != NULL;
        ((ps_dptr *)ops_ptr(a->gate_ptrs))[e].a = any ? image.a + a->gate_at : 0;
        ((ps_dptr *)ops_ptr(a->up_ptrs))[e].a = any ? image.a + a->up_at : 0;
        ((ps_dptr *)ops_ptr(a->down_ptrs))[e].a = any ? image.a + a->down_at : 0;
    }
}

/* y = W x + bias for one row of x, W dequantised beforehand. */
static inline double ops_dot(const float *w, const float *x, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += (double)w[i] * (double)x[i];
    return sum;
}

static inline void ops_eval_moe_up(ps_moe_up_args *a)
{
    const ps_dptr *gates = ops_ptr(a->gate_ptrs), *ups = ops_ptr(a->up_ptrs);
    const int32_t *ids = ops_ptr(a->ids);
    const float *gb = ops_ptr(a->gate_bias), *ub = ops_ptr(a->up_bias);
    float *out = ops_ptr(a->out);
    for (uint64_t as = 0; as < (uint64_t)a->n_tok * a->k; as++) {
        const uint64_t e = (uint64_t)ids[as];
        if (ops_ptr(gates[e]) == NULL) continue;
        const float *x = (float *)ops_ptr(a->x) + as / a->k * a->ldx;
        float *g = ops_dequant(ops_ptr(gates[e]), a->fmt_gate, (uint64_t)a->n_ff * a->n_cols);
        float *u = ops_dequant(ops_ptr(ups[e]), a->fmt_up, (uint64_t)a->n_ff * a->n_cols);
        for (uint64_t f = 0; f < a->n_ff; f++)
            out[as * a->n_ff + f] = (float)ops_act_value(a->act,
                ops_dot(g + f * a->n_cols, x, a->n_cols) + (gb ? (double)gb[e * a->n_ff + f] : 0),
                ops_dot(u + f * a->n_cols, x, a->n_cols) + (ub ? (double)ub[e * a->n_ff + f] : 0));
        ps_free(g);
        ps_free(u);
    }
}

static inline void ops_eval_moe_down(ps_moe_down_args *a)
{
    const ps_dptr *downs = ops_ptr(a->down_ptrs);
    const int32_t *ids = ops_ptr(a->ids);
    const float *bias = ops_ptr(a->bias);
    float *y = ops_ptr(a->y);
    for (uint64_t as = 0; as < (uint64_t)a->n_tok * a->k; as++) {
        const uint64_t e = (uint64_t)ids[as];
        if (ops_ptr(downs[e]) == NULL) continue;
        const float *h = (float *)ops_ptr(a->h) + as * a->n_ff;
        float *w = ops_dequant(ops_ptr(downs[e]), a->fmt, (uint64_t)a->n_rows * a->n_ff);
        for (uint64_t r = 0; r < a->n_rows; r++)
            y[as * a->n_rows + r] = (float)(ops_dot(w + r * a->n_ff, h, a->n_ff) +
                                            (bias ? (double)bias[e * a->n_rows + r] : 0));
        ps_free(w);
    }
}

static inline void ops_eval_combine(ps_moe_combine_args *a)
{
    const ps_dptr *downs = ops_ptr(a->down_ptrs);
    const int32_t *ids = ops_ptr(a->ids);
    const float *y = ops_ptr(a->y), *other = ops_ptr(a->y_other), *w = ops_ptr(a->weights);
    const float *res = ops_ptr(a->residual);
    float *out = ops_ptr(a->out);
    for (uint64_t t = 0; t < a->n_tok; t++)
        for (uint64_t i = 0; i < a->n; i++) {
            double sum = 0;
            for (uint64_t as = t * a->k; as < (t + 1) * a->k; as++)
                sum += (double)w[as] * (double)(ops_ptr(downs[ids[as]]) ? y : other)[as * a->n + i];
            out[t * a->n + i] = (float)(sum + (res ? (double)res[t * a->n + i] : 0));
        }
}

static inline void ops_eval_small(ps_op_kind kind, ps_op_args *u)
{
    if (kind == PS_OP_EMBED) {
        ps_embed_args *a = &u->embed;
        float *w = ops_dequant(ops_ptr(a->table), a->fmt, (uint64_t)a->n_vocab * a->n_cols);
        for (uint64_t i = 0; i < (uint64_t)a->n_tok * a->n_cols; i++) {
            const uint64_t id = (uint64_t)((int32_t *)ops_ptr(a->ids))[i / a->n_cols];
            ((float *)ops_ptr(a->out))[i] = a->scale * w[id * a->n_cols + i % a->n_cols];
        }
        ps_free(w);
    } else if (kind == PS_OP_ADD) {
        for (uint64_t i = 0; i < u->add.n; i++)
            ((float *)ops_ptr(u->add.out))[i] =
                ((float *)ops_ptr(u->add.a))[i] + ((float *)ops_ptr(u->add.b))[i];
    } else if (kind == PS_OP_MOVE) {
        for (uint64_t i = 0; i < u->move.n; i++)
            ((float *)ops_ptr(u->move.out))[i] = ((float *)ops_ptr(u->move.x))[i];
    } else if (kind == PS_OP_GATHER_ROWS) {
        ps_gather_rows_args *a = &u->gather_rows;
        for (uint64_t i = 0; i < (uint64_t)a->n_rows * a->n; i++) {
            const uint64_t row = (uint64_t)((int32_t *)ops_ptr(a->rows))[i / a->n];
            ((float *)ops_ptr(a->out))[i] = ((float *)ops_ptr(a->x))[row * a->n + i % a->n];
        }
    } else if (kind == PS_OP_SOFTCAP) {
        float *x = ops_ptr(u->softcap.x);
        for (uint64_t i = 0; i < u->softcap.n; i++) /* tanh(z) = 1 - 2 / (exp(2z) + 1) */
            x[i] = (float)((double)u->softcap.cap *
                           -expm1(-2 * (double)x[i] / (double)u->softcap.cap) /
                           (1 + exp(-2 * (double)x[i] / (double)u->softcap.cap)));
    }
}

/* Leaves the results in the outputs' `got`. */
static inline void ops_eval(ops_call *c)
{
    ops_bind_host(c);
    ps_op_args *u = &c->args;
    switch (c->kind) {
    case PS_OP_MATMUL: ops_eval_matmul(&u->matmul); break;
    case PS_OP_NORM: ops_eval_norm(&u->norm); break;
    case PS_OP_QKV_PREP: ops_eval_prep(&u->qkv_prep); break;
    case PS_OP_ATTN: ops_eval_attn(&u->attn); break;
    case PS_OP_ATTN_MERGE: ops_eval_merge(&u->attn_merge); break;
    case PS_OP_ACT: ops_eval_act(&u->act); break;
    case PS_OP_ROUTE: ops_eval_route(&u->route); break;
    case PS_OP_GATHER_EXPERTS: ops_eval_gather(&u->gather_experts); break;
    case PS_OP_MOE_UP: ops_eval_moe_up(&u->moe_up); break;
    case PS_OP_MOE_DOWN: ops_eval_moe_down(&u->moe_down); break;
    case PS_OP_MOE_COMBINE: ops_eval_combine(&u->moe_combine); break;
    default: ops_eval_small(c->kind, u); break;
    }
    ops_name_host_ptrs(c);
}

#endif
