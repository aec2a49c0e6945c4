/* ps_host_locks - see ps_host_locks.h. The table is process-wide because what it counts is
 * (STYLE.md, rule 12); it holds no memory while nothing is locked.
 *
 * Not here: how memory is locked.
 * Threads: any thread.
 */
#include "device/ps_host_locks.h"

#include "device/ps_ranges.h"

#include <pthread.h>

static pthread_mutex_t locks_mutex =
    PTHREAD_MUTEX_INITIALIZER; /* guards locks_held; held while locking */
static ps_ranges locks_held;   /* the note counts the holders */

static ps_range *find_held(const void *p, uint64_t n_bytes)
{
    const ps_range *range = ps_ranges_find(&locks_held, (uintptr_t)p, n_bytes);
    return range != NULL ? &locks_held.items[range - locks_held.items] : NULL;
}

static ps_status take(void *p, uint64_t n_bytes, ps_host_lock_fn lock, void *ctx, ps_err *err)
{
    ps_range *held = find_held(p, n_bytes);
    if (held != NULL) {
        held->note++;
        return PS_OK;
    }
    if (ps_ranges_overlaps(&locks_held, (uintptr_t)p, n_bytes))
        return ps_fail(err, PS_EINTERNAL, "a part of %llu bytes at %p is page-locked already",
            (unsigned long long)n_bytes, p);
    if (!ps_ranges_reserve(&locks_held))
        return ps_fail(err, PS_ENOMEM, "no memory for the list of page-locked ranges");
    ps_status status = lock(ctx, p, n_bytes, err);
    if (status == PS_OK) ps_ranges_add(&locks_held, (uintptr_t)p, n_bytes, 1);
    return status;
}

ps_status ps_host_locks_take(
    void *p, uint64_t n_bytes, ps_host_lock_fn lock, void *ctx, ps_err *err)
{
    pthread_mutex_lock(&locks_mutex);
    ps_status status = take(p, n_bytes, lock, ctx, err);
    if (locks_held.n == 0) ps_ranges_fini(&locks_held);
    pthread_mutex_unlock(&locks_mutex);
    return status;
}

void ps_host_locks_give(void *p, ps_host_unlock_fn unlock, void *ctx)
{
    pthread_mutex_lock(&locks_mutex);
    ps_range *held = find_held(p, 1);
    if (held != NULL && --held->note == 0) {
        uintptr_t base = (uintptr_t)held->base;
        unlock(ctx, (void *)base);
        ps_ranges_remove(&locks_held, base, NULL);
        if (locks_held.n == 0) ps_ranges_fini(&locks_held);
    }
    pthread_mutex_unlock(&locks_mutex);
}
