/* ps_cpu - what the CPU variants of the op table share: the reference launchers that they fall back
 * to, fork-join over the launch's pool, division of work by index, and the carving of scratch.
 *
 * Not here: kernels. Functions are static, so that every variant file compiles its own copy with
 * its own instruction set and none of it can end up in a file that must run everywhere.
 * Threads: launchers run on the stream's thread; range functions on every member of its pool.
 */
#ifndef PS_CPU_H
#define PS_CPU_H

#include "kernels/ps_ops.h"

/* Batch classes. Variants other than the reference compute a matmul or expert call in one of two
 * ways, chosen by the shape of the call alone; within a class a token's result does not depend on
 * what else is in the call. MATMUL: up to this many tokens one pass over the weights serves them
 * all; beyond it, tiles. Experts: the same, by the tokens that an expert gets on average, n_tok * k
 * / n_expert, and n_tok itself. */
enum {
    PS_CPU_GEMV_MAX_TOK = 8,
    PS_CPU_ATTN_CHUNK = 256, /* keys that a thread takes at a time, few enough to keep all busy */
};

/* Launchers of the reference: the fallback where a variant gains nothing. */
ps_status ps_cpu_ref_embed(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_norm(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_matmul(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_qkv_prep(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_attn(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_attn_merge(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_act(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_route(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_gather_experts(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_moe_up(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_moe_down(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_moe_combine(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_add(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_gather_rows(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_softcap(const ps_launch *launch, const void *args);
ps_status ps_cpu_ref_move(const ps_launch *launch, const void *args);

/* f(gate) * up in double, as PS_ACT_* says. */
double ps_cpu_ref_gate(uint32_t kind, double gate, double up);

/* Whether every assignment has its row in y or in y_other. */
bool ps_cpu_combine_complete(const ps_launch *launch, const ps_moe_combine_args *a);

/* Tables of the variants; NULL where this build leaves one out. */
const ps_op_table *ps_cpu_ref_table(void);
const ps_op_table *ps_cpu_avx2_table(void);
const ps_op_table *ps_cpu_avx512_table(void);
const ps_op_table *ps_cpu_amx_table(void);

static inline int ps_cpu_threads(const ps_launch *launch)
{
    return launch->pool == NULL ? 1 : ps_pool_n_threads(launch->pool);
}

static inline void ps_cpu_run(const ps_launch *launch, ps_pool_fn fn, void *ctx)
{
    if (launch->pool == NULL)
        fn(ctx, 0, 1);
    else
        ps_pool_run(launch->pool, fn, ctx);
}

/* The share of member i of n in [0, n_items), in whole steps: by index only, so that the division
 * of work never depends on timing. */
static inline void ps_cpu_share(
    uint64_t n_items, uint64_t step, int i, int n, uint64_t *begin, uint64_t *end)
{
    const uint64_t n_steps = ps_div_up_u64(n_items, step);
    *begin = ps_min_u64(n_steps * (uint64_t)i / (uint64_t)n * step, n_items);
    *end = ps_min_u64(n_steps * ((uint64_t)i + 1) / (uint64_t)n * step, n_items);
}

/* An aborted pass has no result; what is left undone shows in no output that anybody uses. */
static inline bool ps_cpu_aborted(const ps_launch *launch)
{
    return launch->abort != NULL && __atomic_load_n(launch->abort, __ATOMIC_RELAXED) != 0;
}

/* Scratch is carved in pieces of whole cache lines, in the order of the calls. */
typedef struct ps_cpu_scratch {
    char *next; /* borrows the launch's scratch */
    uint64_t left_bytes;
    bool short_of; /* a piece did not fit: the launcher returns PS_EINTERNAL */
} ps_cpu_scratch;

static inline ps_cpu_scratch ps_cpu_scratch_of(const ps_launch *launch)
{
    return (ps_cpu_scratch){.next = launch->scratch, .left_bytes = launch->scratch_bytes};
}

static inline void *ps_cpu_take(ps_cpu_scratch *s, uint64_t n_bytes)
{
    const uint64_t n = (n_bytes + 63) / 64 * 64;
    char *p = s->next;
    if (n > s->left_bytes) {
        s->short_of = true;
        return NULL;
    }
    s->next += n;
    s->left_bytes -= n;
    return p;
}

#endif
