/* test_gguf_files - the reader and what surrounds it: split models, refused allocations, failing
 * and short reads, paths that are no model files. */
#include <errno.h>

#include "gguf_writer.h"

#include "base/ps_thread.h"

static gguf_file file; /* large: not on the stack */

/* ---- split models ---- */

typedef struct split_spec {
    uint32_t i, n;          /* its place, as split.no and split.count say */
    int32_t n_tensors_all;  /* split.tensors.count */
    const char *first_name; /* of its two tensors */
    const char *extra_key;  /* NULL: none */
} split_spec;

static void put_part(gguf_file *f, split_spec s, bool with_model_keys)
{
    put_header(f, 2, (with_model_keys ? 5u : 3u) + (s.extra_key != NULL));
    put_kv(f, "split.no", PS_GGUF_U16, &(uint16_t){(uint16_t)s.i}, 2);
    put_kv(f, "split.count", PS_GGUF_U16, &(uint16_t){(uint16_t)s.n}, 2);
    put_kv(f, "split.tensors.count", PS_GGUF_I32, &s.n_tensors_all, 4);
    if (with_model_keys) {
        put_kv_str(f, "general.architecture", "llama");
        put_kv_u32(f, "llama.block_count", 6);
    }
    char second[64];
    snprintf(second, sizeof second, "%s.second", s.first_name);
    if (s.extra_key != NULL) put_kv_u32(f, s.extra_key, 0);
    put_tensor(f, s.first_name, PS_FMT_F32, 1, (uint64_t[]){8}, 0);
    put_tensor(f, second, PS_FMT_F16, 1, (uint64_t[]){4}, 32);
    put_data(f, 32, 40);
    f->bytes[f->n - 1] = (uint8_t)(100 + s.i);
}

static void write_part(const char *name, split_spec s)
{
    put_part(&file, s, s.i == 0);
    write_file(in_folder(name), file.bytes, file.n);
}

static void write_split(void)
{
    write_part("m-00001-of-00003.gguf", (split_spec){0, 3, 6, "a", NULL});
    write_part("m-00002-of-00003.gguf", (split_spec){1, 3, 6, "b", NULL});
    write_part("m-00003-of-00003.gguf", (split_spec){2, 3, 6, "c", NULL});
}

PS_TEST(a_split_model_opens_through_any_part)
{
    static const char *const names[] = {"a", "a.second", "b", "b.second", "c", "c.second"};
    const ps_heap_stats before = ps_heap_get_stats();
    write_split();
    for (uint32_t through = 0; through < 3; through++) {
        char name[64];
        snprintf(name, sizeof name, "m-%05u-of-00003.gguf", through + 1);
        ps_test_case("through %s", name);
        ps_gguf *g = NULL;
        ps_err err = {0};
        PS_REQUIRE_OK(ps_gguf_open(in_folder(name), &g, &err), &err);
        PS_CHECK_EQ(ps_gguf_file_count(g), 3);
        PS_CHECK_EQ_U64(ps_gguf_tensor_count(g), 6);
        PS_CHECK_EQ_U64(ps_gguf_kv_count(g), 5); /* the first part's */
        PS_CHECK(ps_gguf_find(g, "llama.block_count") != NULL);
        for (uint32_t i = 0; i < 6; i++) {
            const ps_gguf_tensor *t = ps_gguf_tensor_at(g, i);
            uint8_t bytes[32] = {0};
            PS_CHECK_EQ_STR(t->name, names[i]);
            PS_CHECK_EQ(t->i_file, i / 2);
            PS_CHECK(ps_gguf_tensor_find(g, names[i]) == t);
            PS_REQUIRE_OK(ps_gguf_pread(g, t->i_file, t->offset, bytes, t->n_bytes, &err), &err);
            PS_CHECK(memcmp(bytes, t->data, t->n_bytes) == 0);
            if (i % 2 == 1) PS_CHECK_EQ(bytes[t->n_bytes - 1], 100 + i / 2);
        }
        PS_CHECK_EQ_STR(ps_gguf_file_path(g, 1), in_folder("m-00002-of-00003.gguf"));
        ps_gguf_close(g);
    }
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
}

