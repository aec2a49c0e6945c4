/* ps_profile_bus - what the bus carries, what hand-offs and launches cost, and what it costs when
 * bus, CPU and accelerator work at once. See ps_profile_priv.h. */
#include <string.h>
#include <time.h>

#include "engine/ps_profile_priv.h"

enum {
    MAX_TIMES = 6,
    COPY_BATCH_BYTES = 16 << 20,   /* of one size in a row */
    LOADED_BATCH_BYTES = 64 << 20, /* the same, beside something else */
    SETTLE_NS = 500000,            /* until all threads of a load are at work */
    MAX_BATCH = 32,
    ROUNDS = 64,      /* there and back in one graph */
    FLAG_STRIDE = 64, /* one word a cache line, as in the executor */
    N_ISSUED = 64,    /* launches between two looks at the host's clock */
    N_PASSES = 21,
};
static const uint64_t copy_sizes[] = {64 << 10, 256 << 10, 1 << 20, COPY_PIECE, 16 << 20, 64 << 20};
static const load nothing = {PS_LOAD_IDLE, NULL};

static uint32_t n_times(const profiler *p)
{
    return p->virtual_clock ? 1 : MAX_TIMES;
}

static ps_status add_fixed(
    profiler *p, const char *op, double seconds, ps_sample_load kind, ps_err *err)
{
    return ps_profile_add(p,
        (ps_sample){.side = PS_SAMPLE_FIXED, .op = op, .fmt = -1, .seconds = seconds, .load = kind},
        err);
}

/* ---- copies ---- */

static ps_status copy_batch(profiler *p, bool in, ps_dptr at, uint64_t n_bytes, uint32_t n,
    load beside, uint64_t beside_ns, uint64_t *ns, bool *covered, ps_err *err)
{
    copy_lane *c = &p->copies[in ? 0 : 1];
    PS_TRY(ps_profile_start_load(p, beside, beside_ns + SETTLE_NS, err));
    if (!p->virtual_clock && beside.kind == PS_LOAD_CPU)
        nanosleep(&(struct timespec){.tv_nsec = SETTLE_NS}, NULL);
    if (!p->virtual_clock) /* so that the first does not wait for being enqueued */
        PS_TRY(ps_profile_copy(p, in, at, n_bytes, err));
    PS_TRY(ps_device_record(p->device, c->stream, c->from, err));
    for (uint32_t i = 0; i < n; i++) PS_TRY(ps_profile_copy(p, in, at, n_bytes, err));
    PS_TRY(ps_device_record(p->device, c->stream, c->to, err));
    PS_TRY(ps_device_sync(p->device, c->stream, err));
    *covered = ps_profile_is_loaded(p, beside);
    PS_TRY(ps_profile_end_load(p, beside, err));
    return ps_device_elapsed(p->device, c->from, c->to, ns, err);
}

static ps_status time_copy(
    profiler *p, bool in, ps_dptr at, uint64_t n_bytes, load beside, ps_err *err)
{
    const uint64_t batch = beside.kind == PS_LOAD_CPU ? LOADED_BATCH_BYTES : COPY_BATCH_BYTES;
    uint32_t n = (uint32_t)(batch / n_bytes), n_done = 0;
    n = p->virtual_clock || n < 2 ? 2 : n < MAX_BATCH ? n : MAX_BATCH;
    uint64_t times[MAX_TIMES] = {0}, start = ps_clock_ns(), slice = ps_profile_allowance_ns(p),
             beside_ns = (uint64_t)(n * n_bytes); /* as at 1 GB/s: it is known after the first */
    for (uint32_t i = 0; i < n_times(p); i++) {
        bool covered = true;
        PS_TRY(copy_batch(p, in, at, n_bytes, n, beside, beside_ns, &times[n_done], &covered, err));
        beside_ns = 2 * times[n_done];
        bool last = i + 1 == n_times(p) || ps_clock_ns() - start > slice;
        if (covered || last) n_done++;
        if (last) break;
    }
    uint32_t skip = n_done > 2 ? 1 : 0;
    double each_ns = (double)ps_profile_median(times + skip, n_done - skip) / n;
    copy_lane *c = &p->copies[in ? 0 : 1];
    if (n_bytes == p->copy_piece && beside.kind == PS_LOAD_IDLE) c->piece_ns = (uint64_t)each_ns;
    return ps_profile_add(p,
        (ps_sample){.side = in ? PS_SAMPLE_H2D : PS_SAMPLE_D2H,
            .op = "copy",
            .fmt = -1,
            .bytes = n_bytes,
            .seconds = each_ns * 1e-9,
            .threads = beside.kind == PS_LOAD_CPU ? beside.lane->threads : 0,
            .load = beside.kind},
        err);
}

