/* ps_profile_mem - memory for op calls that are timed, and what is in it: blocks of random weights,
 * activations, routes. See ps_profile_priv.h.
 *
 * Inputs and outputs of a call lie in areas of their own, so that what one call wrote is no other's
 * input and values stay small whatever runs how often. Weights are taken from the next part of
 * their area each time: a pass never finds a layer's weights in a cache either. */
#include <string.h>

#include "engine/ps_profile_priv.h"

enum {
    ALIGN = PS_WEIGHT_ALIGN,
    PATTERN_BYTES = 256 << 10, /* of random content; repeated */
    MAX_FILLERS = 16,          /* threads */
    MANY_BYTES = 64 << 20,     /* which take more than one */
};

/* ---- random content ---- */

/* Where a block keeps its scale and its offset (F16), and values that put weights around 0. */
typedef struct block_desc {
    uint32_t fmt;
    int32_t d_at, m_at; /* -1: none */
    float d, m;
} block_desc;
static const block_desc blocks[] = {
    {PS_FMT_Q4_0, 0, -1, 0.01f, 0},
    {PS_FMT_Q4_1, 0, 2, 0.01f, -0.075f},
    {PS_FMT_Q5_0, 0, -1, 0.005f, 0},
    {PS_FMT_Q5_1, 0, 2, 0.005f, -0.0775f},
    {PS_FMT_Q8_0, 0, -1, 0.0008f, 0},
    {PS_FMT_Q2_K, 80, 82, 0.004f, 0.006f},
    {PS_FMT_Q3_K, 108, -1, 0.002f, 0},
    {PS_FMT_Q4_K, 0, 2, 0.0003f, 0.00225f},
    {PS_FMT_Q5_K, 0, 2, 0.00015f, 0.002325f},
    {PS_FMT_Q6_K, 208, -1, 0.00004f, 0},
    {PS_FMT_IQ4_NL, 0, -1, 0.001f, 0},
    {PS_FMT_IQ4_XS, 0, -1, 0.00003f, 0},
};
enum { MXFP4_SMALL = 120 /* an exponent: 2^-7 */ };

static void put_f16(uint8_t *p, float value)
{
    uint16_t h = ps_f32_to_f16(value);
    memcpy(p, &h, sizeof h);
}

static void random_bits(uint8_t *p, uint64_t n_bytes, uint64_t *rng)
{
    for (uint64_t at = 0; at < n_bytes; at += sizeof(uint64_t)) {
        uint64_t r = ps_rng_next(rng);
        memcpy(p + at, &r, ps_min_u64(sizeof r, n_bytes - at));
    }
}

static void random_floats(uint32_t fmt, uint8_t *p, uint64_t n_bytes, float size, uint64_t *rng)
{
    uint32_t width = ps_fmt_get(fmt)->block_bytes;
    for (uint64_t at = 0; at < n_bytes; at += width) {
        float x = size * (float)(2 * ps_rng_uniform(rng) - 1);
        ps_quant_row((ps_fmt)fmt, &x, p + at, 1);
    }
}

void ps_profile_random_blocks(uint32_t fmt, void *dst, uint64_t n_bytes, uint64_t *rng)
{
    uint32_t step = ps_fmt_get(fmt)->block_bytes;
    const block_desc *desc = NULL;
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        if (blocks[i].fmt == fmt) desc = &blocks[i];
    if (desc == NULL && fmt != PS_FMT_MXFP4) {
        random_floats(fmt, dst, n_bytes, 0.1f, rng);
        return;
    }
    random_bits(dst, n_bytes, rng);
    for (uint8_t *p = dst; p < (uint8_t *)dst + n_bytes; p += step) {
        if (desc == NULL) {
            p[0] = MXFP4_SMALL;
            continue;
        }
        put_f16(p + desc->d_at, desc->d);
        if (desc->m_at >= 0) put_f16(p + desc->m_at, desc->m);
    }
}

/* ---- areas ---- */

/* Where the host writes an area itself; NULL: through staging memory. */
static uint8_t *host_of(const op_memory *m, area a)
{
    if (m->device == NULL) return (uint8_t *)(uintptr_t)m->base[a].a;
    return a == AREA_INTS ? m->host : a == AREA_WEIGHTS ? m->locked_weights : NULL;
}

