/* ps_ranges - see ps_ranges.h. A sorted array: a device has tens of ranges and asks far more often
 * than it changes them.
 *
 * Not here: locks; the engine's thread owns the set.
 * Threads: the engine's thread.
 */
#include "device/ps_ranges.h"

#include <string.h>

void ps_ranges_fini(ps_ranges *r)
{
    ps_free(r->items);
    *r = (ps_ranges){0};
}

bool ps_ranges_reserve(ps_ranges *r)
{
    if (r->n < r->cap) return true;
    uint32_t cap = r->cap == 0 ? 16 : r->cap * 2;
    ps_range *items = ps_realloc(r->items, cap, sizeof *items);
    if (items == NULL) return false;
    r->items = items;
    r->cap = cap;
    return true;
}

/* Index of the first range that starts behind `addr`. */
static uint32_t first_behind(const ps_ranges *r, uint64_t addr)
{
    uint32_t lo = 0, hi = r->n;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (r->items[mid].base <= addr)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

const ps_range *ps_ranges_find(const ps_ranges *r, uint64_t addr, uint64_t n_bytes)
{
    uint32_t i = first_behind(r, addr);
    if (i == 0) return NULL;
    const ps_range *range = &r->items[i - 1];
    uint64_t offset = addr - range->base;
    return offset <= range->n_bytes && n_bytes <= range->n_bytes - offset ? range : NULL;
}

bool ps_ranges_overlaps(const ps_ranges *r, uint64_t addr, uint64_t n_bytes)
{
    uint32_t i = first_behind(r, addr);
    if (i > 0 && addr - r->items[i - 1].base < r->items[i - 1].n_bytes) return true;
    return i < r->n && r->items[i].base - addr < n_bytes;
}

bool ps_ranges_add(ps_ranges *r, uint64_t base, uint64_t n_bytes, uint64_t note)
{
    uint64_t end = 0;
    if (r->n == r->cap || n_bytes == 0 || !ps_add_u64(base, n_bytes, &end)) return false;
    if (ps_ranges_overlaps(r, base, n_bytes)) return false;
    uint32_t i = first_behind(r, base);
    memmove(&r->items[i + 1], &r->items[i], (r->n - i) * sizeof *r->items);
    r->items[i] = (ps_range){.base = base, .n_bytes = n_bytes, .note = note};
    r->n++;
    r->total_bytes += n_bytes;
    return true;
}

bool ps_ranges_remove(ps_ranges *r, uint64_t base, ps_range *out)
{
    uint32_t i = first_behind(r, base);
    if (i == 0 || r->items[i - 1].base != base) return false;
    ps_range removed = r->items[--i];
    r->n--;
    memmove(&r->items[i], &r->items[i + 1], (r->n - i) * sizeof *r->items);
    r->total_bytes -= removed.n_bytes;
    if (out != NULL) *out = removed;
    return true;
}
