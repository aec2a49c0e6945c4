/* cuda_perf - speed of the CUDA op table: single calls of every format, and whole passes of models
 * with their real shapes as one graph, kind by kind beside the floor that memory and arithmetic
 * set. Synthetic weights, every layer its own, so that they come from memory and not from the L2.
 *
 * Not here: a judgement; nothing passes or fails.
 * Threads: the test's thread.
 */
#ifndef CUDA_PERF_H
#define CUDA_PERF_H

#include "ops_fill.h"

/* What one H200 was measured to reach: copies, and 16-bit products in cuBLAS. Floors are given
 * against these. */
#define PERF_BYTES_PER_S 4.3e12
#define PERF_FLOPS       790e12

enum {
    PERF_MAX_OPS = 1024,
    PERF_RUNS = 15,
    PERF_IMAGE_BYTES = 8 << 20,
    PERF_UPLOAD_BYTES = 64 << 20,
    PERF_PAGE_TOK = 64
};

typedef struct perf_op {
    ps_op_kind kind;
    ps_op_args args;
    char tag[24]; /* ops of one kind and tag are timed together */
} perf_op;

typedef struct perf_rig {
    ops_rig rig;
    ps_dptr memory, ws;
    uint64_t used, cap, ws_bytes;
    ps_event *from, *to;
    const ps_fmt_info *image[3]; /* what staging holds behind what uploads use */
    uint32_t n_ops;
    perf_op *op;
    ps_launcher launcher[PS_OP_COUNT];
    ps_err err;
    ps_status status; /* the first failure; everything later does nothing */
} perf_rig;

static inline ps_dptr perf_take(perf_rig *p, uint64_t n_bytes)
{
    const uint64_t at = p->used;
    p->used += (n_bytes + 511) / 256 * 256;
    if (p->used > p->cap && p->status == PS_OK)
        p->status = ps_fail(&p->err, PS_EBUDGET, "the benchmark wants more than %.1f GiB",
            (double)p->cap / (1 << 30));
    return ps_dptr_add(p->memory, p->status == PS_OK ? at : 0);
}

static inline ps_dptr perf_upload(perf_rig *p, const void *host, uint64_t n_bytes)
{
    const ps_dptr d = perf_take(p, n_bytes);
    if (p->status == PS_OK)
        p->status = ops_rig_copy(&p->rig, d, (uint8_t *)host, n_bytes, true, &p->err);
    return d;
}

/* Blocks of `fmt` holding small random weights, the same 8 MiB over and over. Three images stay in
 * staging, of F32, of F16 and of the format in hand: making them takes longer than copying them. */
static inline ps_dptr perf_weights(perf_rig *p, ps_fmt fmt, uint64_t n_weights)
{
    const ps_fmt_info *f = ps_fmt_get(fmt);
    const uint64_t n_bytes = n_weights / f->block_elems * f->block_bytes;
    const uint64_t image = (uint64_t)PERF_IMAGE_BYTES / f->block_bytes * f->block_bytes;
    const uint32_t region = fmt == PS_FMT_F32 ? 0 : fmt == PS_FMT_F16 ? 1 : 2;
    uint8_t *const host = p->rig.staging + PERF_UPLOAD_BYTES + region * PERF_IMAGE_BYTES;
    if (p->image[region] != f) {
        uint64_t rng = 99;
        float x[256];
        for (uint64_t at = 0; at < image; at += f->block_bytes) {
            for (uint32_t i = 0; i < f->block_elems; i++)
                x[i] = (fmt == PS_FMT_F32 ? 1.0f : 0.04f) * (float)(ps_rng_uniform(&rng) * 2 - 1);
            if (!ps_quant_row(fmt, x, host + at, f->block_elems))
                ops_random_block(fmt, host + at, &rng);
        }
        p->image[region] = f;
    }
    const ps_dptr d = perf_take(p, n_bytes);
    for (uint64_t at = 0; at < n_bytes && p->status == PS_OK; at += image)
        p->status = ps_device_copy_in(p->rig.device, p->rig.stream, ps_dptr_add(d, at), host,
            ps_min_u64(image, n_bytes - at), &p->err);
    if (p->status == PS_OK) p->status = ps_device_sync(p->rig.device, p->rig.stream, &p->err);
    return d;
}

static inline ps_dptr perf_floats(perf_rig *p, uint64_t n)
{
    return perf_weights(p, PS_FMT_F32, n);
}

