/* Plans, lowering and the checker, on the golden models: no device, no weights read. */
#include "ps_test.h"

#include <math.h>

#include "engine/ps_measure.h"
#include "engine/ps_ticks.h"

typedef struct fixture {
    ps_model *model;
    ps_place *places;
    ps_tier tiers[3];
    ps_plan_spec spec;
} fixture;

static bool open_fixture(fixture *f, const char *file, bool accelerator)
{
    char path[256];
    ps_err err = {0};
    snprintf(path, sizeof path, "tests/data/golden/%s", file);
    *f = (fixture){0};
    if (ps_model_open(path, &f->model, &err) != PS_OK) {
        ps_test_fail(__FILE__, __LINE__, "%s: %s", file, err.message);
        return false;
    }
    f->tiers[0] = (ps_tier){"decode", 1};
    f->tiers[1] = (ps_tier){"small", 64};
    f->tiers[2] = (ps_tier){"prefill", UINT32_MAX};
    f->places = ps_alloc(3ull * f->model->n_units, sizeof *f->places);
    f->spec = (ps_plan_spec){.accelerator = accelerator,
        .sm = 90,
        .budget_bytes = UINT64_MAX,
        .n_ctx = 256,
        .n_seq = 2,
        .kv_fmt = PS_FMT_F16,
        .n_tiers = 3,
        .tiers = f->tiers,
        .places = f->places,
        .chunk_tok = 16,
        .pass_tok = 48,
        .logit_rows = 4};
    return true;
}

static void close_fixture(fixture *f)
{
    ps_free(f->places);
    ps_model_close(f->model);
}

static void place(fixture *f, uint32_t unit, ps_place_kind kind)
{
    for (uint32_t t = 0; t < 3; t++) f->places[t * f->model->n_units + unit].kind = kind;
}

static const char *const models[] = {"llama.q4_k_m.gguf", "llama3-rope.q8_0.gguf",
    "mixtral.q4_0.gguf", "nemotron.bf16.gguf", "qwen2.q8_0.gguf", "qwen2vl.f16.gguf",
    "qwen3.q6_k.gguf", "qwen3moe.q4_k_m.gguf", "gemma3.q4_0.gguf", "phi3.q4_1.gguf",
    "gpt-oss.mxfp4.gguf"};
enum { N_MODELS = sizeof models / sizeof *models };

/* Shares of one unit: the same of VRAM in every tier, others of the ring. */
static void split(fixture *f, uint32_t unit, uint64_t *seed)
{
    static const float shares[] = {0.0f, 0.25f, 0.5f, 0.001f, 0.6f};
    float vram = shares[ps_rng_next(seed) % 5];
    for (uint32_t t = 0; t < 3; t++) {
        float stream = shares[ps_rng_next(seed) % 5];
        f->places[t * f->model->n_units + unit] =
            (ps_place){PS_PLACE_SPLIT, vram, vram + stream > 1.0f || t == 2 ? 1.0f - vram : stream};
    }
}

/* Some of a layer's experts shared by bus and CPU, at one ratio in a tier; none of them in VRAM,
 * but for the last tier, where that has residents of its own. */
static void divide(fixture *f, uint32_t layer, uint64_t *seed)
{
    static const float shares[] = {0.0f, 0.3f, 0.5f, 0.75f, 1.0f, 0.01f};
    uint32_t first = (uint32_t)f->model->layers[layer].first_expert, n_units = f->model->n_units;
    uint64_t which = ps_rng_next(seed) % 4 == 0 ? UINT64_MAX : ps_rng_next(seed);
    for (uint32_t t = 0; t < 3; t++) {
        float share = shares[ps_rng_next(seed) % 6];
        if (t == 2 && f->spec.per_tier_residency) break;
        for (uint32_t e = 0; e < f->model->hp.n_expert; e++)
            if (which >> (e % 64) & 1 && (t != 2 || e % 3 != 0))
                f->places[t * n_units + first + e] = (ps_place){PS_PLACE_SPLIT, 0, share};
            else if (which >> (e % 64) & 1)
                f->places[t * n_units + first + e] = (ps_place){PS_PLACE_STREAM, 0, 0};
    }
}

static ps_place_kind draw_kind(uint64_t draw, bool streams)
{
    return streams && draw < 3 ? PS_PLACE_STREAM : draw % 2 == 0 ? PS_PLACE_VRAM : PS_PLACE_CPU;
}

/* Residents of each tier's own, units split at other rows in each. */
static void place_by_tier(fixture *f, uint32_t unit, bool streams, bool may_split, uint64_t *seed)
{
    for (uint32_t t = 0; t < 3; t++) {
        ps_place *place = &f->places[t * f->model->n_units + unit];
        *place = (ps_place){.kind = draw_kind(ps_rng_next(seed) % 6, streams)};
        if (may_split && ps_rng_next(seed) % 3 == 0)
            *place = (ps_place){PS_PLACE_SPLIT, (float)(ps_rng_next(seed) % 5) / 4, 0.0f};
    }
}

/* Which units go where: none or all in VRAM, patterns that put neighbours on different sides; from
 * FIRST_STREAMED on patterns with streamed units, through rings from roomy to tight; from
 * FIRST_SPLIT on with split ones too; from FIRST_OWN on with residents of each tier's own. */
enum { FIRST_STREAMED = 8, FIRST_SPLIT = 20, FIRST_OWN = 32, N_PATTERNS = 44 };
static void apply_pattern(fixture *f, int pattern)
{
    static const uint32_t rings[][2] = {
        {4, 256 << 10}, {3, 128 << 10}, {7, 64 << 10}, {2, 512 << 10}};
    uint64_t seed = (uint64_t)pattern;
    f->spec.per_tier_residency = pattern >= FIRST_OWN;
    for (uint32_t u = 0; u < f->model->n_units; u++) {
        uint64_t draw = ps_rng_next(&seed) % 6;
        bool vram = pattern == 1 || (pattern == 2 && u % 2 == 0) || (pattern > 2 && draw % 2 == 0);
        bool stream = pattern == FIRST_STREAMED || (pattern > FIRST_STREAMED && draw < 4);
        place(f, u, stream ? PS_PLACE_STREAM : vram ? PS_PLACE_VRAM : PS_PLACE_CPU);
        ps_unit_kind kind = f->model->units[u].kind;
        bool can = kind == PS_UNIT_ATTN || kind == PS_UNIT_FFN || kind == PS_UNIT_HEAD;
        if (pattern >= FIRST_OWN)
            place_by_tier(f, u, pattern % 2 == 0, can && pattern % 3 == 0, &seed);
        else if (pattern >= FIRST_SPLIT && can && draw != 0)
            split(f, u, &seed);
    }
    for (uint32_t i = 0; i < f->model->hp.n_layer && pattern >= FIRST_SPLIT; i++)
        if (f->model->layers[i].router >= 0) divide(f, i, &seed);
    static const uint32_t none_in_vram[64] = {0},
                          windows[64] = {64, 1, 128, 0, 64, 100, 65, 1 << 30};
    f->spec.kv_vram_tok = pattern % 6 == 5 ? windows : pattern % 3 == 2 ? none_in_vram : NULL;
    f->spec.kv_far_side = pattern % 4 == 3 ? PS_SIDE_HOST : PS_SIDE_DEV;
    f->spec.n_slots = rings[pattern % 4][0];
    f->spec.slot_bytes = rings[pattern % 4][1];
}

