/* ps_simulate - see ps_simulate.h. */
#include "engine/ps_simulate.h"

#include <string.h>

/* ---- the list as it runs ---- */

static bool is_locked(const ps_ticks *t, uint64_t unit)
{
    return t->shape.mapped == NULL || t->shape.mapped[unit];
}

static bool follows(const ps_ticks *t, ps_dptr from, uint64_t n_bytes, ps_dptr to)
{
    if (from.a + n_bytes == to.a) return true;
    if (ps_ref_space(from) != PS_SPACE_HOST_WEIGHTS || ps_ref_space(to) != PS_SPACE_HOST_WEIGHTS)
        return false;
    uint64_t unit = ps_ref_offset(from) >> PS_IMAGE_SHIFT,
             end = (ps_ref_offset(from) & ((1ull << PS_IMAGE_SHIFT) - 1)) + n_bytes;
    return end == t->plan->model->units[unit].n_bytes && end % PS_WEIGHT_ALIGN == 0 &&
           ps_ref_offset(to) == (unit + 1) << PS_IMAGE_SHIFT && is_locked(t, unit) &&
           is_locked(t, unit + 1);
}

/* As ps_bind does once addresses are known. */
static void merge_copies(ps_ticks *t)
{
    uint32_t n = 0;
    ps_dptr last_src = {0}; /* of the last piece that was merged into tick n - 1 */
    uint64_t last_bytes = 0;
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        ps_tick *last = n > 0 ? &t->tick[n - 1] : NULL;
        bool in = k->kind == PS_TICK_COPY_IN;
        if (in && last != NULL && last->kind == PS_TICK_COPY_IN &&
            last->dst.a + last->n_bytes == k->dst.a && follows(t, last_src, last_bytes, k->src))
            last->n_bytes += k->n_bytes;
        else
            t->tick[n++] = *k;
        if (in) {
            last_src = k->src;
            last_bytes = k->n_bytes;
        }
    }
    t->n_ticks = n;
}

ps_status ps_simulate_lower(
    const ps_plan *plan, const ps_pass_shape *shape, ps_ticks **out, ps_err *err)
{
    ps_status status = ps_lower(plan, shape, out, err);
    if (status == PS_OK) merge_copies(*out);
    return status;
}

/* ---- what a tick has to do ---- */

static void describe_run(const ps_ticks *t, const ps_tick *k, ps_work *w)
{
    const ps_op_args *a = (const ps_op_args *)(const void *)(t->args + k->index);
    switch ((ps_op_kind)k->op) {
    case PS_OP_EMBED:
        w->n_tok = a->embed.n_tok;
        w->fmt = (int32_t)a->embed.fmt;
        break;
    case PS_OP_NORM: w->n_tok = a->norm.n_tok; break;
    case PS_OP_MATMUL:
        w->n_tok = a->matmul.n_tok;
        w->fmt = (int32_t)a->matmul.part[0].fmt;
        break;
    case PS_OP_QKV_PREP: w->n_tok = a->qkv_prep.n_tok; break;
    case PS_OP_ATTN:
        w->n_tok = a->attn.n_tok;
        w->fmt = (int32_t)a->attn.kv.fmt;
        break;
    case PS_OP_ATTN_MERGE: w->n_tok = a->attn_merge.n_tok; break;
    case PS_OP_ACT: w->n_tok = a->act.n_tok; break;
    case PS_OP_ROUTE: w->n_tok = a->route.n_tok; break;
    case PS_OP_GATHER_EXPERTS: w->n_tok = a->gather_experts.n_tok; break;
    case PS_OP_MOE_UP:
        w->n_tok = a->moe_up.n_tok;
        w->fmt = (int32_t)a->moe_up.fmt_gate;
        break;
    case PS_OP_MOE_DOWN:
        w->n_tok = a->moe_down.n_tok;
        w->fmt = (int32_t)a->moe_down.fmt;
        break;
    case PS_OP_MOE_COMBINE: w->n_tok = a->moe_combine.n_tok; break;
    case PS_OP_GATHER_ROWS: w->n_tok = a->gather_rows.n_rows; break;
    default: break;
    }
}

ps_work ps_simulate_work(const ps_ticks *t, uint32_t i)
{
    const ps_tick *k = &t->tick[i];
    ps_work w = {.fmt = -1};
    if (k->kind == PS_TICK_RUN) {
        ps_cost cost = ps_tick_cost_odds(t, i, &w.bus_odds);
        w.flops = cost.flops;
        w.bytes = cost.bytes;
        w.bus_bytes = cost.bus_bytes;
        describe_run(t, k, &w);
    } else if (k->kind == PS_TICK_COPY_IN || k->kind == PS_TICK_COPY_OUT) {
        w.n_bytes = k->n_bytes;
    }
    return w;
}

/* ---- time ---- */

typedef struct mark { /* an event or flag that was set */
    uint64_t at_ns;
    int32_t tick; /* that set it; -1: none did */
} mark;