static ps_status upload(
    op_memory *m, area a, uint64_t at, const void *src, uint64_t n_bytes, ps_err *err)
{
    for (uint64_t done = 0; done < n_bytes;) {
        uint64_t n = ps_min_u64(n_bytes - done, m->staging_bytes);
        memcpy(m->staging, (const uint8_t *)src + done, n);
        PS_TRY(ps_device_copy_in(
            m->device, m->h2d, ps_dptr_add(m->base[a], at + done), m->staging, n, err));
        PS_TRY(ps_device_sync(m->device, m->h2d, err));
        done += n;
    }
    return PS_OK;
}

typedef struct fill_job {
    uint8_t *dst;
    uint64_t n_bytes, pattern_bytes;
    const void *pattern;
} fill_job;

static void fill_member(void *ctx, int i_thread, int n_threads)
{
    const fill_job *j = ctx;
    uint64_t n = ps_div_up_u64(j->n_bytes, j->pattern_bytes), members = (uint64_t)n_threads,
             first = n * (uint64_t)i_thread / members, end = n * ((uint64_t)i_thread + 1) / members;
    for (uint64_t at = first * j->pattern_bytes; first < end; first++, at += j->pattern_bytes)
        memcpy(j->dst + at, j->pattern, ps_min_u64(j->pattern_bytes, j->n_bytes - at));
}

/* Fills [at, at + n_bytes) with `pattern` again and again. */
static ps_status repeat(op_memory *m, area a, uint64_t at, uint64_t n_bytes, const void *pattern,
    uint64_t pattern_bytes, ps_err *err)
{
    uint8_t *host = host_of(m, a);
    if (host != NULL) {
        fill_job job = {host + at, n_bytes, pattern_bytes, pattern};
        if (m->pool != NULL)
            ps_pool_run(m->pool, fill_member, &job);
        else
            fill_member(&job, 0, 1);
        return PS_OK;
    }
    /* Once into the staging memory, as often as it goes in. */
    uint64_t chunk = m->staging_bytes / pattern_bytes * pattern_bytes;
    for (uint64_t i = 0; i < chunk; i += pattern_bytes)
        memcpy((uint8_t *)m->staging + i, pattern, pattern_bytes);
    for (uint64_t done = 0; done < n_bytes; done += chunk)
        PS_TRY(ps_device_copy_in(m->device, m->h2d, ps_dptr_add(m->base[a], at + done), m->staging,
            ps_min_u64(chunk, n_bytes - done), err));
    return ps_device_sync(m->device, m->h2d, err);
}

static uint64_t pattern_bytes(const op_memory *m, uint32_t fmt, uint64_t n_bytes)
{
    uint64_t block = ps_fmt_get(fmt)->block_bytes, most = PATTERN_BYTES;
    most = ps_min_u64(most, n_bytes + block);
    if (m->device != NULL) most = ps_min_u64(most, m->staging_bytes);
    return most / block * block;
}