/* Whatever residents the pass finds. */
static void check_shape(const ps_plan *plan, ps_pass_shape shape)
{
    for (ps_residency held = 0; held <= plan->n_residencies; held++) {
        ps_ticks *ticks = NULL;
        ps_err err = {0};
        shape.found = ps_plan_found(plan, held, shape.tier);
        PS_CHECK_STATUS(ps_lower(plan, &shape, &ticks, &err), PS_OK);
        if (ticks == NULL) continue;
        ps_status status = ps_ticks_check(ticks, &err);
        if (status != PS_OK)
            ps_test_fail(__FILE__, __LINE__, "%u tokens, found %u: %s", shape.n_tok, shape.found,
                err.message);
        ps_ticks_destroy(ticks);
    }
}

/* How many layers stand for others, of which a pass of any kind wants as much as if each were
 * looked at by itself. */
static uint32_t check_alike(const ps_plan *plan)
{
    static const uint32_t sizes[] = {1, 2, 7, 40, 48};
    uint32_t stands_for[64], n = 0;
    bool *none = ps_alloc(plan->model->n_units, sizeof *none);
    for (uint32_t i = 0; i < 5 * 2 * 2; i++) {
        ps_pass_shape shape = {.n_tok = sizes[i / 4], .n_out = 1, .max_kv = 256};
        shape.tier = ps_plan_tier(plan, shape.n_tok);
        shape.far = i % 2 == 0 ? 0 : UINT32_MAX;
        shape.mapped = i / 2 % 2 == 0 ? NULL : none;
        uint64_t ws = 0, ws_of_all = 0;
        uint32_t table = 0, table_of_all = 0;
        ps_err err = {0};
        PS_CHECK_STATUS(ps_plan_find_alike(plan, shape.tier, stands_for, &err), PS_OK);
        PS_CHECK_STATUS(ps_lower_measure(plan, &shape, stands_for, &ws, &table, &err), PS_OK);
        PS_CHECK_STATUS(
            ps_lower_measure(plan, &shape, NULL, &ws_of_all, &table_of_all, &err), PS_OK);
        PS_CHECK_EQ(ws, ws_of_all);
        PS_CHECK_EQ(table, table_of_all);
        for (uint32_t layer = 0; layer < plan->model->hp.n_layer; layer++)
            n += stands_for[layer] > 1;
    }
    ps_free(none);
    return n;
}

PS_TEST(every_architecture_lowers_and_checks)
{
    uint32_t n_alike = 0;
    for (int i = 0; i < N_MODELS; i++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            fixture f;
            if (!open_fixture(&f, models[i], true)) continue;
            ps_test_case("%s pattern %d", models[i], pattern);
            apply_pattern(&f, pattern);
            ps_plan *plan = NULL;
            ps_err err = {0};
            PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
            static const ps_pass_shape shapes[] = {
                {.tier = 0, .n_tok = 1, .n_out = 1, .max_kv = 64},
                {.tier = 1, .n_tok = 40, .n_out = 40, .max_kv = 64},
                {.tier = 1, .n_tok = 33, .n_out = 1, .max_kv = 256},
                {.tier = 0, .n_tok = 2, .n_out = 0, .max_kv = 64},
                {.tier = 0, .n_tok = 1, .n_out = 1, .max_kv = 256, .far = UINT32_MAX},
                {.tier = 1, .n_tok = 45, .n_out = 2, .max_kv = 256, .far = 2},
                {.tier = 1,
                    .n_tok = 40,
                    .n_out = 1,
                    .max_kv = 256,
                    .staged = true,
                    .seq = 1,
                    .first = 70}};
            for (size_t j = 0; plan != NULL && j < sizeof shapes / sizeof *shapes; j++)
                if (!shapes[j].staged || plan->kv_backed) check_shape(plan, shapes[j]);
            if (plan != NULL) n_alike += check_alike(plan);
            ps_plan_destroy(plan);
            close_fixture(&f);
        }
    ps_test_case("%s", "");
    PS_CHECK(n_alike > 1000);
}

/* The list without each of its RECORDs, WAITs and flags in turn; how many there are, by kind. */
static void check_mutants(ps_ticks *t, uint32_t n_by_kind[PS_TICK_FLAG_WAIT + 1])
{
    for (uint32_t k = 0; k < t->n_ticks; k++) {
        ps_tick gone = t->tick[k];
        if (gone.kind <= PS_TICK_RUN) continue;
        memmove(&t->tick[k], &t->tick[k + 1], (t->n_ticks - k - 1) * sizeof *t->tick);
        t->n_ticks--;
        ps_err why = {0};
        PS_CHECK_STATUS(ps_ticks_check(t, &why), PS_EPLAN);
        memmove(&t->tick[k + 1], &t->tick[k], (t->n_ticks - k) * sizeof *t->tick);
        t->tick[k] = gone;
        t->n_ticks++;
        n_by_kind[gone.kind]++;
    }
}

static uint32_t count_ops(const ps_ticks *t, ps_op_kind op)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_ticks; i++)
        n += t->tick[i].kind == PS_TICK_RUN && t->tick[i].op == op;
    return n;
}

/* Attention of units with windows on the CPU. */
static uint32_t count_far_on_cpu(const ps_ticks *t)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        n += k->kind == PS_TICK_RUN && k->op == PS_OP_ATTN && k->stream == PS_STREAM_CPU &&
             t->plan->kv[k->unit].home == PS_KV_WINDOW;
    }
    return n;
}

/* The heart of "a bad policy can never break anything": no wait is redundant, and the checker sees
 * each one missing. */
