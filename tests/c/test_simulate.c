/* Time of tick lists that are written by hand, where the answer is known, and of streamed prompts
 * of a model of 12 layers, where bus or compute is. No device, no weights: the file is hollow. */
#include "gguf_writer.h"

#include "engine/ps_simulate.h"

/* ---- lists by hand ---- */

enum { MOST = 32 };

typedef struct script {
    ps_ticks ticks;
    ps_tick tick[MOST];
    uint64_t ns[MOST], end_ns[MOST];
} script;

static script script_of(uint32_t n_events, uint32_t n_flags)
{
    return (script){.ticks = {.n_events = n_events, .n_flags = n_flags}};
}

static void say(script *s, ps_stream_role stream, ps_tick_kind kind, uint32_t index, uint64_t ns)
{
    s->ns[s->ticks.n_ticks] = ns;
    s->tick[s->ticks.n_ticks++] =
        (ps_tick){.kind = (uint8_t)kind, .stream = (uint8_t)stream, .index = index, .unit = -1};
}

static ps_status run(script *s, ps_makespan *m, ps_err *err)
{
    s->ticks.tick = s->tick;
    return ps_simulate_run(&s->ticks, s->ns, s->end_ns, m, err);
}

#define H2D PS_STREAM_H2D
#define D2H PS_STREAM_D2H
#define GPU PS_STREAM_COMPUTE
#define CPU PS_STREAM_CPU

PS_TEST(one_stream_adds_up)
{
    script s = script_of(0, 0);
    ps_makespan m;
    ps_err err = {0};
    say(&s, GPU, PS_TICK_RUN, 0, 5);
    say(&s, GPU, PS_TICK_RUN, 0, 7);
    PS_REQUIRE_OK(run(&s, &m, &err), &err);
    PS_CHECK_EQ_U64(m.total_ns, 12);
    PS_CHECK_EQ_U64(m.busy_ns[GPU], 12);
    PS_CHECK_EQ_U64(m.critical_ns[GPU], 12);
    PS_CHECK_EQ_U64(s.end_ns[0], 5);
}

PS_TEST(streams_overlap)
{
    script s = script_of(0, 0);
    ps_makespan m;
    ps_err err = {0};
    say(&s, GPU, PS_TICK_RUN, 0, 50);
    say(&s, CPU, PS_TICK_RUN, 0, 70);
    say(&s, H2D, PS_TICK_COPY_IN, 0, 40);
    say(&s, D2H, PS_TICK_COPY_OUT, 0, 60);
    PS_REQUIRE_OK(run(&s, &m, &err), &err);
    PS_CHECK_EQ_U64(m.total_ns, 70);
    PS_CHECK_EQ_U64(m.critical_ns[CPU], 70);
    PS_CHECK_EQ_U64(m.critical_ns[GPU] + m.critical_ns[H2D] + m.critical_ns[D2H], 0);
}

/* Copies of 10 through two slots, ops of 4: the third copy waits for the first op. */
static void put_ring(script *s, uint64_t copy_ns, uint64_t run_ns)
{
    for (uint32_t i = 0; i < 4; i++) {
        if (i >= 2) say(s, H2D, PS_TICK_WAIT, 4 + i - 2, 0);
        say(s, H2D, PS_TICK_COPY_IN, 0, copy_ns);
        say(s, H2D, PS_TICK_RECORD, i, 0);
        say(s, GPU, PS_TICK_WAIT, i, 0);
        say(s, GPU, PS_TICK_RUN, 0, run_ns);
        say(s, GPU, PS_TICK_RECORD, 4 + i, 0);
    }
}

PS_TEST(a_ring_is_as_slow_as_its_slower_side)
{
    script s = script_of(8, 0);
    ps_makespan m;
    ps_err err = {0};
    put_ring(&s, 10, 4);
    PS_REQUIRE_OK(run(&s, &m, &err), &err);
    PS_CHECK_EQ_U64(m.total_ns, 4 * 10 + 4);
    PS_CHECK_EQ_U64(m.critical_ns[H2D], 40);
    PS_CHECK_EQ_U64(m.critical_ns[GPU], 4);
    s = script_of(8, 0);
    put_ring(&s, 4, 10);
    PS_REQUIRE_OK(run(&s, &m, &err), &err);
    PS_CHECK_EQ_U64(m.total_ns, 4 + 4 * 10);
    PS_CHECK_EQ_U64(m.critical_ns[H2D], 4);
    PS_CHECK_EQ_U64(m.critical_ns[GPU], 40);
    PS_CHECK_EQ_U64(m.busy_ns[H2D], 16);
}

