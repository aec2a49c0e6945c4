/* The device contract: the same cases on host, emu (also with random pauses) and, where asked for,
 * cuda. What only the emulator can show (virtual time, faults, traps, races on demand) is in
 * test_emu.c. */
#include "test_device.h"

#include <pthread.h>
#include <time.h>

enum { N = 4096, N_BYTES = N * 4 }; /* words of a buffer */

static void pause_ms(long ms)
{
    struct timespec t = {.tv_sec = 0, .tv_nsec = ms * 1000000};
    nanosleep(&t, NULL);
}

/* ---- opening ---- */

PS_TEST(open_refuses_what_is_not_there)
{
    static const char *const wrong[] = {
        "", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda2", "cuda:99999999999", "Host"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ps_device *d = NULL;
        ps_err err = {0};
        ps_test_case("\"%s\"", wrong[i]);
        PS_CHECK_STATUS(ps_device_open(wrong[i], NULL, &d, &err), PS_EREQUEST);
        PS_CHECK(d == NULL && strcmp(err.field, "device") == 0);
    }
    ps_test_case("options");
    ps_device *d = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(
        ps_device_open("host", &(ps_device_options){.threads = -1}, &d, &err), PS_EREQUEST);
    PS_CHECK_STATUS(
        ps_device_open("emu", &(ps_device_options){.n_faults = PS_MAX_FAULTS + 1}, &d, &err),
        PS_EREQUEST);
    ps_device_close(NULL);
}

PS_TEST(beside_a_gpu_some_cpus_stay_free)
{
    int n = ps_cpu_count(), beside = ps_device_default_threads("cuda");
    PS_CHECK_EQ(ps_device_default_threads("host"), n);
    PS_CHECK_EQ(ps_device_default_threads("emu"), n);
    PS_CHECK(beside >= 1 && beside <= n && (n < 4 || beside < n));
    PS_CHECK_EQ(ps_device_default_threads("cuda:1"), beside);
}

PS_TEST(cuda_says_why_not)
{
    char why[256] = "";
    if (ps_device_cuda_available(why, sizeof why)) PS_SKIP("there is a CUDA device");
    PS_CHECK(strlen(why) > 20);
    ps_device *d = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_device_open("cuda", NULL, &d, &err), PS_EDEVICE);
    PS_CHECK(d == NULL && err.message[0] != '\0');
    ps_device_cuda_available(NULL, 0);
}

DEVICE_TEST(info)
{
    const ps_device_info *info = &f->d->info;
    PS_CHECK(info->name[0] != '\0');
    PS_CHECK_EQ(info->virtual_clock, f->kind == PS_DEVICE_EMU);
    uint64_t free_bytes = 0, total_bytes = 0;
    DO_OK(ps_device_mem_info(f->d, &free_bytes, &total_bytes, &f->err));
    PS_CHECK(free_bytes > 0 && free_bytes <= total_bytes);
    if (f->kind == PS_DEVICE_HOST) PS_CHECK_EQ_U64(info->vram_total_bytes, 0);
    if (f->kind == PS_DEVICE_EMU) PS_CHECK_EQ_U64(total_bytes, info->vram_total_bytes);
    if (f->kind == PS_DEVICE_CUDA) {
        PS_CHECK(info->sm >= 75 && info->n_sm > 0);
        PS_CHECK(info->baseline_bytes < info->vram_total_bytes);
    }
}

/* ---- memory and copies ---- */

DEVICE_TEST(copy_round_trip)
{
    uint32_t *h = NULL, *back = NULL;
    ps_dptr p;
    DO_OK(ps_device_locked_alloc(f->d, N_BYTES, (void **)&h, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, N_BYTES, (void **)&back, &f->err));
    DO_OK(ps_device_alloc(f->d, N_BYTES, &p, &f->err));
    PS_CHECK_EQ_U64(p.a % 256, 0);
    fill_words(h, N, 1);
    DO_OK(ps_device_copy_in(f->d, f->h2d, p, h, N_BYTES, &f->err));
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
    DO_OK(ps_device_copy_out(f->d, f->d2h, back, p, N_BYTES, &f->err));
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
    PS_CHECK_EQ_U64(count_wrong(back, N, 1), 0);
    /* A part in the middle, by address arithmetic. */
    memset(back, 0, N_BYTES);
    DO_OK(ps_device_copy_out(f->d, f->d2h, back + 10, ps_dptr_add(p, 40), 400, &f->err));
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
    PS_CHECK(memcmp(back + 10, h + 10, 400) == 0 && back[9] == 0 && back[110] == 0);
    ps_device_free(f->d, p);
    ps_device_free(f->d, (ps_dptr){0});
    ps_device_locked_free(f->d, h);
    ps_device_locked_free(f->d, NULL);
}

DEVICE_TEST(copies_take_only_one_locked_range)
{
    ps_dptr p;
    char *locked = NULL, *plain = ps_alloc(4 * 65536, 1), stack[64] = "";
    PS_REQUIRE(plain != NULL);
    DO_OK(ps_device_alloc(f->d, 65536, &p, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&locked, &f->err));
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, plain, 64, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, stack, 64, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_copy_out(f->d, f->d2h, plain, p, 64, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, locked + 4090, 7, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, locked - 1, 2, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_copy_in(f->d, f->h2d, p, locked + 4090, 6, &f->err));

    /* Two registrations side by side: each alone may be copied from, the seam may not. Registered
     * at page borders. */
    char *two = (char *)(((uintptr_t)plain + 4095) & ~(uintptr_t)4095);
    DO_OK(ps_device_lock(f->d, two, 65536, &f->err));
    DO_OK(ps_device_lock(f->d, two + 65536, 65536, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->h2d, p, two + 65536 - 64, 64, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->h2d, p, two + 65536, 64, &f->err));
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, two + 65536 - 32, 64, &f->err), PS_EINTERNAL);
    PS_CHECK(strstr(f->err.message, "straddle") != NULL);
    DO_FAIL(ps_device_lock(f->d, two + 4096, 65536, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
    ps_device_unlock(f->d, two);
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, two, 64, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_lock(f->d, two, 65536, &f->err));
    ps_device_unlock(f->d, two + 65536);
    ps_device_unlock(f->d, two);

    /* The device's side. */
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, ps_dptr_add(p, 65536 - 32), locked, 64, &f->err),
        PS_EINTERNAL);
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, (ps_dptr){0}, locked, 64, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, locked, 0, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_copy_in(f->d, f->cpu, p, locked, 64, &f->err), PS_EINTERNAL);
    if (f->kind != PS_DEVICE_HOST)
        DO_FAIL(ps_device_copy_in(f->d, f->h2d, (ps_dptr){(uintptr_t)locked}, locked, 64, &f->err),
            PS_EINTERNAL);
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
    ps_free(plain);
}

