/* test_cuda_ops - every op on the CUDA table: each case of ops_cases.h against the reference with
 * guards around every operand; the same bits again, in a graph, and whichever other tokens are in
 * the call; shapes of real models on rows that the reference can afford. Skipped where
 * PIPESHARD_TEST_DEVICES does not name cuda.
 *
 * With --perf [words]: no checks, but times and floors (cuda_perf.h).
 */
#include "ops_cases.h"
#include "cuda_perf.h"

static bool open_cuda(ops_rig *r)
{
    ps_err err = {0};
    if (!ps_test_device("cuda")) {
        ps_test_skipped = "PIPESHARD_TEST_DEVICES does not name cuda";
        return false;
    }
    if (ops_rig_open(r, "cuda", NULL, 1, &err) == PS_OK) return true;
    ps_test_fail(__FILE__, __LINE__, "cuda: %s", err.message);
    return false;
}

/* Runs `c` and compares with the reference, then once more and compares bits. */
static void check_call(ops_rig *r, ops_call *c)
{
    ps_err err = {0};
    ps_test_case("%s on %s", c->name, r->name);
    PS_CHECK_STATUS(ops_run_ref(c), PS_OK);
    ops_result want = ops_keep(c);
    PS_CHECK_STATUS(ops_run(r, c, &err), PS_OK);
    if (err.message[0] != 0) ps_test_fail(__FILE__, __LINE__, "%s", err.message);
    ops_check_result(c, &want, c->nmse, r->name);
    ops_result first = ops_keep(c);
    PS_CHECK_STATUS(ops_run(r, c, &err), PS_OK);
    ops_check_same_bits(c, &first, "the second run");
    ops_result_fini(&first);
    ops_result_fini(&want);
}

static void run_group(const char *name)
{
    ops_rig r;
    if (!open_cuda(&r)) return;
    uint32_t g = 0;
    while (strcmp(ops_groups[g].name, name) != 0) g++;
    ops_call c;
    for (uint32_t i = 0; ops_groups[g].at(i, &c); i++) {
        check_call(&r, &c);
        ops_call_fini(&c);
    }
    ops_rig_close(&r);
}

PS_TEST(embed)
{
    run_group("embed");
}
PS_TEST(norm)
{
    run_group("norm");
}
PS_TEST(act)
{
    run_group("act");
}
PS_TEST(small)
{
    run_group("small");
}
PS_TEST(attn_merge)
{
    run_group("attn_merge");
}
PS_TEST(moe_combine)
{
    run_group("moe_combine");
}
PS_TEST(route)
{
    run_group("route");
}
PS_TEST(qkv_prep)
{
    run_group("qkv_prep");
}
PS_TEST(matmul)
{
    run_group("matmul");
}
PS_TEST(gather_experts)
{
    run_group("gather_experts");
}
PS_TEST(moe_up)
{
    run_group("moe_up");
}
PS_TEST(moe_down)
{
    run_group("moe_down");
}
PS_TEST(attn)
{
    run_group("attn");
}

/* ---- shapes that the common cases are too small for ---- */

/* Several rounds of a ring, rows wider than a segment, strips of dequantised rows, tiles of every
 * kind of remainder. */
PS_TEST(matmul_real_shapes)
{
    static const ops_matmul_case cases[] = {
        {1, 4096, 3, {PS_FMT_Q4_0, PS_FMT_Q4_0, PS_FMT_Q4_0}, {4097, 513, 512}},
        {1, 11520, 1, {PS_FMT_Q8_0}, {2050}},
        {8, 2048, 2, {PS_FMT_Q4_K, PS_FMT_Q6_K}, {1024, 333}, .bias = true},
        {5, 4096, 1, {PS_FMT_F16}, {3001}, .add = true},
        {1, 11520, 1, {PS_FMT_F16}, {4096}},
        {1, 2048, 1, {PS_FMT_F32}, {128}},
        {1000, 2048, 1, {PS_FMT_F32}, {128}},
        {1024, 4096, 1, {PS_FMT_F16}, {200}, .add = true},
        {700, 2048, 1, {PS_FMT_Q4_0}, {300}, .bias = true},
        {150, 2048, 2, {PS_FMT_Q4_0, PS_FMT_Q4_0}, {300, 77}, .add = true},
        {129, 4096, 1, {PS_FMT_Q6_K}, {130}},
        {200, 2880, 1, {PS_FMT_MXFP4}, {100}, .bias = true},
        {513, 1024, 1, {PS_FMT_BF16}, {190}, .rows = OPS_EXTREME},
        {250, 1024, 1, {PS_FMT_F16}, {190}, .rows = OPS_EXTREME, .add = true, .bias = true},
    };
    ops_rig r;
    if (!open_cuda(&r)) return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ops_call c;
        ops_make_matmul(&c, &cases[i]);
        check_call(&r, &c);
        ops_call_fini(&c);
    }
    ops_rig_close(&r);
}

