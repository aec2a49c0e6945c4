/* ps_host_locks - counts who page-locked a range of host memory. Locking belongs to the process and
 * not to a device: two engines over one model lock the same bytes, CUDA refuses the second
 * registration, and the first engine to close would unlock what the other still copies from.
 *
 * Not here: how memory is locked; the caller's functions do that.
 * Threads: any thread; calls for one process are serialised.
 */
#ifndef PS_HOST_LOCKS_H
#define PS_HOST_LOCKS_H

#include "base/ps_base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef ps_status (*ps_host_lock_fn)(void *ctx, void *p, uint64_t n_bytes, ps_err *err);
typedef void (*ps_host_unlock_fn)(void *ctx, void *p);

/* Calls `lock` for the first holder; whoever wants all or a part of a range that is held becomes
 * another holder of it. A range that only overlaps one is refused. */
ps_status ps_host_locks_take(
    void *p, uint64_t n_bytes, ps_host_lock_fn lock, void *ctx, ps_err *err);
/* `p` as it was taken. Calls `unlock`, with where the locked range begins, for the last holder. */
void ps_host_locks_give(void *p, ps_host_unlock_fn unlock, void *ctx);

#ifdef __cplusplus
}
#endif
#endif