static ps_status fill_segment(
    op_memory *m, area a, uint32_t fmt, uint64_t at, uint64_t n_bytes, ps_err *err)
{
    uint64_t n = pattern_bytes(m, fmt, n_bytes);
    void *pattern = ps_alloc(n, 1);
    if (pattern == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to make up weights");
    if (a == AREA_WEIGHTS)
        ps_profile_random_blocks(fmt, pattern, n, &m->rng);
    else
        random_floats(fmt, pattern, n, 1.7f, &m->rng);
    ps_status status = repeat(m, a, at, n_bytes, pattern, n, err);
    ps_free(pattern);
    return status;
}

static uint64_t round_down(uint64_t n)
{
    return n / ALIGN * ALIGN;
}

ps_status ps_profile_mem_init(op_memory *m, uint64_t n_bytes, ps_err *err)
{
    m->n_bytes[AREA_INTS] = round_down(n_bytes / 32);
    m->n_bytes[AREA_IN] = round_down(n_bytes / 6);
    m->n_bytes[AREA_OUT] = round_down(n_bytes / 4);
    m->n_bytes[AREA_WEIGHTS] =
        round_down(n_bytes) - m->n_bytes[AREA_INTS] - m->n_bytes[AREA_IN] - m->n_bytes[AREA_OUT];
    m->rng = 1;
    m->host = ps_alloc(m->device != NULL ? m->n_bytes[AREA_INTS] : n_bytes + ALIGN, 1);
    if (m->host == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for %.0f MiB of weights to measure with",
            (double)n_bytes / (1 << 20));
    ps_dptr at = {((uint64_t)(uintptr_t)m->host + ALIGN - 1) / ALIGN * ALIGN};
    int n_threads = ps_cpu_count() < MAX_FILLERS ? ps_cpu_count() : MAX_FILLERS;
    if (m->device == NULL && n_bytes >= MANY_BYTES)
        PS_TRY(ps_pool_create(n_threads, &m->pool, err));
    if (m->device != NULL) {
        PS_TRY(ps_device_alloc(m->device, n_bytes, &m->dev, err));
        at = m->dev;
    }
    for (int a = 0; a < AREA_COUNT; a++) {
        m->base[a] = at;
        at = ps_dptr_add(at, m->n_bytes[a]);
    }
    PS_TRY(fill_segment(m, AREA_IN, PS_FMT_F32, 0, m->n_bytes[AREA_IN], err));
    return fill_segment(m, AREA_OUT, PS_FMT_F32, 0, m->n_bytes[AREA_OUT], err);
}

void ps_profile_mem_fini(op_memory *m)
{
    if (m->device != NULL && !ps_dptr_is_null(m->dev)) ps_device_free(m->device, m->dev);
    ps_pool_destroy(m->pool);
    ps_free(m->host);
    *m = (op_memory){0};
}

ps_status ps_profile_mem_fill(op_memory *m, uint32_t fmts, ps_err *err)
{
    if (fmts == 0 || fmts == m->fmts) return PS_OK;
    uint32_t n = 0;
    while (n < MAX_FMTS && (fmts >> 8 * n & 0xff) != 0) n++;
    uint64_t share = round_down(m->n_bytes[AREA_WEIGHTS] / n);
    m->fmts = 0;
    m->n_seg = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t fmt = (fmts >> 8 * i & 0xff) - 1;
        PS_TRY(fill_segment(m, AREA_WEIGHTS, fmt, i * share, share, err));
        m->seg[m->n_seg++] = (segment){.fmt = fmt, .at = i * share, .n_bytes = share};
    }
    m->fmts = fmts;
    return PS_OK;
}

/* ---- addresses for a call ---- */

typedef enum content { /* of an operand; those not listed below are floats */
    IN_FLOATS,
    WEIGHTS,
    EXPERTS,       /* a table of addresses */
    OTHER_EXPERTS, /* where only whether there is an address counts */
    IMAGES,        /* a table of addresses of whole experts */
    NO_IMAGES,     /* the same, all null */
    TOKENS,
    ROUTES, /* ids; order and starts come with them */
    ORDER,
    STARTS,
    POSITIONS,
    SEQUENCES,
    PAGES,
    ROWS,
    NO_CONTENT, /* workspaces: given last */
} content;

#define PART_W(i)                                                                                  \
    (offsetof(ps_matmul_args, part) + (i) * sizeof(ps_matmul_part) + offsetof(ps_matmul_part, w))
