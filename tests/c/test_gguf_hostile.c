/* test_gguf_hostile - files that lie. Each must be refused with the right error and field, touch
 * nothing outside its bytes (the sanitizers judge) and leave nothing behind. One committed file for
 * each known vulnerability of other readers is in tests/data/hostile; the rest is written here. */
#include <errno.h>

#include "gguf_writer.h"

#include "format/ps_utf8.h"

static gguf_file file; /* large: not on the stack */

PS_TEST(known_vulnerabilities_of_other_readers)
{
    FILE *index = fopen("tests/data/hostile/index.txt", "r");
    PS_REQUIRE(index != NULL);
    char line[512], name[128], status[64], field[128];
    int n = 0;
    while (fgets(line, sizeof line, index) != NULL) {
        if (line[0] == '#') continue;
        if (sscanf(line, "%127[^\t]\t%63[^\t]\t%127[^\n]", name, status, field) != 3)
            ps_test_fail(__FILE__, __LINE__, "cannot read the line %s", line);
        char path[256];
        snprintf(path, sizeof path, "tests/data/hostile/%s", name);
        ps_test_case("%s", name);
        const ps_heap_stats before = ps_heap_get_stats();
        ps_gguf *g = NULL;
        ps_err err = {0};
        PS_CHECK_EQ_STR(ps_status_name(ps_gguf_open(path, &g, &err)), status);
        PS_CHECK_EQ_STR(err.field, field);
        PS_CHECK_EQ_STR(err.extra, path);
        PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);

        /* The same bytes from memory, where every step past them shows. */
        FILE *f = fopen(path, "rb");
        PS_REQUIRE(f != NULL);
        file.n = fread(file.bytes, 1, sizeof file.bytes, f);
        fclose(f);
        expect_refused(&file, PS_EFORMAT, field);
        n++;
    }
    fclose(index);
    PS_CHECK_EQ(n, 16);
}

PS_TEST(a_token_of_two_gigabytes_that_is_really_there)
{
    /* CVE-2025-49847 with all its bytes, in a sparse file; NULs are valid UTF-8. */
    const char *path = in_folder("huge.gguf");
    put_header(&file, 0, 1);
    put_array(&file, "tokenizer.ggml.tokens", PS_GGUF_STR, 1);
    put_u64(&file, ((uint64_t)1 << 31) + 16);
    write_file(path, file.bytes, file.n);
    if (truncate(path, (off_t)file.n + ((off_t)1 << 31) + 16) != 0) PS_SKIP("no sparse files here");
    ps_gguf *g = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_gguf_open(path, &g, &err), PS_EFORMAT);
    PS_CHECK_EQ_STR(err.field, "kv[0].value (tokenizer.ggml.tokens)");
}

/* ---- header ---- */

static void put_start(gguf_file *f, const char *magic, uint32_t version, uint64_t a, uint64_t b)
{
    f->n = 0;
    put(f, magic, 4);
    put_u32(f, version);
    put_u64(f, a);
    put_u64(f, b);
}

PS_TEST(headers)
{
    put_start(&file, "GGML", 3, 0, 0);
    expect_refused(&file, PS_EFORMAT, "magic");
    put_start(&file, "gguf", 3, 0, 0);
    expect_refused(&file, PS_EFORMAT, "magic");
    put_start(&file, "GGUF", 0, 0, 0);
    expect_refused(&file, PS_EFORMAT, "version");
    put_start(&file, "GGUF", 1, 0, 0);
    expect_refused(&file, PS_EUNSUPPORTED, "GGUF version 1");
    put_start(&file, "GGUF", 4, 0, 0);
    expect_refused(&file, PS_EUNSUPPORTED, "GGUF version 4");
    put_start(&file, "GGUF", 0x03000000, 0, 0);
    expect_refused(&file, PS_EUNSUPPORTED, "big-endian GGUF");
    put_start(&file, "GGUF", 3, 1, 0);
    expect_refused(&file, PS_EFORMAT, "n_tensors");
    put_start(&file, "GGUF", 3, 0, 1);
    expect_refused(&file, PS_EFORMAT, "n_kv");
    put_start(&file, "GGUF", 3, UINT64_MAX, UINT64_MAX);
    expect_refused(&file, PS_EFORMAT, "n_tensors");
    put_start(&file, "GGUF", 2, 0, 0);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    PS_CHECK_EQ(ps_gguf_version(g), 2);
    ps_gguf_close(g);
    free(block);
}

