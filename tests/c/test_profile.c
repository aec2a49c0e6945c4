/* The profiler: on the emulated device, whose clock is known, every sample must say what the clock
 * charges; on the host, that times are sane. Every refusal is an error that leaves nothing behind.
 */
#include "ps_test.h"

#include "engine/ps_plan.h"
#include "engine/ps_profile.h"

/* The last two have experts. */
static const char *const models[] = {"llama.q4_k_m.gguf", "phi3.q4_1.gguf", "qwen2vl.f16.gguf",
    "qwen3moe.q4_k_m.gguf", "gpt-oss.mxfp4.gguf"};
enum { FIRST_MOE = 3 };

enum { MAX_TOK = 64, MAX_KV = 256 };

typedef struct setup {
    const char *file, *device;
    ps_device_options options;
    ps_profile_spec spec;
} setup;

static setup make_setup(const char *device)
{
    return (setup){.file = models[0],
        .device = device,
        .options = {.threads = 2, .emu_vram_bytes = 64 << 20},
        .spec = {.threads = 2,
            .max_tok = PS_TEST_SLOW_BUILD ? 8 : MAX_TOK,
            .max_kv = MAX_KV,
            .device_bytes = PS_TEST_SLOW_BUILD ? 6 << 20 : 12 << 20,
            .host_bytes = PS_TEST_SLOW_BUILD ? 8 << 20 : 24 << 20,
            .limit_ns = 4000000000ull}};
}

/* Opens, measures and closes. `ctx`: a setup. */
static ps_status measure(const setup *s, ps_profile *out, ps_err *err)
{
    char path[256];
    ps_model *model = NULL;
    ps_device *device = NULL;
    ps_device_options options = s->options;
    ps_profile_spec spec = s->spec;
    *out = (ps_profile){0};
    snprintf(path, sizeof path, "tests/data/golden/%s", s->file);
    ps_status status = ps_model_open(path, &model, err);
    options.cpu_ops = spec.cpu_ops = ps_cpu_ops(NULL);
    if (status == PS_OK) {
        options.cpu_scratch_bytes =
            ps_plan_cpu_scratch_bytes(model, spec.max_kv, spec.max_tok, options.threads);
        status = ps_device_open(s->device, &options, &device, err);
    }
    if (status == PS_OK) {
        bool cuda = device->info.kind == PS_DEVICE_CUDA;
        spec.dev_ops = cuda ? ps_cuda_ops() : spec.cpu_ops;
        status = ps_profile_measure(model, device, &spec, out, err);
    }
    ps_device_close(device);
    ps_model_close(model);
    return status;
}

static uint32_t count(const ps_profile *p, ps_sample_side side, const char *op, ps_sample_load load)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->n_samples; i++)
        n += p->samples[i].side == side && p->samples[i].load == load &&
             strcmp(p->samples[i].op, op) == 0;
    return n;
}

/* ---- what the samples say ---- */

static double charged(const ps_emu_profile *e, const ps_sample *s)
{
    double move = (double)s->bytes, math = (double)s->flops, launch = (double)e->launch_ns * 1e-9;
    if (strcmp(s->op, "flag") == 0) return (double)e->flag_ns * 1e-9;
    if (s->side == PS_SAMPLE_FIXED) return 0;
    if (strcmp(s->op, "copy") == 0)
        return (double)e->copy_ns * 1e-9 +
               move / (s->side == PS_SAMPLE_H2D ? e->h2d_bytes_per_s : e->d2h_bytes_per_s);
    if (s->side == PS_SAMPLE_CPU)
        return launch + fmax(move / e->dram_bytes_per_s, math / e->cpu_flops);
    /* Gathering experts is known to be the bus's work; ops that read weights there are not. */
    if (strcmp(s->op, "gather") == 0 && s->flops == 0) return launch + move / e->h2d_bytes_per_s;
    return launch + fmax(move / e->vram_bytes_per_s, math / e->gpu_flops);
}

