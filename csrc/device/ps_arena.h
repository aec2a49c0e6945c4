/* ps_arena - one allocation of device memory under a budget, carved by kind and counted to the
 * byte. The budget is enforced here, where memory is taken: a plan that swears it fits is still
 * refused.
 *
 * Not here: deciding what goes where (engine/ps_plan).
 * Threads: the engine's thread.
 */
#ifndef PS_ARENA_H
#define PS_ARENA_H

#include "device/ps_device.h"

/* What VRAM is used for; the rows of stats["peak_bytes_by_kind"]. */
typedef enum ps_mem_kind {
    PS_MEM_WEIGHTS,
    PS_MEM_RING,
    PS_MEM_KV,
    PS_MEM_ACT,   /* hidden states, activations, workspaces of ops and libraries */
    PS_MEM_BATCH, /* tokens, positions, page tables, constants */
    PS_MEM_GRAPH, /* charged, not carved: the driver allocates it */
    PS_MEM_MAP,   /* charged, not carved: the driver's tables by which the GPU reaches locked host
                     memory */
    PS_MEM_KIND_COUNT
} ps_mem_kind;
const char *ps_mem_kind_name(
    ps_mem_kind kind); /* "weights", "ring", "kv", "act", "batch", "graph", "map" */

enum { PS_ARENA_ALIGN = 256 };

typedef struct ps_arena {
    ps_device *device;                /* borrows */
    ps_dptr base;                     /* owns; null before init */
    uint64_t n_bytes;                 /* allocated */
    uint64_t budget;                  /* ceiling of everything carved and charged */
    uint64_t used[PS_MEM_KIND_COUNT]; /* now */
    uint64_t peak[PS_MEM_KIND_COUNT]; /* when the total was highest: they sum to peak_total */
    uint64_t peak_total;
} ps_arena;

/* Allocates n_bytes (<= budget) at once; the rest of the budget is for what is charged. */
ps_status ps_arena_init(
    ps_arena *arena, ps_device *device, uint64_t n_bytes, uint64_t budget, ps_err *err);
void ps_arena_fini(ps_arena *arena); /* a zeroed arena is allowed */
/* Account for [offset, offset + n_bytes) as `kind`: PS_EBUDGET beyond the allocation or the budget.
 */
ps_status ps_arena_take(ps_arena *arena, ps_mem_kind kind, uint64_t offset, uint64_t n_bytes,
    ps_dptr *out, ps_err *err);
/* Memory that somebody else allocated but that counts. */
ps_status ps_arena_charge(ps_arena *arena, ps_mem_kind kind, uint64_t n_bytes, ps_err *err);
void ps_arena_give(ps_arena *arena, ps_mem_kind kind, uint64_t n_bytes); /* undo take or charge */

#endif
