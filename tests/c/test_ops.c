/* test_ops - every op on every CPU variant that this machine runs: the reference against the
 * formulas in double, each variant against the reference within the case's tolerance with guards
 * around every operand, and the promises of ps_ops.h about bits: they depend neither on threads nor
 * on which other rows or tokens are in the call.
 *
 * With --perf [words]: no checks, but GB/s and GFLOP/s of calls of real models' shapes whose line
 * contains every word.
 */
#include "ops_eval.h"
#include "ops_cases.h"
#include "ops_perf.h"

#include "kernels/ps_cpu.h"

/* ---- what is known without running ---- */

PS_TEST(names_and_sizes)
{
    for (int i = 0; i < PS_OP_COUNT; i++) {
        PS_CHECK(ps_op_name((ps_op_kind)i) != NULL);
        PS_CHECK(ps_op_args_bytes((ps_op_kind)i) > 0);
        PS_CHECK(ps_op_args_bytes((ps_op_kind)i) <= sizeof(ps_op_args));
    }
    bool supported = false;
    const ps_op_table *table = NULL;
    for (uint32_t v = 0; (table = ps_cpu_ops_at(v, &supported)) != NULL; v++) {
        for (int i = 0; i < PS_OP_COUNT; i++) PS_CHECK(table->op[i] != NULL);
        PS_CHECK(ps_cpu_ops(table->name) == (supported ? table : NULL));
    }
    PS_CHECK(ps_cpu_ops("no such variant") == NULL);
    PS_CHECK(ps_cpu_ops(NULL) != NULL);
}

/* Every operand of every case: as long as the buffer that the case made for it, once, and null
 * where absent. */
PS_TEST(operands_are_exact)
{
    for (uint32_t g = 0; g < OPS_N_GROUPS; g++) {
        ops_call c;
        for (uint32_t i = 0; ops_groups[g].at(i, &c); i++) {
            ps_test_case("%s", c.name);
            ops_bind_host(&c);
            ps_operand ops[PS_MAX_OPERANDS];
            const uint32_t n = ps_op_operands(c.kind, &c.args, ops);
            uint32_t n_found = 0;
            for (uint32_t k = 0; k < n; k++) {
                const ops_buf *b = ops_find(&c, ops[k].offset);
                if (b == NULL) continue;
                n_found++;
                /* Gate and up side by side share one buffer. */
                const bool shared = c.n_aliases > 0 && c.alias[0].offset_bytes > 0;
                PS_CHECK(shared ? ops[k].n_bytes <= b->n_bytes : ops[k].n_bytes == b->n_bytes);
                PS_CHECK_EQ((ops[k].access & PS_WRITE) != 0, b->is_out);
            }
            for (uint32_t b = 0; b < c.n_bufs; b++) n_found -= c.buf[b].field != OPS_NO_FIELD;
            PS_CHECK_EQ(n_found, 0);
            PS_CHECK(ps_op_cost(c.kind, &c.args).bytes > 0);
            PS_CHECK_STATUS(ps_op_check(c.kind, &c.args, NULL), PS_OK);
            ops_call_fini(&c);
        }
    }
}

PS_TEST(cost_of_matmul)
{
    ps_matmul_args a = {.n_tok = 3, .n_cols = 32, .ldx = 40, .n_parts = 1, .add = 1};
    a.part[0] = (ps_matmul_part){.fmt = PS_FMT_Q4_0, .n_rows = 5, .ldy = 7};
    const ps_cost cost = ps_op_cost(PS_OP_MATMUL, &a);
    PS_CHECK_EQ_U64(cost.flops, 2 * 3 * 32 * 5);
    PS_CHECK_EQ_U64(cost.bytes, 3 * 32 * 4 + 5 * 18 + 2 * 3 * 5 * 4);
    PS_CHECK_EQ(cost.op, PS_OP_MATMUL);
}