PS_TEST(attn_real_shapes)
{
    static const ops_attn_case cases[] = {
        {128, 32, 4, 1, 1, 64, 3000, PS_FMT_F16},
        {128, 32, 8, 1, 1, 64, 9000, PS_FMT_F16, .window = 4096},
        {128, 16, 2, 300, 1, 64, 500, PS_FMT_F16},
        {128, 8, 2, 200, 2, 64, 300, PS_FMT_Q8_0},
        {128, 32, 1, 12, 12, 64, 400, PS_FMT_F16},
        {64, 71, 1, 3, 1, 64, 200, PS_FMT_F16, .ml = true},
        {64, 71, 1, 20, 1, 64, 200, PS_FMT_F16, .sinks = true},
        {128, 7, 1, 100, 1, 64, 77, PS_FMT_F16, .window = 64},
        {256, 8, 4, 150, 1, 64, 600, PS_FMT_F16, .window = 256},
    };
    ops_rig r;
    if (!open_cuda(&r)) return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ops_call c;
        ops_make_attn(&c, &cases[i]);
        check_call(&r, &c);
        ops_call_fini(&c);
    }
    ops_rig_close(&r);
}

/* ---- bits ---- */

/* Rows of a call with fewer tokens are those rows of the call with more, inside a batch class. */
static void check_fewer_tokens(ops_rig *r, ps_fmt fmt, uint32_t many, uint32_t few)
{
    ops_matmul_case k = {.n_tok = many, .n_cols = 1280, .n_parts = 1, .fmt = {fmt}, .n_rows = {67}};
    ops_call c;
    ps_err err = {0};
    ops_make_matmul(&c, &k);
    ps_test_case("%s on %s, %u of its tokens", c.name, r->name, few);
    PS_CHECK_STATUS(ops_run(r, &c, &err), PS_OK);
    ops_buf *y = ops_find(&c, offsetof(ps_matmul_args, part) + offsetof(ps_matmul_part, y));
    const uint64_t n_bytes = (uint64_t)few * 67 * 4;
    uint8_t *want = ps_alloc(n_bytes, 1);
    PS_REQUIRE(want != NULL && y != NULL);
    memcpy(want, y->got, n_bytes);
    c.args.matmul.n_tok = few;
    PS_CHECK_STATUS(ops_run(r, &c, &err), PS_OK);
    PS_CHECK(memcmp(want, y->got, n_bytes) == 0);
    ps_free(want);
    ops_call_fini(&c);
}

PS_TEST(bits_do_not_depend_on_other_tokens)
{
    ops_rig r;
    if (!open_cuda(&r)) return;
    for (int f = 0; f < OPS_N_FORMATS; f++) {
        check_fewer_tokens(&r, ops_formats[f], 8, 1);
        check_fewer_tokens(&r, ops_formats[f], 8, 3);
        if (ps_cuda_ops() != NULL && ps_fmt_get(ops_formats[f])->block_elems > 1)
            check_fewer_tokens(
                &r, ops_formats[f], 150, 20); /* cuBLAS chooses by shape; ours does not */
    }
    ops_rig_close(&r);
}

/* A graph replayed with other values in place gives what the ops themselves give. */
PS_TEST(graph_replay)
{
    ops_rig r;
    if (!open_cuda(&r)) return;
    static const char *const groups[] = {
        "matmul", "attn", "gather_experts", "moe_up", "moe_down", "route", "qkv_prep"};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        uint32_t g = 0;
        while (strcmp(ops_groups[g].name, groups[i]) != 0) g++;
        ops_call c;
        for (uint32_t k = 0; ops_groups[g].at(k, &c); k += 5) {
            ps_test_case("graph of %s on %s", c.name, r.name);
            ps_err err = {0};
            PS_CHECK_STATUS(ops_run(&r, &c, &err), PS_OK);
            ops_result want = ops_keep(&c);
            ops_bound m;
            ps_graph *graph = NULL;
            ps_status status = ops_rig_bind(&r, &c, &m, &err);
            if (status == PS_OK) status = ps_graph_begin(r.device, r.stream, &err);
            if (status == PS_OK) status = ops_rig_launch(&r, &c, &err);
            if (status == PS_OK) status = ps_graph_end(r.device, r.stream, &graph, &err);
            if (status == PS_OK) status = ps_graph_launch(r.device, r.stream, graph, &err);
            if (status == PS_OK) status = ps_device_sync(r.device, r.stream, &err);
            if (status == PS_OK) status = ops_rig_collect(&r, &c, &m, &err);
            if (status == PS_OK)
                ops_check_same_bits(&c, &want, "replayed from a graph");
            else
                ps_test_fail(__FILE__, __LINE__, "%s", err.message);
            if (graph != NULL) ps_graph_destroy(r.device, graph);
            ops_rig_unbind(&r, &m);
            ops_result_fini(&want);
            ops_call_fini(&c);
        }
    }
    ops_rig_close(&r);
}

int main(int n_args, char **args)
{
    if (n_args > 1 && strcmp(args[1], "--perf") == 0) return perf_main(n_args - 2, args + 2);
    return ps_test_main(n_args, args);
}
