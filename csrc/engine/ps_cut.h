/* ps_cut - Splits into parts. A unit that is split in some tier is cut at every boundary that any
 * tier puts in it; what lies between two boundaries is a part, a unit in all but name: it has an
 * image, a place in each tier (`vram`, `stream` or `cpu`) and, with attention, a cache of its own.
 * So residency, the ring, loading and the checker need not know of Splits.
 *
 *     blk.3.ffn     Split(vram 0.5, stream 0.25) when decoding, Split(vram 0.5, stream 0.5) else
 *     [norms]       vram               its norms, which belong to no row
 *     [0:7168]      vram               rows of gate and up, the same columns of down
 *     [7168:10752]  stream
 *     [10752:14336] cpu, stream else
 *
 * The columns of `down` and `attn_output` that a part has are contiguous in its image: these are
 * the only weights that are not in file order.
 *
 * Experts are not cut. Split, they are those of a layer that bus and CPU divide: each is placed on
 * one side, evenly by its index, and keeps the share, by which passes that gather divide what is
 * routed instead (ps_lower_moe). So a plan's sizes follow from places, as everywhere.
 *
 * Not here: computing a unit from its parts (ps_lower).
 * Threads: pure but for what it allocates.
 */
#ifndef PS_CUT_H
#define PS_CUT_H

#include "engine/ps_plan.h"

/* Replaces the Splits among the plan's places. Shares are rounded to the unit's row_step; a unit
 * that then lies on one side of all its boundaries stays whole, and so do experts of which none
 * would ever be the bus's, or the CPU's. Where some unit is cut, the plan
 * gets a model of its own (plan->cut, plan->model), in which the parts stand behind the units of
 * the model it was made for, and places for all of them. PS_EPLAN for shares that cannot be. */
ps_status ps_cut_places(ps_plan *plan, ps_err *err);
void ps_cut_destroy(ps_model *cut); /* NULL allowed */

#endif
