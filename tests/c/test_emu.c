/* What only the emulated GPU can show: virtual time to the nanosecond whatever the real timing,
 * races when a wait is left out, traps on confused addresses, hard capacity, and faults on demand.
 */
#include "test_device.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#if defined(__SANITIZE_THREAD__)
enum { UNDER_TSAN = 1 };
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
enum { UNDER_TSAN = 1 };
#else
enum { UNDER_TSAN = 0 };
#endif
#else
enum { UNDER_TSAN = 0 };
#endif

/* Easy to reckon with: one byte a nanosecond in, two nanoseconds a byte out. */
static const ps_emu_profile profile = {
    .h2d_bytes_per_s = 1e9,
    .d2h_bytes_per_s = 0.5e9,
    .vram_bytes_per_s = 10e9,
    .gpu_flops = 1e9,
    .dram_bytes_per_s = 2e9,
    .cpu_flops = 0.25e9,
    .launch_ns = 100,
    .copy_ns = 50,
    .flag_ns = 7,
    .disk_bytes_per_s = 0.1e9,
};

static bool open_emu(fixture *f, ps_device_options options)
{
    *f = (fixture){.name = "emu"};
    if (options.threads == 0) options.threads = 2;
    if (options.emu_vram_bytes == 0) options.emu_vram_bytes = 64 << 20;
    return open_fixture(f, "emu", &options);
}

/* ---- virtual time ---- */

static ps_status run_nothing(const ps_launch *launch, const void *args)
{
    (void)launch;
    (void)args;
    return PS_OK;
}

PS_TEST(clock_charges_by_profile)
{
    static const struct {
        const char *what;
        ps_stream_role role;
        ps_cost cost;
        uint64_t ns;
    } ops[] = {
        {"nothing", PS_STREAM_COMPUTE, {0}, 100},
        {"flops", PS_STREAM_COMPUTE, {.flops = 1000}, 1100},
        {"bytes", PS_STREAM_COMPUTE, {.bytes = 5000}, 600},
        {"both, bytes longer", PS_STREAM_COMPUTE, {.flops = 1000, .bytes = 20000}, 2100},
        {"both, flops longer", PS_STREAM_COMPUTE, {.flops = 3000, .bytes = 20000}, 3100},
        {"gather on a copy stream", PS_STREAM_H2D, {.bytes = 5000}, 600},
        {"CPU nothing", PS_STREAM_CPU, {0}, 100},
        {"CPU flops", PS_STREAM_CPU, {.flops = 1000}, 4100},
        {"CPU bytes", PS_STREAM_CPU, {.bytes = 5000}, 2600},
        {"CPU bytes from disk", PS_STREAM_CPU, {.bytes = 5000, .disk_bytes = 500}, 5100},
        {"CPU bytes longer", PS_STREAM_CPU, {.bytes = 50000, .disk_bytes = 500}, 25100},
    };
    fixture fx, *f = &fx;
    PS_REQUIRE(open_emu(f, (ps_device_options){.emu_profile = profile}));
    ps_stream *streams[PS_STREAM_COUNT] = {f->compute, f->h2d, f->d2h, f->cpu};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        ps_test_case("%s", ops[i].what);
        ps_stream *s = streams[ops[i].role];
        uint64_t before = 0, error = 0;
        DO_OK(ps_device_tie_clocks(f->d, &before, &error, &f->err));
        DO_OK(ps_device_run(f->d, s, run_nothing, NULL, 0, &ops[i].cost, &f->err));
        DO_OK(ps_device_sync(f->d, s, &f->err));
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, s) - before, ops[i].ns);
    }
    ps_test_case("copies");
    ps_dptr p;
    void *h;
    DO_OK(ps_device_alloc(f->d, 4000, &p, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, 4000, &h, &f->err));
    uint64_t before = 0, error = 0;
    DO_OK(ps_device_tie_clocks(f->d, &before, &error, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->d2h, p, h, 4000, &f->err));
    DO_OK(ps_device_copy_out(f->d, f->d2h, h, p, 1000, &f->err));
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
    PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->d2h) - before, 50 + 4000 + 50 + 2000);
    ps_device_close(f->d);
}

