/* Traces of passes: no stream does two things at once, waits end behind what they wait for, and the
 * ring keeps to its size. On the emulated GPU every time is known: durations are what the profile
 * charges. Where the clock is real, on host and cuda, only the order is. */
#include "ps_test.h"

#include "engine/ps_engine.h"

enum { N_PROMPT = 24, N_CTX = 128, SLOT_BYTES = 256 << 10 };

static const ps_emu_profile profile = {.h2d_bytes_per_s = 1e9,
    .d2h_bytes_per_s = 1e9,
    .vram_bytes_per_s = 1e10,
    .gpu_flops = 1e12,
    .dram_bytes_per_s = 2e9,
    .cpu_flops = 1e11,
    .launch_ns = 300,
    .copy_ns = 700,
    .flag_ns = 900,
    .disk_bytes_per_s = 1e9};

typedef struct setup {
    const char *file, *device; /* NULL: emu */
    bool graphs, hybrid;       /* hybrid: units on the CPU and in VRAM between streamed ones */
    uint64_t cap_bytes;        /* of the trace */
    ps_device_options options;
} setup;

typedef struct rig {
    ps_model *model;
    ps_device *device;
    ps_place *places;
    ps_plan *plan;
    ps_engine *engine;
    int32_t tokens[N_CTX];
} rig;

static void close_rig(rig *r)
{
    ps_engine_destroy(r->engine);
    ps_plan_destroy(r->plan);
    ps_device_close(r->device);
    ps_free(r->places);
    ps_model_close(r->model);
    *r = (rig){0};
}

static ps_status make_plan(const setup *s, rig *r, ps_err *err)
{
    static const ps_tier tiers[] = {{"decode", 1}, {"prefill", UINT32_MAX}};
    uint32_t n = r->model->n_units;
    r->places = ps_alloc(2ull * n, sizeof *r->places);
    if (r->places == NULL) return ps_fail(err, PS_ENOMEM, "no memory for places");
    bool host = r->device->info.kind == PS_DEVICE_HOST;
    for (uint32_t u = 0; u < n; u++)
        r->places[u].kind = r->places[n + u].kind = host         ? PS_PLACE_CPU
                                                    : !s->hybrid ? PS_PLACE_STREAM
                                                    : u % 3 == 0 ? PS_PLACE_CPU
                                                    : u % 7 == 0 ? PS_PLACE_VRAM
                                                                 : PS_PLACE_STREAM;
    ps_plan_spec spec = {.accelerator = !host,
        .sm = r->device->info.kind == PS_DEVICE_CUDA ? r->device->info.sm : 90,
        .budget_bytes = 1ull << 32,
        .n_ctx = N_CTX,
        .n_seq = 1,
        .kv_fmt = PS_FMT_F16,
        .n_tiers = 2,
        .tiers = tiers,
        .places = r->places,
        .n_slots = 3,
        .slot_bytes = SLOT_BYTES,
        .chunk_tok = 16,
        .pass_tok = 64,
        .logit_rows = 1};
    return ps_plan_create(r->model, &spec, &r->plan, err);
}

static ps_status open_rig(const setup *s, rig *r, ps_err *err)
{
    char path[256];
    snprintf(path, sizeof path, "tests/data/golden/%s", s->file);
    *r = (rig){0};
    ps_status status = ps_model_open(path, &r->model, err);
    if (status != PS_OK) return status;
    ps_cpu_bounds bounds = {.max_cols = 1 << 12,
        .max_tok = 64,
        .max_rows = 64 * 8,
        .max_ctx = N_CTX,
        .max_head_dim = PS_MAX_HEAD_DIM,
        .n_head = 64,
        .threads = 1};
    ps_device_options options = s->options;
    options.threads = 1;
    options.cpu_ops = ps_cpu_ops("ref");
    options.cpu_scratch_bytes = ps_cpu_scratch_bytes(&bounds);
    options.emu_profile = profile;
    status = ps_device_open(s->device != NULL ? s->device : "emu", &options, &r->device, err);
    if (status == PS_OK) status = make_plan(s, r, err);
    if (status != PS_OK) return status;
    bool cuda = r->device->info.kind == PS_DEVICE_CUDA;
    ps_exec_options exec = {.cpu_ops = options.cpu_ops,
        .dev_ops = cuda ? ps_cuda_ops() : options.cpu_ops,
        .graphs = s->graphs,
        .check = true};
    status = ps_engine_create(r->model, r->plan, r->device, &exec, &r->engine, err);
    uint64_t seed = 7;
    for (int i = 0; i < N_CTX; i++)
        r->tokens[i] = (int32_t)(ps_rng_next(&seed) % r->model->hp.n_vocab);
    return status;
}

