/* ps_test.h - the C tests' harness. A test file includes it once, writes tests and ends with
 * PS_TEST_MAIN:
 *
 *     PS_TEST(add_overflow) { uint64_t r = 0; PS_CHECK(!ps_add_u64(UINT64_MAX, 1, &r)); }
 *     PS_TEST_MAIN
 *
 * A failed check prints file, line, values and the case in hand (ps_test_case) and the test goes
 * on; PS_REQUIRE leaves the test. The program takes test names (parts of them) to run only those,
 * prints 'N passed, N failed'
 * (', N skipped' where any) last and exits with 0 only if something ran or was skipped and nothing
 * failed. Devices: a test that opens devices asks ps_test_device("cuda") and so on;
 * PIPESHARD_TEST_DEVICES=host,emu,cuda says which (default host,emu: no test needs a GPU). Threads:
 * checks may fail on any thread; everything else belongs to the main thread.
 */
#ifndef PS_TEST_H
#define PS_TEST_H

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/ps_base.h"

typedef struct ps_test_entry {
    const char *name;
    void (*fn)(void);
    struct ps_test_entry *next;
} ps_test_entry;

static ps_test_entry *ps_test_first, **ps_test_tail = &ps_test_first;
static _Atomic int ps_test_n_bad;    /* failed checks of the test in hand */
static const char *ps_test_skipped;  /* why the test in hand was skipped, or NULL */
static char ps_test_case_label[256]; /* "q4_k 3x256" while a table of cases is walked */

/* Registers itself before main, in file order, so that no list can forget a test. */
#define PS_TEST(test_name)                                                                         \
    static void test_##test_name(void);                                                            \
    __attribute__((constructor)) static void test_##test_name##_register(void)                     \
    {                                                                                              \
        static ps_test_entry entry = {#test_name, test_##test_name, NULL};                         \
        *ps_test_tail = &entry;                                                                    \
        ps_test_tail = &entry.next;                                                                \
    }                                                                                              \
    static void test_##test_name(void)

__attribute__((format(printf, 3, 4))) static inline void ps_test_fail(
    const char *file, int line, const char *fmt, ...)
{
    /* A broken table of a thousand cases says enough in twenty lines. */
    if (atomic_fetch_add(&ps_test_n_bad, 1) >= 20) return;
    va_list ap;
    va_start(ap, fmt);
    char text[1024];
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    printf("%s:%d: %s%s%s\n", file, line, text, ps_test_case_label[0] ? "  in case " : "",
        ps_test_case_label);
}

/* Names the case in hand in every failure message until the next call or the end of the test. */
__attribute__((format(printf, 1, 2), unused)) static inline void ps_test_case(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(ps_test_case_label, sizeof ps_test_case_label, fmt, ap);
    va_end(ap);
}

#define PS_CHECK(cond) ((cond) ? (void)0 : ps_test_fail(__FILE__, __LINE__, "not true: %s", #cond))
#define PS_REQUIRE(cond)                                                                           \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            ps_test_fail(__FILE__, __LINE__, "not true, test left: %s", #cond);                    \
            return;                                                                                \
        }                                                                                          \
    } while (0)

