/* gguf_writer.h - writes GGUF files, good and bad, for the tests of the reader: bytes go in as the
 * caller says, and nothing is checked but the room. The well-formed example that most tests start
 * from is at the end. */
#ifndef GGUF_WRITER_H
#define GGUF_WRITER_H

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ps_test.h"

#include "format/ps_gguf.h"

typedef struct gguf_file {
    size_t n;
    uint8_t bytes[1 << 18];
} gguf_file;

static inline void put(gguf_file *f, const void *data, size_t n)
{
    if (n > sizeof f->bytes - f->n) {
        ps_test_fail(__FILE__, __LINE__, "the test's file is larger than its buffer");
        return;
    }
    memcpy(f->bytes + f->n, data, n);
    f->n += n;
}

static inline void put_u32(gguf_file *f, uint32_t v)
{
    put(f, &v, sizeof v);
}
static inline void put_u64(gguf_file *f, uint64_t v)
{
    put(f, &v, sizeof v);
}

static inline void put_text(gguf_file *f, const char *s)
{
    put_u64(f, strlen(s));
    put(f, s, strlen(s));
}

static inline void put_header(gguf_file *f, uint64_t n_tensors, uint64_t n_kv)
{
    f->n = 0;
    put(f, "GGUF", 4);
    put_u32(f, 3);
    put_u64(f, n_tensors);
    put_u64(f, n_kv);
}

/* Key and type; the value follows. */
static inline void put_key(gguf_file *f, const char *key, uint32_t type)
{
    put_text(f, key);
    put_u32(f, type);
}

static inline void put_kv(
    gguf_file *f, const char *key, uint32_t type, const void *value, size_t n_bytes)
{
    put_key(f, key, type);
    put(f, value, n_bytes);
}

static inline void put_kv_u32(gguf_file *f, const char *key, uint32_t value)
{
    put_kv(f, key, PS_GGUF_U32, &value, sizeof value);
}

static inline void put_kv_str(gguf_file *f, const char *key, const char *value)
{
    put_key(f, key, PS_GGUF_STR);
    put_text(f, value);
}

static inline void put_array(gguf_file *f, const char *key, uint32_t elem_type, uint64_t n)
{
    put_key(f, key, PS_GGUF_ARR);
    put_u32(f, elem_type);
    put_u64(f, n);
}

static inline void put_tensor(gguf_file *f, const char *name, uint32_t fmt, uint32_t n_dims,
    const uint64_t *dims, uint64_t offset)
{
    put_text(f, name);
    put_u32(f, n_dims);
    put(f, dims, n_dims * sizeof *dims);
    put_u32(f, fmt);
    put_u64(f, offset);
}

/* Bytes that tell where they are, so that a read from the wrong place shows. */
static inline void put_data(gguf_file *f, size_t alignment, size_t n)
{
    static const uint8_t zero[1] = {0};
    while (f->n % alignment != 0) put(f, zero, 1);
    for (size_t i = 0; i < n; i++) {
        const uint8_t b = (uint8_t)(i * 7 + i / 251);
        put(f, &b, 1);
    }
}

/* Opens exactly these bytes from a heap block of that size, so that AddressSanitizer sees every
 * step past them. */
static inline ps_status open_bytes(
    const void *bytes, size_t n, ps_gguf **g, void **block, ps_err *err)
{
    *block = malloc(n > 0 ? n : 1);
    if (*block == NULL) return PS_ENOMEM;
    memcpy(*block, bytes, n);
    *g = NULL;
    return ps_gguf_open_memory(*block, n, "memory.gguf", g, err);
}

/* Opening these bytes must fail in this way; everything must have been freed. */
static inline void expect_refused(const gguf_file *f, ps_status want, const char *field)
{
    const ps_heap_stats before = ps_heap_get_stats();
    ps_gguf *g = NULL;
    void *block = NULL;
    ps_err err = {0};
    const ps_status got = open_bytes(f->bytes, f->n, &g, &block, &err);
    PS_CHECK_STATUS(got, want);
    PS_CHECK_STATUS(ps_gguf_open_memory(block, f->n, "memory.gguf", &g, NULL), want);
    free(block);
    PS_CHECK(g == NULL);
    PS_CHECK_EQ(err.status, got);
    PS_CHECK_EQ_STR(err.field, field);
    PS_CHECK(err.message[0] != '\0');
    if (got == PS_EFORMAT) PS_CHECK_EQ_STR(err.extra, "memory.gguf");
    if (got == PS_EFORMAT) PS_CHECK(err.offset <= f->n);
    PS_CHECK_EQ_U64(ps_heap_get_stats().live_blocks, before.live_blocks);
    if (g != NULL) ps_gguf_close(g);
}