/* Counted one by one: keys that token i of a run sees, and those that any of them sees. */
PS_TEST(cost_of_attention_is_causal)
{
    const uint32_t row = 2 * 3 * 2 * 8, n = 6 * 8; /* bytes of a position; query floats a token */
    for (uint32_t window = 0; window <= 40; window += 5)
        for (uint32_t n_tok = 2; n_tok <= 20; n_tok++)
            for (uint32_t n_after = 0; n_after <= 12; n_after += 3)
                for (uint32_t max_kv = n_tok + n_after; max_kv <= 60; max_kv += 7) {
                    const ps_attn_args a = {
                        .kv = {.fmt = PS_FMT_F16, .n_kv_head = 3, .head_dim = 8, .n_seq = 1},
                        .n_tok = n_tok,
                        .n_head = 6,
                        .max_kv = max_kv,
                        .n_after = n_after,
                        .window = window};
                    uint64_t pairs = 0;
                    uint32_t end = max_kv - n_after, lowest = end;
                    for (uint32_t pos = end - n_tok; pos < end; pos++) {
                        uint32_t from = window > 0 && pos + 1 > window ? pos + 1 - window : 0;
                        pairs += pos + 1 - from;
                        lowest = from < lowest ? from : lowest;
                    }
                    ps_test_case("%u of %u, %u after, window %u", n_tok, max_kv, n_after, window);
                    const ps_cost cost = ps_op_cost(PS_OP_ATTN, &a);
                    PS_CHECK_EQ_U64(cost.flops, 4 * pairs * n);
                    PS_CHECK_EQ_U64(cost.bytes, (uint64_t)(end - lowest) * row + 8 * n_tok * n);
                }
    /* Tokens of as many sequences each have a cache of their own. */
    const ps_attn_args apart = {
        .kv = {.fmt = PS_FMT_F16, .n_kv_head = 3, .head_dim = 8, .n_seq = 4},
        .n_tok = 4,
        .n_head = 6,
        .max_kv = 100};
    PS_CHECK_EQ_U64(ps_op_cost(PS_OP_ATTN, &apart).flops, 4 * 4 * 100 * n);
    PS_CHECK_EQ_U64(ps_op_cost(PS_OP_ATTN, &apart).bytes, 4 * 100 * row + 8 * 4 * n);
}

PS_TEST(bad_arguments_are_refused)
{
    ps_err err = {0};
    ps_matmul_args a = {.x = {64}, .n_tok = 1, .n_cols = 33, .ldx = 33, .n_parts = 1};
    a.part[0] = (ps_matmul_part){.w = {64}, .y = {64}, .fmt = PS_FMT_Q4_0, .n_rows = 1, .ldy = 1};
    PS_CHECK_STATUS(ps_op_check(PS_OP_MATMUL, &a, &err), PS_EINTERNAL);
    PS_CHECK(strstr(err.message, "matmul") != NULL);
    /* All zero, or with too little scratch: refused by every launcher, not run into. */
    const ps_op_args zero = {0};
    bool supported = false;
    const ps_op_table *table = NULL;
    for (uint32_t v = 0; (table = ps_cpu_ops_at(v, &supported)) != NULL; v++) {
        for (int i = 0; supported && i < PS_OP_COUNT; i++) {
            ps_test_case("%s %s", table->name, ps_op_name((ps_op_kind)i));
            PS_CHECK_STATUS(table->op[i](&(ps_launch){0}, &zero), PS_EINTERNAL);
        }
        ops_call c;
        for (uint32_t i = 0; supported && ops_matmul_at(i, &c); i += 9) {
            ops_bind_host(&c);
            PS_CHECK_STATUS(table->op[PS_OP_MATMUL](&(ps_launch){0}, &c.args), PS_EINTERNAL);
            ops_call_fini(&c);
        }
    }
}

/* ---- right answers ---- */

PS_TEST(reference_against_formulas)
{
    for (uint32_t g = 0; g < OPS_N_GROUPS; g++) {
        ops_call c;
        for (uint32_t i = 0; ops_groups[g].at(i, &c); i += ps_test_step(11)) {
            ps_test_case("%s", c.name);
            ops_eval(&c);
            ops_result want = ops_keep(&c);
            PS_CHECK_STATUS(ops_run_ref(&c), PS_OK);
            ops_check_result(&c, &want, 1e-13, "ref"); /* one rounding to float at the end */
            ops_result_fini(&want);
            ops_call_fini(&c);
        }
    }
}

