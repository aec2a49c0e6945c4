/* ps_intervals - who last wrote and who has read each byte range of a space, for the emitter and
 * the checker.
 *
 * A sorted array of disjoint ranges. Touching a range splits those at its ends, reports what was
 * there, and records the new access. Lists are short (a few hundred ranges), so inserting by
 * memmove is fine.
 *
 * Threads: the caller's.
 */
#ifndef PS_INTERVALS_H
#define PS_INTERVALS_H

#include "engine/ps_ticks.h"

typedef struct ps_interval {
    uint64_t from, to; /* bytes [from, to) */
    int32_t writer;    /* tick that wrote it last; -1: nothing in this pass did; others below 0: the
                          caller's */
    int32_t reader[PS_STREAM_COUNT]; /* last tick of each stream that read it since; -1: none */
} ps_interval;

typedef struct ps_intervals {
    ps_interval *at; /* owns */
    uint32_t n, cap;
} ps_intervals;

/* What an access found: called for each piece of the touched range, before it is updated. */
typedef void (*ps_interval_fn)(void *ctx, const ps_interval *piece);

/* Touch [from, to) by tick `node` of `stream`: readers are recorded on read; a write becomes the
 * writer and forgets the readers. `found` sees every piece as it was, gaps as pieces without
 * writer. PS_ENOMEM leaves the set unchanged. */
ps_status ps_intervals_touch(ps_intervals *set, uint64_t from, uint64_t to, bool write,
    uint32_t stream, int32_t node, ps_interval_fn found, void *ctx);
/* The same without recording anything; gaps are not reported. */
void ps_intervals_look(
    const ps_intervals *set, uint64_t from, uint64_t to, ps_interval_fn found, void *ctx);
void ps_intervals_fini(ps_intervals *set);

/* Whether accesses to this space can conflict inside a pass: constants are only ever read, and so
 * are weights in passes that bring no residents in. */
static inline bool ps_pass_tracks(const ps_pass_shape *shape, ps_space space)
{
    if (space == PS_SPACE_DEV_WEIGHTS) return shape->found != 0;
    return space == PS_SPACE_DEV_RING || space == PS_SPACE_DEV_KV || space == PS_SPACE_DEV_ACT ||
           space == PS_SPACE_DEV_BATCH || space == PS_SPACE_HOST_KV || space == PS_SPACE_HOST_ACT ||
           space == PS_SPACE_OUT;
}

#endif