PS_TEST(flags_hand_over_between_gpu_and_cpu)
{
    script s = script_of(0, 2);
    ps_makespan m;
    ps_err err = {0};
    say(&s, GPU, PS_TICK_RUN, 0, 10);
    say(&s, GPU, PS_TICK_FLAG_SET, 0, 1);
    say(&s, CPU, PS_TICK_FLAG_WAIT, 0, 3);
    say(&s, CPU, PS_TICK_RUN, 0, 20);
    say(&s, CPU, PS_TICK_FLAG_SET, 1, 0);
    say(&s, GPU, PS_TICK_RUN, 0, 15); /* beside the CPU */
    say(&s, GPU, PS_TICK_FLAG_WAIT, 1, 3);
    say(&s, GPU, PS_TICK_RUN, 0, 5);
    PS_REQUIRE_OK(run(&s, &m, &err), &err);
    PS_CHECK_EQ_U64(m.total_ns, 10 + 1 + 3 + 20 + 3 + 5);
    PS_CHECK_EQ_U64(m.critical_ns[GPU], 15);
    PS_CHECK_EQ_U64(m.critical_ns[CPU], 20);
    PS_CHECK_EQ_U64(m.critical_sync_ns, 7);
    PS_CHECK_EQ_U64(m.busy_ns[GPU], 30);
}

/* An event's number is used again: each wait binds to the last record before it. */
PS_TEST(a_wait_binds_to_the_last_record)
{
    script s = script_of(1, 0);
    ps_makespan m;
    ps_err err = {0};
    say(&s, H2D, PS_TICK_COPY_IN, 0, 10);
    say(&s, H2D, PS_TICK_RECORD, 0, 0);
    say(&s, GPU, PS_TICK_WAIT, 0, 0);
    say(&s, H2D, PS_TICK_COPY_IN, 0, 100);
    say(&s, H2D, PS_TICK_RECORD, 0, 0);
    say(&s, GPU, PS_TICK_RUN, 0, 5);
    say(&s, D2H, PS_TICK_WAIT, 0, 0);
    say(&s, D2H, PS_TICK_COPY_OUT, 0, 1);
    PS_REQUIRE_OK(run(&s, &m, &err), &err);
    PS_CHECK_EQ_U64(s.end_ns[5], 15);
    PS_CHECK_EQ_U64(s.end_ns[7], 111);
}

PS_TEST(bad_lists_are_refused)
{
    ps_makespan m;
    ps_err err = {0};
    script s = script_of(1, 1);
    say(&s, GPU, PS_TICK_WAIT, 0, 0);
    PS_CHECK_STATUS(run(&s, &m, &err), PS_EPLAN);
    PS_CHECK(err.message[0] != 0);
    s = script_of(1, 1);
    say(&s, CPU, PS_TICK_FLAG_WAIT, 0, 0);
    PS_CHECK_STATUS(run(&s, &m, NULL), PS_EPLAN);
    s = script_of(1, 1);
    say(&s, CPU, PS_TICK_FLAG_SET, 1, 0);
    PS_CHECK_STATUS(run(&s, &m, NULL), PS_EPLAN);
    s = script_of(0, 0);
    say(&s, GPU, PS_TICK_RUN, 0, UINT64_MAX);
    say(&s, GPU, PS_TICK_RUN, 0, 1);
    err = (ps_err){0};
    PS_CHECK_STATUS(run(&s, &m, &err), PS_EREQUEST);
    PS_CHECK_EQ_STR(err.field, "ns");
    s = script_of(0, 0);
    PS_CHECK_STATUS(run(&s, &m, NULL), PS_OK);
    PS_CHECK_EQ_U64(m.total_ns, 0);
}

