/* ps_lane - see ps_lane.h.
 *
 * Not here: argument checks, capture and replay.
 * Threads: records, flag words, flag times and the abort word are atomics; a lane that has to wait
 * for one of them sleeps on the hub's bell. There is no lock around them on purpose: it would order
 * lanes that the program did not, and hide from ThreadSanitizer the very races that the emulator
 * exists to show.
 */
#include "device/ps_lane.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum {
    RECORD_CHUNK = 64,
    POLL_SPIN_NS =
        2000000, /* polling a flag longer than this is waiting for a prompt, not for a hand-off */
    POLL_SLEEP_NS = 20000,
    DELAY_MAX_NS = 200000,
    POISON = 0xff, /* every float format reads it as NaN, every index as -1 */
};

typedef struct job {
    ps_lane *lane;
    uint64_t host_ns; /* of the hub, when it was enqueued */
    ps_lane_op op;
} job;
_Static_assert(
    sizeof(job) <= PS_JOB_BYTES, "an op with the largest arguments must fit a worker's job");

/* ---- hub ---- */

ps_status ps_hub_init(ps_hub *hub, ps_err *err)
{
    hub->epoch_ns = ps_clock_ns();
    if (hub->abort_word == NULL) hub->abort_word = &hub->own_abort;
    hub->flags = ps_alloc(PS_HUB_CAP_FLAGS, sizeof *hub->flags);
    hub->free_cells = ps_alloc(PS_HUB_CAP_FLAGS, sizeof *hub->free_cells);
    hub->flag_times = ps_alloc(PS_HUB_CAP_FLAGS, sizeof *hub->flag_times);
    if (hub->flags == NULL || hub->free_cells == NULL || hub->flag_times == NULL) {
        ps_hub_fini(hub);
        return ps_fail(err, PS_ENOMEM, "no memory for the flags of a device");
    }
    for (uint32_t i = 0; i < PS_HUB_CAP_FLAGS; i++) hub->free_cells[i] = PS_HUB_CAP_FLAGS - 1 - i;
    return PS_OK;
}

void ps_hub_fini(ps_hub *hub)
{
    for (uint32_t i = 0; i < hub->n_chunks; i++) ps_free(hub->chunks[i]);
    ps_free(hub->chunks);
    ps_free(hub->chunk_sizes);
    ps_free(hub->flags);
    ps_free(hub->free_cells);
    ps_free(hub->flag_times);
    hub->chunks = NULL;
    hub->chunk_sizes = NULL;
    hub->flags = NULL;
    hub->free_cells = NULL;
    hub->flag_times = NULL;
    hub->n_chunks = hub->cap_chunks = hub->n_records = hub->n_records_needed = hub->n_flags = 0;
}

void ps_hub_set_abort(ps_hub *hub, uint32_t value)
{
    __atomic_store_n(hub->abort_word, value, __ATOMIC_RELEASE);
    ps_bell_ring(&hub->bell);
}

void ps_hub_lose(ps_hub *hub)
{
    __atomic_store_n(&hub->lost, 1, __ATOMIC_RELEASE);
    ps_bell_ring(&hub->bell);
}

bool ps_hub_released(const ps_hub *hub)
{
    return __atomic_load_n(hub->abort_word, __ATOMIC_RELAXED) != 0 ||
           __atomic_load_n(&hub->lost, __ATOMIC_RELAXED) != 0;
}

uint64_t ps_hub_now_ns(const ps_hub *hub)
{
    return ps_clock_ns() - hub->epoch_ns;
}

/* ---- records ---- */

static bool add_chunk(ps_hub *hub, uint32_t n)
{
    if (hub->n_chunks == hub->cap_chunks) {
        uint32_t cap = hub->cap_chunks == 0 ? 16 : hub->cap_chunks * 2;
        ps_record **chunks = ps_realloc(hub->chunks, cap, sizeof *chunks);
        if (chunks == NULL) return false;
        hub->chunks = chunks;
        uint32_t *sizes = ps_realloc(hub->chunk_sizes, cap, sizeof *sizes);
        if (sizes == NULL) return false;
        hub->chunk_sizes = sizes;
        hub->cap_chunks = cap;
    }
    ps_record *chunk = ps_alloc(n, sizeof *chunk);
    if (chunk == NULL) return false;
    hub->chunks[hub->n_chunks] = chunk;
    hub->chunk_sizes[hub->n_chunks++] = n;
    hub->n_records += n;
    return true;
}

