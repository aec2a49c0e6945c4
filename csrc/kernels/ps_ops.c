/* ps_ops - what is known about an op without running it: its name, the size of its arguments, the
 * memory it touches, what it costs, and whether its arguments make sense.
 *
 * Not here: any kernel; workspace sizes (ps_ops_workspace.c).
 * Threads: pure functions.
 */
#include "kernels/ps_ops.h"

#include <math.h>

typedef struct op_desc {
    const char *name;
    uint32_t args_bytes;
} op_desc;

static const op_desc op_descs[PS_OP_COUNT] = {
    [PS_OP_EMBED] = {"embed", sizeof(ps_embed_args)},
    [PS_OP_NORM] = {"norm", sizeof(ps_norm_args)},
    [PS_OP_MATMUL] = {"matmul", sizeof(ps_matmul_args)},
    [PS_OP_QKV_PREP] = {"qkv_prep", sizeof(ps_qkv_prep_args)},
    [PS_OP_ATTN] = {"attn", sizeof(ps_attn_args)},
    [PS_OP_ATTN_MERGE] = {"attn_merge", sizeof(ps_attn_merge_args)},
    [PS_OP_ACT] = {"act", sizeof(ps_act_args)},
    [PS_OP_ROUTE] = {"route", sizeof(ps_route_args)},
    [PS_OP_GATHER_EXPERTS] = {"gather_experts", sizeof(ps_gather_experts_args)},
    [PS_OP_MOE_UP] = {"moe_up", sizeof(ps_moe_up_args)},
    [PS_OP_MOE_DOWN] = {"moe_down", sizeof(ps_moe_down_args)},
    [PS_OP_MOE_COMBINE] = {"moe_combine", sizeof(ps_moe_combine_args)},
    [PS_OP_ADD] = {"add", sizeof(ps_add_args)},
    [PS_OP_GATHER_ROWS] = {"gather_rows", sizeof(ps_gather_rows_args)},
    [PS_OP_SOFTCAP] = {"softcap", sizeof(ps_softcap_args)},
    [PS_OP_MOVE] = {"move", sizeof(ps_move_args)},
};

const char *ps_op_name(ps_op_kind kind)
{
    return (uint32_t)kind < PS_OP_COUNT ? op_descs[kind].name : "unknown";
}

uint32_t ps_op_args_bytes(ps_op_kind kind)
{
    return (uint32_t)kind < PS_OP_COUNT ? op_descs[kind].args_bytes : 0;
}

/* ---- operands ---- */

typedef struct operand_list {
    ps_operand *out;
    const char *args;
    uint32_t n;
} operand_list;

static void put(operand_list *l, const ps_dptr *field, ps_access access, uint64_t n_bytes)
{
    l->out[l->n++] = (ps_operand){.offset = (uint16_t)((const char *)field - l->args),
        .access = (uint16_t)access,
        .n_bytes = ps_dptr_is_null(*field) ? 0 : n_bytes};
}

/* Sizes here cannot overflow: every factor is at most 32 bits wide, ps_op_check has bounded the
 * products. */
static uint64_t span(uint64_t n_rows, uint64_t ld, uint64_t n) /* bytes of a strided float matrix */
{
    return n_rows == 0 ? 0 : ((n_rows - 1) * ld + n) * 4;
}

static uint64_t fmt_row_bytes(uint32_t fmt, uint64_t n)
{
    uint64_t n_bytes = 0;
    return ps_fmt_row_bytes(fmt, n, &n_bytes) ? n_bytes : 0;
}

static uint64_t kv_bytes(const ps_kv_view *kv)
{
    uint64_t n_rows = (uint64_t)kv->n_pages * kv->n_kv_head * kv->page_tok;
    return n_rows * fmt_row_bytes(kv->fmt, kv->head_dim);
}

static void put_kv(operand_list *l, const ps_kv_view *kv, ps_access access, uint64_t table_bytes)
{
    put(l, &kv->k, access, kv_bytes(kv));
    put(l, &kv->v, access, kv_bytes(kv));
    put(l, &kv->table, PS_READ, table_bytes);
}