static inline ps_op_args *perf_add(perf_rig *p, ps_op_kind kind, const char *tag)
{
    if (p->n_ops == PERF_MAX_OPS) {
        printf("too many ops in a benchmark\n");
        exit(2);
    }
    perf_op *op = &p->op[p->n_ops++];
    *op = (perf_op){.kind = kind};
    snprintf(op->tag, sizeof op->tag, "%s", tag);
    return &op->args;
}

/* ---- running ---- */

static inline bool perf_chosen(const perf_op *a, const perf_op *only)
{
    return only == NULL || (a->kind == only->kind && strcmp(a->tag, only->tag) == 0);
}

static inline void perf_enqueue(perf_rig *p, const perf_op *only)
{
    for (uint32_t i = 0; i < p->n_ops && p->status == PS_OK; i++) {
        if (!perf_chosen(&p->op[i], only)) continue;
        const ps_cost cost = ps_op_cost(p->op[i].kind, &p->op[i].args);
        p->status = ps_device_run(p->rig.device, p->rig.stream, p->launcher[p->op[i].kind],
            &p->op[i].args, ps_op_args_bytes(p->op[i].kind), &cost, &p->err);
        if (p->status != PS_OK)
            printf("%s %s: %s\n", ps_op_name(p->op[i].kind), p->op[i].tag, p->err.message);
    }
}

/* Workspace for the ops in the list, one for all. */
static inline void perf_finish_list(perf_rig *p)
{
    size_t ws, ws_bytes;
    p->ws_bytes = 0;
    for (uint32_t i = 0; i < p->n_ops; i++)
        p->ws_bytes = ps_max_u64(p->ws_bytes,
            ps_op_workspace_bytes(p->op[i].kind, &p->op[i].args, p->rig.device->info.sm));
    p->ws = perf_take(p, p->ws_bytes + 256);
    for (uint32_t i = 0; i < p->n_ops; i++)
        if (ops_ws_fields(p->op[i].kind, &ws, &ws_bytes)) {
            memcpy((char *)&p->op[i].args + ws, &p->ws, sizeof p->ws);
            memcpy((char *)&p->op[i].args + ws_bytes, &p->ws_bytes, sizeof p->ws_bytes);
        }
}

static inline int perf_compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of the chosen ops, in order, replayed as a graph. */
static inline double perf_time(perf_rig *p, const perf_op *only)
{
    ps_device *d = p->rig.device;
    ps_stream *s = p->rig.stream;
    ps_graph *graph = NULL;
    uint64_t ns[PERF_RUNS] = {0};
    perf_enqueue(p, only); /* once as it is: errors name the op */
    if (p->status == PS_OK) p->status = ps_device_sync(d, s, &p->err);
    if (p->status == PS_OK) p->status = ps_graph_begin(d, s, &p->err);
    if (p->status == PS_OK) {
        perf_enqueue(p, only);
        const ps_status status = ps_graph_end(d, s, &graph, &p->err);
        if (p->status == PS_OK) p->status = status;
    }
    for (int i = -2; i < PERF_RUNS && p->status == PS_OK; i++) {
        p->status = ps_device_record(d, s, p->from, &p->err);
        if (p->status == PS_OK) p->status = ps_graph_launch(d, s, graph, &p->err);
        if (p->status == PS_OK) p->status = ps_device_record(d, s, p->to, &p->err);
        if (p->status == PS_OK) p->status = ps_device_sync(d, s, &p->err);
        if (p->status == PS_OK && i >= 0)
            p->status = ps_device_elapsed(d, p->from, p->to, &ns[i], &p->err);
    }
    if (graph != NULL) ps_graph_destroy(d, graph);
    if (p->status != PS_OK) printf("failed: %s\n", p->err.message);
    qsort(ns, PERF_RUNS, sizeof *ns, perf_compare);
    return (double)ns[PERF_RUNS / 2] * 1e-3;
}

static inline double perf_floor_us(const perf_op *op)
{
    const ps_cost cost = ps_op_cost(op->kind, &op->args);
    return fmax((double)cost.bytes / PERF_BYTES_PER_S, (double)cost.flops / PERF_FLOPS) * 1e6;
}