static int64_t counting_pread(void *ctx, int fd, void *dst, uint64_t n, uint64_t offset)
{
    uint64_t *n_read = ctx;
    const ssize_t got = pread(fd, dst, n, (off_t)offset);
    if (got > 0) *n_read += (uint64_t)got;
    return got >= 0 ? got : -EIO;
}

PS_TEST(counts_cost_nothing_before_they_are_believed)
{
    /* The counts fit into this sparse gigabyte; what follows them does not parse. */
    const char *path = in_folder("sparse.gguf");
    put_start(&file, "GGUF", 3, 1000000, 60000000);
    write_file(path, file.bytes, file.n);
    if (truncate(path, (off_t)1 << 30) != 0) PS_SKIP("no sparse files here");
    ps_gguf *g = NULL;
    ps_err err = {0};
    uint64_t n_read = 0;
    const uint64_t n_allocs = ps_heap_get_stats().n_allocs;
    PS_CHECK_STATUS(
        ps_gguf_open_io(path, &(ps_gguf_io){counting_pread, &n_read}, &g, &err), PS_EFORMAT);
    PS_CHECK_EQ_STR(err.field, "kv[0].key");
    PS_CHECK(n_read <= 1 << 20);
    PS_CHECK(ps_heap_get_stats().n_allocs - n_allocs <= 6);
}

PS_TEST(a_count_of_strings_is_refused_before_the_first_is_read)
{
    put_header(&file, 0, 1);
    put_array(&file, "a", PS_GGUF_STR, 5);
    put_u64(&file, UINT64_MAX); /* would be refused as well, eight bytes later */
    put(&file, "in all 39 bytes, one too few for five.", 31);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(open_bytes(file.bytes, file.n, &g, &block, &err), PS_EFORMAT);
    PS_CHECK_EQ_U64(err.offset, file.n - 39 - 8);
    free(block);
}

/* ---- keys and values ---- */

/* One entry with this key (n bytes) and a u32. */
static void put_one_key(gguf_file *f, const char *key, size_t n)
{
    put_header(f, 0, 1);
    put_u64(f, n);
    put(f, key, n);
    put_u32(f, PS_GGUF_U32);
    put_u32(f, 5);
}

PS_TEST(keys)
{
    static char longest[PS_GGUF_MAX_KEY_BYTES + 1];
    memset(longest, 'k', sizeof longest);
    static const struct {
        const char *key;
        size_t n;
    } bad[] = {{"", 0}, {"a\0b", 3}, {"a\nb", 3}, {"\x7f", 1}, {"\xc2\x85", 2}, {"\xff", 1},
        {"\xc0\xaf", 2}, {"\xe2\x82", 2}, {"\xed\xa0\x80", 3}, {"\xf4\x90\x80\x80", 4},
        {longest, sizeof longest}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ps_test_case("key %zu", i);
        put_one_key(&file, bad[i].key, bad[i].n);
        put(&file, "padding", 7); /* so that the count of entries passes with an empty key too */
        expect_refused(&file, PS_EFORMAT, "kv[0].key");
    }
    ps_test_case("twice");
    put_header(&file, 0, 3);
    put_kv_u32(&file, "a", 1);
    put_kv_u32(&file, "b", 1);
    put_kv_u32(&file, "a", 1);
    expect_refused(&file, PS_EFORMAT, "kv[2].key (a)");
}