/* Large copies go to and from the weights' area, of which each direction has a half; no op runs
 * then, and the weights are made again. */
ps_status ps_profile_time_copies(profiler *p, ps_err *err)
{
    op_memory *m = &p->dev_mem;
    uint64_t half = m->n_bytes[AREA_WEIGHTS] / 2 / PS_WEIGHT_ALIGN * PS_WEIGHT_ALIGN;
    m->fmts = 0;
    for (int i = 0; i < 2; i++)
        for (size_t s = 0; s < sizeof copy_sizes / sizeof *copy_sizes; s++) {
            if (copy_sizes[s] > ps_min_u64(half, p->copy_bytes)) break;
            PS_TRY(ps_profile_step(p, err));
            ps_dptr at = ps_dptr_add(m->base[AREA_WEIGHTS], i == 0 ? 0 : half);
            PS_TRY(time_copy(p, i == 0, at, copy_sizes[s], nothing, err));
        }
    return PS_OK;
}

/* ---- hand-offs ---- */

static uint32_t *flag_at(const profiler *p, uint32_t i)
{
    return (uint32_t *)(void *)((unsigned char *)p->flags + (size_t)i * FLAG_STRIDE);
}

/* The accelerator's half of all rounds: each sets a flag and waits for the answer. */
static ps_status record_rounds(profiler *p, ps_graph **out, ps_err *err)
{
    ps_stream *s = p->lanes[0].stream;
    PS_TRY(ps_graph_begin(p->device, s, err));
    ps_status status = PS_OK;
    for (uint32_t i = 0; i < ROUNDS && status == PS_OK; i++) {
        status = ps_device_flag_set(p->device, s, flag_at(p, 2 * i), 1, err);
        if (status == PS_OK)
            status = ps_device_flag_wait(p->device, s, flag_at(p, 2 * i + 1), 1, err);
    }
    ps_status ended = ps_graph_end(p->device, s, out, err);
    return status != PS_OK ? status : ended;
}

static ps_status run_rounds(
    profiler *p, ps_graph *graph, load beside, uint64_t beside_ns, uint64_t *ns, ps_err *err)
{
    run_lane *gpu = &p->lanes[0], *cpu = &p->flags_lane;
    for (uint32_t i = 0; i < 2 * ROUNDS; i++) __atomic_store_n(flag_at(p, i), 0, __ATOMIC_RELEASE);
    PS_TRY(ps_profile_start_load(p, beside, beside_ns, err));
    PS_TRY(ps_device_record(p->device, gpu->stream, gpu->from, err));
    PS_TRY(ps_graph_launch(p->device, gpu->stream, graph, err));
    PS_TRY(ps_device_record(p->device, gpu->stream, gpu->to, err));
    for (uint32_t i = 0; i < ROUNDS; i++) {
        PS_TRY(ps_device_flag_wait(p->device, cpu->stream, flag_at(p, 2 * i), 1, err));
        PS_TRY(ps_device_flag_set(p->device, cpu->stream, flag_at(p, 2 * i + 1), 1, err));
    }
    PS_TRY(ps_device_sync(p->device, gpu->stream, err));
    PS_TRY(ps_device_sync(p->device, cpu->stream, err));
    PS_TRY(ps_profile_end_load(p, beside, err));
    return ps_device_elapsed(p->device, gpu->from, gpu->to, ns, err);
}

