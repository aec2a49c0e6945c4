/* ps_ticks - a lowered pass: a flat list of steps over streams, in the order they are enqueued.
 * Golden tests compare its text; the executor is a loop over it; the checker proves it free of
 * races.
 *
 * Four parts share this header: the emitter (ps_emit.c), which adds steps and finds the waits they
 * need; lowering (ps_lower.c), which knows the model; the checker (ps_check.c), which trusts
 * neither; printing (ps_ticks.c).
 *
 * Threads: a finished list is immutable.
 */
#ifndef PS_TICKS_H
#define PS_TICKS_H

#include "engine/ps_plan.h"

typedef enum ps_tick_kind {
    PS_TICK_COPY_IN,  /* locked host memory -> device, on h2d */
    PS_TICK_COPY_OUT, /* device -> locked host memory, on d2h */
    PS_TICK_RUN,      /* an op */
    PS_TICK_RECORD,   /* event between accelerator streams */
    PS_TICK_WAIT,
    PS_TICK_FLAG_SET, /* hand-off to or from the CPU stream */
    PS_TICK_FLAG_WAIT,
} ps_tick_kind;

typedef struct ps_tick {
    uint8_t kind;    /* ps_tick_kind */
    uint8_t stream;  /* ps_stream_role */
    uint8_t op;      /* RUN: ps_op_kind */
    uint8_t n_extra; /* RUN: ranges behind `extra` that the op reads through pointer tables */
    int32_t unit;    /* for messages and traces; -1: none */
    uint32_t index;  /* RUN: byte offset of its arguments; RECORD, WAIT: event; FLAG_*: flag word */
    uint32_t extra;  /* RUN: first of its extra ranges */
    ps_dptr dst, src; /* copies: references */
    uint64_t n_bytes; /* copies */
} ps_tick;

typedef struct ps_range { /* memory that a tick touches */
    ps_dptr ref;
    uint64_t n_bytes;
    uint32_t access; /* ps_access */
} ps_range;

/* What a pass brings, as offsets in the BATCH spaces. All int32. */
typedef struct ps_batch_layout {
    uint64_t ids, pos, seq; /* [n_tok] */
    uint64_t rope_pos;      /* [4][n_tok]; M-RoPE only */
    uint64_t rows;          /* [n_out]: tokens whose logits are wanted */
    uint64_t table;         /* [n_seq][max_pages] */
    uint64_t stage_table;   /* [n_seq][max_pages]: page i of any sequence is page i of a stage */
    uint64_t near, far; /* [n_windows][n_seq][max_pages], unless staged: pages in VRAM; others */
    uint64_t n_bytes;
} ps_batch_layout;

typedef struct ps_pass_shape {
    uint32_t tier;
    uint32_t n_tok;
    uint32_t n_out;  /* tokens whose logits are wanted; <= n_tok */
    uint32_t max_kv; /* no position is >= max_kv */
    /* Bit i: of some sequence, attention of the plan's window i reads pages that are in host memory
     * only; the last bit speaks for all windows from there on. Unless staged. */
    uint32_t far;
    /* Plans with KV in host memory only: the pass is tokens first .. first + n_tok - 1 of one
     * sequence, so that its KV can be staged. Else false, 0, 0. */
    bool staged;
    uint32_t seq, first;
    /* 1 + the residency that VRAM holds before the pass, which brings in what it wants beyond that;
     * 0: all that it wants is there. */
    uint32_t found;
    /* Borrows; [n_units] streamed experts that kernels can read where they lie, because that is
     * locked memory; NULL: all. */
    const bool *mapped;
} ps_pass_shape;

enum {
    PS_SMALL_PASS_TOK = 16, /* passes of at most as many tokens come again and again, as graphs */
    PS_MIN_KV_BUCKET = 256,
};

/* The KV length that a pass is lowered for: rounded up, so that not every token needs a list of its
 * own. */
uint32_t ps_pass_kv_bucket(const ps_plan *plan, uint32_t n_tok, uint32_t max_kv);

/* Is a pass of n_tok consecutive tokens of one sequence staged? That pays when many tokens read the
 * same keys; a few read them over the bus, with lists that serve any length. */
static inline bool ps_pass_is_staged(const ps_plan *plan, uint32_t n_tok)
{
    return plan->kv_backed && n_tok > PS_SMALL_PASS_TOK;
}
static inline uint32_t ps_pass_far_bit(uint32_t window)
{
    return 1u << (window < 31 ? window : 31);
}
/* `far` of a pass whose tokens end at max_kv, where every window holds all that it can. */
uint32_t ps_pass_far(const ps_plan *plan, uint32_t n_tok, uint32_t max_kv);