PS_TEST(value_types)
{
    static const uint32_t bad[] = {13, 14, 255, 0x80000000u, UINT32_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ps_test_case("type %u", bad[i]);
        put_header(&file, 0, 1);
        put_key(&file, "a", bad[i]);
        put_u64(&file, 0);
        expect_refused(&file, PS_EFORMAT, "kv[0].type (a)");
        put_header(&file, 0, 1);
        put_array(&file, "a", bad[i], 0);
        expect_refused(&file, PS_EFORMAT, "kv[0].elem_type (a)");
    }
    ps_test_case("arrays of arrays");
    put_header(&file, 0, 1);
    put_array(&file, "a", PS_GGUF_ARR, 1);
    put_u32(&file, PS_GGUF_U8);
    put_u64(&file, 1);
    put(&file, "x", 1);
    expect_refused(&file, PS_EFORMAT, "kv[0].elem_type (a)");
}

PS_TEST(booleans)
{
    for (uint32_t value = 2; value < 256; value++) {
        put_header(&file, 0, 1);
        put_kv(&file, "a", PS_GGUF_BOOL, &(uint8_t){(uint8_t)value}, 1);
        expect_refused(&file, PS_EFORMAT, "kv[0].value (a)");
    }
    put_header(&file, 0, 1);
    put_array(&file, "a", PS_GGUF_BOOL, 3);
    put(&file, "\1\0\2", 3);
    expect_refused(&file, PS_EFORMAT, "kv[0].value (a)");
}

PS_TEST(texts)
{
    put_header(&file, 0, 1);
    put_kv_str(&file, "a", "caf\xe9"); /* Latin-1 */
    expect_refused(&file, PS_EFORMAT, "kv[0].value (a)");
    put_header(&file, 0, 1);
    put_array(&file, "a", PS_GGUF_STR, 2);
    put_text(&file, "good");
    put_text(&file, "seven bytes and then \x80");
    expect_refused(&file, PS_EFORMAT, "kv[0].value (a)");
    static const uint64_t lengths[] = {4, UINT64_MAX, UINT64_MAX - 7, (uint64_t)1 << 63, 1u << 30};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        ps_test_case("length %llu", (unsigned long long)lengths[i]);
        put_header(&file, 0, 1);
        put_key(&file, "a", PS_GGUF_STR);
        put_u64(&file, lengths[i]);
        put(&file, "abc", 3);
        expect_refused(&file, PS_EFORMAT, "kv[0].value (a)");
    }
}

PS_TEST(array_counts)
{
    static const uint64_t counts[] = {2, UINT64_MAX, ((uint64_t)1 << 63) + 1,
        ((uint64_t)1 << 62) + 1, ((uint64_t)1 << 61) + 1, ((uint64_t)1 << 32) + 1};
    for (uint32_t type = 0; type < PS_GGUF_TYPE_COUNT; type++)
        for (size_t i = 0; type != PS_GGUF_ARR && i < sizeof counts / sizeof *counts; i++) {
            ps_test_case("%llu times %s", (unsigned long long)counts[i],
                ps_gguf_type_name((ps_gguf_type)type));
            put_header(&file, 0, 1);
            put_array(&file, "a", type, counts[i]);
            const uint64_t zero = 0;
            const bool text = type == PS_GGUF_STR;
            put(&file, &zero, type <= 1 || type == PS_GGUF_BOOL ? 1 : type <= 3 ? 2 : text ? 8 : 4);
            if (type >= PS_GGUF_U64) put_u32(&file, 0);
            expect_refused(&file, PS_EFORMAT, "kv[0].value (a)");
        }
}

