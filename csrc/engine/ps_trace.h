/* ps_trace - what passes did and when: for each tick that takes time its begin and end on the
 * device's clock, kept in a ring that holds the latest passes.
 *
 * Not here: files and attribution (pipeshard/trace.py), which passes are traced (ps_exec).
 * Threads: the engine's thread. Nothing is allocated while a pass runs: prepare does, before the
 * first pass of a list.
 */
#ifndef PS_TRACE_H
#define PS_TRACE_H

#include "device/ps_arena.h"
#include "engine/ps_bind.h"

enum { PS_TRACE_CAP_PASSES = 8192 };
#define PS_TRACE_CAP_BYTES (32ull << 20) /* of the ring of ticks: hundreds of decoded tokens */

typedef struct ps_trace_tick {
    uint64_t begin_ns, end_ns;
    uint64_t flops;
    uint64_t bytes;     /* RUN: as ps_cost has them; copies: over the bus */
    uint64_t bus_bytes; /* RUN: those of `bytes` that went over the bus */
    uint32_t tick;      /* number in the pass's list */
    int32_t cause; /* WAIT, FLAG_WAIT: the tick that they waited for; -1: none that takes time */
    int32_t unit;  /* -1: none */
    uint8_t kind, stream, op, pad; /* as in ps_tick */
} ps_trace_tick;

typedef struct ps_trace_pass {
    uint64_t number;           /* among the engine's passes, from 0 */
    uint64_t begin_ns, end_ns; /* as the engine's thread saw it, on the clock of the ticks */
    uint64_t wall_ns;          /* the same by the real clock */
    uint64_t read_ns;          /* real clock: collecting the times afterwards */
    uint64_t clock_error_ns;   /* by how much CPU and GPU streams may be apart */
    uint64_t first_tick;       /* its n_ticks are consecutive */
    uint64_t vram_bytes[PS_MEM_KIND_COUNT]; /* held */
    uint32_t n_ticks;                       /* 0 where the pass was not marked */
    uint32_t tier, n_tok, n_out;
    uint32_t seq, pos; /* of its first token */
    uint8_t one_sequence, graph, marked, pad[5];
} ps_trace_pass;

typedef struct ps_trace ps_trace;

/* cap_bytes 0: PS_TRACE_CAP_BYTES. The device is borrowed. */
ps_status ps_trace_create(ps_device *device, uint64_t cap_bytes, ps_trace **out, ps_err *err);
void ps_trace_destroy(ps_trace *t); /* graphs that hold its marks must be gone; NULL allowed */

/* Before each marked pass; allocates before the first one of a list. The ring grows where it could
 * not hold a single pass of it, and is empty afterwards. */
ps_status ps_trace_prepare(ps_trace *t, const ps_ticks *ticks, ps_err *err);
/* Before each pass, while no stream is busy: keeps the clocks together. */
ps_status ps_trace_tie(ps_trace *t, ps_err *err);
/* Around enqueueing tick i on `s`. In a graph a tick begins where the one before it on its stream
 * ended: there is nothing between two nodes but their launch, and a mark would be one more node. */
ps_status ps_trace_enter(
    ps_trace *t, ps_stream *s, const ps_ticks *ticks, uint32_t i, bool in_graph, ps_err *err);
ps_status ps_trace_leave(ps_trace *t, ps_stream *s, const ps_ticks *ticks, uint32_t i, ps_err *err);
/* Behind a pass that went well. Of `pass`, first_tick, n_ticks, read_ns and clock_error_ns are
 * filled here, and begin_ns and end_ns moved from ps_exec_clock_ns to the clock of the ticks. */
ps_status ps_trace_add(ps_trace *t, const ps_bound *b, const ps_trace_pass *pass, ps_err *err);

/* What there is, oldest first; `ticks` and `passes` have room for as many as count says, and
 * first_tick counts from the beginning of `ticks`. */
void ps_trace_count(const ps_trace *t, uint64_t *n_passes, uint64_t *n_ticks);
void ps_trace_copy(const ps_trace *t, ps_trace_pass *passes, ps_trace_tick *ticks);
void ps_trace_clear(ps_trace *t);

#endif