PS_TEST(says_what_the_virtual_clock_charges)
{
    for (size_t m = 0; m < sizeof models / sizeof *models; m += ps_test_step(3)) {
        setup s = make_setup("emu");
        s.file = models[m];
        ps_test_case("%s", s.file);
        ps_profile p;
        ps_err err = {0};
        uint64_t live = ps_heap_get_stats().live_blocks;
        PS_REQUIRE_OK(measure(&s, &p, &err), &err);
        uint32_t n_cut = 0;
        for (uint32_t i = 0; i < p.n_samples; i++) {
            const ps_sample *x = &p.samples[i];
            double want = charged(&ps_emu_profile_default, x);
            n_cut += x->extrapolated;
            if (!(fabs(x->seconds - want) <= 0.03 * want + 2e-9))
                ps_test_fail(__FILE__, __LINE__, "%s %s %u tok %s: %.9g s, not %.9g",
                    ps_sample_side_name(x->side), x->op, x->n_tok, ps_sample_load_name(x->load),
                    x->seconds, want);
        }
        PS_CHECK(n_cut * 4 < p.n_samples);
        PS_CHECK(count(&p, PS_SAMPLE_GPU, "matmul", PS_LOAD_IDLE) >= 6);
        PS_CHECK(count(&p, PS_SAMPLE_CPU, "attn", PS_LOAD_IDLE) >= 2);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_GPU, "moe_up", PS_LOAD_IDLE) > 0, m >= FIRST_MOE);
        PS_CHECK(count(&p, PS_SAMPLE_H2D, "copy", PS_LOAD_IDLE) >= 3);
        PS_CHECK(count(&p, PS_SAMPLE_D2H, "copy", PS_LOAD_IDLE) >= 3);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_H2D, "copy", PS_LOAD_D2H), 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_D2H, "copy", PS_LOAD_H2D), 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_H2D, "copy", PS_LOAD_CPU), 1);
        PS_CHECK(count(&p, PS_SAMPLE_H2D, "gather", PS_LOAD_IDLE) >= 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_H2D, "gather", PS_LOAD_CPU), 1);
        uint32_t n_experts = 0; /* gathers of them: of a token's, of one, and those beside a CPU */
        for (uint32_t i = 0; i < p.n_samples; i++)
            n_experts += strcmp(p.samples[i].op, "gather") == 0 && p.samples[i].flops == 0;
        PS_CHECK_EQ(n_experts, m >= FIRST_MOE ? 3 : 0);
        PS_CHECK(count(&p, PS_SAMPLE_H2D, "attn", PS_LOAD_IDLE) >= 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_H2D, "moe_up", PS_LOAD_IDLE), m >= FIRST_MOE ? 2 : 0);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_H2D, "moe_down", PS_LOAD_IDLE), m >= FIRST_MOE ? 2 : 0);
        const char *busiest = m >= FIRST_MOE ? "moe_up" : "matmul";
        PS_CHECK_EQ(count(&p, PS_SAMPLE_CPU, busiest, PS_LOAD_GATHER), 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_FIXED, "graph_node", PS_LOAD_IDLE), 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_FIXED, "flag", PS_LOAD_IDLE), 1);
        PS_CHECK_EQ(count(&p, PS_SAMPLE_FIXED, "flag", PS_LOAD_H2D), 1);
        ps_profile_fini(&p);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, live);
    }
}

/* With hardly any time or memory ops are cut, and their times follow from two parts. So many tokens
 * do not fit the memory, however quick the machine. */
PS_TEST(extrapolates_what_is_cut)
{
    setup s = make_setup("emu");
    ps_profile p;
    ps_err err = {0};
    s.spec.device_bytes = s.spec.host_bytes = 1 << 20;
    s.spec.max_tok = 16 * MAX_TOK;
    s.spec.limit_ns = 1;
    PS_REQUIRE_OK(measure(&s, &p, &err), &err);
    uint32_t n_cut = 0;
    for (uint32_t i = 0; i < p.n_samples; i++) {
        const ps_sample *x = &p.samples[i];
        if (!x->extrapolated) continue;
        n_cut++;
        double want = charged(&ps_emu_profile_default, x);
        /* Not exact: what a launch takes weighs more in a small part, and inputs are not cut. */
        if (!(x->seconds > 0.5 * want && x->seconds < 2 * want))
            ps_test_fail(__FILE__, __LINE__, "%s %s %u tok: %.9g s, not %.9g",
                ps_sample_side_name(x->side), x->op, x->n_tok, x->seconds, want);
    }
    PS_CHECK(n_cut > 0);
    ps_profile_fini(&p);
}

PS_TEST(times_the_cpu_alone_on_host)
{
    if (!ps_test_device("host")) PS_SKIP("not asked for");
    setup s = make_setup("host");
    ps_profile p;
    ps_err err = {0};
    s.file = models[FIRST_MOE];
    uint64_t live = ps_heap_get_stats().live_blocks;
    PS_REQUIRE_OK(measure(&s, &p, &err), &err);
    uint32_t n_one = 0, n_two = 0;
    for (uint32_t i = 0; i < p.n_samples; i++) {
        const ps_sample *x = &p.samples[i];
        if (x->side == PS_SAMPLE_FIXED) continue;
        PS_CHECK_EQ(x->side, PS_SAMPLE_CPU);
        PS_CHECK(x->seconds > 0 && x->seconds < 1);
        PS_CHECK(x->bytes > 0);
        n_one += x->threads == 1;
        n_two += x->threads == 2;
    }
    PS_CHECK(n_one > 10);
    PS_CHECK_EQ_U64(n_one, n_two);
    PS_CHECK_EQ(count(&p, PS_SAMPLE_FIXED, "pass", PS_LOAD_IDLE), 1);
    ps_profile_fini(&p);
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, live);
}