static ps_status start(const setup *s, rig *r, ps_err *err)
{
    return ps_exec_trace_start(ps_engine_exec(r->engine), s->cap_bytes, err);
}

/* One token behind the prompt, again and again: the list and its graph stay the same. */
static ps_status decode(rig *r, int n, ps_err *err)
{
    ps_status status = PS_OK;
    for (int i = 0; i < n && status == PS_OK; i++) {
        status = ps_engine_truncate(r->engine, 0, N_PROMPT, err);
        if (status == PS_OK)
            status = ps_engine_append(r->engine, 0, &r->tokens[N_PROMPT + i % 8], 1, NULL, err);
    }
    return status;
}

typedef struct record {
    ps_trace_pass *passes; /* owns; [n_passes] */
    ps_trace_tick *ticks;  /* owns; [n_ticks] */
    uint64_t n_passes, n_ticks;
} record;

static bool take(const rig *r, record *out)
{
    const ps_trace *t = ps_exec_trace(ps_engine_exec(r->engine));
    ps_trace_count(t, &out->n_passes, &out->n_ticks);
    out->passes = ps_alloc(out->n_passes + 1, sizeof *out->passes);
    out->ticks = ps_alloc(out->n_ticks + 1, sizeof *out->ticks);
    if (out->passes == NULL || out->ticks == NULL) return false;
    ps_trace_copy(t, out->passes, out->ticks);
    return true;
}

static void drop(record *x)
{
    ps_free(x->passes);
    ps_free(x->ticks);
}

/* ---- what must hold of every pass ---- */

static uint64_t charge(const ps_trace_tick *k)
{
    bool cpu = k->stream == PS_STREAM_CPU;
    double move_s = (double)(k->bytes - k->bus_bytes) /
                    (cpu ? profile.dram_bytes_per_s : profile.vram_bytes_per_s),
           bus_s = (double)k->bus_bytes / profile.h2d_bytes_per_s,
           math_s = (double)k->flops / (cpu ? profile.cpu_flops : profile.gpu_flops);
    if (k->kind == PS_TICK_COPY_IN || k->kind == PS_TICK_COPY_OUT)
        return (uint64_t)(0.5 + (double)profile.copy_ns + (double)k->bytes);
    if (bus_s > move_s) move_s = bus_s;
    return (uint64_t)(0.5 + (double)profile.launch_ns + (move_s > math_s ? move_s : math_s) * 1e9);
}

static const ps_trace_tick *find(const record *x, const ps_trace_pass *p, int32_t tick)
{
    for (uint32_t i = 0; i < p->n_ticks; i++)
        if (x->ticks[p->first_tick + i].tick == (uint32_t)tick) return &x->ticks[p->first_tick + i];
    return NULL;
}

static void check_wait(const record *x, const ps_trace_pass *p, const ps_trace_tick *k)
{
    const ps_trace_tick *cause = find(x, p, k->cause);
    PS_CHECK(cause != NULL && cause->stream != k->stream && cause->tick < k->tick);
    if (cause == NULL) return;
    uint64_t hand_off = k->kind == PS_TICK_FLAG_WAIT ? profile.flag_ns : 0;
    uint64_t from = cause->end_ns > k->begin_ns ? cause->end_ns : k->begin_ns;
    PS_CHECK_EQ_U64(k->end_ns, from + hand_off);
}

static void check_pass(const record *x, const ps_trace_pass *p)
{
    uint64_t now[PS_STREAM_COUNT], last = p->begin_ns;
    for (int s = 0; s < PS_STREAM_COUNT; s++) now[s] = p->begin_ns;
    PS_CHECK(p->first_tick + p->n_ticks <= x->n_ticks && p->marked == (p->n_ticks > 0));
    for (uint32_t i = 0; i < p->n_ticks; i++) {
        const ps_trace_tick *k = &x->ticks[p->first_tick + i];
        /* A virtual stream is never idle but for waits. */
        PS_CHECK_EQ_U64(k->begin_ns, now[k->stream]);
        if (k->kind == PS_TICK_WAIT || k->kind == PS_TICK_FLAG_WAIT)
            check_wait(x, p, k);
        else
            PS_CHECK_EQ_U64(k->end_ns - k->begin_ns, charge(k));
        if (k->kind == PS_TICK_COPY_IN) PS_CHECK_EQ(k->stream, PS_STREAM_H2D);
        now[k->stream] = k->end_ns;
        last = k->end_ns > last ? k->end_ns : last;
    }
    if (p->marked) PS_CHECK_EQ_U64(p->end_ns, last);
}