PS_TEST(checker_rejects_every_dropped_sync)
{
    uint32_t n_mutants = 0, n_gathers = 0, n_divided = 0, n_far = 0,
             n_by_kind[PS_TICK_FLAG_WAIT + 1] = {0};
    for (int i = 0; i < N_MODELS; i++)
        for (int pattern = 2; pattern < N_PATTERNS; pattern += 3) {
            fixture f;
            if (!open_fixture(&f, models[i], true)) continue;
            ps_test_case("%s pattern %d", models[i], pattern);
            apply_pattern(&f, pattern);
            ps_plan *plan = NULL;
            ps_err err = {0};
            PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
            ps_pass_shape shapes[] = {{.tier = 1,
                                          .n_tok = 40,
                                          .n_out = 6,
                                          .max_kv = 192,
                                          .staged = plan->kv_backed,
                                          .first = plan->kv_backed ? 70 : 0},
                {.tier = 0, .n_tok = 1, .n_out = 1, .max_kv = 64},
                {.tier = 0, .n_tok = 1, .n_out = 1, .max_kv = 256, .far = UINT32_MAX},
                {.tier = 1, .n_tok = 40, .n_out = 1, .max_kv = 256, .far = UINT32_MAX}};
            for (size_t j = 0; j < sizeof shapes / sizeof *shapes; j++) {
                ps_ticks *t = NULL;
                if (shapes[j].far != 0 && plan->n_windows == 0) continue;
                shapes[j].found = ps_plan_found(plan, plan->n_residencies, shapes[j].tier);
                PS_CHECK_STATUS(ps_lower(plan, &shapes[j], &t, &err), PS_OK);
                if (t == NULL) continue;
                check_mutants(t, n_by_kind);
                n_gathers += count_ops(t, PS_OP_GATHER_EXPERTS);
                n_far += count_far_on_cpu(t);
                for (uint32_t k = 0; k < t->n_ticks; k++)
                    n_divided += t->tick[k].kind == PS_TICK_RUN &&
                                 t->tick[k].op == PS_OP_GATHER_EXPERTS &&
                                 t->tick[k].stream == PS_STREAM_CPU;
                ps_ticks_destroy(t);
            }
            ps_plan_destroy(plan);
            close_fixture(&f);
        }
    ps_test_case("%s", "");
    for (int k = PS_TICK_RECORD; k <= PS_TICK_FLAG_WAIT; k++) n_mutants += n_by_kind[k];
    PS_CHECK(n_mutants > 500 && n_gathers > 20 && n_divided > 6 && n_far > 20);
    for (int k = PS_TICK_RECORD; k <= PS_TICK_FLAG_WAIT; k++) PS_CHECK(n_by_kind[k] > 20);
}

PS_TEST(rules_are_plan_errors)
{
    fixture f;
    if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
    ps_plan *plan = NULL;
    ps_err err = {0};
    apply_pattern(&f, 0);
    f.places[0].kind = PS_PLACE_VRAM; /* in one tier only */
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_EPLAN);
    PS_CHECK(plan == NULL && strcmp(err.field, f.model->units[0].name) == 0 && err.extra[0] != 0);
    f.spec.per_tier_residency = true; /* now that is meant */
    err = (ps_err){0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    ps_plan_destroy(plan);
    apply_pattern(&f, 1);
    f.spec.accelerator = false;
    err = (ps_err){0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_EPLAN);
    close_fixture(&f);
}

/* Residents of nested sets: those of two tiers, one of them wider, and a third that has others. */
static void place_nested(fixture *f)
{
    uint32_t n = f->model->n_units;
    for (uint32_t u = 0; u < n; u++) {
        f->places[u].kind = u % 2 == 0 ? PS_PLACE_VRAM : PS_PLACE_CPU;
        f->places[n + u].kind = u % 4 == 0 ? PS_PLACE_VRAM : PS_PLACE_CPU;
        f->places[2 * n + u].kind = u % 4 < 2 ? PS_PLACE_VRAM : PS_PLACE_CPU;
    }
    f->spec.per_tier_residency = true;
}

static uint64_t resident_bytes(const ps_plan *plan, ps_residency r)
{
    uint64_t n_bytes = 0;
    for (uint32_t u = 0; u < plan->model->n_units; u++)
        if (ps_plan_resident_at(plan, r, u) != UINT64_MAX)
            n_bytes +=
                ps_div_up_u64(plan->model->units[u].n_bytes, PS_ARENA_ALIGN) * PS_ARENA_ALIGN;
    return n_bytes;
}

PS_TEST(residencies_share_their_memory)
{
    fixture f;
    if (!open_fixture(&f, "llama.q4_k_m.gguf", true)) return;
    place_nested(&f);
    ps_plan *plan = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    if (plan == NULL) return;
    PS_CHECK(plan->n_residencies == 3 && plan->residency_of[2] == 2);
    uint64_t most = 0;
    for (uint32_t r = 0; r < 3; r++) most = ps_max_u64(most, resident_bytes(plan, r));
    PS_CHECK(plan->space_bytes[PS_SPACE_DEV_WEIGHTS] == most && most < resident_bytes(plan, 0) * 2);
    for (uint32_t u = 0; u < f.model->n_units; u++) {
        uint64_t first = ps_plan_resident_at(plan, 0, u), second = ps_plan_resident_at(plan, 1, u);
        PS_CHECK(second == UINT64_MAX || second == first); /* part of the first */
        PS_CHECK(ps_plan_resident_at(plan, 3, u) == (u % 4 == 0 ? first : UINT64_MAX));
        PS_CHECK(ps_plan_comes_and_goes(plan, u) == (u % 4 == 1 || u % 4 == 2));
    }
    /* The second tier finds its own in either of the others' and in what a failure leaves. */
    for (ps_residency held = 0; held <= 3; held++) {
        PS_CHECK(ps_plan_found(plan, held, 1) == 0 && ps_plan_held_after(plan, held, 1) == held);
        PS_CHECK(ps_plan_found(plan, held, 0) == (held == 0 ? 0 : held + 1));
        PS_CHECK(ps_plan_held_after(plan, held, 2) == 2);
    }
    ps_plan_destroy(plan);
    close_fixture(&f);
}

