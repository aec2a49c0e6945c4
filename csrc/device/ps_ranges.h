/* ps_ranges - a sorted set of disjoint address ranges: what a device allocated, what it page-
 * locked. Copies look their addresses up here, so that a pageable source or one that straddles two
 * registrations is refused on every device.
 *
 * Not here: the memory itself.
 * Threads: the engine's thread.
 */
#ifndef PS_RANGES_H
#define PS_RANGES_H

#include "base/ps_base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ps_range {
    uint64_t base, n_bytes;
    uint64_t note; /* the owner's: how the range came to be */
} ps_range;

typedef struct ps_ranges { /* zero before use */
    ps_range *items;       /* owns [cap]; sorted by base, disjoint */
    uint32_t n, cap;
    uint64_t total_bytes;
} ps_ranges;

void ps_ranges_fini(ps_ranges *ranges);
/* Room for one more, so that the add behind an acquisition cannot fail. False: no host memory. */
bool ps_ranges_reserve(ps_ranges *ranges);
/* Reserve first. False, and nothing added, if it would overlap another or wraps around. */
bool ps_ranges_add(ps_ranges *ranges, uint64_t base, uint64_t n_bytes, uint64_t note);
/* The range that holds all of [addr, addr + n_bytes), or NULL. Valid until the next change. */
const ps_range *ps_ranges_find(const ps_ranges *ranges, uint64_t addr, uint64_t n_bytes);
bool ps_ranges_overlaps(const ps_ranges *ranges, uint64_t addr, uint64_t n_bytes);
/* Removes the range that starts at `base`; false if there is none. `out` may be NULL. */
bool ps_ranges_remove(ps_ranges *ranges, uint64_t base, ps_range *out);

#ifdef __cplusplus
}
#endif
#endif