static void operands_matmul(operand_list *l, const ps_matmul_args *a)
{
    put(l, &a->x, PS_READ, span(a->n_tok, a->ldx, a->n_cols));
    put(l, &a->ws, PS_WRITE, a->ws_bytes); /* read only after it wrote it */
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const ps_matmul_part *p = &a->part[i];
        put(l, &p->w, PS_READ, p->n_rows * fmt_row_bytes(p->fmt, a->n_cols));
        put(l, &p->y, a->add ? PS_READ_WRITE : PS_WRITE, span(a->n_tok, p->ldy, p->n_rows));
        put(l, &p->bias, PS_READ, (uint64_t)p->n_rows * 4);
    }
}

static void operands_qkv_prep(operand_list *l, const ps_qkv_prep_args *a)
{
    const uint64_t tok4 = (uint64_t)a->n_tok * 4;
    const uint64_t d = a->kv.head_dim, n_kv = a->kv.n_kv_head * d;
    put(l, &a->q, PS_READ_WRITE, span(a->n_tok, a->ldq, a->n_head * d));
    put(l, &a->k, PS_READ_WRITE, span(a->n_tok, a->ldk, n_kv));
    put(l, &a->v, PS_READ, span(a->n_tok, a->ldv, n_kv));
    put(l, &a->q_norm, PS_READ, d * 4);
    put(l, &a->k_norm, PS_READ, d * 4);
    put(l, &a->freq, PS_READ, (uint64_t)(a->n_rot / 2) * 4);
    put(l, &a->pos, PS_READ, tok4);
    put(l, &a->rope_pos, PS_READ, 4 * tok4);
    put(l, &a->seq, PS_READ, tok4);
    put_kv(l, &a->kv, PS_READ_WRITE, (uint64_t)a->kv.n_seq * a->kv.max_pages * 4);
}

static void operands_attn(operand_list *l, const ps_attn_args *a)
{
    const uint64_t tok4 = (uint64_t)a->n_tok * 4, n = (uint64_t)a->n_head * a->kv.head_dim;
    put(l, &a->q, PS_READ, span(a->n_tok, a->ldq, n));
    put(l, &a->out, PS_WRITE, span(a->n_tok, a->ldo, n));
    put(l, &a->ml, PS_WRITE, tok4 * a->n_head * 2);
    put(l, &a->sinks, PS_READ, (uint64_t)a->n_head * 4);
    put(l, &a->pos, PS_READ, tok4);
    put(l, &a->seq, PS_READ, tok4);
    put(l, &a->ws, PS_WRITE, a->ws_bytes); /* read only after it wrote it */
    put_kv(l, &a->kv, PS_READ, (uint64_t)a->kv.n_seq * a->kv.max_pages * 4);
}

static void operands_moe_up(operand_list *l, const ps_moe_up_args *a)
{
    const uint64_t n_assign4 = (uint64_t)a->n_tok * a->k * 4,
                   bias = (uint64_t)a->n_expert * a->n_ff * 4;
    put(l, &a->x, PS_READ, span(a->n_tok, a->ldx, a->n_cols));
    put(l, &a->out, PS_WRITE, n_assign4 * a->n_ff);
    put(l, &a->ids, PS_READ, n_assign4);
    put(l, &a->order, PS_READ, n_assign4);
    put(l, &a->starts, PS_READ, ((uint64_t)a->n_expert + 1) * 4);
    put(l, &a->gate_ptrs, PS_READ, (uint64_t)a->n_expert * sizeof(ps_dptr));
    put(l, &a->up_ptrs, PS_READ, (uint64_t)a->n_expert * sizeof(ps_dptr));
    put(l, &a->gate_bias, PS_READ, bias);
    put(l, &a->up_bias, PS_READ, bias);
    put(l, &a->ws, PS_WRITE, a->ws_bytes); /* read only after it wrote it */
}

