/* test_gguf_direct - reads past the page cache: the same bytes as other reads give, whatever the
 * file system or a failing disk says, and nothing left in the cache. */
#include <errno.h>
#include <sys/mman.h>

#include "gguf_writer.h"

#include "base/ps_thread.h"
#include "format/ps_gguf_direct.h"

static gguf_file file; /* large: not on the stack */

enum { DATA_BYTES = 150 * 1000 + 17 }; /* the file ends off every grid */

static const char *write_model(const char *name)
{
    put_header(&file, 1, 1);
    put_kv_str(&file, "general.architecture", "llama");
    put_tensor(&file, "w", PS_FMT_F16, 1, (uint64_t[]){DATA_BYTES / 2}, 0);
    put_data(&file, 32, DATA_BYTES);
    const char *path = in_folder(name);
    write_file(path, file.bytes, file.n);
    return path;
}

/* ---- a file system of our own ---- */

typedef struct disk {
    bool no_direct;        /* no such file can be read at all */
    int64_t n_good, fault; /* direct reads before the fault, which then stays; negative: never */
    uint64_t most_bytes;   /* a direct read; 0: no limit */
    bool interrupt;        /* every second call is */
    _Atomic uint64_t n_calls;
    _Atomic int64_t n_direct;
} disk;

static int64_t disk_pread(void *ctx, int fd, void *dst, uint64_t n, uint64_t offset)
{
    disk *d = ctx;
    uint64_t i_call = d->n_calls++;
    if (d->interrupt && i_call % 2 == 0) return -EINTR;
    if ((fcntl(fd, F_GETFL) & O_DIRECT) != 0) {
        int64_t i = d->n_direct++;
        if (d->no_direct || (d->n_good >= 0 && i >= d->n_good)) return d->fault;
        if (d->most_bytes > 0 && n > d->most_bytes) n = d->most_bytes;
        /* What a program that aligns too little gets on the strictest of disks. */
        if (offset % 512 != 0 || (uintptr_t)dst % PS_DIRECT_PAGE_BYTES % 512 != 0) return -EINVAL;
        /* A limit may be off the grid, which no disk is; what is read then is right all the same.
         */
        uint8_t *page = NULL;
        uint64_t whole = (n + 4095) / 4096 * 4096;
        if (posix_memalign((void **)&page, 4096, whole) != 0) return -ENOMEM;
        int64_t got = pread(fd, page, whole, (off_t)offset);
        got = got < 0 ? -errno : got < (int64_t)n ? got : (int64_t)n;
        if (got > 0) memcpy(dst, page, (size_t)got);
        free(page);
        return got;
    }
    const ssize_t got = pread(fd, dst, n, (off_t)offset);
    return got >= 0 ? got : -errno;
}

typedef struct opened {
    disk disk;
    ps_gguf *g;
    ps_gguf_direct *d;
    uint8_t *memory; /* owns; a page begins in it */
    uint8_t *dst;
} opened;

static void open_model(opened *o)
{
    ps_err err = {0};
    char *path = strdup(write_model("model.gguf"));
    PS_REQUIRE_OK(ps_gguf_open_io(path, &(ps_gguf_io){disk_pread, &o->disk}, &o->g, &err), &err);
    free(path);
    PS_REQUIRE_OK(ps_gguf_direct_open(o->g, &o->d, &err), &err);
    PS_REQUIRE(posix_memalign((void **)&o->memory, 4096, file.n + 2 * 4096) == 0);
    o->dst = o->memory;
}

static void close_model(opened *o)
{
    ps_gguf_direct_close(o->d);
    ps_gguf_close(o->g);
    free(o->memory);
    *o = (opened){0};
}

/* Does the file system here have such reads? */
static bool has_direct(void)
{
    opened o = {.disk.n_good = -1};
    open_model(&o);
    const bool works = ps_gguf_direct_works(o.d);
    close_model(&o);
    return works;
}

static ps_status read_and_compare(const opened *o, uint64_t from, uint64_t n, ps_err *err)
{
    memset(o->dst, 0xee, n + 1);
    const ps_status status = ps_gguf_direct_read(o->d, 0, from, o->dst, n, err);
    if (status == PS_OK) PS_CHECK(memcmp(o->dst, file.bytes + from, n) == 0);
    PS_CHECK_EQ(o->dst[n], 0xee); /* not a byte more */
    return status;
}