PS_TEST(clock_of_flags_and_events)
{
    for (uint64_t seed = 0; seed < 3; seed++) {
        ps_test_case("seed %d", (int)seed);
        fixture fx, *f = &fx;
        PS_REQUIRE(open_emu(f,
            (ps_device_options){.emu_profile = profile, .emu_delays = seed > 0, .emu_seed = seed}));
        uint32_t *h = NULL;
        ps_event *a, *b;
        uint64_t ns = 0;
        DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
        DO_OK(ps_event_create(f->d, &a, &f->err));
        DO_OK(ps_event_create(f->d, &b, &f->err));
        /* GPU 100 + 900, then the CPU, idle so far, takes over: 1000 + 7 + 100 + 4 * 500; then
         * back: + 7 + 100. */
        DO_OK(ps_device_record(f->d, f->compute, a, &f->err));
        DO_OK(ps_device_run(
            f->d, f->compute, run_nothing, NULL, 0, &(ps_cost){.flops = 900}, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->compute, h, 1, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->cpu, h, 1, &f->err));
        DO_OK(ps_device_run(f->d, f->cpu, run_nothing, NULL, 0, &(ps_cost){.flops = 500}, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->cpu, h + 1, 1, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->compute, h + 1, 1, &f->err));
        DO_OK(ps_device_run(f->d, f->compute, run_nothing, NULL, 0, NULL, &f->err));
        DO_OK(ps_device_record(f->d, f->compute, b, &f->err));
        /* A late setter does not hurry: the waiter is at 100000 already. */
        DO_OK(
            ps_device_run(f->d, f->h2d, run_nothing, NULL, 0, &(ps_cost){.flops = 99900}, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->h2d, h + 1, 1, &f->err));
        /* Waits for an event take its time and cost nothing. */
        DO_OK(ps_device_wait(f->d, f->d2h, b, &f->err));
        DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->d2h), 3214);
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
        DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->cpu), 3107);
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->compute), 3214);
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->h2d), 100007);
        DO_OK(ps_device_elapsed(f->d, a, b, &ns, &f->err));
        PS_CHECK_EQ_U64(ns, 3214);
        /* Who has waited for a stream enqueues behind it in time, also on an idle one. */
        DO_OK(ps_device_run(f->d, f->d2h, run_nothing, NULL, 0, NULL, &f->err));
        DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->d2h), 100107);
        ps_device_close(f->d);
    }
}

/* ---- the pipeline: shards through two slots ---- */

enum { SHARDS = 64, SLOTS = 2, WORDS = 500, SHARD_BYTES = WORDS * 4 };
typedef enum mutant { CORRECT, NO_WAIT_FOR_FREED, NO_WAIT_FOR_FILLED } mutant;

typedef struct pipeline {
    uint32_t *in, *out; /* locked [SHARDS][WORDS] */
    ps_dptr slots, results;
    ps_event *filled[SLOTS], *freed[SLOTS], *fork, *join;
} pipeline;

static void make_pipeline(fixture *f, pipeline *p)
{
    DO_OK(ps_device_locked_alloc(f->d, SHARDS * SHARD_BYTES, (void **)&p->in, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, SHARDS * SHARD_BYTES, (void **)&p->out, &f->err));
    DO_OK(ps_device_alloc(f->d, SLOTS * SHARD_BYTES, &p->slots, &f->err));
    DO_OK(ps_device_alloc(f->d, SHARDS * SHARD_BYTES, &p->results, &f->err));
    for (int i = 0; i < SLOTS; i++) {
        DO_OK(ps_event_create(f->d, &p->filled[i], &f->err));
        DO_OK(ps_event_create(f->d, &p->freed[i], &f->err));
    }
    DO_OK(ps_event_create(f->d, &p->fork, &f->err));
    DO_OK(ps_event_create(f->d, &p->join, &f->err));
    for (uint32_t i = 0; i < SHARDS; i++) fill_words(p->in + i * WORDS, WORDS, i + 1);
}