/* Two engines over one model lock the same weights; the first to close must not unlock them. */
DEVICE_TEST(two_devices_lock_the_same_memory)
{
    static const char *const kinds[] = {"host", "emu", "cuda"};
    ps_device *other = NULL;
    ps_dptr p;
    uint32_t *weights = ps_alloc(3 << 20, 1), *back = NULL;
    PS_REQUIRE(weights != NULL);
    fill_words(weights, N, 9);
    DO_OK(ps_device_open(kinds[f->kind], &(ps_device_options){.threads = 1}, &other, &f->err));
    DO_OK(ps_device_lock(other, weights, 3 << 20, &f->err));
    DO_OK(ps_device_lock(f->d, weights, 3 << 20, &f->err));
    ps_device_close(other);
    DO_OK(ps_device_alloc(f->d, N_BYTES, &p, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, N_BYTES, (void **)&back, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->compute, p, weights, N_BYTES, &f->err));
    DO_OK(ps_device_locked_dptr(f->d, weights, &p, &f->err)); /* kernels see it still, too */
    ps_dptr q;
    DO_OK(ps_device_alloc(f->d, N_BYTES, &q, &f->err));
    DO_OK(op_copy(f, f->compute, q, p, N_BYTES, NULL));
    DO_OK(ps_device_copy_out(f->d, f->compute, back, q, N_BYTES, &f->err));
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    PS_CHECK_EQ_U64(count_wrong(back, N, 9), 0);
    ps_device_unlock(f->d, weights);
    ps_free(weights);
}

DEVICE_TEST(locked_memory_by_device_address)
{
    uint32_t *h = NULL;
    ps_dptr p, alias;
    DO_OK(ps_device_locked_alloc(f->d, 2 * N_BYTES, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, N_BYTES, &p, &f->err));
    fill_words(h + 8, N - 8, 5);
    DO_OK(ps_device_locked_dptr(f->d, h + 8, &alias, &f->err));
    DO_OK(op_copy(f, f->compute, p, alias, N_BYTES - 32, NULL));
    DO_OK(ps_device_copy_out(f->d, f->compute, h + N, p, N_BYTES - 32, &f->err));
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    PS_CHECK_EQ_U64(count_wrong(h + N, N - 8, 5), 0);
    uint32_t here = 0;
    DO_FAIL(ps_device_locked_dptr(f->d, &here, &alias, &f->err), PS_EINTERNAL);
    PS_CHECK(ps_dptr_is_null(alias));
}

/* ---- order ---- */

DEVICE_TEST(one_stream_keeps_order)
{
    uint32_t *h = NULL;
    ps_dptr p;
    DO_OK(ps_device_locked_alloc(f->d, 201 * sizeof *h, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, 8, &p, &f->err));
    for (uint32_t i = 0; i < 100; i++) h[i] = i + 1;
    for (uint32_t i = 0; i < 100; i++) {
        DO_OK(ps_device_copy_in(f->d, f->compute, p, h + i, 4, &f->err));
        DO_OK(op_copy(f, f->compute, ps_dptr_add(p, 4), p, 4, NULL));
        DO_OK(ps_device_copy_out(f->d, f->compute, h + 100 + i, ps_dptr_add(p, 4), 4, &f->err));
    }
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    for (uint32_t i = 0; i < 100; i++) PS_CHECK_EQ_U64(h[100 + i], i + 1);
}

/* Weights in on one stream, computed on another, results out on a third; slots reused. */
DEVICE_TEST(streams_wait_for_events)
{
    enum { SHARDS = 24, SLOTS = 2 };
    uint32_t *h = NULL;
    ps_dptr slots, results;
    ps_event *filled[SLOTS], *freed[SLOTS], *done[SHARDS];
    DO_OK(ps_device_locked_alloc(f->d, 2 * SHARDS * N_BYTES, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, SLOTS * N_BYTES, &slots, &f->err));
    DO_OK(ps_device_alloc(f->d, SHARDS * N_BYTES, &results, &f->err));
    for (int i = 0; i < SLOTS; i++) {
        DO_OK(ps_event_create(f->d, &filled[i], &f->err));
        DO_OK(ps_event_create(f->d, &freed[i], &f->err));
    }
    for (uint32_t i = 0; i < SHARDS; i++) fill_words(h + i * N, N, i + 1);
    for (uint32_t i = 0; i < SHARDS; i++) {
        ps_dptr slot = ps_dptr_add(slots, i % SLOTS * N_BYTES),
                result = ps_dptr_add(results, (uint64_t)i * N_BYTES);
        DO_OK(ps_event_create(f->d, &done[i], &f->err));
        if (i >= SLOTS) DO_OK(ps_device_wait(f->d, f->h2d, freed[i % SLOTS], &f->err));
        DO_OK(ps_device_copy_in(f->d, f->h2d, slot, h + i * N, N_BYTES, &f->err));
        DO_OK(ps_device_record(f->d, f->h2d, filled[i % SLOTS], &f->err));
        DO_OK(ps_device_wait(f->d, f->compute, filled[i % SLOTS], &f->err));
        DO_OK(op_copy(f, f->compute, result, slot, N_BYTES, NULL));
        DO_OK(ps_device_record(f->d, f->compute, freed[i % SLOTS], &f->err));
        DO_OK(ps_device_record(f->d, f->compute, done[i], &f->err));
        DO_OK(ps_device_wait(f->d, f->d2h, done[i], &f->err));
        DO_OK(ps_device_copy_out(f->d, f->d2h, h + (SHARDS + i) * N, result, N_BYTES, &f->err));
    }
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
    for (uint32_t i = 0; i < SHARDS; i++)
        PS_CHECK_EQ_U64(count_wrong(h + (SHARDS + i) * N, N, i + 1), 0);
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
}

