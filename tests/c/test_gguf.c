/* test_gguf - what the reader makes of good files: values, tensors, digests. Split models and what
 * happens when memory or reads fail are in test_gguf_files.c, bad content in test_gguf_hostile.c.
 */
#include "gguf_writer.h"

#include "format/ps_sha256.h"

static gguf_file file; /* large: not on the stack */

/* ---- values ---- */

static void check_scalars(const ps_gguf *g)
{
    uint64_t u = 7;
    int64_t i = 7;
    double d = 7;
    bool b = false;
    ps_gguf_str s = {0};
    PS_CHECK(ps_gguf_get_u64(ps_gguf_find(g, "x.u8"), &u) && u == 200);
    PS_CHECK(ps_gguf_get_i64(ps_gguf_find(g, "x.i8"), &i) && i == -100);
    PS_CHECK(ps_gguf_get_u64(ps_gguf_find(g, "x.u16"), &u) && u == 60000);
    PS_CHECK(ps_gguf_get_i64(ps_gguf_find(g, "x.i16"), &i) && i == -30000);
    PS_CHECK(ps_gguf_get_u64(ps_gguf_find(g, "x.u32"), &u) && u == 4000000000u);
    PS_CHECK(ps_gguf_get_i64(ps_gguf_find(g, "x.u32"), &i) && i == 4000000000);
    PS_CHECK(ps_gguf_get_i64(ps_gguf_find(g, "x.i32"), &i) && i == -2000000000);
    PS_CHECK(ps_gguf_get_u64(ps_gguf_find(g, "x.u64"), &u) && u == UINT64_MAX);
    PS_CHECK(ps_gguf_get_i64(ps_gguf_find(g, "x.i64"), &i) && i == INT64_MIN);
    PS_CHECK(ps_gguf_get_f64(ps_gguf_find(g, "x.f32"), &d) && d == 1.5);
    PS_CHECK(ps_gguf_get_f64(ps_gguf_find(g, "x.f64"), &d) && d == 0.1);
    PS_CHECK(ps_gguf_get_f64(ps_gguf_find(g, "x.i8"), &d) && d == -100);
    PS_CHECK(ps_gguf_get_bool(ps_gguf_find(g, "x.true"), &b) && b);
    PS_CHECK(ps_gguf_get_bool(ps_gguf_find(g, "x.false"), &b) && !b);
    PS_CHECK(ps_gguf_get_str(ps_gguf_find(g, "general.architecture"), &s));
    PS_CHECK(ps_gguf_str_eq(s, "llama") && !ps_gguf_str_eq(s, "llam"));
    PS_CHECK(ps_gguf_get_str(ps_gguf_find(g, "x.text"), &s) && s.n_bytes == 12);
    PS_CHECK(ps_gguf_get_str(ps_gguf_find(g, "x.empty"), &s) && s.n_bytes == 0);
}