/* A copy takes 2 units of 1000 ns, an op 3: it runs behind the first copy without a gap, 3n + 2. */
static void enqueue_pipeline(fixture *f, const pipeline *p, mutant what)
{
    const ps_cost cost = {.flops = 3000};
    for (uint32_t i = 0; i < SHARDS; i++) {
        ps_dptr slot = ps_dptr_add(p->slots, i % SLOTS * SHARD_BYTES);
        ps_event *filled = p->filled[i % SLOTS], *freed = p->freed[i % SLOTS];
        if (i >= SLOTS && what != NO_WAIT_FOR_FREED)
            DO_OK(ps_device_wait(f->d, f->h2d, freed, &f->err));
        DO_OK(ps_device_copy_in(f->d, f->h2d, slot, p->in + i * WORDS, SHARD_BYTES, &f->err));
        DO_OK(ps_device_record(f->d, f->h2d, filled, &f->err));
        if (what != NO_WAIT_FOR_FILLED) DO_OK(ps_device_wait(f->d, f->compute, filled, &f->err));
        DO_OK(op_copy(f, f->compute, ps_dptr_add(p->results, (uint64_t)i * SHARD_BYTES), slot,
            SHARD_BYTES, &cost));
        DO_OK(ps_device_record(f->d, f->compute, freed, &f->err));
    }
}

/* Copies the results out and counts the shards that are not what went in. */
static uint32_t wrong_shards(fixture *f, const pipeline *p)
{
    uint32_t n_wrong = SHARDS + 1;
    if (ps_device_copy_out(f->d, f->compute, p->out, p->results, SHARDS * SHARD_BYTES, &f->err) !=
            PS_OK ||
        ps_device_sync(f->d, f->compute, &f->err) != PS_OK ||
        ps_device_sync(f->d, f->h2d, &f->err) != PS_OK)
        return n_wrong;
    n_wrong = 0;
    for (uint32_t i = 0; i < SHARDS; i++)
        n_wrong += count_wrong(p->out + i * WORDS, WORDS, i + 1) != 0;
    return n_wrong;
}

static ps_device_options pipeline_options(uint64_t seed)
{
    ps_device_options o = {.emu_profile = profile, .emu_seed = seed, .emu_delays = true};
    o.emu_profile.launch_ns = o.emu_profile.copy_ns = 0;
    return o;
}

PS_TEST(pipeline_overlaps_in_virtual_time)
{
    for (uint64_t seed = 1; seed <= 5; seed++) {
        ps_test_case("seed %d", (int)seed);
        fixture fx, *f = &fx;
        pipeline p;
        PS_REQUIRE(open_emu(f, pipeline_options(seed)));
        make_pipeline(f, &p);
        enqueue_pipeline(f, &p, CORRECT);
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->compute), (3 * SHARDS + 2) * 1000);
        PS_CHECK_EQ(wrong_shards(f, &p), 0);
        ps_device_close(f->d);
    }
}

/* The same as a graph: time and result of every replay as if it had been enqueued. */
PS_TEST(pipeline_as_a_graph)
{
    fixture fx, *f = &fx;
    pipeline p;
    ps_graph *g = NULL;
    PS_REQUIRE(open_emu(f, pipeline_options(3)));
    make_pipeline(f, &p);
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, p.fork, &f->err));
    DO_OK(ps_device_wait(f->d, f->h2d, p.fork, &f->err));
    enqueue_pipeline(f, &p, CORRECT);
    DO_OK(ps_device_record(f->d, f->h2d, p.join, &f->err));
    DO_OK(ps_device_wait(f->d, f->compute, p.join, &f->err));
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    for (uint64_t replay = 1; replay <= 3; replay++) {
        memset(p.out, 0, SHARDS * SHARD_BYTES);
        uint64_t before = ps_stream_time_ns(f->d, f->compute);
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        PS_CHECK_EQ_U64(ps_stream_time_ns(f->d, f->compute) - before, (3 * SHARDS + 2) * 1000);
        PS_CHECK_EQ(wrong_shards(f, &p), 0);
    }
    ps_device_close(f->d);
}

/* The reason for the emulator: with a wait left out, results are wrong. ThreadSanitizer reports
 * these programs, rightly, so they are left out there. */
PS_TEST(pipeline_mutants_fail)
{
    if (UNDER_TSAN) PS_SKIP("the program under test has data races on purpose");
    static const mutant mutants[] = {NO_WAIT_FOR_FREED, NO_WAIT_FOR_FILLED};
    for (int m = 0; m < 2; m++)
        for (uint64_t seed = 1; seed <= 5; seed++) {
            ps_test_case("mutant %d, seed %d", (int)mutants[m], (int)seed);
            fixture fx, *f = &fx;
            pipeline p;
            PS_REQUIRE(open_emu(f, pipeline_options(seed)));
            make_pipeline(f, &p);
            enqueue_pipeline(f, &p, mutants[m]);
            uint32_t n_wrong = wrong_shards(f, &p);
            PS_CHECK(n_wrong > 0 && n_wrong <= SHARDS);
            ps_device_close(f->d);
        }
}

