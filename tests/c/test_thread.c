/* Pool, worker, bell: that work is divided by index and nothing is lost, under repetition and with
 * more threads than CPUs. Made to run under ThreadSanitizer too: results are plain memory, so a
 * missing order is a reported race. */
#include "base/ps_thread.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "ps_test.h"

enum { MAX_TEST_THREADS = 9 };

static void pause_ns(long ns)
{
    struct timespec t = {.tv_sec = 0, .tv_nsec = ns};
    nanosleep(&t, NULL);
}

typedef struct pool_case {
    ps_pool *pool;
    uint32_t counts[MAX_TEST_THREADS];    /* one a member, plain */
    uint64_t rounds[2][MAX_TEST_THREADS]; /* written before a barrier, read by all behind it */
    _Atomic uint32_t n_wrong;
} pool_case;

static void count_members(void *ctx, int i_thread, int n_threads)
{
    pool_case *c = ctx;
    if (n_threads != ps_pool_n_threads(c->pool)) atomic_fetch_add(&c->n_wrong, 1);
    c->counts[i_thread]++;
}

static const int thread_counts[] = {1, 2, 3, MAX_TEST_THREADS};

PS_TEST(pool_runs_each_member_once)
{
    for (size_t k = 0; k < sizeof thread_counts / sizeof *thread_counts; k++) {
        int n = thread_counts[k];
        ps_test_case("%d threads", n);
        ps_err err = {0};
        pool_case c = {0};
        PS_REQUIRE_OK(ps_pool_create(n, &c.pool, &err), &err);
        for (uint32_t call = 1; call <= 500; call++) {
            ps_pool_run(c.pool, count_members, &c);
            for (int i = 0; i < n; i++) PS_CHECK_EQ_U64(c.counts[i], call);
            /* Past the longest spin now and then, so that members asleep are woken too. */
            if (call % 100 == 0) pause_ns(1000000);
        }
        PS_CHECK_EQ(c.n_wrong, 0);
        ps_pool_destroy(c.pool);
    }
}

static void cross_barriers(void *ctx, int i_thread, int n_threads)
{
    pool_case *c = ctx;
    for (uint64_t round = 1; round <= 200; round++) {
        c->rounds[round % 2][i_thread] = round * 100 + (uint64_t)i_thread;
        ps_pool_barrier(c->pool);
        /* The next round writes the other half, so one barrier a round is enough to keep reads and
         * writes apart. */
        for (int i = 0; i < n_threads; i++)
            if (c->rounds[round % 2][i] != round * 100 + (uint64_t)i)
                atomic_fetch_add(&c->n_wrong, 1);
        if (round % 50 == 0 && i_thread == 0) pause_ns(500000);
    }
}

PS_TEST(pool_barrier)
{
    for (size_t k = 0; k < sizeof thread_counts / sizeof *thread_counts; k++) {
        ps_test_case("%d threads", thread_counts[k]);
        ps_err err = {0};
        pool_case c = {0};
        PS_REQUIRE_OK(ps_pool_create(thread_counts[k], &c.pool, &err), &err);
        ps_pool_run(c.pool, cross_barriers, &c);
        ps_pool_run(c.pool, cross_barriers, &c);
        PS_CHECK_EQ(c.n_wrong, 0);
        ps_pool_destroy(c.pool);
    }
}

PS_TEST(pool_refuses_silly_counts)
{
    ps_pool *pool = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_pool_create(0, &pool, &err), PS_EREQUEST);
    PS_CHECK_EQ_STR(err.field, "threads");
    err = (ps_err){0};
    PS_CHECK_STATUS(ps_pool_create(1000000, &pool, &err), PS_EREQUEST);
    PS_CHECK(pool == NULL);
    ps_pool_destroy(NULL);
}