/* A wait means the last record before it: neither an earlier nor a later one. */
DEVICE_TEST(waits_bind_to_the_record_before_them)
{
    uint32_t *h = NULL;
    ps_event *e;
    ps_stream *helper;
    ps_dptr p;
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, 64, &p, &f->err));
    DO_OK(ps_event_create(f->d, &e, &f->err));
    DO_OK(ps_stream_create(f->d, PS_STREAM_COMPUTE, &helper, &f->err));
    uint32_t *flag = h, *out = h + 16;
    h[32] = 1;
    h[33] = 2;

    /* compute: write 1, record, then stand still until the flag, write 2, record again. d2h waits
     * between the two. */
    DO_OK(ps_device_copy_in(f->d, f->compute, p, h + 32, 4, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_OK(ps_device_wait(f->d, f->d2h, e, &f->err));
    DO_OK(ps_device_copy_out(f->d, f->d2h, out, p, 4, &f->err));
    DO_OK(ps_device_flag_wait(f->d, f->compute, flag, 7, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->compute, p, h + 33, 4, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err)); /* hangs if bound to the second */
    PS_CHECK_EQ_U64(out[0], 1);
    /* The second wait binds to the second record, although the first is complete. */
    DO_OK(ps_device_wait(f->d, f->d2h, e, &f->err));
    DO_OK(ps_device_copy_out(f->d, f->d2h, out + 1, p, 4, &f->err));
    /* Recording it on a third stream, where it completes at once, does not release that wait. */
    DO_OK(ps_device_record(f->d, f->h2d, e, &f->err));
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
    pause_ms(2);
    DO_OK(ps_device_flag_set(f->d, helper, flag, 7, &f->err));
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
    PS_CHECK_EQ_U64(out[1], 2);
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_sync(f->d, helper, &f->err));
    ps_stream_destroy(f->d, helper);
}