static void check_wrong_types(const ps_gguf *g)
{
    uint64_t u = 7;
    int64_t i = 7;
    double d = 7;
    bool b = true;
    ps_gguf_str s = {.s = "untouched"};
    PS_CHECK(!ps_gguf_get_u64(ps_gguf_find(g, "x.i8"), &u));  /* negative */
    PS_CHECK(!ps_gguf_get_i64(ps_gguf_find(g, "x.u64"), &i)); /* too large */
    PS_CHECK(!ps_gguf_get_f64(ps_gguf_find(g, "x.u64"), &d)); /* not exact */
    PS_CHECK(!ps_gguf_get_f64(ps_gguf_find(g, "x.i64"), &d));
    PS_CHECK(!ps_gguf_get_u64(ps_gguf_find(g, "x.f32"), &u));
    PS_CHECK(!ps_gguf_get_u64(ps_gguf_find(g, "x.true"), &u));
    PS_CHECK(!ps_gguf_get_bool(ps_gguf_find(g, "x.u8"), &b));
    PS_CHECK(!ps_gguf_get_f64(ps_gguf_find(g, "x.true"), &d));
    PS_CHECK(!ps_gguf_get_str(ps_gguf_find(g, "x.u8"), &s));
    PS_CHECK(!ps_gguf_get_u64(ps_gguf_find(g, "x.i32s"), &u));
    PS_CHECK(!ps_gguf_get_str(ps_gguf_find(g, "tokenizer.ggml.tokens"), &s));
    PS_CHECK(!ps_gguf_get_u64(ps_gguf_find(g, "not there"), &u));
    PS_CHECK(!ps_gguf_elem_u64(ps_gguf_find(g, "x.u8"), 0, &u));
    PS_CHECK(!ps_gguf_elem_u64(ps_gguf_find(g, "x.i32s"), 1, &u));
    PS_CHECK(!ps_gguf_elem_u64(ps_gguf_find(g, "x.i32s"), 3, &u));
    PS_CHECK(!ps_gguf_elem_u64(ps_gguf_find(g, "x.no_numbers"), 0, &u));
    PS_CHECK(!ps_gguf_elem_str(ps_gguf_find(g, "x.none"), 0, &s));
    PS_CHECK(!ps_gguf_elem_str(ps_gguf_find(g, "x.i32s"), 0, &s));
    PS_CHECK(!ps_gguf_elem_u64(ps_gguf_find(g, "tokenizer.ggml.tokens"), 0, &u));
    PS_CHECK(u == 7 && i == 7 && d == 7 && b && strcmp(s.s, "untouched") == 0);
}

static void check_arrays(const ps_gguf *g)
{
    static const char *const tokens[] = {"a", "",
        "\xe2\x96\x81"
        "b",
        "<0x00>"};
    const ps_gguf_kv *kv = ps_gguf_find(g, "tokenizer.ggml.tokens");
    PS_REQUIRE(kv != NULL);
    PS_CHECK_EQ(kv->type, PS_GGUF_ARR);
    PS_CHECK_EQ(kv->elem_type, PS_GGUF_STR);
    PS_CHECK_EQ_U64(kv->n, 4);
    for (uint64_t k = 0; k < 4; k++) {
        ps_gguf_str s = {0};
        PS_CHECK(ps_gguf_elem_str(kv, k, &s) && ps_gguf_str_eq(s, tokens[k]));
    }
    int64_t i = 0;
    double d = 0;
    bool b = true;
    PS_CHECK(ps_gguf_elem_i64(ps_gguf_find(g, "x.i32s"), 1, &i) && i == -2);
    PS_CHECK(ps_gguf_elem_f64(ps_gguf_find(g, "x.f32s"), 1, &d) && d == -4);
    PS_CHECK(ps_gguf_elem_f64(ps_gguf_find(g, "x.i32s"), 2, &d) && d == 3);
    PS_CHECK(ps_gguf_elem_bool(ps_gguf_find(g, "x.bools"), 1, &b) && !b);
    PS_CHECK(ps_gguf_elem_bool(ps_gguf_find(g, "x.bools"), 2, &b) && b);
}

static void check_tensors(const ps_gguf *g, const uint8_t *data)
{
    PS_REQUIRE(ps_gguf_tensor_count(g) == 3);
    PS_CHECK(ps_gguf_tensor_at(g, 3) == NULL);
    const ps_gguf_tensor *t = ps_gguf_tensor_find(g, "blk.0.attn_q.weight");
    PS_REQUIRE(t != NULL && t == ps_gguf_tensor_at(g, 1));
    PS_CHECK_EQ(t->fmt, PS_FMT_Q8_0);
    PS_CHECK_EQ(t->n_dims, 2);
    PS_CHECK(t->dims[0] == 64 && t->dims[1] == 3 && t->dims[2] == 1 && t->dims[3] == 1);
    PS_CHECK_EQ_U64(t->n_elems, 192);
    PS_CHECK_EQ_U64(t->n_bytes, 204);
    PS_CHECK(memcmp(t->data, data + 32, 204) == 0);
    uint8_t copy[204];
    ps_err err = {0};
    PS_REQUIRE_OK(ps_gguf_pread(g, t->i_file, t->offset, copy, sizeof copy, &err), &err);
    PS_CHECK(memcmp(copy, data + 32, sizeof copy) == 0);
    t = ps_gguf_tensor_find(g, "four");
    PS_REQUIRE(t != NULL);
    PS_CHECK_EQ_U64(t->n_elems, 24);
    PS_CHECK_EQ_U64(t->n_bytes, 48);
    PS_CHECK(memcmp(t->data, data + 256, 48) == 0);
    PS_CHECK(ps_gguf_tensor_find(g, "norm.weigh") == NULL);
    PS_CHECK(ps_gguf_tensor_find(g, "") == NULL);
}