static ps_status run_for_sweep(void *ctx, ps_err *err)
{
    script s = script_of(8, 0);
    ps_makespan m;
    (void)ctx;
    put_ring(&s, 10, 4);
    s.ticks.tick = s.tick;
    return ps_simulate_run(&s.ticks, s.ns, NULL, &m, err);
}

PS_TEST(oom_simulate)
{
    ps_test_oom_sweep(run_for_sweep, NULL);
}

/* ---- a model of 12 layers ---- */

enum { N_LAYER = 12, N_EMBD = 512, N_FF = 2048, N_KV = 128, N_VOCAB = 64, N_EXPERT = 8 };

typedef struct hollow { /* tensors of a file whose data are a hole */
    gguf_file *f;
    uint64_t offset;
    uint32_t n_tensors;
} hollow;

static void tensor(hollow *h, const char *name, uint64_t cols, uint64_t rows, uint64_t n)
{
    uint64_t dims[3] = {cols, rows, n};
    bool vector = rows == 0;
    if (h->f != NULL)
        put_tensor(h->f, name, vector ? PS_FMT_F32 : PS_FMT_F16,
            vector  ? 1
            : n > 0 ? 3
                    : 2,
            dims, h->offset);
    h->offset += vector ? cols * 4 : cols * rows * (n > 0 ? n : 1) * 2;
    h->n_tensors++;
}

static void block_tensor(
    hollow *h, int layer, const char *part, uint64_t cols, uint64_t rows, uint64_t n)
{
    char name[64];
    snprintf(name, sizeof name, "blk.%d.%s.weight", layer, part);
    tensor(h, name, cols, rows, n);
}

static void all_tensors(hollow *h, bool experts)
{
    tensor(h, "token_embd.weight", N_EMBD, N_VOCAB, 0);
    tensor(h, "output_norm.weight", N_EMBD, 0, 0);
    tensor(h, "output.weight", N_EMBD, N_VOCAB, 0);
    for (int i = 0; i < N_LAYER; i++) {
        block_tensor(h, i, "attn_norm", N_EMBD, 0, 0);
        block_tensor(h, i, "attn_q", N_EMBD, N_EMBD, 0);
        block_tensor(h, i, "attn_k", N_EMBD, N_KV, 0);
        block_tensor(h, i, "attn_v", N_EMBD, N_KV, 0);
        block_tensor(h, i, "attn_output", N_EMBD, N_EMBD, 0);
        block_tensor(h, i, "ffn_norm", N_EMBD, 0, 0);
        if (experts) {
            block_tensor(h, i, "ffn_gate_inp", N_EMBD, N_EXPERT, 0);
            block_tensor(h, i, "ffn_gate_exps", N_EMBD, N_FF / N_EXPERT, N_EXPERT);
            block_tensor(h, i, "ffn_up_exps", N_EMBD, N_FF / N_EXPERT, N_EXPERT);
            block_tensor(h, i, "ffn_down_exps", N_FF / N_EXPERT, N_EMBD, N_EXPERT);
        } else {
            block_tensor(h, i, "ffn_gate", N_EMBD, N_FF, 0);
            block_tensor(h, i, "ffn_up", N_EMBD, N_FF, 0);
            block_tensor(h, i, "ffn_down", N_FF, N_EMBD, 0);
        }
    }
}

static bool write_hollow(const char *path, bool experts)
{
    static gguf_file f;
    hollow count = {0}, real = {.f = &f};
    all_tensors(&count, experts);
    put_header(&f, count.n_tensors, experts ? 11 : 8);
    put_kv_str(&f, "general.architecture", "llama");
    put_kv_u32(&f, "llama.block_count", N_LAYER);
    put_kv_u32(&f, "llama.context_length", 4096);
    put_kv_u32(&f, "llama.embedding_length", N_EMBD);
    put_kv_u32(&f, "llama.feed_forward_length", experts ? N_FF / N_EXPERT : N_FF);
    put_kv_u32(&f, "llama.attention.head_count", N_EMBD / 64);
    put_kv_u32(&f, "llama.attention.head_count_kv", N_KV / 64);
    put_kv(
        &f, "llama.attention.layer_norm_rms_epsilon", PS_GGUF_F32, &(float){1e-5f}, sizeof(float));
    if (experts) {
        put_kv_u32(&f, "llama.expert_count", N_EXPERT);
        put_kv_u32(&f, "llama.expert_used_count", 2);
        put_kv_u32(&f, "llama.expert_feed_forward_length", N_FF / N_EXPERT);
    }
    all_tensors(&real, experts);
    put_data(&f, 32, 0);
    write_file(path, f.bytes, f.n);
    return truncate(path, (off_t)(f.n + real.offset)) == 0;
}

