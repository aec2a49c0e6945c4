/* ps_trace - see ps_trace.h. */
#include "engine/ps_trace.h"

#include <string.h>

enum {
    TIE_EVERY_NS = 1000 * 1000 * 1000
}; /* clocks of CPU and GPU drift by microseconds a second */

struct ps_trace {
    ps_device *device; /* borrows */
    ps_event **marks;  /* own; [n_marks]: 2 i and 2 i + 1 are around tick i of any list */
    uint32_t n_marks;
    bool begun[PS_STREAM_COUNT]; /* the graph being recorded has a mark on this stream */
    int32_t *signal; /* owns; [cap_signals]: events, then flags: the tick whose end they tell */
    uint32_t cap_signals;
    ps_trace_tick *ticks; /* owns; [cap_ticks], a ring: number n is at n % cap_ticks */
    uint64_t cap_ticks, tick_begin, tick_end;
    ps_trace_pass *passes; /* owns; [PS_TRACE_CAP_PASSES], likewise */
    uint64_t pass_begin, pass_end;
    bool tied;
    uint64_t tied_at_ns;     /* real clock */
    uint64_t clock_shift_ns; /* what to add to the executor's clock, modulo 2^64 */
    uint64_t clock_error_ns;
};

ps_status ps_trace_create(ps_device *device, uint64_t cap_bytes, ps_trace **out, ps_err *err)
{
    *out = NULL;
    ps_trace *t = ps_alloc(1, sizeof *t);
    if (t == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for a trace");
    t->device = device;
    t->cap_ticks = (cap_bytes != 0 ? cap_bytes : PS_TRACE_CAP_BYTES) / sizeof *t->ticks;
    if (t->cap_ticks == 0) t->cap_ticks = 1;
    t->ticks = ps_alloc(t->cap_ticks, sizeof *t->ticks);
    t->passes = ps_alloc(PS_TRACE_CAP_PASSES, sizeof *t->passes);
    if (t->ticks == NULL || t->passes == NULL) {
        ps_trace_destroy(t);
        return ps_fail(err, PS_ENOMEM, "no host memory for a trace of %llu bytes",
            (unsigned long long)cap_bytes);
    }
    *out = t;
    return PS_OK;
}

void ps_trace_destroy(ps_trace *t)
{
    if (t == NULL) return;
    for (uint32_t i = 0; i < t->n_marks; i++) ps_event_destroy(t->device, t->marks[i]);
    ps_free(t->marks);
    ps_free(t->signal);
    ps_free(t->ticks);
    ps_free(t->passes);
    ps_free(t);
}

/* ---- before and during a pass ---- */

static bool takes_time(const ps_tick *k)
{
    return k->kind != PS_TICK_RECORD && k->kind != PS_TICK_FLAG_SET;
}

static ps_status grow_marks(ps_trace *t, uint32_t n, ps_err *err)
{
    if (n <= t->n_marks) return PS_OK;
    ps_event **marks = ps_realloc(t->marks, n, sizeof(ps_event *));
    if (marks == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for %u marks", n);
    t->marks = marks;
    while (t->n_marks < n) {
        ps_status status = ps_event_create(t->device, &t->marks[t->n_marks], err);
        if (status != PS_OK) return status;
        t->n_marks++;
    }
    return PS_OK;
}

ps_status ps_trace_prepare(ps_trace *t, const ps_ticks *ticks, ps_err *err)
{
    uint32_t n_signals = ticks->n_events + ticks->n_flags;
    memset(t->begun, 0, sizeof t->begun);
    ps_status status = grow_marks(t, ticks->n_ticks * 2, err);
    if (status != PS_OK) return status;
    if (n_signals > t->cap_signals) {
        int32_t *signal = ps_realloc(t->signal, n_signals, sizeof *signal);
        if (signal == NULL)
            return ps_fail(err, PS_ENOMEM, "no host memory to trace %u events", n_signals);
        t->signal = signal;
        t->cap_signals = n_signals;
    }
    if (ticks->n_ticks > t->cap_ticks) {
        ps_trace_tick *ring = ps_alloc(ticks->n_ticks, sizeof *ring);
        if (ring == NULL)
            return ps_fail(err, PS_ENOMEM, "no host memory to trace %u ticks", ticks->n_ticks);
        ps_free(t->ticks);
        t->ticks = ring;
        t->cap_ticks = ticks->n_ticks;
        ps_trace_clear(t);
    }
    return PS_OK;
}

ps_status ps_trace_tie(ps_trace *t, ps_err *err)
{
    uint64_t now_ns = ps_clock_ns(), device_ns = 0;
    if (t->tied && now_ns - t->tied_at_ns < TIE_EVERY_NS) return PS_OK;
    ps_status status = ps_device_tie_clocks(t->device, &device_ns, &t->clock_error_ns, err);
    if (status != PS_OK) return status;
    t->clock_shift_ns = t->device->info.virtual_clock ? 0 : device_ns - ps_clock_ns();
    t->tied_at_ns = now_ns;
    t->tied = true;
    return PS_OK;
}

ps_status ps_trace_enter(
    ps_trace *t, ps_stream *s, const ps_ticks *ticks, uint32_t i, bool in_graph, ps_err *err)
{
    const ps_tick *k = &ticks->tick[i];
    if (!takes_time(k) || (in_graph && t->begun[k->stream])) return PS_OK;
    t->begun[k->stream] = true;
    return ps_device_mark(t->device, s, t->marks[2 * i], err);
}

ps_status ps_trace_leave(ps_trace *t, ps_stream *s, const ps_ticks *ticks, uint32_t i, ps_err *err)
{
    if (!takes_time(&ticks->tick[i])) return PS_OK;
    return ps_device_mark(t->device, s, t->marks[2 * i + 1], err);
}

/* ---- behind a pass ---- */

static ps_trace_pass *pass_at(const ps_trace *t, uint64_t number)
{
    return &t->passes[number % PS_TRACE_CAP_PASSES];
}

/* Forgets the oldest passes until one more, of n ticks, has room. */
static void make_room(ps_trace *t, uint64_t n)
{
    while (t->pass_begin < t->pass_end && (t->pass_end - t->pass_begin == PS_TRACE_CAP_PASSES ||
                                              t->tick_end - t->tick_begin + n > t->cap_ticks))
        t->tick_begin += pass_at(t, t->pass_begin++)->n_ticks;
}

/* Which tick a wait waited for, as the walk in program order goes on; NULL for other ticks. */
static int32_t *signal_of(ps_trace *t, const ps_ticks *ticks, const ps_tick *k)
{
    if (k->kind == PS_TICK_RECORD || k->kind == PS_TICK_WAIT) return &t->signal[k->index];
    if (k->kind == PS_TICK_FLAG_SET || k->kind == PS_TICK_FLAG_WAIT)
        return &t->signal[ticks->n_events + k->index];
    return NULL;
}

/* begin_ns: NULL where it has a mark of its own. */
static ps_status read_tick(ps_trace *t, const ps_bound *b, uint32_t i, const uint64_t *begin_ns,
    ps_trace_tick *out, ps_err *err)
{
    const ps_tick *k = &b->ticks->tick[i];
    bool copies = k->kind == PS_TICK_COPY_IN || k->kind == PS_TICK_COPY_OUT;
    *out = (ps_trace_tick){.tick = i,
        .unit = ps_plan_whole(b->ticks->plan, k->unit),
        .kind = k->kind,
        .stream = k->stream,
        .op = k->op,
        .flops = k->kind == PS_TICK_RUN ? b->cost[i].flops : 0,
        .bus_bytes = k->kind == PS_TICK_RUN ? b->cost[i].bus_bytes : 0,
        .bytes = copies                   ? k->n_bytes
                 : k->kind == PS_TICK_RUN ? b->cost[i].bytes
                                          : 0};
    ps_status status = PS_OK;
    if (begin_ns != NULL)
        out->begin_ns = *begin_ns;
    else
        status = ps_device_mark_time(t->device, t->marks[2 * i], &out->begin_ns, err);
    if (status != PS_OK) return status;
    status = ps_device_mark_time(t->device, t->marks[2 * i + 1], &out->end_ns, err);
    if (out->end_ns < out->begin_ns) out->end_ns = out->begin_ns; /* half a microsecond, rounded */
    return status;
}

/* Room for all its ticks is there. Returns how many were written. */
static ps_status read_ticks(ps_trace *t, const ps_bound *b, bool graph, uint32_t *n, ps_err *err)
{
    const ps_ticks *ticks = b->ticks;
    uint64_t now_ns[PS_STREAM_COUNT] = {0};
    int32_t last[PS_STREAM_COUNT] = {-1, -1, -1, -1};
    for (uint32_t i = 0; i < ticks->n_events + ticks->n_flags; i++) t->signal[i] = -1;
    *n = 0;
    for (uint32_t i = 0; i < ticks->n_ticks; i++) {
        const ps_tick *k = &ticks->tick[i];
        int32_t *signal = signal_of(t, ticks, k);
        if (!takes_time(k)) {
            *signal = last[k->stream];
            continue;
        }
        ps_trace_tick *out = &t->ticks[(t->tick_end + *n) % t->cap_ticks];
        bool goes_on = graph && k->stream != PS_STREAM_CPU && last[k->stream] >= 0;
        ps_status status = read_tick(t, b, i, goes_on ? &now_ns[k->stream] : NULL, out, err);
        if (status != PS_OK) return status;
        out->cause = signal != NULL ? *signal : -1;
        last[k->stream] = (int32_t)i;
        now_ns[k->stream] = out->end_ns;
        (*n)++;
    }
    return PS_OK;
}

ps_status ps_trace_add(ps_trace *t, const ps_bound *b, const ps_trace_pass *pass, ps_err *err)
{
    uint64_t start_ns = ps_clock_ns();
    uint32_t n = 0;
    make_room(t, pass->marked ? b->ticks->n_ticks : 0);
    ps_status status = pass->marked ? read_ticks(t, b, pass->graph, &n, err) : PS_OK;
    if (status != PS_OK) return status;
    ps_trace_pass *out = pass_at(t, t->pass_end++);
    *out = *pass;
    out->first_tick = t->tick_end;
    out->n_ticks = n;
    out->begin_ns += t->clock_shift_ns;
    out->end_ns += t->clock_shift_ns;
    out->clock_error_ns = t->clock_error_ns;
    out->read_ns = ps_clock_ns() - start_ns;
    t->tick_end += n;
    return PS_OK;
}

/* ---- looking ---- */

void ps_trace_count(const ps_trace *t, uint64_t *n_passes, uint64_t *n_ticks)
{
    *n_passes = t->pass_end - t->pass_begin;
    *n_ticks = t->tick_end - t->tick_begin;
}

void ps_trace_copy(const ps_trace *t, ps_trace_pass *passes, ps_trace_tick *ticks)
{
    for (uint64_t i = t->pass_begin; i < t->pass_end; i++) {
        *passes = *pass_at(t, i);
        passes++->first_tick -= t->tick_begin;
    }
    for (uint64_t i = t->tick_begin; i < t->tick_end; i++) *ticks++ = t->ticks[i % t->cap_ticks];
}

void ps_trace_clear(ps_trace *t)
{
    t->pass_begin = t->pass_end;
    t->tick_begin = t->tick_end;
}
