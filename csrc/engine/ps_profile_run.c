/* ps_profile_run - lanes of the profiler: opening and draining them, timing an op call on one, and
 * keeping another busy meanwhile. See ps_profile_priv.h.
 *
 * CPUs of a real clock are `host` devices with as many threads each, so that every thread count is
 * timed in the same way; on a virtual clock the CPU is the emulated device's own. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/ps_profile_priv.h"
#include "engine/ps_ticks.h"

enum {
    MAX_SLICE_NS = 200 * 1000 * 1000, /* of real time for one sample */
    MIN_SLICE_NS = 1000 * 1000,
    BATCH_NS = 2 * 1000 * 1000, /* of runs in a row between two looks at the clock */
    MAX_TIMES = 6,
    MAX_LOAD_OPS = 1024,  /* of a lane that is kept busy; more than a driver queues would block */
    PROBE_WORK = 2000000, /* FLOPs and bytes of the first run of an op whose speed is not known */
};
#define MIN_SHARE            (1.0 / 4096)
#define LAUNCH_S             20e-6 /* what a launch takes at most */
#define DEFAULT_DEVICE_BYTES (256ull << 20)
#define MAX_HOST_BYTES       (4096ull << 20)
#define LITTLE_HOST_BYTES    (512ull << 20)
#define MAX_COPY_BYTES       (64ull << 20)
#define MIN_COPY_BYTES       (64ull << 10)
#define MAX_SOURCE_BYTES     (1024ull << 20)

/* ---- open and close ---- */

static ps_status open_lane(
    run_lane *l, ps_device *device, ps_stream_role role, const ps_op_table *ops, ps_err *err)
{
    l->device = device;
    l->ops = ops;
    PS_TRY(ps_stream_create(device, role, &l->stream, err));
    PS_TRY(ps_event_create(device, &l->from, err));
    return ps_event_create(device, &l->to, err);
}

static void close_lane(run_lane *l)
{
    if (l->device == NULL) return;
    if (l->from != NULL) ps_event_destroy(l->device, l->from);
    if (l->to != NULL) ps_event_destroy(l->device, l->to);
    if (l->stream != NULL) ps_stream_destroy(l->device, l->stream);
    if (l->owns_device) ps_device_close(l->device);
    *l = (run_lane){0};
}

static ps_status open_cpu_lane(profiler *p, uint32_t threads, ps_err *err)
{
    run_lane *l = &p->lanes[p->n_lanes];
    ps_device *device = p->device;
    if (!p->virtual_clock) {
        ps_device_options o = {.threads = (int)threads,
            .cpu_ops = p->spec->cpu_ops,
            .cpu_scratch_bytes =
                ps_plan_cpu_scratch_bytes(p->model, p->max_kv, p->max_tok, (int)threads)};
        PS_TRY(ps_device_open("host", &o, &device, err));
    }
    p->n_lanes++;
    p->n_cpu_lanes++;
    l->owns_device = !p->virtual_clock;
    l->threads = threads;
    l->mem = &p->host_mem;
    return open_lane(l, device, PS_STREAM_CPU, p->spec->cpu_ops, err);
}

static ps_status open_cpu_lanes(profiler *p, ps_err *err)
{
    bool beside_gpu = p->device->info.kind == PS_DEVICE_CUDA;
    uint32_t all = p->spec->threads;
    if (all == 0) all = (uint32_t)ps_device_default_threads(beside_gpu ? "cuda" : "host");
    uint32_t counts[MAX_CPU_LANES] = {all, all / 2, all >= 16 ? all / 4 : 1, 1};
    PS_TRY(open_cpu_lane(p, all, err));
    if (p->virtual_clock) return PS_OK; /* which charges any number of threads alike */
    for (int i = 1; i < MAX_CPU_LANES; i++)
        if (counts[i] > 0 && counts[i] < counts[i - 1]) PS_TRY(open_cpu_lane(p, counts[i], err));
    return PS_OK;
}

/* Weights come from memory and not from a cache, from where a copy is not held up by CPUs that read
 * memory at the same time. */