static ps_status time_flags(profiler *p, load beside, ps_err *err)
{
    ps_graph *graph = NULL;
    uint64_t times[MAX_TIMES] = {0}, beside_ns = ROUNDS * 50000ull;
    uint32_t n = 0;
    ps_status status = record_rounds(p, &graph, err);
    for (; n < n_times(p) && status == PS_OK; n++) {
        status = run_rounds(p, graph, beside, beside_ns, &times[n], err);
        beside_ns = 2 * times[n];
    }
    if (status != PS_OK) ps_profile_drain(p); /* a graph that waits for a flag can't be destroyed */
    if (graph != NULL) ps_graph_destroy(p->device, graph);
    if (status != PS_OK) return status;
    return add_fixed(
        p, "flag", (double)ps_profile_median(times, n) * 1e-9 / (2 * ROUNDS), beside.kind, err);
}

/* ---- launches ---- */

/* The least that an op of this model can be, with addresses. */
static ps_status bind_smallest(
    profiler *p, run_lane *l, ps_side side, const op_call **out, ps_err *err)
{
    const op_calls *calls = &p->calls[side];
    const op_call *least = NULL;
    ps_op_args whole;
    uint32_t n_bound = 0;
    for (uint32_t i = 0; i < calls->n; i++)
        if (calls->items[i].work.n_tok == 1 &&
            (least == NULL || calls->items[i].work.bytes < least->work.bytes))
            least = &calls->items[i];
    ps_check_bug(least != NULL, err);
    ps_profile_cut(least, 1, &whole);
    PS_TRY(ps_profile_bind(l->mem, least, &whole, l->sm, 1, p->bound, &n_bound, err));
    *out = n_bound > 0 ? least : NULL;
    return PS_OK;
}

static ps_status issue(
    run_lane *l, const op_call *call, const ps_op_args *args, uint32_t n, ps_err *err)
{
    ps_cost cost = ps_op_cost(call->op, args);
    for (uint32_t i = 0; i < n; i++)
        PS_TRY(ps_device_run(l->device, l->stream, l->ops->op[call->op], args,
            ps_op_args_bytes(call->op), &cost, err));
    return PS_OK;
}

/* How long this thread is busy with enqueueing an op, and a copy. */
static ps_status time_issue(profiler *p, const op_call *call, ps_err *err)
{
    run_lane *gpu = &p->lanes[0];
    copy_lane *in = &p->copies[0];
    uint64_t op_ns[MAX_TIMES], copy_ns[MAX_TIMES];
    for (int i = 0; i < MAX_TIMES; i++) {
        uint64_t start = ps_clock_ns();
        PS_TRY(issue(gpu, call, p->bound, N_ISSUED, err));
        op_ns[i] = ps_clock_ns() - start;
        PS_TRY(ps_device_sync(p->device, gpu->stream, err));
        start = ps_clock_ns();
        for (uint32_t k = 0; k < MAX_BATCH; k++)
            PS_TRY(ps_profile_copy(p, true, in->piece, copy_sizes[0], err));
        copy_ns[i] = ps_clock_ns() - start;
        PS_TRY(ps_device_sync(p->device, in->stream, err));
    }
    PS_TRY(add_fixed(p, "launch", (double)ps_profile_median(op_ns, MAX_TIMES) * 1e-9 / N_ISSUED,
        PS_LOAD_IDLE, err));
    return add_fixed(p, "copy", (double)ps_profile_median(copy_ns, MAX_TIMES) * 1e-9 / MAX_BATCH,
        PS_LOAD_IDLE, err);
}

/* Launches a graph and waits for all streams, as a pass does. *gpu_ns: between the events around
 * it; *wall_ns: on the host's clock. */
