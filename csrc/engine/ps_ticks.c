/* ps_ticks - printing, memory ranges and destruction of tick lists. See ps_ticks.h. */
#include "engine/ps_ticks.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void ps_ticks_destroy(ps_ticks *t)
{
    if (t == NULL) return;
    ps_free(t->tick);
    ps_free(t->args);
    ps_free(t->extra);
    for (int s = 0; s < PS_SIDE_COUNT; s++) ps_free(t->table[s]);
    ps_free(t);
}

uint32_t ps_pass_kv_bucket(const ps_plan *plan, uint32_t n_tok, uint32_t max_kv)
{
    uint64_t bucket = PS_MIN_KV_BUCKET, most = (uint64_t)plan->max_pages * PS_KV_PAGE_TOK;
    if (n_tok > PS_SMALL_PASS_TOK)
        bucket = ps_div_up_u64(max_kv, PS_MIN_KV_BUCKET) * PS_MIN_KV_BUCKET;
    else
        while (bucket < max_kv) bucket *= 2;
    return (uint32_t)ps_min_u64(bucket, most);
}

uint32_t ps_pass_far(const ps_plan *plan, uint32_t n_tok, uint32_t max_kv)
{
    uint32_t far = 0, first = max_kv > n_tok ? max_kv - n_tok : 0;
    for (uint32_t i = 0; i < plan->n_windows && max_kv > 0; i++)
        if (ps_kv_window_first(&plan->windows[i], max_kv) >
            ps_kv_window_oldest(&plan->windows[i], first))
            far |= ps_pass_far_bit(i);
    return far;
}

uint32_t ps_tick_ranges(const ps_ticks *t, uint32_t i, ps_range *out, uint32_t cap)
{
    const ps_tick *k = &t->tick[i];
    uint32_t n = 0;
    if (k->kind == PS_TICK_COPY_IN || k->kind == PS_TICK_COPY_OUT) {
        if (n < cap) out[n++] = (ps_range){k->dst, k->n_bytes, PS_WRITE};
        if (n < cap) out[n++] = (ps_range){k->src, k->n_bytes, PS_READ};
    } else if (k->kind == PS_TICK_RUN) {
        ps_operand operands[PS_MAX_OPERANDS];
        const unsigned char *args = t->args + k->index;
        uint32_t n_operands = ps_op_operands((ps_op_kind)k->op, args, operands);
        for (uint32_t j = 0; j < n_operands && n < cap; j++) {
            ps_range r = {.n_bytes = operands[j].n_bytes, .access = operands[j].access};
            memcpy(&r.ref, args + operands[j].offset, sizeof r.ref);
            if (r.n_bytes != 0 && r.ref.a != 0) out[n++] = r;
        }
        for (uint32_t j = 0; j < k->n_extra && n < cap; j++) out[n++] = t->extra[k->extra + j];
    }
    return n;
}

bool ps_pass_maps_experts(const ps_plan *plan, const ps_pass_shape *shape)
{
    const ps_hparams *hp = &plan->model->hp;
    return (uint64_t)shape->n_tok * hp->n_expert_used * 2 <= hp->n_expert;
}

typedef struct expert_count {
    double here, mapped; /* entries of a table that hold an address; that of host memory */
    double odds; /* that any of the mapped ones is routed to; asked for where they are divided */
} expert_count;

static expert_count count_in_table(
    const ps_ticks *t, ps_side side, ps_dptr table, uint32_t n_expert)
{
    if (table.a == 0) return (expert_count){0};
    uint64_t first = (ps_ref_offset(table) - t->plan->tables_offset) / sizeof(ps_dptr);
    uint32_t n_here = 0, n_mapped = 0;
    for (uint64_t j = first; j < first + n_expert && j < t->n_table; j++) {
        ps_dptr p = t->table[side][j];
        n_here += p.a != 0;
        n_mapped += ps_ref_space(p) == PS_SPACE_HOST_WEIGHTS_DEV;
    }
    return (expert_count){.here = n_here, .mapped = n_mapped};
}