static ps_status make_plan(const ps_model *model, uint32_t n_slots, uint64_t slot_bytes,
    ps_place_kind kind, ps_plan **out, ps_err *err)
{
    ps_tier tier = {"all", UINT32_MAX};
    ps_place *places = ps_alloc(model->n_units, sizeof *places);
    if (places == NULL) return PS_ENOMEM;
    for (uint32_t u = 0; u < model->n_units; u++)
        places[u].kind = model->units[u].layer >= 0 ? kind : PS_PLACE_VRAM;
    ps_plan_spec spec = {.accelerator = true,
        .sm = 90,
        .budget_bytes = UINT64_MAX,
        .n_ctx = 1024,
        .n_seq = 1,
        .kv_fmt = PS_FMT_F16,
        .n_tiers = 1,
        .tiers = &tier,
        .places = places,
        .n_slots = n_slots,
        .slot_bytes = slot_bytes,
        .chunk_tok = 256,
        .pass_tok = 512,
        .logit_rows = 1};
    ps_status status = ps_plan_create(model, &spec, out, err);
    ps_free(places);
    return status;
}

/* Nanoseconds on a machine that is told by how long it takes for all copies and for all ops. */
static void times(const ps_ticks *t, double copy_ns, double run_ns, uint64_t *ns)
{
    double bytes = 0, flops = 0;
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        ps_work w = ps_simulate_work(t, i);
        bytes += (double)w.n_bytes;
        flops += (double)w.flops;
    }
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        ps_work w = ps_simulate_work(t, i);
        ns[i] = (uint64_t)((double)w.n_bytes / bytes * copy_ns + (double)w.flops / flops * run_ns);
    }
}

static uint64_t sum_of(const ps_makespan *m, const uint64_t *ns)
{
    uint64_t sum = m->critical_sync_ns;
    for (int s = 0; s < PS_STREAM_COUNT; s++) sum += ns[s];
    return sum;
}

/* What a prompt takes when copies take a second in all and ops run_ns. */
static uint64_t prompt_ns(const ps_plan *plan, double run_ns)
{
    ps_pass_shape shape = {.n_tok = 512, .n_out = 1, .max_kv = 512};
    ps_ticks *t = NULL;
    ps_makespan m = {0};
    uint64_t *ns = NULL;
    if (ps_simulate_lower(plan, &shape, &t, NULL) == PS_OK) ns = ps_alloc(t->n_ticks, sizeof *ns);
    if (ns != NULL) {
        times(t, 1e9, run_ns, ns);
        PS_CHECK_STATUS(ps_simulate_run(t, ns, NULL, &m, NULL), PS_OK);
        PS_CHECK_EQ_U64(sum_of(&m, m.critical_ns), m.total_ns);
    }
    ps_free(ns);
    ps_ticks_destroy(t);
    return m.total_ns;
}

/* The project's promise about its pipeline, on the slower side's time and one slot. */
static void check_prompt(const ps_plan *plan, double run_ns)
{
    double longer = run_ns > 1e9 ? run_ns : 1e9, got = (double)prompt_ns(plan, run_ns);
    double slot_ns = 1e9 * (double)plan->spec.slot_bytes / (double)plan->model->n_bytes;
    PS_CHECK(got >= longer * 0.999);
    if (got > longer * 1.05 + slot_ns)
        ps_test_fail(__FILE__, __LINE__, "%.0f ns, and the slower side takes %.0f", got, longer);
}