/* A resident that was not there and does not come is found by who reads it. */
PS_TEST(checker_misses_residents)
{
    fixture f;
    if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
    place_nested(&f);
    ps_plan *plan = NULL;
    ps_ticks *t = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    ps_pass_shape shape = {.tier = 2, .n_tok = 40, .n_out = 1, .max_kv = 64};
    if (plan != NULL) shape.found = ps_plan_found(plan, 0, 2);
    if (plan != NULL) PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
    uint64_t n_bytes = 0;
    for (uint32_t k = 0; t != NULL && k < t->n_ticks; k++) {
        ps_tick *copy = &t->tick[k];
        if (copy->kind != PS_TICK_COPY_IN || ps_ref_space(copy->dst) != PS_SPACE_DEV_WEIGHTS)
            continue;
        uint64_t all = copy->n_bytes;
        PS_CHECK(all == f.model->units[copy->unit].n_bytes && copy->unit % 4 == 1);
        n_bytes += all;
        copy->n_bytes = all / 2;
        PS_CHECK_STATUS(ps_ticks_check(t, &(ps_err){0}), PS_EPLAN);
        copy->n_bytes = all;
    }
    uint64_t wanted = 0;
    for (uint32_t u = 1; u < f.model->n_units; u += 4) wanted += f.model->units[u].n_bytes;
    PS_CHECK(n_bytes == wanted);
    ps_ticks_destroy(t);
    ps_plan_destroy(plan);
    close_fixture(&f);
}

static void split_at(fixture *f, uint32_t unit, uint32_t tier, float vram, float stream)
{
    f->places[tier * f->model->n_units + unit] = (ps_place){PS_PLACE_SPLIT, vram, stream};
}

/* Every row of a unit is in one part, every part of one place in each tier, and only norms are in
 * none. */
PS_TEST(splits_are_cut_at_every_boundary)
{
    fixture f;
    if (!open_fixture(&f, "qwen2.q8_0.gguf", true)) return;
    apply_pattern(&f, 0);
    f.spec.n_slots = 4;
    f.spec.slot_bytes = 64 << 10;
    uint32_t ffn = (uint32_t)f.model->layers[0].ffn, n_units = f.model->n_units;
    PS_CHECK(f.model->units[ffn].n_rows == 256 && f.model->units[ffn].row_step == 64);
    split_at(&f, ffn, 0, 0.3f, 0.2f);   /* 64, to 128 */
    split_at(&f, ffn, 1, 0.2f, 0.5f);   /* 64, to 192 */
    split_at(&f, ffn, 2, 0.25f, 0.75f); /* 64, to the end */
    ps_plan *plan = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    if (plan == NULL) return;
    const ps_unit *u = &plan->model->units[ffn];
    static const char *const names[] = {"blk.0.ffn[norms]", "blk.0.ffn[0:64]", "blk.0.ffn[64:128]",
        "blk.0.ffn[128:192]", "blk.0.ffn[192:256]"};
    static const char *const places[] = {"vvvv", "vvvv", "xsss", "xcss", "xccs"};
    PS_CHECK(plan->model != f.model && u->n_parts == 5 && u->first_part == n_units);
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < u->n_parts; i++) {
        const ps_unit *part = &plan->model->units[u->first_part + i];
        PS_CHECK(strcmp(part->name, names[i]) == 0 && part->of == (int32_t)ffn);
        PS_CHECK(ps_plan_whole(plan, (int32_t)(u->first_part + i)) == (int32_t)ffn);
        n_bytes += part->n_bytes;
        for (uint32_t t = 0; t < 3; t++)
            PS_CHECK("cvs"[ps_plan_place(plan, t, u->first_part + i).kind] ==
                     places[i][i < 2 ? 0 : t + 1]);
        PS_CHECK((ps_plan_resident_at(plan, 0, u->first_part + i) != UINT64_MAX) == (i < 2));
        PS_CHECK(plan->homes[u->first_part + i].host == (i >= 2));
    }
    PS_CHECK(n_bytes >= u->n_bytes && n_bytes < u->n_bytes + 5 * 3 * PS_WEIGHT_ALIGN);
    PS_CHECK(ps_plan_resident_at(plan, 0, ffn) == UINT64_MAX && !plan->homes[ffn].host);
    PS_CHECK(f.model->units[ffn].n_parts == 0); /* the model itself is as it was */
    ps_plan_destroy(plan);
    close_fixture(&f);
}

/* Shares that round to all or nothing leave a unit whole, wherever they put it. */
PS_TEST(splits_that_round_to_one_side_cut_nothing)
{
    static const struct {
        float vram, stream;
        ps_place_kind kind;
    } rows[] = {{0, 0, PS_PLACE_CPU}, {0.001f, 0.001f, PS_PLACE_CPU}, {1, 0, PS_PLACE_VRAM},
        {0.99f, 0.01f, PS_PLACE_VRAM}, {0, 1, PS_PLACE_STREAM}, {0.05f, 0.95f, PS_PLACE_STREAM}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        fixture f;
        if (!open_fixture(&f, "qwen2.q8_0.gguf", true)) return;
        apply_pattern(&f, FIRST_STREAMED);
        uint32_t ffn = (uint32_t)f.model->layers[1].ffn;
        ps_plan *split = NULL, *whole = NULL;
        ps_err err = {0};
        for (uint32_t t = 0; t < 3; t++) split_at(&f, ffn, t, rows[i].vram, rows[i].stream);
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &split, &err), PS_OK);
        place(&f, ffn, rows[i].kind);
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &whole, &err), PS_OK);
        if (split != NULL && whole != NULL)
            PS_CHECK(split->model == f.model && split->needed_bytes == whole->needed_bytes &&
                     ps_plan_place(split, 1, ffn).kind == rows[i].kind);
        ps_plan_destroy(split);
        ps_plan_destroy(whole);
        close_fixture(&f);
    }
}

PS_TEST(bad_splits_are_plan_errors)
{
    enum { EMBED, ATTN, ROUTER, EXPERT, HEAD };
    static const struct {
        int unit;
        float vram, stream, vram_else;
        bool ring;
        const char *why;
    } rows[] = {{EXPERT, 0.5f, 0, 0.5f, true, "an expert is not cut"},
        {EXPERT, 0, 1.5f, 0, true, "shares"}, {EXPERT, 0, 0.5f, 0, false, "needs a ring"},
        {EMBED, 0.5f, 0, 0.5f, true, "not split"}, {ROUTER, 0.5f, 0, 0.5f, true, "too small"},
        {HEAD, -0.1f, 0, -0.1f, true, "shares"}, {HEAD, 0.7f, 0.4f, 0.7f, true, "shares"},
        {HEAD, 0.0f / 0.0f, 0, 0, true, "shares"}, {HEAD, 0.5f, 0, 0.9f, true, "same in all tiers"},
        {ATTN, 0.5f, 0.5f, 0.5f, false, "needs a ring"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        fixture f;
        if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
        const ps_layer *y = &f.model->layers[0];
        uint32_t units[] = {(uint32_t)f.model->embed, (uint32_t)y->attn, (uint32_t)y->router,
            (uint32_t)y->first_expert + 3, (uint32_t)f.model->head},
                 unit = units[rows[i].unit];
        ps_test_case("row %zu", i);
        apply_pattern(&f, 0);
        if (!rows[i].ring) f.spec.n_slots = 0;
        split_at(&f, unit, 0, rows[i].vram, rows[i].stream);
        for (uint32_t t = 1; t < 3; t++) split_at(&f, unit, t, rows[i].vram_else, rows[i].stream);
        ps_plan *plan = NULL;
        ps_err err = {0};
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_EPLAN);
        PS_CHECK(plan == NULL && strstr(err.message, rows[i].why) != NULL);
        PS_CHECK(strcmp(err.field, f.model->units[unit].name) == 0 && err.extra[0] != 0);
        close_fixture(&f);
    }
    ps_test_case("%s", "");
}