static uint64_t source_bytes(const profiler *p, uint64_t host_bytes)
{
    if (p->virtual_clock) return p->copy_bytes;
    return ps_max_u64(p->copy_bytes,
        ps_min_u64(host_bytes / 4, MAX_SOURCE_BYTES) / p->copy_bytes * p->copy_bytes);
}

static ps_status open_copy_lane(profiler *p, int i, uint64_t n_bytes, ps_err *err)
{
    copy_lane *c = &p->copies[i];
    void *host = NULL;
    PS_TRY(ps_stream_create(p->device, i == 0 ? PS_STREAM_H2D : PS_STREAM_D2H, &c->stream, err));
    PS_TRY(ps_event_create(p->device, &c->from, err));
    PS_TRY(ps_event_create(p->device, &c->to, err));
    PS_TRY(ps_device_locked_alloc(p->device, n_bytes, &host, err));
    memset(host, 1, n_bytes);
    c->host = host;
    c->host_bytes = n_bytes;
    c->piece = ps_dptr_add(p->copy_area, (uint64_t)i * p->copy_piece);
    return PS_OK;
}

static ps_status open_accelerator(profiler *p, uint64_t host_bytes, ps_err *err)
{
    uint64_t n_bytes = p->spec->device_bytes, n_free = 0, n_total = 0;
    if (n_bytes == 0) n_bytes = DEFAULT_DEVICE_BYTES;
    PS_TRY(ps_device_mem_info(p->device, &n_free, &n_total, err));
    n_bytes = ps_min_u64(n_bytes, n_free / 2);
    p->copy_bytes = MIN_COPY_BYTES;
    while (2 * p->copy_bytes <= ps_min_u64(host_bytes / 8, MAX_COPY_BYTES)) p->copy_bytes *= 2;
    p->copy_piece = ps_min_u64(COPY_PIECE, p->copy_bytes);
    while (p->copy_piece > n_bytes / 16) p->copy_piece /= 2;
    if (p->copy_piece < MIN_COPY_BYTES)
        return ps_fail(err, PS_EDEVICE, "%.1f MiB of device memory are too few to measure with",
            (double)n_bytes / (1 << 20));
    PS_TRY(ps_device_alloc(p->device, 2 * p->copy_piece, &p->copy_area, err));
    PS_TRY(open_copy_lane(p, 0, source_bytes(p, host_bytes), err));
    PS_TRY(open_copy_lane(p, 1, p->copy_bytes, err));
    PS_TRY(ps_device_locked_alloc(p->device, PROFILE_FLAG_BYTES, &p->flags, err));
    PS_TRY(open_lane(&p->flags_lane, p->device, PS_STREAM_CPU, p->spec->cpu_ops, err));
    op_memory *m = &p->dev_mem;
    m->device = p->device;
    m->h2d = p->copies[0].stream;
    m->staging = p->copies[0].host;
    m->staging_bytes = p->copy_bytes;
    PS_TRY(ps_profile_mem_init(m, n_bytes - 2 * p->copy_piece, err));
    run_lane *l = &p->lanes[p->n_lanes++];
    l->mem = m;
    l->sm = p->device->info.sm;
    return open_lane(l, p->device, PS_STREAM_COMPUTE, p->spec->dev_ops, err);
}

/* Several times what the largest caches of servers hold (300 MiB and more): with 512 MiB a CPU
 * seemed to read weights twice as fast as its memory gives them. */
static uint64_t default_host_bytes(const profiler *p)
{
    if (p->virtual_clock) return LITTLE_HOST_BYTES; /* which knows no caches */
    uint64_t machine = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    return ps_min_u64(MAX_HOST_BYTES, machine / 8);
}

ps_status ps_profile_lanes_open(profiler *p, ps_err *err)
{
    p->has_gpu = p->device->info.kind != PS_DEVICE_HOST;
    p->virtual_clock = p->device->info.virtual_clock;
    uint64_t host_bytes = p->spec->host_bytes > 0 ? p->spec->host_bytes : default_host_bytes(p);
    if (p->has_gpu) PS_TRY(open_accelerator(p, host_bytes, err));
    const uint64_t copies = p->copies[0].host_bytes + p->copies[1].host_bytes;
    PS_TRY(ps_profile_mem_init(&p->host_mem, host_bytes - copies, err));
    return open_cpu_lanes(p, err);
}