static void operands_moe_down(operand_list *l, const ps_moe_down_args *a)
{
    const uint64_t n_assign4 = (uint64_t)a->n_tok * a->k * 4;
    put(l, &a->h, PS_READ, n_assign4 * a->n_ff);
    put(l, &a->y, PS_WRITE, n_assign4 * a->n_rows);
    put(l, &a->ids, PS_READ, n_assign4);
    put(l, &a->order, PS_READ, n_assign4);
    put(l, &a->starts, PS_READ, ((uint64_t)a->n_expert + 1) * 4);
    put(l, &a->down_ptrs, PS_READ, (uint64_t)a->n_expert * sizeof(ps_dptr));
    put(l, &a->bias, PS_READ, (uint64_t)a->n_expert * a->n_rows * 4);
    put(l, &a->ws, PS_WRITE, a->ws_bytes); /* read only after it wrote it */
}

static void operands_moe_combine(operand_list *l, const ps_moe_combine_args *a)
{
    const uint64_t n_assign4 = (uint64_t)a->n_tok * a->k * 4, row4 = (uint64_t)a->n_tok * a->n * 4;
    put(l, &a->y, PS_READ, n_assign4 * a->n);
    put(l, &a->y_other, PS_READ, n_assign4 * a->n);
    put(l, &a->down_ptrs, PS_READ, (uint64_t)a->n_expert * sizeof(ps_dptr));
    put(l, &a->ids, PS_READ, n_assign4);
    put(l, &a->weights, PS_READ, n_assign4);
    put(l, &a->residual, PS_READ, row4);
    put(l, &a->out, PS_WRITE, row4);
}

static void operands_route(operand_list *l, const ps_route_args *a)
{
    const uint64_t n_assign4 = (uint64_t)a->n_tok * a->k * 4;
    put(l, &a->logits, PS_READ, (uint64_t)a->n_tok * a->n_expert * 4);
    put(l, &a->ids, PS_WRITE, n_assign4);
    put(l, &a->weights, PS_WRITE, n_assign4);
    put(l, &a->order, PS_WRITE, n_assign4);
    put(l, &a->starts, PS_WRITE, ((uint64_t)a->n_expert + 1) * 4);
}

static void operands_gather_experts(operand_list *l, const ps_gather_experts_args *a)
{
    const uint64_t n_assign = (uint64_t)a->n_tok * a->k, table = a->n_expert * sizeof(ps_dptr);
    put(l, &a->ids, PS_READ, n_assign * 4);
    put(l, &a->mapped, PS_READ, table);
    put(l, &a->resident, PS_READ, table);
    put(l, &a->shared, PS_READ, table);
    put(l, &a->slots, PS_WRITE, n_assign * a->image_bytes);
    put(l, &a->gate_ptrs, PS_WRITE, table);
    put(l, &a->up_ptrs, PS_WRITE, table);
    put(l, &a->down_ptrs, PS_WRITE, table);
}

static void operands_small(operand_list *l, ps_op_kind kind, const ps_op_args *u)
{
    switch (kind) {
    case PS_OP_EMBED: {
        const ps_embed_args *a = &u->embed;
        put(l, &a->table, PS_READ, a->n_vocab * fmt_row_bytes(a->fmt, a->n_cols));
        put(l, &a->ids, PS_READ, (uint64_t)a->n_tok * 4);
        put(l, &a->out, PS_WRITE, (uint64_t)a->n_tok * a->n_cols * 4);
        break;
    }
    case PS_OP_NORM: {
        const ps_norm_args *a = &u->norm;
        put(l, &a->x, PS_READ, span(a->n_tok, a->ldx, a->n));
        put(l, &a->w, PS_READ, (uint64_t)a->n * 4);
        put(l, &a->b, PS_READ, (uint64_t)a->n * 4);
        put(l, &a->residual, PS_READ, span(a->n_tok, a->ldo, a->n));
        put(l, &a->out, PS_WRITE, span(a->n_tok, a->ldo, a->n));
        break;
    }
    case PS_OP_ATTN_MERGE: {
        const ps_attn_merge_args *a = &u->attn_merge;
        const uint64_t heads = (uint64_t)a->n_tok * a->n_head, n = heads * a->head_dim * 4;
        put(l, &a->a, PS_READ, n);
        put(l, &a->b, PS_READ, n);
        put(l, &a->out, PS_WRITE, n);
        put(l, &a->ml_a, PS_READ, heads * 8);
        put(l, &a->ml_b, PS_READ, heads * 8);
        break;
    }
    case PS_OP_ACT: {
        const ps_act_args *a = &u->act;
        put(l, &a->gate, PS_READ, span(a->n_tok, a->ldg, a->n));
        put(l, &a->up, PS_READ, span(a->n_tok, a->ldu, a->n));
        put(l, &a->out, PS_WRITE, span(a->n_tok, a->ldo, a->n));
        break;
    }
    case PS_OP_ADD:
        put(l, &u->add.a, PS_READ, u->add.n * 4);
        put(l, &u->add.b, PS_READ, u->add.n * 4);
        put(l, &u->add.out, PS_WRITE, u->add.n * 4);
        break;
    case PS_OP_GATHER_ROWS: {
        const ps_gather_rows_args *a = &u->gather_rows;
        put(l, &a->x, PS_READ, (uint64_t)a->n_x * a->n * 4);
        put(l, &a->rows, PS_READ, (uint64_t)a->n_rows * 4);
        put(l, &a->out, PS_WRITE, (uint64_t)a->n_rows * a->n * 4);
        break;
    }
    case PS_OP_SOFTCAP: put(l, &u->softcap.x, PS_READ_WRITE, u->softcap.n * 4); break;
    case PS_OP_MOVE:
        put(l, &u->move.x, PS_READ, u->move.n * 4);
        put(l, &u->move.out, PS_WRITE, u->move.n * 4);
        break;
    default: break;
    }
}