static void check_record(const record *x)
{
    for (uint64_t i = 0; i < x->n_passes; i++) {
        ps_test_case("pass %d", (int)i);
        check_pass(x, &x->passes[i]);
        if (i == 0) continue;
        /* Between two passes there can be no more than another list's tables on their way. */
        PS_CHECK_EQ_U64(x->passes[i].number, x->passes[i - 1].number + 1);
        PS_CHECK(x->passes[i].begin_ns >= x->passes[i - 1].end_ns);
        if (x->passes[i].n_tok == x->passes[i - 1].n_tok)
            PS_CHECK_EQ_U64(x->passes[i].begin_ns, x->passes[i - 1].end_ns);
    }
    ps_test_case("%s", "");
}

/* ---- tests ---- */

static void run_and_check(const setup *s)
{
    rig r;
    ps_err err = {0};
    record x = {0};
    PS_CHECK_STATUS(open_rig(s, &r, &err), PS_OK);
    if (r.engine != NULL) {
        ps_exec *exec = ps_engine_exec(r.engine);
        PS_CHECK_STATUS(start(s, &r, &err), PS_OK);
        uint64_t busy = ps_exec_get_stats(exec).busy_ns;
        PS_CHECK_STATUS(ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err), PS_OK);
        PS_CHECK_STATUS(decode(&r, 20, &err), PS_OK);
        PS_REQUIRE(take(&r, &x));
        PS_CHECK_EQ_U64(x.n_passes, 21);
        check_record(&x);
        uint64_t sum = 0, copied = 0, over_bus = 0, n_marked = 0, n_graphs = 0;
        for (uint64_t i = 0; i < x.n_passes; i++) {
            sum += x.passes[i].end_ns - x.passes[i].begin_ns;
            n_marked += x.passes[i].marked;
            n_graphs += x.passes[i].graph;
        }
        for (uint64_t i = 0; i < x.n_ticks; i++) /* but for hand-offs */
            if (x.ticks[i].op != PS_OP_MOVE && x.ticks[i].op != PS_OP_MOE_COMBINE)
                over_bus += x.ticks[i].bus_bytes;
        for (uint64_t i = 0; i < x.passes[0].n_ticks; i++)
            if (x.ticks[i].kind == PS_TICK_COPY_IN) copied += x.ticks[i].bytes;
        PS_CHECK_EQ_U64(ps_exec_get_stats(exec).busy_ns - busy, sum);
        PS_CHECK(copied > (1 << 17) && x.passes[0].n_tok == N_PROMPT && x.passes[0].pos == 0);
        PS_CHECK(x.passes[3].n_tok == 1 && x.passes[3].pos == N_PROMPT);
        PS_CHECK(x.passes[0].vram_bytes[PS_MEM_RING] == 3 * SLOT_BYTES);
        PS_CHECK_EQ_U64(n_marked, 20);         /* one of 16 is left alone, to compare with */
        PS_CHECK((over_bus > 0) == s->hybrid); /* decoding reads experts where they lie */
        PS_CHECK(s->graphs ? n_graphs > 15 : n_graphs == 0);
        /* A pass takes as long whether it is marked or not. */
        PS_CHECK_EQ_U64(x.passes[16].marked, 0);
        PS_CHECK_EQ_U64(x.passes[16].end_ns - x.passes[16].begin_ns,
            x.passes[15].end_ns - x.passes[15].begin_ns);
        drop(&x);
    }
    close_rig(&r);
}

PS_TEST(streamed_passes_are_consistent)
{
    run_and_check(&(setup){.file = "llama.q4_k_m.gguf"});
}

PS_TEST(hand_offs_are_consistent)
{
    run_and_check(&(setup){.file = "qwen3moe.q4_k_m.gguf", .hybrid = true});
}

PS_TEST(graphs_carry_marks)
{
    run_and_check(&(setup){.file = "qwen3moe.q4_k_m.gguf",
        .hybrid = true,
        .graphs = true,
        .options = {.emu_delays = true, .emu_seed = 3}});
}