#define AT(type, field) offsetof(ps_##type##_args, field)
static const struct {
    ps_op_kind op;
    content what;
    size_t offset;
} special[] = {
    {PS_OP_EMBED, WEIGHTS, AT(embed, table)},
    {PS_OP_EMBED, TOKENS, AT(embed, ids)},
    {PS_OP_MATMUL, WEIGHTS, PART_W(0)},
    {PS_OP_MATMUL, WEIGHTS, PART_W(1)},
    {PS_OP_MATMUL, WEIGHTS, PART_W(2)},
    {PS_OP_MATMUL, NO_CONTENT, AT(matmul, ws)},
    {PS_OP_QKV_PREP, POSITIONS, AT(qkv_prep, pos)},
    {PS_OP_QKV_PREP, POSITIONS, AT(qkv_prep, rope_pos)},
    {PS_OP_QKV_PREP, SEQUENCES, AT(qkv_prep, seq)},
    {PS_OP_QKV_PREP, PAGES, AT(qkv_prep, kv.table)},
    {PS_OP_ATTN, POSITIONS, AT(attn, pos)},
    {PS_OP_ATTN, SEQUENCES, AT(attn, seq)},
    {PS_OP_ATTN, WEIGHTS, AT(attn, kv.k)},
    {PS_OP_ATTN, WEIGHTS, AT(attn, kv.v)},
    {PS_OP_ATTN, PAGES, AT(attn, kv.table)},
    {PS_OP_ATTN, NO_CONTENT, AT(attn, ws)},
    {PS_OP_GATHER_EXPERTS, ROUTES, AT(gather_experts, ids)},
    {PS_OP_GATHER_EXPERTS, IMAGES, AT(gather_experts, mapped)},
    {PS_OP_GATHER_EXPERTS, NO_IMAGES, AT(gather_experts, resident)},
    {PS_OP_MOE_UP, ROUTES, AT(moe_up, ids)},
    {PS_OP_MOE_UP, ORDER, AT(moe_up, order)},
    {PS_OP_MOE_UP, STARTS, AT(moe_up, starts)},
    {PS_OP_MOE_UP, EXPERTS, AT(moe_up, gate_ptrs)},
    {PS_OP_MOE_UP, EXPERTS, AT(moe_up, up_ptrs)},
    {PS_OP_MOE_UP, NO_CONTENT, AT(moe_up, ws)},
    {PS_OP_MOE_DOWN, ROUTES, AT(moe_down, ids)},
    {PS_OP_MOE_DOWN, ORDER, AT(moe_down, order)},
    {PS_OP_MOE_DOWN, STARTS, AT(moe_down, starts)},
    {PS_OP_MOE_DOWN, EXPERTS, AT(moe_down, down_ptrs)},
    {PS_OP_MOE_DOWN, NO_CONTENT, AT(moe_down, ws)},
    {PS_OP_MOE_COMBINE, OTHER_EXPERTS, AT(moe_combine, down_ptrs)},
    {PS_OP_MOE_COMBINE, ROUTES, AT(moe_combine, ids)},
    {PS_OP_GATHER_ROWS, ROWS, AT(gather_rows, rows)},
};

static content content_of(ps_op_kind op, size_t offset)
{
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        if (special[i].op == op && special[i].offset == offset) return special[i].what;
    return IN_FLOATS;
}

typedef struct binder {
    op_memory *m;
    const op_call *call;
    ps_op_args *args; /* being bound */
    uint64_t turn;    /* calls bound before: each has experts of its own, as layers do */
    uint64_t in_at, out_at;
    ps_dptr order, starts; /* of the routes made last */
} binder;

static bool take(op_memory *m, area a, uint64_t *at, uint64_t n_bytes, ps_dptr *out)
{
    if (n_bytes > m->n_bytes[a] || *at > m->n_bytes[a] - n_bytes) return false;
    *out = ps_dptr_add(m->base[a], *at);
    *at += ps_div_up_u64(n_bytes, ALIGN) * ALIGN;
    return true;
}

static int32_t *take_ints(binder *b, uint64_t n, ps_dptr *out)
{
    uint64_t at = b->m->ints_used;
    if (!take(b->m, AREA_INTS, &b->m->ints_used, n * sizeof(int32_t), out)) return NULL;
    return (int32_t *)(void *)(host_of(b->m, AREA_INTS) + at);
}

static segment *find_segment(op_memory *m, int32_t fmt)
{
    for (uint32_t i = 0; i < m->n_seg; i++)
        if ((int32_t)m->seg[i].fmt == fmt) return &m->seg[i];
    return NULL;
}

/* Weights begin where a block does, and where kernels want them to. */
static uint64_t weight_step(uint32_t fmt)
{
    uint64_t block = ps_fmt_get(fmt)->block_bytes, a = block, b = ALIGN;
    while (b != 0) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return block / a * ALIGN;
}

static bool take_weights(op_memory *m, int32_t fmt, uint64_t n_bytes, ps_dptr *out)
{
    segment *s = find_segment(m, fmt);
    if (s == NULL || n_bytes > s->n_bytes) return false;
    uint64_t step = weight_step(s->fmt), at = ps_div_up_u64(s->next, step) * step;
    if (at > s->n_bytes - n_bytes) at = 0;
    s->next = at + n_bytes;
    *out = ps_dptr_add(m->base[AREA_WEIGHTS], s->at + at);
    return true;
}

