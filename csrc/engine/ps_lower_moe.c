/* ps_lower_moe - layers with experts: routing, groups of streamed experts, both sides at once. See
 * ps_lower_priv.h. */
#include "engine/ps_lower_priv.h"

/* ---- experts ----
 * Those that stream come in groups that fit the ring. Each group has pointer tables of its own, in
 * which experts that are elsewhere are null; resident ones ride with the first group. `owned` tells
 * MOE_COMBINE which rows were made here.
 *
 * In passes of few tokens most experts of a layer go unused, and which ones is known only once the
 * router has run. Those passes copy no streamed experts: the tables hold the addresses at which the
 * GPU reaches host memory. An op gathers what was routed into the ring, with few enough reads under
 * way that nothing else has to queue for the bus, and writes the tables that the ops on experts go
 * by. Where the ring is too small for an image an assignment, those read host memory themselves.
 *
 * Experts that bus and CPU divide (ps_plan_share) are placed one by one for passes that do not
 * gather. There the layer waits for whichever side got more of what was routed, which is mostly
 * more than its share. Passes that gather divide what was routed: each side finds from the routing
 * alone which are its own, and writes its tables by that, the CPU too. */

typedef struct expert_plan {
    expert_group *group; /* lowering->groups */
    uint32_t n_groups;
    uint32_t owned; /* tables of expert addresses that MOE_COMBINE looks at */
    /* Where experts are gathered: tables of whole images, on the GPU in place of group 0's; where
     * that divides them, on both sides, and `owned` is what the gather leaves. */
    bool gathers;
    uint32_t mapped, resident, shared;
    uint32_t share; /* of divided experts, the bus's (ps_plan_share); 0: none are divided */
    bool any[PS_SIDE_COUNT]; /* does any expert of the layer compute there */
} expert_plan;

/* Does this expert travel through the ring, or stay where it is? */
static bool rides(const lowering *l, uint32_t unit)
{
    return ps_lower_is_streamed(l, unit) && !ps_lower_is_mapped(l, unit);
}

static uint64_t ring_share(const lowering *l, uint32_t unit) /* what an expert takes in a group */
{
    return ps_div_up_u64(l->model->units[unit].n_bytes, PS_WEIGHT_ALIGN) * PS_WEIGHT_ALIGN;
}

static void cut_groups(const lowering *l, uint32_t layer, expert_plan *p)
{
    uint32_t ne = l->hp->n_expert, first = (uint32_t)l->model->layers[layer].first_expert;
    bool none = ps_lower_maps_all(l); /* rides, of this pass */
    uint64_t ring = ps_lower_ring_bytes(l), total = 0, most = ring,
             quarter = ps_max_u64(l->plan->spec.n_slots / 4, 1) * l->plan->spec.slot_bytes;
    for (uint32_t i = 0; i < ne && !none; i++)
        if (rides(l, first + i)) total += ring_share(l, first + i);
    /* A quarter of the ring a group, so that one is used while others travel (with halves, what a
     * group holds back is so much that attention's turn shows as a gap on the bus). But where all
     * of them fit and several chunks want them, they stay until the last has had them. */
    if (total > ring || l->n_chunks == 1) most = quarter;
    p->n_groups = 1;
    p->group[0] = (expert_group){0};
    if (total == 0) return;
    for (uint32_t i = 0; i < ne; i++) {
        if (!rides(l, first + i)) continue;
        expert_group *g = &p->group[p->n_groups - 1];
        if (g->n_bytes > 0 && g->n_bytes + ring_share(l, first + i) > most) {
            g = &p->group[p->n_groups++];
            *g = (expert_group){0};
        }
        if (g->n_bytes == 0) g->first = i;
        g->n = i + 1 - g->first;
        g->n_here++;
        g->n_bytes += ring_share(l, first + i);
    }
}

static void set_expert(lowering *l, ps_side side, const expert_group *g, uint32_t i, uint32_t unit)
{
    ps_emit_table_set(l->e, side, g->gate + i,
        ps_lower_at_weight(l, side, unit, ps_model_find(l->model, unit, PS_W_GATE)));
    ps_emit_table_set(l->e, side, g->up + i,
        ps_lower_at_weight(l, side, unit, ps_model_find(l->model, unit, PS_W_UP)));
    ps_emit_table_set(l->e, side, g->down + i,
        ps_lower_at_weight(l, side, unit, ps_model_find(l->model, unit, PS_W_DOWN)));
}