typedef struct walk {
    const ps_ticks *ticks;
    const uint64_t *ns;
    uint64_t *end_ns; /* [n_ticks] */
    int32_t *cause; /* owns; [n_ticks] tick at whose end this one could start; -1: the beginning */
    mark *event, *flag; /* own */
    uint64_t now[PS_STREAM_COUNT];
    int32_t last[PS_STREAM_COUNT]; /* tick of each stream; -1: none yet */
} walk;

static ps_status find_mark(walk *w, const ps_tick *k, uint32_t i, mark **out, ps_err *err)
{
    bool flag = k->kind == PS_TICK_FLAG_SET || k->kind == PS_TICK_FLAG_WAIT;
    bool waits = k->kind == PS_TICK_WAIT || k->kind == PS_TICK_FLAG_WAIT;
    uint32_t n = flag ? w->ticks->n_flags : w->ticks->n_events;
    if (k->index < n) *out = flag ? &w->flag[k->index] : &w->event[k->index];
    if (k->index >= n || (waits && (*out)->tick < 0))
        return ps_fail(err, PS_EPLAN, "tick %u uses %s %u, which nothing before it sets", i,
            flag ? "flag" : "event", k->index);
    return PS_OK;
}

static ps_status walk_tick(walk *w, uint32_t i, ps_err *err)
{
    const ps_tick *k = &w->ticks->tick[i];
    uint64_t start = w->now[k->stream], end = 0;
    int32_t cause = w->last[k->stream];
    mark *m = NULL;
    if (k->kind > PS_TICK_RUN) {
        ps_status status = find_mark(w, k, i, &m, err);
        if (status != PS_OK) return status;
    }
    bool waits = k->kind == PS_TICK_WAIT || k->kind == PS_TICK_FLAG_WAIT;
    if (waits && m->at_ns > start) {
        start = m->at_ns;
        cause = m->tick;
    }
    if (!ps_add_u64(start, w->ns[i], &end))
        return ps_fail_field(err, PS_EREQUEST, "ns", "durations of ticks overflow at tick %u", i);
    if (m != NULL && !waits) *m = (mark){.at_ns = end, .tick = (int32_t)i};
    w->cause[i] = cause;
    w->end_ns[i] = end;
    w->now[k->stream] = end;
    w->last[k->stream] = (int32_t)i;
    return PS_OK;
}

static void sum_up(const walk *w, ps_makespan *out)
{
    int32_t at = -1;
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (w->last[s] >= 0 && (at < 0 || w->now[s] > out->total_ns)) {
            out->total_ns = w->now[s];
            at = w->last[s];
        }
    for (uint32_t i = 0; i < w->ticks->n_ticks; i++)
        if (w->ticks->tick[i].kind <= PS_TICK_RUN)
            out->busy_ns[w->ticks->tick[i].stream] += w->ns[i];
    for (; at >= 0; at = w->cause[at]) {
        const ps_tick *k = &w->ticks->tick[at];
        if (k->kind <= PS_TICK_RUN)
            out->critical_ns[k->stream] += w->ns[at];
        else
            out->critical_sync_ns += w->ns[at];
    }
}

static ps_status walk_all(walk *w, ps_makespan *out, ps_err *err)
{
    for (uint32_t i = 0; i < w->ticks->n_events; i++) w->event[i].tick = -1;
    for (uint32_t i = 0; i < w->ticks->n_flags; i++) w->flag[i].tick = -1;
    for (int s = 0; s < PS_STREAM_COUNT; s++) w->last[s] = -1;
    for (uint32_t i = 0; i < w->ticks->n_ticks; i++) {
        ps_status status = walk_tick(w, i, err);
        if (status != PS_OK) return status;
    }
    sum_up(w, out);
    return PS_OK;
}

ps_status ps_simulate_run(
    const ps_ticks *ticks, const uint64_t *ns, uint64_t *end_ns, ps_makespan *out, ps_err *err)
{
    *out = (ps_makespan){0};
    uint64_t *own_end =
        end_ns == NULL ? ps_alloc((uint64_t)ticks->n_ticks + 1, sizeof *end_ns) : NULL;
    walk w = {.ticks = ticks,
        .ns = ns,
        .end_ns = end_ns != NULL ? end_ns : own_end,
        .cause = ps_alloc((uint64_t)ticks->n_ticks + 1, sizeof *w.cause),
        .event = ps_alloc((uint64_t)ticks->n_events + 1, sizeof *w.event),
        .flag = ps_alloc((uint64_t)ticks->n_flags + 1, sizeof *w.flag)};
    ps_status status = PS_OK;
    if (w.end_ns == NULL || w.cause == NULL || w.event == NULL || w.flag == NULL)
        status = ps_fail(err, PS_ENOMEM, "no host memory to simulate %u ticks", ticks->n_ticks);
    else
        status = walk_all(&w, out, err);
    ps_free(own_end);
    ps_free(w.cause);
    ps_free(w.event);
    ps_free(w.flag);
    return status;
}