uint32_t ps_op_operands(ps_op_kind kind, const void *args, ps_operand out[PS_MAX_OPERANDS])
{
    operand_list l = {.out = out, .args = args};
    const ps_op_args *u = args;
    switch (kind) {
    case PS_OP_MATMUL: operands_matmul(&l, &u->matmul); break;
    case PS_OP_QKV_PREP: operands_qkv_prep(&l, &u->qkv_prep); break;
    case PS_OP_ATTN: operands_attn(&l, &u->attn); break;
    case PS_OP_ROUTE: operands_route(&l, &u->route); break;
    case PS_OP_GATHER_EXPERTS: operands_gather_experts(&l, &u->gather_experts); break;
    case PS_OP_MOE_UP: operands_moe_up(&l, &u->moe_up); break;
    case PS_OP_MOE_DOWN: operands_moe_down(&l, &u->moe_down); break;
    case PS_OP_MOE_COMBINE: operands_moe_combine(&l, &u->moe_combine); break;
    default: operands_small(&l, kind, u); break;
    }
    return l.n;
}

/* ---- cost ---- */

double ps_experts_touched(uint32_t n_expert, uint32_t k, uint32_t n_tok)
{
    if (n_expert == 0) return 0;
    const double miss = 1.0 - (double)k / n_expert;
    return n_expert * (1.0 - pow(miss > 0 ? miss : 0, n_tok));
}

static ps_cost cost_moe(uint32_t n_expert, uint32_t k, uint32_t n_tok, uint64_t expert_bytes,
    uint64_t weights, uint64_t activations)
{
    const double touched = ps_experts_touched(n_expert, k, n_tok);
    return (ps_cost){.flops = 2ull * n_tok * k * weights,
        .bytes =
            (uint64_t)(touched * (double)expert_bytes) + (uint64_t)n_tok * k * activations * 4};
}

/* Keys that the tokens of one run, the last at position end - 1, look at in all. */
static uint64_t attn_pairs(uint64_t n_tok, uint64_t end, uint64_t window)
{
    if (end < n_tok) return n_tok * (n_tok + 1) / 2; /* shapes that no run has */
    if (window == 0 || window > end) window = end;
    /* Those before the window is full see every key up to their own. */
    const uint64_t first = end - n_tok, growing = first < window ? window - first : 0,
                   n = ps_min_u64(n_tok, growing);
    return n * first + n * (n + 1) / 2 + (n_tok - n) * window;
}