static void expect_split_refused(
    const char *label, const char *open_name, ps_status status, const char *field)
{
    const ps_heap_stats before = ps_heap_get_stats();
    ps_gguf *g = NULL;
    ps_err err = {0};
    ps_test_case("%s", label);
    PS_CHECK_STATUS(ps_gguf_open(in_folder(open_name), &g, &err), status);
    PS_CHECK_EQ_STR(err.field, field);
    PS_CHECK(err.message[0] != '\0');
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
}

PS_TEST(split_models_that_do_not_fit_together)
{
    write_split();
    write_part("m-00002-of-00003.gguf", (split_spec){2, 3, 6, "b", NULL});
    expect_split_refused(
        "a part in another's place", "m-00001-of-00003.gguf", PS_EFORMAT, "split.no");
    write_part("m-00002-of-00003.gguf", (split_spec){1, 4, 6, "b", NULL});
    expect_split_refused(
        "a part of another split", "m-00001-of-00003.gguf", PS_EFORMAT, "split.count");
    write_part("m-00002-of-00003.gguf", (split_spec){1, 3, 6, "b", "split.no"});
    expect_split_refused(
        "a key twice in a later part", "m-00001-of-00003.gguf", PS_EFORMAT, "kv[3].key (split.no)");
    write_part("m-00002-of-00003.gguf", (split_spec){1, 3, 6, "a", NULL});
    expect_split_refused(
        "a name in two parts", "m-00003-of-00003.gguf", PS_EFORMAT, "tensor[2].name (a)");
    write_part("m-00002-of-00003.gguf", (split_spec){1, 3, 6, "b", NULL});
    write_part("m-00001-of-00003.gguf", (split_spec){0, 3, 7, "a", NULL});
    expect_split_refused(
        "another tensor count", "m-00003-of-00003.gguf", PS_EFORMAT, "split.tensors.count");
    write_part("m-00001-of-00003.gguf", (split_spec){0, 3, -6, "a", NULL});
    expect_split_refused(
        "a negative tensor count", "m-00003-of-00003.gguf", PS_EFORMAT, "split.tensors.count");
    write_part("alone.gguf", (split_spec){0, 3, 6, "a", NULL});
    expect_split_refused("a name without numbers", "alone.gguf", PS_EFORMAT, "split.count");
    write_part("n-00001-of-00004.gguf", (split_spec){0, 3, 6, "a", NULL});
    expect_split_refused(
        "another number in the name", "n-00001-of-00004.gguf", PS_EFORMAT, "split.count");
    write_part("n-00000-of-00003.gguf", (split_spec){0, 3, 6, "a", NULL});
    expect_split_refused("part 0 in the name", "n-00000-of-00003.gguf", PS_EFORMAT, "split.count");
    write_part("n-00001-of-05000.gguf", (split_spec){0, 5000, 6, "a", NULL});
    expect_split_refused("too many parts", "n-00001-of-05000.gguf", PS_EFORMAT, "split.count");

    write_split();
    unlink(in_folder("m-00002-of-00003.gguf"));
    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_gguf_open(in_folder("m-00003-of-00003.gguf"), &g, &err), PS_EFILE);
    PS_CHECK_EQ(err.os_errno, ENOENT);
    PS_CHECK(strstr(err.message, "m-00002-of-00003.gguf") != NULL);
    put_part(&file, (split_spec){0, 2, 4, "a", NULL}, true);
    expect_refused(&file, PS_EUNSUPPORTED, "split model in memory");
}

PS_TEST(one_part_of_one_is_no_split)
{
    put_part(&file, (split_spec){0, 1, 2, "a", NULL}, true);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    PS_CHECK_EQ(ps_gguf_file_count(g), 1);
    ps_gguf_close(g);
    free(block);
}

PS_TEST(a_split_model_and_the_same_in_one_file_have_one_digest)
{
    uint8_t split[32], whole[32];
    write_split();
    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(ps_gguf_open(in_folder("m-00001-of-00003.gguf"), &g, &err), &err);
    ps_gguf_digest(g, split);
    ps_gguf_close(g);
    put_header(&file, 6, 2);
    put_kv_str(&file, "general.architecture", "llama");
    put_kv_u32(&file, "llama.block_count", 6);
    static const char *const names[] = {"a", "b", "c"};
    for (uint32_t i = 0; i < 3; i++) {
        char second[16];
        snprintf(second, sizeof second, "%s.second", names[i]);
        put_tensor(&file, names[i], PS_FMT_F32, 1, (uint64_t[]){8}, i * 64);
        put_tensor(&file, second, PS_FMT_F16, 1, (uint64_t[]){4}, i * 64 + 32);
    }
    put_data(&file, 32, 192);
    void *block = NULL;
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    ps_gguf_digest(g, whole);
    ps_gguf_close(g);
    free(block);
    PS_CHECK(memcmp(split, whole, 32) == 0);
}