/* ---- memory ---- */

PS_TEST(memory_is_poisoned_and_limited)
{
    fixture fx, *f = &fx;
    PS_REQUIRE(
        open_emu(f, (ps_device_options){.emu_vram_bytes = 1 << 20, .emu_locked_bytes = 100000}));
    ps_dptr a, b;
    uint64_t free_bytes = 0, total_bytes = 0;
    unsigned char *h = NULL;
    void *more = NULL;
    DO_OK(ps_device_locked_alloc(f->d, 99999, (void **)&h, &f->err));
    DO_FAIL(ps_device_locked_alloc(f->d, 2, &more, &f->err), PS_EDEVICE);
    PS_CHECK(more == NULL);
    DO_OK(ps_device_locked_alloc(f->d, 1, &more, &f->err));
    ps_device_locked_free(f->d, more);
    void *own = ps_alloc(5000, 1);
    PS_REQUIRE(own != NULL);
    DO_FAIL(ps_device_lock(f->d, own, 5000, &f->err), PS_EDEVICE);
    DO_OK(ps_device_lock(f->d, own, 1, &f->err));
    ps_device_unlock(f->d, own);
    ps_free(own);

    DO_OK(ps_device_alloc(f->d, (1 << 20) - 256, &a, &f->err));
    PS_CHECK((a.a & PS_EMU_TAG) != 0);
    DO_FAIL(ps_device_alloc(f->d, 257, &b, &f->err), PS_EDEVICE);
    PS_CHECK(ps_dptr_is_null(b));
    DO_OK(ps_device_alloc(f->d, 1, &b, &f->err)); /* counts as 256 */
    DO_OK(ps_device_mem_info(f->d, &free_bytes, &total_bytes, &f->err));
    PS_CHECK_EQ_U64(free_bytes, 0);
    PS_CHECK_EQ_U64(total_bytes, 1 << 20);
    DO_FAIL(ps_device_alloc(f->d, UINT64_MAX, &b, &f->err), PS_EDEVICE);

    for (int round = 0; round < 2; round++) { /* fresh, and again after use and free */
        DO_OK(ps_device_copy_out(f->d, f->d2h, h, a, 99999, &f->err));
        DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
        for (int i = 0; i < 99999; i += 997) PS_CHECK_EQ(h[i], 0xff);
        float as_float;
        memcpy(&as_float, h, sizeof as_float);
        PS_CHECK(isnan(as_float));
        memset(h, 0, 99999);
        DO_OK(ps_device_copy_in(f->d, f->h2d, a, h, 99999, &f->err));
        DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
        ps_device_free(f->d, a);
        DO_OK(ps_device_alloc(f->d, (1 << 20) - 256, &a, &f->err));
    }
    ps_device_close(f->d);

    /* By default there is more address space than any machine that runs tests has memory. */
    fixture large;
    ps_device_options defaults = {.threads = 1};
    PS_REQUIRE(open_fixture(&large, "emu", &defaults));
    f = &large;
    DO_OK(ps_device_alloc(f->d, 64ull << 30, &a, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->h2d, ps_dptr_add(a, (64ull << 30) - 4096), h, 4096, &f->err));
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
    ps_device_close(f->d);
}