/* Whether some experts stream, all of them from where the GPU can read them, and the ring holds an
 * image for each assignment of a chunk. */
static bool gathers(const lowering *l, uint32_t layer)
{
    uint32_t ne = l->hp->n_expert, first = (uint32_t)l->model->layers[layer].first_expert,
             n_tok = l->n_chunks > 1 ? l->plan->spec.chunk_tok : l->shape.n_tok;
    uint64_t n_assign = (uint64_t)n_tok * l->hp->n_expert_used;
    if (!l->maps_experts) return false;
    if (ring_share(l, first) > ps_lower_ring_bytes(l) / n_assign) return false;
    bool any = false;
    for (uint32_t i = 0; i < ne; i++) {
        if (!ps_lower_is_streamed(l, first + i)) continue;
        if (!ps_lower_is_mapped(l, first + i)) return false;
        any = true;
    }
    return any;
}

/* The bus's share of a layer's divided experts, if the GPU can read all of them; else 0. */
static uint32_t share_of(const lowering *l, uint32_t layer)
{
    uint32_t first = (uint32_t)l->model->layers[layer].first_expert, found = 0;
    for (uint32_t i = 0; i < l->hp->n_expert; i++) {
        uint32_t share = ps_plan_share(l->plan, l->shape.tier, first + i);
        if (share > 0 && !ps_lower_is_mapped(l, first + i)) return 0;
        if (share > 0) found = share;
    }
    return found;
}

/* An expert in the tables of a layer that gathers. */
static void set_image(lowering *l, const expert_plan *p, uint32_t i, uint32_t unit)
{
    const ps_weight whole = {.offset = 0};
    ps_side side = ps_plan_side(l->plan, l->shape.tier, unit);
    bool shared = p->share > 0 && ps_plan_share(l->plan, l->shape.tier, unit) > 0;
    uint32_t table = shared ? p->shared : ps_lower_is_streamed(l, unit) ? p->mapped : p->resident;
    for (int s = 0; s < PS_SIDE_COUNT; s++)
        if (shared || s == (int)side)
            ps_emit_table_set(
                l->e, (ps_side)s, table + i, ps_lower_at_weight(l, (ps_side)s, unit, &whole));
    if (p->share == 0)
        ps_emit_table_set(l->e, side, p->owned + i, ps_lower_at_weight(l, side, unit, &whole));
}

static void plan_experts(lowering *l, uint32_t layer, expert_plan *p)
{
    uint32_t ne = l->hp->n_expert, first = (uint32_t)l->model->layers[layer].first_expert;
    *p = (expert_plan){.group = l->groups, .gathers = gathers(l, layer)};
    p->share = p->gathers ? share_of(l, layer) : 0;
    cut_groups(l, layer, p);
    for (uint32_t g = 0; g < p->n_groups; g++) {
        p->group[g].gate = ps_emit_table(l->e, ne);
        p->group[g].up = ps_emit_table(l->e, ne);
        p->group[g].down = ps_emit_table(l->e, ne);
    }
    p->mapped = p->group[0].gate;
    p->resident = p->group[0].up;
    p->owned = p->n_groups == 1 ? p->group[0].down : ps_emit_table(l->e, ne);
    p->shared = p->group[0].down; /* where these are, nobody asks for `owned` */
    for (uint32_t i = 0; i < ne; i++) {
        ps_side side = ps_plan_side(l->plan, l->shape.tier, first + i);
        p->any[side] = true;
        if (l->measures) continue; /* of thousands of experts the tables are most of the work */
        if (p->share > 0 || (p->gathers && side == PS_SIDE_DEV))
            set_image(l, p, i, first + i);
        else if (!rides(l, first + i)) {
            set_expert(l, side, &p->group[0], i, first + i);
            p->group[0].n_here += side == PS_SIDE_DEV;
        }
        /* Any address will do for "made here"; that of the table itself is never null. */
        if (p->n_groups > 1)
            ps_emit_table_set(
                l->e, side, p->owned + i, ps_ref(PS_SPACE_HOST_CONST, l->plan->tables_offset));
    }
}