enum { MAX_RIGS = 16 };

/* Every variant with one and with two threads; on the emulator, whose addresses are tagged, the
 * best one. */
static int open_rigs(ops_rig rigs[MAX_RIGS])
{
    int n = 0;
    ps_err err = {0};
    bool supported = false;
    const ps_op_table *table = NULL;
    for (uint32_t v = 0; (table = ps_cpu_ops_at(v, &supported)) != NULL; v++)
        for (int threads = 1; supported && threads <= 3 && n < MAX_RIGS; threads++) {
            if (ops_rig_open(&rigs[n], "host", table->name, threads, &err) != PS_OK)
                ps_test_fail(__FILE__, __LINE__, "host: %s", err.message);
            else
                n++;
        }
    if (n < MAX_RIGS && ps_test_device("emu")) {
        if (ops_rig_open(&rigs[n], "emu", ps_cpu_ops(NULL)->name, 2, &err) != PS_OK)
            ps_test_fail(__FILE__, __LINE__, "emu: %s", err.message);
        else
            n++;
    }
    return n;
}

static void run_group(const char *name)
{
    ops_rig rigs[MAX_RIGS];
    const int n_rigs = open_rigs(rigs);
    uint32_t g = 0;
    while (strcmp(ops_groups[g].name, name) != 0) g++;
    ops_call c;
    for (uint32_t i = 0; ops_groups[g].at(i, &c); i += ps_test_step(11)) {
        ps_test_case("%s", c.name);
        PS_CHECK_STATUS(ops_run_ref(&c), PS_OK);
        ops_result want = ops_keep(&c), single = {0};
        for (int r = 0; r < n_rigs; r++) {
            ps_test_case("%s on %s", c.name, rigs[r].name);
            ps_err err = {0};
            PS_CHECK_STATUS(ops_run(&rigs[r], &c, &err), PS_OK);
            ops_check_result(&c, &want, c.nmse_cpu > 0 ? c.nmse_cpu : c.nmse, rigs[r].name);
            if (r > 0 && rigs[r].table == rigs[r - 1].table) {
                ops_check_same_bits(&c, &single, "another number of threads, or the emulator");
            } else {
                ops_result_fini(&single);
                single = ops_keep(&c);
            }
        }
        ops_result_fini(&single);
        ops_result_fini(&want);
        ops_call_fini(&c);
    }
    for (int r = 0; r < n_rigs; r++) ops_rig_close(&rigs[r]);
}

