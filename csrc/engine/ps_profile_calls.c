/* ps_profile_calls - the op calls that a model's passes consist of, taken from lowered passes, so
 * that what is timed is what will run; and parts of such calls. See ps_profile_priv.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/ps_profile_priv.h"
#include "engine/ps_ticks.h"

/* Which passes: every class of batch that kernels know, and attention over short and long caches.
 */
static const struct {
    uint32_t n_tok, max_kv;
} passes[] = {{1, 256}, {1, 1024}, {1, 4096}, {1, 16384}, {8, 1024}, {64, 1024}, {512, 1024},
    {512, 4096}, {2048, 2048}, {2048, 8192}};

enum {
    MAX_CALLS = 512, /* of a side; what a model has beyond that is interpolated */
    LOGIT_ROWS = 8,
    ROW_STEP = 64, /* parts of matrices are whole tiles of every kernel */
    MANY_TOK = 256
};

/* ---- collecting ---- */

int32_t ps_profile_weight_fmt(ps_op_kind op, const ps_op_args *a, size_t offset)
{
    switch (op) {
    case PS_OP_EMBED: return (int32_t)a->embed.fmt;
    case PS_OP_MATMUL:
        for (uint32_t i = 0; i < a->matmul.n_parts; i++)
            if (offset == offsetof(ps_matmul_args, part) + i * sizeof(ps_matmul_part) +
                              offsetof(ps_matmul_part, w))
                return (int32_t)a->matmul.part[i].fmt;
        return -1;
    case PS_OP_ATTN: return (int32_t)a->attn.kv.fmt;
    case PS_OP_MOE_UP:
        return (int32_t)(offset == offsetof(ps_moe_up_args, gate_ptrs) ? a->moe_up.fmt_gate
                                                                       : a->moe_up.fmt_up);
    case PS_OP_MOE_DOWN: return (int32_t)a->moe_down.fmt;
    default: return -1;
    }
}

static void add_fmt(uint32_t *fmts, uint32_t fmt)
{
    uint32_t code = fmt + 1, i = 0;
    for (; i < MAX_FMTS && (*fmts >> 8 * i & 0xff) != 0; i++)
        if ((*fmts >> 8 * i & 0xff) == code) return;
    *fmts |= code << 8 * i;
}

static uint32_t formats_of(ps_op_kind op, const ps_op_args *a)
{
    uint32_t fmts = 0;
    switch (op) {
    case PS_OP_EMBED: add_fmt(&fmts, a->embed.fmt); break;
    case PS_OP_MATMUL:
        for (uint32_t i = 0; i < a->matmul.n_parts; i++) add_fmt(&fmts, a->matmul.part[i].fmt);
        break;
    case PS_OP_ATTN: add_fmt(&fmts, a->attn.kv.fmt); break;
    case PS_OP_MOE_UP:
        add_fmt(&fmts, a->moe_up.fmt_gate);
        add_fmt(&fmts, a->moe_up.fmt_up);
        break;
    case PS_OP_MOE_DOWN: add_fmt(&fmts, a->moe_down.fmt); break;
    default: break;
    }
    return fmts;
}

static bool is_same(const op_call *a, const op_call *b)
{
    return a->op == b->op && a->fmts == b->fmts && a->work.fmt == b->work.fmt &&
           a->work.n_tok == b->work.n_tok && a->work.flops == b->work.flops &&
           a->work.bytes == b->work.bytes;
}

static ps_status add_call(op_calls *calls, const op_call *c, bool each, ps_err *err)
{
    for (uint32_t i = 0; i < calls->n && !each; i++)
        if (is_same(&calls->items[i], c)) return PS_OK;
    if (calls->n == MAX_CALLS) return PS_OK;
    if (calls->n == calls->cap) {
        uint32_t cap = calls->cap == 0 ? 64 : 2 * calls->cap;
        op_call *items = ps_realloc(calls->items, cap, sizeof *items);
        if (items == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for a list of ops");
        calls->items = items;
        calls->cap = cap;
    }
    calls->items[calls->n++] = *c;
    return PS_OK;
}

static ps_status add_ticks(op_calls *calls, const ps_ticks *t, ps_side side, bool each, ps_err *err)
{
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        if (k->kind != PS_TICK_RUN) continue;
        op_call c = {.op = (ps_op_kind)k->op, .side = side, .work = ps_simulate_work(t, i)};
        memcpy(&c.args, t->args + k->index, ps_op_args_bytes(c.op));
        c.fmts = formats_of(c.op, &c.args);
        PS_TRY(add_call(calls, &c, each, err));
    }
    return PS_OK;
}

static int compare(const void *pa, const void *pb)
{
    const op_call *a = pa, *b = pb;
    if (a->fmts != b->fmts) return a->fmts < b->fmts ? -1 : 1;
    if (a->op != b->op) return a->op < b->op ? -1 : 1;
    if (a->work.n_tok != b->work.n_tok) return a->work.n_tok < b->work.n_tok ? -1 : 1;
    if (a->work.bytes != b->work.bytes) return a->work.bytes < b->work.bytes ? -1 : 1;
    return a->work.flops < b->work.flops ? -1 : a->work.flops > b->work.flops;
}

