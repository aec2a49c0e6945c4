/* ps_check - proves a tick list free of races, by its own reckoning: vector clocks advanced along
 * the list as the device would see it enqueued, and the memory that each step says it touches. It
 * shares with the emitter only the interval set and the ops' own statement of their operands.
 */
#include <stdio.h>
#include <string.h>

#include "engine/ps_intervals.h"
#include "engine/ps_ticks.h"

typedef struct clock_t4 {
    uint32_t at[PS_STREAM_COUNT]; /* steps of each stream known to be done */
} clock_t4;

enum { THERE_BEFORE = -2 }; /* as the writer of an interval: no tick, but somebody */

typedef struct checker {
    const ps_ticks *ticks;
    clock_t4 now[PS_STREAM_COUNT];
    clock_t4 *event, *flag; /* owns; what a waiter learns */
    bool *recorded, *set;   /* owns */
    uint32_t *step; /* owns; [n_ticks] number of the tick among the steps of its stream, from 1 */
    ps_intervals sets[PS_SPACE_COUNT];
    /* the access being checked */
    uint32_t i_tick, stream;
    bool write, needs_content;
    ps_dptr ref;
    ps_err *err;
    ps_status status;
} checker;

static void describe(const ps_ticks *t, uint32_t i, char *out, size_t cap)
{
    static const char *const names[] = {
        "copy_in", "copy_out", "run", "record", "wait", "flag_set", "flag_wait"};
    const ps_tick *k = &t->tick[i];
    snprintf(out, cap, "tick %u (%s on %s%s%s)", i,
        k->kind == PS_TICK_RUN ? ps_op_name((ps_op_kind)k->op) : names[k->kind],
        ps_stream_role_name((ps_stream_role)k->stream), k->unit >= 0 ? ", " : "",
        k->unit >= 0 ? t->plan->model->units[k->unit].name : "");
}

static void require(checker *c, int32_t earlier, const char *what)
{
    if (earlier < 0 || c->status != PS_OK || (uint32_t)earlier == c->i_tick) return;
    uint32_t s = c->ticks->tick[earlier].stream;
    if (s == c->stream || c->now[c->stream].at[s] >= c->step[earlier]) return;
    char a[128], b[128];
    describe(c->ticks, c->i_tick, a, sizeof a);
    describe(c->ticks, (uint32_t)earlier, b, sizeof b);
    c->status = ps_fail(c->err, PS_EPLAN, "%s is not ordered after %s, which %s %s+%llu", a, b,
        what, ps_space_name(ps_ref_space(c->ref)), (unsigned long long)ps_ref_offset(c->ref));
}

/* Order is not all: what an op reads from a slot must be bytes of its own unit (of an expert of its
 * layer, for ops on experts), not what a later load has put there. */
static void check_slot(checker *c, const ps_interval *piece)
{
    if (ps_ref_space(c->ref) != PS_SPACE_DEV_RING || c->write || c->status != PS_OK) return;
    const ps_unit *units = c->ticks->plan->model->units;
    const ps_tick *reader = &c->ticks->tick[c->i_tick];
    const ps_tick *writer = piece->writer >= 0 ? &c->ticks->tick[piece->writer] : NULL;
    if (writer != NULL && writer->unit >= 0 && reader->unit >= 0 &&
        (writer->unit == reader->unit ||
            (units[writer->unit].kind == PS_UNIT_EXPERT &&
                units[writer->unit].layer == units[reader->unit].layer)))
        return;
    char a[128];
    describe(c->ticks, c->i_tick, a, sizeof a);
    c->status = ps_fail(c->err, PS_EPLAN, "%s reads a slot that holds %s", a,
        writer != NULL && writer->unit >= 0 ? units[writer->unit].name : "nothing of this pass");
}

static void on_piece(void *ctx, const ps_interval *piece)
{
    checker *c = ctx;
    if (c->needs_content && piece->writer == -1 && c->status == PS_OK) {
        char a[128];
        describe(c->ticks, c->i_tick, a, sizeof a);
        c->status =
            ps_fail(c->err, PS_EPLAN, "%s reads %s+%llu, which nothing in the pass has written", a,
                ps_space_name(ps_ref_space(c->ref)), (unsigned long long)piece->from);
    }
    require(c, piece->writer, "writes");
    check_slot(c, piece);
    if (c->write)
        for (int s = 0; s < PS_STREAM_COUNT; s++) require(c, piece->reader[s], "reads");
}