/* Both sides work on one unit between the copy of its input and the one join. */
PS_TEST(a_split_pass_works_on_both_sides_at_once)
{
    fixture f;
    if (!open_fixture(&f, "qwen2.q8_0.gguf", true)) return;
    apply_pattern(&f, 1);
    uint32_t ffn = (uint32_t)f.model->layers[0].ffn;
    for (uint32_t t = 0; t < 3; t++) split_at(&f, ffn, t, 0.5f, 0.0f);
    ps_plan *plan = NULL;
    ps_ticks *t = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    PS_CHECK_STATUS(
        ps_lower(plan, &(ps_pass_shape){.tier = 0, .n_tok = 1, .n_out = 1, .max_kv = 64}, &t, &err),
        PS_OK);
    uint32_t n_on[PS_STREAM_COUNT] = {0}, n_joins = 0, n_waits = 0;
    for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        if (k->kind == PS_TICK_FLAG_WAIT) n_waits++;
        if (k->unit < 0 || ps_plan_whole(plan, k->unit) != (int32_t)ffn) continue;
        if (k->kind <= PS_TICK_RUN) n_on[k->stream]++;
        n_joins += k->kind == PS_TICK_RUN && k->op == PS_OP_ADD;
    }
    /* norm, move, three of the block, add; no copy, so that the buses are the weights' */
    PS_CHECK(n_on[PS_STREAM_CPU] == 3 && n_on[PS_STREAM_COMPUTE] == 6 && n_joins == 1);
    PS_CHECK(n_on[PS_STREAM_D2H] == 0 && n_on[PS_STREAM_H2D] == 0 && n_waits == 2);
    ps_ticks_destroy(t);
    ps_plan_destroy(plan);
    close_fixture(&f);
}

PS_TEST(budget_is_exact)
{
    fixture f;
    if (!open_fixture(&f, "llama3-rope.q8_0.gguf", true)) return;
    static const int patterns[] = {0, 1, 2, 3, 5, FIRST_SPLIT + 1, FIRST_SPLIT + 2};
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        int pattern = patterns[i];
        ps_plan *plan = NULL;
        ps_err err = {0};
        apply_pattern(&f, pattern);
        f.spec.budget_bytes = UINT64_MAX;
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
        if (plan == NULL) break;
        uint64_t needed = plan->needed_bytes, sum = 0;
        for (int k = 0; k < PS_MEM_KIND_COUNT; k++) sum += plan->bytes_by_kind[k];
        PS_CHECK(sum == needed && needed > 0);
        ps_plan_destroy(plan);
        f.spec.budget_bytes = needed;
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
        ps_plan_destroy(plan);
        f.spec.budget_bytes = needed - 1;
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_EBUDGET);
        PS_CHECK(err.needed == needed && err.budget == needed - 1);
    }
    close_fixture(&f);
}

/* Newest pages, one more than kv_vram_tok fills, of each sequence; and stages for one sequence. */
PS_TEST(windows_take_their_pages_and_no_more)
{
    fixture f;
    if (!open_fixture(&f, "llama.q4_k_m.gguf", true)) return;
    static const struct {
        uint32_t vram_tok, n_pages; /* of 4 */
        ps_side far;
    } rows[] = {{0, 0, PS_SIDE_DEV}, {0, 1, PS_SIDE_HOST}, {1, 2, PS_SIDE_DEV},
        {64, 2, PS_SIDE_HOST}, {65, 3, PS_SIDE_DEV}, {128, 3, PS_SIDE_DEV}, {129, 4, PS_SIDE_HOST},
        {255, 4, PS_SIDE_DEV}, {1 << 30, 4, PS_SIDE_DEV}};
    apply_pattern(&f, 1);
    const ps_hparams *hp = &f.model->hp;
    uint64_t page =
        2ull * PS_KV_PAGE_TOK * hp->n_kv_head * hp->head_dim * 2; /* K and V in 16 bits */
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint32_t vram_tok[64], n = rows[i].n_pages;
        for (int j = 0; j < 64; j++) vram_tok[j] = rows[i].vram_tok;
        f.spec.kv_vram_tok = vram_tok;
        f.spec.kv_far_side = rows[i].far;
        ps_plan *plan = NULL;
        ps_err err = {0};
        ps_test_case("%u tokens", rows[i].vram_tok);
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
        if (plan == NULL) break;
        uint64_t near = page * n * f.spec.n_seq * hp->n_layer,
                 all = page * 4 * f.spec.n_seq * hp->n_layer, stages = PS_KV_STAGES * page * 4;
        PS_CHECK(plan->space_bytes[PS_SPACE_DEV_KV] == near + (n < 4 ? stages : 0));
        PS_CHECK(plan->space_bytes[PS_SPACE_HOST_KV] == (n < 4 ? all : 0));
        PS_CHECK(plan->uses[PS_SIDE_HOST] == (rows[i].far == PS_SIDE_HOST && n < 4));
        ps_plan_destroy(plan);
    }
    ps_test_case("%s", "");
    close_fixture(&f);
}

/* One token behind a long history: layers that look back no further than their window never touch
 * host memory but to save; the others attend twice and merge. */