/* One line for each kind and tag in the list, and the whole. */
static inline void perf_report(perf_rig *p, const char *title, uint32_t n_tok)
{
    if (p->status != PS_OK) return;
    const double whole = perf_time(p, NULL);
    printf("\n%s: %.1f us, %.1f tok/s\n%-14s %-12s %5s %9s %9s %7s %7s\n", title, whole,
        n_tok * 1e6 / whole, "op", "", "calls", "us each", "floor us", "of it", "share");
    double sum = 0, floors = 0;
    for (uint32_t i = 0; i < p->n_ops && p->status == PS_OK; i++) {
        uint32_t n = 0, first = i;
        double floor_us = 0;
        for (uint32_t j = 0; j < p->n_ops; j++) {
            if (!perf_chosen(&p->op[j], &p->op[i])) continue;
            if (j < first) first = j;
            floor_us += perf_floor_us(&p->op[j]);
            n++;
        }
        if (first < i) continue;
        const double us = perf_time(p, &p->op[i]);
        printf("%-14s %-12s %5u %9.2f %9.2f %6.0f%% %6.1f%%\n", ps_op_name(p->op[i].kind),
            p->op[i].tag, n, us / n, floor_us / n, 100 * floor_us / us, 100 * us / whole);
        sum += us, floors += floor_us;
    }
    printf(
        "%-14s %-12s %5s %9.1f %9.1f %6.0f%%\n", "all", "", "", sum, floors, 100 * floors / whole);
}

/* ---- models ---- */

typedef struct perf_model {
    const char *name;
    ps_fmt fmt;
    uint32_t n_layer, hidden, n_head, n_kv_head, head_dim, n_ff, n_expert, k, n_vocab;
    bool head_norms;
} perf_model;

static const perf_model perf_models[] = {
    {"Qwen3-30B-A3B Q4_0", PS_FMT_Q4_0, 48, 2048, 32, 4, 128, 768, 128, 8, 151936, true},
    {"Minitron-8B F16", PS_FMT_F16, 40, 4096, 32, 8, 128, 11520, 0, 0, 131072, false},
};

typedef struct perf_pass { /* buffers of a pass */
    ps_dptr x, y, q, k, v, out, logits, ids, weights, order, starts, up, down, gate;
    ps_dptr ones, freq, pos, seq;
    ps_kv_view kv;
    uint32_t n_tok, max_kv;
} perf_pass;

static inline void perf_norm(
    perf_rig *p, const perf_model *m, const perf_pass *s, ps_dptr x, uint32_t n_tok)
{
    perf_add(p, PS_OP_NORM, "")->norm = (ps_norm_args){.x = x,
        .w = s->ones,
        .out = s->y,
        .n_tok = n_tok,
        .n = m->hidden,
        .ldx = m->hidden,
        .ldo = m->hidden,
        .kind = PS_NORM_RMS,
        .eps = 1e-6f};
}

static inline ps_matmul_part perf_part(
    perf_rig *p, ps_fmt fmt, uint32_t n_rows, uint32_t n_cols, ps_dptr y)
{
    return (ps_matmul_part){.w = perf_weights(p, fmt, (uint64_t)n_rows * n_cols),
        .y = y,
        .fmt = fmt,
        .n_rows = n_rows,
        .ldy = n_rows};
}

static inline ps_matmul_args *perf_matmul(
    perf_rig *p, const char *tag, ps_dptr x, uint32_t n_tok, uint32_t n_cols, bool add)
{
    ps_matmul_args *a = &perf_add(p, PS_OP_MATMUL, tag)->matmul;
    *a = (ps_matmul_args){.x = x, .n_tok = n_tok, .n_cols = n_cols, .ldx = n_cols, .add = add};
    return a;
}