PS_TEST(cpu_count)
{
    PS_CHECK(ps_cpu_count() >= 1);
    cpu_set_t old, one;
    PS_REQUIRE(sched_getaffinity(0, sizeof old, &old) == 0);
    CPU_ZERO(&one);
    for (size_t i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &old)) {
            CPU_SET(i, &one);
            break;
        }
    PS_REQUIRE(sched_setaffinity(0, sizeof one, &one) == 0);
    PS_CHECK_EQ(ps_cpu_count(), 1);
    sched_setaffinity(0, sizeof old, &old);
}

/* ---- worker ---- */

typedef struct log_job {
    uint32_t *log;
    uint32_t *n_log;
    uint32_t value;
    uint32_t pause_us;
} log_job;

static void append_log(void *job)
{
    log_job *j = job;
    if (j->pause_us != 0) pause_ns((long)j->pause_us * 1000);
    j->log[(*j->n_log)++] = j->value;
}

PS_TEST(worker_keeps_order)
{
    enum { N = 1000 };
    static const uint32_t caps[] = {1, 2, 7, 4096};
    for (size_t k = 0; k < sizeof caps / sizeof *caps; k++) {
        ps_test_case("room for %u", caps[k]);
        ps_err err = {0};
        ps_worker *w = NULL;
        uint32_t log[N] = {0}, n_log = 0;
        PS_REQUIRE_OK(ps_worker_create(caps[k], &w, &err), &err);
        for (uint32_t i = 0; i < N; i++) {
            log_job j = {
                .log = log, .n_log = &n_log, .value = i, .pause_us = i % 100 == 0 ? 200 : 0};
            ps_worker_push(w, append_log, &j, sizeof j);
            if (j.pause_us != 0) PS_CHECK(!ps_worker_is_idle(w));
            if (i == N / 2) {
                ps_worker_drain(w);
                PS_CHECK(ps_worker_is_idle(w));
                PS_CHECK_EQ_U64(n_log, i + 1); /* plain read: drain must have ordered it */
            }
        }
        ps_worker_drain(w);
        PS_CHECK_EQ_U64(n_log, N);
        for (uint32_t i = 0; i < N; i++)
            if (log[i] != i) PS_CHECK_EQ_U64(log[i], i);
        ps_worker_destroy(w);
    }
}

PS_TEST(worker_destroy_runs_what_is_queued)
{
    ps_err err = {0};
    ps_worker *w = NULL;
    uint32_t log[100] = {0}, n_log = 0;
    PS_REQUIRE_OK(ps_worker_create(128, &w, &err), &err);
    for (uint32_t i = 0; i < 100; i++) {
        log_job j = {.log = log, .n_log = &n_log, .value = i, .pause_us = i == 0 ? 2000 : 0};
        ps_worker_push(w, append_log, &j, sizeof j);
    }
    ps_worker_destroy(w);
    PS_CHECK_EQ_U64(n_log, 100);
    ps_worker_destroy(NULL);
}

typedef struct full_job {
    unsigned char bytes[PS_JOB_BYTES];
} full_job;

static void check_full(void *job)
{
    full_job *j = job;
    for (size_t i = 0; i < PS_JOB_BYTES; i++) PS_CHECK(j->bytes[i] == (unsigned char)(i * 7));
    PS_CHECK_EQ_U64((uintptr_t)job % 16, 0); /* arguments hold pointers and doubles */
}

PS_TEST(worker_copies_the_largest_job)
{
    ps_err err = {0};
    ps_worker *w = NULL;
    PS_REQUIRE_OK(ps_worker_create(4, &w, &err), &err);
    for (int n = 0; n < 10; n++) {
        full_job j;
        for (size_t i = 0; i < PS_JOB_BYTES; i++) j.bytes[i] = (unsigned char)(i * 7);
        ps_worker_push(w, check_full, &j, sizeof j);
        memset(&j, 0, sizeof j);
    }
    ps_worker_destroy(w);
}