#define PS_TEST_COMPARE(type, format, got, want)                                                   \
    do {                                                                                           \
        type got_ = (type)(got), want_ = (type)(want);                                             \
        if (got_ != want_)                                                                         \
            ps_test_fail(                                                                          \
                __FILE__, __LINE__, "%s is %" format ", expected %" format, #got, got_, want_);    \
    } while (0)
#define PS_CHECK_EQ_U64(got, want) PS_TEST_COMPARE(uint64_t, PRIu64, got, want)
#define PS_CHECK_EQ_I64(got, want) PS_TEST_COMPARE(int64_t, PRId64, got, want)
#define PS_CHECK_EQ(got, want)     PS_CHECK_EQ_I64(got, want)

#define PS_CHECK_EQ_STR(got, want)                                                                 \
    do {                                                                                           \
        const char *got_ = (got), *want_ = (want);                                                 \
        if (got_ == NULL || strcmp(got_, want_) != 0)                                              \
            ps_test_fail(__FILE__, __LINE__, "%s is \"%s\", expected \"%s\"", #got,                \
                got_ == NULL ? "(null)" : got_, want_);                                            \
    } while (0)

/* NaN on either side fails. */
#define PS_CHECK_NEAR(got, want, tolerance)                                                        \
    do {                                                                                           \
        double got_ = (double)(got), want_ = (double)(want), tol_ = (double)(tolerance);           \
        if (!(fabs(got_ - want_) <= tol_))                                                         \
            ps_test_fail(__FILE__, __LINE__, "%s is %.9g, expected %.9g within %.3g", #got, got_,  \
                want_, tol_);                                                                      \
    } while (0)

/* `call` returns a ps_status. */
#define PS_CHECK_STATUS(call, want)                                                                \
    do {                                                                                           \
        ps_status got_ = (call);                                                                   \
        if (got_ != (want))                                                                        \
            ps_test_fail(__FILE__, __LINE__, "%s gave %s, expected %s", #call,                     \
                ps_status_name(got_), ps_status_name(want));                                       \
    } while (0)
/* The same for PS_OK, with the sentence in *err; leaves the test on failure. */
#define PS_REQUIRE_OK(call, err)                                                                   \
    do {                                                                                           \
        ps_status got_ = (call);                                                                   \
        if (got_ != PS_OK) {                                                                       \
            ps_test_fail(__FILE__, __LINE__, "%s gave %s: %s", #call, ps_status_name(got_),        \
                (err)->message);                                                                   \
            return;                                                                                \
        }                                                                                          \
    } while (0)

/* Leaves the test and counts it as skipped: only for what this machine or build lacks, never for a
 * failure. */
#define PS_SKIP(reason)                                                                            \
    do {                                                                                           \
        ps_test_skipped = (reason);                                                                \
        return;                                                                                    \
    } while (0)

__attribute__((unused)) static inline bool ps_test_device(const char *name)
{
    const char *list = getenv("PIPESHARD_TEST_DEVICES");
    if (list == NULL || *list == '\0') list = "host,emu";
    size_t n = strlen(name);
    for (const char *p = list; p != NULL; p = strchr(p, ','), p += p != NULL)
        if (strncmp(p, name, n) == 0 && (p[n] == '\0' || p[n] == ',')) return true;
    return false;
}

/* True under `make test-long`: more cases, larger shapes, more rounds. */
__attribute__((unused)) static inline bool ps_test_long(void)
{
    return getenv("PIPESHARD_TEST_LONG") != NULL;
}

/* Under a sanitizer everything takes ten times as long: tables of cases are walked in larger steps.
 * A prime n samples every kind of case where the table's columns repeat. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define PS_TEST_SLOW_BUILD 1
#else
#define PS_TEST_SLOW_BUILD 0
#endif
__attribute__((unused)) static inline uint32_t ps_test_step(uint32_t n)
{
    return PS_TEST_SLOW_BUILD && !ps_test_long() ? n : 1;
}

/* Calls fn with its first allocation refused, then its second, and so on until none is refused:
 * each refusal must come back as PS_ENOMEM with a sentence, with no block more alive than before;
 * the last call must succeed. fn undoes what it did. Tests that use this are named oom_*: `make
 * oom` runs them under AddressSanitizer. */
__attribute__((unused)) static inline void ps_test_oom_steps(
    ps_status (*fn)(void *ctx, ps_err *err), void *ctx, int64_t step)
{
    for (int64_t after = 0;; after += step) {
        ps_err err = {0};
        uint64_t live = ps_heap_get_stats().live_blocks;
        ps_heap_fail_after(after);
        ps_status status = fn(ctx, &err);
        bool fired = ps_heap_fail_after(-1);
        ps_test_case("allocation %" PRId64 " refused", after);
        if (ps_heap_get_stats().live_blocks != live)
            ps_test_fail(__FILE__, __LINE__, "%" PRIu64 " blocks alive, %" PRIu64 " before",
                ps_heap_get_stats().live_blocks, live);
        if (status != (fired ? PS_ENOMEM : PS_OK) || (fired && err.message[0] == '\0'))
            ps_test_fail(__FILE__, __LINE__, "%s (\"%s\")", ps_status_name(status), err.message);
        if (!fired || after > 1000000) return;
    }
}

__attribute__((unused)) static inline void ps_test_oom_sweep(
    ps_status (*fn)(void *ctx, ps_err *err), void *ctx)
{
    ps_test_oom_steps(fn, ctx, 1);
}

/* The same where fn opens an engine. The build without sanitizers walks all refusals and counts
 * what each leaves behind; the sanitizers look for faults of which refusals alike have the same
 * ones. */
__attribute__((unused)) static inline void ps_test_oom_long_sweep(
    ps_status (*fn)(void *ctx, ps_err *err), void *ctx)
{
#ifdef __SANITIZE_THREAD__
    ps_test_oom_steps(fn, ctx, ps_test_step(17));
#else
    ps_test_oom_steps(fn, ctx, ps_test_step(3));
#endif
}

static inline bool ps_test_wanted(const char *name, int n_args, char **args)
{
    for (int i = 1; i < n_args; i++)
        if (strstr(name, args[i]) != NULL) return true;
    return n_args <= 1;
}

static inline int ps_test_main(int n_args, char **args)
{
    int n_passed = 0, n_failed = 0, n_skipped = 0;
    setvbuf(stdout, NULL, _IOLBF, 0); /* what was printed before a crash is the clue to it */
    for (const ps_test_entry *t = ps_test_first; t != NULL; t = t->next) {
        if (!ps_test_wanted(t->name, n_args, args)) continue;
        atomic_store(&ps_test_n_bad, 0);
        ps_test_skipped = NULL;
        ps_test_case_label[0] = '\0';
        uint64_t start_ns = ps_clock_ns();
        t->fn();
        double ms = (double)(ps_clock_ns() - start_ns) * 1e-6;
        int n_bad = atomic_load(&ps_test_n_bad);
        if (n_bad > 0) {
            n_failed++;
            printf("FAIL %s (%d checks, %.0f ms)\n", t->name, n_bad, ms);
        } else if (ps_test_skipped != NULL) {
            n_skipped++;
            printf("skip %s: %s\n", t->name, ps_test_skipped);
        } else {
            n_passed++;
            printf("ok   %s (%.0f ms)\n", t->name, ms);
        }
    }
    printf("%d passed, %d failed", n_passed, n_failed);
    if (n_skipped > 0) printf(", %d skipped", n_skipped);
    printf("\n");
    bool ran_nothing = n_passed + n_skipped == 0 && n_args <= 1;
    return n_failed > 0 || ran_nothing;
}

#define PS_TEST_MAIN                                                                               \
    int main(int n_args, char **args)                                                              \
    {                                                                                              \
        return ps_test_main(n_args, args);                                                         \
    }

#endif
