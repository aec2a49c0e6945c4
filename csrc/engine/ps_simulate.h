/* ps_simulate - how long a pass takes without running it: the tick list walked in the order it is
 * enqueued, with a clock a stream, given how long each tick does. The same order rules as the
 * checker's: a tick starts when its stream is free and, for waits, when what it waits for is done;
 * streams overlap.
 *
 * Not here: how long ticks take (cost models, in Python), what a whole prompt takes (Python).
 * Threads: pure but for what it allocates.
 */
#ifndef PS_SIMULATE_H
#define PS_SIMULATE_H

#include "engine/ps_ticks.h"

/* What a cost model may ask about a tick. Zeros for events and flags. */
typedef struct ps_work {
    uint64_t flops, bytes; /* RUN; only those experts that the op reaches are counted */
    uint64_t bus_bytes;    /* RUN: those of `bytes` that are host memory, reached from the GPU */
    double bus_odds;       /* RUN: that it reads any of these, of which bus_bytes are the mean */
    uint64_t n_bytes;      /* copies */
    uint32_t n_tok;        /* RUN: rows that the op works on */
    int32_t fmt;           /* RUN: of its weights, or of the cache; -1 where it has none */
} ps_work;

typedef struct ps_makespan {
    uint64_t total_ns;
    uint64_t busy_ns[PS_STREAM_COUNT]; /* in copies and ops */
    /* The longest chain, from the first tick to the end: each moment of it belongs to the copy or
     * op that the end was waiting for, or to an event or flag. They sum to total_ns. */
    uint64_t critical_ns[PS_STREAM_COUNT];
    uint64_t critical_sync_ns;
} ps_makespan;

/* The list as the executor runs it: neighbouring copies of neighbouring bytes are one. (Which
 * images are neighbours is only known once they are loaded: those of neighbouring units, say we.)
 */
ps_status ps_simulate_lower(
    const ps_plan *plan, const ps_pass_shape *shape, ps_ticks **out, ps_err *err);

ps_work ps_simulate_work(const ps_ticks *ticks, uint32_t i);

/* ns: [n_ticks], of the ticks alone. end_ns: [n_ticks] when each is done, or NULL. PS_EREQUEST
 * where durations overflow, PS_EPLAN where a wait has nothing to wait for. */
ps_status ps_simulate_run(
    const ps_ticks *ticks, const uint64_t *ns, uint64_t *end_ns, ps_makespan *out, ps_err *err);

#endif
