/* Arena, ranges and the count of page-locked ranges: exact to the byte, and refused at the byte
 * behind. */
#include "device/ps_arena.h"
#include "device/ps_host_locks.h"
#include "device/ps_ranges.h"

#include "ps_test.h"

PS_TEST(ranges_find_and_refuse)
{
    ps_ranges r = {0};
    /* Added out of order; neighbours may touch. */
    static const uint64_t bases[] = {1000, 500, 100, 600, 2000};
    for (int i = 0; i < 5; i++) {
        PS_REQUIRE(ps_ranges_reserve(&r));
        PS_CHECK(ps_ranges_add(&r, bases[i], 100, (uint64_t)i));
    }
    PS_CHECK_EQ_U64(r.total_bytes, 500);
    static const struct {
        uint64_t addr, n;
        bool found, overlaps;
    } cases[] = {
        {100, 100, true, true},
        {100, 101, false, true},
        {99, 1, false, false},
        {99, 2, false, true},
        {199, 1, true, true},
        {200, 1, false, false},
        {500, 200, false, true},
        {599, 2, false, true},
        {600, 100, true, true},
        {0, UINT64_MAX, false, true},
        {2099, 1, true, true},
        {2100, 1, false, false},
        {2100, UINT64_MAX, false, false},
        {2050, UINT64_MAX, false, true},
        {UINT64_MAX, 1, false, false},
        {0, 100, false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ps_test_case(
            "[%llu, + %llu)", (unsigned long long)cases[i].addr, (unsigned long long)cases[i].n);
        PS_CHECK_EQ(ps_ranges_find(&r, cases[i].addr, cases[i].n) != NULL, cases[i].found);
        PS_CHECK_EQ(ps_ranges_overlaps(&r, cases[i].addr, cases[i].n), cases[i].overlaps);
        PS_REQUIRE(ps_ranges_reserve(&r));
        if (cases[i].overlaps) PS_CHECK(!ps_ranges_add(&r, cases[i].addr, cases[i].n, 9));
    }
    ps_test_case("changes");
    PS_CHECK_EQ_U64(ps_ranges_find(&r, 650, 1)->note, 3);
    PS_CHECK(!ps_ranges_add(&r, UINT64_MAX - 5, 10, 0)); /* wraps */
    PS_CHECK(!ps_ranges_add(&r, 5000, 0, 0));
    PS_CHECK(!ps_ranges_remove(&r, 550, NULL));
    ps_range removed;
    PS_CHECK(ps_ranges_remove(&r, 600, &removed) && removed.note == 3 && removed.n_bytes == 100);
    PS_CHECK(ps_ranges_find(&r, 600, 1) == NULL && ps_ranges_find(&r, 500, 100) != NULL);
    PS_CHECK_EQ_U64(r.n, 4);
    PS_CHECK_EQ_U64(r.total_bytes, 400);
    ps_ranges_fini(&r);
    PS_CHECK(ps_ranges_find(&r, 100, 1) == NULL);
    ps_ranges_fini(&r);
}

/* Counts calls; refuses when told to. */
typedef struct locker {
    int n_locks, n_unlocks;
    bool refuses;
} locker;

static ps_status count_lock(void *ctx, void *p, uint64_t n_bytes, ps_err *err)
{
    locker *l = ctx;
    (void)p;
    (void)n_bytes;
    if (l->refuses) return ps_fail(err, PS_EDEVICE, "refused");
    l->n_locks++;
    return PS_OK;
}

static void count_unlock(void *ctx, void *p)
{
    (void)p;
    ((locker *)ctx)->n_unlocks++;
}

PS_TEST(host_locks_count_holders)
{
    static char memory[8192];
    uint64_t live = ps_heap_get_stats().live_blocks;
    locker l = {0};
    ps_err err = {0};
    PS_REQUIRE_OK(ps_host_locks_take(memory, 4096, count_lock, &l, &err), &err);
    PS_REQUIRE_OK(ps_host_locks_take(memory, 4096, count_lock, &l, &err), &err);
    PS_REQUIRE_OK(ps_host_locks_take(memory + 4096, 4096, count_lock, &l, &err), &err);
    PS_CHECK_EQ(l.n_locks, 2);
    /* What sticks out of a range is another registration, which the driver would refuse; what lies
     * within is locked already. */
    PS_CHECK_STATUS(ps_host_locks_take(memory, 4097, count_lock, &l, NULL), PS_EINTERNAL);
    PS_CHECK_STATUS(ps_host_locks_take(memory + 1, 4096, count_lock, &l, NULL), PS_EINTERNAL);
    PS_REQUIRE_OK(ps_host_locks_take(memory + 1024, 2048, count_lock, &l, &err), &err);
    PS_CHECK_EQ(l.n_locks, 2);
    ps_host_locks_give(memory + 1024, count_unlock, &l);
    ps_host_locks_give(memory, count_unlock, &l);
    PS_CHECK_EQ(l.n_unlocks, 0);
    ps_host_locks_give(memory, count_unlock, &l);
    PS_CHECK_EQ(l.n_unlocks, 1);
    ps_host_locks_give(memory, count_unlock, &l); /* nobody holds it */
    PS_CHECK_EQ(l.n_unlocks, 1);
    ps_host_locks_give(memory + 4096, count_unlock, &l);
    PS_CHECK_EQ(l.n_unlocks, 2);
    l.refuses = true;
    PS_CHECK_STATUS(ps_host_locks_take(memory, 4096, count_lock, &l, NULL), PS_EDEVICE);
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, live);
    l.refuses = false;
    ps_heap_fail_after(0);
    PS_CHECK_STATUS(ps_host_locks_take(memory, 4096, count_lock, &l, NULL), PS_ENOMEM);
    PS_CHECK(ps_heap_fail_after(-1));
    PS_CHECK_EQ(l.n_locks, 2);
}