static bool bind_table(binder *b, uint64_t n_bytes, ps_dptr *out)
{
    ps_op_args *a = b->args;
    if (b->call->op == PS_OP_EMBED) { /* single rows are read: as many as there is room for */
        segment *s = find_segment(b->m, (int32_t)a->embed.fmt);
        uint64_t row = n_bytes / a->embed.n_vocab;
        if (s == NULL || s->n_bytes < row) return false;
        a->embed.n_vocab = (uint32_t)ps_min_u64(a->embed.n_vocab, s->n_bytes / row);
        n_bytes = a->embed.n_vocab * row;
    }
    return take_weights(b->m, b->call->work.fmt, n_bytes, out);
}

typedef struct expert_shape {
    uint32_t n_expert, n_tok, k, n_rows, n_cols;
} expert_shape;

static expert_shape experts_of(ps_op_kind op, const ps_op_args *a)
{
    if (op == PS_OP_GATHER_EXPERTS)
        return (expert_shape){
            a->gather_experts.n_expert, a->gather_experts.n_tok, a->gather_experts.k, 0, 0};
    if (op == PS_OP_MOE_UP)
        return (expert_shape){
            a->moe_up.n_expert, a->moe_up.n_tok, a->moe_up.k, a->moe_up.n_ff, a->moe_up.n_cols};
    if (op == PS_OP_MOE_DOWN)
        return (expert_shape){a->moe_down.n_expert, a->moe_down.n_tok, a->moe_down.k,
            a->moe_down.n_rows, a->moe_down.n_ff};
    return (expert_shape){a->moe_combine.n_expert, a->moe_combine.n_tok, a->moe_combine.k, 0, 0};
}

/* A layer's experts side by side, behind those of the call before; where there is no room for all,
 * several are the same bytes. (Were they always the same ones, the caches of large servers would
 * hold a layer's.) */
static bool bind_experts(binder *b, size_t offset, ps_dptr *out)
{
    expert_shape e = experts_of(b->call->op, b->args);
    int32_t fmt = ps_profile_weight_fmt(b->call->op, b->args, offset);
    segment *s = find_segment(b->m, fmt);
    uint64_t row = 0, step = 0;
    if (s == NULL || !ps_fmt_row_bytes(s->fmt, e.n_cols, &row)) return false;
    bool is_up = b->call->op == PS_OP_MOE_UP && offset == AT(moe_up, up_ptrs);
    bool halves = b->call->op == PS_OP_MOE_UP && b->m->n_seg == 1;
    step = ps_div_up_u64(e.n_rows * row, weight_step(s->fmt)) * weight_step(s->fmt);
    uint64_t room =
        (halves ? s->n_bytes / 2 : s->n_bytes) / weight_step(s->fmt) * weight_step(s->fmt);
    uint64_t n_slots = room / step, base = s->at + (halves && is_up ? room : 0),
             first = b->m->n_bound * e.n_expert;
    uint64_t *table = (uint64_t *)(void *)take_ints(b, 2ull * e.n_expert, out);
    if (n_slots == 0 || table == NULL) return false;
    for (uint32_t i = 0; i < e.n_expert; i++)
        table[i] = ps_dptr_add(b->m->base[AREA_WEIGHTS], base + (first + i) % n_slots * step).a;
    return true;
}

static bool bind_any_experts(binder *b, ps_dptr *out)
{
    expert_shape e = experts_of(b->call->op, b->args);
    uint64_t *table = (uint64_t *)(void *)take_ints(b, 2ull * e.n_expert, out);
    for (uint32_t i = 0; table != NULL && i < e.n_expert; i++)
        table[i] = b->m->base[AREA_WEIGHTS].a;
    return table != NULL;
}