ps_status ps_hub_need_records(ps_hub *hub, int64_t n, ps_err *err)
{
    uint32_t needed = (uint32_t)((int64_t)hub->n_records_needed + n);
    if (n > 0 && needed > hub->n_records) {
        uint32_t missing = needed - hub->n_records;
        if (!add_chunk(hub, missing < RECORD_CHUNK ? RECORD_CHUNK : missing))
            return ps_fail(err, PS_ENOMEM, "no memory for %u event records", missing);
    }
    hub->n_records_needed = needed;
    return PS_OK;
}

ps_record *ps_hub_take_record(ps_hub *hub, uint32_t refs)
{
    for (uint32_t tried = 0; tried <= hub->n_records; tried++) {
        if (hub->n_chunks == 0) return NULL;
        if (hub->next_record >= hub->chunk_sizes[hub->next_chunk]) {
            hub->next_record = 0;
            hub->next_chunk = (hub->next_chunk + 1) % hub->n_chunks;
        }
        ps_record *record = &hub->chunks[hub->next_chunk][hub->next_record++];
        if (__atomic_load_n(&record->refs, __ATOMIC_ACQUIRE) != 0) continue;
        record->time_ns = 0;
        __atomic_store_n(&record->done, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&record->refs, refs, __ATOMIC_RELAXED);
        return record;
    }
    return NULL;
}

void ps_record_release(ps_record *record)
{
    if (record != NULL) __atomic_fetch_sub(&record->refs, 1, __ATOMIC_RELEASE);
}

bool ps_record_is_done(const ps_record *record)
{
    return __atomic_load_n(&record->done, __ATOMIC_ACQUIRE) != 0;
}

/* ---- flags ---- */