/* Page tables take device memory, by whole pages, as long as something is locked. */
PS_TEST(locked_memory_takes_device_memory)
{
    enum { PAGE = 4096, A_PAGE = 64 };
    fixture fx, *f = &fx;
    PS_REQUIRE(open_emu(f, (ps_device_options){.emu_vram_bytes = 1 << 20,
                               .emu_map_bytes_per_gib = A_PAGE * ((1 << 30) / PAGE)}));
    uint64_t before = 0, now = 0, total = 0;
    DO_OK(ps_device_mem_info(f->d, &before, &total, &f->err));
    unsigned char *block = ps_alloc(8 * PAGE, 1);
    PS_REQUIRE(block != NULL);
    unsigned char *page = block + (PAGE - (uintptr_t)block % PAGE);
    DO_OK(ps_device_lock(f->d, page + 100, 2 * PAGE, &f->err)); /* touches three */
    DO_OK(ps_device_mem_info(f->d, &now, &total, &f->err));
    PS_CHECK_EQ_U64(before - now, 3 * A_PAGE);
    void *locked = NULL;
    DO_OK(ps_device_locked_alloc(f->d, 5 * PAGE, &locked, &f->err));
    DO_OK(ps_device_mem_info(f->d, &now, &total, &f->err));
    PS_CHECK(before - now == 8 * A_PAGE || before - now == 9 * A_PAGE);
    ps_device_unlock(f->d, page + 100);
    ps_device_locked_free(f->d, locked);
    DO_OK(ps_device_mem_info(f->d, &now, &total, &f->err));
    PS_CHECK_EQ_U64(now, before);
    /* What is left for it is what other memory leaves. */
    ps_dptr all = {0};
    DO_OK(ps_device_alloc(f->d, now - 4 * A_PAGE, &all, &f->err));
    PS_CHECK_STATUS(ps_device_lock(f->d, page, 4 * PAGE, NULL), PS_OK);
    PS_CHECK_STATUS(ps_device_locked_alloc(f->d, PAGE, &locked, NULL), PS_EDEVICE);
    ps_device_unlock(f->d, page);
    ps_device_free(f->d, all);
    ps_device_close(f->d);
    ps_free(block);
}

/* ---- traps ---- */

typedef struct touch_args {
    ps_dptr p;
} touch_args;

static ps_status run_touch(const ps_launch *launch, const void *args)
{
    const touch_args *a = args;
    *(volatile char *)ps_cpu_ptr(launch, a->p) = 1;
    return PS_OK;
}

typedef enum slip {
    SLIP_NONE,
    SLIP_HOST_READS, /* the host follows a device address */
    SLIP_CPU_OP,     /* an op on the CPU stream gets a device address */
    SLIP_GPU_OP,     /* an op on the GPU gets a host address */
    SLIP_AFTER_FREE,
    SLIP_BEHIND_END,
    SLIP_BEFORE_BEGIN,
    SLIP_COUNT
} slip;