/* ---- when memory fails ---- */

typedef struct opening {
    const char *path; /* NULL: `file`, from memory */
    int n;            /* how often */
} opening;

static ps_status open_and_close(void *ctx, ps_err *err)
{
    opening *o = ctx;
    ps_gguf *g = NULL;
    o->n++;
    const ps_status status = o->path != NULL
                                 ? ps_gguf_open(o->path, &g, err)
                                 : ps_gguf_open_memory(file.bytes, file.n, "memory.gguf", &g, err);
    PS_CHECK((g != NULL) == (status == PS_OK));
    ps_gguf_close(g);
    return status;
}

/* Refuses each allocation of open in turn; returns how many there are. */
static int sweep(const char *path)
{
    opening o = {.path = path};
    ps_test_oom_sweep(open_and_close, &o);
    return o.n - 1;
}

static int n_open_fds(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++) n += fcntl(fd, F_GETFD) != -1;
    return n;
}

PS_TEST(oom_of_open)
{
    const int n_fds = n_open_fds();
    put_example(&file);
    PS_CHECK(sweep(NULL) >= 6);
    char *path = strdup(in_folder("example.gguf"));
    write_file(path, file.bytes, file.n);
    PS_CHECK(sweep(path) >= 7);
    free(path);

    /* More than the first read and the first size of each array, and tensors to be sorted. */
    put_header(&file, 70, 70);
    for (uint32_t i = 0; i < 70; i++) {
        char name[128];
        snprintf(name, sizeof name, "a.key.with.a.long.name.so.that.the.pool.grows.too.%u", i);
        put_array(&file, name, PS_GGUF_STR, 1);
        put_text(&file, "text");
    }
    for (uint32_t i = 0; i < 70; i++) {
        char name[128];
        snprintf(name, sizeof name, "w%u", i);
        put_tensor(&file, name, PS_FMT_F32, 1, (uint64_t[]){1}, (69 - i) * 32);
    }
    put_data(&file, 32, 70 * 32);
    PS_CHECK(sweep(NULL) >= 75);
    write_split();
    path = strdup(in_folder("m-00002-of-00003.gguf"));
    PS_CHECK(sweep(path) >= 15);
    free(path);
    PS_CHECK_EQ(n_open_fds(), n_fds);
}

/* ---- when reads fail ---- */

/* Mappings of this file in our address space. */
static int n_mappings(const char *path)
{
    FILE *f = fopen("/proc/self/maps", "r");
    char line[1024];
    int n = 0;
    while (f != NULL && fgets(line, sizeof line, f) != NULL) n += strstr(line, path) != NULL;
    if (f != NULL) fclose(f);
    return n;
}

typedef struct faulty {
    int64_t n_good;      /* reads before the fault; negative: never */
    int64_t fault;       /* what that read returns */
    uint64_t most_bytes; /* a read */
    bool interrupt;      /* every second call gives -EINTR */
    uint64_t n_calls;
} faulty;

static int64_t faulty_pread(void *ctx, int fd, void *dst, uint64_t n, uint64_t offset)
{
    faulty *f = ctx;
    f->n_calls++;
    if (f->interrupt && f->n_calls % 2 == 1) return -EINTR;
    if (f->n_good == 0) return f->fault;
    if (f->n_good > 0) f->n_good--;
    const ssize_t got = pread(fd, dst, n < f->most_bytes ? n : f->most_bytes, (off_t)offset);
    return got >= 0 ? got : -errno;
}