PS_TEST(matmul)
{
    run_group("matmul");
}
PS_TEST(embed)
{
    run_group("embed");
}
PS_TEST(norm)
{
    run_group("norm");
}
PS_TEST(qkv_prep)
{
    run_group("qkv_prep");
}
PS_TEST(attn)
{
    run_group("attn");
}
PS_TEST(attn_merge)
{
    run_group("attn_merge");
}
PS_TEST(act)
{
    run_group("act");
}
PS_TEST(route)
{
    run_group("route");
}
PS_TEST(gather_experts)
{
    run_group("gather_experts");
}
/* A pass that is given up brings in nothing more; the tables stay good to read. */
PS_TEST(gathers_end_where_a_pass_is_given_up)
{
    const uint32_t given_up = 1;
    ops_call c;
    PS_REQUIRE(ops_gather_experts_at(0, &c));
    ops_bind_host(&c);
    const ps_launch launch = {.abort = &given_up};
    PS_CHECK_STATUS(ps_cpu_ops("ref")->op[c.kind](&launch, &c.args), PS_OK);
    const ops_buf *slots = ops_find(&c, offsetof(ps_gather_experts_args, slots));
    PS_CHECK(memcmp(slots->got, slots->host, slots->n_bytes) == 0);
    ops_name_host_ptrs(&c);
    ops_result want = ops_keep(&c);
    PS_CHECK_STATUS(ops_run_ref(&c), PS_OK);
    PS_CHECK(memcmp(slots->got, slots->host, slots->n_bytes) != 0);
    for (uint32_t i = 0; i < c.n_bufs; i++)
        if (c.buf[i].is_out && c.buf[i].content == OPS_PTRS)
            PS_CHECK(memcmp(c.buf[i].got, want.bytes[i], c.buf[i].n_bytes) == 0);
    ops_result_fini(&want);
    ops_call_fini(&c);
}
/* What the far side reads of a pass that is given up may be anything. */
PS_TEST(gathers_take_only_numbers_of_experts)
{
    for (int stay = 0; stay < 2; stay++) {
        ops_call c;
        uint32_t i = 0;
        do { /* of the cases with a share the first of this kind */
            PS_REQUIRE(ops_gather_experts_at(i++, &c));
            if (c.args.gather_experts.rest == (uint32_t)stay && c.args.gather_experts.share > 0)
                break;
            ops_call_fini(&c);
        } while (true);
        int32_t *ids = (int32_t *)(void *)ops_find(&c, offsetof(ps_gather_experts_args, ids))->host;
        ids[0] = -1;
        ids[1] = (int32_t)c.args.gather_experts.n_expert;
        ids[2] = INT32_MAX;
        PS_CHECK_STATUS(ops_run_ref(&c), PS_OK);
        uint32_t n = 0;
        const ops_buf *gate = ops_find(&c, offsetof(ps_gather_experts_args, gate_ptrs));
        for (uint64_t at = 0; at < gate->n_bytes; at += 8) {
            int64_t name;
            memcpy(&name, gate->got + at, 8);
            n += name >= 0;
        }
        PS_CHECK(n == (stay ? 3 : 2)); /* two of five, and three */
        ops_call_fini(&c);
    }
}
PS_TEST(moe_up)
{
    run_group("moe_up");
}
PS_TEST(moe_down)
{
    run_group("moe_down");
}
PS_TEST(moe_combine)
{
    run_group("moe_combine");
}
PS_TEST(small)
{
    run_group("small");
}

/* Which variants this CPU lacks is said, not passed over. */
PS_TEST(variants)
{
    bool supported = false;
    const ps_op_table *table = NULL;
    static char missing[128] = "this CPU lacks:";
    bool any = false;
    for (uint32_t v = 0; (table = ps_cpu_ops_at(v, &supported)) != NULL; v++) {
        if (supported) continue;
        strncat(missing, " ", sizeof missing - strlen(missing) - 1);
        strncat(missing, table->name, sizeof missing - strlen(missing) - 1);
        any = true;
    }
    if (any) PS_SKIP(missing);
}

/* ---- bits do not depend on what else is in the call ---- */

/* Two token counts of a call give the same bits for a token where they fall into the same class:
 * documented in ps_cpu.h. The reference has one class. */
static bool same_class(const ps_op_table *table, uint32_t n, uint32_t m)
{
    const bool one = strcmp(table->name, "ref") == 0;
    return one || (n <= PS_CPU_GEMV_MAX_TOK) == (m <= PS_CPU_GEMV_MAX_TOK);
}

/* Runs the part [row, row_end) x [tok, tok_end) of a bound one-part matmul. */
static ps_status launch_part(ops_rig *r, const ops_call *full, uint32_t row, uint32_t row_end,
    uint32_t tok, uint32_t tok_end, ps_err *err)
{
    ops_call c = *full;
    ps_matmul_args *a = &c.args.matmul;
    ps_matmul_part *p = &a->part[0];
    uint64_t row_bytes = 0;
    ps_fmt_row_bytes(p->fmt, a->n_cols, &row_bytes);
    a->x = ps_dptr_add(a->x, 4ull * tok * a->ldx);
    a->n_tok = tok_end - tok;
    p->w = ps_dptr_add(p->w, row * row_bytes);
    p->y = ps_dptr_add(p->y, 4ull * ((uint64_t)tok * p->ldy + row));
    if (!ps_dptr_is_null(p->bias)) p->bias = ps_dptr_add(p->bias, 4ull * row);
    p->n_rows = row_end - row;
    return ops_rig_launch(r, &c, err);
}