DEVICE_TEST(wrong_waits_are_refused)
{
    ps_event *fresh, *on_cpu, *on_accel;
    uint64_t ns = 0;
    DO_OK(ps_event_create(f->d, &fresh, &f->err));
    DO_OK(ps_event_create(f->d, &on_cpu, &f->err));
    DO_OK(ps_event_create(f->d, &on_accel, &f->err));
    DO_FAIL(ps_device_wait(f->d, f->compute, fresh, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_record(f->d, f->cpu, on_cpu, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, on_accel, &f->err));
    DO_FAIL(ps_device_wait(f->d, f->compute, on_cpu, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_wait(f->d, f->cpu, on_accel, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_FAIL(ps_device_elapsed(f->d, on_cpu, on_accel, &ns, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_elapsed(f->d, on_accel, fresh, &ns, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_wait(f->d, NULL, on_accel, &f->err), PS_EINTERNAL);
    ps_event_destroy(f->d, on_cpu);
    ps_event_destroy(f->d, NULL);
}

DEVICE_TEST(elapsed)
{
    ps_event *a, *b;
    ps_dptr p;
    uint64_t ns = 0;
    DO_OK(ps_event_create(f->d, &a, &f->err));
    DO_OK(ps_event_create(f->d, &b, &f->err));
    DO_OK(ps_device_alloc(f->d, 8 << 20, &p, &f->err));
    const ps_cost cost = {.bytes = 8 << 20};
    for (int role = 0; role < 2; role++) {
        ps_stream *s = role == 0 ? f->compute : f->cpu;
        DO_OK(ps_device_record(f->d, s, a, &f->err));
        if (role == 0) DO_OK(op_copy(f, s, p, ps_dptr_add(p, 4 << 20), 4 << 20, &cost));
        DO_OK(ps_device_record(f->d, s, b, &f->err));
        DO_OK(ps_device_sync(f->d, s, &f->err));
        DO_OK(ps_device_elapsed(f->d, a, b, &ns, &f->err));
        if (role == 0) PS_CHECK(ns > 100 && ns < 10000000000u);
        DO_OK(ps_device_elapsed(f->d, a, a, &ns, &f->err));
        PS_CHECK_EQ_U64(ns, 0);
    }
    /* The stream's clock does not run backwards. */
    uint64_t before = ps_stream_time_ns(f->d, f->compute);
    DO_OK(op_copy(f, f->compute, p, ps_dptr_add(p, 4 << 20), 4 << 20, &cost));
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    PS_CHECK(ps_stream_time_ns(f->d, f->compute) > before);
}

/* More records than queue places, all of one event, with waits in between: records must be
 * recycled, not run out. */
/* ---- marks ---- */

/* Times of all streams are on one clock: what happens behind an event, or a flag, is not earlier.
 * On cuda the CPU's clock is another, tied to within *error. */
DEVICE_TEST(marks_tell_when)
{
    static const ps_cost cost = {.bytes = 1000};
    uint32_t *flag = NULL;
    uint64_t now = 0, error = 1, at[6];
    ps_event *mark[6], *handed = NULL;
    ps_dptr a, b;
    DO_OK(ps_device_locked_alloc(f->d, 64, (void **)&flag, &f->err));
    DO_OK(ps_device_alloc(f->d, 4096, &a, &f->err));
    DO_OK(ps_device_alloc(f->d, 4096, &b, &f->err));
    DO_OK(ps_event_create(f->d, &handed, &f->err));
    for (int i = 0; i < 6; i++) DO_OK(ps_event_create(f->d, &mark[i], &f->err));
    DO_OK(ps_device_tie_clocks(f->d, &now, &error, &f->err));
    PS_CHECK(f->kind == PS_DEVICE_CUDA || error == 0);
    for (int round = 0; round < 3; round++) { /* the same events again and again */
        __atomic_store_n(flag, 0, __ATOMIC_RELEASE);
        DO_OK(ps_device_mark(f->d, f->compute, mark[0], &f->err));
        DO_OK(op_copy(f, f->compute, b, a, 4096, &cost));
        DO_OK(ps_device_mark(f->d, f->compute, mark[1], &f->err));
        DO_OK(ps_device_record(f->d, f->compute, handed, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->compute, flag, 1, &f->err));
        DO_OK(ps_device_wait(f->d, f->d2h, handed, &f->err));
        DO_OK(ps_device_mark(f->d, f->d2h, mark[2], &f->err));
        DO_OK(ps_device_mark(f->d, f->cpu, mark[3], &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->cpu, flag, 1, &f->err));
        DO_OK(ps_device_mark(f->d, f->cpu, mark[4], &f->err));
        DO_OK(ps_device_mark(f->d, f->h2d, mark[5], &f->err));
        ps_stream *streams[] = {f->compute, f->h2d, f->d2h, f->cpu};
        for (int i = 0; i < 4; i++) DO_OK(ps_device_sync(f->d, streams[i], &f->err));
        for (int i = 0; i < 6; i++) DO_OK(ps_device_mark_time(f->d, mark[i], &at[i], &f->err));
        PS_CHECK(at[0] + error >= now && at[1] >= at[0] && at[2] >= at[1]);
        PS_CHECK(at[4] >= at[3] && at[4] + error >= at[1] && at[5] + error >= now);
        if (f->kind == PS_DEVICE_EMU) PS_CHECK(at[1] > at[0]);
        /* The engine's thread has seen all of it: what comes next is later on every stream. */
        for (int i = 0; i < 6; i++) now = at[i] > now ? at[i] : now;
        if (f->kind == PS_DEVICE_CUDA)
            now = 0;
        else
            DO_OK(ps_device_tie_clocks(f->d, &at[0], &error, &f->err));
        if (f->kind == PS_DEVICE_EMU) PS_CHECK_EQ_U64(at[0], now);
    }
    for (int i = 0; i < 6; i++) ps_event_destroy(f->d, mark[i]);
}

DEVICE_TEST(marks_are_no_events)
{
    ps_event *e = NULL, *mark = NULL;
    uint64_t ns = 1;
    DO_OK(ps_event_create(f->d, &e, &f->err));
    DO_OK(ps_event_create(f->d, &mark, &f->err));
    DO_FAIL(ps_device_mark_time(f->d, mark, &ns, &f->err), PS_EINTERNAL);
    PS_CHECK_EQ_U64(ns, 0);
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_FAIL(ps_device_mark(f->d, f->compute, e, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_mark(f->d, f->compute, mark, &f->err));
    DO_FAIL(ps_device_wait(f->d, f->h2d, mark, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_mark_time(f->d, mark, &ns, &f->err));
}

/* Marks in a graph are stamped by every replay, also on a stream that joined it. */
DEVICE_TEST(marks_in_graphs)
{
    ps_event *fork = NULL, *join = NULL, *mark[2];
    ps_graph *g = NULL;
    uint64_t now = 0, error = 0, last[2] = {0, 0};
    ps_dptr a, b;
    static const ps_cost cost = {.bytes = 1000};
    DO_OK(ps_device_alloc(f->d, 4096, &a, &f->err));
    DO_OK(ps_device_alloc(f->d, 4096, &b, &f->err));
    DO_OK(ps_event_create(f->d, &fork, &f->err));
    DO_OK(ps_event_create(f->d, &join, &f->err));
    for (int i = 0; i < 2; i++) DO_OK(ps_event_create(f->d, &mark[i], &f->err));
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, fork, &f->err));
    DO_OK(ps_device_wait(f->d, f->h2d, fork, &f->err));
    DO_OK(op_copy(f, f->h2d, b, a, 4096, &cost));
    DO_OK(ps_device_mark(f->d, f->h2d, mark[0], &f->err));
    DO_OK(ps_device_record(f->d, f->h2d, join, &f->err));
    DO_OK(ps_device_wait(f->d, f->compute, join, &f->err));
    DO_OK(ps_device_mark(f->d, f->compute, mark[1], &f->err));
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    DO_OK(ps_device_tie_clocks(f->d, &now, &error, &f->err));
    for (int round = 0; round < 3; round++) {
        uint64_t at[2];
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        for (int i = 0; i < 2; i++) DO_OK(ps_device_mark_time(f->d, mark[i], &at[i], &f->err));
        PS_CHECK(at[0] > last[1] && at[1] >= at[0]);
        memcpy(last, at, sizeof last);
    }
    ps_graph_destroy(f->d, g);
    for (int i = 0; i < 2; i++) ps_event_destroy(f->d, mark[i]);
}

DEVICE_TEST(events_are_recorded_for_ever)
{
    ps_event *e;
    DO_OK(ps_event_create(f->d, &e, &f->err));
    int rounds = strcmp(f->name, "emu with delays") == 0 ? 200 : 6000;
    for (int i = 0; i < rounds; i++) {
        DO_OK(ps_device_record(f->d, i % 2 == 0 ? f->compute : f->h2d, e, &f->err));
        DO_OK(ps_device_wait(f->d, i % 2 == 0 ? f->h2d : f->compute, e, &f->err));
    }
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
}

/* ---- launches ---- */

typedef struct probe_args {
    unsigned char bytes[PS_RUN_ARGS_BYTES - 8];
    struct probe_result *result;
} probe_args;
typedef struct probe_result {
    ps_launch launch;
    int n_threads;
    bool args_arrived;
} probe_result;

static ps_status run_probe(const ps_launch *launch, const void *args)
{
    const probe_args *a = args;
    a->result->launch = *launch;
    a->result->n_threads = launch->pool != NULL ? ps_pool_n_threads(launch->pool) : 0;
    a->result->args_arrived = true;
    for (size_t i = 0; i < sizeof a->bytes; i++)
        if (a->bytes[i] != (unsigned char)(i * 3)) a->result->args_arrived = false;
    if (launch->scratch_bytes > 0) memset(launch->scratch, 0x11, launch->scratch_bytes);
    return PS_OK;
}

DEVICE_TEST(launchers_get_what_the_header_says)
{
    ps_stream *streams[] = {f->compute, f->h2d, f->cpu};
    const void *scratch[3] = {0};
    for (int i = 0; i < 3; i++) {
        probe_result result = {0};
        probe_args a = {.result = &result};
        for (size_t k = 0; k < sizeof a.bytes; k++) a.bytes[k] = (unsigned char)(k * 3);
        DO_OK(ps_device_run(f->d, streams[i], run_probe, &a, sizeof a, NULL, &f->err));
        memset(a.bytes, 0, sizeof a.bytes); /* args are the caller's again after the call */
        DO_OK(ps_device_sync(f->d, streams[i], &f->err));
        PS_CHECK(result.args_arrived);
        PS_CHECK(result.launch.info == &f->d->info);
        PS_CHECK(result.launch.abort != NULL);
        bool on_gpu = f->kind == PS_DEVICE_CUDA && streams[i] != f->cpu;
        PS_CHECK_EQ(result.launch.cuda_stream != NULL, on_gpu);
        if (on_gpu) continue;
        bool emulated = f->kind == PS_DEVICE_EMU && streams[i] != f->cpu;
        PS_CHECK_EQ_U64(result.launch.tag, emulated ? PS_EMU_TAG : 0);
        PS_CHECK_EQ_U64(result.launch.scratch_bytes, 4096);
        PS_CHECK((uintptr_t)result.launch.scratch % 64 == 0);
        PS_CHECK(result.n_threads >= 1);
        if (streams[i] == f->cpu || (emulated && streams[i] == f->compute))
            PS_CHECK_EQ(result.n_threads, 2);
        scratch[i] = result.launch.scratch;
    }
    PS_CHECK(scratch[0] == NULL || scratch[0] != scratch[2]);
    PS_CHECK(ps_cpu_ptr(&(ps_launch){.tag = PS_EMU_TAG}, (ps_dptr){0}) == NULL);
    DO_FAIL(ps_device_run(f->d, f->compute, NULL, NULL, 0, NULL, &f->err), PS_EINTERNAL);
    probe_args big[2] = {0};
    DO_FAIL(
        ps_device_run(f->d, f->compute, run_probe, big, sizeof big, NULL, &f->err), PS_EINTERNAL);
}

/* ---- failures ---- */

static ps_status run_fail(const ps_launch *launch, const void *args)
{
    (void)launch;
    return *(const ps_status *)args;
}

static ps_status run_count(const ps_launch *launch, const void *args)
{
    (void)launch;
    (**(uint32_t *const *)args)++;
    return PS_OK;
}

/* On the CPU stream of every device; accelerator streams of CUDA report launch errors at once. */
DEVICE_TEST(failures_stick_until_sync)
{
    ps_stream *streams[] = {f->cpu, f->compute};
    for (int i = 0; i < 2; i++) {
        ps_stream *s = streams[i];
        if (f->kind == PS_DEVICE_CUDA && s == f->compute) {
            ps_status cause = PS_EUNSUPPORTED;
            DO_FAIL(ps_device_run(f->d, s, run_fail, &cause, sizeof cause, NULL, &f->err),
                PS_EUNSUPPORTED);
            DO_OK(ps_device_sync(f->d, s, &f->err));
            continue;
        }
        uint32_t n_runs = 0, *count = &n_runs;
        uint32_t *flag = NULL;
        ps_event *e;
        ps_status first = PS_EUNSUPPORTED, second = PS_EFORMAT;
        DO_OK(ps_event_create(f->d, &e, &f->err));
        DO_OK(ps_device_locked_alloc(f->d, 64, (void **)&flag, &f->err));
        DO_OK(ps_device_run(f->d, s, run_count, &count, sizeof count, NULL, &f->err));
        DO_OK(ps_device_run(
            f->d, s, run_fail, &first, sizeof first, &(ps_cost){.op = 5, .tick = 1234}, &f->err));
        DO_OK(ps_device_run(
            f->d, s, run_fail, &second, sizeof second, &(ps_cost){.op = 6, .tick = 1235}, &f->err));
        DO_OK(ps_device_run(f->d, s, run_count, &count, sizeof count, NULL, &f->err));
        /* Behind the failure events are still recorded and flags still set: nobody may be left
         * waiting. */
        DO_OK(ps_device_record(f->d, s, e, &f->err));
        DO_OK(ps_device_flag_set(f->d, s, flag, 3, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->h2d, flag, 3, &f->err));
        DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
        DO_FAIL(ps_device_sync(f->d, s, &f->err), PS_EUNSUPPORTED);
        PS_CHECK(strstr(f->err.message, "op 5 of tick 1234") != NULL);
        PS_CHECK(strstr(f->err.message,
                     ps_stream_role_name(s == f->cpu ? PS_STREAM_CPU : PS_STREAM_COMPUTE)) != NULL);
        PS_CHECK_EQ_U64(n_runs, 1);
        DO_OK(ps_device_sync(f->d, s, &f->err));
        DO_OK(ps_device_run(f->d, s, run_count, &count, sizeof count, NULL, &f->err));
        DO_OK(ps_device_sync(f->d, s, &f->err));
        PS_CHECK_EQ_U64(n_runs, 2);
    }
}

/* ---- flags ---- */

typedef struct bump_args {
    uint32_t *counter;
    uint32_t expected;
} bump_args;

static ps_status run_bump(const ps_launch *launch, const void *args)
{
    (void)launch;
    const bump_args *a = args;
    if (*a->counter != a->expected) return PS_EINTERNAL;
    (*a->counter)++;
    return PS_OK;
}

/* A token of a hybrid model: the GPU copies a counter out, hands over, the CPU raises it, hands
 * back. */
DEVICE_TEST(flags_ping_pong)
{
    uint32_t rounds = strcmp(f->name, "emu with delays") == 0 ? 100 : 1000;
    uint32_t *h = NULL;
    ps_dptr p;
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, 4, &p, &f->err));
    uint32_t *to_cpu = h, *to_gpu = h + 32, *counter = h + 64;
    for (uint32_t i = 0; i < rounds; i++) {
        DO_OK(ps_device_flag_wait(f->d, f->cpu, to_cpu, i + 1, &f->err));
        bump_args bump = {.counter = counter, .expected = i};
        DO_OK(ps_device_run(f->d, f->cpu, run_bump, &bump, sizeof bump, NULL, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->cpu, to_gpu, i + 1, &f->err));
        DO_OK(ps_device_copy_in(f->d, f->compute, p, counter, 4, &f->err));
        DO_OK(ps_device_copy_out(f->d, f->compute, counter, p, 4, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->compute, to_cpu, i + 1, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->compute, to_gpu, i + 1, &f->err));
    }
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
    PS_CHECK_EQ_U64(*counter, rounds);

    uint32_t here = 0;
    DO_FAIL(ps_device_flag_set(f->d, f->cpu, &here, 1, &f->err), PS_EINTERNAL);
    DO_FAIL(ps_device_flag_wait(f->d, f->cpu, (uint32_t *)(void *)((char *)h + 2), 1, &f->err),
        PS_EINTERNAL);
}

/* A wait whose value is there already goes on; one word may be handed from stream to stream. */
DEVICE_TEST(flags_between_accelerator_streams)
{
    uint32_t *h = NULL;
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    ps_stream *ring[] = {f->compute, f->h2d, f->d2h, f->cpu};
    DO_OK(ps_device_flag_wait(f->d, f->compute, h, 0, &f->err));
    for (uint32_t i = 0; i < 40; i++) {
        DO_OK(ps_device_flag_wait(f->d, ring[i % 4], h, i, &f->err));
        DO_OK(ps_device_flag_set(f->d, ring[i % 4], h, i + 1, &f->err));
    }
    for (int i = 0; i < 4; i++) DO_OK(ps_device_sync(f->d, ring[i], &f->err));
    PS_CHECK_EQ_U64(__atomic_load_n(h, __ATOMIC_ACQUIRE), 40);
}

static void *abort_later(void *arg)
{
    pause_ms(5);
    ps_device_set_abort(arg, 1);
    return NULL;
}

/* A prompt cut into small chunks hands over thousands of times in one pass, each time by a word of
 * its own. */
DEVICE_TEST(thousands_of_flags)
{
    enum { N_FLAGS = 6000, STRIDE = 16 };
    uint32_t *h = NULL;
    DO_OK(ps_device_locked_alloc(f->d, N_FLAGS * STRIDE * 4, (void **)&h, &f->err));
    memset(h, 0, N_FLAGS * STRIDE * 4);
    for (int i = 0; i < N_FLAGS; i++) {
        DO_OK(ps_device_flag_set(f->d, f->compute, h + i * STRIDE, 1, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->cpu, h + i * STRIDE, 1, &f->err));
    }
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
    PS_CHECK_EQ(h[(N_FLAGS - 1) * STRIDE], 1);
    ps_device_locked_free(f->d, h);
}

DEVICE_TEST(abort_releases_flag_waits)
{
    uint32_t *h = NULL;
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    ps_stream *streams[] = {f->compute, f->cpu, f->h2d};
    for (uint32_t round = 0; round < 3; round++) {
        for (int i = 0; i < 3; i++) DO_OK(ps_device_flag_wait(f->d, streams[i], h, 99, &f->err));
        pthread_t thread;
        PS_REQUIRE(pthread_create(&thread, NULL, abort_later, f->d) == 0);
        for (int i = 0; i < 3; i++) DO_OK(ps_device_sync(f->d, streams[i], &f->err));
        pthread_join(thread, NULL);
        /* Cleared, everything works as before, and flags wait again. */
        ps_device_set_abort(f->d, 0);
        DO_OK(ps_device_flag_wait(f->d, f->cpu, h, round + 1, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->compute, h, round + 1, &f->err));
        DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    }
}

/* ---- graphs ---- */

/* One captured stream, replayed: each replay reads what its input holds by then. */
DEVICE_TEST(graph_replays)
{
    uint32_t *h = NULL;
    ps_dptr p;
    ps_graph *g;
    DO_OK(ps_device_locked_alloc(f->d, 2 * N_BYTES, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, 2 * N_BYTES, &p, &f->err));
    fill_words(h, N, 1000);
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->compute, p, h, N_BYTES, &f->err));
    DO_OK(op_copy(f, f->compute, ps_dptr_add(p, N_BYTES), p, N_BYTES, NULL));
    DO_OK(ps_device_copy_out(f->d, f->compute, h + N, ps_dptr_add(p, N_BYTES), N_BYTES, &f->err));
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    PS_CHECK_EQ_U64(h[N], 0); /* recorded, not run */
    for (uint32_t i = 0; i < 100; i++) {
        fill_words(h, N, i);
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        PS_CHECK_EQ_U64(count_wrong(h + N, N, i), 0);
    }
    /* Any stream may launch it, also while another launch is under way. */
    DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
    DO_OK(ps_graph_launch(f->d, f->d2h, g, &f->err));
    DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
    DO_OK(ps_device_sync(f->d, f->d2h, &f->err));
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    ps_graph_destroy(f->d, g);
    ps_graph_destroy(f->d, NULL);
}

/* Capture of two slots in flight on three streams: the copy stream forks off and is joined back. */
DEVICE_TEST(graph_of_several_streams)
{
    enum { SHARDS = 6, SLOTS = 2 };
    uint32_t *h = NULL;
    ps_dptr slots, results;
    ps_event *fork, *filled[SLOTS], *freed[SLOTS], *computed, *saved;
    DO_OK(ps_device_locked_alloc(f->d, 2 * SHARDS * N_BYTES, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, SLOTS * N_BYTES, &slots, &f->err));
    DO_OK(ps_device_alloc(f->d, SHARDS * N_BYTES, &results, &f->err));
    DO_OK(ps_event_create(f->d, &fork, &f->err));
    DO_OK(ps_event_create(f->d, &computed, &f->err));
    DO_OK(ps_event_create(f->d, &saved, &f->err));
    for (int i = 0; i < SLOTS; i++) {
        DO_OK(ps_event_create(f->d, &filled[i], &f->err));
        DO_OK(ps_event_create(f->d, &freed[i], &f->err));
    }
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, fork, &f->err));
    DO_OK(ps_device_wait(f->d, f->h2d, fork, &f->err));
    for (uint32_t i = 0; i < SHARDS; i++) {
        ps_dptr slot = ps_dptr_add(slots, i % SLOTS * N_BYTES),
                result = ps_dptr_add(results, (uint64_t)i * N_BYTES);
        if (i >= SLOTS) DO_OK(ps_device_wait(f->d, f->h2d, freed[i % SLOTS], &f->err));
        DO_OK(ps_device_copy_in(f->d, f->h2d, slot, h + i * N, N_BYTES, &f->err));
        DO_OK(ps_device_record(f->d, f->h2d, filled[i % SLOTS], &f->err));
        DO_OK(ps_device_wait(f->d, f->compute, filled[i % SLOTS], &f->err));
        DO_OK(op_copy(f, f->compute, result, slot, N_BYTES, NULL));
        DO_OK(ps_device_record(f->d, f->compute, freed[i % SLOTS], &f->err));
        DO_OK(ps_device_record(f->d, f->compute, computed, &f->err));
        DO_OK(ps_device_wait(f->d, f->d2h, computed, &f->err));
        DO_OK(ps_device_copy_out(f->d, f->d2h, h + (SHARDS + i) * N, result, N_BYTES, &f->err));
    }
    DO_OK(ps_device_record(f->d, f->d2h, saved, &f->err));
    DO_OK(ps_device_wait(f->d, f->compute, saved, &f->err));
    ps_graph *g;
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    /* The streams are free again: this runs at once, and an event of the graph says nothing to
     * anybody else. */
    DO_OK(ps_device_sync(f->d, f->h2d, &f->err));
    DO_FAIL(ps_device_wait(f->d, f->h2d, saved, &f->err), PS_EINTERNAL);
    DO_OK(ps_device_record(f->d, f->h2d, saved, &f->err));
    DO_OK(ps_device_wait(f->d, f->compute, saved, &f->err));
    uint32_t replays = strcmp(f->name, "emu with delays") == 0 ? 20 : 100;
    for (uint32_t r = 0; r < replays; r++) {
        for (uint32_t i = 0; i < SHARDS; i++) fill_words(h + i * N, N, r * 100 + i);
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        for (uint32_t i = 0; i < SHARDS; i++)
            PS_CHECK_EQ_U64(count_wrong(h + (SHARDS + i) * N, N, r * 100 + i), 0);
    }
}

