/* test_device.h - what the tests of device/ share: an opened device with one stream of each role,
 * an op that copies, and a loop over the devices that PIPESHARD_TEST_DEVICES names.
 *
 * The op is a copy because CUDA can do that without a kernel of the test's own, and because a copy
 * shows at its output what was in its input at the moment it ran: which is all that a test of order
 * needs.
 */
#ifndef TEST_DEVICE_H
#define TEST_DEVICE_H

#include "device/ps_device.h"

#include <unistd.h>

#include "ps_test.h"

typedef struct fixture {
    ps_device *d;
    const char *name; /* "emu with delays" */
    ps_device_kind kind;
    ps_stream *compute, *h2d, *d2h, *cpu;
    ps_err err;
} fixture;

#define DO_OK(call)                                                                                \
    do {                                                                                           \
        f->err = (ps_err){0};                                                                      \
        PS_REQUIRE_OK(call, &f->err);                                                              \
    } while (0)
/* The call must fail with `want`, with a sentence. */
#define DO_FAIL(call, want)                                                                        \
    do {                                                                                           \
        f->err = (ps_err){0};                                                                      \
        PS_CHECK_STATUS(call, want);                                                               \
        PS_CHECK(f->err.message[0] != '\0');                                                       \
    } while (0)

#if PS_HAVE_CUDA
/* From the CUDA runtime that is linked in anyway; its header is C++ in places. 3 is device to
 * device. */
extern int cudaMemcpyAsync(void *dst, const void *src, size_t n_bytes, int kind, void *stream);
#endif

typedef struct copy_args {
    ps_dptr dst, src;
    uint64_t n_bytes;
} copy_args;

__attribute__((unused)) static ps_status run_copy(const ps_launch *launch, const void *args)
{
    const copy_args *a = args;
#if PS_HAVE_CUDA
    if (launch->cuda_stream != NULL) {
        int rc = cudaMemcpyAsync((void *)(uintptr_t)a->dst.a, (const void *)(uintptr_t)a->src.a,
            a->n_bytes, 3, launch->cuda_stream);
        return rc == 0 ? PS_OK : PS_EDEVICE;
    }
#endif
    memcpy(ps_cpu_ptr(launch, a->dst), ps_cpu_ptr(launch, a->src), a->n_bytes);
    return PS_OK;
}

__attribute__((unused)) static ps_status op_copy(
    fixture *f, ps_stream *s, ps_dptr dst, ps_dptr src, uint64_t n_bytes, const ps_cost *cost)
{
    copy_args a = {.dst = dst, .src = src, .n_bytes = n_bytes};
    return ps_device_run(f->d, s, run_copy, &a, sizeof a, cost, &f->err);
}

/* A pattern that no other (seed, n) shares and that is never poison. */
__attribute__((unused)) static void fill_words(uint32_t *p, uint64_t n, uint32_t seed)
{
    for (uint64_t i = 0; i < n; i++) p[i] = (seed * 2654435761u + (uint32_t)i) & 0x7fffffffu;
}
__attribute__((unused)) static uint64_t count_wrong(const uint32_t *p, uint64_t n, uint32_t seed)
{
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < n; i++)
        wrong += p[i] != ((seed * 2654435761u + (uint32_t)i) & 0x7fffffffu);
    return wrong;
}

__attribute__((unused)) static bool open_fixture(
    fixture *f, const char *kind, const ps_device_options *options)
{
    f->err = (ps_err){0};
    ps_status status = ps_device_open(kind, options, &f->d, &f->err);
    ps_stream **streams[PS_STREAM_COUNT] = {&f->compute, &f->h2d, &f->d2h, &f->cpu};
    for (int role = 0; role < PS_STREAM_COUNT && status == PS_OK; role++)
        status = ps_stream_create(f->d, (ps_stream_role)role, streams[role], &f->err);
    if (status != PS_OK) {
        ps_test_fail(__FILE__, __LINE__, "cannot open %s: %s", kind, f->err.message);
        ps_device_close(f->d);
        return false;
    }
    f->kind = f->d->info.kind;
    return true;
}

typedef void (*device_case)(fixture *f);

/* Runs one case on each device asked for; on emu twice, the second time with random pauses. Nothing
 * may be left of it: no heap block, no descriptor. */
__attribute__((unused)) static void on_each_device(device_case run)
{
    static const struct {
        const char *label, *kind;
        bool delays;
    } variants[] = {{"host", "host", false}, {"emu", "emu", false},
        {"emu with delays", "emu", true}, {"cuda", "cuda", false}};
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        if (!ps_test_device(variants[i].kind)) continue;
        ps_test_case("%s", variants[i].label);
        uint64_t live = ps_heap_get_stats().live_blocks;
        ps_device_options options = {.threads = 2,
            .cpu_scratch_bytes = 4096,
            .emu_vram_bytes = 64 << 20,
            .emu_seed = 17,
            .emu_delays = variants[i].delays};
        fixture f = {.name = variants[i].label};
        if (!open_fixture(&f, variants[i].kind, &options)) continue;
        run(&f);
        ps_device_close(f.d);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, live);
    }
}

#define DEVICE_TEST(test_name)                                                                     \
    static void test_name##_on(fixture *f);                                                        \
    PS_TEST(test_name)                                                                             \
    {                                                                                              \
        on_each_device(test_name##_on);                                                            \
    }                                                                                              \
    static void test_name##_on(fixture *f)

#endif
