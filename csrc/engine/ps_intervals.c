/* ps_intervals - see ps_intervals.h. */
#include "engine/ps_intervals.h"

#include <string.h>

static ps_interval fresh(uint64_t from, uint64_t to)
{
    ps_interval x = {.from = from, .to = to, .writer = -1};
    for (int s = 0; s < PS_STREAM_COUNT; s++) x.reader[s] = -1;
    return x;
}

/* First range whose end lies behind `from`. */
static uint32_t first_behind(const ps_intervals *set, uint64_t from)
{
    uint32_t lo = 0, hi = set->n;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (set->at[mid].to <= from)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void insert(ps_intervals *set, uint32_t i, ps_interval x)
{
    memmove(&set->at[i + 1], &set->at[i], (set->n - i) * sizeof *set->at);
    set->at[i] = x;
    set->n++;
}

/* Makes `cut` a border, if it lies inside range i. */
static void split(ps_intervals *set, uint32_t i, uint64_t cut)
{
    if (i >= set->n || set->at[i].from >= cut || set->at[i].to <= cut) return;
    ps_interval right = set->at[i];
    right.from = cut;
    set->at[i].to = cut;
    insert(set, i + 1, right);
}

ps_status ps_intervals_touch(ps_intervals *set, uint64_t from, uint64_t to, bool write,
    uint32_t stream, int32_t node, ps_interval_fn found, void *ctx)
{
    if (from >= to) return PS_OK;
    uint32_t i = first_behind(set, from), last = i;
    while (last < set->n && set->at[last].from < to) last++;
    /* At worst: two splits, and a gap before, between and behind all ranges touched. */
    uint32_t need = set->n + 3 + (last - i) + 1;
    if (need > set->cap) {
        uint32_t cap = need * 2 < 64 ? 64 : need * 2;
        ps_interval *at = ps_realloc(set->at, cap, sizeof *at);
        if (at == NULL) return PS_ENOMEM;
        set->at = at;
        set->cap = cap;
    }
    split(set, i, from);
    i = first_behind(set, from);
    uint64_t cursor = from;
    uint32_t first = i;
    while (cursor < to) { /* fill gaps, so that pieces cover the whole range */
        if (i >= set->n || set->at[i].from > cursor) {
            uint64_t end = i < set->n ? ps_min_u64(to, set->at[i].from) : to;
            insert(set, i, fresh(cursor, end));
        } else {
            split(set, i, to);
        }
        found(ctx, &set->at[i]);
        if (!write) set->at[i].reader[stream] = node;
        cursor = set->at[i++].to;
    }
    if (!write) return PS_OK;
    /* One writer for all of it: the pieces become one range again. */
    ps_interval whole = fresh(from, to);
    whole.writer = node;
    set->at[first] = whole;
    memmove(&set->at[first + 1], &set->at[i], (set->n - i) * sizeof *set->at);
    set->n -= i - first - 1;
    return PS_OK;
}

void ps_intervals_look(
    const ps_intervals *set, uint64_t from, uint64_t to, ps_interval_fn found, void *ctx)
{
    for (uint32_t i = first_behind(set, from); i < set->n && set->at[i].from < to; i++)
        found(ctx, &set->at[i]);
}

void ps_intervals_fini(ps_intervals *set)
{
    ps_free(set->at);
    *set = (ps_intervals){0};
}
