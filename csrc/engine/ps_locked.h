/* ps_locked - what the executor of a plan page-locks at most, from sizes alone, and what of the
 * device's memory it takes to reach that. Said once: the plan charges by it, the executor locks and
 * accounts by it.
 *
 * Not here: locking (ps_host_weights, ps_exec), limits of it: an executor with a limit locks less,
 * and what the plan charged stays.
 * Threads: pure functions.
 */
#ifndef PS_LOCKED_H
#define PS_LOCKED_H

#include "engine/ps_plan.h"

enum {
    PS_LOCKED_PAGE_BYTES = 4096,         /* memory is locked, and reached, by pages */
    PS_LOCKED_FLAGS_BYTES = 64 << 10,    /* set aside for hand-offs between GPU and CPU */
    PS_LOCKED_EDGE_BYTES = 16 * 4096,    /* what is not an image begins and ends within pages */
    PS_LOCKED_MAX_RATE = 1 << 30,        /* of ps_plan_spec.map_bytes_per_gib */
    PS_LOCKED_MAP_GRAIN_BYTES = 2 << 20, /* in which a driver takes memory for its tables */
    PS_LOCKED_STREAMS_BYTES = 4 << 20,   /* see ps_locked_map_bytes */
};

/* Marks the units whose images are locked, [n_units] of the plan's model: those that are copied
 * from host memory in some tier and, if `divided`, those that bus and CPU divide. */
void ps_locked_units(const ps_plan *plan, bool divided, bool *locked);

/* What no executor does without, whatever its limits. */
uint64_t ps_locked_fixed_bytes(const ps_plan *plan);
/* The most there is at any time, opening included; *image_bytes: of images, which are locked by
 * whole chunks as far as that goes (ps_host_weights). A plan asks once all its sizes are known. */
ps_status ps_locked_most(
    const ps_plan *plan, uint64_t *image_bytes, uint64_t *n_bytes, ps_err *err);

/* The device's memory by which it reaches so many locked bytes: its driver's page tables, and what
 * the driver takes for the streams that the executor makes, for it does so where such tables are
 * kept and after the baseline was measured (4 MiB on an H200). 0 where the machine says that there
 * are no such tables. */
uint64_t ps_locked_map_bytes(const ps_plan_spec *spec, uint64_t n_bytes);

#endif