static void check_example(const ps_gguf *g, uint64_t n_file)
{
    PS_CHECK_EQ_U64(ps_gguf_kv_count(g), 21);
    PS_CHECK(ps_gguf_kv_at(g, 21) == NULL);
    PS_CHECK_EQ_STR(ps_gguf_kv_at(g, 1)->key, "x.u8");
    for (uint64_t i = 0; i < 21; i++) {
        const ps_gguf_kv *kv = ps_gguf_kv_at(g, i);
        PS_CHECK(ps_gguf_find(g, kv->key) == kv);
        PS_CHECK(memcmp(file.bytes + kv->offset, kv->data, kv->n_bytes) == 0);
    }
    check_scalars(g);
    check_wrong_types(g);
    check_arrays(g);
    check_tensors(g, file.bytes + n_file - 304);
    PS_CHECK_EQ(ps_gguf_version(g), 3);
    PS_CHECK_EQ(ps_gguf_file_count(g), 1);
    PS_CHECK_EQ_U64(ps_gguf_file_bytes(g, 0), n_file);
    PS_CHECK_EQ_U64(ps_gguf_alignment(g, 0), 32);
    PS_CHECK_EQ_U64((ps_gguf_meta_bytes(g, 0) + 31) / 32 * 32, n_file - 304);
    PS_CHECK(ps_gguf_file_path(g, 1) == NULL);
    uint8_t byte;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_gguf_pread(g, 0, n_file, &byte, 1, &err), PS_EREQUEST);
    PS_CHECK_STATUS(ps_gguf_pread(g, 0, 1, &byte, UINT64_MAX, NULL), PS_EREQUEST);
    PS_CHECK_STATUS(ps_gguf_pread(g, 1, 0, &byte, 1, NULL), PS_EREQUEST);
    PS_CHECK_STATUS(ps_gguf_pread(g, 0, n_file, &byte, 0, NULL), PS_OK);
}

PS_TEST(every_value_from_memory_and_from_a_file)
{
    const ps_heap_stats before = ps_heap_get_stats();
    put_example(&file);
    ps_err err = {0};
    ps_gguf *g = NULL;
    void *block = NULL;
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    check_example(g, file.n);
    PS_CHECK_EQ_STR(ps_gguf_file_path(g, 0), "memory.gguf");
    ps_gguf_close(g);
    free(block);

    const char *path = in_folder("example.gguf");
    write_file(path, file.bytes, file.n);
    PS_REQUIRE_OK(ps_gguf_open(path, &g, &err), &err);
    check_example(g, file.n);
    PS_CHECK_EQ_STR(ps_gguf_file_path(g, 0), path);
    ps_gguf_close(g);
    ps_gguf_close(NULL);
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
}

PS_TEST(a_file_without_tensors)
{
    put_header(&file, 0, 1);
    put_kv_str(&file, "general.architecture", "llama");
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    PS_CHECK_EQ_U64(ps_gguf_tensor_count(g), 0);
    PS_CHECK(ps_gguf_tensor_find(g, "a") == NULL && ps_gguf_tensor_at(g, 0) == NULL);
    PS_CHECK_EQ_U64(ps_gguf_meta_bytes(g, 0), file.n);
    ps_gguf_close(g);
    free(block);

    put_header(&file, 0, 0);
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    PS_CHECK(ps_gguf_find(g, "a") == NULL && ps_gguf_kv_at(g, 0) == NULL);
    ps_gguf_close(g);
    free(block);
}

