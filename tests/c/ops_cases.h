/* ops_cases - the one table of op calls: op, shapes, formats and tolerance. Every CPU variant, the
 * emulator and CUDA run the same calls; only the rig's device differs.
 *
 * Not here: running and comparing (ops_rig.h), content (ops_fill.h).
 * Threads: the test's thread.
 */
#ifndef OPS_CASES_H
#define OPS_CASES_H

#include "ops_fill.h"

/* Rows of the tables name only what is not zero. */
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

/* ---- tolerance classes: NMSE against the reference, which sums in double ---- */
#define OPS_NMSE_FLOAT                                                                             \
    1e-11                /* float32 throughout: sums in another order, exp and tanh to a few ulp */
#define OPS_NMSE_16 2e-6 /* F16 and F32 weights where the inputs go through 16-bit arithmetic */
#define OPS_NMSE_BF16                                                                              \
    8e-6 /* BF16: 8 bits of mantissa in the inputs, 2^-18 / 3 each, weights exact */
#define OPS_NMSE_Q8                                                                                \
    1e-4 /* quantised weights: inputs rounded to 8 bits a block, 2 to 5e-5 for normal ones */
/* One channel of 1e6 takes a block's whole 8-bit range: its neighbours are lost, and what remains
 * is still within this of the row's norm, because the channel's own product dominates. */

static inline double ops_nmse_of(uint32_t fmt)
{
    if (fmt == PS_FMT_F32 || fmt == PS_FMT_F16) return OPS_NMSE_16;
    return fmt == PS_FMT_BF16 ? OPS_NMSE_BF16 : OPS_NMSE_Q8;
}

/* CPUs multiply F32 weights as floats and F16 ones as floats or as two halves of bfloat16. */
static inline double ops_nmse_cpu_of(uint32_t fmt)
{
    return fmt == PS_FMT_F32 ? OPS_NMSE_FLOAT : fmt == PS_FMT_F16 ? 1e-9 : ops_nmse_of(fmt);
}

static inline void ops_tolerate(ops_call *c, uint32_t fmt)
{
    c->nmse = fmax(c->nmse, ops_nmse_of(fmt));
    c->nmse_cpu = fmax(c->nmse_cpu, ops_nmse_cpu_of(fmt));
}

static inline void ops_begin(ops_call *c, ps_op_kind kind, const char *name)
{
    memset(c, 0, sizeof *c);
    c->kind = kind;
    c->nmse = OPS_NMSE_FLOAT;
    snprintf(c->name, sizeof c->name, "%s %s", ps_op_name(kind), name);
}

/* ---- matmul ---- */

typedef struct ops_matmul_case {
    uint32_t n_tok, n_cols, n_parts;
    ps_fmt fmt[PS_MATMUL_PARTS];
    uint32_t n_rows[PS_MATMUL_PARTS];
    bool add, bias;
    uint32_t pad; /* floats between rows of x and of y */
    ops_rows rows;
} ops_matmul_case;

static inline void ops_make_matmul(ops_call *c, const ops_matmul_case *k)
{
    char name[96];
    snprintf(name, sizeof name, "%s%s%s%s%s %ux%ux%u%s%s%s%s", ps_fmt_get(k->fmt[0])->name,
        k->n_parts > 1 ? "+" : "", k->n_parts > 1 ? ps_fmt_get(k->fmt[1])->name : "",
        k->n_parts > 2 ? "+" : "", k->n_parts > 2 ? ps_fmt_get(k->fmt[2])->name : "", k->n_tok,
        k->n_cols, k->n_rows[0], k->add ? " add" : "", k->bias ? " bias" : "", k->pad ? " pad" : "",
        k->rows == OPS_EXTREME ? " extreme" : "");
    ops_begin(c, PS_OP_MATMUL, name);
    uint64_t rng = ops_seed(c->name);
    ps_matmul_args *a = &c->args.matmul;
    *a = (ps_matmul_args){.n_tok = k->n_tok,
        .n_cols = k->n_cols,
        .ldx = k->n_cols + k->pad,
        .n_parts = k->n_parts,
        .add = k->add};
    ops_add_x(c, offsetof(ps_matmul_args, x), k->n_tok, k->n_cols, a->ldx, k->rows, &rng);
    for (uint32_t i = 0; i < k->n_parts; i++) {
        const size_t at = offsetof(ps_matmul_args, part) + i * sizeof(ps_matmul_part);
        a->part[i].fmt = k->fmt[i];
        a->part[i].n_rows = k->n_rows[i];
        a->part[i].ldy = k->n_rows[i] + k->pad;
        ops_add_weights(
            c, at + offsetof(ps_matmul_part, w), k->fmt[i], k->n_rows[i], k->n_cols, &rng);
        ops_add_out(
            c, at + offsetof(ps_matmul_part, y), k->n_tok, k->n_rows[i], a->part[i].ldy, &rng);
        if (k->bias) ops_add_gauss(c, at + offsetof(ps_matmul_part, bias), k->n_rows[i], 1, &rng);
        ops_tolerate(c, k->fmt[i]);
    }
    /* A token with a handful of results: what their terms leave after cancelling may be small. */
    if (k->n_rows[0] < 8) c->nmse *= 20, c->nmse_cpu *= 20;
}