/* A hybrid token as one graph on the GPU, with the CPU stream answering beside it. Flag values
 * are 1..n in each replay. */
DEVICE_TEST(graph_with_flags)
{
    enum { HANDOFFS = 4 };
    uint32_t replays = strcmp(f->name, "emu with delays") == 0 ? 20 : 100;
    uint32_t *h = NULL;
    ps_dptr p;
    DO_OK(ps_device_locked_alloc(f->d, 4096, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, 4, &p, &f->err));
    uint32_t *to_cpu = h, *to_gpu = h + 32, *counter = h + 64;
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    for (uint32_t i = 1; i <= HANDOFFS; i++) {
        DO_OK(ps_device_copy_in(f->d, f->compute, p, counter, 4, &f->err));
        DO_OK(ps_device_copy_out(f->d, f->compute, counter, p, 4, &f->err));
        DO_OK(ps_device_flag_set(f->d, f->compute, to_cpu, i, &f->err));
        DO_OK(ps_device_flag_wait(f->d, f->compute, to_gpu, i, &f->err));
    }
    ps_graph *g;
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    for (uint32_t r = 0; r < replays; r++) {
        DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
        for (uint32_t i = 1; i <= HANDOFFS; i++) {
            DO_OK(ps_device_flag_wait(f->d, f->cpu, to_cpu, i, &f->err));
            bump_args bump = {.counter = counter, .expected = r * HANDOFFS + i - 1};
            DO_OK(ps_device_run(f->d, f->cpu, run_bump, &bump, sizeof bump, NULL, &f->err));
            DO_OK(ps_device_flag_set(f->d, f->cpu, to_gpu, i, &f->err));
        }
        if (r % 16 == 15) DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    }
    DO_OK(ps_device_sync(f->d, f->compute, &f->err));
    DO_OK(ps_device_sync(f->d, f->cpu, &f->err));
    PS_CHECK_EQ_U64(*counter, replays * HANDOFFS);
}

