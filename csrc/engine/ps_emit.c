/* ps_emit - builds a tick list from steps in program order. Lowering says what happens as if there
 * were one thread; this file finds, from the memory that each step touches, which steps of other
 * streams it must wait for, and adds exactly those waits.
 *
 * Why no wait is redundant: a wait is added only where the vector clock of the waiting stream does
 * not already cover the step waited for, and of several candidates those that another one implies
 * are dropped. So taking away any RECORD, WAIT or flag leaves some access unordered, which the
 * checker proves for each.
 */
#include "engine/ps_ticks.h"

#include <string.h>

#include "engine/ps_intervals.h"

typedef struct clock_t4 {
    uint32_t at[PS_STREAM_COUNT];
} clock_t4;

typedef struct node { /* one RUN or COPY, or a wait before one */
    ps_tick tick;
    clock_t4 clock;     /* RUN, COPY: what is known to be done once this is done */
    int32_t sync_event; /* a RECORD is wanted behind this tick; -1: none. WAIT: node of the tick
                           waited for */
    int32_t sync_flag;
} node;

struct ps_emitter {
    ps_ticks *ticks; /* owns until finish */
    bool measure;
    ps_status status; /* first failure */
    node *nodes;      /* owns */
    uint32_t n_nodes, cap_nodes;
    clock_t4 known[PS_STREAM_COUNT]; /* what each stream has waited for; own entry: steps emitted on
                                        it */
    ps_intervals sets[PS_SPACE_COUNT];
    /* of the step being emitted */
    uint32_t stream;
    int32_t need[PS_STREAM_COUNT]; /* latest step of each other stream that must be done first; -1:
                                      none */
    bool writing;
    uint32_t n_table;
};

static bool grow(ps_emitter *e, void **array, uint32_t *cap, uint64_t need, size_t size)
{
    if (need <= *cap) return true;
    uint64_t want = need * 2 < 64 ? 64 : need * 2;
    void *p = want <= UINT32_MAX ? ps_realloc(*array, want, size) : NULL;
    if (p == NULL) {
        e->status = PS_ENOMEM;
        return false;
    }
    *array = p;
    *cap = (uint32_t)want;
    return true;
}

ps_status ps_emitter_create(
    const ps_plan *plan, const ps_pass_shape *shape, bool measure, ps_emitter **out, ps_err *err)
{
    *out = NULL;
    ps_emitter *e = ps_alloc(1, sizeof *e);
    ps_ticks *ticks = ps_alloc(1, sizeof *ticks);
    if (e == NULL || ticks == NULL) {
        ps_free(e);
        ps_free(ticks);
        return ps_fail(err, PS_ENOMEM, "no host memory to lower a pass");
    }
    ticks->plan = plan;
    ticks->shape = *shape;
    e->ticks = ticks;
    e->measure = measure;
    *out = e;
    return PS_OK;
}

void ps_emitter_destroy(ps_emitter *e)
{
    if (e == NULL) return;
    ps_ticks_destroy(e->ticks);
    ps_free(e->nodes);
    for (int i = 0; i < PS_SPACE_COUNT; i++) ps_intervals_fini(&e->sets[i]);
    ps_free(e);
}

ps_ticks *ps_emitter_ticks(ps_emitter *e)
{
    return e->ticks;
}
ps_status ps_emitter_status(const ps_emitter *e)
{
    return e->status;
}

static node *push_node(ps_emitter *e, ps_tick tick)
{
    if (!grow(e, (void **)&e->nodes, &e->cap_nodes, (uint64_t)e->n_nodes + 1, sizeof *e->nodes))
        return NULL;
    node *n = &e->nodes[e->n_nodes++];
    *n = (node){.tick = tick, .sync_event = -1, .sync_flag = -1};
    return n;
}

/* ---- finding what to wait for ---- */

static void depend(ps_emitter *e, int32_t i_node)
{
    if (i_node < 0) return;
    const node *n = &e->nodes[i_node];
    uint32_t s = n->tick.stream, at = n->clock.at[s];
    if (s == e->stream || e->known[e->stream].at[s] >= at) return;
    if (e->need[s] < 0 || e->nodes[e->need[s]].clock.at[s] < at) e->need[s] = i_node;
}