static ps_cost cost_attn(const ps_attn_args *a)
{
    /* Positions are device data, so this is what the shape allows. No more tokens than sequences:
     * each may be another sequence's newest. Else they are a run of one sequence, share its keys,
     * and none sees a key behind itself. */
    const uint64_t max_kv = a->max_kv, n_tok = a->n_tok;
    const uint64_t len = a->window > 0 ? ps_min_u64(a->window, max_kv) : max_kv;
    const bool apart = n_tok <= a->kv.n_seq;
    const uint64_t end = max_kv > a->n_after ? max_kv - a->n_after : max_kv;
    const uint64_t pairs = apart ? n_tok * len : attn_pairs(n_tok, end, a->window);
    const uint64_t span = a->window > 0 ? ps_min_u64(end, len + n_tok - 1) : end;
    const uint64_t read = apart ? n_tok * len : span;
    const uint64_t row = 2ull * a->kv.n_kv_head * fmt_row_bytes(a->kv.fmt, a->kv.head_dim);
    const uint64_t n = (uint64_t)a->n_head * a->kv.head_dim;
    return (ps_cost){.flops = 4 * pairs * n, .bytes = read * row + 8 * n_tok * n};
}

/* n outputs, `words` floats moved for each. */
static ps_cost cost_elem(uint64_t n, uint64_t words, uint64_t flops)
{
    return (ps_cost){.flops = n * flops, .bytes = n * words * 4};
}

static ps_cost cost_matmul(const ps_matmul_args *a)
{
    ps_cost c = {.bytes = 4ull * a->n_tok * a->n_cols};
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const uint64_t n_rows = a->part[i].n_rows;
        c.flops += 2 * a->n_tok * n_rows * a->n_cols;
        c.bytes += n_rows * fmt_row_bytes(a->part[i].fmt, a->n_cols) +
                   4 * n_rows * a->n_tok * (a->add ? 2u : 1u);
    }
    return c;
}

static ps_cost cost_qkv_prep(const ps_qkv_prep_args *a)
{
    const uint64_t d = a->kv.head_dim, n_q = (uint64_t)a->n_tok * a->n_head * d;
    const uint64_t n_kv = (uint64_t)a->n_tok * a->kv.n_kv_head;
    return (ps_cost){.flops = 8 * (n_q + n_kv * d),
        .bytes = 8 * (n_q + n_kv * d) + 4 * n_kv * d + 2 * n_kv * fmt_row_bytes(a->kv.fmt, d)};
}

/* As if every expert were mapped: how many are, the tables know. What it writes is not counted:
 * VRAM takes it at many times the rate at which the bus brings it. Without slots, its tables. */
static ps_cost cost_gather_experts(const ps_gather_experts_args *a)
{
    if (ps_dptr_is_null(a->slots)) return (ps_cost){.bytes = 6ull * a->n_expert * sizeof(ps_dptr)};
    const double touched = ps_experts_touched(a->n_expert, a->k, a->n_tok);
    const uint64_t n_bytes = (uint64_t)(touched * (double)a->image_bytes);
    return (ps_cost){.bytes = n_bytes, .bus_bytes = n_bytes};
}