PS_TEST(times_a_gpu)
{
    if (!ps_test_device("cuda")) PS_SKIP("no CUDA device asked for");
    setup s = make_setup("cuda");
    ps_profile p;
    ps_err err = {0};
    s.spec.max_tok = PS_PROFILE_MAX_TOK;
    s.spec.max_kv = PS_PROFILE_MAX_KV;
    s.spec.device_bytes = s.spec.host_bytes = 0;
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        s.file = models[m];
        ps_test_case("%s", s.file);
        PS_REQUIRE_OK(measure(&s, &p, &err), &err);
        for (uint32_t i = 0; i < p.n_samples; i++) {
            PS_CHECK(p.samples[i].seconds < 1);
            PS_CHECK(p.samples[i].seconds > 0 || p.samples[i].side == PS_SAMPLE_FIXED);
        }
        PS_CHECK(count(&p, PS_SAMPLE_GPU, "matmul", PS_LOAD_IDLE) >= 6);
        PS_CHECK(count(&p, PS_SAMPLE_H2D, "gather", PS_LOAD_IDLE) >= 1);
        ps_profile_fini(&p);
    }
}

PS_TEST(stays_within_its_time)
{
    setup s = make_setup("host");
    ps_profile p;
    ps_err err = {0};
    s.spec.max_tok = 0;
    s.spec.max_kv = 0;
    s.spec.limit_ns = 300000000;
    s.spec.host_bytes = 96 << 20; /* so much that several threads fill it */
    uint64_t start = ps_clock_ns();
    PS_REQUIRE_OK(measure(&s, &p, &err), &err);
    /* A millisecond a sample is the least; sanitizers make the rest slow. */
    PS_CHECK(ps_clock_ns() - start < (PS_TEST_SLOW_BUILD ? 15000000000ull : 3000000000ull));
    PS_CHECK(p.n_samples > 40);
    ps_profile_fini(&p);
}

/* ---- failures ---- */

PS_TEST(every_refusal_of_the_device)
{
    static const char *const names[] = {"alloc", "locked", "copy", "launch", "flag", "sync"};
    setup s = make_setup("emu");
    s.file = models[FIRST_MOE];
    s.spec.max_tok = 1;
    s.spec.max_kv = 64;
    s.spec.device_bytes = s.spec.host_bytes = 1 << 20;
    for (int kind = 0; kind < PS_FAULT_COUNT; kind++)
        for (int64_t after = 0;;
             after += 1 + after * (PS_TEST_SLOW_BUILD && !ps_test_long() ? 9 : 1) / 3) {
            ps_profile p;
            ps_err err = {0};
            uint64_t live = ps_heap_get_stats().live_blocks;
            ps_test_case("%s refused after %d", names[kind], (int)after);
            s.options.n_faults = 1;
            s.options.faults[0] = (ps_fault){.kind = (ps_fault_kind)kind, .after = after};
            ps_status status = measure(&s, &p, &err);
            PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks - (status == PS_OK ? 1 : 0), live);
            ps_profile_fini(&p);
            if (status == PS_OK) {
                PS_CHECK(after > 0);
                break;
            }
            PS_CHECK_EQ(status, PS_EDEVICE);
            PS_CHECK(strstr(err.message, "as it was told to") != NULL);
        }
}

static ps_status measure_least(void *ctx, ps_err *err)
{
    ps_profile p;
    ps_status status = measure(ctx, &p, err);
    ps_profile_fini(&p);
    return status;
}

PS_TEST(oom_at_every_allocation)
{
#ifdef __SANITIZE_THREAD__
    PS_SKIP("`make oom` does it; a refused allocation is no race");
#endif
    setup s = make_setup("emu");
    s.spec.max_tok = 1;
    s.spec.max_kv = 64;
    s.spec.device_bytes = s.spec.host_bytes = 1 << 20;
    ps_test_oom_sweep(measure_least, &s);
}

typedef struct stopper {
    uint64_t after, n_calls;
} stopper;

static bool stop_after(void *ctx, uint64_t done, uint64_t total)
{
    stopper *s = ctx;
    PS_CHECK(done <= total);
    return s->n_calls++ < s->after;
}

PS_TEST(cancelled_at_any_step)
{
    for (uint64_t after = 0; after < 60; after += 1 + after * ps_test_step(3) / 2) {
        stopper stop = {.after = after};
        setup s = make_setup("emu");
        ps_profile p;
        ps_err err = {0};
        s.spec.progress = stop_after;
        s.spec.ctx = &stop;
        uint64_t live = ps_heap_get_stats().live_blocks;
        PS_CHECK_STATUS(measure(&s, &p, &err), PS_ECANCELLED);
        PS_CHECK(p.n_samples == 0 && p.samples == NULL);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, live);
        PS_CHECK_EQ_U64(stop.n_calls, after + 1);
    }
}

PS_TEST_MAIN