void ps_profile_lanes_close(profiler *p)
{
    for (uint32_t i = 0; i < p->n_lanes; i++) close_lane(&p->lanes[i]);
    close_lane(&p->flags_lane);
    for (int i = 0; i < 2; i++) {
        copy_lane *c = &p->copies[i];
        if (c->from != NULL) ps_event_destroy(p->device, c->from);
        if (c->to != NULL) ps_event_destroy(p->device, c->to);
        if (c->stream != NULL) ps_stream_destroy(p->device, c->stream);
    }
    ps_profile_mem_fini(&p->dev_mem);
    ps_profile_mem_fini(&p->host_mem);
    for (int i = 0; i < 2; i++)
        if (p->copies[i].host != NULL) ps_device_locked_free(p->device, p->copies[i].host);
    if (p->flags != NULL) ps_device_locked_free(p->device, p->flags);
    if (!ps_dptr_is_null(p->copy_area)) ps_device_free(p->device, p->copy_area);
}

/* All lanes are told to end before one is waited for, since one may wait for another. */
void ps_profile_drain(profiler *p)
{
    run_lane *lanes[MAX_LANES + 1];
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->n_lanes; i++) lanes[n++] = &p->lanes[i];
    lanes[n++] = &p->flags_lane;
    ps_device_set_abort(p->device, 1);
    for (uint32_t i = 0; i < n; i++)
        if (lanes[i]->device != NULL) ps_device_set_abort(lanes[i]->device, 1);
    for (uint32_t i = 0; i < n; i++)
        if (lanes[i]->stream != NULL) ps_device_sync(lanes[i]->device, lanes[i]->stream, NULL);
    for (int i = 0; i < 2; i++)
        if (p->copies[i].stream != NULL) ps_device_sync(p->device, p->copies[i].stream, NULL);
    for (uint32_t i = 0; i < n; i++)
        if (lanes[i]->device != NULL) ps_device_set_abort(lanes[i]->device, 0);
    ps_device_set_abort(p->device, 0);
}

/* ---- loads ---- */

static ps_status enqueue_runs(run_lane *l, const op_call *call, const ps_op_args *bound,
    uint32_t n_bound, uint32_t n, ps_err *err)
{
    for (uint32_t i = 0; i < n; i++) {
        const ps_op_args *args = &bound[i % n_bound];
        ps_cost cost = ps_op_cost(call->op, args);
        PS_TRY(ps_device_run(l->device, l->stream, l->ops->op[call->op], args,
            ps_op_args_bytes(call->op), &cost, err));
    }
    return PS_OK;
}

/* Half as much again as asked for: what is measured beside it may take longer for it. */
static uint32_t count_for(uint64_t ns, uint64_t each_ns)
{
    return (uint32_t)ps_min_u64(ns * 3 / 2 / ps_max_u64(each_ns, 1000) + 2, MAX_LOAD_OPS);
}

ps_status ps_profile_start_load(profiler *p, load beside, uint64_t ns, ps_err *err)
{
    if (beside.lane != NULL) {
        run_lane *l = beside.lane;
        uint32_t n_bound = 0;
        ps_op_args whole;
        ps_profile_cut(l->main_call, 1, &whole);
        PS_TRY(ps_profile_bind(
            l->mem, l->main_call, &whole, l->sm, MAX_BOUND, p->load_bound, &n_bound, err));
        ps_check_bug(n_bound > 0, err);
        return enqueue_runs(
            l, l->main_call, p->load_bound, n_bound, count_for(ns, l->main_ns), err);
    }
    copy_lane *c = &p->copies[beside.kind == PS_LOAD_D2H];
    uint32_t n = beside.kind == PS_LOAD_IDLE ? 0 : count_for(ns, c->piece_ns);
    for (uint32_t i = 0; i < n; i++)
        PS_TRY(ps_profile_copy(p, beside.kind == PS_LOAD_H2D, c->piece, p->copy_piece, err));
    return PS_OK;
}