static ps_cost cost_of(ps_op_kind kind, const ps_op_args *u)
{
    switch (kind) {
    case PS_OP_EMBED: {
        const ps_embed_args *a = &u->embed;
        const uint64_t n = (uint64_t)a->n_tok * a->n_cols;
        return (ps_cost){.flops = n, .bytes = a->n_tok * fmt_row_bytes(a->fmt, a->n_cols) + n * 4};
    }
    case PS_OP_MATMUL: return cost_matmul(&u->matmul);
    case PS_OP_QKV_PREP: return cost_qkv_prep(&u->qkv_prep);
    case PS_OP_ATTN: return cost_attn(&u->attn);
    case PS_OP_GATHER_EXPERTS: return cost_gather_experts(&u->gather_experts);
    case PS_OP_MOE_UP: {
        const ps_moe_up_args *a = &u->moe_up;
        return cost_moe(a->n_expert, a->k, a->n_tok,
            a->n_ff * (fmt_row_bytes(a->fmt_gate, a->n_cols) + fmt_row_bytes(a->fmt_up, a->n_cols)),
            2ull * a->n_ff * a->n_cols, (uint64_t)a->n_cols + a->n_ff);
    }
    case PS_OP_MOE_DOWN: {
        const ps_moe_down_args *a = &u->moe_down;
        return cost_moe(a->n_expert, a->k, a->n_tok, a->n_rows * fmt_row_bytes(a->fmt, a->n_ff),
            (uint64_t)a->n_rows * a->n_ff, (uint64_t)a->n_rows + a->n_ff);
    }
    case PS_OP_MOE_COMBINE: {
        const ps_moe_combine_args *a = &u->moe_combine;
        const uint64_t n =
            (uint64_t)a->n_tok * a->n; /* one of y and y_other is read per assignment */
        return (ps_cost){.flops = 2 * n * a->k, .bytes = 4 * n * (a->k + 2ull)};
    }
    case PS_OP_ROUTE:
        return cost_elem((uint64_t)u->route.n_tok * u->route.n_expert, 1, 8 + u->route.k);
    case PS_OP_GATHER_ROWS:
        return cost_elem((uint64_t)u->gather_rows.n_rows * u->gather_rows.n, 2, 0);
    case PS_OP_NORM: return cost_elem((uint64_t)u->norm.n_tok * u->norm.n, 3, 6);
    case PS_OP_ATTN_MERGE: {
        const ps_attn_merge_args *a = &u->attn_merge;
        return cost_elem((uint64_t)a->n_tok * a->n_head * a->head_dim, 3, 3);
    }
    case PS_OP_ACT: return cost_elem((uint64_t)u->act.n_tok * u->act.n, 3, 12);
    case PS_OP_ADD: return cost_elem(u->add.n, 3, 1);
    case PS_OP_SOFTCAP: return cost_elem(u->softcap.n, 2, 12);
    case PS_OP_MOVE: return cost_elem(u->move.n, 2, 0);
    default: return (ps_cost){0};
    }
}

ps_cost ps_op_cost(ps_op_kind kind, const void *args)
{
    ps_cost c = {0};
    if ((uint32_t)kind < PS_OP_COUNT) c = cost_of(kind, args);
    c.op = kind;
    return c;
}

/* ---- checks ---- */

/* Beyond these no real model goes, and products of two of them stay far below 2^63. */
enum { MAX_COLS = 1 << 24, MAX_TOK = 1 << 24, MAX_HEAD_DIM = 512, MAX_EXPERTS = 1 << 16 };

static bool given(ps_dptr p)
{
    return !ps_dptr_is_null(p);
}

static bool fmt_ok(uint32_t fmt, uint64_t n_cols)
{
    uint64_t n_bytes;
    return n_cols > 0 && n_cols <= MAX_COLS && ps_fmt_row_bytes(fmt, n_cols, &n_bytes);
}

static bool tok_ok(uint32_t n_tok)
{
    return n_tok > 0 && n_tok <= MAX_TOK;
}

static bool kv_ok(const ps_kv_view *kv)
{
    return (kv->fmt == PS_FMT_F16 || kv->fmt == PS_FMT_Q8_0) && fmt_ok(kv->fmt, kv->head_dim) &&
           kv->head_dim <= MAX_HEAD_DIM && kv->n_kv_head > 0 && kv->page_tok > 0 && kv->n_seq > 0 &&
           given(kv->k) && given(kv->v) && given(kv->table);
}

static const char *bad_matmul(const ps_matmul_args *a)
{
    if (!tok_ok(a->n_tok) || a->n_parts < 1 || a->n_parts > PS_MATMUL_PARTS)
        return "n_tok or n_parts";
    if (!given(a->x) || a->ldx < a->n_cols || a->add > 1) return "x";
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const ps_matmul_part *p = &a->part[i];
        if (!fmt_ok(p->fmt, a->n_cols)) return "format or n_cols";
        if (p->n_rows == 0 || p->ldy < p->n_rows || !given(p->w) || !given(p->y)) return "a part";
    }
    return NULL;
}