static inline void perf_attention(perf_rig *p, const perf_model *m, const perf_pass *s)
{
    const uint32_t nq = m->n_head * m->head_dim, nk = m->n_kv_head * m->head_dim;
    perf_norm(p, m, s, s->x, s->n_tok);
    ps_matmul_args *a = perf_matmul(p, "qkv", s->y, s->n_tok, m->hidden, false);
    a->n_parts = 3;
    a->part[0] = perf_part(p, m->fmt, nq, m->hidden, s->q);
    a->part[1] = perf_part(p, m->fmt, nk, m->hidden, s->k);
    a->part[2] = perf_part(p, m->fmt, nk, m->hidden, s->v);
    ps_kv_view kv = s->kv; /* every layer its own cache */
    const uint64_t kv_halves = (uint64_t)kv.n_pages * kv.n_kv_head * kv.page_tok * kv.head_dim;
    kv.k = perf_weights(p, PS_FMT_F16, kv_halves);
    kv.v = perf_weights(p, PS_FMT_F16, kv_halves);
    perf_add(p, PS_OP_QKV_PREP, "")->qkv_prep = (ps_qkv_prep_args){.q = s->q,
        .k = s->k,
        .v = s->v,
        .q_norm = m->head_norms ? s->ones : (ps_dptr){0},
        .k_norm = m->head_norms ? s->ones : (ps_dptr){0},
        .freq = s->freq,
        .pos = s->pos,
        .seq = s->seq,
        .kv = kv,
        .n_tok = s->n_tok,
        .n_head = m->n_head,
        .ldq = nq,
        .ldk = nk,
        .ldv = nk,
        .n_rot = m->head_dim,
        .rope = PS_ROPE_NEOX,
        .mag = 1.0f,
        .eps = 1e-6f};
    perf_add(p, PS_OP_ATTN, "")->attn = (ps_attn_args){.q = s->q,
        .out = s->out,
        .pos = s->pos,
        .seq = s->seq,
        .kv = kv,
        .n_tok = s->n_tok,
        .n_head = m->n_head,
        .ldq = nq,
        .ldo = nq,
        .max_kv = s->max_kv,
        .scale = 1.0f / sqrtf((float)m->head_dim)};
    a = perf_matmul(p, "o", s->out, s->n_tok, nq, true);
    a->n_parts = 1;
    a->part[0] = perf_part(p, m->fmt, m->hidden, nq, s->x);
}

static inline ps_dptr perf_experts(
    perf_rig *p, const perf_model *m, uint32_t n_rows, uint32_t n_cols)
{
    const uint64_t n = (uint64_t)n_rows * n_cols;
    const ps_fmt_info *f = ps_fmt_get(m->fmt);
    const ps_dptr w = perf_weights(p, m->fmt, n * m->n_expert);
    ps_dptr *table = ps_alloc(m->n_expert, sizeof *table);
    for (uint32_t e = 0; e < m->n_expert; e++)
        table[e] = ps_dptr_add(w, n / f->block_elems * f->block_bytes * e);
    const ps_dptr d = perf_upload(p, table, m->n_expert * 8ull);
    ps_free(table);
    return d;
}

static inline void perf_experts_layer(perf_rig *p, const perf_model *m, const perf_pass *s)
{
    perf_norm(p, m, s, s->x, s->n_tok);
    ps_matmul_args *a = perf_matmul(p, "router", s->y, s->n_tok, m->hidden, false);
    a->n_parts = 1;
    a->part[0] = perf_part(p, PS_FMT_F32, m->n_expert, m->hidden, s->logits);
    perf_add(p, PS_OP_ROUTE, "")->route = (ps_route_args){.logits = s->logits,
        .ids = s->ids,
        .weights = s->weights,
        .order = s->order,
        .starts = s->starts,
        .n_tok = s->n_tok,
        .n_expert = m->n_expert,
        .k = m->k,
        .renorm = 1};
    const ps_dptr down = perf_experts(p, m, m->hidden, m->n_ff);
    perf_add(p, PS_OP_MOE_UP, "")->moe_up = (ps_moe_up_args){.x = s->y,
        .out = s->up,
        .ids = s->ids,
        .order = s->order,
        .starts = s->starts,
        .gate_ptrs = perf_experts(p, m, m->n_ff, m->hidden),
        .up_ptrs = perf_experts(p, m, m->n_ff, m->hidden),
        .n_tok = s->n_tok,
        .k = m->k,
        .n_expert = m->n_expert,
        .n_cols = m->hidden,
        .n_ff = m->n_ff,
        .ldx = m->hidden,
        .fmt_gate = m->fmt,
        .fmt_up = m->fmt,
        .act = PS_ACT_SILU};
    perf_add(p, PS_OP_MOE_DOWN, "")->moe_down = (ps_moe_down_args){.h = s->up,
        .y = s->down,
        .ids = s->ids,
        .order = s->order,
        .starts = s->starts,
        .down_ptrs = down,
        .n_tok = s->n_tok,
        .k = m->k,
        .n_expert = m->n_expert,
        .n_ff = m->n_ff,
        .n_rows = m->hidden,
        .fmt = m->fmt};
    perf_add(p, PS_OP_MOE_COMBINE, "")->moe_combine = (ps_moe_combine_args){.y = s->down,
        .down_ptrs = down,
        .ids = s->ids,
        .weights = s->weights,
        .residual = s->x,
        .out = s->x,
        .n_tok = s->n_tok,
        .k = m->k,
        .n_expert = m->n_expert,
        .n = m->hidden};
}