ps_status ps_profile_copy(profiler *p, bool in, ps_dptr at, uint64_t n_bytes, ps_err *err)
{
    copy_lane *c = &p->copies[in ? 0 : 1];
    if (c->at + n_bytes > c->host_bytes) c->at = 0;
    unsigned char *host = c->host + c->at;
    c->at += n_bytes;
    return in ? ps_device_copy_in(p->device, c->stream, at, host, n_bytes, err)
              : ps_device_copy_out(p->device, c->stream, host, at, n_bytes, err);
}

bool ps_profile_is_loaded(const profiler *p, load beside)
{
    if (p->virtual_clock || beside.kind == PS_LOAD_IDLE) return true;
    if (beside.lane != NULL) return !ps_stream_idle(beside.lane->device, beside.lane->stream);
    return !ps_stream_idle(p->device, p->copies[beside.kind == PS_LOAD_D2H].stream);
}

ps_status ps_profile_end_load(profiler *p, load beside, ps_err *err)
{
    if (beside.kind == PS_LOAD_IDLE) return PS_OK;
    if (beside.lane != NULL) return ps_device_sync(beside.lane->device, beside.lane->stream, err);
    return ps_device_sync(p->device, p->copies[beside.kind == PS_LOAD_D2H].stream, err);
}

/* ---- timing ---- */

static int compare_ns(const void *pa, const void *pb)
{
    const uint64_t *a = pa, *b = pb;
    return *a < *b ? -1 : *a > *b;
}

uint64_t ps_profile_median(uint64_t *ns, uint32_t n)
{
    if (n == 0) return 0;
    qsort(ns, n, sizeof *ns, compare_ns);
    return ns[n / 2];
}

uint64_t ps_profile_allowance_ns(const profiler *p)
{
    uint64_t now = ps_clock_ns(), left = p->deadline_ns > now ? p->deadline_ns - now : 0;
    uint32_t n_left = p->n_steps > p->n_done ? p->n_steps - p->n_done : 1;
    return ps_min_u64(ps_max_u64(left / n_left, MIN_SLICE_NS), MAX_SLICE_NS);
}

static double work_of(const op_call *call, const ps_op_args *args)
{
    ps_cost cost = ps_op_cost(call->op, args);
    return (double)(cost.flops + cost.bytes + 1);
}

/* Some runs of a bound call, in a row between two events. */
typedef struct batch {
    run_lane *lane;
    const op_call *call;
    uint32_t n_bound, n;
    ps_graph *graph; /* owns; of all runs; NULL: they are enqueued one by one */
    bool leads_in;   /* something runs before, so that the first does not wait for being enqueued */
    const ps_op_args *cut; /* borrows; on a CPU bound again for every time, with other weights */
} batch;

static ps_status record_batch(batch *b, const ps_op_args *bound, ps_err *err)
{
    run_lane *l = b->lane;
    PS_TRY(ps_graph_begin(l->device, l->stream, err));
    ps_status status = enqueue_runs(l, b->call, bound, b->n_bound, b->n, err);
    ps_status ended = ps_graph_end(l->device, l->stream, &b->graph, err);
    return status != PS_OK ? status : ended;
}

static ps_status enqueue_batch(profiler *p, batch *b, uint32_t n, ps_err *err)
{
    run_lane *l = b->lane;
    if (b->graph != NULL) return ps_graph_launch(l->device, l->stream, b->graph, err);
    return enqueue_runs(l, b->call, p->bound, b->n_bound, n, err);
}

static ps_status time_once(profiler *p, batch *b, load beside, uint64_t beside_ns, uint64_t *ns,
    bool *covered, ps_err *err)
{
    run_lane *l = b->lane;
    PS_TRY(ps_profile_start_load(p, beside, beside_ns, err));
    if (b->leads_in) PS_TRY(enqueue_batch(p, b, 1, err));
    PS_TRY(ps_device_record(l->device, l->stream, l->from, err));
    PS_TRY(enqueue_batch(p, b, b->n, err));
    PS_TRY(ps_device_record(l->device, l->stream, l->to, err));
    PS_TRY(ps_device_sync(l->device, l->stream, err));
    *covered = ps_profile_is_loaded(p, beside);
    PS_TRY(ps_profile_end_load(p, beside, err));
    return ps_device_elapsed(l->device, l->from, l->to, ns, err);
}