PS_TEST(sliding_windows_within_a_window_stay_in_vram)
{
    fixture f;
    if (!open_fixture(&f, "gemma3.q4_0.gguf", true)) return;
    uint32_t vram_tok[64], n_far = 0, n_merges = 0, n_global = 0;
    for (int j = 0; j < 64; j++) vram_tok[j] = 64;
    apply_pattern(&f, 1);
    f.spec.kv_vram_tok = vram_tok;
    ps_plan *plan = NULL;
    ps_ticks *t = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    if (plan != NULL) {
        ps_pass_shape shape = {
            .n_tok = 1, .n_out = 1, .max_kv = 256, .far = ps_pass_far(plan, 1, 250)};
        PS_CHECK(plan->n_windows == 2 && ps_pass_far(plan, 1, 128) == 0);
        PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
    }
    for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        if (k->kind != PS_TICK_RUN) continue;
        n_merges += k->op == PS_OP_ATTN_MERGE;
        if (k->op != PS_OP_ATTN) continue;
        ps_attn_args a;
        memcpy(&a, t->args + k->index, sizeof a);
        bool far = ps_ref_space(a.kv.k) == PS_SPACE_HOST_KV_DEV,
             global = f.model->layers[f.model->units[k->unit].layer].window == 0;
        PS_CHECK(!far || global);
        n_far += far;
        n_global += global && !far;
        if (far) /* 256 tokens less a whole page that surely is in VRAM */
            PS_CHECK(ps_tick_cost(t, i).bus_bytes > 0 &&
                     ps_tick_cost(t, i).bus_bytes < 3 * ps_op_cost(PS_OP_ATTN, &a).bytes / 4 + 1);
    }
    PS_CHECK(n_far > 0 && n_far == n_merges && n_far == n_global);
    ps_ticks_destroy(t);
    ps_plan_destroy(plan);
    close_fixture(&f);
}

/* What a token's layer hands to the CPU and gets back; the GPU attends to its own meanwhile. */
PS_TEST(far_keys_are_attended_on_the_cpu)
{
    fixture f;
    if (!open_fixture(&f, "llama.q4_k_m.gguf", true)) return;
    uint32_t vram_tok[64], n_on[PS_SIDE_COUNT] = {0}, order = 0, n_whole = 0;
    for (int j = 0; j < 64; j++) vram_tok[j] = 64;
    apply_pattern(&f, 1);
    f.spec.kv_vram_tok = vram_tok;
    f.spec.kv_far_side = PS_SIDE_HOST;
    ps_plan *plan = NULL;
    ps_ticks *t = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    ps_pass_shape shape = {.n_tok = 1, .n_out = 1, .max_kv = 256, .far = UINT32_MAX};
    if (plan != NULL) PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
    for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        if (k->kind != PS_TICK_RUN) continue;
        ps_cost cost = ps_tick_cost(t, i);
        if (k->op == PS_OP_ATTN && k->stream == PS_STREAM_CPU) {
            ps_attn_args a;
            memcpy(&a, t->args + k->index, sizeof a);
            ps_cost all = ps_op_cost(PS_OP_ATTN, &a);
            PS_CHECK(ps_ref_space(a.kv.k) == PS_SPACE_HOST_KV && a.sinks.a == 0);
            /* 256 tokens less a whole page that surely is in VRAM */
            PS_CHECK(cost.bytes > 0 && cost.bytes == 3 * all.bytes / 4 && cost.bus_bytes == 0);
            PS_CHECK(cost.flops == 3 * all.flops / 4);
            n_on[PS_SIDE_HOST]++;
            order = order % 3 == 0 ? order + 1 : 100;
        } else if (k->op == PS_OP_ATTN) {
            PS_CHECK(cost.bus_bytes == 0);
            n_on[PS_SIDE_DEV]++;
            order = order % 3 == 1 ? order + 1 : 100;
        } else if (k->op == PS_OP_ATTN_MERGE) { /* of one token: out, and (max, sum) of each head */
            uint64_t n = (uint64_t)f.model->hp.n_head * (f.model->hp.head_dim + 2);
            PS_CHECK(cost.bus_bytes == n * sizeof(float));
            order = order % 3 == 2 ? order + 1 : 100;
        }
    }
    PS_CHECK(n_on[0] == f.model->hp.n_layer && n_on[1] == n_on[0] && order == 3 * n_on[0]);
    ps_ticks_destroy(t);
    t = NULL;
    shape.far = 0; /* while all keys are in windows, nobody asks the CPU */
    if (plan != NULL) PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
    for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++)
        n_whole += t->tick[i].kind == PS_TICK_RUN && t->tick[i].stream == PS_STREAM_CPU;
    PS_CHECK(t != NULL && n_whole == 0);
    ps_ticks_destroy(t);
    ps_plan_destroy(plan);
    close_fixture(&f);
}

PS_TEST(tick_text_names_what_moves)
{
    fixture f;
    if (!open_fixture(&f, "llama.q4_k_m.gguf", true)) return;
    apply_pattern(&f, 1);
    place(&f, (uint32_t)f.model->layers[1].ffn, PS_PLACE_CPU);
    ps_plan *plan = NULL;
    ps_ticks *t = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    PS_CHECK_STATUS(
        ps_lower(plan, &(ps_pass_shape){.tier = 0, .n_tok = 1, .n_out = 1, .max_kv = 64}, &t, &err),
        PS_OK);
    char text[16384];
    uint64_t n = t != NULL ? ps_ticks_print(t, text, sizeof text) : 0;
    PS_CHECK(n > 200 && n < sizeof text && strlen(text) == n);
    PS_CHECK(strstr(text, "copy_out") != NULL && strstr(text, "flag_wait") != NULL &&
             strstr(text, "[blk.1.ffn]") != NULL);
    PS_CHECK(ps_ticks_print(t, NULL, 0) == n);
    if (getenv("PIPESHARD_TEST_PRINT") != NULL) puts(text);
    ps_ticks_destroy(t);
    ps_plan_destroy(plan);
    close_fixture(&f);
}

/* Hidden states that the CPU looked up: copies for a prompt, a kernel for a token. */
PS_TEST(looked_up_tokens_reach_the_gpu)
{
    fixture f;
    if (!open_fixture(&f, "llama.q4_k_m.gguf", true)) return;
    apply_pattern(&f, 1);
    place(&f, (uint32_t)f.model->embed, PS_PLACE_CPU);
    f.spec.chunk_tok = 24;
    ps_plan *plan = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    for (uint32_t n_tok = 1; plan != NULL && n_tok <= 48; n_tok += 47) {
        ps_ticks *t = NULL;
        ps_pass_shape shape = {.tier = ps_plan_tier(plan, n_tok), .n_tok = n_tok, .max_kv = 64};
        PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
        uint32_t n_copies = 0, n_moves = 0;
        for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++) {
            const ps_tick *k = &t->tick[i];
            n_copies += k->kind == PS_TICK_COPY_IN && ps_ref_space(k->dst) == PS_SPACE_DEV_ACT;
            n_moves += k->kind == PS_TICK_RUN && k->op == PS_OP_MOVE;
        }
        PS_CHECK(n_copies == (n_tok > 1 ? 2 : 0) && n_moves == (n_tok > 1 ? 0 : 1));
        ps_ticks_destroy(t);
    }
    ps_plan_destroy(plan);
    close_fixture(&f);
}