/* Tracing may begin late, stop, and go on; what ran in between is not there. */
PS_TEST(only_what_is_asked_for)
{
    setup s = {.file = "llama.q4_k_m.gguf", .graphs = true};
    rig r;
    ps_err err = {0};
    record x = {0};
    PS_CHECK_STATUS(open_rig(&s, &r, &err), PS_OK);
    if (r.engine != NULL) {
        ps_exec *exec = ps_engine_exec(r.engine);
        PS_CHECK(ps_exec_trace(exec) == NULL);
        PS_CHECK_STATUS(ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err), PS_OK);
        PS_CHECK_STATUS(decode(&r, 5, &err), PS_OK);
        PS_CHECK_STATUS(start(&s, &r, &err), PS_OK);
        PS_CHECK_STATUS(decode(&r, 2, &err), PS_OK);
        ps_exec_trace_stop(exec);
        PS_CHECK_STATUS(decode(&r, 3, &err), PS_OK);
        PS_CHECK_STATUS(start(&s, &r, &err), PS_OK);
        PS_CHECK_STATUS(decode(&r, 1, &err), PS_OK);
        PS_REQUIRE(take(&r, &x));
        PS_CHECK_EQ_U64(x.n_passes, 3);
        PS_CHECK(x.n_passes == 3 && x.passes[0].number == 6 && x.passes[2].number == 11);
        for (uint64_t i = 0; i < x.n_passes; i++) check_pass(&x, &x.passes[i]);
        drop(&x);
        uint64_t n_passes = 1, n_ticks = 1;
        ps_trace_clear(ps_exec_trace(exec));
        ps_trace_count(ps_exec_trace(exec), &n_passes, &n_ticks);
        PS_CHECK(n_passes == 0 && n_ticks == 0);
    }
    close_rig(&r);
}

PS_TEST(the_ring_keeps_to_its_size)
{
    setup s = {.file = "llama.q4_k_m.gguf", .graphs = true, .cap_bytes = 64 * 1024};
    rig r;
    ps_err err = {0};
    record x = {0};
    PS_CHECK_STATUS(open_rig(&s, &r, &err), PS_OK);
    if (r.engine != NULL) {
        PS_CHECK_STATUS(start(&s, &r, &err), PS_OK);
        PS_CHECK_STATUS(ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err), PS_OK);
        PS_CHECK_STATUS(decode(&r, 40, &err), PS_OK);
        uint64_t live = ps_heap_get_stats().live_bytes;
        PS_CHECK_STATUS(decode(&r, 100, &err), PS_OK);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_bytes, live);
        PS_REQUIRE(take(&r, &x));
        PS_CHECK(x.n_passes > 2 && x.n_passes < 140);
        PS_CHECK(x.n_ticks * sizeof *x.ticks <= s.cap_bytes);
        /* The latest, whole. */
        PS_CHECK_EQ_U64(x.passes[x.n_passes - 1].number, 140);
        check_record(&x);
        drop(&x);
    }
    close_rig(&r);
    /* Less than a single pass: the ring grows to hold that one. */
    s.cap_bytes = 1;
    PS_CHECK_STATUS(open_rig(&s, &r, &err), PS_OK);
    if (r.engine != NULL) {
        PS_CHECK_STATUS(start(&s, &r, &err), PS_OK);
        PS_CHECK_STATUS(decode(&r, 3, &err), PS_OK);
        PS_CHECK_STATUS(ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err), PS_OK);
        PS_REQUIRE(take(&r, &x));
        PS_CHECK(x.n_passes == 1 && x.passes[0].n_tok == N_PROMPT);
        check_record(&x);
        drop(&x);
    }
    close_rig(&r);
}

/* ---- real clocks ---- */

/* Two clocks may be apart, and CUDA rounds to half a microsecond. */
static void check_order(const record *x, const ps_trace_pass *p)
{
    uint64_t slack = p->clock_error_ns + 1000, last[PS_STREAM_COUNT] = {0};
    for (uint32_t i = 0; i < p->n_ticks; i++) {
        const ps_trace_tick *k = &x->ticks[p->first_tick + i],
                            *cause = k->cause >= 0 ? find(x, p, k->cause) : NULL;
        PS_CHECK(k->begin_ns + slack >= p->begin_ns && k->end_ns <= p->end_ns + slack);
        PS_CHECK(k->begin_ns >= last[k->stream] && k->end_ns >= k->begin_ns);
        if (cause != NULL) PS_CHECK(k->end_ns + slack >= cause->end_ns);
        last[k->stream] = k->end_ns;
    }
}