/* That any of n_some of a layer's experts is among those that a token is routed to, or any of so
 * many tokens. */
static double odds_of_any(uint32_t n_expert, double n_some, uint32_t k, uint32_t n_tok)
{
    double none = 1.0;
    for (uint32_t t = 0; t < k && t < n_expert; t++)
        none *= 1.0 - (n_some < n_expert - t ? n_some / (n_expert - t) : 1.0);
    return 1.0 - pow(none, n_tok);
}

/* Of so many experts of a layer drawn without regard to which are shared, the GPU's on average.
 * *odds: that it has any. */
static double mean_share(
    uint32_t n_expert, uint32_t n_shared, uint32_t n_drawn, uint32_t share, double *odds)
{
    enum { MOST = 64 };
    double chance[MOST + 1] = {1.0}, mean = 0; /* that i of those drawn so far are shared */
    *odds = 1.0;
    if (n_drawn > MOST) return (double)n_drawn * n_shared / n_expert * share / PS_SHARE_ONE;
    for (uint32_t t = 0; t < n_drawn; t++)
        for (uint32_t i = t + 1; i-- > 0;) {
            double one = i < n_shared ? (double)(n_shared - i) / (n_expert - t) : 0.0;
            chance[i + 1] += chance[i] * one;
            chance[i] *= 1.0 - one;
        }
    for (uint32_t i = 0; i <= n_drawn; i++) {
        mean += chance[i] * (double)PS_SHARE_OF(i, share);
        if (PS_SHARE_OF(i, share) == 0) *odds -= chance[i];
    }
    return mean;
}

/* What a gather gives its side: of shared experts, as many as that is on average. */
static expert_count count_gathered(
    const ps_ticks *t, ps_side side, const ps_gather_experts_args *a, bool with_residents)
{
    expert_count n = count_in_table(t, side, a->mapped, a->n_expert),
                 shared = count_in_table(t, side, a->shared, a->n_expert);
    n.odds = odds_of_any(a->n_expert, n.mapped, a->k, a->n_tok);
    if (shared.here > 0) {
        double drawn = ps_experts_touched(a->n_expert, a->k, a->n_tok), odds = 0;
        uint32_t n_drawn = (uint32_t)(drawn + 0.5);
        double share = mean_share(a->n_expert, (uint32_t)shared.here, n_drawn, a->share, &odds) *
                       a->n_expert / (n_drawn * shared.here);
        n.odds = 1.0 - (1.0 - n.odds) * (1.0 - odds);
        if (a->rest) share = 1.0 - share;
        n.here += share * shared.here;
        n.mapped += share * shared.mapped;
    }
    if (with_residents) n.here += count_in_table(t, side, a->resident, a->n_expert).here;
    return n;
}

/* Of the op on experts at tick i. A table that is written during the pass holds those that the
 * gather before the tick on its stream leaves there; what the GPU has of them is in VRAM then. */
static expert_count count_experts(const ps_ticks *t, uint32_t i, ps_dptr table, uint32_t n_expert)
{
    uint8_t stream = t->tick[i].stream;
    ps_side side = stream == PS_STREAM_CPU ? PS_SIDE_HOST : PS_SIDE_DEV;
    ps_space space = ps_ref_space(table);
    if (space != PS_SPACE_DEV_ACT && space != PS_SPACE_HOST_ACT)
        return count_in_table(t, side, table, n_expert);
    expert_count n = {0};
    while (i > 0 && (t->tick[i].kind != PS_TICK_RUN || t->tick[i].stream != stream ||
                        t->tick[i].op != PS_OP_GATHER_EXPERTS))
        i--;
    if (i > 0) {
        ps_gather_experts_args a;
        memcpy(&a, t->args + t->tick[i].index, sizeof a);
        n = count_gathered(t, side, &a, true);
        n.mapped = 0;
    }
    return n;
}