/* A plan that nobody runs: everything on one side, as if memory had no end. */
static ps_status make_plan(const ps_model *model, ps_side side, int sm, uint32_t n_tok,
    uint32_t max_kv, ps_plan **out, ps_err *err)
{
    static const ps_tier tier = {"all", UINT32_MAX};
    ps_place *places = ps_alloc(model->n_units, sizeof *places);
    if (places == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for the places of units");
    for (uint32_t i = 0; i < model->n_units; i++)
        places[i].kind = side == PS_SIDE_DEV ? PS_PLACE_VRAM : PS_PLACE_CPU;
    ps_plan_spec spec = {.accelerator = side == PS_SIDE_DEV,
        .sm = sm > 0 ? sm : 90,
        .budget_bytes = UINT64_MAX / 2,
        .n_ctx = max_kv,
        .n_seq = 1,
        .kv_fmt = PS_FMT_F16,
        .n_tiers = 1,
        .tiers = &tier,
        .places = places,
        .chunk_tok = n_tok,
        .pass_tok = n_tok,
        .logit_rows = LOGIT_ROWS};
    ps_status status = ps_plan_create(model, &spec, out, err);
    ps_free(places);
    return status;
}

static ps_status collect_pass(const ps_model *model, ps_side side, int sm, uint32_t n_tok,
    uint32_t max_kv, bool each, op_calls *out, ps_err *err)
{
    ps_plan *plan = NULL;
    ps_ticks *ticks = NULL;
    ps_pass_shape shape = {
        .n_tok = n_tok, .n_out = n_tok <= LOGIT_ROWS ? n_tok : 1, .max_kv = max_kv};
    ps_status status = make_plan(model, side, sm, n_tok, max_kv, &plan, err);
    if (status == PS_OK) status = ps_lower(plan, &shape, &ticks, err);
    if (status == PS_OK) status = add_ticks(out, ticks, side, each, err);
    ps_ticks_destroy(ticks);
    ps_plan_destroy(plan);
    return status;
}

ps_status ps_profile_collect(const ps_model *model, ps_side side, int sm, uint32_t max_tok,
    uint32_t max_kv, op_calls *out, ps_err *err)
{
    uint32_t last_tok = 0, last_kv = 0;
    for (size_t i = 0; i < sizeof passes / sizeof *passes; i++) {
        uint32_t n_tok = passes[i].n_tok, kv = passes[i].max_kv;
        if (kv > max_kv) kv = max_kv;
        if (n_tok > max_tok || n_tok > kv || (n_tok == last_tok && kv == last_kv)) continue;
        PS_TRY(collect_pass(model, side, sm, n_tok, kv, false, out, err));
        last_tok = n_tok;
        last_kv = kv;
    }
    if (out->n > 0) qsort(out->items, out->n, sizeof *out->items, compare);
    return PS_OK;
}

ps_status ps_profile_collect_pass(const ps_model *model, ps_side side, int sm, uint32_t n_tok,
    uint32_t max_kv, op_calls *out, ps_err *err)
{
    return collect_pass(model, side, sm, n_tok, max_kv, true, out, err);
}

uint32_t ps_profile_formats(const op_call *calls, uint32_t n)
{
    uint32_t fmts = 0;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < MAX_FMTS; k++) {
            uint32_t code = calls[i].fmts >> 8 * k & 0xff;
            if (code != 0 && fmts >> 8 * (MAX_FMTS - 1) == 0) add_fmt(&fmts, code - 1);
        }
    return fmts;
}

op_call ps_profile_one_expert(const op_call *call)
{
    op_call one = *call;
    if (one.op == PS_OP_MOE_UP) one.args.moe_up.k = 1;
    if (one.op == PS_OP_MOE_DOWN) one.args.moe_down.k = 1;
    ps_cost cost = ps_op_cost(one.op, &one.args);
    one.work.flops = cost.flops;
    one.work.bytes = cost.bytes;
    return one;
}

bool ps_profile_gather_call(const ps_model *model, uint32_t k, op_call *out)
{
    static const ps_dptr given = {1};
    uint64_t image_bytes = 0;
    for (uint32_t i = 0; i < model->n_units; i++)
        if (model->units[i].kind == PS_UNIT_EXPERT)
            image_bytes = ps_max_u64(image_bytes, model->units[i].n_bytes);
    *out = (op_call){.op = PS_OP_GATHER_EXPERTS, .side = PS_SIDE_DEV, .work = {.fmt = -1}};
    out->args.gather_experts = (ps_gather_experts_args){.ids = given,
        .mapped = given,
        .resident = given,
        .slots = given,
        .gate_ptrs = given,
        .up_ptrs = given,
        .down_ptrs = given,
        .image_bytes = ps_div_up_u64(image_bytes, PS_WEIGHT_ALIGN) * PS_WEIGHT_ALIGN,
        .n_tok = 1,
        .k = k,
        .n_expert = model->hp.n_expert};
    ps_cost cost = ps_op_cost(out->op, &out->args);
    out->work.n_tok = 1;
    out->work.bytes = cost.bytes;
    out->work.bus_bytes = cost.bus_bytes;
    return image_bytes > 0;
}