static inline bool ops_matmul_case_at(uint32_t i, ops_matmul_case *k)
{
    static const uint32_t n_tok[] = {1, 2, 3, 7, 8, 33, 64, 100};
    static const uint32_t n_rows[] = {37, 1, 64, 100, 7, 16, 33, 70};
    /* Every format with every token count; columns are ragged as far as the block allows. */
    if (i < OPS_N_FORMATS * 8) {
        const ps_fmt fmt = ops_formats[i / 8];
        const uint32_t block = ps_fmt_get(fmt)->block_elems, s = i % 8;
        const uint32_t cols[3] = {block == 1    ? 131
                                  : block == 32 ? 352
                                                : 512,
            block == 1    ? 77
            : block == 32 ? 32
                          : 256,
            block == 1    ? 520
            : block == 32 ? 608
                          : 768};
        *k = (ops_matmul_case){.n_tok = n_tok[s],
            .n_cols = cols[s % 3],
            .n_parts = 1,
            .fmt = {fmt},
            .n_rows = {n_rows[s]},
            .add = s % 3 == 1,
            .bias = s % 4 == 2,
            .pad = s % 2 * 3};
        return true;
    }
    i -= OPS_N_FORMATS * 8;
    if (i < OPS_N_FORMATS * 2) { /* activations that overflow 16 bits, and the zero row */
        *k = (ops_matmul_case){.n_tok = i % 2 ? 41 : 6,
            .n_cols = 768,
            .n_parts = 1,
            .fmt = {ops_formats[i / 2]},
            .n_rows = {50},
            .bias = i % 4 == 1,
            .rows = OPS_EXTREME};
        return true;
    }
    i -= OPS_N_FORMATS * 2;
    static const ops_matmul_case more[] = {
        {1, 512, 3, {PS_FMT_Q4_K, PS_FMT_Q4_K, PS_FMT_Q6_K}, {96, 32, 32}, .bias = true},
        {5, 512, 3, {PS_FMT_Q4_K, PS_FMT_Q5_0, PS_FMT_Q8_0}, {96, 33, 31}, .add = true},
        {40, 512, 3, {PS_FMT_Q5_K, PS_FMT_F16, PS_FMT_Q6_K}, {65, 32, 17}, .pad = 5},
        {3, 256, 2, {PS_FMT_F32, PS_FMT_Q4_0}, {31, 64}, .bias = true},
        {77, 256, 2, {PS_FMT_BF16, PS_FMT_IQ4_XS}, {40, 64}, .add = true, .bias = true},
        {12, 1024, 3, {PS_FMT_Q2_K, PS_FMT_Q3_K, PS_FMT_MXFP4}, {20, 24, 28}},
        {1, 14336, 1, {PS_FMT_Q4_0}, {9}},
        {1, 9728, 1, {PS_FMT_Q6_K}, {9}},
        {17, 11008, 1, {PS_FMT_Q4_K}, {9}},
        {1, 5120, 1, {PS_FMT_F16}, {9}},
        {9, 4864, 1, {PS_FMT_Q8_0}, {19}},
        {130, 2048, 1, {PS_FMT_Q4_0}, {20}},
        {130, 2880, 1, {PS_FMT_MXFP4}, {20}},
        {257, 288, 1, {PS_FMT_F16}, {20}},
        {257, 288, 1, {PS_FMT_BF16}, {20}},
        {300, 256, 1, {PS_FMT_Q6_K}, {130}},
    };
    if (i >= sizeof more / sizeof *more) return false;
    *k = more[i];
    return true;
}

static inline bool ops_matmul_at(uint32_t i, ops_call *c)
{
    ops_matmul_case k;
    if (!ops_matmul_case_at(i, &k)) return false;
    ops_make_matmul(c, &k);
    return true;
}

/* ---- embed ---- */

static inline bool ops_embed_at(uint32_t i, ops_call *c)
{
    if (i >= OPS_N_FORMATS * 2) return false;
    const ps_fmt fmt = ops_formats[i / 2];
    const uint32_t n_tok = i % 2 ? 33 : 1, n_cols = ps_fmt_get(fmt)->block_elems == 1 ? 77 : 768;
    ops_begin(c, PS_OP_EMBED, ps_fmt_get(fmt)->name);
    uint64_t rng = ops_seed(c->name);
    c->args.embed = (ps_embed_args){.fmt = fmt,
        .n_tok = n_tok,
        .n_cols = n_cols,
        .n_vocab = 50,
        .scale = i % 2 ? 1.0f : 27.7128f};
    ops_add_weights(c, offsetof(ps_embed_args, table), fmt, 50, n_cols, &rng);
    int32_t *ids = ops_add_i32(c, offsetof(ps_embed_args, ids), n_tok);
    for (uint32_t t = 0; t < n_tok; t++)
        ids[t] = t == 0 ? 49 : t == 1 ? 0 : (int32_t)(ps_rng_next(&rng) % 50);
    ops_add_out(c, offsetof(ps_embed_args, out), n_tok, n_cols, n_cols, &rng);
    return true;
}

/* ---- norm ---- */

static inline bool ops_norm_at(uint32_t i, ops_call *c)
{
    static const uint32_t sizes[] = {1, 7, 64, 100, 1152, 4096};
    enum { IN_PLACE = 1, RESIDUAL = 2, ON_RESIDUAL = 3, PLAIN = 0 };
    if (i >= 6 * 8) return false;
    const uint32_t n = sizes[i / 8], mode = i % 4, layer = i % 8 / 4, n_tok = 1 + i % 6;
    const uint32_t pad = i % 2 ? 0 : 5;
    char name[64];
    snprintf(name, sizeof name, "%s %ux%u mode %u", layer ? "layer" : "rms", n_tok, n, mode);
    ops_begin(c, PS_OP_NORM, name);
    uint64_t rng = ops_seed(c->name);
    ps_norm_args *a = &c->args.norm;
    *a = (ps_norm_args){.n_tok = n_tok,
        .n = n,
        .ldx = n + pad,
        .ldo = n + (mode == IN_PLACE ? pad : 2),
        .kind = layer ? PS_NORM_LAYER : PS_NORM_RMS,
        .eps = 1e-5f};
    ops_add_gauss(c, offsetof(ps_norm_args, w), n, 1, &rng);
    if (layer && mode != PLAIN) ops_add_gauss(c, offsetof(ps_norm_args, b), n, 1, &rng);
    const uint32_t out = ops_add_out(c, offsetof(ps_norm_args, out), n_tok, n, a->ldo, &rng);
    if (mode == IN_PLACE)
        ops_add_alias(c, offsetof(ps_norm_args, x), out, 0);
    else
        ops_add_x(c, offsetof(ps_norm_args, x), n_tok, n, a->ldx, OPS_EXTREME, &rng);
    if (mode == ON_RESIDUAL) ops_add_alias(c, offsetof(ps_norm_args, residual), out, 0);
    if (mode == RESIDUAL)
        ops_add_gauss(c, offsetof(ps_norm_args, residual), (n_tok - 1) * (n + 2ull) + n, 1, &rng);
    /* The mean of a row of 1e6 leaves a few ulp of 1e6 behind in float; relative to the row they
     * are 1e-7. */
    c->nmse = 1e-10;
    return true;
}