static void check_real(const setup *s)
{
    rig r;
    ps_err err = {0};
    record x = {0};
    PS_CHECK_STATUS(open_rig(s, &r, &err), PS_OK);
    PS_REQUIRE(r.engine != NULL);
    PS_CHECK_STATUS(start(s, &r, &err), PS_OK);
    PS_CHECK_STATUS(ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err), PS_OK);
    PS_CHECK_STATUS(decode(&r, 20, &err), PS_OK);
    PS_REQUIRE(take(&r, &x));
    PS_CHECK_EQ_U64(x.n_passes, 21);
    uint64_t n_graphs = 0, worked_ns = 0;
    for (uint64_t i = 0; i < x.n_passes; i++) {
        check_order(&x, &x.passes[i]);
        n_graphs += x.passes[i].graph;
        PS_CHECK(x.passes[i].wall_ns > 0);
        if (i > 0) PS_CHECK(x.passes[i].begin_ns >= x.passes[i - 1].end_ns);
    }
    for (uint64_t i = 0; i < x.n_ticks; i++) worked_ns += x.ticks[i].end_ns - x.ticks[i].begin_ns;
    PS_CHECK(worked_ns > 0);
    if (r.device->info.kind == PS_DEVICE_CUDA) PS_CHECK((n_graphs > 12) == s->graphs);
    drop(&x);
    close_rig(&r);
}

PS_TEST(real_clocks_keep_order)
{
    static const char *const devices[] = {"host", "cuda"};
    for (size_t i = 0; i < 2; i++)
        for (int graphs = 0; graphs < 2 && ps_test_device(devices[i]); graphs++) {
            ps_test_case("%s, graphs %d", devices[i], graphs);
            check_real(&(setup){.file = "qwen3moe.q4_k_m.gguf",
                .device = devices[i],
                .graphs = graphs != 0,
                .hybrid = true});
        }
    ps_test_case("%s", "");
}

/* ---- failures ---- */

/* A pass that fails leaves nothing in the trace; the next one is whole. */
PS_TEST(failed_passes_are_not_recorded)
{
    static const ps_fault_kind kinds[] = {
        PS_FAULT_COPY, PS_FAULT_LAUNCH, PS_FAULT_FLAG, PS_FAULT_SYNC};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
        for (int64_t after = 1; after < 100; after = after * (PS_TEST_SLOW_BUILD ? 9 : 3) + 1) {
            setup s = {.file = "qwen3moe.q4_k_m.gguf", .hybrid = true};
            rig r;
            ps_err err = {0};
            record x = {0};
            s.options.n_faults = 1;
            s.options.faults[0] = (ps_fault){kinds[k], after, false};
            if (open_rig(&s, &r, &err) != PS_OK) { /* the fault came while loading */
                close_rig(&r);
                continue;
            }
            PS_CHECK_STATUS(start(&s, &r, &err), PS_OK);
            ps_status first = ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err);
            PS_CHECK(first == PS_OK || first == PS_EDEVICE);
            if (first != PS_OK)
                PS_CHECK_STATUS(
                    ps_engine_append(r.engine, 0, r.tokens, N_PROMPT, NULL, &err), PS_OK);
            PS_REQUIRE(take(&r, &x));
            PS_CHECK_EQ_U64(x.n_passes, 1);
            check_record(&x);
            drop(&x);
            close_rig(&r);
        }
}

static ps_status open_trace_close(void *ctx, ps_err *err)
{
    const setup *s = ctx;
    rig r;
    ps_status status = open_rig(s, &r, err);
    if (status == PS_OK) status = start(s, &r, err);
    /* Two shapes of pass, both short: opening is what takes long. */
    if (status == PS_OK) status = ps_engine_append(r.engine, 0, r.tokens, 2, NULL, err);
    if (status == PS_OK) status = ps_engine_append(r.engine, 0, r.tokens, 1, NULL, err);
    close_rig(&r);
    return status;
}

PS_TEST(oom_trace)
{
    setup s = {.file = "llama.q4_k_m.gguf"};
    ps_test_oom_long_sweep(open_trace_close, &s);
}

PS_TEST_MAIN