static const char *bad_qkv_prep(const ps_qkv_prep_args *a)
{
    const uint64_t d = a->kv.head_dim, n_kv = a->kv.n_kv_head * d;
    const bool store = given(a->kv.k) || given(a->kv.v) || given(a->kv.table);
    if (!tok_ok(a->n_tok) || d == 0 || d > MAX_HEAD_DIM) return "n_tok or head_dim";
    if (store && (!kv_ok(&a->kv) || !given(a->v) || a->ldv < n_kv)) return "v or the cache";
    if (given(a->q) && (a->n_head == 0 || a->ldq < a->n_head * d)) return "q";
    if (!given(a->k) || a->ldk < n_kv || !given(a->pos) || !given(a->seq)) return "k, pos or seq";
    if (a->rope > PS_ROPE_MROPE) return "rope";
    if (a->rope == PS_ROPE_NONE) return NULL;
    if (a->n_rot == 0 || a->n_rot % 2 != 0 || a->n_rot > d || !given(a->freq))
        return "n_rot or freq";
    if (a->rope == PS_ROPE_MROPE) {
        uint64_t n = (uint64_t)a->sections[0] + a->sections[1] + a->sections[2] + a->sections[3];
        if (n != a->n_rot / 2 || !given(a->rope_pos)) return "sections or rope_pos";
    }
    return NULL;
}

static const char *bad_attn(const ps_attn_args *a)
{
    if (!tok_ok(a->n_tok) || !kv_ok(&a->kv)) return "n_tok or the cache";
    if (a->n_head == 0 || a->n_head % a->kv.n_kv_head != 0) return "n_head";
    const uint64_t n = (uint64_t)a->n_head * a->kv.head_dim;
    if (a->ldq < n || a->ldo < n) return "a stride";
    if (!given(a->q) || !given(a->out) || !given(a->pos) || !given(a->seq))
        return "a missing operand";
    if (a->max_kv == 0 || a->max_kv > (uint64_t)a->kv.max_pages * a->kv.page_tok) return "max_kv";
    return NULL;
}

static const char *bad_gather_experts(const ps_gather_experts_args *a)
{
    if (!tok_ok(a->n_tok) || a->k == 0 || a->k > a->n_expert || a->n_expert > MAX_EXPERTS)
        return "n_tok, k or n_expert";
    if (a->image_bytes == 0 || a->image_bytes % 16 != 0 || a->image_bytes >> 40 != 0)
        return "image_bytes";
    if (a->gate_at >= a->image_bytes || a->up_at >= a->image_bytes || a->down_at >= a->image_bytes)
        return "a matrix";
    if (a->share > PS_SHARE_ONE || a->rest > 1) return "share or rest";
    if (!given(a->ids) || !given(a->mapped) || !given(a->resident) || !given(a->gate_ptrs) ||
        !given(a->up_ptrs) || !given(a->down_ptrs))
        return "a missing operand";
    return NULL;
}

static const char *bad_moe_up(const ps_moe_up_args *a)
{
    if (!tok_ok(a->n_tok) || a->k == 0 || a->k > a->n_expert || a->n_expert > MAX_EXPERTS)
        return "n_tok, k or n_expert";
    if (!fmt_ok(a->fmt_gate, a->n_cols) || !fmt_ok(a->fmt_up, a->n_cols)) return "format or n_cols";
    if (a->n_ff == 0 || a->n_ff > MAX_COLS || a->ldx < a->n_cols) return "n_ff or ldx";
    if (a->act > PS_ACT_SWIGLU_OAI || a->act == PS_ACT_RELU2) return "act"; /* experts are gated */
    if (!given(a->x) || !given(a->out) || !given(a->order) || !given(a->starts) ||
        !given(a->gate_ptrs) || !given(a->up_ptrs))
        return "a missing operand";
    return NULL;
}

static const char *bad_moe_down(const ps_moe_down_args *a)
{
    if (!tok_ok(a->n_tok) || a->k == 0 || a->k > a->n_expert || a->n_expert > MAX_EXPERTS)
        return "n_tok, k or n_expert";
    if (!fmt_ok(a->fmt, a->n_ff) || a->n_rows == 0 || a->n_rows > MAX_COLS)
        return "format, n_ff or n_rows";
    if (!given(a->h) || !given(a->y) || !given(a->order) || !given(a->starts) ||
        !given(a->down_ptrs))
        return "a missing operand";
    return NULL;
}

static const char *bad_moe_combine(const ps_moe_combine_args *a)
{
    if (!tok_ok(a->n_tok) || a->k == 0 || a->k > a->n_expert || a->n == 0) return "a size";
    if (!given(a->y) || !given(a->down_ptrs) || !given(a->ids) || !given(a->weights) ||
        !given(a->out))
        return "a missing operand";
    return NULL;
}