/* The same with whole images, in the weights' area, whatever it holds. */
static bool bind_images(binder *b, bool given, ps_dptr *out)
{
    const ps_gather_experts_args *a = &b->args->gather_experts;
    uint64_t n_slots = b->m->n_bytes[AREA_WEIGHTS] / a->image_bytes,
             first = b->m->n_bound * a->n_expert;
    uint64_t *table = (uint64_t *)(void *)take_ints(b, 2ull * a->n_expert, out);
    if (n_slots == 0 || table == NULL) return false;
    for (uint32_t i = 0; i < a->n_expert; i++)
        table[i] =
            given ? ps_dptr_add(b->m->base[AREA_WEIGHTS], (first + i) % n_slots * a->image_bytes).a
                  : 0;
    return true;
}

/* k different experts for each token, all equally likely; and the lists by expert. */
static bool bind_routes(binder *b, ps_dptr *out)
{
    expert_shape e = experts_of(b->call->op, b->args);
    uint64_t n = (uint64_t)e.n_tok * e.k;
    int32_t *ids = take_ints(b, n, out), *order = take_ints(b, n, &b->order),
            *starts = take_ints(b, e.n_expert + 1ull, &b->starts);
    if (ids == NULL || order == NULL || starts == NULL) return false;
    memset(starts, 0, (e.n_expert + 1ull) * sizeof *starts);
    for (uint32_t t = 0; t < e.n_tok; t++) {
        int32_t *own = ids + (size_t)t * e.k;
        for (uint32_t r = 0; r < e.k;) {
            uint32_t i = 0;
            own[r] = (int32_t)(ps_rng_next(&b->m->rng) % e.n_expert);
            while (own[i] != own[r]) i++;
            if (i < r) continue; /* has it already */
            starts[own[r++] + 1]++;
        }
    }
    for (uint32_t i = 0; i < e.n_expert; i++) starts[i + 1] += starts[i];
    /* starts[i] serves as the cursor of expert i and ends as the start of i + 1: moved back then.
     */
    for (uint64_t a = 0; a < n; a++) order[starts[ids[a]]++] = (int32_t)a;
    memmove(starts + 1, starts, e.n_expert * sizeof *starts);
    starts[0] = 0;
    return true;
}

/* Tokens at the end of the context; of a part of them, those in the middle, which see as many keys
 * as all do on average. */
static bool bind_positions(binder *b, uint64_t n, ps_dptr *out)
{
    int32_t *pos = take_ints(b, n, out);
    uint32_t n_tok = b->args->qkv_prep.n_tok, first = 0;
    if (b->call->op == PS_OP_ATTN) {
        uint32_t all = b->call->args.attn.n_tok;
        n_tok = b->args->attn.n_tok;
        first = b->args->attn.max_kv - all + (all - n_tok - b->args->attn.n_after);
    }
    for (uint64_t i = 0; pos != NULL && i < n; i++) pos[i] = (int32_t)(first + i % n_tok);
    return pos != NULL;
}

/* n numbers below `most`: in order, or random ones. */
static bool bind_indices(binder *b, uint64_t n, uint32_t most, bool in_order, ps_dptr *out)
{
    int32_t *p = take_ints(b, n, out);
    for (uint64_t i = 0; p != NULL && i < n; i++)
        p[i] = (int32_t)((in_order ? i : ps_rng_next(&b->m->rng)) % most);
    return p != NULL;
}

static bool bind_floats(binder *b, const ps_operand *o, ps_dptr *out)
{
    if ((o->access & PS_WRITE) != 0) return take(b->m, AREA_OUT, &b->out_at, o->n_bytes, out);
    if (take(b->m, AREA_IN, &b->in_at, o->n_bytes, out)) return true;
    b->in_at = 0; /* inputs are only read, so they may be the same bytes */
    return take(b->m, AREA_IN, &b->in_at, o->n_bytes, out);
}