/* Each way to break a capture: end returns the failure and no graph, and the next capture works. */
enum break_kind {
    BREAK_NOTHING,
    BREAK_ENQUEUE,  /* an enqueue fails */
    BREAK_UNJOINED, /* a forked stream is left out */
    BREAK_SYNC,     /* a captured stream is synchronised */
    BREAK_OUTSIDE,  /* a wait for an event from outside */
    BREAK_LAUNCH,   /* a graph launched into a capture */
    BREAK_FREE,     /* memory is freed meanwhile */
    BREAK_COUNT
};

static void capture_broken(
    fixture *f, enum break_kind kind, ps_graph *other, ps_graph **out, ps_status *status)
{
    static char pageable[64];
    ps_event *e, *outside;
    ps_dptr p, q;
    void *h = NULL;
    DO_OK(ps_event_create(f->d, &e, &f->err));
    DO_OK(ps_event_create(f->d, &outside, &f->err));
    DO_OK(ps_device_alloc(f->d, 256, &p, &f->err));
    DO_OK(ps_device_alloc(f->d, 256, &q, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, 64, &h, &f->err));
    DO_OK(ps_device_record(f->d, f->d2h, outside, &f->err));
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->compute, p, h, 64, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_OK(ps_device_wait(f->d, f->h2d, e, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->h2d, q, h, 64, &f->err));
    switch (kind) {
    case BREAK_ENQUEUE:
        DO_FAIL(ps_device_copy_in(f->d, f->h2d, p, pageable, 64, &f->err), PS_EINTERNAL);
        break;
    case BREAK_SYNC: DO_FAIL(ps_device_sync(f->d, f->compute, &f->err), PS_EINTERNAL); break;
    case BREAK_OUTSIDE:
        DO_FAIL(ps_device_wait(f->d, f->compute, outside, &f->err), PS_EINTERNAL);
        break;
    case BREAK_LAUNCH:
        DO_FAIL(ps_graph_launch(f->d, f->compute, other, &f->err), PS_EINTERNAL);
        break;
    case BREAK_FREE: ps_device_free(f->d, q); break;
    case BREAK_NOTHING:
    case BREAK_UNJOINED:
    case BREAK_COUNT: break;
    }
    DO_FAIL(ps_graph_begin(f->d, f->d2h, &f->err), PS_EINTERNAL); /* one capture at a time */
    DO_OK(ps_device_record(f->d, f->h2d, e, &f->err));
    if (kind != BREAK_UNJOINED) DO_OK(ps_device_wait(f->d, f->compute, e, &f->err));
    f->err = (ps_err){0};
    *status = ps_graph_end(f->d, f->compute, out, &f->err);
}