static const char *bad_route(const ps_route_args *a)
{
    if (!tok_ok(a->n_tok) || a->k == 0 || a->k > a->n_expert || a->n_expert > MAX_EXPERTS)
        return "n_tok, k or n_expert";
    if (!given(a->logits) || !given(a->ids) || !given(a->weights) || !given(a->order) ||
        !given(a->starts))
        return "a missing operand";
    return NULL;
}

static const char *bad_small(ps_op_kind kind, const ps_op_args *u)
{
    switch (kind) {
    case PS_OP_EMBED: {
        const ps_embed_args *a = &u->embed;
        if (!tok_ok(a->n_tok) || a->n_vocab == 0 || !fmt_ok(a->fmt, a->n_cols))
            return "a size or format";
        return given(a->table) && given(a->ids) && given(a->out) ? NULL : "a missing operand";
    }
    case PS_OP_NORM: {
        const ps_norm_args *a = &u->norm;
        if (!tok_ok(a->n_tok) || a->n == 0 || a->ldx < a->n || a->ldo < a->n) return "a size";
        if (a->kind > PS_NORM_LAYER) return "kind";
        return given(a->x) && given(a->w) && given(a->out) ? NULL : "a missing operand";
    }
    case PS_OP_ATTN_MERGE: {
        const ps_attn_merge_args *a = &u->attn_merge;
        if (!tok_ok(a->n_tok) || a->n_head == 0 || a->head_dim == 0) return "a size";
        return given(a->a) && given(a->b) && given(a->out) && given(a->ml_a) && given(a->ml_b)
                   ? NULL
                   : "a missing operand";
    }
    case PS_OP_ACT: {
        const ps_act_args *a = &u->act;
        const bool gated = a->kind != PS_ACT_RELU2;
        if (!tok_ok(a->n_tok) || a->n == 0 || a->ldu < a->n || a->ldo < a->n) return "a size";
        if (a->kind > PS_ACT_SWIGLU_OAI || (gated && a->ldg < a->n)) return "kind or ldg";
        return given(a->up) && given(a->out) && (!gated || given(a->gate)) ? NULL
                                                                           : "a missing operand";
    }
    case PS_OP_ADD:
        return given(u->add.a) && given(u->add.b) && given(u->add.out) ? NULL : "a missing operand";
    case PS_OP_GATHER_ROWS: {
        const ps_gather_rows_args *a = &u->gather_rows;
        return given(a->x) && given(a->rows) && given(a->out) ? NULL : "a missing operand";
    }
    case PS_OP_MOVE: return given(u->move.x) && given(u->move.out) ? NULL : "a missing operand";
    case PS_OP_SOFTCAP: return given(u->softcap.x) && u->softcap.cap > 0 ? NULL : "x or cap";
    default: return "the kind of op";
    }
}

ps_status ps_op_check(ps_op_kind kind, const void *args, ps_err *err)
{
    const ps_op_args *u = args;
    const char *bad = NULL;
    switch (kind) {
    case PS_OP_MATMUL: bad = bad_matmul(&u->matmul); break;
    case PS_OP_QKV_PREP: bad = bad_qkv_prep(&u->qkv_prep); break;
    case PS_OP_ATTN: bad = bad_attn(&u->attn); break;
    case PS_OP_ROUTE: bad = bad_route(&u->route); break;
    case PS_OP_GATHER_EXPERTS: bad = bad_gather_experts(&u->gather_experts); break;
    case PS_OP_MOE_UP: bad = bad_moe_up(&u->moe_up); break;
    case PS_OP_MOE_DOWN: bad = bad_moe_down(&u->moe_down); break;
    case PS_OP_MOE_COMBINE: bad = bad_moe_combine(&u->moe_combine); break;
    default: bad = bad_small(kind, u); break;
    }
    if (bad == NULL) return PS_OK;
    return ps_fail(err, PS_EINTERNAL, "internal error: op %s was given a bad argument: %s",
        ps_op_name(kind), bad);
}
