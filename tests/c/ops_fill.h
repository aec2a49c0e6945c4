/* ops_fill - reproducible content for the operands of op tests: activations with the rows that
 * break kernels, weights of every format, permuted pages.
 *
 * Not here: which calls are made of it (ops_cases.h).
 * Threads: the test's thread.
 */
#ifndef OPS_FILL_H
#define OPS_FILL_H

#include "ops_rig.h"

static const ps_fmt ops_formats[] = {PS_FMT_F32, PS_FMT_F16, PS_FMT_BF16, PS_FMT_Q4_0, PS_FMT_Q4_1,
    PS_FMT_Q5_0, PS_FMT_Q5_1, PS_FMT_Q8_0, PS_FMT_Q2_K, PS_FMT_Q3_K, PS_FMT_Q4_K, PS_FMT_Q5_K,
    PS_FMT_Q6_K, PS_FMT_IQ4_NL, PS_FMT_IQ4_XS, PS_FMT_MXFP4};
enum { OPS_N_FORMATS = sizeof ops_formats / sizeof *ops_formats };

static inline float ops_gauss(uint64_t *rng)
{
    const double u = ps_rng_uniform(rng), v = ps_rng_uniform(rng);
    return (float)(sqrt(-2 * log(1 - u)) * cos(6.283185307179586 * v));
}

static inline void ops_fill_gauss(float *x, uint64_t n, float sigma, uint64_t *rng)
{
    for (uint64_t i = 0; i < n; i++) x[i] = sigma * ops_gauss(rng);
}

typedef enum ops_rows { OPS_PLAIN, OPS_EXTREME } ops_rows;

/* Activations. Extreme: rows of 1e6, of 1e-6, of ones with one channel of 1e6, and of zeros, beside
 * plain ones. */
static inline void ops_fill_x(
    float *x, uint64_t n_rows, uint64_t n, uint64_t ld, ops_rows rows, uint64_t *rng)
{
    for (uint64_t r = 0; r < n_rows; r++) {
        const uint64_t len = r + 1 < n_rows ? ld : n; /* the last row has no gap behind it */
        ops_fill_gauss(x + r * ld, len, 1, rng);
        if (rows == OPS_PLAIN) continue;
        const float scale = r % 5 == 0 ? 1e6f : r % 5 == 1 ? 1e-6f : r % 5 == 3 ? 0.0f : 1.0f;
        for (uint64_t i = 0; i < n; i++) x[r * ld + i] *= scale;
        if (r % 5 == 2) x[r * ld + r * 7 % n] = 1e6f;
    }
}

static inline void ops_put_f16(uint8_t *p, float f)
{
    const uint16_t h = ps_f32_to_f16(f);
    memcpy(p, &h, 2);
}

/* Random bits with sane scales, for the formats that ps_quant_row does not make: every code of a
 * block turns up. */
static inline void ops_random_block(ps_fmt fmt, uint8_t *block, uint64_t *rng)
{
    const ps_fmt_info *f = ps_fmt_get(fmt);
    for (uint32_t i = 0; i < f->block_bytes; i++) block[i] = (uint8_t)(ps_rng_next(rng) >> 40);
    const float d = (float)(0.5 + ps_rng_uniform(rng)), dmin = (float)(0.5 + ps_rng_uniform(rng));
    switch (fmt) {
    case PS_FMT_Q2_K:
        ops_put_f16(block + 80, d * 0.06f), ops_put_f16(block + 82, dmin * 0.08f);
        break;
    case PS_FMT_Q3_K: ops_put_f16(block + 108, d * 0.02f); break;
    case PS_FMT_Q4_K:
    case PS_FMT_Q5_K: ops_put_f16(block, d * 0.004f), ops_put_f16(block + 2, dmin * 0.03f); break;
    case PS_FMT_Q6_K: ops_put_f16(block + 208, d * 0.0005f); break;
    case PS_FMT_IQ4_NL: ops_put_f16(block, d * 0.015f); break;
    case PS_FMT_IQ4_XS: ops_put_f16(block, d * 0.001f); break;
    case PS_FMT_MXFP4: block[0] = (uint8_t)(122 + ps_rng_next(rng) % 6); break;
    default: break;
    }
}

/* Beyond a few million, weights repeat: what counts there is only that they fill memory. */
static inline void ops_fill_weights(ps_fmt fmt, uint8_t *dst, uint64_t n, uint64_t *rng)
{
    const ps_fmt_info *f = ps_fmt_get(fmt);
    const uint64_t n_fresh = ps_min_u64(n, 1 << 22),
                   fresh_bytes = n_fresh / f->block_elems * f->block_bytes;
    const uint64_t all_bytes = n / f->block_elems * f->block_bytes;
    float x[256];
    for (uint64_t done = 0, at = 0; done < n_fresh; at += f->block_bytes, done += f->block_elems) {
        ops_fill_gauss(x, f->block_elems, 0.7f, rng);
        if (!ps_quant_row(fmt, x, dst + at, f->block_elems)) ops_random_block(fmt, dst + at, rng);
    }
    for (uint64_t at = fresh_bytes; at < all_bytes; at += fresh_bytes)
        memcpy(dst + at, dst, ps_min_u64(fresh_bytes, all_bytes - at));
}

