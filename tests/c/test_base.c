/* Tests of base/ps_base: checked sizes, the allocator with its counters and fault, errors'
 * first-cause rule. */
#include "ps_test.h"

PS_TEST(sizes_do_not_wrap)
{
    uint64_t r = 7;
    PS_CHECK(!ps_add_u64(UINT64_MAX, 1, &r));
    PS_CHECK(!ps_mul_u64(UINT64_MAX / 2, 3, &r));
    PS_CHECK(!ps_round_up_u64(UINT64_MAX, 64, &r));
    PS_CHECK(!ps_round_up_u64(1, 0, &r));
    PS_CHECK_EQ_U64(r, 7);
    PS_CHECK(ps_round_up_u64(65, 64, &r));
    PS_CHECK_EQ_U64(r, 128);
    PS_CHECK_EQ_U64(ps_div_up_u64(UINT64_MAX, 2), (uint64_t)1 << 63);
}

PS_TEST(alloc_is_zeroed_aligned_and_counted)
{
    static const uint64_t sizes[] = {0, 1, 63, 64, 4096, (2 << 20) - 1, 3 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        ps_test_case("%" PRIu64 " bytes", sizes[i]);
        ps_heap_stats before = ps_heap_get_stats();
        unsigned char *p = ps_alloc(sizes[i], 1);
        PS_REQUIRE(p != NULL);
        PS_CHECK_EQ_U64((uintptr_t)p % 64, 0);
        uint64_t sum = 0;
        for (uint64_t j = 0; j < sizes[i]; j++) sum += p[j];
        PS_CHECK_EQ_U64(sum, 0);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_bytes - before.live_bytes, sizes[i]);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks - before.live_blocks, 1);
        ps_free(p);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_bytes, before.live_bytes);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
    }
}

PS_TEST(alloc_refuses_what_overflows)
{
    PS_CHECK(ps_alloc(UINT64_MAX, 2) == NULL);
    PS_CHECK(ps_alloc(UINT64_MAX - 64, 1) == NULL);
    PS_CHECK(ps_alloc((uint64_t)1 << 63, 1) == NULL);
    ps_free(NULL);
}

PS_TEST(realloc_keeps_and_clears)
{
    unsigned char *p = ps_alloc(10, 1);
    PS_REQUIRE(p != NULL);
    memset(p, 0xa5, 10);
    unsigned char *q = ps_realloc(p, 20, 1);
    PS_REQUIRE(q != NULL);
    PS_CHECK(q[9] == 0xa5 && q[10] == 0 && q[19] == 0);
    ps_heap_fail_after(0);
    PS_CHECK(ps_realloc(q, 30, 1) == NULL);
    PS_CHECK(ps_heap_fail_after(-1));
    PS_CHECK(q[0] == 0xa5);
    unsigned char *r = ps_realloc(q, 5, 1);
    PS_REQUIRE(r != NULL);
    PS_CHECK(r[4] == 0xa5);
    ps_free(r);
}

PS_TEST(fault_fires_once_at_its_count)
{
    ps_heap_fail_after(1);
    void *a = ps_alloc(8, 1), *b = ps_alloc(8, 1), *c = ps_alloc(8, 1);
    PS_CHECK(a != NULL && b == NULL && c != NULL);
    PS_CHECK(ps_heap_fail_after(-1));
    PS_CHECK(!ps_heap_fail_after(-1));
    ps_free(a);
    ps_free(c);
}

PS_TEST(first_cause_wins)
{
    ps_err err = {0};
    PS_CHECK_STATUS(ps_fail_field(&err, PS_EFORMAT, "n_kv", "%d is too many", 5), PS_EFORMAT);
    PS_CHECK_STATUS(ps_fail(&err, PS_ENOMEM, "later"), PS_ENOMEM);
    PS_CHECK_EQ(err.status, PS_EFORMAT);
    PS_CHECK_EQ_STR(err.message, "5 is too many");
    PS_CHECK_EQ_STR(err.field, "n_kv");
    PS_CHECK_STATUS(ps_fail(NULL, PS_EBUSY, "no struct"), PS_EBUSY);
    PS_CHECK_EQ_STR(ps_status_name(PS_EINTERNAL), "PS_EINTERNAL");
    PS_CHECK_EQ_STR(ps_status_name((ps_status)-99), "PS_UNKNOWN");
}

PS_TEST_MAIN