/* ---- a folder for files ---- */

static char folder[256]; /* of this program, removed at its end */

__attribute__((unused)) static const char *in_folder(const char *name)
{
    static char path[512];
    if (folder[0] == '\0') {
        const char *tmp = getenv("TMPDIR");
        snprintf(folder, sizeof folder, "%s/ps_gguf_XXXXXX", tmp != NULL ? tmp : "/tmp");
        if (mkdtemp(folder) == NULL) ps_test_fail(__FILE__, __LINE__, "cannot make %s", folder);
    }
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

__attribute__((destructor)) static void remove_folder(void)
{
    DIR *d = folder[0] != '\0' ? opendir(folder) : NULL;
    if (d == NULL) return;
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.') unlink(in_folder(e->d_name));
    closedir(d);
    rmdir(folder);
}

__attribute__((unused)) static void write_file(const char *path, const void *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0)
        ps_test_fail(__FILE__, __LINE__, "cannot write %s", path);
}

/* A file with every kind of value and three tensors (f32 [4], q8_0 [64, 3], f16 [2, 3, 2, 2]). */
static inline void put_example(gguf_file *f)
{
    put_header(f, 3, 21);
    put_kv_str(f, "general.architecture", "llama");
    put_kv(f, "x.u8", PS_GGUF_U8, &(uint8_t){200}, 1);
    put_kv(f, "x.i8", PS_GGUF_I8, &(int8_t){-100}, 1);
    put_kv(f, "x.u16", PS_GGUF_U16, &(uint16_t){60000}, 2);
    put_kv(f, "x.i16", PS_GGUF_I16, &(int16_t){-30000}, 2);
    put_kv_u32(f, "x.u32", 4000000000u);
    put_kv(f, "x.i32", PS_GGUF_I32, &(int32_t){-2000000000}, 4);
    put_kv(f, "x.f32", PS_GGUF_F32, &(float){1.5f}, 4);
    put_kv(f, "x.true", PS_GGUF_BOOL, &(uint8_t){1}, 1);
    put_kv(f, "x.false", PS_GGUF_BOOL, &(uint8_t){0}, 1);
    put_kv(f, "x.u64", PS_GGUF_U64, &(uint64_t){UINT64_MAX}, 8);
    put_kv(f, "x.i64", PS_GGUF_I64, &(int64_t){INT64_MIN}, 8);
    put_kv(f, "x.f64", PS_GGUF_F64, &(double){0.1}, 8);
    put_kv_str(f, "x.text",
        "Gr\xc3\xbc\xc3\x9f"
        "e \xf0\x9f\x8c\x8d");
    put_kv_str(f, "x.empty", "");
    put_array(f, "x.i32s", PS_GGUF_I32, 3);
    put(f, (int32_t[]){1, -2, 3}, 12);
    put_array(f, "x.f32s", PS_GGUF_F32, 2);
    put(f, (float[]){0.25f, -4.0f}, 8);
    put_array(f, "x.bools", PS_GGUF_BOOL, 3);
    put(f, "\1\0\1", 3);
    put_array(f, "tokenizer.ggml.tokens", PS_GGUF_STR, 4);
    put_text(f, "a");
    put_text(f, "");
    put_text(f, "\xe2\x96\x81"
                "b");
    put_text(f, "<0x00>");
    put_array(f, "x.none", PS_GGUF_STR, 0);
    put_array(f, "x.no_numbers", PS_GGUF_U64, 0);
    put_tensor(f, "norm.weight", PS_FMT_F32, 1, (uint64_t[]){4}, 0);
    put_tensor(f, "blk.0.attn_q.weight", PS_FMT_Q8_0, 2, (uint64_t[]){64, 3}, 32);
    put_tensor(f, "four", PS_FMT_F16, 4, (uint64_t[]){2, 3, 2, 2}, 256);
    put_data(f, 32, 256 + 48);
}

#endif
