/* ps_kv_carry - what sequences hold, carried from the memory of one plan to that of another: keys
 * and values copied into host memory, in an order that no plan decides, and back.
 *
 * Not here: when (ps_engine), which tokens these are (ps_kv).
 * Threads: the engine's thread, between passes.
 */
#ifndef PS_KV_CARRY_H
#define PS_KV_CARRY_H

#include "engine/ps_exec.h"
#include "engine/ps_kv.h"

typedef struct ps_kv_carry ps_kv_carry;

/* Copies the pages of every token that `kv` holds. */
ps_status ps_kv_carry_take(ps_exec *x, const ps_kv *kv, ps_kv_carry **out, ps_err *err);
/* Into the pages that the same sequences have in `kv`, of a plan with the same n_ctx, n_seq and
 * format of the cache. */
ps_status ps_kv_carry_put(const ps_kv_carry *c, ps_exec *x, const ps_kv *kv, ps_err *err);
void ps_kv_carry_destroy(ps_kv_carry *c); /* NULL allowed */

#endif