/* ---- qkv_prep ---- */

typedef struct ops_prep_case {
    uint32_t head_dim, n_rot, n_head, n_kv_head, n_tok;
    ps_rope_kind rope;
    ps_fmt fmt;
    bool norms;
    uint32_t sections[3];
    bool no_cache, no_q;
} ops_prep_case;

static inline bool ops_prep_at(uint32_t i, ops_call *c)
{
    static const ops_prep_case cases[] = {
        {32, 32, 4, 2, 5, PS_ROPE_INTERLEAVED, PS_FMT_F16, false},
        {64, 64, 8, 8, 1, PS_ROPE_NEOX, PS_FMT_F16, true},
        {80, 40, 6, 2, 9, PS_ROPE_NEOX, PS_FMT_F16, false},
        {96, 96, 3, 1, 33, PS_ROPE_NEOX, PS_FMT_Q8_0, false},
        {128, 128, 8, 2, 17, PS_ROPE_NEOX, PS_FMT_Q8_0, true},
        {256, 256, 4, 1, 7, PS_ROPE_NEOX, PS_FMT_F16, true},
        {128, 128, 4, 2, 11, PS_ROPE_MROPE, PS_FMT_F16, false, {16, 24, 24}},
        {64, 64, 4, 4, 3, PS_ROPE_MROPE, PS_FMT_F16, true, {8, 12, 12}},
        {128, 128, 4, 4, 100, PS_ROPE_INTERLEAVED, PS_FMT_F16, false},
        {64, 26, 2, 2, 6, PS_ROPE_INTERLEAVED, PS_FMT_Q8_0, true},
        {64, 2, 2, 2, 6, PS_ROPE_NEOX, PS_FMT_F16, false},
        {64, 0, 2, 1, 6, PS_ROPE_NONE, PS_FMT_F16, false},
        {64, 64, 2, 1, 6, PS_ROPE_NEOX, PS_FMT_F16, true, .no_cache = true},
        {64, 0, 2, 1, 6, PS_ROPE_NONE, PS_FMT_F16, false, .no_q = true},
    };
    if (i >= sizeof cases / sizeof *cases) return false;
    const ops_prep_case *k = &cases[i];
    char name[64];
    snprintf(name, sizeof name, "dim %u rot %u rope %d %s", k->head_dim, k->n_rot, (int)k->rope,
        ps_fmt_get(k->fmt)->name);
    ops_begin(c, PS_OP_QKV_PREP, name);
    uint64_t rng = ops_seed(c->name);
    ps_qkv_prep_args *a = &c->args.qkv_prep;
    const uint32_t d = k->head_dim, pad = i % 2 * 4, nq = k->n_head * d, nk = k->n_kv_head * d;
    *a = (ps_qkv_prep_args){.n_tok = k->n_tok,
        .n_head = k->n_head,
        .ldq = nq + pad,
        .ldk = nk + pad,
        .ldv = nk + 2 * pad,
        .n_rot = k->n_rot,
        .rope = k->rope,
        .sections = {k->sections[0], k->sections[1], k->sections[2], 0},
        .mag = i % 3 == 1 ? 1.19f : 1.0f,
        .eps = 1e-6f};
    a->kv = (ps_kv_view){.fmt = k->fmt,
        .n_kv_head = k->n_kv_head,
        .head_dim = d,
        .page_tok = 16,
        .max_pages = 40,
        .n_seq = 3};
    if (!k->no_q) ops_add_out(c, offsetof(ps_qkv_prep_args, q), k->n_tok, nq, a->ldq, &rng);
    ops_add_out(c, offsetof(ps_qkv_prep_args, k), k->n_tok, nk, a->ldk, &rng);
    ops_add_x(c, offsetof(ps_qkv_prep_args, v), k->n_tok, nk, a->ldv, OPS_PLAIN, &rng);
    if (k->norms && !k->no_q) ops_add_gauss(c, offsetof(ps_qkv_prep_args, q_norm), d, 1, &rng);
    if (k->norms) ops_add_gauss(c, offsetof(ps_qkv_prep_args, k_norm), d, 1, &rng);
    float *freq = k->n_rot ? ops_add_f32(c, offsetof(ps_qkv_prep_args, freq), k->n_rot / 2) : NULL;
    for (uint32_t j = 0; j < k->n_rot / 2; j++) freq[j] = (float)pow(10000.0, -2.0 * j / k->n_rot);
    int32_t *pos = ops_add_i32(c, offsetof(ps_qkv_prep_args, pos), k->n_tok);
    int32_t *seq = ops_add_i32(c, offsetof(ps_qkv_prep_args, seq), k->n_tok);
    for (uint32_t t = 0; t < k->n_tok; t++)
        seq[t] = (int32_t)(t % 3), pos[t] = (int32_t)(t / 3 * 5 + 11);
    pos[0] = 16 * 40 - 1;
    if (k->rope == PS_ROPE_MROPE) {
        int32_t *rope_pos = ops_add_i32(c, offsetof(ps_qkv_prep_args, rope_pos), 4ull * k->n_tok);
        for (uint32_t j = 0; j < 4 * k->n_tok; j++)
            rope_pos[j] = (int32_t)(ps_rng_next(&rng) % 3000);
    }
    if (!k->no_cache)
        ops_add_cache(c, offsetof(ps_qkv_prep_args, kv), &a->kv, i % 3 == 0 ? 2 : 0, true, &rng);
    c->nmse = 1e-10; /* sines of angles up to a few thousand */
    return true;
}

/* ---- attn ---- */

typedef struct ops_attn_case {
    uint32_t head_dim, n_head, n_kv_head, n_tok, n_seq, page_tok,
        first; /* position of a sequence's first token */
    ps_fmt fmt;
    uint32_t window;
    float softcap;
    bool sinks, ml;
    uint32_t absent; /* of 8 pages */
    uint32_t pad;
} ops_attn_case;