static bool bind_operand(binder *b, const ps_operand *o, ps_dptr *out)
{
    uint64_t n = o->n_bytes / sizeof(int32_t);
    content what = content_of(b->call->op, o->offset);
    switch (what) {
    case IN_FLOATS: return bind_floats(b, o, out);
    case WEIGHTS:
        if (b->call->op == PS_OP_MATMUL)
            return take_weights(
                b->m, ps_profile_weight_fmt(PS_OP_MATMUL, b->args, o->offset), o->n_bytes, out);
        return bind_table(b, o->n_bytes, out);
    case EXPERTS: return bind_experts(b, o->offset, out);
    case OTHER_EXPERTS: return bind_any_experts(b, out);
    case IMAGES:
    case NO_IMAGES: return bind_images(b, what == IMAGES, out);
    case TOKENS: return bind_indices(b, n, b->args->embed.n_vocab, false, out);
    case ROUTES: return bind_routes(b, out);
    case ORDER: *out = b->order; return true;
    case STARTS: *out = b->starts; return true;
    case POSITIONS: return bind_positions(b, n, out);
    case SEQUENCES: return bind_indices(b, n, 1, true, out);
    case PAGES: return bind_indices(b, n, UINT32_MAX, true, out);
    case ROWS: return bind_indices(b, n, b->args->gather_rows.n_x, false, out);
    case NO_CONTENT: break;
    }
    *out = (ps_dptr){0};
    return true;
}

static void set_workspace(ps_op_kind op, ps_op_args *a, ps_dptr ws, uint64_t n_bytes)
{
    switch (op) {
    case PS_OP_MATMUL: a->matmul.ws = ws, a->matmul.ws_bytes = n_bytes; break;
    case PS_OP_ATTN: a->attn.ws = ws, a->attn.ws_bytes = n_bytes; break;
    case PS_OP_MOE_UP: a->moe_up.ws = ws, a->moe_up.ws_bytes = n_bytes; break;
    case PS_OP_MOE_DOWN: a->moe_down.ws = ws, a->moe_down.ws_bytes = n_bytes; break;
    default: break;
    }
}

static bool bind_one(binder *b, int sm)
{
    ps_op_kind op = b->call->op;
    ps_operand operands[PS_MAX_OPERANDS];
    uint32_t n = ps_op_operands(op, b->args, operands);
    for (uint32_t i = 0; i < n; i++) {
        ps_dptr p = {0};
        if (operands[i].n_bytes == 0) continue;
        if (!bind_operand(b, &operands[i], &p)) return false;
        memcpy((char *)b->args + operands[i].offset, &p, sizeof p);
    }
    ps_dptr ws = {0};
    uint64_t ws_bytes = sm > 0 ? ps_op_workspace_bytes(op, b->args, sm) : 0;
    if (ws_bytes > 0 && !take(b->m, AREA_OUT, &b->out_at, ws_bytes, &ws)) return false;
    set_workspace(op, b->args, ws, ws_bytes);
    return true;
}

static bool bind_next(
    op_memory *m, const op_call *call, const ps_op_args *cut, int sm, ps_op_args *out)
{
    *out = *cut;
    binder b = {.m = m, .call = call, .args = out};
    if (!bind_one(&b, sm)) return false;
    m->n_bound++;
    return true;
}

static ps_status upload_ints(op_memory *m, ps_err *err)
{
    if (m->device == NULL || m->ints_used == 0) return PS_OK;
    return upload(m, AREA_INTS, 0, m->host, ps_min_u64(m->ints_used, m->n_bytes[AREA_INTS]), err);
}

ps_status ps_profile_bind(op_memory *m, const op_call *call, const ps_op_args *cut, int sm,
    uint32_t n, ps_op_args *out, uint32_t *n_bound, ps_err *err)
{
    *n_bound = 0;
    m->ints_used = 0;
    PS_TRY(ps_profile_mem_fill(m, call->fmts, err));
    while (*n_bound < n && bind_next(m, call, cut, sm, &out[*n_bound])) ++*n_bound;
    return *n_bound > 0 ? upload_ints(m, err) : PS_OK;
}

ps_status ps_profile_bind_each(op_memory *m, const op_call *calls, uint32_t n, int sm,
    ps_op_args *out, uint32_t *which, uint32_t *n_bound, ps_err *err)
{
    *n_bound = 0;
    m->ints_used = 0;
    PS_TRY(ps_profile_mem_fill(m, ps_profile_formats(calls, n), err));
    for (uint32_t i = 0; i < n; i++) {
        ps_op_args whole;
        ps_profile_cut(&calls[i], 1, &whole);
        if (bind_next(m, &calls[i], &whole, sm, &out[*n_bound])) which[(*n_bound)++] = i;
    }
    return upload_ints(m, err);
}