PS_TEST(a_streamed_prompt_takes_as_long_as_the_slower_of_bus_and_compute)
{
    for (int experts = 0; experts < 2; experts++) {
        const char *path = in_folder(experts ? "moe.gguf" : "dense.gguf");
        ps_model *model = NULL;
        ps_plan *plan = NULL;
        ps_err err = {0};
        PS_REQUIRE(write_hollow(path, experts));
        PS_REQUIRE_OK(ps_model_open(path, &model, &err), &err);
        static const uint32_t rings[][2] = {{64, 256 << 10}, {32, 1 << 20}, {28, 512 << 10}};
        static const double ratios[] = {0.05, 0.3, 0.5, 2, 3, 20};
        for (size_t r = 0; r < sizeof rings / sizeof *rings; r++) {
            PS_REQUIRE_OK(
                make_plan(model, rings[r][0], rings[r][1], PS_PLACE_STREAM, &plan, &err), &err);
            for (size_t i = 0; i < sizeof ratios / sizeof *ratios; i++) {
                ps_test_case("%s, ring %zu, compute %.2f of the copies", path, r, ratios[i]);
                check_prompt(plan, 1e9 * ratios[i]);
            }
            ps_plan_destroy(plan);
        }
        ps_test_case("%s, a ring for one unit at a time", path);
        PS_REQUIRE_OK(make_plan(model, 13, 512 << 10, PS_PLACE_STREAM, &plan, &err), &err);
        PS_CHECK(prompt_ns(plan, 1e9) > 1300000000);
        ps_plan_destroy(plan);
        ps_model_close(model);
    }
}

/* Experts that are elsewhere cost this side nothing; those of one layer on both sides cost, in all,
 * what one side would pay. */
PS_TEST(experts_cost_where_they_are)
{
    ps_model *model = NULL;
    ps_err err = {0};
    const char *path = in_folder("moe.gguf");
    PS_REQUIRE(write_hollow(path, true));
    PS_REQUIRE_OK(ps_model_open(path, &model, &err), &err);
    ps_place places[200] = {{0}};
    PS_REQUIRE(model->n_units <= 200);
    ps_tier tier = {"all", UINT32_MAX};
    ps_plan_spec spec = {.accelerator = true,
        .sm = 90,
        .budget_bytes = UINT64_MAX,
        .n_ctx = 256,
        .n_seq = 1,
        .kv_fmt = PS_FMT_F16,
        .n_tiers = 1,
        .tiers = &tier,
        .places = places,
        .n_slots = 4,
        .slot_bytes = 1 << 20,
        .chunk_tok = 64,
        .pass_tok = 64,
        .logit_rows = 1};
    uint64_t total[3] = {0};
    for (int variant = 0; variant < 3; variant++) { /* all on the GPU, some streamed, some not */
        for (uint32_t u = 0; u < model->n_units; u++) {
            int e = model->units[u].expert;
            places[u].kind = e >= 0 && variant > 0 && e % 2 == 0 ? PS_PLACE_CPU
                             : e >= 0 && variant == 2            ? PS_PLACE_STREAM
                                                                 : PS_PLACE_VRAM;
        }
        ps_plan *plan = NULL;
        ps_ticks *t = NULL;
        PS_REQUIRE_OK(ps_plan_create(model, &spec, &plan, &err), &err);
        ps_pass_shape shape = {.n_tok = 4, .n_out = 1, .max_kv = 64};
        PS_REQUIRE_OK(ps_simulate_lower(plan, &shape, &t, &err), &err);
        for (uint32_t i = 0; i < t->n_ticks; i++)
            if (t->tick[i].kind == PS_TICK_RUN && t->tick[i].op == PS_OP_MOE_UP) {
                ps_work w = ps_simulate_work(t, i);
                total[variant] += w.bytes;
                PS_CHECK_EQ(w.n_tok, 4);
                PS_CHECK_EQ(w.fmt, PS_FMT_F16);
            }
        ps_ticks_destroy(t);
        ps_plan_destroy(plan);
    }
    PS_CHECK(total[0] > 0);
    PS_CHECK_NEAR((double)total[1], (double)total[0], 1e-3 * (double)total[0]);
    PS_CHECK_NEAR((double)total[2], (double)total[0], 1e-3 * (double)total[0]);
    ps_model_close(model);
}

PS_TEST_MAIN
