/* ops_perf - speed of op calls with the shapes of real models, made by the same code as the test
 * cases: bytes and flops as ps_op_cost counts them over the median of repeated launches, beside
 * what a plain read of memory reaches in the same process. Numbers of one run on one machine;
 * nothing here passes or fails.
 *
 * Not here: a judgement.
 * Threads: the test's thread.
 */
#ifndef OPS_PERF_H
#define OPS_PERF_H

#include "ops_cases.h"

#include "base/ps_thread.h"

enum { OPS_PERF_RUNS = 9 };

/* Decode: weights of about 256 MiB, so that they come from DRAM and not from a cache. Prefill: 512
 * tokens. */
static inline bool ops_perf_matmul_at(uint32_t i, ops_call *c)
{
    const ps_fmt fmt = ops_formats[i / 3 % OPS_N_FORMATS];
    if (i >= OPS_N_FORMATS * 3) return false;
    const uint32_t n_tok[3] = {1, 8, 512}, n_cols = 4096;
    uint64_t row_bytes = 0;
    ps_fmt_row_bytes(fmt, n_cols, &row_bytes);
    ops_matmul_case k = {.n_tok = n_tok[i % 3], .n_cols = n_cols, .n_parts = 1, .fmt = {fmt}};
    k.n_rows[0] = i % 3 < 2 ? (uint32_t)((256ull << 20) / row_bytes) : 4096;
    ops_make_matmul(c, &k);
    return true;
}

static inline bool ops_perf_attn_at(uint32_t i, ops_call *c)
{
    static const ops_attn_case cases[] = {
        {64, 32, 8, 1, 1, 64, 4095, PS_FMT_F16},
        {128, 32, 8, 1, 1, 64, 4095, PS_FMT_F16},
        {128, 32, 8, 1, 1, 64, 4095, PS_FMT_Q8_0},
        {128, 8, 1, 16, 16, 64, 1023, PS_FMT_F16},
        {128, 32, 4, 1, 1, 64, 16383, PS_FMT_F16},
        {128, 32, 4, 1, 1, 64, 16383, PS_FMT_Q8_0},
        {64, 32, 8, 512, 1, 64, 0, PS_FMT_F16},
        {128, 32, 8, 512, 1, 64, 3584, PS_FMT_F16},
        {256, 4, 1, 512, 1, 64, 512, PS_FMT_F16, .window = 512},
    };
    if (i >= sizeof cases / sizeof *cases) return false;
    ops_make_attn(c, &cases[i]);
    return true;
}

static inline bool ops_perf_elem_at(uint32_t i, ops_call *c)
{
    if (i >= 4) return false;
    const uint32_t n_tok = i % 2 ? 512 : 1, n = 4096;
    ops_begin(c, i < 2 ? PS_OP_NORM : PS_OP_ACT, n_tok > 1 ? "512x4096" : "1x4096");
    uint64_t rng = 5;
    if (i < 2) {
        c->args.norm = (ps_norm_args){.n_tok = n_tok, .n = n, .ldx = n, .ldo = n, .eps = 1e-5f};
        ops_add_x(c, offsetof(ps_norm_args, x), n_tok, n, n, OPS_PLAIN, &rng);
        ops_add_gauss(c, offsetof(ps_norm_args, w), n, 1, &rng);
        ops_add_out(c, offsetof(ps_norm_args, out), n_tok, n, n, &rng);
    } else {
        c->args.act = (ps_act_args){.n_tok = n_tok, .n = n, .ldg = n, .ldu = n, .ldo = n};
        ops_add_x(c, offsetof(ps_act_args, gate), n_tok, n, n, OPS_PLAIN, &rng);
        ops_add_x(c, offsetof(ps_act_args, up), n_tok, n, n, OPS_PLAIN, &rng);
        ops_add_out(c, offsetof(ps_act_args, out), n_tok, n, n, &rng);
    }
    return true;
}

static inline bool ops_perf_moe_at(uint32_t i, ops_call *c)
{
    if (i >= 6) return false;
    const ps_fmt fmt = i < 4 ? PS_FMT_Q4_0 : PS_FMT_MXFP4;
    const uint32_t n_tok = i % 2 ? 256 : 1, n_expert = 64, k = 8, n = 2048, n_ff = 768;
    const uint64_t n_assign = (uint64_t)n_tok * k;
    uint64_t rng = 9;
    if (i / 2 % 2 == 0) {
        ops_begin(c, PS_OP_MOE_UP, n_tok > 1 ? "256 tok 8/64 2048x768" : "1 tok 8/64 2048x768");
        c->args.moe_up = (ps_moe_up_args){.n_tok = n_tok,
            .k = k,
            .n_expert = n_expert,
            .n_cols = n,
            .n_ff = n_ff,
            .ldx = n,
            .fmt_gate = fmt,
            .fmt_up = fmt,
            .act = PS_ACT_SILU};
        ops_add_x(c, offsetof(ps_moe_up_args, x), n_tok, n, n, OPS_PLAIN, &rng);
        ops_add_out(c, offsetof(ps_moe_up_args, out), n_assign, n_ff, n_ff, &rng);
        ops_add_routing(c, offsetof(ps_moe_up_args, ids), offsetof(ps_moe_up_args, order),
            offsetof(ps_moe_up_args, starts), n_tok, k, n_expert, &rng);
        ops_add_experts(c, offsetof(ps_moe_up_args, gate_ptrs), fmt, n_expert, n_ff, n, 0, &rng);
        ops_add_experts(c, offsetof(ps_moe_up_args, up_ptrs), fmt, n_expert, n_ff, n, 0, &rng);
    } else {
        ops_begin(c, PS_OP_MOE_DOWN, n_tok > 1 ? "256 tok 8/64 768x2048" : "1 tok 8/64 768x2048");
        c->args.moe_down = (ps_moe_down_args){
            .n_tok = n_tok, .k = k, .n_expert = n_expert, .n_ff = n_ff, .n_rows = n, .fmt = fmt};
        ops_add_x(c, offsetof(ps_moe_down_args, h), n_assign, n_ff, n_ff, OPS_PLAIN, &rng);
        ops_add_out(c, offsetof(ps_moe_down_args, y), n_assign, n, n, &rng);
        ops_add_routing(c, offsetof(ps_moe_down_args, ids), offsetof(ps_moe_down_args, order),
            offsetof(ps_moe_down_args, starts), n_tok, k, n_expert, &rng);
        ops_add_experts(c, offsetof(ps_moe_down_args, down_ptrs), fmt, n_expert, n, n_ff, 0, &rng);
    }
    return true;
}