static ps_status run_graph(
    profiler *p, ps_graph *graph, uint64_t *gpu_ns, uint64_t *wall_ns, ps_err *err)
{
    run_lane *gpu = &p->lanes[0];
    uint64_t start = ps_clock_ns();
    PS_TRY(ps_device_record(p->device, gpu->stream, gpu->from, err));
    PS_TRY(ps_graph_launch(p->device, gpu->stream, graph, err));
    PS_TRY(ps_device_record(p->device, gpu->stream, gpu->to, err));
    PS_TRY(ps_device_sync(p->device, gpu->stream, err));
    for (int i = 0; i < 2; i++) PS_TRY(ps_device_sync(p->device, p->copies[i].stream, err));
    PS_TRY(ps_device_sync(p->device, p->flags_lane.stream, err));
    *wall_ns = ps_clock_ns() - start;
    return ps_device_elapsed(p->device, gpu->from, gpu->to, gpu_ns, err);
}

/* The median times of a graph of `n` smallest ops. */
static ps_status time_graph(
    profiler *p, const op_call *call, uint32_t n, double *gpu_ns, double *wall_ns, ps_err *err)
{
    run_lane *gpu = &p->lanes[0];
    ps_graph *graph = NULL;
    uint64_t on_gpu[N_PASSES], wall[N_PASSES];
    PS_TRY(ps_graph_begin(p->device, gpu->stream, err));
    ps_status status = issue(gpu, call, p->bound, n, err);
    ps_status ended = ps_graph_end(p->device, gpu->stream, &graph, err);
    if (status == PS_OK) status = ended;
    for (int i = 0; i < N_PASSES && status == PS_OK; i++)
        status = run_graph(p, graph, &on_gpu[i], &wall[i], err);
    if (status != PS_OK) ps_profile_drain(p);
    if (graph != NULL) ps_graph_destroy(p->device, graph);
    if (status != PS_OK) return status;
    *gpu_ns = (double)ps_profile_median(on_gpu, N_PASSES);
    *wall_ns = (double)ps_profile_median(wall, N_PASSES);
    return PS_OK;
}

static ps_status time_launches(profiler *p, ps_err *err)
{
    const op_call *call = NULL;
    double few = 0, many = 0, wall = 0, ignored = 0;
    PS_TRY(bind_smallest(p, &p->lanes[0], PS_SIDE_DEV, &call, err));
    if (call == NULL) return PS_OK;
    PS_TRY(time_issue(p, call, err));
    PS_TRY(time_graph(p, call, 1, &few, &wall, err));
    PS_TRY(time_graph(p, call, 1 + N_ISSUED, &many, &ignored, err));
    double one = many > few ? (many - few) / N_ISSUED : 0;
    return add_fixed(p, "pass", wall > one ? (wall - one) * 1e-9 : 0, PS_LOAD_IDLE, err);
}

/* Without an accelerator a pass only wakes the CPU's thread and waits for it. */
static ps_status time_cpu_pass(profiler *p, ps_err *err)
{
    run_lane *l = &p->lanes[0];
    const op_call *call = NULL;
    uint64_t wall[N_PASSES], all = 0, start = 0;
    PS_TRY(bind_smallest(p, l, PS_SIDE_HOST, &call, err));
    if (call == NULL) return PS_OK;
    for (int i = 0; i < N_PASSES; i++) {
        start = ps_clock_ns();
        PS_TRY(issue(l, call, p->bound, 1, err));
        PS_TRY(ps_device_sync(l->device, l->stream, err));
        wall[i] = ps_clock_ns() - start;
    }
    PS_TRY(ps_device_record(l->device, l->stream, l->from, err));
    PS_TRY(issue(l, call, p->bound, N_ISSUED, err));
    PS_TRY(ps_device_record(l->device, l->stream, l->to, err));
    PS_TRY(ps_device_sync(l->device, l->stream, err));
    PS_TRY(ps_device_elapsed(l->device, l->from, l->to, &all, err));
    uint64_t one = all / N_ISSUED, pass = ps_profile_median(wall, N_PASSES);
    return add_fixed(p, "pass", pass > one ? (double)(pass - one) * 1e-9 : 0, PS_LOAD_IDLE, err);
}