typedef struct pusher {
    ps_worker *worker;
    uint32_t *total; /* touched by the worker's thread alone */
} pusher;

static void add_one(void *job)
{
    (**(uint32_t **)job)++;
}

static void *push_many(void *arg)
{
    pusher *p = arg;
    for (int i = 0; i < 500; i++) ps_worker_push(p->worker, add_one, &p->total, sizeof p->total);
    ps_worker_drain(p->worker);
    return NULL;
}

PS_TEST(worker_takes_jobs_from_many_threads)
{
    ps_err err = {0};
    uint32_t total = 0;
    pusher p = {.total = &total};
    PS_REQUIRE_OK(ps_worker_create(3, &p.worker, &err), &err);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) PS_REQUIRE(pthread_create(&threads[i], NULL, push_many, &p) == 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    PS_CHECK_EQ_U64(total, 2000);
    ps_worker_destroy(p.worker);
}

/* ---- signals ---- */

static void note_mask(void *job)
{
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    PS_CHECK(sigismember(&mask, SIGINT) == 1);
    PS_CHECK(sigismember(&mask, SIGSEGV) == 0);
    **(int **)job = 1;
}

PS_TEST(threads_leave_signals_to_the_caller)
{
    ps_err err = {0};
    ps_worker *w = NULL;
    int seen = 0, *p = &seen;
    PS_REQUIRE_OK(ps_worker_create(2, &w, &err), &err);
    ps_worker_push(w, note_mask, &p, sizeof p);
    ps_worker_destroy(w);
    PS_CHECK_EQ(seen, 1);
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    PS_CHECK(sigismember(&mask, SIGINT) == 0);
}

/* ---- bell ---- */

typedef struct ping_pong {
    ps_bell bell;
    uint32_t ball;    /* atomic */
    uint64_t payload; /* plain: ordered by the ball */
} ping_pong;

static void await_ball(ping_pong *p, uint32_t value)
{
    for (;;) {
        uint32_t seen = ps_bell_look(&p->bell);
        if (__atomic_load_n(&p->ball, __ATOMIC_ACQUIRE) == value) return;
        ps_bell_wait(&p->bell, seen);
    }
}

static void hit_ball(ping_pong *p, uint32_t value)
{
    p->payload += value;
    __atomic_store_n(&p->ball, value, __ATOMIC_RELEASE);
    ps_bell_ring(&p->bell);
}

static void *pong(void *arg)
{
    for (uint32_t i = 0; i < 1000; i++) {
        await_ball(arg, 2 * i + 1);
        hit_ball(arg, 2 * i + 2);
    }
    return NULL;
}

PS_TEST(bell_ping_pong)
{
    ping_pong p = {0};
    pthread_t thread;
    PS_REQUIRE(pthread_create(&thread, NULL, pong, &p) == 0);
    for (uint32_t i = 0; i < 1000; i++) {
        hit_ball(&p, 2 * i + 1);
        await_ball(&p, 2 * i + 2);
    }
    pthread_join(thread, NULL);
    PS_CHECK_EQ_U64(p.payload, 2000ull * 2001 / 2);
}

/* ---- out of memory ---- */

static ps_status create_pool(void *unused, ps_err *err)
{
    (void)unused;
    ps_pool *pool = NULL;
    ps_status status = ps_pool_create(3, &pool, err);
    PS_CHECK((pool != NULL) == (status == PS_OK));
    ps_pool_destroy(pool);
    return status;
}

static ps_status create_worker(void *unused, ps_err *err)
{
    (void)unused;
    ps_worker *worker = NULL;
    ps_status status = ps_worker_create(8, &worker, err);
    PS_CHECK((worker != NULL) == (status == PS_OK));
    ps_worker_destroy(worker);
    return status;
}

PS_TEST(oom_creation)
{
    ps_test_oom_sweep(create_pool, NULL);
    ps_test_oom_sweep(create_worker, NULL);
}

PS_TEST_MAIN
