/* ps_exec - see ps_exec.h. */
#include "engine/ps_exec_priv.h"

#include <string.h>
#include <time.h>

enum {
    GRAPH_MAX_TOK = PS_SMALL_PASS_TOK, /* longer passes hide their launches behind the work */
    GRAPH_AFTER_RUNS = 2,              /* record a shape once it has proved to come again */
    CONTROL_EVERY = 16,                /* runs, of which a trace leaves one unmarked */
    POLL_NS = 20 * 1000 * 1000,
    POLL_EVERY_TICKS = 64,
    LOOK_NS = 200 * 1000,
    LOOK_SHORT_NS = 20 * 1000,
};

/* ---- bound lists ---- */

static void drop_graphs(ps_exec *x, ps_bound *b)
{
    for (int marked = 0; marked < 2; marked++) {
        if (b->graph[marked] != NULL) ps_graph_destroy(x->device, b->graph[marked]);
        b->graph[marked] = NULL;
    }
}

void ps_exec_drop_graphs(ps_exec *x)
{
    for (uint32_t i = 0; i < x->n_bound; i++) drop_graphs(x, x->bound[i]);
}

void ps_exec_drop_lists(ps_exec *x)
{
    ps_exec_drop_graphs(x);
    for (uint32_t i = 0; i < x->n_bound; i++) ps_bound_destroy(x->bound[i]);
    x->n_bound = 0;
    x->tables_of = NULL;
}

static bool same_shape(const ps_pass_shape *a, const ps_pass_shape *b)
{
    return a->tier == b->tier && a->n_tok == b->n_tok && a->n_out == b->n_out &&
           a->max_kv == b->max_kv && a->staged == b->staged && a->seq == b->seq &&
           a->first == b->first && a->far == b->far && a->found == b->found;
}