static inline void perf_dense_layer(perf_rig *p, const perf_model *m, const perf_pass *s)
{
    perf_norm(p, m, s, s->x, s->n_tok);
    ps_matmul_args *a = perf_matmul(p, "gate+up", s->y, s->n_tok, m->hidden, false);
    a->n_parts = 2;
    a->part[0] = perf_part(p, m->fmt, m->n_ff, m->hidden, s->gate);
    a->part[1] = perf_part(p, m->fmt, m->n_ff, m->hidden, s->up);
    perf_add(p, PS_OP_ACT, "")->act = (ps_act_args){.gate = s->gate,
        .up = s->up,
        .out = s->gate,
        .n_tok = s->n_tok,
        .n = m->n_ff,
        .ldg = m->n_ff,
        .ldu = m->n_ff,
        .ldo = m->n_ff,
        .kind = PS_ACT_SILU};
    a = perf_matmul(p, "down", s->gate, s->n_tok, m->n_ff, true);
    a->n_parts = 1;
    a->part[0] = perf_part(p, m->fmt, m->hidden, m->n_ff, s->x);
}

/* n_tok tokens behind n_past cached ones, of one sequence, or of n_tok sequences where `many`. */
static inline perf_pass perf_buffers(
    perf_rig *p, const perf_model *m, uint32_t n_tok, uint32_t n_past, bool many)
{
    const uint64_t n = n_tok, nk = (uint64_t)m->n_kv_head * m->head_dim,
                   n_assign = n * (m->k > 0 ? m->k : 1);
    perf_pass s = {.n_tok = n_tok, .max_kv = n_past + (many ? 1 : n_tok)};
    s.x = perf_floats(p, n * m->hidden), s.y = perf_floats(p, n * m->hidden);
    s.q = perf_floats(p, n * m->n_head * m->head_dim),
    s.out = perf_floats(p, n * m->n_head * m->head_dim);
    s.k = perf_floats(p, n * nk), s.v = perf_floats(p, n * nk);
    s.logits = perf_floats(p, n * m->n_expert + m->n_vocab);
    s.ids = perf_take(p, n_assign * 4), s.weights = perf_take(p, n_assign * 4),
    s.order = perf_take(p, n_assign * 4);
    s.starts = perf_take(p, (m->n_expert + 1) * 4);
    s.gate = perf_floats(p, n_assign * m->n_ff), s.up = perf_floats(p, n_assign * m->n_ff);
    s.down = perf_floats(p, n_assign * m->hidden);
    s.ones = perf_floats(p, m->hidden);
    const uint32_t n_seq = many ? n_tok : 1, pages = (s.max_kv + PERF_PAGE_TOK - 1) / PERF_PAGE_TOK;
    int32_t *ints = ps_alloc(2 * n + (uint64_t)n_seq * pages, 4);
    float freq[128];
    for (uint32_t i = 0; i < n_tok; i++)
        ints[i] = (int32_t)(n_past + (many ? 0 : i)), ints[n + i] = many ? (int32_t)i : 0;
    for (uint32_t i = 0; i < n_seq * pages; i++) ints[2 * n + i] = (int32_t)i;
    for (uint32_t i = 0; i < m->head_dim / 2; i++)
        freq[i] = (float)pow(1e6, -2.0 * i / m->head_dim);
    s.pos = perf_upload(p, ints, n * 4), s.seq = perf_upload(p, ints + n, n * 4);
    s.kv = (ps_kv_view){.table = perf_upload(p, ints + 2 * n, (uint64_t)n_seq * pages * 4),
        .fmt = PS_FMT_F16,
        .n_kv_head = m->n_kv_head,
        .head_dim = m->head_dim,
        .page_tok = PERF_PAGE_TOK,
        .max_pages = pages,
        .n_pages = n_seq * pages,
        .n_seq = n_seq};
    s.freq = perf_upload(p, freq, m->head_dim / 2 * 4);
    ps_free(ints);
    return s;
}