/* A virtual clock knows nothing of the host's thread: there, only hand-offs take time. */
ps_status ps_profile_time_fixed(profiler *p, ps_err *err)
{
    static const char *const free_of_charge[] = {"launch", "copy", "pass"};
    PS_TRY(ps_profile_step(p, err));
    if (!p->has_gpu) return time_cpu_pass(p, err);
    if (p->virtual_clock)
        for (int i = 0; i < 3; i++) PS_TRY(add_fixed(p, free_of_charge[i], 0, PS_LOAD_IDLE, err));
    else
        PS_TRY(time_launches(p, err));
    PS_TRY(time_flags(p, nothing, err));
    PS_TRY(ps_profile_step(p, err));
    return time_flags(p, (load){PS_LOAD_H2D, NULL}, err);
}

/* ---- at once ---- */

/* On a shared machine the CPU may have become faster or slower since the call was timed alone: so
 * that is done again, right before. */
static ps_status time_beside(
    profiler *p, run_lane *l, const op_call *call, load beside, ps_err *err)
{
    ps_sample sample;
    bool fits = false;
    PS_TRY(ps_profile_step(p, err));
    if (call == NULL) return PS_OK;
    if (l->threads > 0 && !p->virtual_clock) {
        PS_TRY(ps_profile_time_call(p, l, call, nothing, &sample, &fits, err));
        if (fits) PS_TRY(ps_profile_add(p, sample, err));
    }
    PS_TRY(ps_profile_time_call(p, l, call, beside, &sample, &fits, err));
    return fits ? ps_profile_add(p, sample, err) : PS_OK;
}

/* The largest product of many tokens, which is bound by arithmetic. */
static const op_call *find_prompt_call(const op_calls *calls)
{
    const op_call *best = NULL;
    for (uint32_t i = 0; i < calls->n; i++) {
        const op_call *c = &calls->items[i];
        if ((c->op != PS_OP_MATMUL && c->op != PS_OP_MOE_UP) || c->work.n_tok > 512) continue;
        if (best == NULL || c->work.flops > best->work.flops) best = c;
    }
    return best;
}

/* The op of one token that reads least, but enough for the bus to matter. */
static const op_call *find_small_call(const op_calls *calls)
{
    const op_call *best = NULL;
    for (uint32_t i = 0; i < calls->n; i++) {
        const op_call *c = &calls->items[i];
        if ((c->op != PS_OP_MATMUL && c->op != PS_OP_MOE_DOWN) || c->work.n_tok != 1) continue;
        if (c->work.bytes < copy_sizes[0]) continue;
        if (best == NULL || c->work.bytes < best->work.bytes) best = c;
    }
    return best;
}

/* An op on one token's experts; NULL where there are none. */
static const op_call *find_expert_call(const op_calls *calls, ps_op_kind op)
{
    for (uint32_t i = 0; i < calls->n; i++)
        if (calls->items[i].op == op && calls->items[i].work.n_tok == 1) return &calls->items[i];
    return NULL;
}

/* Attention of one token over the fewest keys or the most. */
static const op_call *find_attention(const op_calls *calls, bool most)
{
    const op_call *best = NULL;
    for (uint32_t i = 0; i < calls->n; i++) {
        const op_call *c = &calls->items[i];
        if (c->op != PS_OP_ATTN || c->work.n_tok != 1) continue;
        if (best == NULL || (c->work.bytes > best->work.bytes) == most) best = c;
    }
    return best;
}

/* ---- host memory, read by the accelerator ---- */

typedef struct bus_reader { /* the accelerator's lane, whose weights are in locked memory */
    run_lane lane;
    op_memory mem;
} bus_reader;

static ps_status init_reader(profiler *p, bus_reader *r, ps_err *err)
{
    *r = (bus_reader){.lane = p->lanes[0], .mem = p->dev_mem};
    r->mem.locked_weights = p->copies[0].host;
    r->mem.n_bytes[AREA_WEIGHTS] = p->copies[0].host_bytes;
    r->mem.staging = p->copies[1].host;
    r->mem.pool = p->host_mem.pool;
    r->mem.fmts = 0;
    r->lane.mem = &r->mem;
    r->lane.main_call = NULL;
    memset(r->lane.rate, 0, sizeof r->lane.rate);
    return ps_device_locked_dptr(p->device, p->copies[0].host, &r->mem.base[AREA_WEIGHTS], err);
}

