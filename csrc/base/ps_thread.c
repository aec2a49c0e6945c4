/* ps_thread - see ps_thread.h. Pool and bell sleep on futexes, because a decode token forks and
 * joins hundreds of times and a mutex around each costs more than the work's tail; the worker,
 * which is entered once per op, uses a mutex and two condition variables.
 *
 * Not here: what the jobs do.
 * Threads: as the header says; each lock and each word says what it guards.
 */
#include "base/ps_thread.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    MIN_SPIN_NS = 2000,   /* what one futex round trip costs: spinning for less gains nothing */
    PAUSES_PER_LOOK = 32, /* between two looks at the clock */
    MAX_THREADS = 4096,
};

static void futex_wait(const uint32_t *word, uint32_t seen, const struct timespec *timeout)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout, NULL, 0);
}

static void futex_wake_all(const uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static ps_status thread_start(pthread_t *thread, void *(*main)(void *), void *arg, ps_err *err)
{
    /* Blocked before the thread exists, or a signal could arrive in it first. Faults stay open:
     * blocked, they would kill the process without the handler that Python installs for them. */
    sigset_t all, old;
    sigfillset(&all);
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(thread, NULL, main, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc == 0) return PS_OK;
    return ps_fail(err, PS_ENOMEM,
        "cannot start a thread: %s (see `ulimit -u`, or use fewer threads)", strerror(rc));
}

/* ---- gate: a counter that threads wait on; spins first, for as long as the last gap says is worth
 * it ---- */

typedef struct spin_limits {
    uint64_t spin_ns; /* 0: threads sleep at once */
    uint64_t gap_ns;  /* a gap longer than this is none between the ops of a token */
} spin_limits;

/* Where the CPU is needed in few layers of a token, gaps are milliseconds long; waking fourteen
 * sleepers took 0.1 ms a layer. */
static const spin_limits alone = {.spin_ns = 10000000, .gap_ns = 5000000};
/* A pool that has every CPU takes them from whoever feeds it (streams of emulated devices, say). */
static const spin_limits crowded = {.spin_ns = 100000, .gap_ns = 500000};

typedef struct gate {
    alignas(64) uint32_t word;
    uint32_t n_asleep;
    uint64_t spin_ns;
} gate;

static void gate_open(gate *g)
{
    /* Sequentially consistent against n_asleep in gate_wait: either we see the sleeper or it sees
     * the new word. */
    __atomic_fetch_add(&g->word, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&g->n_asleep, __ATOMIC_SEQ_CST) != 0) futex_wake_all(&g->word);
}

static bool gate_spin(const gate *g, uint32_t seen, uint64_t start_ns, uint64_t limit_ns)
{
    if (limit_ns == 0) return __atomic_load_n(&g->word, __ATOMIC_ACQUIRE) != seen;
    do {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (__atomic_load_n(&g->word, __ATOMIC_ACQUIRE) != seen) return true;
            __builtin_ia32_pause();
        }
    } while (ps_clock_ns() - start_ns < limit_ns);
    return false;
}

/* Returns once the word is no longer `seen`. */
static void gate_wait(gate *g, uint32_t seen, spin_limits most)
{
    if (__atomic_load_n(&g->word, __ATOMIC_ACQUIRE) != seen) return;
    uint64_t start_ns = ps_clock_ns();
    uint64_t limit_ns = ps_min_u64(__atomic_load_n(&g->spin_ns, __ATOMIC_RELAXED), most.spin_ns);
    if (!gate_spin(g, seen, start_ns, limit_ns)) {
        __atomic_fetch_add(&g->n_asleep, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&g->word, __ATOMIC_SEQ_CST) == seen)
            futex_wait(&g->word, seen, NULL);
        __atomic_fetch_sub(&g->n_asleep, 1, __ATOMIC_RELAXED);
    }
    /* The next gap is guessed from the longest of the last ones: short gaps within a layer
     * alternate with long ones between layers. Where threads outnumber free CPUs gaps are longer
     * still, so the guess falls to the minimum and nobody burns the CPU that the late thread needs.
     */
    uint64_t gap_ns = ps_clock_ns() - start_ns, next_ns = MIN_SPIN_NS;
    if (gap_ns <= most.gap_ns)
        next_ns = ps_max_u64(ps_max_u64(2 * gap_ns, limit_ns - limit_ns / 16), MIN_SPIN_NS);
    __atomic_store_n(&g->spin_ns, next_ns, __ATOMIC_RELAXED);
}

/* ---- pool ---- */

typedef struct member {
    ps_pool *pool; /* borrows */
    int i_thread;
    pthread_t thread;
} member;

struct ps_pool {
    gate start, done, barrier;
    alignas(64) uint32_t n_left; /* members that have not finished the current call */
    alignas(64) uint32_t n_at_barrier;
    alignas(64) ps_pool_fn
        fn; /* fn, ctx and stop are written before `start` opens and constant until all are done */
    void *ctx;
    bool stop;
    int n_threads, n_started; /* the caller is not among those started */
    spin_limits most;
    member members[]; /* [n_threads - 1] */
};