static void found(void *ctx, const ps_interval *piece)
{
    ps_emitter *e = ctx;
    depend(e, piece->writer);
    if (e->writing)
        for (int s = 0; s < PS_STREAM_COUNT; s++) depend(e, piece->reader[s]);
}

static void ignore(void *ctx, const ps_interval *piece)
{
    (void)ctx;
    (void)piece;
}

static void learn(clock_t4 *to, const clock_t4 *from)
{
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (to->at[s] < from->at[s]) to->at[s] = from->at[s];
}

static bool by_flag(uint32_t a, uint32_t b)
{
    return a == PS_STREAM_CPU || b == PS_STREAM_CPU;
}

static void add_waits(ps_emitter *e)
{
    for (int s = 0; s < PS_STREAM_COUNT; s++) {
        if (e->need[s] < 0) continue;
        uint32_t at = e->nodes[e->need[s]].clock.at[s];
        for (int o = 0; o < PS_STREAM_COUNT; o++) /* implied by another wait of this step? */
            if (o != s && e->need[o] >= 0 && e->nodes[e->need[o]].clock.at[s] >= at) {
                e->need[s] = -1;
                break;
            }
    }
    for (int s = 0; s < PS_STREAM_COUNT; s++) {
        int32_t i = e->need[s];
        if (i < 0) continue;
        bool flag = by_flag((uint32_t)s, e->stream);
        node *w = push_node(e, (ps_tick){.kind = flag ? PS_TICK_FLAG_WAIT : PS_TICK_WAIT,
                                   .stream = (uint8_t)e->stream,
                                   .unit = -1});
        if (w == NULL) return;
        node *target = &e->nodes[i];
        if (flag) {
            if (target->sync_flag < 0) target->sync_flag = (int32_t)e->ticks->n_flags++;
            w->sync_flag = target->sync_flag;
        } else {
            target->sync_event = i; /* virtual number: the step itself; finish() packs them */
            w->sync_event = i;
        }
        learn(&e->known[e->stream], &target->clock);
    }
}

/* ---- steps ---- */

/* First what the step conflicts with, which decides the waits before it; then the step itself,
 * under its own number. */
static void add_step(ps_emitter *e, ps_tick tick, const ps_range *ranges, uint32_t n)
{
    e->stream = tick.stream;
    for (int s = 0; s < PS_STREAM_COUNT; s++) e->need[s] = -1;
    for (uint32_t i = 0; i < n; i++) {
        ps_space space = ps_ref_space(ps_ref_canonical(ranges[i].ref));
        if (!ps_pass_tracks(&e->ticks->shape, space) || ranges[i].n_bytes == 0) continue;
        uint64_t from = ps_ref_offset(ranges[i].ref);
        e->writing = (ranges[i].access & PS_WRITE) != 0;
        ps_intervals_look(&e->sets[space], from, from + ranges[i].n_bytes, found, e);
    }
    add_waits(e);
    int32_t number = (int32_t)e->n_nodes;
    for (uint32_t i = 0; i < n && e->status == PS_OK; i++) {
        ps_space space = ps_ref_space(ps_ref_canonical(ranges[i].ref));
        if (!ps_pass_tracks(&e->ticks->shape, space) || ranges[i].n_bytes == 0) continue;
        uint64_t from = ps_ref_offset(ranges[i].ref);
        bool write = (ranges[i].access & PS_WRITE) != 0;
        e->status = ps_intervals_touch(
            &e->sets[space], from, from + ranges[i].n_bytes, write, e->stream, number, ignore, e);
    }
    node *x = e->status == PS_OK ? push_node(e, tick) : NULL;
    if (x == NULL) return;
    e->known[e->stream].at[e->stream]++;
    x->clock = e->known[e->stream];
}

