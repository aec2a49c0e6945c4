/* ps_bind - a tick list with real addresses: what the executor keeps for each shape of pass it has
 * seen.
 *
 * Not here: running it (ps_exec).
 * Threads: immutable after bind, but for the graph that the executor hangs on it.
 */
#ifndef PS_BIND_H
#define PS_BIND_H

#include "engine/ps_ticks.h"

typedef struct ps_bases {
    ps_dptr space[PS_SPACE_COUNT]; /* HOST_WEIGHTS goes through images: the model's, */
    const struct ps_images *parts; /* or of units that the plan has cut, these; may be NULL */
    const ps_dptr *image_dev;      /* HOST_WEIGHTS_DEV through these; [n_units] */
} ps_bases;

typedef struct ps_bound {
    ps_ticks *ticks; /* owns; copies and args hold addresses, not references */
    ps_cost *cost;   /* owns; [n_ticks] */
    uint64_t h2d_bytes, d2h_bytes;
    uint32_t n_ticks_on[PS_STREAM_COUNT];
    ps_graph *graph[2]; /* the executor's; NULL until recorded; [1]: with marks, for traces */
    bool graph_failed[2];
    uint64_t n_runs;
    uint64_t last_used;
    uint64_t last_ns; /* of its last run, by the real clock; 0 before */
} ps_bound;

/* Takes the list over, also on failure. */
ps_status ps_bind(
    const ps_model *model, const ps_bases *bases, ps_ticks *ticks, ps_bound **out, ps_err *err);
void ps_bound_destroy(ps_bound *b); /* the graph must be gone; NULL allowed */

/* The address behind a reference. */
ps_dptr ps_bind_ref(const ps_model *model, const ps_bases *bases, ps_dptr ref);

#endif