/* How experts reach the GPU in a pass. */
typedef struct expert_traffic {
    uint64_t copied;         /* before routing is known */
    uint64_t gathered, read; /* over the bus: by gathers, by the ops on experts */
    uint64_t of_moe;         /* all bytes of the ops on experts, on the GPU */
    uint32_t n_gathers;
    double gather_odds; /* that the last of them reads anything */
    bool cpu_first;     /* every layer's ops on the CPU are issued before its gather */
} expert_traffic;

static expert_traffic traffic_of(const ps_plan *plan, uint32_t tier, uint32_t n)
{
    ps_ticks *t = NULL;
    ps_err err = {0};
    expert_traffic x = {.cpu_first = true};
    int32_t gathered = -1; /* unit of the last gather */
    ps_pass_shape shape = {.tier = tier, .n_tok = n, .n_out = 1, .max_kv = 64};
    PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
    if (t != NULL) PS_CHECK_STATUS(ps_ticks_check(t, &err), PS_OK);
    for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        double odds = 0;
        ps_cost cost = ps_tick_cost_odds(t, i, &odds);
        bool expert = k->unit >= 0 && plan->model->units[k->unit].kind == PS_UNIT_EXPERT;
        if (k->kind == PS_TICK_COPY_IN && expert) x.copied += k->n_bytes;
        if (k->kind != PS_TICK_RUN) continue;
        if (k->op == PS_OP_GATHER_EXPERTS) {
            x.gathered += cost.bus_bytes;
            x.n_gathers++;
            x.gather_odds = odds;
            gathered = k->unit;
        } else if (k->op == PS_OP_MOE_UP || k->op == PS_OP_MOE_DOWN) {
            if (k->stream == PS_STREAM_CPU) {
                x.cpu_first = x.cpu_first && gathered != k->unit;
            } else {
                x.read += cost.bus_bytes;
                x.of_moe += cost.bytes;
            }
        }
    }
    ps_ticks_destroy(t);
    return x;
}

/* Copied whole, gathered, or read by the kernels that use them: which, depends on the tokens of a
 * pass and on the ring. */
PS_TEST(few_tokens_move_only_routed_experts)
{
    fixture f;
    if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
    apply_pattern(&f, FIRST_STREAMED);
    f.spec.kv_vram_tok = NULL;
    const ps_hparams *hp = &f.model->hp;
    uint32_t most = hp->n_expert / hp->n_expert_used / 2;
    uint64_t image = 0, routed = 0; /* largest of an expert; of a token's experts in all layers */
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        uint64_t n_bytes = f.model->units[f.model->layers[i].first_expert].n_bytes;
        PS_CHECK(n_bytes % PS_WEIGHT_ALIGN == 0);
        routed += hp->n_expert_used * n_bytes;
        image = ps_max_u64(image, n_bytes);
    }
    for (int roomy = 0; roomy < 2; roomy++) {
        /* Half the ring holds an expert; all of it, an image for each one that a token uses, or
         * just not. */
        f.spec.n_slots = 2;
        uint64_t half = ps_div_up_u64(hp->n_expert_used * image, 2 * PS_ARENA_ALIGN);
        f.spec.slot_bytes = (roomy ? half : half - 1) * PS_ARENA_ALIGN;
        ps_plan *plan = NULL;
        ps_err err = {0};
        PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
        if (plan == NULL) continue;
        ps_test_case("%s ring", roomy ? "roomy" : "tight");
        for (uint32_t n = 1; n <= most; n++) {
            expert_traffic x = traffic_of(plan, n > 1, n);
            bool gathers = roomy && n == 1;
            PS_CHECK(x.copied == 0 && (x.n_gathers == hp->n_layer) == gathers);
            PS_CHECK(gathers ? x.gathered == routed && x.read == 0 && x.of_moe > 0
                             : x.gathered < routed && x.read > 0 && x.read <= x.of_moe);
        }
        expert_traffic x = traffic_of(plan, 1, most + 1);
        PS_CHECK(x.copied > 0 && x.gathered == 0 && x.read == 0 && x.n_gathers == 0);
        ps_plan_destroy(plan);
    }
    ps_test_case("%s", "");
    close_fixture(&f);
}

/* Only streamed experts come over the bus, those of the CPU start before, and a layer without
 * streamed ones gathers nothing. */
PS_TEST(gathers_leave_out_what_is_elsewhere)
{
    fixture f;
    if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
    apply_pattern(&f, FIRST_STREAMED);
    f.spec.kv_vram_tok = NULL;
    const ps_hparams *hp = &f.model->hp;
    uint64_t n_bytes = 0; /* of all streamed experts */
    for (uint32_t u = 0; u < f.model->n_units; u++) {
        const ps_unit *x = &f.model->units[u];
        if (x->kind != PS_UNIT_EXPERT) continue;
        if (x->layer > 0 && (x->expert % 4 == 0 || x->expert % 4 == 3)) n_bytes += x->n_bytes;
        place(&f, u,
            x->layer == 0        ? PS_PLACE_VRAM
            : x->expert % 4 == 1 ? PS_PLACE_CPU
            : x->expert % 4 == 2 ? PS_PLACE_VRAM
                                 : PS_PLACE_STREAM);
    }
    ps_plan *plan = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    if (plan != NULL) {
        expert_traffic x = traffic_of(plan, 0, 1);
        PS_CHECK(x.n_gathers == hp->n_layer - 1 && x.copied == 0 && x.read == 0 && x.cpu_first);
        PS_CHECK(x.gathered == n_bytes * hp->n_expert_used / hp->n_expert); /* on average */
        /* Three routed ones of eight, four of them near: in 4 of 56 cases all three. */
        PS_CHECK(hp->n_expert_used == 3 && fabs(x.gather_odds - 52.0 / 56) < 1e-9);
    }
    ps_plan_destroy(plan);
    close_fixture(&f);
}

/* Gathers of a pass of one token, by side, and bytes of MOE_UP there. */
typedef struct division {
    uint32_t n_gathers[PS_SIDE_COUNT];
    uint64_t up_bytes[PS_SIDE_COUNT], bus_bytes;
    double bus_odds;   /* of the last gather on the GPU */
    bool tables_agree; /* what MOE_COMBINE goes by is what the router's side gathered */
} division;