/* ---- a plain read of memory, the ceiling of decode ---- */

typedef struct ops_read_job {
    const uint64_t *p;
    uint64_t n_words;
    uint64_t sum[64][8]; /* a cache line a thread */
} ops_read_job;

static inline void ops_read_part(void *ctx, int i, int n)
{
    ops_read_job *j = ctx;
    const uint64_t *p = j->p + j->n_words / (uint64_t)n * (uint64_t)i,
                   *end = p + j->n_words / (uint64_t)n;
    uint64_t s[8] = {0};
    for (; p + 8 <= end; p += 8) {
        __builtin_prefetch(p + 192); /* as far ahead as the kernels look */
        for (int k = 0; k < 8; k++) s[k] ^= p[k];
    }
    for (int k = 0; k < 8; k++) j->sum[i][k] = s[k];
}

static inline double ops_read_bytes_per_s(int threads)
{
    ps_pool *pool = NULL;
    const uint64_t n_bytes = 512ull << 20;
    ops_read_job *j = ps_alloc(1, sizeof *j);
    uint64_t *p = ps_alloc(n_bytes, 1);
    double best = 0;
    if (j != NULL && p != NULL && ps_pool_create(threads, &pool, NULL) == PS_OK) {
        for (uint64_t i = 0; i < n_bytes / 8; i += 512) p[i] = i; /* real pages */
        *j = (ops_read_job){.p = p, .n_words = n_bytes / 8};
        for (int run = 0; run < 5; run++) {
            const uint64_t start = ps_clock_ns();
            ps_pool_run(pool, ops_read_part, j);
            best = fmax(best, (double)n_bytes / (double)(ps_clock_ns() - start) * 1e9);
        }
    }
    ps_pool_destroy(pool);
    ps_free(p);
    ps_free(j);
    return best;
}

/* ---- timing ---- */

static inline int ops_compare_u64(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static inline void ops_perf_call(ops_rig *r, ops_call *c, double ceiling)
{
    ops_bound m;
    ps_err err = {0};
    uint64_t ns[OPS_PERF_RUNS];
    ps_status status = ops_rig_bind(r, c, &m, &err);
    for (int i = -1; i < OPS_PERF_RUNS && status == PS_OK; i++) { /* the first is not counted */
        const uint64_t start = ps_clock_ns();
        status = ops_rig_launch(r, c, &err);
        if (status == PS_OK) status = ps_device_sync(r->device, r->stream, &err);
        if (i >= 0) ns[i] = ps_clock_ns() - start;
    }
    if (status == PS_OK) {
        const ps_cost cost = ps_op_cost(c->kind, &c->args);
        qsort(ns, OPS_PERF_RUNS, sizeof *ns, ops_compare_u64);
        const double median = (double)ns[OPS_PERF_RUNS / 2], best = (double)ns[0];
        printf("%-16s %-64s %9.1f us  best %9.1f  %6.1f GB/s (%3.0f %% of read)  %8.1f GFLOP/s\n",
            r->name, c->name, median * 1e-3, best * 1e-3, (double)cost.bytes / median,
            100 * (double)cost.bytes / median * 1e9 / ceiling, (double)cost.flops / median);
    } else {
        printf("%s on %s: %s\n", c->name, r->name, err.message);
    }
    ops_rig_unbind(r, &m);
}

static const ops_case_fn ops_perf_groups[] = {
    ops_perf_matmul_at, ops_perf_attn_at, ops_perf_elem_at, ops_perf_moe_at};

/* Calls of `words` ("avx512:2", "q4_k 1x"), or all, on one rig. */
static inline void ops_perf_rig(ops_rig *r, double ceiling, int n_words, char **words)
{
    for (size_t g = 0; g < sizeof ops_perf_groups / sizeof *ops_perf_groups; g++) {
        ops_call c;
        for (uint32_t i = 0; ops_perf_groups[g](i, &c); i++) {
            char line[256];
            snprintf(line, sizeof line, "%s %s", r->name, c.name);
            bool wanted = true;
            for (int w = 0; w < n_words; w++) wanted &= strstr(line, words[w]) != NULL;
            if (wanted) ops_perf_call(r, &c, ceiling);
            ops_call_fini(&c);
        }
    }
}

#endif