/* Sees to it that a group lies in the ring and its tables say where. One that comes again (other
 * groups took its slots) goes where it was, because its tables are already written. */
static void stream_group(lowering *l, uint32_t layer, const expert_group *g)
{
    uint32_t first = (uint32_t)l->model->layers[layer].first_expert, owner = first + g->first;
    if (g->n_bytes == 0) return;
    bool again = l->ring_at[owner] != UINT64_MAX;
    uint64_t at = l->ring_at[owner], slot = l->plan->spec.slot_bytes;
    if (again && ps_lower_is_live(l, (int32_t)owner, at, g->n_bytes)) return;
    if (again) l->next_slot = (uint32_t)(at / slot);
    at = ps_lower_take_slots(l, (int32_t)owner, g->n_bytes);
    l->ring_at[owner] = at;
    if (l->measures) return;
    for (uint32_t i = g->first; i < g->first + g->n; i++) {
        if (!rides(l, first + i)) continue;
        l->ring_at[first + i] = at;
        ps_lower_copy_pieces(l, first + i, at, 0, l->model->units[first + i].n_bytes);
        if (!again) set_expert(l, PS_SIDE_DEV, g, i, first + i);
        at += ring_share(l, first + i);
    }
}

typedef struct route_refs {
    ps_dptr ids, weights, order, starts;
    uint64_t n_bytes; /* of all, one after another */
} route_refs;

static route_refs routes(const lowering *l, ps_side side, uint32_t n_tok)
{
    uint64_t part = (uint64_t)n_tok * l->hp->n_expert_used * sizeof(int32_t);
    ps_dptr base = in_buf(l, side, PS_BUF_ROUTE, 0);
    return (route_refs){base, ps_dptr_add(base, part), ps_dptr_add(base, 2 * part),
        ps_dptr_add(base, 3 * part), 3 * part + (l->hp->n_expert + 1) * sizeof(int32_t)};
}

typedef struct expert_tables { /* what the ops on experts go by */
    ps_dptr gate, up, down;
    uint32_t n_here; /* how many experts they name; 0: the routing decides */
    ps_range ring;   /* what of it they point to; n_bytes 0: nothing */
} expert_tables;

/* Of a group that has been streamed. */
static expert_tables tables_of(
    const lowering *l, uint32_t layer, ps_side side, const expert_group *g)
{
    uint32_t first = (uint32_t)l->model->layers[layer].first_expert;
    uint64_t at = l->plan->tables_offset;
    expert_tables t = {.gate = in_const(side, at + g->gate * sizeof(ps_dptr)),
        .up = in_const(side, at + g->up * sizeof(ps_dptr)),
        .down = in_const(side, at + g->down * sizeof(ps_dptr)),
        .n_here = side == PS_SIDE_DEV ? g->n_here : 0};
    if (side == PS_SIDE_DEV && g->n_bytes > 0)
        t.ring = (ps_range){
            ps_ref(PS_SPACE_DEV_RING, l->ring_at[first + g->first]), g->n_bytes, PS_READ};
    return t;
}

/* Where MOE_COMBINE and the ops on experts find them behind a gather. */
static expert_tables gathered(const lowering *l, ps_side side)
{
    uint64_t table = l->hp->n_expert * sizeof(ps_dptr);
    return (expert_tables){.gate = in_buf(l, side, PS_BUF_PTRS, 0),
        .up = in_buf(l, side, PS_BUF_PTRS, table),
        .down = in_buf(l, side, PS_BUF_PTRS, 2 * table)};
}

/* Brings the routed experts of a chunk into the ring, or finds those that are the CPU's, and says
 * where they are. */
