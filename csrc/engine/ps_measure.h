/* ps_measure - the most workspace and the largest tables that any pass of a plan wants, found by
 * lowering passes without keeping their ticks. A plan's memory is laid out by it.
 *
 * Not here: lowering (ps_lower), the layout (ps_plan).
 * Threads: pure but for what it allocates.
 */
#ifndef PS_MEASURE_H
#define PS_MEASURE_H

#include "engine/ps_plan.h"

/* Of a plan whose places, homes and buffer sizes are known. */
ps_status ps_plan_measure(const ps_plan *plan, uint64_t *ws_bytes, uint32_t *n_table, ps_err *err);

/* Of each layer, how many it stands for in a tier: itself and later ones that want the same of any
 * pass, or none where an earlier one stands for it. stands_for: [n_layer]. */
ps_status ps_plan_find_alike(const ps_plan *plan, uint32_t tier, uint32_t *stands_for, ps_err *err);

#endif