void ps_emit_copy(ps_emitter *e, bool in, int32_t unit, ps_dptr dst, ps_dptr src, uint64_t n_bytes)
{
    if (e->status != PS_OK || e->measure || n_bytes == 0) return;
    ps_range ranges[2] = {{dst, n_bytes, PS_WRITE}, {src, n_bytes, PS_READ}};
    add_step(e,
        (ps_tick){.kind = in ? PS_TICK_COPY_IN : PS_TICK_COPY_OUT,
            .stream = in ? PS_STREAM_H2D : PS_STREAM_D2H,
            .unit = unit,
            .dst = dst,
            .src = src,
            .n_bytes = n_bytes},
        ranges, 2);
}

/* Gives the op the shared workspace, if it wants one. */
static void set_workspace(ps_emitter *e, ps_op_kind op, ps_op_args *args)
{
    const ps_plan *plan = e->ticks->plan;
    uint64_t want = ps_op_workspace_bytes(op, args, plan->spec.sm);
    if (want > e->ticks->max_ws_bytes) e->ticks->max_ws_bytes = want;
    if (want == 0) return;
    if (!e->measure && want > plan->buf_bytes[PS_BUF_WS]) e->status = PS_EINTERNAL;
    ps_dptr ws = ps_ref(PS_SPACE_DEV_ACT, plan->buf_offset[PS_BUF_WS]);
    switch (op) {
    case PS_OP_MATMUL:
        args->matmul.ws = ws;
        args->matmul.ws_bytes = want;
        break;
    case PS_OP_ATTN:
        args->attn.ws = ws;
        args->attn.ws_bytes = want;
        break;
    case PS_OP_MOE_UP:
        args->moe_up.ws = ws;
        args->moe_up.ws_bytes = want;
        break;
    case PS_OP_MOE_DOWN:
        args->moe_down.ws = ws;
        args->moe_down.ws_bytes = want;
        break;
    default: e->status = PS_EINTERNAL; break; /* an op grew a workspace without a field for it */
    }
}

void ps_emit_run(ps_emitter *e, ps_side side, int32_t unit, ps_op_kind op, const void *args,
    const ps_range *extra, uint32_t n_extra)
{
    if (e->status != PS_OK) return;
    ps_op_args own = {0};
    uint32_t n_bytes = ps_op_args_bytes(op);
    memcpy(&own, args, n_bytes);
    if (side == PS_SIDE_DEV) set_workspace(e, op, &own);
    if (e->measure || e->status != PS_OK) return;
    ps_ticks *t = e->ticks;
    if (n_extra > UINT8_MAX ||
        !grow(e, (void **)&t->args, &t->cap_args, (uint64_t)t->args_bytes + n_bytes + 8, 1) ||
        !grow(e, (void **)&t->extra, &t->cap_extra, (uint64_t)t->n_extra + n_extra,
            sizeof *t->extra)) {
        if (e->status == PS_OK) e->status = PS_EINTERNAL;
        return;
    }
    ps_tick tick = {.kind = PS_TICK_RUN,
        .stream = side == PS_SIDE_DEV ? PS_STREAM_COMPUTE : PS_STREAM_CPU,
        .op = (uint8_t)op,
        .unit = unit,
        .index = t->args_bytes,
        .extra = t->n_extra,
        .n_extra = (uint8_t)n_extra};
    memcpy(t->args + t->args_bytes, &own, n_bytes);
    t->args_bytes += (n_bytes + 7u) / 8u * 8u;
    if (n_extra > 0) memcpy(t->extra + t->n_extra, extra, n_extra * sizeof *extra);
    t->n_extra += n_extra;

    ps_operand operands[PS_MAX_OPERANDS];
    ps_range ranges[PS_MAX_OPERANDS + UINT8_MAX];
    uint32_t n = ps_op_operands(op, &own, operands);
    for (uint32_t i = 0; i < n; i++) {
        ps_dptr ref;
        memcpy(&ref, (const unsigned char *)&own + operands[i].offset, sizeof ref);
        ranges[i] = (ps_range){ref, operands[i].n_bytes, operands[i].access};
    }
    if (n_extra > 0) memcpy(ranges + n, extra, n_extra * sizeof *extra);
    add_step(e, tick, ranges, n + n_extra);
}