static void check_parts(ops_rig *r, ops_call *c)
{
    const ps_matmul_args *a = &c->args.matmul;
    const uint32_t n_rows = a->part[0].n_rows, n_tok = a->n_tok;
    const uint32_t rows[] = {0, 1, n_rows / 3 + 1, n_rows / 2 + 3, n_rows};
    const uint32_t third = n_tok < 3 ? 1 : n_tok / 3, most = n_tok < 3 ? 1 : n_tok / 2 + 1;
    const uint32_t toks[] = {0, 1, third, most, n_tok};
    ps_err err = {0};
    ops_bound m;
    PS_REQUIRE_OK(ops_run(r, c, &err), &err);
    ops_result want = ops_keep(c);
    for (int by_tok = 0; by_tok < 2; by_tok++) {
        PS_REQUIRE_OK(ops_rig_bind(r, c, &m, &err), &err);
        bool whole = true;
        for (int i = 0; i < 4; i++) {
            const uint32_t from = by_tok ? toks[i] : rows[i],
                           to = by_tok ? toks[i + 1] : rows[i + 1];
            if (from >= to) continue;
            if (by_tok && !same_class(r->table, to - from, n_tok)) {
                whole = false;
                continue;
            }
            if (by_tok)
                PS_REQUIRE_OK(launch_part(r, c, 0, n_rows, from, to, &err), &err);
            else
                PS_REQUIRE_OK(launch_part(r, c, from, to, 0, n_tok, &err), &err);
        }
        PS_REQUIRE_OK(ps_device_sync(r->device, r->stream, &err), &err);
        PS_REQUIRE_OK(ops_rig_collect(r, c, &m, &err), &err);
        if (whole) ops_check_same_bits(c, &want, by_tok ? "tokens apart" : "rows apart");
        ops_rig_unbind(r, &m);
    }
    ops_result_fini(&want);
}

PS_TEST(bits_of_rows_and_tokens)
{
    ops_rig rigs[MAX_RIGS];
    const int n_rigs = open_rigs(rigs);
    static const uint32_t n_tok[] = {1, 5, 8, 75, 200};
    for (uint32_t i = 0; i < OPS_N_FORMATS * 5; i += ps_test_step(11)) {
        const ps_fmt fmt = ops_formats[i / 5];
        const ops_matmul_case k = {.n_tok = n_tok[i % 5],
            .n_cols = ps_fmt_get(fmt)->block_elems == 1 ? 331 : 512,
            .n_parts = 1,
            .fmt = {fmt},
            .n_rows = {83},
            .bias = true,
            .add = i % 2,
            .rows = OPS_EXTREME};
        ops_call c;
        ops_make_matmul(&c, &k);
        for (int r = 0; r < n_rigs; r++) {
            ps_test_case("%s on %s", c.name, rigs[r].name);
            check_parts(&rigs[r], &c);
        }
        ops_call_fini(&c);
    }
    for (int r = 0; r < n_rigs; r++) ops_rig_close(&rigs[r]);
}

/* An expert's rows do not depend on which other experts are on this side. */
static void check_missing(ops_rig *r, ops_call *c, size_t table_field, size_t table2_field)
{
    ps_err err = {0};
    PS_REQUIRE_OK(ops_run(r, c, &err), &err);
    ops_result all = ops_keep(c);
    const int64_t none = -1;
    for (uint32_t e = 0; e < ops_find(c, table_field)->n_bytes / 8; e += 2) {
        memcpy(ops_find(c, table_field)->host + 8ull * e, &none, 8);
        if (table2_field != table_field)
            memcpy(ops_find(c, table2_field)->host + 8ull * e, &none, 8);
    }
    PS_REQUIRE_OK(ops_run(r, c, &err), &err);
    const bool up = c->kind == PS_OP_MOE_UP;
    const size_t out_at = up ? offsetof(ps_moe_up_args, out) : offsetof(ps_moe_down_args, y);
    const size_t ids_at = up ? offsetof(ps_moe_up_args, ids) : offsetof(ps_moe_down_args, ids);
    const ops_buf *out = ops_find(c, out_at);
    const int32_t *ids = (const int32_t *)ops_find(c, ids_at)->host;
    const uint8_t *want = all.bytes[out - c->buf];
    for (uint64_t i = 0; i < out->n_bytes / (4ull * out->row); i++) {
        const uint64_t at = i * out->row * 4;
        const uint8_t *expected = ids[i] % 2 == 0 ? out->host + at : want + at;
        PS_CHECK(memcmp(out->got + at, expected, out->row * 4ull) == 0);
    }
    ops_result_fini(&all);
}

