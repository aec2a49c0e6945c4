/* ps_exec - obeys ticks: owns the memory that a plan asks for, the streams and events, and runs
 * passes. A loop over data: every cleverness is in lowering.
 *
 * Not here: what is in a sequence (ps_kv), which tokens come next (ps_engine).
 * Threads: one thread drives it; ps_exec_cancel may come from any thread.
 *
 * A pass either completes or leaves nothing behind that a later pass could see: on any failure the
 * abort word is set, all streams are drained and the flags cleared before the error is returned.
 */
#ifndef PS_EXEC_H
#define PS_EXEC_H

#include "engine/ps_bounce.h"
#include "engine/ps_trace.h"

typedef struct ps_exec ps_exec;

/* Called about every 20 ms while a pass or a load runs, on the driving thread; false cancels. */
typedef bool (*ps_poll_fn)(void *ctx);

typedef struct ps_exec_options {
    const ps_op_table *cpu_ops; /* for PS_SIDE_HOST and for emulated accelerators */
    const ps_op_table *dev_ops; /* for PS_SIDE_DEV: cpu_ops on emu, the CUDA table on cuda */
    bool graphs;                /* replay small passes as graphs */
    bool check;                 /* prove every new tick list before it runs */
    uint64_t locked_limit;      /* most page-locked memory, everything counted; 0: no limit */
    uint64_t ram_limit;         /* most host memory, locked or not, everything counted; 0: none */
    ps_progress_fn progress;    /* of loading weights; may be NULL */
    ps_poll_fn poll;            /* of passes; may be NULL */
    void *ctx;                  /* of both */
} ps_exec_options;

/* What a pass works on. Arrays are the caller's, copied at once. */
typedef struct ps_batch {
    uint32_t n_tok, n_out;
    const int32_t *ids, *pos, *seq;        /* [n_tok] */
    const int32_t *rope_pos;               /* [4][n_tok] for M-RoPE; NULL: all equal pos */
    const int32_t *rows;                   /* [n_out], which of the tokens */
    const int32_t *table;                  /* [n_seq][max_pages] */
    const int32_t *near_pages, *far_pages; /* [n_windows][n_seq][max_pages]; see ps_kv */
    uint32_t far;                          /* of ps_pass_shape */
    uint32_t max_kv;                       /* all positions are below it */
    bool one_sequence;                     /* consecutive tokens of one sequence */
} ps_batch;

typedef struct ps_exec_stats {
    uint64_t h2d_bytes, d2h_bytes; /* copied in passes since open */
    uint64_t locked_bytes;         /* page-locked memory held now */
    uint64_t ram_bytes;    /* host memory held now: images in use, KV, constants, and what is
                              locked besides */
    uint64_t bounce_bytes; /* of h2d_bytes: through the bounce ring */
    uint64_t disk_bytes;   /* read from files, at open and in passes */
    ps_disk_direct disk_direct;
    uint64_t n_passes, n_graph_launches;
    uint64_t busy_ns; /* device clock, of all passes */
} ps_exec_stats;

/* Allocates, loads and uploads. model, plan and device are borrowed until destroy. */
ps_status ps_exec_create(ps_model *model, const ps_plan *plan, ps_device *device,
    const ps_exec_options *options, ps_exec **out, ps_err *err);
void ps_exec_destroy(ps_exec *x); /* NULL allowed */

/* What outlives an executor when another takes its place. */
typedef struct ps_exec_past {
    ps_exec_stats stats; /* what it counted */
    ps_trace *trace;     /* owns until an executor inherits it */
    bool recording;
} ps_exec_past;

/* Destroys it, or where `x` is NULL leaves nothing. */
void ps_exec_retire(ps_exec *x, ps_exec_past *past);
/* Goes on counting and tracing from there. */
void ps_exec_inherit(ps_exec *x, ps_exec_past *past);

/* Copies bytes of the cache, a reference into DEV_KV or HOST_KV, from (in) or to ordinary memory.
 * Between passes; goes through the memory of the logits, which are lost. */
ps_status ps_exec_move_kv(
    ps_exec *x, bool in, ps_dptr ref, void *bytes, uint64_t n_bytes, ps_err *err);

/* Room for this many rows of logits; between passes only. */
ps_status ps_exec_reserve_logits(ps_exec *x, uint32_t n_rows, ps_err *err);
/* As many rows up to n_rows as there is locked memory for. */
uint32_t ps_exec_logit_rows(ps_exec *x, uint32_t n_rows);
/* Runs one pass. *logits is [n_out][n_vocab], valid until the next pass. */
ps_status ps_exec_pass(ps_exec *x, const ps_batch *batch, const float **logits, ps_err *err);

/* Records passes from now on (see ps_trace); what was recorded before stays. cap_bytes counts the
 * first time. One in 16 runs of a list that comes again and again is not marked, so that what the
 * marks cost can be told. */
ps_status ps_exec_trace_start(ps_exec *x, uint64_t cap_bytes, ps_err *err);
void ps_exec_trace_stop(ps_exec *x);
ps_trace *ps_exec_trace(const ps_exec *x); /* NULL before the first start */

void ps_exec_cancel(ps_exec *x);        /* any thread; the running pass ends with PS_ECANCELLED */
bool ps_exec_is_lost(const ps_exec *x); /* a sticky device error happened */
const ps_arena *ps_exec_arena(const ps_exec *x);
const ps_plan *ps_exec_plan(const ps_exec *x);
ps_exec_stats ps_exec_get_stats(const ps_exec *x);
/* As ps_host_weights_sources; returns the most bytes of one copy that bounces, 0 where none does.
 */
uint64_t ps_exec_sources(const ps_exec *x, uint8_t *sources);
/* The device's clock now, in nanoseconds: virtual on emu. No pass may be running. */
uint64_t ps_exec_clock_ns(const ps_exec *x);

#endif