PS_TEST(tensors_in_any_order_and_with_holes)
{
    put_header(&file, 3, 1);
    put_kv_u32(&file, "general.alignment", 64);
    put_tensor(&file, "c", PS_FMT_F32, 1, (uint64_t[]){16}, 256);
    put_tensor(&file, "a", PS_FMT_F32, 1, (uint64_t[]){16}, 0);
    put_tensor(&file, "b", PS_FMT_F32, 1, (uint64_t[]){16}, 64);
    put_data(&file, 64, 256 + 64);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    const uint64_t start = file.n - 320;
    PS_CHECK_EQ_U64(ps_gguf_tensor_find(g, "c")->offset, start + 256);
    PS_CHECK_EQ_U64(ps_gguf_tensor_find(g, "a")->offset, start);
    PS_CHECK_EQ_U64(ps_gguf_tensor_find(g, "b")->offset, start + 64);
    ps_gguf_close(g);
    free(block);
}

PS_TEST(types_that_we_do_not_run_are_listed)
{
    put_header(&file, 1, 0);
    put_tensor(&file, "w", 18, 1, (uint64_t[]){256}, 0);
    put_data(&file, 32, 98);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    const ps_gguf_tensor *t = ps_gguf_tensor_at(g, 0);
    PS_CHECK_EQ_U64(t->n_bytes, 98);
    PS_CHECK_EQ_STR(ps_gguf_tensor_type_name(t->fmt), "iq3_xxs");
    PS_CHECK_STATUS(ps_gguf_check_fmt(g, t, &err), PS_EUNSUPPORTED);
    PS_CHECK_EQ_STR(err.field, "tensor type iq3_xxs");
    PS_CHECK(strstr(err.extra, "q4_k") != NULL && strstr(err.extra, "mxfp4") != NULL);
    ps_gguf_close(g);
    free(block);
    PS_CHECK(ps_gguf_tensor_type_name(4) == NULL && ps_gguf_tensor_type_name(UINT32_MAX) == NULL);
    PS_CHECK_EQ_STR(ps_gguf_tensor_type_name(PS_FMT_BF16), "bf16");
}

PS_TEST(names_at_their_limits)
{
    static char key[PS_GGUF_MAX_KEY_BYTES + 1], name[PS_GGUF_MAX_NAME_BYTES + 1];
    memset(key, 'k', sizeof key - 1);
    memset(name, 'n', sizeof name - 1);
    put_header(&file, 1, 1);
    put_kv_u32(&file, key, 1);
    put_tensor(&file, name, PS_FMT_F32, 1, (uint64_t[]){1}, 0);
    put_data(&file, 32, 4);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    PS_CHECK(ps_gguf_find(g, key) != NULL && ps_gguf_tensor_find(g, name) != NULL);
    PS_CHECK_STATUS(ps_gguf_fail_key(g, key, &err, "no good"), PS_EFORMAT);
    PS_CHECK_EQ_U64(err.offset, 24 + 8 + PS_GGUF_MAX_KEY_BYTES + 4);
    PS_CHECK(strlen(err.field) == sizeof err.field - 1);
    ps_gguf_close(g);
    free(block);
}

