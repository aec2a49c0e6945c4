/* fuzz_gguf - whatever bytes it is given, ps_gguf_open_memory either refuses them with an explained
 * error or hands out values and tensors that lie inside them; nothing is leaked. What this file
 * checks itself ends the process by trap, as a sanitizer's finding does. Threads: one. */
#include <string.h>

#include "format/ps_gguf.h"
#include "format/ps_utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void must(bool condition)
{
    if (!condition) __builtin_trap();
}

static uint64_t sum_of(const void *bytes, uint64_t n)
{
    const uint8_t *p = bytes;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += p[i];
    return sum;
}

static void use_value(const ps_gguf *g, const ps_gguf_kv *kv)
{
    uint64_t u = 0;
    int64_t i = 0;
    double d = 0;
    bool b = false;
    ps_gguf_str s = {0};
    ps_gguf_get_u64(kv, &u), ps_gguf_get_i64(kv, &i), ps_gguf_get_f64(kv, &d);
    ps_gguf_get_bool(kv, &b);
    if (ps_gguf_get_str(kv, &s)) must(ps_utf8_valid(s.s, s.n_bytes, false) == s.n_bytes);
    for (uint64_t k = 0; kv->type == PS_GGUF_ARR && k < kv->n; k++) {
        if (ps_gguf_elem_str(kv, k, &s)) must(ps_utf8_valid(s.s, s.n_bytes, false) == s.n_bytes);
        must(ps_gguf_elem_f64(kv, k, &d) + ps_gguf_elem_u64(kv, k, &u) +
                 ps_gguf_elem_i64(kv, k, &i) + ps_gguf_elem_bool(kv, k, &b) <=
             3);
    }
    must(!ps_gguf_elem_u64(kv, kv->n, &u) && !ps_gguf_elem_str(kv, kv->n, &s));
    must(sum_of(kv->data, kv->n_bytes) <= 255 * kv->n_bytes);
    must(ps_utf8_valid(kv->key, strlen(kv->key), true) == strlen(kv->key));
    must(ps_gguf_find(g, kv->key) == kv);
}

static void use_tensor(const ps_gguf *g, const ps_gguf_tensor *t, const uint8_t *data, size_t n)
{
    must(t->offset >= ps_gguf_meta_bytes(g, 0) && t->offset <= n && t->n_bytes <= n - t->offset);
    must(t->data == data + t->offset && t->offset % ps_gguf_alignment(g, 0) == 0);
    must(t->n_bytes > 0 && sum_of(t->data, t->n_bytes) <= 255 * t->n_bytes);
    must(ps_gguf_tensor_find(g, t->name) == t && ps_gguf_tensor_type_name(t->fmt) != NULL);
    uint8_t first = 0;
    must(ps_gguf_pread(g, t->i_file, t->offset, &first, 1, NULL) == PS_OK && first == t->data[0]);
    must(t->n_elems == t->dims[0] * t->dims[1] * t->dims[2] * t->dims[3]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const ps_heap_stats before = ps_heap_get_stats();
    ps_gguf *g = NULL;
    ps_err err = {0};
    const ps_status status = ps_gguf_open_memory(data, n, "fuzz.gguf", &g, &err);
    must(err.status == status && (g != NULL) == (status == PS_OK));
    if (g == NULL) {
        must(status == PS_EFORMAT || status == PS_EUNSUPPORTED);
        must(err.message[0] != '\0' && err.field[0] != '\0' && err.extra[0] != '\0');
        must(err.offset <= n &&
             ps_utf8_valid(err.field, strlen(err.field), true) == strlen(err.field));
    } else {
        const ps_gguf_kv *kv;
        const ps_gguf_tensor *t;
        for (uint64_t i = 0; (kv = ps_gguf_kv_at(g, i)) != NULL; i++) use_value(g, kv);
        for (uint64_t i = 0; (t = ps_gguf_tensor_at(g, i)) != NULL; i++) use_tensor(g, t, data, n);
        must(ps_gguf_find(g, "no\nsuch key") == NULL); /* no file may hold a control character */
        uint8_t digest[32];
        ps_gguf_digest(g, digest);
        ps_gguf_close(g);
    }
    must(ps_heap_get_stats().live_blocks == before.live_blocks);
    return 0;
}