static void commit_slip(fixture *f, slip what)
{
    ps_dptr p;
    char *h = NULL;
    DO_OK(ps_device_alloc(f->d, 8192, &p, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    touch_args a = {.p = p};
    ps_stream *s = f->compute;
    switch (what) {
    case SLIP_HOST_READS: h[0] = *(volatile char *)(uintptr_t)p.a; return;
    case SLIP_CPU_OP: s = f->cpu; break;
    case SLIP_GPU_OP: a.p.a = (uintptr_t)h; break;
    case SLIP_AFTER_FREE: ps_device_free(f->d, p); break;
    case SLIP_BEHIND_END: a.p.a += 8192; break;
    case SLIP_BEFORE_BEGIN: a.p.a -= 1; break;
    case SLIP_NONE:
    case SLIP_COUNT: break;
    }
    DO_OK(ps_device_run(f->d, s, run_touch, &a, sizeof a, NULL, &f->err));
    DO_OK(ps_device_sync(f->d, s, &f->err));
}

/* In a child that opens its own device, because the slip ends the process. */
PS_TEST(address_slips_trap)
{
    for (int what = SLIP_NONE; what < SLIP_COUNT; what++) {
        ps_test_case("slip %d", what);
        fflush(stdout);
        pid_t child = fork();
        PS_REQUIRE(child >= 0);
        if (child == 0) {
            setrlimit(RLIMIT_CORE, &(struct rlimit){0});
            signal(SIGSEGV, SIG_DFL); /* not the sanitizer's report */
            fixture f;
            if (!open_emu(&f, (ps_device_options){0})) _exit(2);
            commit_slip(&f, (slip)what);
            _exit(atomic_load(&ps_test_n_bad) == 0 ? 0 : 3);
        }
        int status = 0;
        PS_REQUIRE(waitpid(child, &status, 0) == child);
        if (what == SLIP_NONE)
            PS_CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        else
            PS_CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    }
}

/* ---- faults ---- */

/* One call of each kind that faults can be ordered for; returns the status of the call of `kind`.
 */
static ps_status call_once(fixture *f, ps_fault_kind kind, ps_dptr p, uint32_t *h)
{
    ps_dptr fresh = {0};
    void *locked = NULL;
    ps_status status = PS_OK;
    switch (kind) {
    case PS_FAULT_ALLOC:
        status = ps_device_alloc(f->d, 256, &fresh, &f->err);
        ps_device_free(f->d, fresh);
        break;
    case PS_FAULT_LOCKED_ALLOC:
        status = ps_device_locked_alloc(f->d, 256, &locked, &f->err);
        ps_device_locked_free(f->d, locked);
        break;
    case PS_FAULT_COPY: status = ps_device_copy_in(f->d, f->h2d, p, h, 64, &f->err); break;
    case PS_FAULT_LAUNCH:
        status = ps_device_run(f->d, f->compute, run_nothing, NULL, 0, NULL, &f->err);
        break;
    case PS_FAULT_FLAG: status = ps_device_flag_set(f->d, f->compute, h + 16, 1, &f->err); break;
    case PS_FAULT_SYNC: status = ps_device_sync(f->d, f->compute, &f->err); break;
    case PS_FAULT_COUNT: break;
    }
    return status;
}

PS_TEST(faults_hit_the_ordered_call)
{
    for (int kind = 0; kind < PS_FAULT_COUNT; kind++)
        for (int64_t after = 0; after < 3; after++)
            for (int sticky = 0; sticky < 2; sticky++) {
                ps_test_case("kind %d, after %d%s", kind, (int)after, sticky ? ", sticky" : "");
                /* The test's own preparations are calls too. */
                int64_t own =
                    kind == PS_FAULT_ALLOC || kind == PS_FAULT_LOCKED_ALLOC || kind == PS_FAULT_FLAG
                        ? 1
                        : 0;
                ps_device_options o = {.n_faults = 1,
                    .faults = {{.kind = (ps_fault_kind)kind,
                        .after = own + after,
                        .sticky = sticky != 0}}};
                fixture fx, *f = &fx;
                PS_REQUIRE(open_emu(f, o));
                ps_dptr p;
                uint32_t *h = NULL;
                DO_OK(ps_device_alloc(f->d, 4096, &p, &f->err));
                DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
                DO_OK(ps_device_flag_wait(
                    f->d, f->cpu, h + 32, 1, &f->err)); /* lost or closed, this must end */
                for (int64_t i = 0; i < after; i++) DO_OK(call_once(f, (ps_fault_kind)kind, p, h));
                DO_FAIL(call_once(f, (ps_fault_kind)kind, p, h), sticky ? PS_EFATAL : PS_EDEVICE);
                for (int next = 0; next < PS_FAULT_COUNT; next++)
                    if (sticky)
                        DO_FAIL(call_once(f, (ps_fault_kind)next, p, h), PS_EFATAL);
                    else
                        DO_OK(call_once(f, (ps_fault_kind)next, p, h));
                if (sticky) DO_FAIL(ps_device_sync(f->d, f->cpu, &f->err), PS_EFATAL);
                ps_device_close(f->d);
            }
}

PS_TEST(fault_in_a_capture)
{
    static const ps_fault_kind kinds[] = {PS_FAULT_COPY, PS_FAULT_LAUNCH, PS_FAULT_FLAG};
    for (int i = 0; i < 3; i++) {
        ps_test_case("kind %d", (int)kinds[i]);
        ps_device_options o = {.n_faults = 1, .faults = {{.kind = kinds[i], .after = 0}}};
        fixture fx, *f = &fx;
        PS_REQUIRE(open_emu(f, o));
        ps_dptr p;
        uint32_t *h = NULL;
        ps_graph *g = NULL;
        DO_OK(ps_device_alloc(f->d, 4096, &p, &f->err));
        DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
        for (int attempt = 0; attempt < 2; attempt++) {
            DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
            ps_stream *h2d = f->h2d;
            f->h2d = f->compute; /* call_once copies on h2d; here everything is in the one captured
                                    stream */
            f->err = (ps_err){0};
            PS_CHECK_STATUS(call_once(f, kinds[i], p, h), attempt == 0 ? PS_EDEVICE : PS_OK);
            f->h2d = h2d;
            if (attempt == 0)
                DO_FAIL(ps_graph_end(f->d, f->compute, &g, &f->err), PS_EDEVICE);
            else
                DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
            PS_CHECK_EQ(g != NULL, attempt == 1);
        }
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        ps_device_close(f->d);
    }
}

static ps_status run_refuse(const ps_launch *launch, const void *args)
{
    (void)launch;
    (void)args;
    return PS_EUNSUPPORTED;
}

/* A failure in a side branch of a replay surfaces where the graph was launched, and the replay
 * ends. */
PS_TEST(failure_in_a_branch)
{
    fixture fx, *f = &fx;
    PS_REQUIRE(open_emu(f, (ps_device_options){0}));
    uint32_t *h = NULL;
    ps_event *e;
    ps_graph *g = NULL;
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    DO_OK(ps_event_create(f->d, &e, &f->err));
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_OK(ps_device_wait(f->d, f->h2d, e, &f->err));
    DO_OK(
        ps_device_run(f->d, f->h2d, run_refuse, NULL, 0, &(ps_cost){.op = 4, .tick = 77}, &f->err));
    DO_OK(ps_device_flag_set(f->d, f->h2d, h, 5, &f->err)); /* set all the same */
    DO_OK(ps_device_record(f->d, f->h2d, e, &f->err));
    DO_OK(ps_device_flag_wait(f->d, f->compute, h, 5, &f->err));
    DO_OK(ps_device_wait(f->d, f->compute, e, &f->err));
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    for (int replay = 0; replay < 2; replay++) {
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        DO_FAIL(ps_device_sync(f->d, f->compute, &f->err), PS_EUNSUPPORTED);
        PS_CHECK(strstr(f->err.message, "op 4 of tick 77") != NULL &&
                 strstr(f->err.message, "h2d") != NULL);
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    }
    ps_device_close(f->d);
}

/* ---- options ---- */

PS_TEST(silly_options_are_refused)
{
    ps_device *d = NULL;
    ps_err err = {0};
    ps_device_options o = {.emu_profile = profile};
    o.emu_profile.gpu_flops = 0;
    PS_CHECK_STATUS(ps_device_open("emu", &o, &d, &err), PS_EREQUEST);
    PS_CHECK_EQ_STR(err.field, "profile");
    o.emu_profile.gpu_flops = NAN;
    PS_CHECK_STATUS(ps_device_open("emu", &o, &d, NULL), PS_EREQUEST);
    o.emu_profile = profile;
    o.emu_profile.disk_bytes_per_s = 0;
    PS_CHECK_STATUS(ps_device_open("emu", &o, &d, NULL), PS_EREQUEST);
    o = (ps_device_options){.emu_vram_bytes = 1ull << 60};
    PS_CHECK_STATUS(ps_device_open("emu", &o, &d, NULL), PS_EREQUEST);
    o = (ps_device_options){.emu_map_bytes_per_gib = (1 << 30) + 1};
    PS_CHECK_STATUS(ps_device_open("emu", &o, &d, NULL), PS_EREQUEST);
    PS_CHECK(d == NULL);
}

/* Flag words come and go with their memory; there is room for PS_HUB_CAP_FLAGS at a time. */
PS_TEST(flag_words_are_counted)
{
    enum { CAP = 65536 };
    fixture fx, *f = &fx;
    PS_REQUIRE(open_emu(f, (ps_device_options){0}));
    for (int round = 0; round < 2; round++) {
        uint32_t *h = NULL, *other = NULL;
        DO_OK(ps_device_locked_alloc(f->d, CAP * 4, (void **)&h, &f->err));
        DO_OK(ps_device_locked_alloc(f->d, 64, (void **)&other, &f->err));
        for (int i = 0; i < CAP; i++)
            DO_OK(
                ps_device_flag_set(f->d, f->cpu, h + (i ^ 5), 1, &f->err)); /* not quite in order */
        DO_FAIL(ps_device_flag_set(f->d, f->cpu, other, 1, &f->err), PS_EDEVICE);
        DO_OK(ps_device_flag_set(f->d, f->cpu, h + 7, 2, &f->err));
        DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
        PS_CHECK_EQ_U64(h[7], 2);
        PS_CHECK_EQ_U64(h[CAP - 1], 1);
        ps_device_locked_free(f->d, h);
        DO_OK(ps_device_flag_set(f->d, f->cpu, other, 1, &f->err));
        DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
        ps_device_locked_free(f->d, other);
    }
    ps_device_close(f->d);
}

PS_TEST_MAIN
