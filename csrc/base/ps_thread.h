/* ps_thread - the only file that creates threads: a pool that runs one function on every member at
 * once, and a FIFO worker (one thread, jobs in order), which is what a stream of the host and of
 * the emulated device is.
 *
 * Not here: what the jobs do. No thread of ours ever touches Python, and all of them block every
 * signal that a user can send, so that Ctrl-C reaches the interpreter's thread.
 * Threads: a pool is driven by one thread at a time; a worker takes jobs from any thread; a bell is
 * for any thread.
 */
#ifndef PS_THREAD_H
#define PS_THREAD_H

#include "base/ps_base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- pool: fork-join over n threads, the caller being thread 0 ----
 * Members spin for a short while between calls (a decode token makes hundreds of them) and then
 * sleep. */
typedef struct ps_pool ps_pool;

typedef void (*ps_pool_fn)(void *ctx, int i_thread, int n_threads);

/* n_threads >= 1, caller included. n_threads == 1 creates no thread. */
ps_status ps_pool_create(int n_threads, ps_pool **out, ps_err *err);
void ps_pool_destroy(ps_pool *pool); /* joins; NULL allowed */
int ps_pool_n_threads(const ps_pool *pool);
/* Runs fn(ctx, 0..n-1, n) once on each member and returns when all have. Work is divided by index,
 * never by arrival, so results cannot depend on timing. Cannot fail. */
void ps_pool_run(ps_pool *pool, ps_pool_fn fn, void *ctx);
/* Inside fn: wait until every member has arrived here. Every member must call it equally often. */
void ps_pool_barrier(ps_pool *pool);

int ps_cpu_count(void); /* CPUs this process may use: its affinity mask, cut to the container's
                           quota; at least 1 */

/* ---- worker: one thread, first in first out ---- */
typedef struct ps_worker ps_worker;

typedef void (*ps_job_fn)(
    void *job); /* `job` is the worker's own copy of the bytes given to push */

/* Largest job that push takes: an op's arguments and a few words beside. With its function it fills
 * 512 bytes. */
enum { PS_JOB_BYTES = 496 };

ps_status ps_worker_create(uint32_t cap_jobs, ps_worker **out, ps_err *err);
void ps_worker_destroy(ps_worker *worker); /* runs what is queued, then joins; NULL allowed */
/* Copies `n_bytes` (<= PS_JOB_BYTES) and queues them; blocks while the queue is full. Allocates
 * nothing. */
void ps_worker_push(ps_worker *worker, ps_job_fn fn, const void *job, uint32_t n_bytes);
void ps_worker_drain(ps_worker *worker);   /* returns when everything pushed before has run */
bool ps_worker_is_idle(ps_worker *worker); /* everything pushed so far has run; never waits */

/* ---- bell: sleep until some thread says that something changed ----
 * A waiter looks, tests its own condition and waits if that does not hold yet; whoever changes a
 * condition rings afterwards. A bell orders no memory accesses: the condition must be read and
 * written atomically, and that is what orders what goes with it. So ThreadSanitizer sees between
 * two streams only the order that the program asked for, which one lock around all conditions would
 * hide. */
typedef struct ps_bell {
    uint32_t n_rings, n_waiting; /* zero before use */
} ps_bell;

uint32_t ps_bell_look(const ps_bell *bell);
/* Returns once the bell was rung after the look that gave `seen`, and now and then without cause:
 * test again. */
void ps_bell_wait(ps_bell *bell, uint32_t seen);
void ps_bell_ring(ps_bell *bell);

#ifdef __cplusplus
}
#endif
#endif