/* ---- cutting ---- */

static uint32_t shrink(uint32_t n, double share, uint32_t step)
{
    uint64_t cut = (uint64_t)ceil(n * share / step) * step;
    return cut < n ? (uint32_t)ps_max_u64(cut, 1) : n;
}

/* A cache of no more pages than the call reads or writes. */
static void trim_cache(ps_kv_view *kv, uint32_t n_tok)
{
    kv->max_pages = kv->n_pages = (uint32_t)ps_div_up_u64(n_tok, kv->page_tok);
    kv->n_seq = 1;
}

static double cut_matmul(ps_matmul_args *a, double share)
{
    uint64_t all = 0, left = 0;
    for (uint32_t i = 0; i < a->n_parts; i++) {
        ps_matmul_part *p = &a->part[i];
        uint32_t n = shrink(p->n_rows, share, ROW_STEP);
        all += p->n_rows;
        left += n;
        if (n < p->n_rows) p->ldy = n;
        p->n_rows = n;
    }
    return (double)left / (double)all;
}

/* By heads that share keys; below one such group by tokens. */
static double cut_attn(ps_attn_args *a, double share)
{
    uint32_t groups = a->kv.n_kv_head, left = shrink(groups, share, 1), n_tok = a->n_tok;
    if (left < groups) {
        a->n_head = a->n_head / groups * left;
        a->kv.n_kv_head = left;
        a->ldq = a->ldo = a->n_head * a->kv.head_dim;
    }
    double done = (double)left / groups;
    if (left == 1) a->n_tok = shrink(n_tok, share / done, 16);
    a->n_after = (n_tok - a->n_tok) / 2; /* those in the middle: as many keys as all on average */
    return done * a->n_tok / n_tok;
}

static double cut_to(uint32_t *n, double share, uint32_t step)
{
    uint32_t all = *n;
    *n = shrink(all, share, step);
    return (double)*n / all;
}

/* Of many tokens first some, since no other cut makes the input smaller, which is k times theirs.
 */
static double cut_moe_down(ps_moe_down_args *a, double share)
{
    double by_tok = 1;
    if (a->n_tok >= MANY_TOK) by_tok = cut_to(&a->n_tok, share > 0.25 ? share : 0.25, 16);
    return by_tok * cut_to(&a->n_rows, share / by_tok, ROW_STEP);
}

static double cut_long(uint64_t *n, double share)
{
    uint64_t all = *n;
    *n = ps_min_u64(all, (uint64_t)((double)all * share / ROW_STEP + 1) * ROW_STEP);
    return (double)*n / (double)all;
}

/* Images become smaller. */
static double cut_gather(ps_gather_experts_args *a, double share)
{
    uint64_t all = a->image_bytes, n = (uint64_t)((double)all * share / PS_WEIGHT_ALIGN) + 1;
    a->image_bytes = ps_min_u64(all, n * PS_WEIGHT_ALIGN);
    return (double)a->image_bytes / (double)all;
}

double ps_profile_cut(const op_call *call, double share, ps_op_args *out)
{
    *out = call->args;
    switch (call->op) {
    case PS_OP_MATMUL: return cut_matmul(&out->matmul, share);
    case PS_OP_MOE_UP: return cut_to(&out->moe_up.n_ff, share, ROW_STEP);
    case PS_OP_MOE_DOWN: return cut_moe_down(&out->moe_down, share);
    case PS_OP_ATTN:
        trim_cache(&out->attn.kv, out->attn.max_kv);
        return cut_attn(&out->attn, share);
    case PS_OP_QKV_PREP:
        trim_cache(&out->qkv_prep.kv, out->qkv_prep.n_tok);
        return cut_to(&out->qkv_prep.n_tok, share, 1);
    case PS_OP_EMBED: return cut_to(&out->embed.n_tok, share, 1);
    case PS_OP_NORM: return cut_to(&out->norm.n_tok, share, 1);
    case PS_OP_ATTN_MERGE: return cut_to(&out->attn_merge.n_tok, share, 1);
    case PS_OP_ACT: return cut_to(&out->act.n_tok, share, 1);
    case PS_OP_ROUTE: return cut_to(&out->route.n_tok, share, 1);
    case PS_OP_MOE_COMBINE: return cut_to(&out->moe_combine.n_tok, share, 1);
    case PS_OP_GATHER_ROWS: return cut_to(&out->gather_rows.n_rows, share, 1);
    case PS_OP_ADD: return cut_long(&out->add.n, share);
    case PS_OP_SOFTCAP: return cut_long(&out->softcap.n, share);
    case PS_OP_MOVE: return cut_long(&out->move.n, share);
    case PS_OP_GATHER_EXPERTS: return cut_gather(&out->gather_experts, share);
    case PS_OP_COUNT: break;
    }
    return 1;
}