PS_TEST(many_keys_and_tensors)
{
    /* Past the first size of every growing array, and enough names to collide in the index. */
    enum { N = 2000 };
    char name[32];
    put_header(&file, N, N);
    for (uint32_t i = 0; i < N; i++) {
        snprintf(name, sizeof name, "key.%u", i);
        put_kv_u32(&file, name, i);
    }
    for (uint32_t i = 0; i < N; i++) {
        snprintf(name, sizeof name, "w%u", i);
        put_tensor(&file, name, PS_FMT_F32, 1, (uint64_t[]){1}, i * 32);
    }
    put_data(&file, 32, N * 32);
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    PS_REQUIRE_OK(open_bytes(file.bytes, file.n, &g, &block, &err), &err);
    for (uint32_t i = 0; i < N; i++) {
        uint64_t value = 0;
        snprintf(name, sizeof name, "key.%u", i);
        PS_CHECK(ps_gguf_get_u64(ps_gguf_find(g, name), &value) && value == i);
        snprintf(name, sizeof name, "w%u", i);
        PS_CHECK(ps_gguf_tensor_find(g, name) == ps_gguf_tensor_at(g, i));
    }
    ps_gguf_close(g);
    free(block);
}

PS_TEST(committed_models_open)
{
    DIR *d = opendir("tests/data/golden");
    PS_REQUIRE(d != NULL);
    int n = 0;
    for (const struct dirent *e; (e = readdir(d)) != NULL;) {
        if (strstr(e->d_name, ".gguf") == NULL) continue;
        char path[512];
        snprintf(path, sizeof path, "tests/data/golden/%s", e->d_name);
        ps_test_case("%s", path);
        ps_gguf *g = NULL;
        ps_err err = {0};
        PS_CHECK_STATUS(ps_gguf_open(path, &g, &err), PS_OK);
        if (g == NULL) continue;
        PS_CHECK(ps_gguf_find(g, "general.architecture") != NULL);
        PS_CHECK(ps_gguf_tensor_find(g, "token_embd.weight") != NULL);
        for (uint64_t i = 0; i < ps_gguf_tensor_count(g); i++)
            PS_CHECK_STATUS(ps_gguf_check_fmt(g, ps_gguf_tensor_at(g, i), &err), PS_OK);
        ps_gguf_close(g);
        n++;
    }
    closedir(d);
    PS_CHECK(n >= 10);
}

/* ---- digests ---- */

static void digest_of(const gguf_file *f, uint8_t out[32])
{
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    memset(out, 0, 32);
    PS_REQUIRE_OK(open_bytes(f->bytes, f->n, &g, &block, &err), &err);
    ps_gguf_digest(g, out);
    ps_gguf_close(g);
    free(block);
}

static void put_model(uint32_t value, const char *name, uint64_t rows, uint64_t offset)
{
    put_header(&file, 1, 1);
    put_kv_u32(&file, "llama.block_count", value);
    put_tensor(&file, name, PS_FMT_F32, 2, (uint64_t[]){2, rows}, offset);
    put_data(&file, 32, 128);
}

PS_TEST(digest_follows_content_not_layout)
{
    uint8_t base[32], other[32];
    put_model(6, "w", 3, 0);
    digest_of(&file, base);
    put_model(6, "w", 3, 64); /* elsewhere */
    digest_of(&file, other);
    PS_CHECK(memcmp(base, other, 32) == 0);
    put_model(7, "w", 3, 0);
    digest_of(&file, other);
    PS_CHECK(memcmp(base, other, 32) != 0);
    put_model(6, "v", 3, 0);
    digest_of(&file, other);
    PS_CHECK(memcmp(base, other, 32) != 0);
    put_model(6, "w", 4, 0);
    digest_of(&file, other);
    PS_CHECK(memcmp(base, other, 32) != 0);
}

static void check_sha256(const char *text, uint64_t times, const char *want)
{
    ps_sha256 s;
    uint8_t out[32];
    char hex[65];
    ps_sha256_init(&s);
    for (uint64_t i = 0; i < times; i++) ps_sha256_feed(&s, text, strlen(text));
    ps_sha256_fini(&s, out);
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", out[i]);
    PS_CHECK_EQ_STR(hex, want);
}

PS_TEST(sha256_of_the_standards_examples)
{
    check_sha256("", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    check_sha256("abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    check_sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    check_sha256("a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    check_sha256("a", 119, "31eba51c313a5c08226adf18d4a359cfdfd8d2e816b13f4af952f7ea6584dcfb");
}

PS_TEST_MAIN