static inline void perf_run_model(
    perf_rig *p, const perf_model *m, uint32_t n_tok, uint32_t n_past, bool many)
{
    p->used = p->n_ops = 0;
    const perf_pass s = perf_buffers(p, m, n_tok, n_past, many);
    for (uint32_t layer = 0; layer < m->n_layer && p->status == PS_OK; layer++) {
        perf_attention(p, m, &s);
        if (m->n_expert > 0)
            perf_experts_layer(p, m, &s);
        else
            perf_dense_layer(p, m, &s);
    }
    const uint32_t n_last = many ? n_tok : 1; /* logits of one token, or of every sequence */
    perf_norm(p, m, &s, ps_dptr_add(s.x, (uint64_t)(n_tok - n_last) * m->hidden * 4), n_last);
    ps_matmul_args *a = perf_matmul(p, "head", s.y, n_last, m->hidden, false);
    a->n_parts = 1;
    a->part[0] = perf_part(
        p, m->fmt, m->n_vocab, m->hidden, perf_take(p, (uint64_t)n_last * m->n_vocab * 4));
    perf_finish_list(p);
    char title[128];
    snprintf(title, sizeof title, "%s, %u token%s behind %u%s", m->name, n_tok,
        n_tok > 1 ? "s" : "", n_past, many ? ", each of its own sequence" : "");
    perf_report(p, title, n_tok);
}

/* ---- single products, every format ---- */

static ps_status perf_without_lib(const ps_launch *launch, const void *args)
{
    ps_launch own = *launch;
    own.cublas = NULL;
    return ps_cuda_ops()->op[PS_OP_MATMUL](&own, args);
}

/* Microseconds of a product [n_tok x n_cols] by [n_rows x n_cols], over weights of at least 512 MiB
 * in turn. */
static inline double perf_product(
    perf_rig *p, ps_fmt fmt, uint32_t n_tok, uint32_t n_cols, uint32_t n_rows, bool lib)
{
    uint64_t row_bytes = 0;
    ps_fmt_row_bytes(fmt, n_cols, &row_bytes);
    const uint32_t n = (uint32_t)ps_min_u64(32, 1 + (512ull << 20) / (row_bytes * n_rows));
    p->used = p->n_ops = 0;
    const ps_dptr x = perf_floats(p, (uint64_t)n_tok * n_cols),
                  y = perf_take(p, (uint64_t)n_tok * n_rows * 4);
    for (uint32_t i = 0; i < n; i++) {
        ps_matmul_args *a = perf_matmul(p, "", x, n_tok, n_cols, false);
        a->n_parts = 1;
        a->part[0] = perf_part(p, fmt, n_rows, n_cols, y);
    }
    perf_finish_list(p);
    p->launcher[PS_OP_MATMUL] = lib ? ps_cuda_ops()->op[PS_OP_MATMUL] : perf_without_lib;
    const double us = perf_time(p, NULL) / n;
    p->launcher[PS_OP_MATMUL] = ps_cuda_ops()->op[PS_OP_MATMUL];
    return us;
}

static inline void perf_products(perf_rig *p)
{
    static const uint32_t tok[] = {1, 2, 4, 8, 16, 64, 192, 512, 2048};
    const uint32_t n_cols = 4096, n_rows = 8192;
    printf("\n%u x %u weights; up to 8 tokens: GB/s of weights; beyond: TFLOP/s of the own kernel "
           "/ with cuBLAS\n%-8s",
        n_rows, n_cols, "");
    for (size_t t = 0; t < sizeof tok / sizeof *tok; t++)
        printf(tok[t] > 8 ? " %11u" : " %6u", tok[t]);
    printf("\n");
    for (int f = 0; f < OPS_N_FORMATS && p->status == PS_OK; f++) {
        uint64_t row_bytes = 0;
        ps_fmt_row_bytes(ops_formats[f], n_cols, &row_bytes);
        printf("%-8s", ps_fmt_get(ops_formats[f])->name);
        for (size_t t = 0; t < sizeof tok / sizeof *tok; t++) {
            const double us = perf_product(p, ops_formats[f], tok[t], n_cols, n_rows, true);
            const double tflops = 2e-6 * tok[t] * n_cols * n_rows / us;
            if (tok[t] <= 8)
                printf(" %6.0f", (double)(row_bytes * n_rows) * 1e-3 / us);
            else
                printf(" %5.0f/%-5.0f",
                    2e-6 * tok[t] * n_cols * n_rows /
                        perf_product(p, ops_formats[f], tok[t], n_cols, n_rows, false),
                    tflops);
        }
        printf("\n");
    }
}

/* ---- routed experts of Qwen3-30B-A3B, Q4_0, from host memory: eight layers' worth ---- */

enum {
    PERF_EXPERTS = 64,
    PERF_ROUTED = 8,
    PERF_MATRIX_BYTES = 768 * 2048 / 32 * 18,
    PERF_EXPERT_BYTES = 3 * PERF_MATRIX_BYTES,
    PERF_SMALL_BYTES = 8 << 10,
    PERF_SMALL_COPIES = 16,
};