/* An op that reads its weights, its cache or images of experts from locked memory: what passes have
 * of it there. *out: its seconds, 0 where not all of it ran; may be NULL. */
static ps_status time_reading(profiler *p, bus_reader *r, const op_call *call, const char *name,
    load beside, double *out, ps_err *err)
{
    ps_sample sample;
    bool fits = false;
    if (out != NULL) *out = 0;
    PS_TRY(ps_profile_step(p, err));
    if (call == NULL) return PS_OK;
    PS_TRY(ps_profile_time_call(p, &r->lane, call, beside, &sample, &fits, err));
    if (call->fmts != 0) p->shared_mem.fmts = 0; /* which is overwritten */
    if (!fits) return PS_OK;
    if (out != NULL && !sample.extrapolated) *out = sample.seconds;
    sample.side = PS_SAMPLE_H2D;
    sample.op = name;
    sample.threads = beside.kind == PS_LOAD_CPU ? beside.lane->threads : 0;
    return ps_profile_add(p, sample, err);
}

/* Ops that find some of what they read in host memory: attention over two lengths, and all of a
 * token's experts there or one. */
static ps_status time_ops_there(profiler *p, ps_err *err)
{
    static const ps_op_kind ops[] = {PS_OP_MOE_UP, PS_OP_MOE_DOWN};
    const op_calls *calls = &p->calls[PS_SIDE_DEV];
    const op_call *few = find_attention(calls, false), *many = find_attention(calls, true);
    bus_reader r;
    PS_TRY(init_reader(p, &r, err));
    PS_TRY(time_reading(p, &r, few, ps_op_name(PS_OP_ATTN), nothing, NULL, err));
    PS_TRY(
        time_reading(p, &r, many != few ? many : NULL, ps_op_name(PS_OP_ATTN), nothing, NULL, err));
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        const op_call *all = find_expert_call(calls, ops[i]);
        op_call one = {0};
        if (all != NULL) one = ps_profile_one_expert(all);
        PS_TRY(time_reading(p, &r, all, ps_op_name(ops[i]), nothing, NULL, err));
        PS_TRY(
            time_reading(p, &r, all != NULL ? &one : NULL, ps_op_name(ops[i]), nothing, NULL, err));
    }
    return PS_OK;
}

/* ---- the CPU and the bus, in the same memory ---- */

/* From now on CPUs read their weights where copies come from, as in passes; if these fit there. A
 * virtual clock does not care, and has less of that memory. */
static ps_status share_memory(profiler *p, ps_err *err)
{
    op_memory *m = &p->shared_mem;
    if (p->virtual_clock) return PS_OK;
    *m = p->host_mem;
    m->base[AREA_WEIGHTS].a = (uint64_t)(uintptr_t)p->copies[0].host;
    m->n_bytes[AREA_WEIGHTS] = p->copies[0].host_bytes;
    m->fmts = 0;
    for (uint32_t i = 0; i < p->n_cpu_lanes; i++) {
        run_lane *l = &p->lanes[p->n_lanes - p->n_cpu_lanes + i];
        uint32_t n_bound = 0;
        ps_op_args whole;
        if (l->main_call == NULL) continue;
        ps_profile_cut(l->main_call, 1, &whole);
        PS_TRY(ps_profile_bind(m, l->main_call, &whole, l->sm, 1, p->bound, &n_bound, err));
        if (n_bound > 0) l->mem = m;
    }
    return PS_OK;
}

/* The CPU beside gathers and gathers beside the CPU. The CPU runs what most of a token's reading
 * consists of: ops on experts, where there are any. */