static ps_status check_bounds(checker *c, const ps_range *r)
{
    const ps_plan *p = c->ticks->plan;
    ps_space space = ps_ref_space(r->ref);
    uint64_t from = ps_ref_offset(r->ref), end = 0, limit = 0;
    if (space == PS_SPACE_NONE || space >= PS_SPACE_COUNT)
        return ps_fail(c->err, PS_EPLAN, "tick %u refers to no memory", c->i_tick);
    if (space == PS_SPACE_HOST_WEIGHTS) {
        uint64_t unit = from >> PS_IMAGE_SHIFT;
        if (unit >= p->model->n_units)
            return ps_fail(
                c->err, PS_EPLAN, "tick %u refers to a unit that is not there", c->i_tick);
        from &= (1ull << PS_IMAGE_SHIFT) - 1;
        limit = p->model->units[unit].n_bytes;
    } else if (space == PS_SPACE_OUT) {
        limit = (uint64_t)c->ticks->shape.n_out * p->model->hp.n_vocab * sizeof(float);
    } else {
        limit = p->space_bytes[space];
    }
    if (!ps_add_u64(from, r->n_bytes, &end) || end > limit) {
        char a[128];
        describe(c->ticks, c->i_tick, a, sizeof a);
        return ps_fail(c->err, PS_EPLAN, "%s touches %s+%llu, %llu bytes, beyond its %llu bytes", a,
            ps_space_name(space), (unsigned long long)from, (unsigned long long)r->n_bytes,
            (unsigned long long)limit);
    }
    return PS_OK;
}

static ps_status check_step(checker *c)
{
    ps_range ranges[PS_MAX_OPERANDS + UINT8_MAX];
    uint32_t n = ps_tick_ranges(c->ticks, c->i_tick, ranges, PS_MAX_OPERANDS + UINT8_MAX);
    for (uint32_t j = 0; j < n; j++) {
        ps_status status = check_bounds(c, &ranges[j]);
        if (status != PS_OK) return status;
        ranges[j].ref = ps_ref_canonical(ranges[j].ref);
        ps_space space = ps_ref_space(ranges[j].ref);
        if (!ps_pass_tracks(&c->ticks->shape, space)) continue;
        uint64_t from = ps_ref_offset(ranges[j].ref);
        bool read = (ranges[j].access & PS_READ) != 0;
        c->write = (ranges[j].access & PS_WRITE) != 0;
        c->ref = ranges[j].ref;
        /* Activations live for one pass: reading what the pass has not written is reading rubbish,
         * and so is reading residents that were neither there nor brought in. */
        c->needs_content =
            read && (space == PS_SPACE_DEV_ACT || space == PS_SPACE_HOST_ACT ||
                        space == PS_SPACE_DEV_BATCH || space == PS_SPACE_DEV_WEIGHTS);
        if (ps_intervals_touch(&c->sets[space], from, from + ranges[j].n_bytes, c->write, c->stream,
                (int32_t)c->i_tick, on_piece, c) != PS_OK)
            return ps_fail(c->err, PS_ENOMEM, "no host memory to check a plan");
        if (c->status != PS_OK) return c->status;
    }
    return PS_OK;
}

static void learn(clock_t4 *to, const clock_t4 *from)
{
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (to->at[s] < from->at[s]) to->at[s] = from->at[s];
}