/* Addresses of `skip` bytes into the images in staging; only of the first `n` of each eight. */
static inline ps_dptr perf_image_table(perf_rig *p, uint32_t n, uint64_t skip)
{
    ps_dptr table[PERF_EXPERTS] = {{0}}, images = {0};
    if (p->status == PS_OK)
        p->status = ps_device_locked_dptr(p->rig.device, p->rig.staging, &images, &p->err);
    for (uint32_t e = 0; e < PERF_EXPERTS; e++)
        if (e % PERF_ROUTED < n)
            table[e] = ps_dptr_add(images, (uint64_t)e * PERF_EXPERT_BYTES + skip);
    return perf_upload(p, table, sizeof table);
}

/* Microseconds that a small copy to the host takes while the ops in the list run. */
static inline double perf_small_copy(perf_rig *p)
{
    ps_device *d = p->rig.device;
    uint64_t ns = 0;
    uint8_t *to = p->rig.staging + (uint64_t)PERF_EXPERTS * PERF_EXPERT_BYTES;
    perf_enqueue(p, NULL);
    if (p->status == PS_OK) p->status = ps_device_record(d, p->rig.out, p->from, &p->err);
    for (int i = 0; i < PERF_SMALL_COPIES && p->status == PS_OK; i++)
        p->status = ps_device_copy_out(d, p->rig.out, to, p->memory, PERF_SMALL_BYTES, &p->err);
    if (p->status == PS_OK) p->status = ps_device_record(d, p->rig.out, p->to, &p->err);
    if (p->status == PS_OK) p->status = ps_device_sync(d, p->rig.out, &p->err);
    if (p->status == PS_OK) p->status = ps_device_sync(d, p->rig.stream, &p->err);
    if (p->status == PS_OK) p->status = ps_device_elapsed(d, p->from, p->to, &ns, &p->err);
    return (double)ns * 1e-3 / PERF_SMALL_COPIES;
}

static inline void perf_report_bus(perf_rig *p, const char *what, uint32_t n, uint64_t n_bytes)
{
    const double us = perf_time(p, NULL) / PERF_ROUTED, copy_us = perf_small_copy(p);
    if (p->status == PS_OK)
        printf("%-24s %u of %u: %7.1f us, %5.1f GB/s; a small copy to the host meanwhile: %.1f "
               "us\n",
            what, n, PERF_ROUTED, us, (double)n_bytes * 1e-3 / us, copy_us);
}

static inline void perf_gathers(perf_rig *p)
{
    static const uint32_t n_mapped[] = {1, 2, 4, 8};
    int32_t ids[PERF_EXPERTS];
    for (int32_t i = 0; i < PERF_EXPERTS; i++) ids[i] = i;
    memset(p->rig.staging, 0, (uint64_t)PERF_EXPERTS * PERF_EXPERT_BYTES + PERF_SMALL_BYTES);
    memset(p->image, 0, sizeof p->image); /* staging holds none of them any more */
    printf("\nrouted experts of %.2f MB, %u a token, from host memory\n", PERF_EXPERT_BYTES * 1e-6,
        PERF_ROUTED);
    for (size_t i = 0; i < sizeof n_mapped / sizeof *n_mapped; i++) {
        p->used = p->n_ops = 0;
        const ps_dptr d_ids = perf_upload(p, ids, sizeof ids);
        ps_gather_experts_args a = {.mapped = perf_image_table(p, n_mapped[i], 0),
            .resident = perf_image_table(p, 0, 0),
            .slots = perf_take(p, (uint64_t)PERF_ROUTED * PERF_EXPERT_BYTES),
            .gate_ptrs = perf_take(p, PERF_EXPERTS * 8),
            .up_ptrs = perf_take(p, PERF_EXPERTS * 8),
            .down_ptrs = perf_take(p, PERF_EXPERTS * 8),
            .image_bytes = PERF_EXPERT_BYTES,
            .up_at = PERF_MATRIX_BYTES,
            .down_at = 2 * PERF_MATRIX_BYTES,
            .n_tok = 1,
            .k = PERF_ROUTED,
            .n_expert = PERF_EXPERTS};
        for (uint32_t t = 0; t < PERF_EXPERTS; t += PERF_ROUTED) {
            a.ids = ps_dptr_add(d_ids, t * 4);
            perf_add(p, PS_OP_GATHER_EXPERTS, "")->gather_experts = a;
        }
        perf_report_bus(p, "gathered", n_mapped[i], (uint64_t)n_mapped[i] * PERF_EXPERT_BYTES);
    }
    p->used = p->n_ops = 0;
    const ps_dptr d_ids = perf_upload(p, ids, sizeof ids);
    ps_moe_up_args up = {.x = perf_take(p, 2048 * 4),
        .out = perf_take(p, PERF_ROUTED * 768 * 4),
        .order = perf_take(p, PERF_ROUTED * 4),
        .starts = perf_take(p, (PERF_EXPERTS + 1) * 4),
        .gate_ptrs = perf_image_table(p, PERF_ROUTED, 0),
        .up_ptrs = perf_image_table(p, PERF_ROUTED, PERF_MATRIX_BYTES),
        .n_tok = 1,
        .k = PERF_ROUTED,
        .n_expert = PERF_EXPERTS,
        .n_cols = 2048,
        .n_ff = 768,
        .ldx = 2048,
        .fmt_gate = PS_FMT_Q4_0,
        .fmt_up = PS_FMT_Q4_0,
        .act = PS_ACT_SILU};
    for (uint32_t t = 0; t < PERF_EXPERTS; t += PERF_ROUTED) {
        up.ids = ps_dptr_add(d_ids, t * 4);
        perf_add(p, PS_OP_MOE_UP, "")->moe_up = up;
    }
    perf_report_bus(
        p, "read by moe_up itself", PERF_ROUTED, 2ull * PERF_ROUTED * PERF_MATRIX_BYTES);
}