/* Stretches of all kinds: none, less than a block, whole blocks, up to the file's end. */
static void check_reads(const opened *o)
{
    const uint64_t align = ps_gguf_direct_align(o->d, 0), end = file.n;
    const uint64_t from[] = {0, align, 7 * align, 4096, 12288, end / align * align};
    const uint64_t n[] = {0, 1, align - 1, align, 3 * align, 4096, 5000, 100000, UINT64_MAX};
    for (size_t i = 0; i < sizeof from / sizeof *from; i++)
        for (size_t j = 0; j < sizeof n / sizeof *n; j++) {
            ps_err err = {0};
            const uint64_t most = end - from[i];
            PS_CHECK_STATUS(read_and_compare(o, from[i], n[j] < most ? n[j] : most, &err), PS_OK);
        }
}

/* ---- cases ---- */

PS_TEST(the_same_bytes)
{
    opened o = {.disk.n_good = -1};
    const ps_heap_stats before = ps_heap_get_stats();
    open_model(&o);
    const int64_t probed = o.disk.n_direct;
    check_reads(&o);
    PS_CHECK((o.disk.n_direct > probed) == ps_gguf_direct_works(o.d));
    close_model(&o);
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
}

PS_TEST(short_and_interrupted_reads)
{
    static const uint64_t most[] = {512, 4096, 700, 1}; /* the last two are off the grid */
    for (size_t i = 0; i < sizeof most / sizeof *most; i++) {
        ps_test_case("%d bytes a read", (int)most[i]);
        opened o = {.disk = {.n_good = -1, .most_bytes = most[i], .interrupt = true}};
        open_model(&o);
        check_reads(&o);
        close_model(&o);
    }
}

PS_TEST(a_file_system_without)
{
    opened o = {.disk = {.no_direct = true, .fault = -EINVAL}};
    open_model(&o);
    PS_CHECK(!ps_gguf_direct_works(o.d));
    PS_CHECK_EQ_U64(ps_gguf_direct_align(o.d, 0), 1);
    const int64_t probed = o.disk.n_direct;
    check_reads(&o);
    PS_CHECK_EQ(o.disk.n_direct, probed); /* it is not asked again */
    close_model(&o);
}

PS_TEST(a_later_refusal)
{
    if (!has_direct()) PS_SKIP("no reads past the page cache here");
    opened o = {.disk = {.n_good = 3, .fault = -EINVAL}};
    open_model(&o);
    PS_CHECK(ps_gguf_direct_works(o.d));
    check_reads(&o);
    PS_CHECK(!ps_gguf_direct_works(o.d));
    PS_CHECK_EQ(o.disk.n_direct, 4); /* once, and never again */
    close_model(&o);
}

PS_TEST(a_failing_disk)
{
    if (!has_direct()) PS_SKIP("no reads past the page cache here");
    for (int64_t n_good = 1; n_good < 4; n_good++) {
        ps_test_case("%d good reads", (int)n_good);
        opened o = {.disk = {.n_good = n_good, .fault = -EIO, .most_bytes = 16384}};
        open_model(&o);
        ps_err err = {0};
        PS_CHECK_STATUS(read_and_compare(&o, 4096, 65536, &err), PS_EFILE);
        PS_CHECK_EQ(err.os_errno, EIO);
        PS_CHECK_EQ_STR(err.extra, in_folder("model.gguf"));
        PS_CHECK(strstr(err.message, "cannot be read") != NULL);
        PS_CHECK(ps_gguf_direct_works(o.d)); /* a disk that fails may go on later */
        o.disk.n_good = -1;
        check_reads(&o);
        close_model(&o);
    }
}

PS_TEST(a_file_cut_short)
{
    opened o = {.disk.n_good = -1};
    open_model(&o);
    PS_REQUIRE(truncate(in_folder("model.gguf"), 50000) == 0);
    ps_err err = {0};
    PS_CHECK_STATUS(ps_gguf_direct_read(o.d, 0, 0, o.dst, 40000, &err), PS_OK);
    PS_CHECK_STATUS(ps_gguf_direct_read(o.d, 0, 40960, o.dst, 20000, &err), PS_EFILE);
    PS_CHECK_EQ(err.os_errno, EIO);
    PS_CHECK(strstr(err.message, "became shorter") != NULL);
    close_model(&o);
}