/* The median of several batches, of which the first warms up; a slow one has to do alone. */
static ps_status time_batch(
    profiler *p, batch *b, load beside, uint64_t slice_ns, uint64_t *ns, ps_err *err)
{
    uint64_t times[MAX_TIMES] = {0}, start = ps_clock_ns(), before = start, beside_ns = BATCH_NS;
    uint32_t n = 0, n_wanted = p->virtual_clock ? 1 : MAX_TIMES;
    double work = work_of(b->call, p->bound) * b->n;
    for (uint32_t i = 0; i < n_wanted; i++) {
        bool covered = true;
        /* The weights of a few runs fit the cache of a large CPU. */
        if (i > 0 && b->lane->mem->device == NULL)
            PS_TRY(ps_profile_bind(
                b->lane->mem, b->call, b->cut, b->lane->sm, b->n, p->bound, &b->n_bound, err));
        PS_TRY(time_once(p, b, beside, beside_ns, &times[n], &covered, err));
        uint64_t now = ps_clock_ns(), real_ns = p->virtual_clock ? now - before : times[n];
        if (beside.kind == PS_LOAD_IDLE)
            b->lane->rate[b->call->op] = work * 1e9 / (double)ps_max_u64(real_ns, 1);
        before = now;
        beside_ns = ps_max_u64(beside_ns, 2 * times[n]);
        bool last = i + 1 == n_wanted || now - start > slice_ns;
        if (covered || last) n++; /* the load ended early: again, with more of it */
        if (now - start > slice_ns) break;
    }
    uint32_t skip = n > 2 ? 1 : 0;
    *ns = ps_profile_median(times + skip, n - skip);
    return PS_OK;
}

typedef struct part_time { /* of a share of a call */
    double share, seconds;
} part_time;

/* The time of `n` runs in a row of a part of a call that fits the memory. */
static ps_status time_runs(profiler *p, run_lane *l, const op_call *call, const ps_op_args *cut,
    uint32_t n, load beside, uint64_t slice_ns, uint64_t *ns, ps_err *err)
{
    uint32_t n_bound = 0;
    PS_TRY(ps_profile_bind(l->mem, call, cut, l->sm, n, p->bound, &n_bound, err));
    ps_check_bug(n_bound > 0, err);
    batch b = {.lane = l, .call = call, .cut = cut, .n_bound = n_bound, .n = n};
    b.leads_in = !p->virtual_clock && n > 1;
    ps_status status = PS_OK;
    /* As the executor does it, so that the gaps between small ops are those of its graphs. */
    if (l->threads == 0 && n > 1 && call->work.n_tok <= PS_SMALL_PASS_TOK)
        status = record_batch(&b, p->bound, err);
    if (status == PS_OK) status = time_batch(p, &b, beside, slice_ns, ns, err);
    if (status != PS_OK) ps_profile_drain(p); /* before the graph goes */
    if (b.graph != NULL) ps_graph_destroy(l->device, b.graph);
    return status;
}

/* Times the largest share of the call, up to `share`, that fits the memory; 0 where none does. */
static ps_status time_share(profiler *p, run_lane *l, const op_call *call, double share,
    load beside, uint64_t slice_ns, part_time *out, ps_err *err)
{
    ps_op_args cut;
    uint32_t n_bound = 0, n = 2;
    uint64_t ns = 0;
    double done = 0;
    for (; n_bound == 0; share /= 2) {
        done = ps_profile_cut(call, share, &cut);
        PS_TRY(ps_profile_bind(l->mem, call, &cut, l->sm, 1, p->bound, &n_bound, err));
        if (n_bound == 0 && share < MIN_SHARE) return PS_OK;
    }
    double most_ns = (double)ps_min_u64(slice_ns / MAX_TIMES, BATCH_NS);
    double n_most = most_ns / (work_of(call, &cut) / l->rate[call->op] * 1e9);
    if (!p->virtual_clock) n = n_most < 1 ? 1 : n_most < MAX_BOUND ? (uint32_t)n_most : MAX_BOUND;
    PS_TRY(time_runs(p, l, call, &cut, n, beside, slice_ns, &ns, err));
    /* Faster than thought: a longer row, beside which its beginning and end are nothing. */
    if (!p->virtual_clock && n < MAX_BOUND && ns < BATCH_NS / 8) {
        n = MAX_BOUND;
        PS_TRY(time_runs(p, l, call, &cut, n, beside, slice_ns, &ns, err));
    }
    *out = (part_time){done, (double)ns * 1e-9 / n};
    return PS_OK;
}