PS_TEST(each_read_of_open_failed_once)
{
    static const int64_t faults[] = {-EIO, -ESTALE, 0};
    put_example(&file);
    char *path = strdup(in_folder("example.gguf"));
    write_file(path, file.bytes, file.n);
    const int n_fds = n_open_fds();
    for (size_t k = 0; k < sizeof faults / sizeof *faults; k++) {
        ps_status status = PS_EFILE;
        for (int64_t n_good = 0; status != PS_OK && n_good < 100; n_good++) {
            const ps_heap_stats before = ps_heap_get_stats();
            faulty f = {.n_good = n_good, .fault = faults[k], .most_bytes = 200};
            ps_gguf *g = NULL;
            ps_err err = {0};
            status = ps_gguf_open_io(path, &(ps_gguf_io){faulty_pread, &f}, &g, &err);
            ps_test_case("fault %d after %d reads", (int)faults[k], (int)n_good);
            PS_CHECK_STATUS(status, f.n_good == 0 && g == NULL ? PS_EFILE : PS_OK);
            if (status != PS_OK) {
                PS_CHECK_EQ(err.os_errno, faults[k] == 0 ? EIO : -faults[k]);
                PS_CHECK_EQ_STR(err.extra, path);
            }
            ps_gguf_close(g);
            PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
        }
        PS_CHECK_STATUS(status, PS_OK);
    }
    PS_CHECK_EQ(n_open_fds(), n_fds);
    free(path);
}

PS_TEST(short_and_interrupted_reads_are_completed)
{
    put_example(&file);
    char *path = strdup(in_folder("example.gguf"));
    write_file(path, file.bytes, file.n);
    faulty f = {.n_good = -1, .most_bytes = 1, .interrupt = true};
    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(ps_gguf_open_io(path, &(ps_gguf_io){faulty_pread, &f}, &g, &err), &err);
    PS_CHECK_EQ_U64(ps_gguf_kv_count(g), 21);
    PS_CHECK(memcmp(ps_gguf_find(g, "x.text")->data, "Gr\xc3\xbc", 4) == 0);
    f.n_good = 3; /* a read after open */
    f.fault = -EIO;
    uint8_t bytes[16];
    PS_CHECK_STATUS(ps_gguf_pread(g, 0, 0, bytes, sizeof bytes, &err), PS_EFILE);
    PS_CHECK_EQ(err.os_errno, EIO);
    ps_gguf_close(g);
    free(path);
}

PS_TEST(oom_of_metadata_larger_than_the_first_read)
{
    /* 3 MiB of tokens, in a file with tensor data behind them. */
    enum { N_TOKENS = 1 << 17 };
    char *path = strdup(in_folder("large.gguf"));
    FILE *f = fopen(path, "wb");
    PS_REQUIRE(f != NULL);
    put_header(&file, 1, 1);
    put_array(&file, "tokenizer.ggml.tokens", PS_GGUF_STR, N_TOKENS);
    fwrite(file.bytes, 1, file.n, f);
    uint64_t n_file = file.n;
    for (uint32_t i = 0; i < N_TOKENS; i++) {
        char token[32];
        snprintf(token, sizeof token, "token number %u", i);
        file.n = 0;
        put_text(&file, token);
        fwrite(file.bytes, 1, file.n, f);
        n_file += file.n;
    }
    file.n = 0;
    put_tensor(&file, "w", PS_FMT_F32, 1, (uint64_t[]){1}, 0);
    fwrite(file.bytes, 1, file.n, f);
    const uint64_t n_meta = n_file + file.n;
    n_file = (n_meta + 31) / 32 * 32 + 4;
    PS_CHECK(fclose(f) == 0 && truncate(path, (off_t)n_file + (4 << 20)) == 0);

    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(ps_gguf_open(path, &g, &err), &err);
    PS_CHECK_EQ_U64(ps_gguf_meta_bytes(g, 0), n_meta);
    const ps_gguf_kv *kv = ps_gguf_find(g, "tokenizer.ggml.tokens");
    for (uint32_t i = 0; i < N_TOKENS; i += 997) {
        char token[32];
        ps_gguf_str s = {0};
        snprintf(token, sizeof token, "token number %u", i);
        PS_CHECK(ps_gguf_elem_str(kv, i, &s) && ps_gguf_str_eq(s, token));
    }
    PS_CHECK(ps_heap_get_stats().live_bytes < n_meta + N_TOKENS * 4 + 100000);
    ps_gguf_close(g);
    PS_CHECK(sweep(path) >= 12);
    free(path);
}

/* ---- many threads ---- */