DEVICE_TEST(broken_captures)
{
    ps_graph *good = NULL;
    ps_status status = PS_EINTERNAL;
    capture_broken(f, BREAK_NOTHING, NULL, &good, &status);
    PS_CHECK_EQ(status, PS_OK);
    for (int kind = BREAK_ENQUEUE; kind < BREAK_COUNT; kind++) {
        ps_test_case("%s, break %d", f->name, kind);
        ps_graph *g = NULL, *next = NULL;
        capture_broken(f, (enum break_kind)kind, good, &g, &status);
        PS_CHECK_EQ(status, PS_EINTERNAL);
        PS_CHECK(g == NULL && f->err.message[0] != '\0');
        capture_broken(f, BREAK_NOTHING, NULL, &next, &status);
        PS_CHECK_EQ(status, PS_OK);
        PS_REQUIRE(next != NULL);
        DO_OK(ps_graph_launch(f->d, f->compute, next, &f->err));
        DO_OK(ps_graph_launch(f->d, f->compute, good, &f->err));
        DO_OK(ps_device_sync(f->d, f->compute, &f->err));
        ps_graph_destroy(f->d, next);
    }
    DO_FAIL(ps_graph_begin(f->d, f->cpu, &f->err), PS_EINTERNAL);
    ps_graph *none = NULL;
    DO_FAIL(ps_graph_end(f->d, f->compute, &none, &f->err), PS_EINTERNAL);
}