static ps_status time_gathers(profiler *p, ps_err *err)
{
    run_lane *gpu = &p->lanes[0], *cpus = &p->lanes[1], busy = *cpus;
    /* What passes gather most: a token's experts, or one of them, where there are any; else other
     * weights, since whatever an op reads there comes at about the same rate. */
    const op_call *all = gpu->main_call, *small = find_small_call(&p->calls[PS_SIDE_DEV]),
                  *up = find_expert_call(&p->calls[PS_SIDE_HOST], PS_OP_MOE_UP);
    op_call experts, expert;
    bus_reader r;
    double all_s = 0, up_s = 0;
    PS_TRY(init_reader(p, &r, err));
    if (ps_profile_gather_call(p->model, p->model->hp.n_expert_used, &experts)) {
        ps_profile_gather_call(p->model, 1, &expert);
        all = &experts;
        small = &expert;
    }
    PS_TRY(time_reading(p, &r, all, "gather", nothing, &all_s, err));
    PS_TRY(time_reading(p, &r, small != all ? small : NULL, "gather", nothing, NULL, err));
    if (up != NULL) up_s = ps_profile_seconds(p, up, PS_SAMPLE_CPU, cpus->threads);
    if (up_s > 0) {
        busy.main_call = up;
        busy.main_ns = (uint64_t)(up_s * 1e9);
    }
    if (busy.main_call == NULL) return PS_OK;
    PS_TRY(time_reading(p, &r, all, "gather", (load){PS_LOAD_CPU, &busy}, NULL, err));
    if (!(all_s > 0)) return PS_OK;
    r.lane.main_call = all;
    r.lane.main_ns = (uint64_t)(all_s * 1e9);
    return time_beside(p, cpus, busy.main_call, (load){PS_LOAD_GATHER, &r.lane}, err);
}

/* ---- ops behind each other ---- */

double ps_profile_seconds(
    const profiler *p, const op_call *call, ps_sample_side side, uint32_t threads)
{
    for (uint32_t i = 0; i < p->out->n_samples; i++) {
        const ps_sample *s = &p->out->samples[i];
        if (s->side == side && s->load == PS_LOAD_IDLE && s->threads == threads &&
            !s->extrapolated && strcmp(s->op, ps_op_name(call->op)) == 0 &&
            s->fmt == call->work.fmt && s->n_tok == call->work.n_tok &&
            s->flops == call->work.flops && s->bytes == call->work.bytes)
            return s->seconds;
    }
    return 0;
}

/* The median time of a graph of these, launched right behind itself. */
static ps_status time_row(
    profiler *p, const op_call *calls, const uint32_t *which, uint32_t n, uint64_t *ns, ps_err *err)
{
    run_lane *gpu = &p->lanes[0];
    ps_graph *graph = NULL;
    uint64_t times[MAX_TIMES] = {0};
    uint32_t n_done = 0;
    PS_TRY(ps_graph_begin(p->device, gpu->stream, err));
    ps_status status = PS_OK;
    for (uint32_t i = 0; i < n && status == PS_OK; i++)
        status = issue(gpu, &calls[which[i]], &p->bound[i], 1, err);
    ps_status ended = ps_graph_end(p->device, gpu->stream, &graph, err);
    if (status == PS_OK) status = ended;
    for (; n_done < n_times(p) && status == PS_OK; n_done++) {
        status = ps_graph_launch(p->device, gpu->stream, graph, err);
        if (status == PS_OK) status = ps_device_record(p->device, gpu->stream, gpu->from, err);
        if (status == PS_OK) status = ps_graph_launch(p->device, gpu->stream, graph, err);
        if (status == PS_OK) status = ps_device_record(p->device, gpu->stream, gpu->to, err);
        if (status == PS_OK) status = ps_device_sync(p->device, gpu->stream, err);
        if (status == PS_OK)
            status = ps_device_elapsed(p->device, gpu->from, gpu->to, &times[n_done], err);
    }
    if (status != PS_OK) ps_profile_drain(p);
    if (graph != NULL) ps_graph_destroy(p->device, graph);
    *ns = ps_profile_median(times, n_done);
    return status;
}

/* Samples are of one op again and again, which finds its code and the GPU's units as it left them.
 * A token's ops follow others: the first layers of one say what that costs an op. */