PS_TEST(alignments)
{
    static const uint32_t bad[] = {0, 1, 2, 4, 7, 9, 24, 33, 1u << 25, 1u << 31, UINT32_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ps_test_case("alignment %u", bad[i]);
        put_header(&file, 0, 1);
        put_kv_u32(&file, "general.alignment", bad[i]);
        expect_refused(&file, PS_EFORMAT, "general.alignment");
    }
    ps_test_case("other types");
    put_header(&file, 0, 1);
    put_kv(&file, "general.alignment", PS_GGUF_U64, &(uint64_t){32}, 8);
    expect_refused(&file, PS_EFORMAT, "general.alignment");
    put_header(&file, 0, 1);
    put_kv_str(&file, "general.alignment", "32");
    expect_refused(&file, PS_EFORMAT, "general.alignment");
    put_header(&file, 0, 1);
    put_array(&file, "general.alignment", PS_GGUF_U32, 1);
    put_u32(&file, 32);
    expect_refused(&file, PS_EFORMAT, "general.alignment");
}

/* ---- tensors ---- */

static void expect_tensor_refused(
    const char *label, uint32_t fmt, uint32_t n_dims, const uint64_t *dims, const char *field)
{
    ps_test_case("%s", label);
    put_header(&file, 1, 0);
    put_tensor(&file, "w", fmt, n_dims, dims, 0);
    put_data(&file, 32, 4096);
    expect_refused(&file, PS_EFORMAT, field);
}

PS_TEST(tensor_shapes)
{
    const uint64_t top = (uint64_t)1 << 63;
    static const char dims[] = "tensor[0].dims (w)", n_dims[] = "tensor[0].n_dims (w)";
    expect_tensor_refused("no dimension", PS_FMT_F32, 0, (uint64_t[]){0}, n_dims);
    expect_tensor_refused("five", PS_FMT_F32, 5, (uint64_t[]){1, 1, 1, 1, 1}, n_dims);
    expect_tensor_refused("empty row", PS_FMT_F32, 1, (uint64_t[]){0}, dims);
    expect_tensor_refused("no rows", PS_FMT_F32, 2, (uint64_t[]){4, 0}, dims);
    expect_tensor_refused("none deep", PS_FMT_F32, 4, (uint64_t[]){4, 1, 1, 0}, dims);
    expect_tensor_refused("zero hides", PS_FMT_F32, 4, (uint64_t[]){4, top, top, 0}, dims);
    expect_tensor_refused("part of a block", PS_FMT_Q4_0, 2, (uint64_t[]){33, 1}, dims);
    expect_tensor_refused("block across rows", PS_FMT_Q4_0, 2, (uint64_t[]){16, 2}, dims);
    expect_tensor_refused("part of 256", PS_FMT_Q6_K, 1, (uint64_t[]){128}, dims);
    expect_tensor_refused(
        "product 2^64", PS_FMT_F16, 2, (uint64_t[]){(uint64_t)1 << 32, (uint64_t)1 << 32}, dims);
    expect_tensor_refused(
        "product 2^66", PS_FMT_F16, 4, (uint64_t[]){1u << 16, 1u << 16, 1u << 17, 1u << 17}, dims);
    expect_tensor_refused("bytes 2^64", PS_FMT_F32, 1, (uint64_t[]){(uint64_t)1 << 62}, dims);
    expect_tensor_refused("negative", PS_FMT_F32, 1, (uint64_t[]){UINT64_MAX}, dims);
    expect_tensor_refused("a byte too large", PS_FMT_F32, 1, (uint64_t[]){1100}, dims);
}

PS_TEST(tensor_types)
{
    static const uint32_t unknown[] = {4, 5, 9, 15, 31, 36, 38, 42, 100, 0x80000002u, UINT32_MAX};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        char field[64];
        snprintf(field, sizeof field, "tensor type %u", unknown[i]);
        ps_test_case("%s", field);
        put_header(&file, 1, 0);
        put_tensor(&file, "w", unknown[i], 1, (uint64_t[]){256}, 0);
        put_data(&file, 32, 4096);
        expect_refused(&file, PS_EUNSUPPORTED, field);
    }
}