static inline void ops_make_attn(ops_call *c, const ops_attn_case *k)
{
    char name[96];
    snprintf(name, sizeof name, "dim %u heads %u/%u tok %u seq %u from %u %s window %u%s%s%s%s",
        k->head_dim, k->n_head, k->n_kv_head, k->n_tok, k->n_seq, k->first,
        ps_fmt_get(k->fmt)->name, k->window, k->softcap > 0 ? " softcap" : "",
        k->sinks ? " sinks" : "", k->ml ? " ml" : "", k->absent ? " holes" : "");
    ops_begin(c, PS_OP_ATTN, name);
    uint64_t rng = ops_seed(c->name);
    ps_attn_args *a = &c->args.attn;
    const uint32_t n = k->n_head * k->head_dim, per_seq = (k->n_tok + k->n_seq - 1) / k->n_seq;
    const uint32_t max_kv = k->first + per_seq;
    *a = (ps_attn_args){.n_tok = k->n_tok,
        .n_head = k->n_head,
        .ldq = n + k->pad,
        .ldo = n + k->pad,
        .max_kv = max_kv,
        .window = k->window,
        .scale = 1.0f / sqrtf((float)k->head_dim),
        .softcap = k->softcap};
    a->kv = (ps_kv_view){.fmt = k->fmt,
        .n_kv_head = k->n_kv_head,
        .head_dim = k->head_dim,
        .page_tok = k->page_tok,
        .max_pages = (max_kv + k->page_tok - 1) / k->page_tok + 1,
        .n_seq = k->n_seq};
    float *q = ops_add_x(c, offsetof(ps_attn_args, q), k->n_tok, n, a->ldq, OPS_PLAIN, &rng);
    for (uint64_t i = 0; i < (uint64_t)(k->n_tok - 1) * a->ldq + n; i++)
        q[i] *= 3; /* peaked softmax */
    ops_add_out(c, offsetof(ps_attn_args, out), k->n_tok, n, a->ldo, &rng);
    if (k->ml)
        ops_add_out(c, offsetof(ps_attn_args, ml), k->n_tok, k->n_head * 2, k->n_head * 2, &rng);
    if (k->sinks) ops_add_gauss(c, offsetof(ps_attn_args, sinks), k->n_head, 3, &rng);
    int32_t *pos = ops_add_i32(c, offsetof(ps_attn_args, pos), k->n_tok);
    int32_t *seq = ops_add_i32(c, offsetof(ps_attn_args, seq), k->n_tok);
    for (uint32_t t = 0; t < k->n_tok;
         t++) { /* a sequence's tokens side by side, sequences of unlike length */
        seq[t] = (int32_t)(t / per_seq);
        pos[t] = (int32_t)(k->first / (1 + t / per_seq) + t % per_seq);
    }
    ops_add_cache(c, offsetof(ps_attn_args, kv), &a->kv, k->absent, false, &rng);
    c->nmse =
        k->fmt == PS_FMT_Q8_0 ? 1e-5 : OPS_NMSE_16; /* CUDA: K, V and probabilities in 16 bits */
    c->nmse_cpu = 1e-10;
}

static inline bool ops_attn_case_at(uint32_t i, ops_attn_case *k)
{
    static const ops_attn_case cases[] = {
        {32, 4, 4, 1, 1, 16, 0, PS_FMT_F16},
        {32, 4, 2, 1, 1, 16, 99, PS_FMT_F16, .ml = true},
        {64, 8, 4, 5, 1, 32, 60, PS_FMT_F16, .pad = 3},
        {64, 3, 1, 33, 1, 16, 0, PS_FMT_F16},
        {80, 6, 3, 17, 1, 16, 31, PS_FMT_F16, .ml = true},
        {80, 4, 2, 1, 1, 16, 200, PS_FMT_F16, .window = 50},
        {96, 8, 1, 7, 1, 16, 100, PS_FMT_Q8_0},
        {96, 6, 2, 64, 1, 32, 0, PS_FMT_F16, .window = 20},
        {128, 8, 1, 1, 1, 64, 500, PS_FMT_F16},
        {128, 8, 1, 1, 1, 64, 1500, PS_FMT_Q8_0, .ml = true},
        {128, 4, 4, 100, 1, 64, 0, PS_FMT_F16},
        {128, 16, 2, 3, 3, 16, 130, PS_FMT_F16, .sinks = true},
        {256, 4, 1, 1, 1, 32, 300, PS_FMT_F16, .softcap = 50},
        {256, 4, 2, 40, 1, 32, 10, PS_FMT_F16, .window = 33, .softcap = 30},
        {256, 2, 1, 9, 1, 16, 64, PS_FMT_Q8_0, .sinks = true},
        {64, 8, 1, 20, 1, 16, 40, PS_FMT_F16, .window = 24, .sinks = true},
        {64, 8, 1, 1, 1, 16, 700, PS_FMT_F16, .window = 128, .sinks = true, .ml = true},
        {64, 8, 2, 12, 4, 16, 150, PS_FMT_F16},
        {128, 4, 2, 30, 3, 16, 70, PS_FMT_Q8_0, .window = 64},
        {64, 4, 2, 6, 2, 16, 90, PS_FMT_F16, .ml = true, .absent = 4},
        {64, 4, 2, 6, 2, 16, 90, PS_FMT_F16, .sinks = true, .ml = true, .absent = 8},
        {128, 6, 2, 50, 2, 16, 90, PS_FMT_F16, .ml = true, .absent = 3},
        {64, 4, 1, 6, 2, 16, 90, PS_FMT_F16, .ml = true, .absent = 8},
        {64, 2, 1, 8, 8, 16, 45, PS_FMT_F16},
        {128, 2, 2, 70, 1, 16, 1000, PS_FMT_F16, .ml = true},
    };
    if (i >= sizeof cases / sizeof *cases) return false;
    *k = cases[i];
    return true;
}

static inline bool ops_attn_at(uint32_t i, ops_call *c)
{
    ops_attn_case k;
    if (!ops_attn_case_at(i, &k)) return false;
    ops_make_attn(c, &k);
    return true;
}