/* Room for so many entries of tables in all. */
static void reserve_tables(ps_emitter *e, uint64_t n)
{
    for (int side = 0; side < PS_SIDE_COUNT && e->status == PS_OK && !e->measure; side++)
        grow(e, (void **)&e->ticks->table[side], &e->ticks->cap_table[side], n, sizeof(ps_dptr));
}

void ps_emit_expect_tables(ps_emitter *e, uint64_t n)
{
    reserve_tables(e, n / 2); /* grow() doubles */
}

uint32_t ps_emit_table(ps_emitter *e, uint32_t n)
{
    uint32_t first = e->n_table;
    reserve_tables(e, (uint64_t)first + n);
    e->n_table += n;
    e->ticks->n_table = e->n_table;
    return first;
}

void ps_emit_table_set(ps_emitter *e, ps_side side, uint32_t i, ps_dptr ref)
{
    if (e->status == PS_OK && !e->measure) e->ticks->table[side][i] = ref;
}

/* ---- finishing: RECORDs and FLAG_SETs go right behind the steps they mark; events get small
 * numbers ---- */

typedef struct event_map {
    int32_t last_wait; /* node index of the last WAIT for this step's event */
    uint32_t number;
} event_map;

static bool push_tick(ps_emitter *e, ps_tick tick)
{
    ps_ticks *t = e->ticks;
    if (!grow(e, (void **)&t->tick, &t->cap_ticks, (uint64_t)t->n_ticks + 1, sizeof *t->tick))
        return false;
    t->tick[t->n_ticks++] = tick;
    return true;
}

static void assemble(ps_emitter *e, event_map *map, uint32_t *free_numbers)
{
    uint32_t n_free = 0;
    for (uint32_t i = 0; i < e->n_nodes; i++)
        if (e->nodes[i].tick.kind == PS_TICK_WAIT)
            map[e->nodes[i].sync_event].last_wait = (int32_t)i;
    for (uint32_t i = 0; i < e->n_nodes && e->status == PS_OK; i++) {
        const node *n = &e->nodes[i];
        ps_tick tick = n->tick;
        if (tick.kind == PS_TICK_WAIT) {
            event_map *m = &map[n->sync_event];
            tick.index = m->number;
            push_tick(e, tick);
            /* Every wait on it is enqueued: the number may mark another step from here on. */
            if (m->last_wait == (int32_t)i) free_numbers[n_free++] = m->number;
            continue;
        }
        if (tick.kind == PS_TICK_FLAG_WAIT) tick.index = (uint32_t)n->sync_flag;
        push_tick(e, tick);
        if (tick.kind == PS_TICK_FLAG_WAIT) continue;
        if (n->sync_event >= 0) {
            map[i].number = n_free > 0 ? free_numbers[--n_free] : e->ticks->n_events++;
            push_tick(e, (ps_tick){.kind = PS_TICK_RECORD,
                             .stream = tick.stream,
                             .unit = -1,
                             .index = map[i].number});
        }
        if (n->sync_flag >= 0)
            push_tick(e, (ps_tick){.kind = PS_TICK_FLAG_SET,
                             .stream = tick.stream,
                             .unit = -1,
                             .index = (uint32_t)n->sync_flag});
    }
}

ps_status ps_emitter_finish(ps_emitter *e, ps_ticks **out, ps_err *err)
{
    *out = NULL;
    event_map *map = ps_alloc((uint64_t)e->n_nodes + 1, sizeof *map);
    uint32_t *free_numbers = ps_alloc((uint64_t)e->n_nodes + 1, sizeof *free_numbers);
    if (map == NULL || free_numbers == NULL)
        e->status = PS_ENOMEM;
    else if (e->status == PS_OK)
        assemble(e, map, free_numbers);
    ps_free(map);
    ps_free(free_numbers);
    if (e->status == PS_ENOMEM) return ps_fail(err, PS_ENOMEM, "no host memory for the tick list");
    if (e->status != PS_OK)
        return ps_fail(err, e->status, "internal error: lowering broke its own sizes");
    *out = e->ticks;
    e->ticks = NULL;
    return PS_OK;
}