/* ---- closing with everything in flight ---- */

DEVICE_TEST(close_releases_everything)
{
    uint32_t *h = NULL;
    ps_dptr p;
    ps_graph *g;
    ps_event *e;
    void *plain = ps_alloc(3 << 20, 1);
    PS_REQUIRE(plain != NULL);
    DO_OK(ps_device_lock(f->d, plain, 3 << 20, &f->err));
    DO_OK(ps_device_locked_alloc(f->d, N_BYTES, (void **)&h, &f->err));
    DO_OK(ps_device_alloc(f->d, N_BYTES, &p, &f->err));
    DO_OK(ps_event_create(f->d, &e, &f->err));
    DO_OK(ps_graph_begin(f->d, f->compute, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_OK(ps_device_wait(f->d, f->h2d, e, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->h2d, p, h, N_BYTES, &f->err));
    DO_OK(ps_device_record(f->d, f->h2d, e, &f->err));
    DO_OK(ps_device_wait(f->d, f->compute, e, &f->err));
    DO_OK(ps_graph_end(f->d, f->compute, &g, &f->err));
    DO_OK(ps_device_flag_wait(f->d, f->compute, h, 1, &f->err));
    DO_OK(ps_device_flag_wait(f->d, f->cpu, h, 2, &f->err));
    DO_OK(ps_graph_launch(f->d, f->compute, g, &f->err));
    DO_OK(ps_device_record(f->d, f->compute, e, &f->err));
    DO_OK(ps_device_wait(f->d, f->d2h, e, &f->err));
    /* A capture that nobody ends. */
    DO_OK(ps_graph_begin(f->d, f->h2d, &f->err));
    DO_OK(ps_device_copy_in(f->d, f->h2d, p, h, N_BYTES, &f->err));
    ps_device *d = f->d;
    f->d = NULL;
    ps_device_close(d);
    ps_free(plain);
}

/* Every allocation of opening, creating, capturing and closing refused once. */
static ps_status use_everything(const char *kind, ps_err *err)
{
    ps_device *d = NULL;
    ps_stream *s = NULL, *t = NULL;
    ps_event *e = NULL;
    ps_graph *g = NULL;
    ps_dptr p = {0};
    uint32_t *h = NULL;
    ps_device_options options = {.threads = 2, .cpu_scratch_bytes = 64, .emu_vram_bytes = 1 << 20};
    ps_status status = ps_device_open(kind, &options, &d, err);
    if (status == PS_OK) status = ps_stream_create(d, PS_STREAM_COMPUTE, &s, err);
    if (status == PS_OK) status = ps_stream_create(d, PS_STREAM_CPU, &t, err);
    if (status == PS_OK) status = ps_stream_create(d, PS_STREAM_H2D, &t, err);
    if (status == PS_OK) status = ps_event_create(d, &e, err);
    if (status == PS_OK) status = ps_device_alloc(d, 4096, &p, err);
    if (status == PS_OK) status = ps_device_locked_alloc(d, 4096, (void **)&h, err);
    if (status == PS_OK) status = ps_graph_begin(d, s, err);
    bool capturing = status == PS_OK;
    if (status == PS_OK) status = ps_device_record(d, s, e, err);
    if (status == PS_OK) status = ps_device_wait(d, t, e, err);
    if (status == PS_OK) status = ps_device_copy_in(d, t, p, h, 4096, err);
    if (status == PS_OK) status = ps_device_record(d, t, e, err);
    if (status == PS_OK) status = ps_device_wait(d, s, e, err);
    for (uint32_t i = 0; i < 200 && status == PS_OK; i++)
        status = ps_device_flag_set(d, s, h, i, err);
    if (capturing) {
        ps_status end = ps_graph_end(d, s, &g, err);
        if (status == PS_OK) status = end;
    }
    if (status == PS_OK) status = ps_graph_launch(d, s, g, err);
    if (status == PS_OK) status = ps_device_sync(d, s, err);
    ps_device_close(d);
    return status;
}

PS_TEST(oom_open_and_capture)
{
    static const char *const kinds[] = {"host", "emu", "cuda"};
    for (size_t i = 0; i < 3; i++) {
        if (!ps_test_device(kinds[i])) continue;
        uint64_t live = ps_heap_get_stats().live_blocks;
        bool fired = true;
        for (int64_t after = 0; fired && after < 200; after++) {
            ps_test_case("%s, allocation %d", kinds[i], (int)after);
            ps_err err = {0};
            ps_heap_fail_after(after);
            ps_status status = use_everything(kinds[i], &err);
            fired = ps_heap_fail_after(-1);
            PS_CHECK_EQ(status, fired ? PS_ENOMEM : PS_OK);
            if (fired) PS_CHECK(err.message[0] != '\0');
            PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, live);
        }
        PS_CHECK(!fired);
    }
}

PS_TEST_MAIN