/* ---- operands of a call ---- */

static inline float *ops_add_f32(ops_call *c, size_t field, uint64_t n)
{
    return (float *)c->buf[ops_add_buf(c, (uint16_t)field, OPS_F32, n * 4, false)].host;
}

static inline int32_t *ops_add_i32(ops_call *c, size_t field, uint64_t n)
{
    return (int32_t *)c->buf[ops_add_buf(c, (uint16_t)field, OPS_I32, n * 4, false)].host;
}

static inline void ops_add_gauss(ops_call *c, size_t field, uint64_t n, float sigma, uint64_t *rng)
{
    ops_fill_gauss(ops_add_f32(c, field, n), n, sigma, rng);
}

static inline float *ops_add_x(ops_call *c, size_t field, uint64_t n_rows, uint64_t n, uint64_t ld,
    ops_rows rows, uint64_t *rng)
{
    float *x = ops_add_f32(c, field, (n_rows - 1) * ld + n);
    ops_fill_x(x, n_rows, n, ld, rows, rng);
    return x;
}

/* A strided float output; what it holds before the call is random too, so that gaps and `add` are
 * checked. */
static inline uint32_t ops_add_out(
    ops_call *c, size_t field, uint64_t n_rows, uint64_t n, uint64_t ld, uint64_t *rng)
{
    const uint64_t n_floats = (n_rows - 1) * ld + n;
    const uint32_t i = ops_add_buf(c, (uint16_t)field, OPS_F32, n_floats * 4, true);
    ops_fill_gauss((float *)c->buf[i].host, n_floats, 1, rng);
    c->buf[i].row = (uint32_t)n;
    c->buf[i].ld = (uint32_t)ld;
    return i;
}

static inline uint32_t ops_add_weights(
    ops_call *c, size_t field, ps_fmt fmt, uint64_t n_rows, uint64_t n_cols, uint64_t *rng)
{
    uint64_t row_bytes = 0;
    ps_fmt_row_bytes(fmt, n_cols, &row_bytes);
    const uint32_t i = ops_add_buf(c, (uint16_t)field, OPS_OPAQUE, n_rows * row_bytes, false);
    ops_fill_weights(fmt, c->buf[i].host, n_rows * n_cols, rng);
    return i;
}

/* The weights of n_expert experts and the table of their addresses; experts in `missing` (bit e %
 * 64) are null. */
static inline void ops_add_experts(ops_call *c, size_t field, ps_fmt fmt, uint32_t n_expert,
    uint64_t n_rows, uint64_t n_cols, uint64_t missing, uint64_t *rng)
{
    const uint32_t w = ops_add_weights(c, OPS_NO_FIELD, fmt, n_expert * n_rows, n_cols, rng);
    const uint32_t i = ops_add_buf(c, (uint16_t)field, OPS_PTRS, n_expert * 8ull, false);
    c->buf[i].target = w;
    for (uint32_t e = 0; e < n_expert; e++) {
        int64_t at = (int64_t)(c->buf[w].n_bytes / n_expert * e);
        if (missing >> (e % 64) & 1) at = -1;
        memcpy(c->buf[i].host + 8ull * e, &at, 8);
    }
}

/* A cache whose pages belong to the sequences in a random interleaving; `absent` of 8 pages are on
 * the other side. */
static inline void ops_add_cache(
    ops_call *c, size_t view, ps_kv_view *kv, uint32_t absent, bool is_out, uint64_t *rng)
{
    uint64_t row_bytes = 0;
    ps_fmt_row_bytes(kv->fmt, kv->head_dim, &row_bytes);
    kv->n_pages = kv->n_seq * kv->max_pages + 1;
    const uint64_t n_rows = (uint64_t)kv->n_pages * kv->n_kv_head * kv->page_tok;
    for (int side = 0; side < 2; side++) {
        const size_t field = view + (side ? offsetof(ps_kv_view, v) : offsetof(ps_kv_view, k));
        const uint32_t i = ops_add_buf(c, (uint16_t)field, OPS_CACHE, n_rows * row_bytes, is_out);
        c->buf[i].fmt = kv->fmt;
        c->buf[i].row = kv->head_dim;
        ops_fill_weights((ps_fmt)kv->fmt, c->buf[i].host, n_rows * kv->head_dim, rng);
    }
    int32_t *table =
        ops_add_i32(c, view + offsetof(ps_kv_view, table), (uint64_t)kv->n_seq * kv->max_pages);
    const uint32_t n = kv->n_seq * kv->max_pages;
    for (uint32_t i = 0; i < n; i++) table[i] = (int32_t)i + 1;
    for (uint32_t i = n; i-- > 1;) {
        const uint32_t j = (uint32_t)(ps_rng_next(rng) % (i + 1));
        const int32_t swap = table[i];
        table[i] = table[j], table[j] = swap;
    }
    for (uint32_t i = 0; i < n; i++)
        if (ps_rng_next(rng) % 8 < absent) table[i] = -1;
}

#endif