static expert_tables gather(lowering *l, uint32_t layer, chunk c, const expert_plan *p)
{
    uint32_t router = (uint32_t)l->model->layers[layer].router, ne = l->hp->n_expert,
             first = (uint32_t)l->model->layers[layer].first_expert;
    uint64_t image_bytes = ring_share(l, first),
             n_bytes = (uint64_t)c.n * l->hp->n_expert_used * image_bytes,
             at = l->plan->tables_offset;
    expert_tables t = gathered(l, c.side);
    if (c.side == PS_SIDE_DEV)
        t.ring =
            (ps_range){ps_ref(PS_SPACE_DEV_RING, ps_lower_take_slots(l, PS_RING_NOBODY, n_bytes)),
                n_bytes, PS_READ};
    ps_gather_experts_args a = {.ids = routes(l, c.side, c.n).ids,
        .mapped = in_const(c.side, at + p->mapped * sizeof(ps_dptr)),
        .resident = in_const(c.side, at + p->resident * sizeof(ps_dptr)),
        .slots = t.ring.ref,
        .gate_ptrs = t.gate,
        .up_ptrs = t.up,
        .down_ptrs = t.down,
        .image_bytes = image_bytes,
        .gate_at = ps_model_find(l->model, first, PS_W_GATE)->offset,
        .up_at = ps_model_find(l->model, first, PS_W_UP)->offset,
        .down_at = ps_model_find(l->model, first, PS_W_DOWN)->offset,
        .n_tok = c.n,
        .k = l->hp->n_expert_used,
        .n_expert = ne,
        .share = p->share,
        .rest = c.side == PS_SIDE_HOST};
    if (p->share > 0) a.shared = in_const(c.side, at + p->shared * sizeof(ps_dptr));
    ps_emit_run(l->e, c.side, (int32_t)router, PS_OP_GATHER_EXPERTS, &a, NULL, 0);
    return t;
}

/* The routed experts that the tables of c.side name: y rows of their assignments. */
static void emit_experts(
    lowering *l, uint32_t layer, chunk c, const expert_tables *tables, ps_dptr y)
{
    const ps_hparams *hp = l->hp;
    uint32_t router = (uint32_t)l->model->layers[layer].router,
             expert = (uint32_t)l->model->layers[layer].first_expert;
    route_refs r = routes(l, c.side, c.n);
    ps_dptr h = in_buf(l, c.side, PS_BUF_H, 0);
    ps_range extra[PS_MAX_TIERS + 1] = {tables->ring}; /* for the emitter */
    uint32_t n_extra = tables->ring.n_bytes > 0 ? 1 : 0;
    if (c.side == PS_SIDE_DEV) n_extra += ps_lower_resident_experts(l, layer, extra + n_extra);
    ps_moe_up_args up = {.x = in_buf(l, c.side, PS_BUF_NORM, 0),
        .out = h,
        .ids = r.ids,
        .order = r.order,
        .starts = r.starts,
        .gate_ptrs = tables->gate,
        .up_ptrs = tables->up,
        .gate_bias = ps_lower_vector(l, c.side, router, PS_W_GATE_B),
        .up_bias = ps_lower_vector(l, c.side, router, PS_W_UP_B),
        .n_tok = c.n,
        .k = hp->n_expert_used,
        .n_expert = hp->n_expert,
        .n_cols = hp->n_embd,
        .n_ff = hp->n_ff_expert,
        .ldx = hp->n_embd,
        .fmt_gate = ps_model_find(l->model, expert, PS_W_GATE)->fmt,
        .fmt_up = ps_model_find(l->model, expert, PS_W_UP)->fmt,
        .act = hp->act,
        .n_here = tables->n_here};
    ps_emit_run(l->e, c.side, (int32_t)router, PS_OP_MOE_UP, &up, extra, n_extra);
    ps_moe_down_args down = {.h = h,
        .y = y,
        .ids = r.ids,
        .order = r.order,
        .starts = r.starts,
        .down_ptrs = tables->down,
        .bias = ps_lower_vector(l, c.side, router, PS_W_DOWN_B),
        .n_tok = c.n,
        .k = hp->n_expert_used,
        .n_expert = hp->n_expert,
        .n_ff = hp->n_ff_expert,
        .n_rows = hp->n_embd,
        .fmt = ps_model_find(l->model, expert, PS_W_DOWN)->fmt,
        .n_here = tables->n_here};
    ps_emit_run(l->e, c.side, (int32_t)router, PS_OP_MOE_DOWN, &down, extra, n_extra);
}