static void *member_main(void *arg)
{
    member *m = arg;
    ps_pool *pool = m->pool;
    /* The word starts at 0 and the next call cannot begin before every member has finished this
     * one, so each member sees each value once. */
    for (uint32_t seen = 0;; seen++) {
        gate_wait(&pool->start, seen, pool->most);
        if (pool->stop) return NULL;
        pool->fn(pool->ctx, m->i_thread, pool->n_threads);
        if (__atomic_sub_fetch(&pool->n_left, 1, __ATOMIC_ACQ_REL) == 0) gate_open(&pool->done);
    }
}

static spin_limits limits_of(int n_threads)
{
    int n_cpu = ps_cpu_count();
    return n_threads < n_cpu ? alone : n_threads == n_cpu ? crowded : (spin_limits){0};
}

ps_status ps_pool_create(int n_threads, ps_pool **out, ps_err *err)
{
    *out = NULL;
    if (n_threads < 1 || n_threads > MAX_THREADS)
        return ps_fail_field(err, PS_EREQUEST, "threads",
            "threads must be between 1 and %d, not %d", MAX_THREADS, n_threads);
    uint64_t n_members = (uint64_t)(n_threads - 1);
    ps_pool *pool = ps_alloc(1, sizeof *pool + n_members * sizeof *pool->members);
    if (pool == NULL)
        return ps_fail(err, PS_ENOMEM, "no memory for a pool of %d threads", n_threads);
    pool->n_threads = n_threads;
    pool->most = limits_of(n_threads);
    pool->start.spin_ns = pool->done.spin_ns = pool->barrier.spin_ns = pool->most.spin_ns / 4;
    for (int i = 0; i < n_threads - 1; i++) {
        pool->members[i] = (member){.pool = pool, .i_thread = i + 1};
        ps_status status =
            thread_start(&pool->members[i].thread, member_main, &pool->members[i], err);
        if (status != PS_OK) {
            ps_pool_destroy(pool);
            return status;
        }
        pool->n_started++;
    }
    *out = pool;
    return PS_OK;
}

void ps_pool_destroy(ps_pool *pool)
{
    if (pool == NULL) return;
    pool->stop = true;
    gate_open(&pool->start);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->members[i].thread, NULL);
    ps_free(pool);
}

int ps_pool_n_threads(const ps_pool *pool)
{
    return pool->n_threads;
}

void ps_pool_run(ps_pool *pool, ps_pool_fn fn, void *ctx)
{
    if (pool->n_threads == 1) {
        fn(ctx, 0, 1);
        return;
    }
    pool->fn = fn;
    pool->ctx = ctx;
    uint32_t seen = __atomic_load_n(
        &pool->done.word, __ATOMIC_RELAXED); /* moved by us or before our last return */
    __atomic_store_n(&pool->n_left, (uint32_t)pool->n_threads, __ATOMIC_RELAXED);
    gate_open(&pool->start);
    fn(ctx, 0, pool->n_threads);
    /* Whoever finishes last opens `done`, the caller too, so that the word moves exactly once a
     * call. */
    if (__atomic_sub_fetch(&pool->n_left, 1, __ATOMIC_ACQ_REL) == 0)
        gate_open(&pool->done);
    else
        gate_wait(&pool->done, seen, pool->most);
}

void ps_pool_barrier(ps_pool *pool)
{
    if (pool->n_threads == 1) return;
    uint32_t seen = __atomic_load_n(&pool->barrier.word, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&pool->n_at_barrier, 1, __ATOMIC_ACQ_REL) == (uint32_t)pool->n_threads) {
        __atomic_store_n(
            &pool->n_at_barrier, 0, __ATOMIC_RELAXED); /* published by the opening gate */
        gate_open(&pool->barrier);
    } else {
        gate_wait(&pool->barrier, seen, pool->most);
    }
}

/* ---- CPUs ---- */

/* One number at most from a small file; false where there is none ("max" is none). */
static bool read_quota(const char *path, const char *format, double *a, double *b)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) return false;
    int n = fscanf(file, format, a, b);
    fclose(file);
    return n == (b != NULL ? 2 : 1) && *a > 0;
}

/* CPUs' worth of time that the container may use; 0 where there is no quota. */
static int cgroup_cpu_quota(void)
{
    double quota = 0, period = 0;
    bool found = read_quota("/sys/fs/cgroup/cpu.max", "%lf %lf", &quota, &period);
    if (!found)
        found = read_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "%lf", &quota, NULL) &&
                read_quota("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "%lf", &period, NULL);
    if (!found || period <= 0 || quota / period >= MAX_THREADS) return 0;
    int n = (int)(quota / period);
    return (double)n < quota / period ? n + 1 : n;
}