static ps_status grow_events(ps_exec *x, uint32_t n, ps_err *err)
{
    if (n <= x->n_events) return PS_OK;
    ps_event **events = ps_realloc(x->events, n, sizeof(ps_event *));
    if (events == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for %u events", n);
    x->events = events;
    while (x->n_events < n) {
        PS_TRY(ps_event_create(x->device, &x->events[x->n_events], err));
        x->n_events++;
    }
    return PS_OK;
}

static ps_status grow_flags(ps_exec *x, uint32_t n, ps_err *err)
{
    if (n <= x->n_flags) return PS_OK;
    void *flags = NULL;
    uint32_t cap = n * 2;
    PS_TRY(ps_exec_locked(x, (uint64_t)cap * FLAG_STRIDE, &flags, err));
    if (x->flags != NULL) x->stats.locked_bytes -= (uint64_t)x->n_flags * FLAG_STRIDE;
    ps_exec_free_locked(x, x->flags);
    x->flags = flags;
    x->n_flags = cap;
    ps_exec_drop_graphs(x); /* with old addresses */
    return PS_OK;
}

static void evict(ps_exec *x)
{
    uint32_t oldest = 0;
    for (uint32_t i = 1; i < x->n_bound; i++)
        if (x->bound[i]->last_used < x->bound[oldest]->last_used) oldest = i;
    ps_bound *b = x->bound[oldest];
    if (x->tables_of == b) x->tables_of = NULL;
    drop_graphs(x, b);
    ps_bound_destroy(b);
    x->bound[oldest] = x->bound[--x->n_bound];
}

static ps_status get_bound(ps_exec *x, const ps_pass_shape *shape, ps_bound **out, ps_err *err)
{
    for (uint32_t i = 0; i < x->n_bound; i++)
        if (same_shape(&x->bound[i]->ticks->shape, shape)) {
            *out = x->bound[i];
            return PS_OK;
        }
    ps_ticks *ticks = NULL;
    PS_TRY(ps_lower(x->plan, shape, &ticks, err));
    ps_status status = x->options.check ? ps_ticks_check(ticks, err) : PS_OK;
    if (status == PS_OK) status = grow_events(x, ticks->n_events, err);
    if (status == PS_OK) status = grow_flags(x, ticks->n_flags, err);
    if (status != PS_OK) {
        ps_ticks_destroy(ticks);
        return status;
    }
    ps_bound *b = NULL;
    PS_TRY(ps_bind(&x->bases, ticks, &b, err));
    if (x->n_bound == CAP_BOUND) evict(x);
    x->bound[x->n_bound++] = b;
    *out = b;
    return PS_OK;
}

/* ---- a pass ---- */

static bool poll_now(ps_exec *x)
{
    if (atomic_load(&x->cancelled)) return false;
    if (x->options.poll == NULL) return true;
    uint64_t now = ps_clock_ns();
    if (now < x->next_poll_ns) return true;
    x->next_poll_ns = now + POLL_NS;
    return x->options.poll(x->options.ctx);
}

static void fill_batch(ps_exec *x, const ps_bound *b, const ps_batch *batch)
{
    const ps_batch_layout *l = &b->ticks->batch;
    unsigned char *to = x->host_batch;
    size_t n = batch->n_tok, word = sizeof(int32_t);
    memcpy(to + l->ids, batch->ids, n * word);
    memcpy(to + l->pos, batch->pos, n * word);
    memcpy(to + l->seq, batch->seq, n * word);
    if (batch->n_out > 0) memcpy(to + l->rows, batch->rows, batch->n_out * word);
    uint32_t n_seq = x->plan->spec.n_seq, max_pages = x->plan->max_pages;
    memcpy(to + l->table, batch->table, (size_t)n_seq * max_pages * word);
    size_t n_near = x->plan->n_windows * (size_t)n_seq * max_pages;
    if (!b->ticks->shape.staged && n_near > 0) {
        memcpy(to + l->near, batch->near_pages, n_near * word);
        memcpy(to + l->far, batch->far_pages, n_near * word);
    }
    if (b->ticks->shape.staged) {
        int32_t *stage = (int32_t *)(void *)(to + l->stage_table);
        for (uint32_t i = 0; i < n_seq * max_pages; i++) stage[i] = (int32_t)(i % max_pages);
    }
    if (x->model->hp.rope != PS_ROPE_MROPE) return;
    uint32_t chunk = x->plan->spec.chunk_tok; /* each chunk has its own [4][n] block */
    for (uint32_t first = 0; first < batch->n_tok; first += chunk) {
        uint32_t m = batch->n_tok - first < chunk ? batch->n_tok - first : chunk;
        for (uint32_t j = 0; j < 4; j++)
            memcpy(to + l->rope_pos + ((size_t)first * 4 + (size_t)j * m) * word,
                batch->rope_pos != NULL ? batch->rope_pos + (size_t)j * n + first
                                        : batch->pos + first,
                m * word);
    }
}

/* Brings the list's expert addresses into both CONST spaces, if they are not there already. */
static ps_status activate_tables(ps_exec *x, const ps_bound *b, ps_err *err)
{
    const ps_ticks *t = b->ticks;
    if (x->tables_of == b || t->n_table == 0) return PS_OK;
    uint64_t at = x->plan->tables_offset, n_bytes = t->n_table * sizeof(ps_dptr);
    ps_dptr *host = (ps_dptr *)(void *)((unsigned char *)x->host_const + at);
    for (uint32_t i = 0; i < t->n_table; i++)
        host[i] = ps_bind_ref(&x->bases, t->table[PS_SIDE_HOST][i]);
    if (x->const_staging != NULL) {
        bool changed = x->tables_torn;
        ps_dptr *dev = (ps_dptr *)(void *)((unsigned char *)x->const_staging + at);
        for (uint32_t i = 0; i < t->n_table; i++) {
            ps_dptr p = ps_bind_ref(&x->bases, t->table[PS_SIDE_DEV][i]);
            changed = changed || p.a != dev[i].a;
            dev[i] = p;
        }
        if (changed) {
            x->tables_of = NULL;
            x->tables_torn = true;
            PS_TRY(ps_device_copy_in(x->device, x->stream[PS_STREAM_H2D],
                ps_dptr_add(x->bases.space[PS_SPACE_DEV_CONST], at), dev, n_bytes, err));
            PS_TRY(ps_device_sync(x->device, x->stream[PS_STREAM_H2D], err));
            x->tables_torn = false;
        }
    }
    x->tables_of = b;
    return PS_OK;
}

static uint32_t *flag_at(const ps_exec *x, uint32_t i)
{
    return (uint32_t *)(void *)(x->flags + (size_t)i * FLAG_STRIDE);
}

static ps_status enqueue(ps_exec *x, const ps_bound *b, uint32_t i, ps_err *err)
{
    const ps_tick *k = &b->ticks->tick[i];
    ps_device *d = x->device;
    ps_stream *s = x->stream[k->stream];
    switch ((ps_tick_kind)k->kind) {
    case PS_TICK_COPY_IN:
        if (ps_bound_bounces(k))
            return ps_bounce_copy(x->bounce, s, k->dst, ps_ref_unit(k->src),
                ps_ref_in_image(k->src), k->n_bytes, err);
        return ps_device_copy_in(d, s, k->dst, (const void *)(uintptr_t)k->src.a, k->n_bytes, err);
    case PS_TICK_COPY_OUT:
        return ps_device_copy_out(d, s, (void *)(uintptr_t)k->dst.a, k->src, k->n_bytes, err);
    case PS_TICK_RUN: {
        const ps_op_table *table =
            k->stream == PS_STREAM_CPU ? x->options.cpu_ops : x->options.dev_ops;
        return ps_device_run(d, s, table->op[k->op], b->ticks->args + k->index,
            ps_op_args_bytes((ps_op_kind)k->op), &b->cost[i], err);
    }
    case PS_TICK_RECORD: return ps_device_record(d, s, x->events[k->index], err);
    case PS_TICK_WAIT: return ps_device_wait(d, s, x->events[k->index], err);
    /* Each hand-off of a pass has a word of its own, cleared before the pass. */
    case PS_TICK_FLAG_SET: return ps_device_flag_set(d, s, flag_at(x, k->index), 1, err);
    case PS_TICK_FLAG_WAIT: return ps_device_flag_wait(d, s, flag_at(x, k->index), 1, err);
    }
    return ps_fail(err, PS_EINTERNAL, "tick %u is of no kind", i);
}

typedef enum part { PART_ALL, PART_CPU, PART_ACCELERATOR } part;

static ps_status enqueue_part(ps_exec *x, const ps_bound *b, part which, ps_err *err)
{
    const ps_tick *tick = b->ticks->tick;
    for (uint32_t i = 0; i < b->ticks->n_ticks; i++) {
        bool cpu = tick[i].stream == PS_STREAM_CPU;
        if ((which == PART_CPU && !cpu) || (which == PART_ACCELERATOR && cpu)) continue;
        ps_stream *s = x->stream[tick[i].stream];
        bool in_graph = which == PART_ACCELERATOR;
        if (x->marking) PS_TRY(ps_trace_enter(x->trace, s, b->ticks, i, in_graph, err));
        PS_TRY(enqueue(x, b, i, err));
        if (x->marking) PS_TRY(ps_trace_leave(x->trace, s, b->ticks, i, err));
        if (i % POLL_EVERY_TICKS == 0 && !poll_now(x))
            return ps_fail(err, PS_ECANCELLED, "the pass was interrupted");
    }
    return PS_OK;
}

/* Records the accelerator's part. The copy streams join the capture through `fork` and must come
 * back through `join`. */
static ps_status record_graph(ps_exec *x, ps_bound *b, ps_err *err)
{
    ps_device *d = x->device;
    ps_stream *main_stream = x->stream[PS_STREAM_COMPUTE];
    static const ps_stream_role copies[] = {PS_STREAM_H2D, PS_STREAM_D2H};
    ps_graph *graph = NULL;
    PS_TRY(ps_graph_begin(d, main_stream, err));
    ps_status status = ps_device_record(d, main_stream, x->fork, err);
    for (int i = 0; i < 2 && status == PS_OK; i++)
        if (b->n_ticks_on[copies[i]] > 0)
            status = ps_device_wait(d, x->stream[copies[i]], x->fork, err);
    if (status == PS_OK) status = enqueue_part(x, b, PART_ACCELERATOR, err);
    for (int i = 0; i < 2 && status == PS_OK; i++) {
        if (b->n_ticks_on[copies[i]] == 0) continue;
        status = ps_device_record(d, x->stream[copies[i]], x->join, err);
        if (status == PS_OK) status = ps_device_wait(d, main_stream, x->join, err);
    }
    ps_status ended = ps_graph_end(d, main_stream, &graph, err);
    if (status != PS_OK || ended != PS_OK) {
        if (graph != NULL) ps_graph_destroy(d, graph);
        return status != PS_OK ? status : ended;
    }
    b->graph[x->marking] = graph;
    return PS_OK;
}

/* Either part of a pass with a graph may hold up who enqueues it: a driver's room for launches may
 * be too small for the graph, which then waits for work that the CPU feeds, and the other way
 * round. So the CPU's part, with a mark before and behind each tick, must fit its queue; it goes
 * first. */
static bool cpu_part_fits(const ps_exec *x, const ps_bound *b)
{
    return b->n_ticks_on[PS_STREAM_CPU] <= PS_CPU_QUEUE / (x->marking ? 3u : 1u);
}

static bool wants_graph(const ps_exec *x, const ps_bound *b)
{
    return x->options.graphs && cpu_part_fits(x, b) && b->graph[x->marking] == NULL &&
           !b->graph_failed[x->marking] && b->ticks->shape.n_tok <= GRAPH_MAX_TOK &&
           b->n_runs >= GRAPH_AFTER_RUNS && b->n_ticks_on[PS_STREAM_COMPUTE] > 0 &&
           b->bounce_bytes == 0 && b->ticks->shape.found == 0;
}

/* The driver's memory for a graph counts against the reserve that the plan made for it. */
static void try_graph(ps_exec *x, ps_bound *b)
{
    uint64_t before = 0, after = 0, total = 0;
    ps_err ignored = {0};
    if (ps_device_mem_info(x->device, &before, &total, &ignored) != PS_OK ||
        record_graph(x, b, &ignored) != PS_OK ||
        ps_device_mem_info(x->device, &after, &total, &ignored) != PS_OK) {
        b->graph_failed[x->marking] = true;
        return;
    }
    uint64_t used = before > after ? before - after : 0;
    if (ps_arena_charge(&x->arena, PS_MEM_GRAPH, used, &ignored) != PS_OK) {
        ps_graph_destroy(x->device, b->graph[x->marking]);
        b->graph[x->marking] = NULL;
        b->graph_failed[x->marking] = true;
    }
}

static ps_status enqueue_pass(ps_exec *x, ps_bound *b, ps_err *err)
{
    ps_graph *graph = b->graph[x->marking];
    if (graph == NULL) return enqueue_part(x, b, PART_ALL, err);
    x->stats.n_graph_launches++;
    PS_TRY(enqueue_part(x, b, PART_CPU, err));
    return ps_graph_launch(x->device, x->stream[PS_STREAM_COMPUTE], graph, err);
}

/* Looks now and then until one of two streams is empty. False: the caller wants to stop. */
static bool look_until_idle(ps_exec *x, ps_stream_role a, ps_stream_role b, long every_ns)
{
    while (!ps_stream_idle(x->device, x->stream[a]) && !ps_stream_idle(x->device, x->stream[b])) {
        if (!poll_now(x)) return false;
        nanosleep(&(struct timespec){.tv_nsec = every_ns}, NULL);
    }
    return true;
}

/* What may last is waited for by looking now and then, so that Ctrl-C is answered; what is known to
 * be short by blocking, which takes no time to notice the end. But blocking on a GPU's stream keeps
 * a CPU busy, and that one is missing to a pool that has a thread for every CPU: so the CPU's part
 * of a pass, which ends before the GPU's in all but the smallest, is always waited for by looking.
 * A GPU that fails never sets the flags that the CPU's part waits for: its stream is looked at too.
 */
static ps_status wait_for(ps_exec *x, const ps_bound *b, ps_err *err)
{
    bool is_short =
        b->ticks->shape.n_tok <= GRAPH_MAX_TOK && b->last_ns > 0 && b->last_ns < POLL_NS;
    bool done = true;
    if (!is_short)
        for (int s = 0; s < PS_STREAM_COUNT && done && x->options.poll != NULL; s++)
            done = b->n_ticks_on[s] == 0 ||
                   look_until_idle(x, (ps_stream_role)s, (ps_stream_role)s, LOOK_NS);
    else if (b->n_ticks_on[PS_STREAM_CPU] > 0 && b->n_ticks_on[PS_STREAM_COMPUTE] > 0)
        done = look_until_idle(x, PS_STREAM_CPU, PS_STREAM_COMPUTE, LOOK_SHORT_NS);
    if (!done) return ps_fail(err, PS_ECANCELLED, "the pass was interrupted");
    ps_status status = PS_OK;
    for (int s = 0; s < PS_STREAM_COUNT; s++) {
        ps_status one = ps_device_sync(x->device, x->stream[s], err);
        if (status == PS_OK) status = one;
    }
    if (status == PS_OK) status = ps_bounce_sync(x->bounce, err);
    if (status == PS_OK && atomic_load(&x->cancelled))
        return ps_fail(err, PS_ECANCELLED, "the pass was interrupted");
    return status;
}

/* Leaves the device idle and the flags clear, whatever state a failed pass left. */
static void drain(ps_exec *x)
{
    ps_device_set_abort(x->device, 1);
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (ps_device_sync(x->device, x->stream[s], NULL) == PS_EFATAL) x->lost = true;
    if (ps_bounce_sync(x->bounce, NULL) == PS_EFATAL) x->lost = true;
    ps_bounce_reset(x->bounce);
    ps_device_set_abort(x->device, 0);
}

static void clear_flags(ps_exec *x, const ps_bound *b)
{
    for (uint32_t i = 0; i < b->ticks->n_flags; i++)
        __atomic_store_n(flag_at(x, i), 0, __ATOMIC_RELEASE);
}

/* What a pass must have before its first step, graph and marks included. */
static ps_status prepare(ps_exec *x, ps_bound *b, ps_err *err)
{
    bool again = b->ticks->shape.n_tok <= GRAPH_MAX_TOK;
    x->marking = x->recording && !(again && b->n_runs % CONTROL_EVERY == CONTROL_EVERY - 1);
    PS_TRY(activate_tables(x, b, err));
    if (x->recording) PS_TRY(ps_trace_tie(x->trace, err));
    if (x->marking) PS_TRY(ps_trace_prepare(x->trace, b->ticks, err));
    if (wants_graph(x, b)) try_graph(x, b);
    return PS_OK;
}

static ps_status add_to_trace(ps_exec *x, const ps_bound *b, const ps_batch *batch,
    uint64_t begin_ns, uint64_t end_ns, ps_err *err)
{
    const ps_pass_shape *shape = &b->ticks->shape;
    ps_trace_pass pass = {.number = x->stats.n_passes,
        .begin_ns = begin_ns,
        .end_ns = end_ns,
        .wall_ns = b->last_ns,
        .tier = shape->tier,
        .n_tok = shape->n_tok,
        .n_out = shape->n_out,
        .seq = (uint32_t)batch->seq[0],
        .pos = (uint32_t)batch->pos[0],
        .one_sequence = batch->one_sequence,
        .graph = b->graph[x->marking] != NULL,
        .marked = x->marking};
    memcpy(pass.vram_bytes, x->arena.used, sizeof pass.vram_bytes);
    return ps_trace_add(x->trace, b, &pass, err);
}

ps_status ps_exec_pass(ps_exec *x, const ps_batch *batch, const float **logits, ps_err *err)
{
    ps_err own = {0};
    if (err == NULL) err = &own;
    if (x->lost)
        return ps_fail(err, PS_EFATAL, "the device was lost; close this engine and open another");
    ps_pass_shape shape = {.tier = ps_plan_tier(x->plan, batch->n_tok),
        .n_tok = batch->n_tok,
        .n_out = batch->n_out,
        .max_kv = batch->max_kv,
        .far = batch->far,
        .mapped = x->mapped};
    shape.found = ps_plan_found(x->plan, x->held, shape.tier);
    if (batch->one_sequence && ps_pass_is_staged(x->plan, batch->n_tok)) {
        shape.staged = true;
        shape.far = 0;
        shape.seq = (uint32_t)batch->seq[0];
        shape.first = (uint32_t)batch->pos[0];
    }
    ps_bound *b = NULL;
    ps_status status = ps_exec_reserve_logits(x, batch->n_out, err);
    if (status == PS_OK) status = get_bound(x, &shape, &b, err);
    if (status == PS_OK) status = prepare(x, b, err);
    if (status == PS_OK) {
        uint64_t start = ps_exec_clock_ns(x), wall_start = ps_clock_ns(), end = 0;
        fill_batch(x, b, batch);
        clear_flags(x, b);
        if (shape.found > 0) x->held = x->plan->n_residencies; /* until all of it has come */
        status = enqueue_pass(x, b, err);
        if (status == PS_OK) status = wait_for(x, b, err);
        if (status == PS_OK) end = ps_exec_clock_ns(x); /* after a failure streams still run */
        b->last_ns = ps_clock_ns() - wall_start;
        if (status == PS_OK) x->stats.busy_ns += end - start;
        if (status == PS_OK && x->recording) status = add_to_trace(x, b, batch, start, end, err);
    }
    if (status != PS_OK) {
        if (status == PS_EFATAL) x->lost = true;
        drain(x);
        x->tables_of = NULL; /* their copy may have been dropped, too */
        x->tables_torn = x->const_staging != NULL;
        atomic_store(&x->cancelled, false);
        return status;
    }
    if (shape.found > 0) x->held = x->plan->residency_of[shape.tier];
    b->n_runs++;
    b->last_used = ++x->stats.n_passes;
    x->stats.h2d_bytes += b->h2d_bytes;
    x->stats.d2h_bytes += b->d2h_bytes;
    x->stats.bounce_bytes += b->bounce_bytes;
    x->stats.disk_bytes += b->disk_bytes;
    if (logits != NULL) *logits = x->out;
    return PS_OK;
}

/* ---- looking ---- */

ps_status ps_exec_trace_start(ps_exec *x, uint64_t cap_bytes, ps_err *err)
{
    if (x->trace == NULL) PS_TRY(ps_trace_create(x->device, cap_bytes, &x->trace, err));
    x->recording = true;
    return PS_OK;
}
void ps_exec_trace_stop(ps_exec *x)
{
    x->recording = false;
}
ps_trace *ps_exec_trace(const ps_exec *x)
{
    return x->trace;
}

void ps_exec_cancel(ps_exec *x)
{
    atomic_store(&x->cancelled, true);
    ps_device_set_abort(x->device, 1);
}

bool ps_exec_is_lost(const ps_exec *x)
{
    return x->lost;
}
const ps_arena *ps_exec_arena(const ps_exec *x)
{
    return &x->arena;
}
const ps_plan *ps_exec_plan(const ps_exec *x)
{
    return x->plan;
}

ps_exec_stats ps_exec_get_stats(const ps_exec *x)
{
    ps_exec_stats s = x->stats;
    s.locked_bytes += x->weights.locked_bytes;
    s.disk_direct = ps_bounce_disk_direct(x->bounce);
    /* Locked images and a locked cache are counted once. */
    s.ram_bytes = x->weights.image_bytes + x->plan->space_bytes[PS_SPACE_HOST_CONST] +
                  x->stats.locked_bytes + (x->host_kv_locked ? 0 : x->host_kv_bytes);
    return s;
}

uint64_t ps_exec_sources(const ps_exec *x, uint8_t *sources)
{
    ps_host_weights_sources(&x->weights, sources);
    return ps_bounce_piece_bytes(x->bounce);
}

uint64_t ps_exec_clock_ns(const ps_exec *x)
{
    if (!x->device->info.virtual_clock) return ps_clock_ns();
    uint64_t latest = 0, error = 0;
    ps_device_tie_clocks(x->device, &latest, &error, NULL); /* streams long gone count, too */
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        latest = ps_max_u64(latest, ps_stream_time_ns(x->device, x->stream[s]));
    return latest;
}