/* All groups on one side. */
static void emit_groups(lowering *l, uint32_t layer, chunk c, expert_plan *p, ps_dptr y)
{
    uint32_t n = c.side == PS_SIDE_DEV ? p->n_groups : 1;
    for (uint32_t g = 0; g < n; g++) {
        if (c.side == PS_SIDE_DEV) stream_group(l, layer, &p->group[g]);
        expert_tables t = p->share > 0 || (c.side == PS_SIDE_DEV && p->gathers)
                              ? gather(l, layer, c, p)
                              : tables_of(l, layer, c.side, &p->group[g]);
        emit_experts(l, layer, c, &t, y);
    }
}

static void lower_experts(lowering *l, uint32_t layer, chunk c, expert_plan *p)
{
    const ps_hparams *hp = l->hp;
    uint32_t router = (uint32_t)l->model->layers[layer].router;
    ps_side far = other(c.side);
    ps_dptr norm = in_buf(l, c.side, PS_BUF_NORM, 0), logits = in_buf(l, c.side, PS_BUF_ROUTER, 0);
    route_refs r = routes(l, c.side, c.n);
    uint64_t n_x = (uint64_t)c.n * hp->n_embd, n_y = n_x * hp->n_expert_used;

    ps_lower_move_x(l, c);
    ps_lower_emit_norm(l, c, router, PS_W_NORM, chunk_x(l, c), (ps_dptr){0}, norm, c.n);
    ps_lower_emit_matmul(l, c, router, norm, c.n, hp->n_embd,
        &(linear){PS_W_ROUTER, PS_W_ROUTER_B, logits, hp->n_expert}, 1, false);
    ps_route_args route = {.logits = logits,
        .ids = r.ids,
        .weights = r.weights,
        .order = r.order,
        .starts = r.starts,
        .n_tok = c.n,
        .n_expert = hp->n_expert,
        .k = hp->n_expert_used,
        .renorm = hp->renorm_experts};
    ps_emit_run(l->e, c.side, (int32_t)router, PS_OP_ROUTE, &route, NULL, 0);

    ps_dptr y = in_buf(l, c.side, PS_BUF_Y, 0), y_other = {0};
    if (p->any[far]) { /* the far side starts first, so that both work at once */
        chunk fc = c;
        fc.side = far;
        y_other = c.side == PS_SIDE_DEV ? ps_lower_mapped(in_buf(l, far, PS_BUF_Y, 0))
                                        : in_buf(l, c.side, PS_BUF_Y_OTHER, 0);
        ps_lower_hand_over(l, (int32_t)router, in_buf(l, far, PS_BUF_NORM, 0), norm, n_x);
        ps_lower_hand_over(
            l, (int32_t)router, routes(l, far, c.n).ids, r.ids, r.n_bytes / sizeof(int32_t));
        emit_groups(l, layer, fc, p, in_buf(l, far, PS_BUF_Y, 0));
    }
    if (p->any[c.side]) emit_groups(l, layer, c, p, y);
    if (p->any[far] && far == PS_SIDE_DEV)
        ps_lower_hand_over(l, (int32_t)router, y_other, in_buf(l, far, PS_BUF_Y, 0), n_y);
    ps_moe_combine_args combine = {.y = p->any[c.side] ? y : y_other,
        .y_other = y_other,
        .down_ptrs = p->share > 0
                         ? gathered(l, c.side).down
                         : in_const(c.side, l->plan->tables_offset + p->owned * sizeof(ps_dptr)),
        .ids = r.ids,
        .weights = r.weights,
        .residual = chunk_x(l, c),
        .out = chunk_x(l, c),
        .n_tok = c.n,
        .k = hp->n_expert_used,
        .n_expert = hp->n_expert,
        .n = hp->n_embd};
    ps_emit_run(l->e, c.side, (int32_t)router, PS_OP_MOE_COMBINE, &combine, NULL, 0);
    ps_lower_wrote_x(l, c);
}

void ps_lower_moe(lowering *l, uint32_t layer)
{
    ps_side side = ps_plan_side(l->plan, l->shape.tier, (uint32_t)l->model->layers[layer].router);
    expert_plan p;
    plan_experts(l, layer, &p);
    for (uint32_t i = 0; i < l->n_chunks; i++) lower_experts(l, layer, get_chunk(l, i, side), &p);
}