static ps_status check_sync(checker *c, const ps_tick *k)
{
    bool flag = k->kind == PS_TICK_FLAG_SET || k->kind == PS_TICK_FLAG_WAIT;
    uint32_t n = flag ? c->ticks->n_flags : c->ticks->n_events;
    clock_t4 *marks = flag ? c->flag : c->event;
    bool *done = flag ? c->set : c->recorded;
    if (k->index >= n)
        return ps_fail(c->err, PS_EPLAN, "tick %u uses %s %u of %u", c->i_tick,
            flag ? "flag" : "event", k->index, n);
    if (!flag && k->stream == PS_STREAM_CPU)
        return ps_fail(
            c->err, PS_EPLAN, "tick %u: the CPU stream takes flags, not events", c->i_tick);
    if (k->kind == PS_TICK_RECORD || k->kind == PS_TICK_FLAG_SET) {
        if (flag && done[k->index])
            return ps_fail(
                c->err, PS_EPLAN, "tick %u sets flag %u for the second time", c->i_tick, k->index);
        marks[k->index] = c->now[k->stream];
        done[k->index] = true;
        return PS_OK;
    }
    /* A flag may be set later in the list by another stream, but then the list could deadlock:
     * lowering never does. */
    if (!done[k->index])
        return ps_fail(c->err, PS_EPLAN, "tick %u waits for %s %u, which nothing before it sets",
            c->i_tick, flag ? "flag" : "event", k->index);
    learn(&c->now[k->stream], &marks[k->index]);
    return PS_OK;
}

static void ignore(void *ctx, const ps_interval *piece)
{
    (void)ctx;
    (void)piece;
}

/* Residents that the pass finds, and what lies between units, which ranges over several span. */
static ps_status mark_found(checker *c)
{
    const ps_plan *p = c->ticks->plan;
    const ps_pass_shape *shape = &c->ticks->shape;
    for (uint32_t u = 0; u < p->model->n_units && shape->found != 0; u++) {
        uint64_t at = ps_plan_resident_at(p, p->residency_of[shape->tier], u);
        if (at == UINT64_MAX) continue;
        uint64_t n_bytes = p->model->units[u].n_bytes,
                 from = ps_plan_must_bring(p, shape->found, shape->tier, u) ? at + n_bytes : at;
        uint64_t to = ps_div_up_u64(at + n_bytes, PS_ARENA_ALIGN) * PS_ARENA_ALIGN;
        if (ps_intervals_touch(&c->sets[PS_SPACE_DEV_WEIGHTS], from, to, true, PS_STREAM_H2D,
                THERE_BEFORE, ignore, NULL) != PS_OK)
            return ps_fail(c->err, PS_ENOMEM, "no host memory to check a plan");
    }
    return PS_OK;
}

static ps_status run_check(checker *c)
{
    PS_TRY(mark_found(c));
    for (uint32_t i = 0; i < c->ticks->n_ticks; i++) {
        const ps_tick *k = &c->ticks->tick[i];
        c->i_tick = i;
        c->stream = k->stream;
        if (k->stream >= PS_STREAM_COUNT)
            return ps_fail(c->err, PS_EPLAN, "tick %u is on no stream", i);
        ps_status status = PS_OK;
        if (k->kind <= PS_TICK_RUN) {
            status = check_step(c);
            c->step[i] = ++c->now[k->stream].at[k->stream];
        } else {
            status = check_sync(c, k);
        }
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

ps_status ps_ticks_check(const ps_ticks *ticks, ps_err *err)
{
    checker c = {.ticks = ticks, .err = err};
    c.event = ps_alloc((uint64_t)ticks->n_events + 1, sizeof *c.event);
    c.flag = ps_alloc((uint64_t)ticks->n_flags + 1, sizeof *c.flag);
    c.recorded = ps_alloc((uint64_t)ticks->n_events + 1, sizeof *c.recorded);
    c.set = ps_alloc((uint64_t)ticks->n_flags + 1, sizeof *c.set);
    c.step = ps_alloc((uint64_t)ticks->n_ticks + 1, sizeof *c.step);
    ps_status status = PS_OK;
    if (c.event == NULL || c.flag == NULL || c.recorded == NULL || c.set == NULL || c.step == NULL)
        status = ps_fail(err, PS_ENOMEM, "no host memory to check a plan");
    else
        status = run_check(&c);
    ps_free(c.event);
    ps_free(c.flag);
    ps_free(c.recorded);
    ps_free(c.set);
    ps_free(c.step);
    for (int i = 0; i < PS_SPACE_COUNT; i++) ps_intervals_fini(&c.sets[i]);
    return status;
}