/* One run of a small part, to know how much of the rest there is time for. */
static ps_status probe(profiler *p, run_lane *l, const op_call *call, ps_err *err)
{
    ps_op_args cut;
    uint32_t n_bound = 0;
    ps_profile_cut(call, 1, &cut);
    for (double share = PROBE_WORK / work_of(call, &cut); n_bound == 0; share /= 2) {
        ps_profile_cut(call, share < 1 ? share : 1, &cut);
        PS_TRY(ps_profile_bind(l->mem, call, &cut, l->sm, 1, p->bound, &n_bound, err));
        if (n_bound == 0 && share < MIN_SHARE * MIN_SHARE) return PS_OK;
    }
    uint64_t start = ps_clock_ns();
    PS_TRY(enqueue_runs(l, call, p->bound, 1, 1, err));
    PS_TRY(ps_device_sync(l->device, l->stream, err));
    l->rate[call->op] = work_of(call, &cut) * 1e9 / (double)ps_max_u64(ps_clock_ns() - start, 1);
    return PS_OK;
}

/* The line through two parts, followed to the whole. Noise must make it neither steeper than if
 * nothing were there whatever the size, nor so flat that a launch and the conversion of the input
 * could not explain it. */
static double extrapolate(part_time large, part_time small)
{
    double steepest = large.seconds / large.share, slope = steepest;
    double flattest = (large.seconds / 2 - LAUNCH_S) / large.share;
    if (flattest < steepest / 16) flattest = steepest / 16;
    if (small.share < large.share)
        slope = (large.seconds - small.seconds) / (large.share - small.share);
    if (slope > steepest) slope = steepest;
    if (slope < flattest) slope = flattest;
    return large.seconds + slope * (1 - large.share);
}

ps_status ps_profile_time_call(profiler *p, run_lane *l, const op_call *call, load beside,
    ps_sample *out, bool *fits, ps_err *err)
{
    uint64_t slice = ps_profile_allowance_ns(p);
    *fits = false;
    if (!(l->rate[call->op] > 0)) PS_TRY(probe(p, l, call, err));
    if (!(l->rate[call->op] > 0)) return PS_OK;
    ps_op_args whole;
    ps_profile_cut(call, 1, &whole);
    double work = work_of(call, &whole), whole_ns = work / l->rate[call->op] * 1e9, share = 1;
    /* Three runs of a whole call, or two each of two parts of it, which are no smaller than what is
     * run without asking. */
    if (whole_ns * 3 > (double)slice) share = (double)slice / 4 / whole_ns;
    if (share < PROBE_WORK / work) share = PROBE_WORK / work;
    if (share > 1) share = 1;
    part_time large = {0}, small = {0};
    PS_TRY(time_share(p, l, call, share, beside, slice, &large, err));
    if (!(large.share > 0)) return PS_OK;
    if (large.share < 1)
        PS_TRY(time_share(p, l, call, large.share / 2, beside, slice / 2, &small, err));
    if (large.share < 1 && small.share >= large.share) { /* it was the least: one up, then */
        small = large;
        PS_TRY(time_share(p, l, call, 2 * small.share, beside, slice, &large, err));
    }
    *fits = true;
    *out = (ps_sample){.side = l->threads == 0 ? PS_SAMPLE_GPU : PS_SAMPLE_CPU,
        .op = ps_op_name(call->op),
        .fmt = call->work.fmt,
        .n_tok = call->work.n_tok,
        .flops = call->work.flops,
        .bytes = call->work.bytes,
        .seconds = large.share < 1 ? extrapolate(large, small) : large.seconds,
        .threads = l->threads,
        .load = beside.kind,
        .extrapolated = large.share < 1};
    return PS_OK;
}