static void use_from_thread(void *ctx, int i_thread, int n_threads)
{
    const ps_gguf *g = ctx;
    uint8_t first[32], digest[32], bytes[64];
    ps_gguf_digest(g, first);
    for (int round = 0; round < 50; round++) {
        const ps_gguf_tensor *t =
            ps_gguf_tensor_at(g, (uint64_t)(round + i_thread) % ps_gguf_tensor_count(g));
        PS_CHECK(ps_gguf_tensor_find(g, t->name) == t);
        PS_CHECK_STATUS(ps_gguf_pread(g, t->i_file, t->offset, bytes, t->n_bytes, NULL), PS_OK);
        PS_CHECK(memcmp(bytes, t->data, t->n_bytes) == 0);
        PS_CHECK(ps_gguf_find(g, "llama.block_count") != NULL);
        ps_gguf_digest(g, digest);
        PS_CHECK(memcmp(first, digest, 32) == 0);
    }
    (void)n_threads;
}

PS_TEST(an_open_model_serves_many_threads)
{
    write_split();
    ps_gguf *g = NULL;
    ps_pool *pool = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(ps_gguf_open(in_folder("m-00001-of-00003.gguf"), &g, &err), &err);
    PS_REQUIRE_OK(ps_pool_create(4, &pool, &err), &err);
    ps_pool_run(pool, use_from_thread, g);
    ps_pool_destroy(pool);
    ps_gguf_close(g);
}

/* ---- a large model ---- */

static void flush_to(FILE *f, uint64_t *n_written)
{
    if (fwrite(file.bytes, 1, file.n, f) != file.n)
        ps_test_fail(__FILE__, __LINE__, "cannot write the large file");
    *n_written += file.n;
    file.n = 0;
}

/* Metadata of 94 layers with 128 experts, each expert's matrices on their own (files that stack
 * them have a thirtieth of the tensors), 151,936 tokens and as many merges. Returns the bytes of
 * metadata. */
static uint64_t write_large_model(FILE *f)
{
    enum { N_LAYERS = 94, N_EXPERTS = 128, N_TOKENS = 151936 };
    static const char *const experts[] = {"gate", "up", "down"};
    uint64_t n_written = 0, offset = 0;
    char text[64];
    put_header(&file, (uint64_t)N_LAYERS * N_EXPERTS * 3, 4);
    put_kv_str(&file, "general.architecture", "qwen3moe");
    put_array(&file, "tokenizer.ggml.token_type", PS_GGUF_I32, N_TOKENS);
    for (uint32_t i = 0; i < N_TOKENS; i++) {
        put_u32(&file, 1);
        if (file.n > sizeof file.bytes / 2) flush_to(f, &n_written);
    }
    for (int array = 0; array < 2; array++) {
        put_array(&file, array == 0 ? "tokenizer.ggml.tokens" : "tokenizer.ggml.merges",
            PS_GGUF_STR, N_TOKENS);
        for (uint32_t i = 0; i < N_TOKENS; i++) {
            snprintf(text, sizeof text, array == 0 ? "tok%u" : "\xc4\xa0t ok%u", i);
            put_text(&file, text);
            if (file.n > sizeof file.bytes / 2) flush_to(f, &n_written);
        }
    }
    for (uint32_t i = 0; i < N_LAYERS * N_EXPERTS * 3; i++) {
        snprintf(text, sizeof text, "blk.%u.ffn_%s.%u.weight", i / (3 * N_EXPERTS), experts[i % 3],
            i / 3 % N_EXPERTS);
        put_tensor(&file, text, PS_FMT_Q4_K, 2, (uint64_t[]){4096, 1536}, offset);
        offset += 4096 / 256 * 144 * 1536;
        if (file.n > sizeof file.bytes / 2) flush_to(f, &n_written);
    }
    flush_to(f, &n_written);
    if (ftruncate(fileno(f), (off_t)((n_written + 31) / 32 * 32 + offset)) != 0) return 0;
    return n_written;
}