typedef struct arena_fixture {
    ps_device *d;
    ps_arena arena;
    ps_err err;
} arena_fixture;

static bool open_arena(arena_fixture *f, uint64_t n_bytes, uint64_t budget)
{
    *f = (arena_fixture){0};
    ps_device_options options = {.threads = 1, .emu_vram_bytes = 1 << 20};
    ps_status status = ps_device_open("emu", &options, &f->d, &f->err);
    if (status == PS_OK) status = ps_arena_init(&f->arena, f->d, n_bytes, budget, &f->err);
    if (status != PS_OK) ps_test_fail(__FILE__, __LINE__, "cannot open: %s", f->err.message);
    return status == PS_OK;
}

PS_TEST(arena_counts_by_kind)
{
    arena_fixture f;
    PS_REQUIRE(open_arena(&f, 8192, 10000));
    ps_dptr a, b;
    PS_REQUIRE_OK(ps_arena_take(&f.arena, PS_MEM_WEIGHTS, 0, 4000, &a, &f.err), &f.err);
    PS_REQUIRE_OK(ps_arena_take(&f.arena, PS_MEM_KV, 4096, 4096, &b, &f.err), &f.err);
    PS_CHECK_EQ_U64(b.a - a.a, 4096);
    PS_CHECK_EQ_U64(a.a, f.arena.base.a);
    PS_CHECK_EQ_U64(f.arena.peak_total, 8096);
    PS_REQUIRE_OK(ps_arena_charge(&f.arena, PS_MEM_GRAPH, 1904, &f.err),
        &f.err); /* to the last byte of the budget */
    PS_CHECK_STATUS(ps_arena_charge(&f.arena, PS_MEM_GRAPH, 1, &f.err), PS_EBUDGET);
    PS_CHECK_EQ_U64(f.err.needed, 10001);
    PS_CHECK_EQ_U64(f.err.budget, 10000);
    PS_CHECK_EQ_U64(f.arena.used[PS_MEM_GRAPH], 1904);
    /* The peak by kind is that of the highest moment, so that it sums to it. */
    ps_arena_give(&f.arena, PS_MEM_KV, 4096);
    f.err = (ps_err){0};
    PS_REQUIRE_OK(ps_arena_take(&f.arena, PS_MEM_RING, 4096, 2048, &b, &f.err), &f.err);
    uint64_t sum = 0;
    for (int k = 0; k < PS_MEM_KIND_COUNT; k++) sum += f.arena.peak[k];
    PS_CHECK_EQ_U64(sum, f.arena.peak_total);
    PS_CHECK_EQ_U64(f.arena.peak_total, 10000);
    PS_CHECK_EQ_U64(f.arena.peak[PS_MEM_RING], 0);
    ps_arena_fini(&f.arena);
    ps_arena_fini(&f.arena);
    ps_device_close(f.d);
}

PS_TEST(arena_refuses_what_does_not_fit)
{
    arena_fixture f;
    PS_REQUIRE(open_arena(&f, 4096, 4096));
    ps_dptr p;
    PS_CHECK_STATUS(ps_arena_take(&f.arena, PS_MEM_ACT, 0, 4097, &p, &f.err), PS_EBUDGET);
    PS_CHECK(ps_dptr_is_null(p) && strstr(f.err.message, "act") != NULL);
    PS_CHECK_STATUS(ps_arena_take(&f.arena, PS_MEM_ACT, 256, UINT64_MAX, &p, NULL), PS_EBUDGET);
    PS_CHECK_STATUS(ps_arena_take(&f.arena, PS_MEM_ACT, 4096, 1, &p, NULL), PS_EBUDGET);
    PS_CHECK_STATUS(
        ps_arena_take(&f.arena, PS_MEM_ACT, 100, 1, &p, NULL), PS_EINTERNAL); /* not aligned */
    PS_CHECK_EQ_U64(f.arena.peak_total, 0);
    ps_arena other;
    f.err = (ps_err){0};
    PS_CHECK_STATUS(ps_arena_init(&other, f.d, 5000, 4999, &f.err), PS_EBUDGET);
    ps_arena_fini(&other);
    /* The device refuses what the budget allowed. */
    PS_CHECK_STATUS(ps_arena_init(&other, f.d, 2 << 20, 4 << 20, NULL), PS_EDEVICE);
    ps_arena_fini(&other);
    PS_REQUIRE_OK(ps_arena_init(&other, f.d, 0, 100, &f.err), &f.err);
    PS_REQUIRE_OK(ps_arena_charge(&other, PS_MEM_BATCH, 100, &f.err), &f.err);
    ps_arena_fini(&other);
    for (int k = 0; k < PS_MEM_KIND_COUNT; k++)
        PS_CHECK(strcmp(ps_mem_kind_name((ps_mem_kind)k), "unknown") != 0);
    ps_arena_fini(&f.arena);
    ps_device_close(f.d);
}

PS_TEST_MAIN
