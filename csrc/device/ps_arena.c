/* ps_arena - see ps_arena.h.
 *
 * Not here: deciding what goes where. Overlaps of carved ranges are legal (scratch of one tier
 * becomes weights of another); what is counted is what was taken and not given back.
 * Threads: the engine's thread.
 */
#include "device/ps_arena.h"

#include <string.h>

const char *ps_mem_kind_name(ps_mem_kind kind)
{
    static const char *const names[PS_MEM_KIND_COUNT] = {
        "weights", "ring", "kv", "act", "batch", "graph", "map"};
    return (unsigned)kind < PS_MEM_KIND_COUNT ? names[kind] : "unknown";
}

ps_status ps_arena_init(
    ps_arena *arena, ps_device *device, uint64_t n_bytes, uint64_t budget, ps_err *err)
{
    *arena = (ps_arena){.device = device, .budget = budget};
    if (n_bytes > budget) {
        if (err != NULL && err->status == PS_OK) {
            err->needed = n_bytes;
            err->budget = budget;
        }
        return ps_fail(err, PS_EBUDGET, "%llu bytes of device memory do not fit the budget of %llu",
            (unsigned long long)n_bytes, (unsigned long long)budget);
    }
    if (n_bytes == 0) return PS_OK; /* a plan that keeps nothing on the accelerator */
    ps_status status = ps_device_alloc(device, n_bytes, &arena->base, err);
    if (status == PS_OK) arena->n_bytes = n_bytes;
    return status;
}

void ps_arena_fini(ps_arena *arena)
{
    if (arena->device != NULL && !ps_dptr_is_null(arena->base))
        ps_device_free(arena->device, arena->base);
    *arena = (ps_arena){0};
}

static uint64_t total_used(const ps_arena *arena)
{
    uint64_t total = 0;
    for (int k = 0; k < PS_MEM_KIND_COUNT; k++) total += arena->used[k];
    return total;
}

ps_status ps_arena_charge(ps_arena *arena, ps_mem_kind kind, uint64_t n_bytes, ps_err *err)
{
    ps_check_bug((unsigned)kind < PS_MEM_KIND_COUNT, err);
    uint64_t used = total_used(arena), total = 0;
    if (!ps_add_u64(used, n_bytes, &total) || total > arena->budget) {
        if (err != NULL && err->status == PS_OK) {
            err->needed = used + ps_min_u64(n_bytes, UINT64_MAX - used);
            err->budget = arena->budget;
        }
        return ps_fail(err, PS_EBUDGET,
            "%llu more bytes for %s exceed the budget of %llu: %llu are in use",
            (unsigned long long)n_bytes, ps_mem_kind_name(kind), (unsigned long long)arena->budget,
            (unsigned long long)used);
    }
    arena->used[kind] += n_bytes;
    if (total > arena->peak_total) {
        arena->peak_total = total;
        memcpy(arena->peak, arena->used, sizeof arena->peak);
    }
    return PS_OK;
}

ps_status ps_arena_take(
    ps_arena *arena, ps_mem_kind kind, uint64_t offset, uint64_t n_bytes, ps_dptr *out, ps_err *err)
{
    *out = (ps_dptr){0};
    uint64_t end = 0;
    ps_check_bug(n_bytes > 0 && offset % PS_ARENA_ALIGN == 0, err);
    if (!ps_add_u64(offset, n_bytes, &end) || end > arena->n_bytes) {
        if (err != NULL && err->status == PS_OK) {
            err->needed = end != 0 ? end : UINT64_MAX;
            err->budget = arena->n_bytes;
        }
        return ps_fail(err, PS_EBUDGET,
            "%llu bytes for %s at offset %llu lie outside the arena of %llu",
            (unsigned long long)n_bytes, ps_mem_kind_name(kind), (unsigned long long)offset,
            (unsigned long long)arena->n_bytes);
    }
    ps_status status = ps_arena_charge(arena, kind, n_bytes, err);
    if (status == PS_OK) *out = ps_dptr_add(arena->base, offset);
    return status;
}

void ps_arena_give(ps_arena *arena, ps_mem_kind kind, uint64_t n_bytes)
{
    if ((unsigned)kind >= PS_MEM_KIND_COUNT) return;
    arena->used[kind] -= ps_min_u64(n_bytes, arena->used[kind]);
}