int ps_cpu_count(void)
{
    int n = 0;
    cpu_set_t sets[16] = {
        0}; /* 16384 CPUs, twice what Linux can be built for: too small a set would be refused */
    if (sched_getaffinity(0, sizeof sets, sets) == 0) n = CPU_COUNT_S(sizeof sets, sets);
    if (n == 0) n = (int)sysconf(_SC_NPROCESSORS_ONLN);
    int quota = cgroup_cpu_quota();
    if (quota > 0 && quota < n) n = quota;
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

/* ---- worker ---- */

typedef struct slot {
    alignas(64) ps_job_fn fn;
    alignas(16) unsigned char job[PS_JOB_BYTES];
} slot;

struct ps_worker {
    pthread_mutex_t
        lock; /* guards everything below but cap_jobs, thread and the contents of running slots */
    pthread_cond_t arrived;  /* a job was pushed, or stop */
    pthread_cond_t finished; /* a job is done: for push (room) and drain */
    uint64_t n_pushed,
        n_done;         /* a slot belongs to its job until n_done passes it, so jobs run in place */
    uint32_t n_waiting; /* on `finished` */
    bool stop;
    uint32_t cap_jobs;
    pthread_t thread;
    slot slots[]; /* [cap_jobs], job i in slot i % cap_jobs */
};

static void *worker_main(void *arg)
{
    ps_worker *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->n_done == w->n_pushed && !w->stop) pthread_cond_wait(&w->arrived, &w->lock);
        if (w->n_done == w->n_pushed) break; /* stop comes after everything queued */
        slot *s = &w->slots[w->n_done % w->cap_jobs];
        pthread_mutex_unlock(&w->lock);
        s->fn(s->job);
        pthread_mutex_lock(&w->lock);
        w->n_done++;
        if (w->n_waiting > 0) pthread_cond_broadcast(&w->finished);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

ps_status ps_worker_create(uint32_t cap_jobs, ps_worker **out, ps_err *err)
{
    *out = NULL;
    if (cap_jobs == 0)
        return ps_fail(err, PS_EINTERNAL, "a worker needs room for at least one job");
    ps_worker *w = ps_alloc(1, sizeof *w + (uint64_t)cap_jobs * sizeof *w->slots);
    if (w == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a queue of %u jobs", cap_jobs);
    w->cap_jobs = cap_jobs;
    /* With default attributes these three cannot fail on Linux. */
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->arrived, NULL);
    pthread_cond_init(&w->finished, NULL);
    ps_status status = thread_start(&w->thread, worker_main, w, err);
    if (status == PS_OK) {
        *out = w;
        return PS_OK;
    }
    pthread_cond_destroy(&w->finished);
    pthread_cond_destroy(&w->arrived);
    pthread_mutex_destroy(&w->lock);
    ps_free(w);
    return status;
}

void ps_worker_destroy(ps_worker *w)
{
    if (w == NULL) return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->arrived);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->finished);
    pthread_cond_destroy(&w->arrived);
    pthread_mutex_destroy(&w->lock);
    ps_free(w);
}

/* With the lock held: until n_done reaches `target`. */
static void wait_done(ps_worker *w, uint64_t target)
{
    w->n_waiting++;
    while (w->n_done < target) pthread_cond_wait(&w->finished, &w->lock);
    w->n_waiting--;
}

void ps_worker_push(ps_worker *w, ps_job_fn fn, const void *job, uint32_t n_bytes)
{
    pthread_mutex_lock(&w->lock);
    /* Several pushers may wait for the same room, so look again after waking. */
    while (w->n_pushed - w->n_done == w->cap_jobs) wait_done(w, w->n_pushed - w->cap_jobs + 1);
    slot *s = &w->slots[w->n_pushed % w->cap_jobs];
    s->fn = fn;
    memcpy(s->job, job, n_bytes <= PS_JOB_BYTES ? n_bytes : PS_JOB_BYTES);
    w->n_pushed++;
    pthread_cond_signal(&w->arrived);
    pthread_mutex_unlock(&w->lock);
}

void ps_worker_drain(ps_worker *w)
{
    pthread_mutex_lock(&w->lock);
    wait_done(w, w->n_pushed);
    pthread_mutex_unlock(&w->lock);
}

bool ps_worker_is_idle(ps_worker *w)
{
    pthread_mutex_lock(&w->lock);
    bool idle = w->n_done == w->n_pushed;
    pthread_mutex_unlock(&w->lock);
    return idle;
}

/* ---- bell ---- */

uint32_t ps_bell_look(const ps_bell *bell)
{
    return __atomic_load_n(&bell->n_rings, __ATOMIC_RELAXED);
}

/* Relaxed on purpose (see the header). That no ring is lost rests on x86: atomic additions are full
 * barriers there, so either the ringer sees n_waiting or the kernel sees the new n_rings. The
 * timeout makes a hole in this argument a delay instead of a hang. */
void ps_bell_wait(ps_bell *bell, uint32_t seen)
{
    static const struct timespec timeout = {.tv_nsec = 50000000};
    __atomic_fetch_add(&bell->n_waiting, 1, __ATOMIC_RELAXED);
    futex_wait(&bell->n_rings, seen, &timeout);
    __atomic_fetch_sub(&bell->n_waiting, 1, __ATOMIC_RELAXED);
}

void ps_bell_ring(ps_bell *bell)
{
    __atomic_fetch_add(&bell->n_rings, 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&bell->n_waiting, __ATOMIC_RELAXED) != 0) futex_wake_all(&bell->n_rings);
}