static inline bool ops_merge_at(uint32_t i, ops_call *c)
{
    if (i >= 4) return false;
    const uint32_t n_tok = i % 2 ? 19 : 1, n_head = 6, d = i < 2 ? 64 : 80;
    const uint64_t n = (uint64_t)n_tok * n_head;
    ops_begin(c, PS_OP_ATTN_MERGE, i < 2 ? "in place" : "apart");
    uint64_t rng = ops_seed(c->name) + i;
    c->args.attn_merge = (ps_attn_merge_args){.n_tok = n_tok, .n_head = n_head, .head_dim = d};
    const uint32_t out = ops_add_out(c, offsetof(ps_attn_merge_args, out), n, d, d, &rng);
    if (i < 2)
        ops_add_alias(c, offsetof(ps_attn_merge_args, a), out, 0);
    else
        ops_add_gauss(c, offsetof(ps_attn_merge_args, a), n * d, 1, &rng);
    ops_add_gauss(c, offsetof(ps_attn_merge_args, b), n * d, 1, &rng);
    float *ml[2] = {ops_add_f32(c, offsetof(ps_attn_merge_args, ml_a), n * 2),
        ops_add_f32(c, offsetof(ps_attn_merge_args, ml_b), n * 2)};
    for (uint64_t j = 0; j < n; j++)
        for (int side = 0; side < 2; side++) { /* each side empty now and then, once both */
            const bool empty = j == 3 || j % 5 == (side ? 1u : 2u);
            ml[side][2 * j] = empty ? -INFINITY : 20 * ops_gauss(&rng);
            ml[side][2 * j + 1] = empty ? 0 : (float)(1 + 50 * ps_rng_uniform(&rng));
        }
    return true;
}

/* ---- act ---- */

static inline bool ops_act_at(uint32_t i, ops_call *c)
{
    enum { APART, SIDE_BY_SIDE, OVER_GATE, OVER_UP };
    static const uint32_t sizes[] = {1, 7, 100, 688};
    if (i >= 4 * 4 * 2) return false;
    const uint32_t kind = i % 4, n = sizes[i / 4 % 4], n_tok = i / 16 ? 5 : 1,
                   gated = kind != PS_ACT_RELU2;
    const uint32_t mode = gated ? (i / 4 + i / 16) % 4 : i / 16 * OVER_UP;
    char name[64];
    snprintf(name, sizeof name, "kind %u %ux%u mode %u", kind, n_tok, n, mode);
    ops_begin(c, PS_OP_ACT, name);
    uint64_t rng = ops_seed(c->name);
    ps_act_args *a = &c->args.act;
    const uint32_t ld = mode == SIDE_BY_SIDE ? 2 * n : n + 3;
    *a = (ps_act_args){.n_tok = n_tok, .n = n, .ldg = ld, .ldu = ld, .ldo = n + 3, .kind = kind};
    const uint32_t out = ops_add_out(c, offsetof(ps_act_args, out), n_tok, n, a->ldo, &rng);
    for (uint64_t j = 0; j < c->buf[out].n_bytes / 4; j++) ((float *)c->buf[out].host)[j] *= 6;
    if (mode == SIDE_BY_SIDE) {
        ops_add_gauss(c, offsetof(ps_act_args, gate), 2ull * n * n_tok, 6, &rng);
        ops_add_alias(c, offsetof(ps_act_args, up), c->n_bufs - 1, n * 4ull);
        return true;
    }
    const uint64_t n_floats = (n_tok - 1) * (uint64_t)ld + n;
    if (mode == OVER_GATE) ops_add_alias(c, offsetof(ps_act_args, gate), out, 0);
    if (mode == OVER_UP) ops_add_alias(c, offsetof(ps_act_args, up), out, 0);
    if (mode != OVER_GATE && gated)
        ops_add_gauss(c, offsetof(ps_act_args, gate), n_floats, 30, &rng);
    if (mode != OVER_UP) ops_add_gauss(c, offsetof(ps_act_args, up), n_floats, 5, &rng);
    return true;
}

/* ---- experts ---- */

static inline void ops_add_routing(ops_call *c, size_t ids_at, size_t order_at, size_t starts_at,
    uint32_t n_tok, uint32_t k, uint32_t n_expert, uint64_t *rng)
{
    const uint32_t n = n_tok * k;
    int32_t *ids = ops_add_i32(c, ids_at, n);
    for (uint32_t t = 0; t < n_tok; t++) /* k different experts a token, expert 1 more often */
        for (uint32_t r = 0; r < k; r++) {
            bool again = true;
            while (again) {
                const uint32_t e = (uint32_t)(ps_rng_next(rng) % (n_expert + 2));
                ids[t * k + r] = e < n_expert ? (int32_t)e : 1;
                again = false;
                for (uint32_t s = 0; s < r; s++) again |= ids[t * k + s] == ids[t * k + r];
            }
        }
    if (order_at == OPS_NO_FIELD) return;
    int32_t *order = ops_add_i32(c, order_at, n),
            *starts = ops_add_i32(c, starts_at, n_expert + 1ull);
    int32_t at = 0;
    for (uint32_t e = 0; e < n_expert; e++) {
        starts[e] = at;
        for (uint32_t i = 0; i < n; i++)
            if (ids[i] == (int32_t)e) order[at++] = (int32_t)i;
    }
    starts[n_expert] = at;
}

static inline bool ops_route_at(uint32_t i, ops_call *c)
{
    static const uint32_t cases[][4] = {/* n_tok, n_expert, k, renorm */
        {1, 8, 2, 1}, {5, 8, 2, 0}, {100, 128, 8, 1}, {3, 128, 8, 0}, {33, 32, 4, 1}, {9, 60, 6, 0},
        {4, 1, 1, 1}, {7, 5, 5, 0}, {520, 64, 8, 1}};
    if (i >= sizeof cases / sizeof *cases) return false;
    const uint32_t *k = cases[i];
    char name[64];
    snprintf(name, sizeof name, "tok %u experts %u k %u renorm %u", k[0], k[1], k[2], k[3]);
    ops_begin(c, PS_OP_ROUTE, name);
    uint64_t rng = ops_seed(c->name);
    c->args.route = (ps_route_args){.n_tok = k[0], .n_expert = k[1], .k = k[2], .renorm = k[3]};
    float *logits = ops_add_f32(c, offsetof(ps_route_args, logits), (uint64_t)k[0] * k[1]);
    ops_fill_gauss(logits, (uint64_t)k[0] * k[1], 2, &rng);
    for (uint32_t e = 0; e < k[1]; e++) logits[e] = (float)(e % 3); /* token 0: ties */
    const uint64_t n = (uint64_t)k[0] * k[2];
    ops_add_buf(c, offsetof(ps_route_args, ids), OPS_I32, n * 4, true);
    ops_add_out(c, offsetof(ps_route_args, weights), k[0], k[2], k[2], &rng);
    ops_add_buf(c, offsetof(ps_route_args, order), OPS_I32, n * 4, true);
    ops_add_buf(c, offsetof(ps_route_args, starts), OPS_I32, (k[1] + 1) * 4ull, true);
    return true;
}

