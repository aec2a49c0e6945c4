/* ps_bind - a tick list with real addresses: what the executor keeps for each shape of pass it has
 * seen.
 *
 * Not here: running it (ps_exec).
 * Threads: immutable after bind, but for the graph that the executor hangs on it.
 */
#ifndef PS_BIND_H
#define PS_BIND_H

#include "engine/ps_host_weights.h"
#include "engine/ps_ticks.h"

typedef struct ps_bases {
    ps_dptr space[PS_SPACE_COUNT];
    const ps_host_weights *weights; /* HOST_WEIGHTS goes through their images; */
    const ps_dptr *image_dev;       /* HOST_WEIGHTS_DEV through these; [n_units] */
} ps_bases;

typedef struct ps_bound {
    /* owns; copies and args hold addresses, not references, but for copies that must bounce: their
     * source still is one into HOST_WEIGHTS. */
    ps_ticks *ticks;
    ps_cost *cost; /* owns; [n_ticks] */
    uint64_t h2d_bytes, d2h_bytes;
    uint64_t bounce_bytes,
        disk_bytes; /* of h2d_bytes: through the bounce ring; of these: from disk */
    uint32_t n_ticks_on[PS_STREAM_COUNT];
    ps_graph *graph[2]; /* the executor's; NULL until recorded; [1]: with marks, for traces */
    bool graph_failed[2];
    uint64_t n_runs;
    uint64_t last_used;
    uint64_t last_ns; /* of its last run, by the real clock; 0 before */
} ps_bound;

/* Takes the list over, also on failure. */
ps_status ps_bind(const ps_bases *bases, ps_ticks *ticks, ps_bound **out, ps_err *err);
void ps_bound_destroy(ps_bound *b); /* the graph must be gone; NULL allowed */

/* The address behind a reference; null for a unit that has no image in host memory. */
ps_dptr ps_bind_ref(const ps_bases *bases, ps_dptr ref);
/* Does this copy of a bound list go through the bounce ring? */
static inline bool ps_bound_bounces(const ps_tick *copy)
{
    return ps_ref_space(copy->src) == PS_SPACE_HOST_WEIGHTS; /* no address begins like that */
}
static inline uint32_t ps_ref_unit(ps_dptr weights) /* of a reference into host weights */
{
    return (uint32_t)(ps_ref_offset(weights) >> PS_IMAGE_SHIFT);
}
static inline uint64_t ps_ref_in_image(ps_dptr weights)
{
    return ps_ref_offset(weights) & ((1ull << PS_IMAGE_SHIFT) - 1);
}

#endif