/* words: parts of "products", "decode", "prefill", "long", "batch", "gather"; none: all that takes
 * a minute. */
static inline int perf_main(int n_words, char **words)
{
    static const struct {
        const char *name;
        uint32_t model, n_tok, n_past;
        bool many;
    } passes[] = {{"decode", 0, 1, 1024, false}, {"prefill", 0, 1024, 0, false},
        {"decode", 1, 1, 1024, false}, {"prefill", 1, 1024, 0, false}, {"batch", 0, 64, 512, true},
        {"batch", 0, 16, 512, true}, {"long", 0, 1, 16384, false}, {"long", 0, 2048, 14336, false},
        {"long", 1, 2048, 14336, false}};
    perf_rig p = {.cap = 40ull << 30};
    p.status = ops_rig_open(&p.rig, "cuda", NULL, 1, &p.err);
    if (p.status == PS_OK) p.status = ps_device_alloc(p.rig.device, p.cap, &p.memory, &p.err);
    if (p.status == PS_OK) p.status = ps_event_create(p.rig.device, &p.from, &p.err);
    if (p.status == PS_OK) p.status = ps_event_create(p.rig.device, &p.to, &p.err);
    p.op = ps_alloc(PERF_MAX_OPS, sizeof *p.op);
    memcpy(p.launcher, p.rig.table->op, sizeof p.launcher);
    if (p.status == PS_OK)
        printf("%s, sm_%d, %d SMs; floors: %.2f TB/s, %.0f TFLOP/s\n", p.rig.device->info.name,
            p.rig.device->info.sm, p.rig.device->info.n_sm, PERF_BYTES_PER_S * 1e-12,
            PERF_FLOPS * 1e-12);
    bool products = n_words == 0, gathers = n_words == 0;
    for (int w = 0; w < n_words; w++) {
        products |= strstr("products", words[w]) != NULL;
        gathers |= strstr("gather", words[w]) != NULL;
    }
    for (size_t i = 0; i < sizeof passes / sizeof *passes && p.status == PS_OK; i++) {
        bool wanted = n_words == 0;
        for (int w = 0; w < n_words; w++) wanted |= strstr(passes[i].name, words[w]) != NULL;
        if (wanted)
            perf_run_model(&p, &perf_models[passes[i].model], passes[i].n_tok, passes[i].n_past,
                passes[i].many);
    }
    if (products && p.status == PS_OK) perf_products(&p);
    if (gathers && p.status == PS_OK) perf_gathers(&p);
    if (p.status != PS_OK) printf("stopped: %s\n", p.err.message);
    ps_free(p.op);
    if (p.rig.device != NULL) {
        ps_event_destroy(p.rig.device, p.from);
        ps_event_destroy(p.rig.device, p.to);
        ps_device_free(p.rig.device, p.memory);
    }
    ops_rig_close(&p.rig);
    return p.status != PS_OK;
}

#endif