/* Images of n_expert experts, and the table of the addresses of those in `given`. */
static inline void ops_add_images(ops_call *c, size_t field, uint32_t n_expert,
    uint64_t image_bytes, uint64_t given, uint64_t *rng)
{
    const uint32_t w = ops_add_buf(c, OPS_NO_FIELD, OPS_OPAQUE, n_expert * image_bytes, false);
    const uint32_t i = ops_add_buf(c, (uint16_t)field, OPS_PTRS, n_expert * 8ull, false);
    for (uint64_t at = 0; at < c->buf[w].n_bytes; at += 8) {
        const uint64_t word = ps_rng_next(rng);
        memcpy(c->buf[w].host + at, &word, 8);
    }
    c->buf[i].target = w;
    for (uint32_t e = 0; e < n_expert; e++) {
        const int64_t at = given >> (e % 64) & 1 ? (int64_t)(e * image_bytes) : -1;
        memcpy(c->buf[i].host + 8ull * e, &at, 8);
    }
}

typedef struct ops_gather_case {
    uint32_t n_tok, k, n_expert;
    uint64_t image_bytes, mapped, resident; /* bit e % 64 */
    uint64_t shared;                        /* likewise, none of which is mapped or resident */
    uint32_t share;
    bool rest, stay; /* the others of the shared ones; without slots */
} ops_gather_case;

static inline bool ops_gather_experts_at(uint32_t i, ops_call *c)
{
    static const ops_gather_case cases[] = {
        {1, 8, 128, 4096, ~0ull, 0},                        /* all of them */
        {1, 1, 2, 16, 3, 0},                                /* as small as can be */
        {8, 8, 16, 6416, ~0ull, 0},                         /* each expert several times, ragged */
        {8, 4, 16, 6416, 0, 0xFF0F},                        /* none mapped */
        {5, 4, 16, 12304, 0x5A5A, 0xA0A5},                  /* some nowhere */
        {1, 8, 64, 8192, 0xFFFF, 0xFFFFFFFFFFFF0000},       /* a few of many */
        {3, 2, 4, 1000016, 0xD, 0x2},                       /* more than the GPU has under way */
        {40, 8, 128, 1040, 0xF0F0F0F0FF, ~0xF0F0F0F0FFull}, /* more assignments than lanes */
        /* a token's share, all of them or none, and what is left of it */
        {1, 8, 64, 1040, 0, 0, ~0ull, 26214},
        {1, 8, 64, 1040, 0, 0, ~0ull, 26214, .rest = true, .stay = true},
        {1, 8, 64, 1040, 0, 0, ~0ull, PS_SHARE_ONE}, {1, 8, 64, 1040, 0, 0, ~0ull, 0},
        {1, 8, 64, 1040, 0, 0, ~0ull, 0, .rest = true, .stay = true},
        {1, 3, 8, 16, 0, 0, 0xFF, PS_SHARE_ONE / 4}, /* one more or less takes as long */
        /* tokens that want the same ones, beside resident and mapped ones; ragged rounds of lanes
         */
        {8, 4, 16, 6416, 0xF, 0x3F0, 0xFC00, 40000},
        {8, 4, 16, 6416, 0, 0xF, 0xFFF0, 40000, .rest = true, .stay = true},
        {5, 8, 24, 2064, 0, 0xF, 0xFFFFF0, PS_SHARE_ONE / 2},
        {7, 5, 32, 1040, 0x7, 0x700, 0xFFFFF000, 20000},
        {33, 3, 128, 1040, 0xF0F0F0F0FF, 0, ~0xF0F0F0F0FFull, 45678},
        {33, 3, 128, 1040, 0, 0xF0F0F0F0FF, ~0xF0F0F0F0FFull, 45678, .rest = true},
        {6, 4, 16, 1040, 0xFF, 0xFF00, 0, 30000, .stay = true}, /* nothing is shared */
    };
    if (i >= sizeof cases / sizeof *cases) return false;
    const ops_gather_case *k = &cases[i];
    const uint64_t n_assign = (uint64_t)k->n_tok * k->k;
    char name[64];
    snprintf(name, sizeof name, "tok %u experts %u/%u image %" PRIu64 " share %u%s%s", k->n_tok,
        k->k, k->n_expert, k->image_bytes, k->share, k->rest ? " rest" : "",
        k->stay ? " stay" : "");
    ops_begin(c, PS_OP_GATHER_EXPERTS, name);
    uint64_t rng = ops_seed(c->name);
    c->args.gather_experts = (ps_gather_experts_args){.n_tok = k->n_tok,
        .k = k->k,
        .n_expert = k->n_expert,
        .image_bytes = k->image_bytes,
        .gate_at = k->image_bytes / 2,
        .down_at = k->image_bytes - 16,
        .share = k->share,
        .rest = k->rest};
    ops_add_routing(c, offsetof(ps_gather_experts_args, ids), OPS_NO_FIELD, 0, k->n_tok, k->k,
        k->n_expert, &rng);
    ops_add_images(
        c, offsetof(ps_gather_experts_args, mapped), k->n_expert, k->image_bytes, k->mapped, &rng);
    ops_add_images(c, offsetof(ps_gather_experts_args, resident), k->n_expert, k->image_bytes,
        k->resident, &rng);
    if (k->shared != 0)
        ops_add_images(c, offsetof(ps_gather_experts_args, shared), k->n_expert, k->image_bytes,
            k->shared, &rng);
    if (!k->stay) {
        const uint32_t slots = ops_add_buf(c, offsetof(ps_gather_experts_args, slots), OPS_OPAQUE,
            n_assign * k->image_bytes, true);
        memset(c->buf[slots].host, 0x5C, c->buf[slots].n_bytes);
    }
    ops_add_buf(c, offsetof(ps_gather_experts_args, gate_ptrs), OPS_PTRS, k->n_expert * 8ull, true);
    ops_add_buf(c, offsetof(ps_gather_experts_args, up_ptrs), OPS_PTRS, k->n_expert * 8ull, true);
    ops_add_buf(c, offsetof(ps_gather_experts_args, down_ptrs), OPS_PTRS, k->n_expert * 8ull, true);
    return true;
}