/* Of what attention would cost were all keys in host memory, that of those which no window holds.
 */
static void scale_to_far(const ps_plan *plan, int32_t unit, const ps_attn_args *a, ps_cost *cost)
{
    const ps_unit_kv *kv = &plan->kv[unit];
    if (kv->home != PS_KV_WINDOW) return;
    uint64_t keys = a->window > 0 ? ps_min_u64(a->window, a->max_kv) : a->max_kv,
             near = (uint64_t)(plan->windows[kv->window].n_pages - 1) * PS_KV_PAGE_TOK;
    double share = near < keys ? (double)(keys - near) / (double)keys : 0.0;
    cost->flops = (uint64_t)((double)cost->flops * share);
    cost->bytes = (uint64_t)((double)cost->bytes * share);
}

ps_cost ps_tick_cost(const ps_ticks *t, uint32_t i)
{
    double odds;
    return ps_tick_cost_odds(t, i, &odds);
}

ps_cost ps_tick_cost_odds(const ps_ticks *t, uint32_t i, double *bus_odds)
{
    const ps_tick *k = &t->tick[i];
    *bus_odds = 1.0;
    if (k->kind != PS_TICK_RUN) return (ps_cost){0};
    ps_cost cost = ps_op_cost((ps_op_kind)k->op, t->args + k->index);
    uint32_t n_expert = 0;
    expert_count n = {0};
    if (k->op == PS_OP_GATHER_EXPERTS) {
        ps_gather_experts_args a;
        memcpy(&a, t->args + k->index, sizeof a);
        if (a.slots.a == 0) return cost; /* tables only */
        n_expert = a.n_expert;
        n = count_gathered(t, PS_SIDE_DEV, &a, false);
        *bus_odds = n.odds;
    } else if (k->op == PS_OP_MOE_UP) {
        ps_moe_up_args a;
        memcpy(&a, t->args + k->index, sizeof a);
        n_expert = a.n_expert;
        n = count_experts(t, i, a.up_ptrs, n_expert);
        *bus_odds = odds_of_any(n_expert, n.mapped, a.k, a.n_tok);
    } else if (k->op == PS_OP_MOE_DOWN) {
        ps_moe_down_args a;
        memcpy(&a, t->args + k->index, sizeof a);
        n_expert = a.n_expert;
        n = count_experts(t, i, a.down_ptrs, n_expert);
        *bus_odds = odds_of_any(n_expert, n.mapped, a.k, a.n_tok);
    } else if (k->op == PS_OP_ATTN) {
        ps_attn_args a;
        memcpy(&a, t->args + k->index, sizeof a);
        ps_space space = ps_ref_space(a.kv.k);
        if (space == PS_SPACE_HOST_KV || space == PS_SPACE_HOST_KV_DEV)
            scale_to_far(t->plan, k->unit, &a, &cost);
        if (space == PS_SPACE_HOST_KV_DEV) cost.bus_bytes = cost.bytes;
    } else if (k->op == PS_OP_MOE_COMBINE) {
        ps_moe_combine_args a;
        memcpy(&a, t->args + k->index, sizeof a);
        double far = a.n_expert - count_experts(t, i, a.down_ptrs, a.n_expert).here,
               all = (double)a.n_tok * a.k * a.n * sizeof(float);
        if (ps_ref_space(a.y_other) == PS_SPACE_HOST_ACT_DEV)
            cost.bus_bytes = (uint64_t)(all * far / a.n_expert);
    } else if (k->op == PS_OP_MOVE || k->op == PS_OP_ADD || k->op == PS_OP_ATTN_MERGE) {
        ps_range ranges[PS_MAX_OPERANDS];
        uint32_t n_ranges = ps_tick_ranges(t, i, ranges, PS_MAX_OPERANDS);
        for (uint32_t j = 0; j < n_ranges; j++)
            if (ps_ref_space(ranges[j].ref) == PS_SPACE_HOST_ACT_DEV)
                cost.bus_bytes += ranges[j].n_bytes;
    }
    if (n.mapped > 0 || k->op == PS_OP_GATHER_EXPERTS)
        cost.bus_bytes = (uint64_t)((double)cost.bytes * n.mapped / n_expert);
    if (n.here < n_expert) {
        cost.flops = (uint64_t)((double)cost.flops * n.here / n_expert);
        cost.bytes = (uint64_t)((double)cost.bytes * n.here / n_expert);
    }
    return cost;
}