PS_TEST(bits_of_experts)
{
    ops_rig rigs[MAX_RIGS];
    const int n_rigs = open_rigs(rigs);
    for (int r = 0; r < n_rigs; r++) {
        ops_call c;
        for (uint32_t i = 0; ops_moe_up_at(i, &c); i += ps_test_step(11)) {
            ps_test_case("%s on %s", c.name, rigs[r].name);
            check_missing(&rigs[r], &c, offsetof(ps_moe_up_args, gate_ptrs),
                offsetof(ps_moe_up_args, up_ptrs));
            ops_call_fini(&c);
        }
        for (uint32_t i = 0; ops_moe_down_at(i, &c); i += ps_test_step(11)) {
            ps_test_case("%s on %s", c.name, rigs[r].name);
            const size_t field = offsetof(ps_moe_down_args, down_ptrs);
            check_missing(&rigs[r], &c, field, field);
            ops_call_fini(&c);
        }
        ops_rig_close(&rigs[r]);
    }
}

/* Attention over two sides, merged, is attention over the whole; and a token's result does not
 * depend on the others. */
static void check_sides(ops_rig *r, ops_call *c)
{
    ps_err err = {0};
    const ps_attn_args *a = &c->args.attn;
    const uint64_t n_heads = (uint64_t)a->n_tok * a->n_head, d = a->kv.head_dim;
    const size_t table_at = offsetof(ps_attn_args, kv.table), out_at = offsetof(ps_attn_args, out);
    const size_t ml_at = offsetof(ps_attn_args, ml);
    PS_REQUIRE_OK(ops_run(r, c, &err), &err);
    ops_result whole = ops_keep(c);
    ops_buf *table = ops_find(c, table_at);
    int32_t *pages = (int32_t *)table->host, *all = ps_alloc(table->n_bytes, 1);
    PS_REQUIRE(all != NULL);
    memcpy(all, pages, table->n_bytes);

    ops_call merge;
    ops_begin(&merge, PS_OP_ATTN_MERGE, "of sides");
    uint64_t rng = 1;
    merge.args.attn_merge =
        (ps_attn_merge_args){.n_tok = a->n_tok, .n_head = a->n_head, .head_dim = a->kv.head_dim};
    float *part[2] = {ops_add_f32(&merge, offsetof(ps_attn_merge_args, a), n_heads * d),
        ops_add_f32(&merge, offsetof(ps_attn_merge_args, b), n_heads * d)};
    float *ml[2] = {ops_add_f32(&merge, offsetof(ps_attn_merge_args, ml_a), n_heads * 2),
        ops_add_f32(&merge, offsetof(ps_attn_merge_args, ml_b), n_heads * 2)};
    const uint32_t out =
        ops_add_out(&merge, offsetof(ps_attn_merge_args, out), n_heads, d, d, &rng);
    for (int side = 0; side < 2; side++) {
        for (uint64_t i = 0; i < table->n_bytes / 4; i++)
            pages[i] = (i % 3 == 0) == (side == 0) ? all[i] : -1;
        PS_REQUIRE_OK(ops_run(r, c, &err), &err);
        memcpy(part[side], ops_find(c, out_at)->got, n_heads * d * 4);
        memcpy(ml[side], ops_find(c, ml_at)->got, n_heads * 8);
    }
    PS_REQUIRE_OK(ops_run(r, &merge, &err), &err);
    ops_check_close((const float *)merge.buf[out].got,
        (const float *)whole.bytes[ops_find(c, out_at) - c->buf], n_heads * d, d, d, c->nmse,
        r->name);
    ops_call_fini(&merge);
    ops_result_fini(&whole);
    ps_free(all);
}