typedef struct ops_moe_case {
    uint32_t n_tok, n_expert, k, n_cols, n_ff;
    ps_fmt fmt[3]; /* gate, up, down */
    ps_act_kind act;
    bool bias;
    uint64_t missing;
    ops_rows rows;
} ops_moe_case;

static const ops_moe_case ops_moe_cases[] = {
    {1, 8, 2, 256, 96, {PS_FMT_Q4_0, PS_FMT_Q4_0, PS_FMT_Q4_0}, PS_ACT_SILU},
    {3, 8, 2, 512, 256, {PS_FMT_Q4_K, PS_FMT_Q4_K, PS_FMT_Q6_K}, PS_ACT_SILU},
    {1, 32, 4, 288, 96, {PS_FMT_MXFP4, PS_FMT_MXFP4, PS_FMT_MXFP4}, PS_ACT_SWIGLU_OAI,
        .bias = true},
    {40, 16, 4, 256, 160, {PS_FMT_Q4_0, PS_FMT_Q8_0, PS_FMT_Q5_1}, PS_ACT_SILU, .missing = 0x9},
    {100, 4, 2, 256, 64, {PS_FMT_MXFP4, PS_FMT_MXFP4, PS_FMT_MXFP4}, PS_ACT_SWIGLU_OAI,
        .bias = true},
    {7, 60, 8, 256, 33, {PS_FMT_Q4_K, PS_FMT_Q5_K, PS_FMT_F16}, PS_ACT_SILU, .missing = 0xF0F0},
    {30, 4, 1, 77, 50, {PS_FMT_F16, PS_FMT_F16, PS_FMT_F32}, PS_ACT_GELU},
    {9, 4, 2, 128, 64, {PS_FMT_BF16, PS_FMT_BF16, PS_FMT_BF16}, PS_ACT_SILU, .rows = OPS_EXTREME},
    {12, 8, 2, 512, 256, {PS_FMT_IQ4_XS, PS_FMT_IQ4_NL, PS_FMT_Q2_K}, PS_ACT_SILU,
        .rows = OPS_EXTREME},
    {130, 4, 2, 256, 100, {PS_FMT_Q4_0, PS_FMT_Q4_0, PS_FMT_F16}, PS_ACT_SILU, .missing = 0x2},
};

static inline bool ops_moe_up_at(uint32_t i, ops_call *c)
{
    if (i >= sizeof ops_moe_cases / sizeof *ops_moe_cases) return false;
    const ops_moe_case *k = &ops_moe_cases[i];
    char name[64];
    snprintf(name, sizeof name, "%s+%s tok %u experts %u/%u %ux%u", ps_fmt_get(k->fmt[0])->name,
        ps_fmt_get(k->fmt[1])->name, k->n_tok, k->k, k->n_expert, k->n_cols, k->n_ff);
    ops_begin(c, PS_OP_MOE_UP, name);
    uint64_t rng = ops_seed(c->name);
    ps_moe_up_args *a = &c->args.moe_up;
    *a = (ps_moe_up_args){.n_tok = k->n_tok,
        .k = k->k,
        .n_expert = k->n_expert,
        .n_cols = k->n_cols,
        .n_ff = k->n_ff,
        .ldx = k->n_cols + i % 3,
        .fmt_gate = k->fmt[0],
        .fmt_up = k->fmt[1],
        .act = k->act,
        .n_here = i % 3}; /* a hint, which may be wrong */
    ops_add_x(c, offsetof(ps_moe_up_args, x), k->n_tok, k->n_cols, a->ldx, k->rows, &rng);
    ops_add_out(
        c, offsetof(ps_moe_up_args, out), (uint64_t)k->n_tok * k->k, k->n_ff, k->n_ff, &rng);
    ops_add_routing(c, offsetof(ps_moe_up_args, ids), offsetof(ps_moe_up_args, order),
        offsetof(ps_moe_up_args, starts), k->n_tok, k->k, k->n_expert, &rng);
    ops_add_experts(c, offsetof(ps_moe_up_args, gate_ptrs), k->fmt[0], k->n_expert, k->n_ff,
        k->n_cols, k->missing, &rng);
    ops_add_experts(c, offsetof(ps_moe_up_args, up_ptrs), k->fmt[1], k->n_expert, k->n_ff,
        k->n_cols, k->missing, &rng);
    if (k->bias) {
        const uint64_t n = (uint64_t)k->n_expert * k->n_ff;
        ops_add_gauss(c, offsetof(ps_moe_up_args, gate_bias), n, 1, &rng);
        ops_add_gauss(c, offsetof(ps_moe_up_args, up_bias), n, 1, &rng);
    }
    ops_tolerate(c, k->fmt[0]);
    ops_tolerate(c, k->fmt[1]);
    /* The product of two rounded factors and the activation's slope, with heavier tails than a sum
     * has. */
    c->nmse *= 6, c->nmse_cpu *= 6;
    return true;
}

static inline bool ops_moe_down_at(uint32_t i, ops_call *c)
{
    if (i >= sizeof ops_moe_cases / sizeof *ops_moe_cases) return false;
    const ops_moe_case *k = &ops_moe_cases[i];
    const uint32_t block = ps_fmt_get(k->fmt[2])->block_elems;
    const uint32_t n_ff = (k->n_ff + block - 1) / block * block, n_rows = k->n_cols + 5;
    const uint64_t n = (uint64_t)k->n_tok * k->k;
    char name[64];
    snprintf(name, sizeof name, "%s tok %u experts %u/%u %ux%u", ps_fmt_get(k->fmt[2])->name,
        k->n_tok, k->k, k->n_expert, n_ff, n_rows);
    ops_begin(c, PS_OP_MOE_DOWN, name);
    uint64_t rng = ops_seed(c->name);
    c->args.moe_down = (ps_moe_down_args){.n_tok = k->n_tok,
        .k = k->k,
        .n_expert = k->n_expert,
        .n_ff = n_ff,
        .n_rows = n_rows,
        .fmt = k->fmt[2],
        .n_here = i % 3};
    ops_add_x(c, offsetof(ps_moe_down_args, h), n, n_ff, n_ff, k->rows, &rng);
    ops_add_out(c, offsetof(ps_moe_down_args, y), n, n_rows, n_rows, &rng);
    ops_add_routing(c, offsetof(ps_moe_down_args, ids), offsetof(ps_moe_down_args, order),
        offsetof(ps_moe_down_args, starts), k->n_tok, k->k, k->n_expert, &rng);
    ops_add_experts(c, offsetof(ps_moe_down_args, down_ptrs), k->fmt[2], k->n_expert, n_rows, n_ff,
        k->missing, &rng);
    if (k->bias)
        ops_add_gauss(c, offsetof(ps_moe_down_args, bias), (uint64_t)k->n_expert * n_rows, 1, &rng);
    ops_tolerate(c, k->fmt[2]);
    return true;
}