/* ---- text ---- */

typedef struct text {
    char *out;
    uint64_t cap, n;
} text;

static void put(text *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void put(text *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    bool room = t->out != NULL && t->n < t->cap;
    int n = vsnprintf(room ? t->out + t->n : NULL, room ? t->cap - t->n : 0, fmt, ap);
    va_end(ap);
    if (n > 0) t->n += (uint64_t)n;
}

static void put_ref(text *t, const ps_plan *plan, ps_dptr ref)
{
    if (ps_ref_space(ref) == PS_SPACE_HOST_WEIGHTS)
        put(t, "host:%s+%llu", plan->model->units[ps_ref_offset(ref) >> PS_IMAGE_SHIFT].name,
            (unsigned long long)(ps_ref_offset(ref) & ((1ull << PS_IMAGE_SHIFT) - 1)));
    else
        put(t, "%s+%llu", ps_space_name(ps_ref_space(ref)), (unsigned long long)ps_ref_offset(ref));
}

static void put_run(text *out, const ps_ticks *t, uint32_t i)
{
    ps_range ranges[PS_MAX_OPERANDS + UINT8_MAX];
    uint32_t n = ps_tick_ranges(t, i, ranges, PS_MAX_OPERANDS + UINT8_MAX);
    put(out, " %-12s", ps_op_name((ps_op_kind)t->tick[i].op));
    for (int writes = 1; writes >= 0; writes--) {
        if (!writes) put(out, " <-");
        for (uint32_t j = 0; j < n; j++) {
            bool w = (ranges[j].access & PS_WRITE) != 0, r = (ranges[j].access & PS_READ) != 0;
            if (writes ? !w : !r) continue;
            put(out, " ");
            put_ref(out, t->plan, ranges[j].ref);
        }
    }
}

uint64_t ps_ticks_print(const ps_ticks *t, char *out, uint64_t cap)
{
    static const char *const names[] = {
        "copy_in", "copy_out", "run", "record", "wait", "flag_set", "flag_wait"};
    text x = {.out = out, .cap = cap};
    if (cap > 0) out[0] = 0;
    put(&x, "pass tier=%s n_tok=%u n_out=%u max_kv=%u events=%u flags=%u",
        t->plan->tiers[t->shape.tier].name, t->shape.n_tok, t->shape.n_out, t->shape.max_kv,
        t->n_events, t->n_flags);
    if (t->shape.found > 0) put(&x, " found=%u", t->shape.found - 1);
    put(&x, "\n");
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        put(&x, "%5u %-7s %-9s", i, ps_stream_role_name((ps_stream_role)k->stream), names[k->kind]);
        switch ((ps_tick_kind)k->kind) {
        case PS_TICK_COPY_IN:
        case PS_TICK_COPY_OUT:
            put(&x, " ");
            put_ref(&x, t->plan, k->dst);
            put(&x, " <- ");
            put_ref(&x, t->plan, k->src);
            put(&x, " %llu bytes", (unsigned long long)k->n_bytes);
            break;
        case PS_TICK_RUN: put_run(&x, t, i); break;
        case PS_TICK_RECORD:
        case PS_TICK_WAIT: put(&x, " event %u", k->index); break;
        case PS_TICK_FLAG_SET:
        case PS_TICK_FLAG_WAIT: put(&x, " flag %u", k->index); break;
        }
        if (k->unit >= 0) put(&x, "  [%s]", t->plan->model->units[k->unit].name);
        put(&x, "\n");
    }
    return x.n;
}