PS_TEST(attention_on_two_sides)
{
    ops_rig rigs[MAX_RIGS];
    const int n_rigs = open_rigs(rigs);
    for (int r = 0; r < n_rigs; r++) {
        ops_attn_case k;
        for (uint32_t i = 0; ops_attn_case_at(i, &k); i += ps_test_step(11)) {
            if (!k.ml || k.pad > 0 || k.sinks) continue; /* the sink belongs to one side only */
            ops_call c;
            ops_make_attn(&c, &k);
            ps_test_case("%s on %s", c.name, rigs[r].name);
            check_sides(&rigs[r], &c);
            ops_call_fini(&c);
        }
        ops_rig_close(&rigs[r]);
    }
}

PS_TEST(bits_of_attention_tokens)
{
    ops_rig rigs[MAX_RIGS];
    const int n_rigs = open_rigs(rigs);
    for (int r = 0; r < n_rigs; r++) {
        ops_attn_case k;
        for (uint32_t i = 0; ops_attn_case_at(i, &k); i += ps_test_step(11)) {
            ops_call c;
            ops_make_attn(&c, &k);
            ps_test_case("%s on %s", c.name, rigs[r].name);
            ps_err err = {0};
            ops_bound m;
            PS_REQUIRE_OK(ops_run(&rigs[r], &c, &err), &err);
            ops_result want = ops_keep(&c);
            PS_REQUIRE_OK(ops_rig_bind(&rigs[r], &c, &m, &err), &err);
            /* Cuts that leave the parts in the class of the whole. */
            const uint32_t n = k.n_tok, third = n > PS_CPU_GEMV_MAX_TOK ? n / 2 : n / 3;
            uint32_t cuts[] = {0, third, n > PS_CPU_GEMV_MAX_TOK ? third : n / 2 + 1, n};
            if (!same_class(rigs[r].table, third, n)) cuts[1] = cuts[2] = n;
            for (int j = 0; j < 3; j++) {
                ops_call part = c;
                ps_attn_args *a = &part.args.attn;
                if (cuts[j] >= cuts[j + 1]) continue;
                a->n_tok = cuts[j + 1] - cuts[j];
                a->q = ps_dptr_add(a->q, 4ull * cuts[j] * a->ldq);
                a->out = ps_dptr_add(a->out, 4ull * cuts[j] * a->ldo);
                if (!ps_dptr_is_null(a->ml)) a->ml = ps_dptr_add(a->ml, 8ull * cuts[j] * a->n_head);
                a->pos = ps_dptr_add(a->pos, 4ull * cuts[j]);
                a->seq = ps_dptr_add(a->seq, 4ull * cuts[j]);
                PS_REQUIRE_OK(ops_rig_launch(&rigs[r], &part, &err), &err);
            }
            PS_REQUIRE_OK(ps_device_sync(rigs[r].device, rigs[r].stream, &err), &err);
            PS_REQUIRE_OK(ops_rig_collect(&rigs[r], &c, &m, &err), &err);
            ops_check_same_bits(&c, &want, "tokens apart");
            ops_rig_unbind(&rigs[r], &m);
            ops_result_fini(&want);
            ops_call_fini(&c);
        }
        ops_rig_close(&rigs[r]);
    }
}

/* ---- main ---- */

static int perf_main(int n_words, char **words)
{
    for (int threads = 1; threads <= ps_cpu_count(); threads *= 2) {
        const double ceiling = ops_read_bytes_per_s(threads);
        printf("%d threads read memory at %.1f GB/s\n", threads, ceiling * 1e-9);
        bool supported = false;
        const ps_op_table *table = NULL;
        for (uint32_t v = 1; (table = ps_cpu_ops_at(v, &supported)) != NULL;
             v++) { /* not the reference */
            ops_rig rig;
            ps_err err = {0};
            if (!supported || ops_rig_open(&rig, "host", table->name, threads, &err) != PS_OK)
                continue;
            ops_perf_rig(&rig, ceiling, n_words, words);
            ops_rig_close(&rig);
        }
    }
    return 0;
}

int main(int n_args, char **args)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (n_args > 1 && strcmp(args[1], "--perf") == 0) return perf_main(n_args - 2, args + 2);
    return ps_test_main(n_args, args);
}