static inline bool ops_combine_at(uint32_t i, ops_call *c)
{
    if (i >= 6) return false;
    const uint32_t n_tok = i % 2 ? 9 : 1, k = i < 3 ? 2 : 8, n_expert = 16, n = i % 3 ? 100 : 257;
    char name[64];
    snprintf(name, sizeof name, "tok %u k %u n %u", n_tok, k, n);
    ops_begin(c, PS_OP_MOE_COMBINE, name);
    uint64_t rng = ops_seed(c->name), rows = (uint64_t)n_tok * k;
    c->args.moe_combine =
        (ps_moe_combine_args){.n_tok = n_tok, .k = k, .n_expert = n_expert, .n = n};
    const uint32_t out = ops_add_out(c, offsetof(ps_moe_combine_args, out), n_tok, n, n, &rng);
    if (i % 3 == 0) ops_add_alias(c, offsetof(ps_moe_combine_args, residual), out, 0);
    if (i % 3 == 1)
        ops_add_gauss(c, offsetof(ps_moe_combine_args, residual), (uint64_t)n_tok * n, 1, &rng);
    ops_add_gauss(c, offsetof(ps_moe_combine_args, y), rows * n, 1, &rng);
    if (i != 4) ops_add_gauss(c, offsetof(ps_moe_combine_args, y_other), rows * n, 1, &rng);
    ops_add_gauss(c, offsetof(ps_moe_combine_args, weights), rows, 1, &rng);
    ops_add_routing(
        c, offsetof(ps_moe_combine_args, ids), OPS_NO_FIELD, 0, n_tok, k, n_expert, &rng);
    ops_add_experts(c, offsetof(ps_moe_combine_args, down_ptrs), PS_FMT_F32, n_expert, 1, 1,
        i != 4 ? 0x5AF0 : 0, &rng);
    return true;
}

/* ---- the small ones ---- */

static inline bool ops_small_at(uint32_t i, ops_call *c)
{
    uint64_t rng = 77 + i;
    if (i < 3) {
        const uint64_t n = i == 0 ? 1 : i == 1 ? 1001 : 4096;
        ops_begin(c, PS_OP_ADD, i == 2 ? "in place" : "apart");
        c->args.add.n = n;
        const uint32_t out = ops_add_out(c, offsetof(ps_add_args, out), 1, n, n, &rng);
        if (i == 2)
            ops_add_alias(c, offsetof(ps_add_args, a), out, 0);
        else
            ops_add_gauss(c, offsetof(ps_add_args, a), n, 1, &rng);
        ops_add_gauss(c, offsetof(ps_add_args, b), n, 1, &rng);
        return true;
    }
    if (i < 5) {
        ops_begin(c, PS_OP_GATHER_ROWS, i == 3 ? "1" : "7");
        const uint32_t n_rows = i == 3 ? 1 : 7, n = i == 3 ? 33 : 640;
        c->args.gather_rows = (ps_gather_rows_args){.n_rows = n_rows, .n = n, .n_x = 12};
        ops_add_gauss(c, offsetof(ps_gather_rows_args, x), 12ull * n, 1, &rng);
        int32_t *rows = ops_add_i32(c, offsetof(ps_gather_rows_args, rows), n_rows);
        for (uint32_t r = 0; r < n_rows; r++)
            rows[r] = r == 0 ? 11 : (int32_t)(ps_rng_next(&rng) % 12);
        ops_add_out(c, offsetof(ps_gather_rows_args, out), n_rows, n, n, &rng);
        return true;
    }
    if (i < 7) {
        const uint64_t n = i == 5 ? 13 : 3000;
        ops_begin(c, PS_OP_SOFTCAP, i == 5 ? "13" : "3000");
        c->args.softcap = (ps_softcap_args){.n = n, .cap = 30};
        const uint32_t x = ops_add_out(c, offsetof(ps_softcap_args, x), 1, n, n, &rng);
        for (uint64_t j = 0; j < n; j++) ((float *)c->buf[x].host)[j] *= j % 3 ? 40.0f : 0.01f;
        return true;
    }
    if (i < 10) {
        const uint64_t n = i == 7 ? 1 : i == 8 ? 4099 : 8192;
        ops_begin(c, PS_OP_MOVE, i == 7 ? "1" : i == 8 ? "4099" : "8192");
        c->args.move.n = n;
        ops_add_gauss(c, offsetof(ps_move_args, x), n, 1, &rng);
        ops_add_out(c, offsetof(ps_move_args, out), 1, n, n, &rng);
        return true;
    }
    return false;
}

/* ---- the table of tables ---- */

typedef bool (*ops_case_fn)(uint32_t i, ops_call *c); /* makes the i-th call; false past the end */

static const struct ops_group {
    const char *name;
    ops_case_fn at;
} ops_groups[] = {{"matmul", ops_matmul_at}, {"embed", ops_embed_at}, {"norm", ops_norm_at},
    {"qkv_prep", ops_prep_at}, {"attn", ops_attn_at}, {"attn_merge", ops_merge_at},
    {"act", ops_act_at}, {"route", ops_route_at}, {"gather_experts", ops_gather_experts_at},
    {"moe_up", ops_moe_up_at}, {"moe_down", ops_moe_down_at}, {"moe_combine", ops_combine_at},
    {"small", ops_small_at}};
enum { OPS_N_GROUPS = sizeof ops_groups / sizeof *ops_groups };

#endif