static division division_of(const ps_plan *plan, uint32_t tier, const bool *mapped)
{
    ps_ticks *t = NULL;
    ps_err err = {0};
    division d = {.tables_agree = true};
    ps_pass_shape shape = {.tier = tier, .n_tok = 1, .n_out = 1, .max_kv = 64, .mapped = mapped};
    ps_dptr down[PS_SIDE_COUNT] = {{0}};
    PS_CHECK_STATUS(ps_lower(plan, &shape, &t, &err), PS_OK);
    if (t != NULL) PS_CHECK_STATUS(ps_ticks_check(t, &err), PS_OK);
    for (uint32_t i = 0; t != NULL && i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        if (k->kind != PS_TICK_RUN) continue;
        ps_side side = k->stream == PS_STREAM_CPU ? PS_SIDE_HOST : PS_SIDE_DEV;
        ps_op_args a;
        memcpy(&a, t->args + k->index, ps_op_args_bytes((ps_op_kind)k->op));
        if (k->op == PS_OP_GATHER_EXPERTS) {
            d.n_gathers[side]++;
            down[side] = a.gather_experts.down_ptrs;
            double odds = 0;
            d.bus_bytes += ps_tick_cost_odds(t, i, &odds).bus_bytes;
            if (side == PS_SIDE_DEV) d.bus_odds = odds;
        } else if (k->op == PS_OP_MOE_UP) {
            d.up_bytes[side] += ps_tick_cost(t, i).bytes;
        } else if (k->op == PS_OP_MOE_COMBINE) {
            d.tables_agree = d.tables_agree && a.moe_combine.down_ptrs.a == down[side].a;
        }
    }
    ps_ticks_destroy(t);
    return d;
}

/* Placed one by one, evenly; but where a pass gathers, both sides take their share of what is
 * routed, if the GPU can read all of it. */
PS_TEST(bus_and_cpu_divide_what_is_routed)
{
    fixture f;
    if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
    apply_pattern(&f, FIRST_STREAMED);
    f.spec.kv_vram_tok = NULL;
    const ps_hparams *hp = &f.model->hp;
    uint32_t n_units = f.model->n_units, n_near = hp->n_expert / 4;
    uint64_t image = 0;
    for (uint32_t u = 0; u < n_units; u++) {
        const ps_unit *x = &f.model->units[u];
        place(&f, u, PS_PLACE_VRAM);
        if (x->kind != PS_UNIT_EXPERT || x->expert < (int32_t)n_near) continue;
        split_at(&f, u, 0, 0, 0.4f);
        split_at(&f, u, 1, 0, 0.01f); /* of six, none */
        split_at(&f, u, 2, 0, 1.0f);
        image += x->n_bytes;
    }
    image = image / hp->n_layer / (hp->n_expert - n_near);
    ps_plan *plan = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_plan_create(f.model, &f.spec, &plan, &err), PS_OK);
    if (plan == NULL) return;
    PS_CHECK(plan->cut == NULL && hp->n_expert == 8);
    for (uint32_t i = 0; i < hp->n_layer; i++)
        for (uint32_t e = n_near; e < hp->n_expert; e++) {
            uint32_t u = (uint32_t)f.model->layers[i].first_expert + e;
            PS_CHECK("cvs"[ps_plan_place(plan, 0, u).kind] == "vvcsccsc"[e]);
            PS_CHECK(ps_plan_share(plan, 0, u) == 26214);
            PS_CHECK(ps_plan_place(plan, 1, u).kind == PS_PLACE_CPU);
            PS_CHECK(ps_plan_place(plan, 2, u).kind == PS_PLACE_STREAM);
            PS_CHECK(ps_plan_share(plan, 1, u) == 0 && ps_plan_share(plan, 2, u) == 0);
        }
    division d = division_of(plan, 0, NULL);
    PS_CHECK(d.n_gathers[PS_SIDE_DEV] == hp->n_layer && d.n_gathers[PS_SIDE_HOST] == hp->n_layer);
    PS_CHECK(d.tables_agree);
    /* Of three routed ones, 1, 2 or 3 are of those six, in 6, 30 and 20 of 56 cases: of one, the
     * bus gets none. */
    double mean = 50.0 / 56, want = mean * hp->n_layer * (double)image;
    PS_CHECK(fabs((double)d.bus_bytes - want) < 1e-3 * want);
    PS_CHECK(fabs(d.bus_odds - mean) < 1e-9); /* never more than one */
    /* What the CPU has of all routed ones: six of eight, but for those. */
    double up = (double)(d.up_bytes[0] + d.up_bytes[1]);
    PS_CHECK(fabs((double)d.up_bytes[PS_SIDE_HOST] / up - (2.25 - mean) / 3) < 1e-3);
    bool *mapped = ps_alloc(n_units, sizeof *mapped);
    for (uint32_t u = 0; mapped != NULL && u < n_units; u++)
        mapped[u] = u != (uint32_t)f.model->layers[0].first_expert + 2; /* one of the CPU's */
    division other = division_of(plan, 0, mapped);
    PS_CHECK(other.n_gathers[PS_SIDE_HOST] == hp->n_layer - 1);
    PS_CHECK(other.n_gathers[PS_SIDE_DEV] == hp->n_layer);
    PS_CHECK(division_of(plan, 2, NULL).n_gathers[PS_SIDE_HOST] == 0);
    ps_free(mapped);
    ps_plan_destroy(plan);
    close_fixture(&f);
}

static ps_status plan_once(void *ctx, ps_err *err)
{
    fixture *f = ctx;
    ps_plan *plan = NULL;
    ps_ticks *t = NULL;
    ps_status status = ps_plan_create(f->model, &f->spec, &plan, err);
    if (status == PS_OK)
        status = ps_lower(
            plan, &(ps_pass_shape){.tier = 1, .n_tok = 40, .n_out = 6, .max_kv = 64}, &t, err);
    if (status == PS_OK) status = ps_ticks_check(t, err);
    ps_ticks_destroy(t);
    ps_plan_destroy(plan);
    return status;
}

PS_TEST(oom_plan)
{
    fixture f;
    if (!open_fixture(&f, "qwen3moe.q4_k_m.gguf", true)) return;
    apply_pattern(&f, 3);
    ps_test_oom_sweep(plan_once, &f);
    apply_pattern(&f, FIRST_SPLIT);
    ps_test_oom_sweep(plan_once, &f);
    close_fixture(&f);
}

PS_TEST_MAIN