/* Are streamed experts (those that are `mapped`) read over the bus, by address, instead of loaded?
 * Where the tokens of a pass use at most half of a layer's experts, that moves fewer bytes.
 * GATHER_EXPERTS then brings what is routed into the ring; where the ring is too small for that,
 * the ops on experts read host memory themselves. */
bool ps_pass_maps_experts(const ps_plan *plan, const ps_pass_shape *shape);

typedef struct ps_ticks {
    const ps_plan *plan; /* borrows */
    ps_pass_shape shape;
    ps_batch_layout batch;
    ps_tick *tick; /* owns */
    uint32_t n_ticks, cap_ticks;
    unsigned char *args; /* owns; op arguments with references in their ps_dptr fields */
    uint32_t args_bytes, cap_args;
    ps_range *extra; /* owns */
    uint32_t n_extra, cap_extra;
    ps_dptr *table[PS_SIDE_COUNT]; /* owns; expert addresses as references, for CONST at
                                      plan->tables_offset */
    uint32_t n_table, cap_table[PS_SIDE_COUNT];
    uint32_t n_events, n_flags;
    uint64_t max_ws_bytes; /* most workspace an op wanted */
} ps_ticks;

void ps_batch_lay_out(const ps_plan *plan, const ps_pass_shape *shape, ps_batch_layout *out);

/* One pass of this shape under this plan. */
ps_status ps_lower(const ps_plan *plan, const ps_pass_shape *shape, ps_ticks **out, ps_err *err);
void ps_ticks_destroy(ps_ticks *ticks); /* NULL allowed */

/* Workspace and table sizes that passes of this shape want, for a plan whose memory is not laid out
 * yet. stands_for: see ps_plan_find_alike(); NULL: each layer for itself. */
ps_status ps_lower_measure(const ps_plan *plan, const ps_pass_shape *shape,
    const uint32_t *stands_for, uint64_t *ws_bytes, uint32_t *n_table, ps_err *err);

/* Proves by vector clocks over the enqueue order that every read comes after the write it needs and
 * every write after the last readers and writers of what it overwrites, that waits have something
 * to wait for and every reference lies in its space. PS_EPLAN with a sentence that names the two
 * ticks. */
ps_status ps_ticks_check(const ps_ticks *ticks, ps_err *err);

/* Text, one line a tick, for people and golden tests. Writes at most cap bytes with the terminator;
 * returns the length of the whole text. */
uint64_t ps_ticks_print(const ps_ticks *ticks, char *out, uint64_t cap);

/* The memory a tick touches; at most PS_MAX_OPERANDS + its extra ranges. `cap` entries at most are
 * written. */
uint32_t ps_tick_ranges(const ps_ticks *ticks, uint32_t i, ps_range *out, uint32_t cap);

/* What a RUN tick costs, before any reference of the list is bound. Of experts, those count whose
 * addresses its tables hold: elsewhere the others are somebody else's work; of divided ones, as
 * many as are its side's on average. Zeros for other ticks. */
ps_cost ps_tick_cost(const ps_ticks *ticks, uint32_t i);
/* The same. *bus_odds: that the op reads any of its bus_bytes, which are a mean over what tokens
 * are routed to: few experts in host memory cost nothing mostly, and much now and then. */
ps_cost ps_tick_cost_odds(const ps_ticks *ticks, uint32_t i, double *bus_odds);

/* ---- the emitter, for lowering ---- */

typedef struct ps_emitter ps_emitter;

/* measure: no hazards are tracked and no ticks kept, only sizes. */
ps_status ps_emitter_create(
    const ps_plan *plan, const ps_pass_shape *shape, bool measure, ps_emitter **out, ps_err *err);
void ps_emitter_destroy(ps_emitter *e);
ps_ticks *ps_emitter_ticks(ps_emitter *e); /* borrowed */
/* Adds the last bookkeeping (event numbers) and hands the list over. */
ps_status ps_emitter_finish(ps_emitter *e, ps_ticks **out, ps_err *err);

/* Each adds one step in program order, with the waits it needs before it. Failure is remembered and
 * reported by finish, so that lowering reads as a straight line. */
void ps_emit_copy(ps_emitter *e, bool in, int32_t unit, ps_dptr dst, ps_dptr src, uint64_t n_bytes);
void ps_emit_run(ps_emitter *e, ps_side side, int32_t unit, ps_op_kind op, const void *args,
    const ps_range *extra, uint32_t n_extra);
/* Reserves n entries in both sides' tables and returns the first; entries start as null. */
uint32_t ps_emit_table(ps_emitter *e, uint32_t n);
/* How many entries all tables of the pass will have, about: where experts are many, megabytes. */
void ps_emit_expect_tables(ps_emitter *e, uint64_t n);
void ps_emit_table_set(ps_emitter *e, ps_side side, uint32_t i, ps_dptr ref);
ps_status ps_emitter_status(const ps_emitter *e);

#endif