static uint32_t first_flag_at(const ps_hub *hub, uintptr_t addr)
{
    uint32_t lo = 0, hi = hub->n_flags;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if ((uintptr_t)hub->flags[mid].flag < addr)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

uint64_t *ps_hub_flag_time(ps_hub *hub, const uint32_t *flag)
{
    uint32_t i = first_flag_at(hub, (uintptr_t)flag);
    if (i < hub->n_flags && hub->flags[i].flag == flag)
        return &hub->flag_times[hub->flags[i].i_cell];
    if (hub->n_flags == PS_HUB_CAP_FLAGS) return NULL;
    uint32_t i_cell = hub->free_cells[PS_HUB_CAP_FLAGS - 1 - hub->n_flags];
    memmove(&hub->flags[i + 1], &hub->flags[i], (hub->n_flags - i) * sizeof *hub->flags);
    hub->flags[i] = (ps_flag_entry){.flag = flag, .i_cell = i_cell};
    hub->n_flags++;
    __atomic_store_n(&hub->flag_times[i_cell], 0, __ATOMIC_RELAXED);
    return &hub->flag_times[i_cell];
}

void ps_hub_forget_flags(ps_hub *hub, const void *base, uint64_t n_bytes)
{
    uint32_t begin = first_flag_at(hub, (uintptr_t)base);
    uint32_t end = first_flag_at(hub, (uintptr_t)base + n_bytes);
    for (uint32_t i = begin; i < end; i++)
        hub->free_cells[PS_HUB_CAP_FLAGS - hub->n_flags + (i - begin)] = hub->flags[i].i_cell;
    memmove(&hub->flags[begin], &hub->flags[end], (hub->n_flags - end) * sizeof *hub->flags);
    hub->n_flags -= end - begin;
}

/* ---- lane ---- */

void ps_lane_fail(ps_lane *lane, ps_status status, const char *fmt, ...)
{
    if (lane->failure.status != PS_OK) return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(lane->failure.message, sizeof lane->failure.message, fmt, ap);
    va_end(ap);
    lane->failure.status = status;
}

uint32_t ps_lane_op_bytes(ps_lane_op_kind kind, uint32_t args_bytes)
{
    size_t n = offsetof(ps_lane_op, u);
    switch (kind) {
    case PS_LANE_COPY: n += sizeof(ps_lane_copy); break;
    case PS_LANE_RUN: n += offsetof(ps_lane_run, args) + args_bytes; break;
    case PS_LANE_RECORD:
    case PS_LANE_WAIT:
    case PS_LANE_MARK:
    case PS_LANE_GRAPH: n += sizeof(void *); break;
    case PS_LANE_FLAG_SET:
    case PS_LANE_FLAG_WAIT: n += sizeof(ps_lane_flag); break;
    }
    return (uint32_t)((n + 15) / 16 * 16);
}

static void job_main(void *arg)
{
    job *j = arg;
    if (j->lane->hub->virtual_clock) j->lane->time_ns = ps_max_u64(j->lane->time_ns, j->host_ns);
    ps_lane_exec(j->lane, &j->op);
}

void ps_lane_push(ps_lane *lane, const ps_lane_op *op)
{
    job j;
    j.lane = lane;
    j.host_ns = lane->hub->host_ns;
    memcpy(&j.op, op, op->n_bytes);
    ps_worker_push(lane->worker, job_main, &j, (uint32_t)offsetof(job, op) + op->n_bytes);
}

ps_status ps_lane_create(
    ps_hub *hub, ps_stream_role role, uint32_t cap_jobs, bool runs_ops, ps_lane **out, ps_err *err)
{
    *out = NULL;
    ps_lane *lane = ps_alloc(1, sizeof *lane);
    if (lane == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a stream");
    lane->hub = hub;
    lane->role = role;
    lane->rng = hub->seed + 0x100000001b3ull * ++hub->n_lanes_made;
    ps_status status = PS_OK;
    if (runs_ops) {
        int n_threads = role == PS_STREAM_CPU       ? hub->cpu_threads
                        : role == PS_STREAM_COMPUTE ? hub->compute_threads
                                                    : 1;
        status = ps_pool_create(n_threads, &lane->pool, err);
        if (status == PS_OK && hub->scratch_bytes > 0) {
            lane->scratch = ps_alloc(hub->scratch_bytes, 1);
            if (lane->scratch == NULL)
                status =
                    ps_fail(err, PS_ENOMEM, "no memory for %llu bytes of scratch of the %s stream",
                        (unsigned long long)hub->scratch_bytes, ps_stream_role_name(role));
        }
    }
    lane->launch = (ps_launch){.info = hub->info,
        .pool = lane->pool,
        .tag = role == PS_STREAM_CPU ? 0 : hub->accel_tag,
        .scratch = lane->scratch,
        .scratch_bytes = runs_ops ? hub->scratch_bytes : 0,
        .cpu_ops = hub->cpu_ops,
        .abort = hub->abort_word};
    if (status == PS_OK) status = ps_worker_create(cap_jobs, &lane->worker, err);
    if (status != PS_OK) {
        ps_lane_destroy(lane);
        return status;
    }
    *out = lane;
    return PS_OK;
}

void ps_lane_destroy(ps_lane *lane)
{
    if (lane == NULL) return;
    ps_worker_destroy(lane->worker);
    ps_pool_destroy(lane->pool);
    ps_free(lane->scratch);
    ps_free(lane);
}

ps_status ps_lane_sync(ps_lane *lane, ps_err *err)
{
    ps_worker_drain(lane->worker);
    if (lane->hub->virtual_clock)
        lane->hub->host_ns = ps_max_u64(lane->hub->host_ns, lane->time_ns);
    ps_status status = lane->failure.status;
    if (status == PS_OK) return PS_OK;
    ps_fail(err, status, "%s", lane->failure.message);
    lane->failure = (ps_err){0};
    return status;
}

/* ---- execution, on the worker's thread ---- */

static void sleep_ns(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    nanosleep(&t, NULL);
}

static void delay(ps_lane *lane)
{
    if (!lane->hub->delays) return;
    uint64_t r = ps_rng_next(&lane->rng);
    if ((r & 1) != 0) sleep_ns((r >> 1) % DELAY_MAX_NS);
}

static void charge_ns(ps_lane *lane, double ns)
{
    lane->time_ns += (uint64_t)(ns + 0.5);
}

static void exec_copy(ps_lane *lane, const ps_lane_copy *copy)
{
    const ps_hub *hub = lane->hub;
    if (hub->delays) {
        /* A copy in flight leaves neither the old bytes nor the new ones to rely on. */
        memset(copy->dst, POISON, copy->n_bytes);
        delay(lane);
    }
    memcpy(copy->dst, copy->src, copy->n_bytes);
    double rate = copy->inbound ? hub->profile.h2d_bytes_per_s : hub->profile.d2h_bytes_per_s;
    if (hub->virtual_clock)
        charge_ns(lane, (double)hub->profile.copy_ns + (double)copy->n_bytes / rate * 1e9);
}

static void exec_run(ps_lane *lane, const ps_lane_run *run)
{
    const ps_hub *hub = lane->hub;
    ps_status status = run->fn(&lane->launch, run->args);
    if (status != PS_OK)
        ps_lane_fail(lane, status, "op %u of tick %u failed on the %s stream with %s", run->cost.op,
            run->cost.tick, ps_stream_role_name(lane->role), ps_status_name(status));
    if (!hub->virtual_clock) return;
    const ps_emu_profile *p = &hub->profile;
    bool on_cpu = lane->role == PS_STREAM_CPU;
    double move_s = (double)(run->cost.bytes - run->cost.bus_bytes) /
                    (on_cpu ? p->dram_bytes_per_s : p->vram_bytes_per_s);
    double bus_s = (double)run->cost.bus_bytes / p->h2d_bytes_per_s;
    double disk_s = (double)run->cost.disk_bytes / p->disk_bytes_per_s;
    if (bus_s > move_s) move_s = bus_s;
    if (disk_s > move_s) move_s = disk_s;
    double math_s = (double)run->cost.flops / (on_cpu ? p->cpu_flops : p->gpu_flops);
    charge_ns(lane, (double)p->launch_ns + (move_s > math_s ? move_s : math_s) * 1e9);
}

static void exec_wait(ps_lane *lane, ps_record *record)
{
    for (;;) {
        uint32_t seen = ps_bell_look(&lane->hub->bell);
        if (ps_record_is_done(record)) break;
        ps_bell_wait(&lane->hub->bell, seen);
    }
    if (lane->hub->virtual_clock) lane->time_ns = ps_max_u64(lane->time_ns, record->time_ns);
    ps_record_release(record);
}

/* A GPU may be the setter: nobody rings, so look. Hand-offs take microseconds; past that the CPU is
 * given back. */
static void poll_flag(const ps_hub *hub, const uint32_t *flag, uint32_t value)
{
    uint64_t start_ns = ps_clock_ns();
    for (uint32_t n = 1; __atomic_load_n(flag, __ATOMIC_ACQUIRE) != value && !ps_hub_released(hub);
         n++) {
        __builtin_ia32_pause();
        if (n % 64 == 0 && ps_clock_ns() - start_ns > POLL_SPIN_NS) sleep_ns(POLL_SLEEP_NS);
    }
}

static void exec_flag_wait(ps_lane *lane, const ps_lane_flag *f)
{
    ps_hub *hub = lane->hub;
    if (hub->poll_flags) {
        poll_flag(hub, f->flag, f->value);
        return;
    }
    for (;;) {
        uint32_t seen = ps_bell_look(&hub->bell);
        if (__atomic_load_n(f->flag, __ATOMIC_ACQUIRE) == f->value || ps_hub_released(hub)) break;
        ps_bell_wait(&hub->bell, seen);
    }
    if (!hub->virtual_clock) return;
    uint64_t set_ns =
        __atomic_load_n(f->time_ns, __ATOMIC_RELAXED); /* ordered by the flag itself */
    lane->time_ns = ps_max_u64(lane->time_ns, set_ns) + hub->profile.flag_ns;
}

void ps_lane_exec(ps_lane *lane, const ps_lane_op *op)
{
    ps_hub *hub = lane->hub;
    delay(lane);
    bool skip = lane->failure.status != PS_OK || ps_hub_released(hub);
    switch ((ps_lane_op_kind)op->kind) {
    case PS_LANE_COPY:
        if (!skip) exec_copy(lane, &op->u.copy);
        break;
    case PS_LANE_RUN:
        if (!skip) exec_run(lane, &op->u.run);
        break;
    case PS_LANE_WAIT: exec_wait(lane, op->u.record); break;
    case PS_LANE_FLAG_WAIT: exec_flag_wait(lane, &op->u.flag); break;
    case PS_LANE_FLAG_SET:
        __atomic_store_n(op->u.flag.time_ns, lane->time_ns, __ATOMIC_RELAXED);
        __atomic_store_n(op->u.flag.flag, op->u.flag.value, __ATOMIC_RELEASE);
        ps_bell_ring(&hub->bell);
        break;
    case PS_LANE_GRAPH: ps_soft_graph_exec(lane, op->u.graph); break;
    case PS_LANE_RECORD:
    case PS_LANE_MARK: break;
    }
    if (!hub->virtual_clock) lane->time_ns = ps_hub_now_ns(hub);
    if (op->kind == PS_LANE_RECORD) {
        op->u.record->time_ns = lane->time_ns;
        __atomic_store_n(&op->u.record->done, 1, __ATOMIC_RELEASE);
        ps_record_release(op->u.record);
        ps_bell_ring(&hub->bell);
    } else if (op->kind == PS_LANE_MARK) {
        op->u.mark->time_ns = lane->time_ns;
        __atomic_store_n(&op->u.mark->done, 1, __ATOMIC_RELEASE);
    }
}