PS_TEST(another_file_under_the_same_name)
{
    opened o = {.disk.n_good = -1};
    ps_err err = {0};
    open_model(&o);
    ps_gguf_direct_close(o.d);
    char *path = strdup(in_folder("model.gguf"));
    PS_REQUIRE(unlink(path) == 0);
    for (int there = 0; there < 2; there++) {
        ps_test_case("%s", there ? "another" : "none");
        if (there) write_file(path, "another", 7);
        PS_REQUIRE_OK(ps_gguf_direct_open(o.g, &o.d, &err), &err);
        PS_CHECK(!ps_gguf_direct_works(o.d));
        check_reads(&o);
        if (!there) ps_gguf_direct_close(o.d);
    }
    free(path);
    close_model(&o);
}

PS_TEST(bytes_of_the_caller)
{
    opened o = {0};
    ps_err err = {0};
    write_model("model.gguf");
    PS_REQUIRE_OK(ps_gguf_open_memory(file.bytes, file.n, "bytes", &o.g, &err), &err);
    PS_REQUIRE_OK(ps_gguf_direct_open(o.g, &o.d, &err), &err);
    PS_REQUIRE(posix_memalign((void **)&o.memory, 4096, file.n + 4096) == 0);
    o.dst = o.memory;
    PS_CHECK(!ps_gguf_direct_works(o.d));
    check_reads(&o);
    close_model(&o);
}

static ps_status open_and_close(void *ctx, ps_err *err)
{
    ps_gguf_direct *d = NULL;
    const ps_status status = ps_gguf_direct_open(ctx, &d, err);
    PS_CHECK((d != NULL) == (status == PS_OK));
    ps_gguf_direct_close(d);
    return status;
}

PS_TEST(oom_of_opening_directly)
{
    opened o = {.disk.n_good = -1};
    open_model(&o);
    ps_test_oom_sweep(open_and_close, o.g);
    close_model(&o);
}

/* Pages of a file that the cache holds; negative: nobody says. */
static int cached_pages(const char *path, uint64_t n_bytes)
{
    const int fd = open(path, O_RDONLY);
    unsigned char held[(sizeof file.bytes + 4095) / 4096];
    void *map = fd >= 0 ? mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    int n = -1;
    if (map != MAP_FAILED && mincore(map, n_bytes, held) == 0) {
        n = 0;
        for (uint64_t i = 0; i < (n_bytes + 4095) / 4096; i++) n += held[i] & 1;
    }
    if (map != MAP_FAILED) munmap(map, n_bytes);
    if (fd >= 0) close(fd);
    return n;
}

PS_TEST(nothing_stays_in_the_page_cache)
{
    opened o = {.disk.n_good = -1};
    ps_err err = {0};
    open_model(&o);
    char *path = strdup(in_folder("model.gguf"));
    const int fd = open(path, O_RDONLY);
    PS_REQUIRE(fd >= 0);
    fdatasync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    const bool can = ps_gguf_direct_works(o.d) && cached_pages(path, file.n) == 0;
    const uint64_t whole = file.n / 4096 * 4096;
    if (can) {
        PS_CHECK_STATUS(read_and_compare(&o, 0, whole, &err), PS_OK);
        PS_CHECK_EQ(cached_pages(path, file.n), 0);
        uint8_t byte;
        PS_CHECK_STATUS(ps_gguf_pread(o.g, 0, 0, &byte, 1, &err), PS_OK);
        PS_CHECK(cached_pages(path, file.n) > 0); /* we would have seen it */
    }
    free(path);
    close_model(&o);
    if (!can) PS_SKIP("no reads past the page cache here, or a cache that keeps what it has");
}

/* ---- several at once ---- */

static void read_shares(void *ctx, int i_thread, int n_threads)
{
    const opened *o = ctx;
    const uint64_t share = 8192;
    for (uint64_t i = (uint64_t)i_thread; i * share < file.n; i += (uint64_t)n_threads) {
        const uint64_t left = file.n - i * share;
        ps_err err = {0};
        PS_CHECK_STATUS(ps_gguf_direct_read(o->d, 0, i * share, o->dst + i * share,
                            left < share ? left : share, &err),
            PS_OK);
    }
}

PS_TEST(several_threads_and_a_refusal)
{
    opened o = {.disk = {.n_good = 6, .fault = -EINVAL}};
    ps_pool *pool = NULL;
    ps_err err = {0};
    open_model(&o);
    PS_REQUIRE_OK(ps_pool_create(4, &pool, &err), &err);
    ps_pool_run(pool, read_shares, &o);
    PS_CHECK(memcmp(o.dst, file.bytes, file.n) == 0);
    PS_CHECK(!ps_gguf_direct_works(o.d));
    ps_pool_destroy(pool);
    close_model(&o);
}

PS_TEST_MAIN