PS_TEST(a_large_model_opens_in_one_pass)
{
    char *path = strdup(in_folder("94x128.gguf"));
    FILE *f = fopen(path, "wb");
    PS_REQUIRE(f != NULL);
    const uint64_t n_meta = write_large_model(f);
    PS_CHECK(fclose(f) == 0);
    if (n_meta == 0) PS_SKIP("no sparse files of 120 GB here");

    faulty io = {.n_good = -1, .most_bytes = UINT64_MAX};
    ps_gguf *g = NULL;
    ps_err err = {0};
    const uint64_t start_ns = ps_clock_ns();
    PS_REQUIRE_OK(ps_gguf_open_io(path, &(ps_gguf_io){faulty_pread, &io}, &g, &err), &err);
    const uint64_t open_ns = ps_clock_ns();
    PS_CHECK_EQ_U64(ps_gguf_tensor_count(g), 94 * 128 * 3);
    PS_CHECK_EQ_U64(ps_gguf_meta_bytes(g, 0), n_meta);
    const ps_gguf_tensor *t = ps_gguf_tensor_find(g, "blk.93.ffn_down.127.weight");
    PS_REQUIRE(t != NULL);
    PS_CHECK_EQ_U64(t->offset + t->n_bytes, ps_gguf_file_bytes(g, 0));
    uint8_t digest[32], last;
    const uint64_t find_ns = ps_clock_ns();
    ps_gguf_digest(g, digest);
    const uint64_t digest_ns = ps_clock_ns();
    PS_REQUIRE_OK(ps_gguf_pread(g, 0, t->offset + t->n_bytes - 1, &last, 1, &err), &err);
    PS_CHECK(io.n_calls <= 10); /* the buffer doubles: the reads follow the size's logarithm */
    printf(
        "94 x 128 experts, 151,936 tokens: %.1f MB of metadata opened in %.1f ms, digest %.1f ms\n",
        (double)n_meta * 1e-6, (double)(open_ns - start_ns) * 1e-6,
        (double)(digest_ns - find_ns) * 1e-6);
    ps_gguf_close(g);
    unlink(path);
    free(path);
}

PS_TEST(mappings_and_descriptors_are_returned)
{
    put_example(&file);
    char *path = strdup(in_folder("example.gguf"));
    write_file(path, file.bytes, file.n);
    const int n_fds = n_open_fds();
    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(ps_gguf_open(path, &g, &err), &err);
    PS_CHECK_EQ(n_mappings(path), 1);
    ps_gguf_close(g);
    PS_CHECK_EQ(n_mappings(path), 0);
    PS_CHECK_EQ(n_open_fds(), n_fds);
    free(path);
}

/* ---- what is not a model file ---- */

static void expect_file_error(const char *path, int os_errno)
{
    ps_gguf *g = NULL;
    ps_err err = {0};
    ps_test_case("%s", path);
    PS_CHECK_STATUS(ps_gguf_open(path, &g, &err), PS_EFILE);
    PS_CHECK_EQ(err.os_errno, os_errno);
    PS_CHECK_EQ_STR(err.extra, path);
    PS_CHECK(err.message[0] != '\0');
}

PS_TEST(paths_that_cannot_be_read)
{
    const int n_fds = n_open_fds();
    expect_file_error("/no/such/file.gguf", ENOENT);
    expect_file_error("", ENOENT);
    expect_file_error("tests/data", EISDIR);
    expect_file_error("/dev/null", EINVAL);
    const char *fifo = in_folder("fifo.gguf");
    PS_REQUIRE(mkfifo(fifo, 0600) == 0);
    expect_file_error(fifo, EINVAL); /* and it does not wait for a writer */
    ps_err err = {0};
    ps_gguf *g = NULL;
    PS_CHECK_STATUS(ps_gguf_open(NULL, &g, &err), PS_EREQUEST);
    PS_CHECK_EQ(n_open_fds(), n_fds);
}

PS_TEST(a_file_without_permission)
{
    const char *path = in_folder("secret.gguf");
    write_file(path, "GGUF", 4);
    PS_REQUIRE(chmod(path, 0) == 0 && chmod(folder, 0755) == 0);
    /* Root may read everything, so be nobody for a moment. */
    const bool root = geteuid() == 0;
    if (root && seteuid(65534) != 0) PS_SKIP("root, and cannot be anybody else");
    expect_file_error(path, EACCES);
    if (root) PS_REQUIRE(seteuid(0) == 0);
}

PS_TEST(an_empty_file)
{
    const char *path = in_folder("empty.gguf");
    write_file(path, "", 0);
    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_gguf_open(path, &g, &err), PS_EFORMAT);
    PS_CHECK_EQ_STR(err.field, "magic");
    PS_CHECK_EQ_STR(err.extra, path);
    PS_CHECK(strstr(err.message, "empty") != NULL);
}

PS_TEST_MAIN