PS_TEST(tensor_names)
{
    static const char *const bad[] = {"", "a\tb", "a\x1b[31m", "\xff\xfe", "\xe2\x82"};
    static char longest[PS_GGUF_MAX_NAME_BYTES + 2];
    memset(longest, 'n', sizeof longest - 1);
    for (size_t i = 0; i <= sizeof bad / sizeof *bad; i++) {
        ps_test_case("name %zu", i);
        put_header(&file, 1, 0);
        put_tensor(&file, i < sizeof bad / sizeof *bad ? bad[i] : longest, PS_FMT_F32, 1,
            (uint64_t[]){1}, 0);
        put_data(&file, 32, 32);
        expect_refused(&file, PS_EFORMAT, "tensor[0].name");
    }
    ps_test_case("twice");
    put_header(&file, 2, 0);
    put_tensor(&file, "w", PS_FMT_F32, 1, (uint64_t[]){1}, 0);
    put_tensor(&file, "w", PS_FMT_F32, 1, (uint64_t[]){1}, 32);
    put_data(&file, 32, 64);
    expect_refused(&file, PS_EFORMAT, "tensor[1].name (w)");
}

static void put_two(uint64_t a_offset, uint64_t b_offset, size_t n_data)
{
    put_header(&file, 2, 0);
    put_tensor(&file, "a", PS_FMT_F32, 1, (uint64_t[]){16}, a_offset);
    put_tensor(&file, "b", PS_FMT_F32, 1, (uint64_t[]){16}, b_offset);
    put_data(&file, 32, n_data);
}