static ps_status time_token(profiler *p, const op_call *calls, uint32_t n, ps_err *err)
{
    run_lane *gpu = &p->lanes[0];
    uint32_t which[MAX_BOUND], n_bound = 0;
    uint64_t ns = 0;
    double alone = 0;
    PS_TRY(ps_profile_bind_each(gpu->mem, calls, n, gpu->sm, p->bound, which, &n_bound, err));
    if (n_bound == 0) return PS_OK;
    PS_TRY(time_row(p, calls, which, n_bound, &ns, err));
    for (uint32_t i = 0; i < n_bound; i++)
        alone += ps_profile_seconds(p, &calls[which[i]], PS_SAMPLE_GPU, 0);
    double more = ((double)ns * 1e-9 - alone) / n_bound;
    return add_fixed(p, "graph_node", more > 0 ? more : 0, PS_LOAD_IDLE, err);
}

static ps_status time_nodes(profiler *p, ps_err *err)
{
    op_calls calls = {0};
    uint32_t n = 0, kv = p->max_kv < 1024 ? p->max_kv : 1024;
    PS_TRY(ps_profile_step(p, err));
    ps_status status =
        ps_profile_collect_pass(p->model, PS_SIDE_DEV, p->device->info.sm, 1, kv, &calls, err);
    for (uint32_t i = 0; i < calls.n && n < MAX_BOUND; i++) /* those of which there are samples */
        if (ps_profile_seconds(p, &calls.items[i], PS_SAMPLE_GPU, 0) > 0)
            calls.items[n++] = calls.items[i];
    if (status == PS_OK && n > 0) status = time_token(p, calls.items, n, err);
    ps_free(calls.items);
    return status;
}

uint32_t ps_profile_bus_steps(const profiler *p)
{
    uint32_t n = 0;
    if (!p->has_gpu) return 1;
    for (size_t s = 0; s < sizeof copy_sizes / sizeof *copy_sizes; s++)
        n += copy_sizes[s] <= p->copy_bytes ? 2 : 0;
    return n + 2 + 2 + 3 + 2 * p->n_cpu_lanes + 4 + 1 + 6 + 1;
}

ps_status ps_profile_time_contention(profiler *p, ps_err *err)
{
    static const load h2d = {PS_LOAD_H2D, NULL}, d2h = {PS_LOAD_D2H, NULL};
    if (!p->has_gpu) return PS_OK;
    run_lane *gpu = &p->lanes[0], *cpus = &p->lanes[1];
    PS_TRY(time_nodes(p, err));
    PS_TRY(ps_profile_step(p, err));
    PS_TRY(time_copy(p, true, p->copies[0].piece, p->copy_piece, d2h, err));
    PS_TRY(ps_profile_step(p, err));
    PS_TRY(time_copy(p, false, p->copies[1].piece, p->copy_piece, h2d, err));
    PS_TRY(time_beside(p, gpu, gpu->main_call, h2d, err));
    PS_TRY(time_beside(p, gpu, find_prompt_call(&p->calls[PS_SIDE_DEV]), h2d, err));
    PS_TRY(time_beside(p, cpus, find_prompt_call(&p->calls[PS_SIDE_HOST]), h2d, err));
    PS_TRY(share_memory(p, err));
    for (uint32_t i = 0; i < p->n_cpu_lanes; i++) {
        load cpu = {PS_LOAD_CPU, &cpus[i]};
        PS_TRY(time_beside(p, &cpus[i], cpus[i].main_call, h2d, err));
        PS_TRY(ps_profile_step(p, err));
        if (cpus[i].main_call == NULL) continue;
        PS_TRY(time_copy(p, true, p->copies[0].piece, p->copy_piece, cpu, err));
    }
    PS_TRY(time_gathers(p, err));
    PS_TRY(ps_profile_step(p, err));
    if (cpus->main_call != NULL)
        PS_TRY(
            time_copy(p, false, p->copies[1].piece, p->copy_piece, (load){PS_LOAD_CPU, cpus}, err));
    return time_ops_there(p, err);
}