PS_TEST(tensor_offsets)
{
    static const struct {
        uint64_t a, b;
        const char *field;
    } bad[] = {{0, 65, "tensor[1].offset (b)"}, {8, 96, "tensor[0].offset (a)"},
        {0, 96, "tensor[1].offset (b)"}, {1u << 30, 0, "tensor[0].offset (a)"},
        {UINT64_MAX - 31, 64, "tensor[0].offset (a)"},
        {0, UINT64_MAX - 127, "tensor[1].offset (b)"}, /* wraps to inside the file */
        {0, (uint64_t)1 << 63, "tensor[1].offset (b)"},
        /* overlaps */
        {0, 0, "tensor[1].offset (b)"}, {0, 32, "tensor[1].offset (b)"},
        {32, 0, "tensor[1].offset (b)"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ps_test_case(
            "offsets %llu and %llu", (unsigned long long)bad[i].a, (unsigned long long)bad[i].b);
        put_two(bad[i].a, bad[i].b, 128);
        expect_refused(&file, PS_EFORMAT, bad[i].field);
    }
    ps_test_case("one byte short");
    put_two(0, 64, 127);
    expect_refused(&file, PS_EFORMAT, "tensor[1].offset (b)");
    ps_test_case("exact");
    put_two(64, 0, 128);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    ps_gguf_close(g);
    free(block);
}

PS_TEST(overlaps_among_many)
{
    /* In every order that the sort may meet: descending offsets, and one of them moved onto its
     * neighbour. */
    enum { N = 300 };
    for (uint64_t wrong = 0; wrong <= N; wrong += 37) {
        put_header(&file, N, 0);
        for (uint64_t i = 0; i < N; i++) {
            char name[16];
            snprintf(name, sizeof name, "w%u", (unsigned)i);
            const uint64_t at = i * 7 % N * 64 + (i == wrong && i > 0 ? 32 : 0);
            put_tensor(&file, name, PS_FMT_F32, 1, (uint64_t[]){16}, at);
        }
        put_data(&file, 32, N * 64 + 32);
        ps_gguf *g = NULL;
        void *block = NULL;
        ps_err err = {0};
        ps_test_case("tensor %u moved", (unsigned)wrong);
        const bool good = wrong == 0 || wrong >= N;
        PS_CHECK_STATUS(
            open_bytes(file.bytes, file.n, &g, &block, &err), good ? PS_OK : PS_EFORMAT);
        if (!good) PS_CHECK(strstr(err.message, "overlap") != NULL);
        ps_gguf_close(g);
        free(block);
    }
}

/* ---- damage of every kind to a good file ---- */

PS_TEST(every_truncation)
{
    put_example(&file);
    for (size_t n = 0; n < file.n; n++) {
        ps_gguf *g = NULL;
        void *block = NULL;
        ps_err err = {0};
        ps_test_case("first %zu of %zu bytes", n, file.n);
        PS_CHECK_STATUS(open_bytes(file.bytes, n, &g, &block, &err), PS_EFORMAT);
        PS_CHECK(err.field[0] != '\0' && err.message[0] != '\0' && err.offset <= n);
        ps_gguf_close(g);
        free(block);
    }
}

/* Reads all that an opened file has to give; the sanitizers watch. */
static uint64_t touch_everything(const ps_gguf *g)
{
    uint64_t sum = 0;
    const ps_gguf_kv *kv;
    for (uint64_t i = 0; (kv = ps_gguf_kv_at(g, i)) != NULL; i++) {
        for (uint64_t k = 0; k < kv->n_bytes; k++) sum += kv->data[k];
        for (uint64_t k = 0; kv->type == PS_GGUF_ARR && k < kv->n; k++) {
            ps_gguf_str s = {0};
            double d = 0;
            if (ps_gguf_elem_str(kv, k, &s) && s.n_bytes > 0) sum += (uint8_t)s.s[s.n_bytes - 1];
            sum += ps_gguf_elem_f64(kv, k, &d);
        }
        PS_CHECK(ps_gguf_find(g, kv->key) == kv);
    }
    const ps_gguf_tensor *t;
    for (uint64_t i = 0; (t = ps_gguf_tensor_at(g, i)) != NULL; i++) {
        for (uint64_t k = 0; k < t->n_bytes; k++) sum += t->data[k];
        PS_CHECK(ps_gguf_tensor_find(g, t->name) == t);
    }
    return sum;
}

PS_TEST(every_byte_damaged)
{
    static const uint8_t values[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    put_example(&file);
    const ps_heap_stats before = ps_heap_get_stats();
    int n_refused = 0;
    for (size_t at = 0; at < file.n - 304; at++)
        for (size_t v = 0; v < sizeof values; v++) {
            const uint8_t good = file.bytes[at];
            ps_gguf *g = NULL;
            void *block = NULL;
            ps_err err = {0};
            ps_test_case("byte %zu is %u", at, values[v]);
            file.bytes[at] = values[v];
            const ps_status status = open_bytes(file.bytes, file.n, &g, &block, &err);
            PS_CHECK(status == PS_OK || status == PS_EFORMAT || status == PS_EUNSUPPORTED);
            PS_CHECK((status == PS_OK) == (err.message[0] == '\0'));
            if (status == PS_OK) touch_everything(g);
            n_refused += status != PS_OK;
            ps_gguf_close(g);
            free(block);
            file.bytes[at] = good;
        }
    PS_CHECK(n_refused > 1000);
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
}

/* ---- the parts that the reader stands on ---- */

/* UTF-8 by its definition: decode, and encode again. */
static bool utf8_by_definition(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n;) {
        const uint32_t a = p[i];
        const size_t size = a < 0x80                ? 1
                            : a >= 0xc0 && a < 0xe0 ? 2
                            : a >= 0xe0 && a < 0xf0 ? 3
                            : a >= 0xf0 && a < 0xf8 ? 4
                                                    : 0;
        if (size == 0 || size > n - i) return false;
        uint32_t c = size == 1 ? a : a & (0x7fu >> size);
        for (size_t k = 1; k < size; k++) {
            if ((p[i + k] & 0xc0) != 0x80) return false;
            c = c << 6 | (p[i + k] & 0x3fu);
        }
        const size_t shortest = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        if (size != shortest || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return false;
        i += size;
    }
    return true;
}

PS_TEST(utf8_of_all_short_texts)
{
    /* All of one, two and three bytes; of four those that begin like a four-byte character. */
    for (uint32_t v = 0; v < 1u << 24; v++) {
        const uint8_t p[3] = {(uint8_t)(v >> 16), (uint8_t)(v >> 8), (uint8_t)v};
        const size_t first = v < 1u << 8 ? 2 : v < 1u << 16 ? 1 : 0;
        const bool valid = ps_utf8_valid(p + first, 3 - first, false) == 3 - first;
        if (valid != utf8_by_definition(p + first, 3 - first))
            ps_test_fail(__FILE__, __LINE__, "%02x %02x %02x", p[0], p[1], p[2]);
    }
    for (uint32_t a = 0xf0; a < 0x100; a++)
        for (uint32_t b = 0; b < 256; b++)
            for (uint32_t c = 0x7f; c < 0xc1; c++)
                for (uint32_t d = 0x7f; d < 0xc1; d += 0x41) {
                    const uint8_t p[4] = {(uint8_t)a, (uint8_t)b, (uint8_t)c, (uint8_t)d};
                    const bool valid = ps_utf8_valid(p, 4, false) == 4;
                    if (valid != utf8_by_definition(p, 4))
                        ps_test_fail(__FILE__, __LINE__, "%02x %02x %02x %02x", a, b, c, d);
                }
}

PS_TEST(utf8_borders)
{
    const char text[] = "eight ASCII bytes and more, then gr\xc3\xbc\xc3\x9f"
                        "e";
    PS_CHECK_EQ_U64(ps_utf8_valid(text, sizeof text - 1, true), sizeof text - 1);
    PS_CHECK_EQ_U64(ps_utf8_valid(text, sizeof text - 2, false), sizeof text - 2);
    PS_CHECK_EQ_U64(ps_utf8_valid(text, sizeof text - 3, false), sizeof text - 4);
    PS_CHECK_EQ_U64(ps_utf8_valid("abcdefgh\xff", 9, false), 8);
    PS_CHECK_EQ_U64(ps_utf8_valid("abc\x1f", 4, false), 4);
    PS_CHECK_EQ_U64(ps_utf8_valid("abc\x1f", 4, true), 3);
    PS_CHECK_EQ_U64(ps_utf8_cut("\xc3\xbc\xc3\x9f", 4), 4);
    PS_CHECK_EQ_U64(ps_utf8_cut("\xc3\xbc\xc3\x9f", 3), 2);
    PS_CHECK_EQ_U64(ps_utf8_cut("\xc3\xbc\xc3\x9f", 1), 0);
    PS_CHECK_EQ_U64(ps_utf8_cut("abc", 10), 3);
}

PS_TEST(a_long_name_is_cut_at_a_character)
{
    /* A key of two-byte characters and an error behind it: the field is cut to its room, not in
     * mid-character. */
    static char key[601];
    for (size_t i = 0; i < 600; i += 2) memcpy(key + i, "\xc3\xbc", 2);
    for (int shift = 0; shift < 2; shift++) {
        put_header(&file, 0, 1);
        put_key(&file, key + 600 - 300 - 2 * shift, PS_GGUF_BOOL);
        if (shift == 1) file.bytes[24 + 8] = 'a', file.bytes[24 + 9] = 'b';
        put(&file, "\2", 1);
        ps_gguf *g = NULL;
        void *block = NULL;
        ps_err err = {0};
        PS_CHECK_STATUS(open_bytes(file.bytes, file.n, &g, &block, &err), PS_EFORMAT);
        free(block);
        PS_CHECK(strncmp(err.field, "kv[0].value (", 13) == 0);
        PS_CHECK(err.field[strlen(err.field) - 1] == ')');
        PS_CHECK_EQ_U64(ps_utf8_valid(err.field, strlen(err.field), true), strlen(err.field));
    }
}

PS_TEST_MAIN
