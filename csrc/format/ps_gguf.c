/* ps_gguf - see ps_gguf.h. Opens the parts (ps_gguf_part does the reading and checking of each) and
 * checks what spans them: the numbers of a split model, names that occur twice.
 */
#include "format/ps_gguf.h"

#include <stdio.h>
#include <string.h>

#include "format/ps_gguf_map.h"
#include "format/ps_gguf_part.h"

struct ps_gguf {
    ps_gguf_part *parts; /* owns */
    uint32_t n_parts;
    const ps_gguf_tensor
        *tensors;           /* all parts'; borrows the part's own array where there is one part */
    ps_gguf_tensor *merged; /* owns `tensors` where there are several */
    uint64_t n_tensors;
    ps_gguf_map kv_map, tensor_map;
};

/* ---- split models ---- */

enum { SPLIT_SUFFIX_BYTES = 20 }; /* -00001-of-00003.gguf */

static bool five_digits(const char *s, uint32_t *out)
{
    *out = 0;
    for (int i = 0; i < 5; i++) {
        if (s[i] < '0' || s[i] > '9') return false;
        *out = *out * 10 + (uint32_t)(s[i] - '0');
    }
    return true;
}

/* NAME-00002-of-00005.gguf: *stem is NAME's length, *i counts from 0. */
static bool split_name(const char *path, size_t *stem, uint32_t *i, uint32_t *n)
{
    const size_t length = strlen(path);
    if (length <= SPLIT_SUFFIX_BYTES) return false;
    const char *s = path + length - SPLIT_SUFFIX_BYTES;
    if (s[0] != '-' || !five_digits(s + 1, i) || strncmp(s + 6, "-of-", 4) != 0) return false;
    if (!five_digits(s + 10, n) || strcmp(s + 15, ".gguf") != 0) return false;
    if (*i < 1 || *i > *n) return false;
    *stem = length - SPLIT_SUFFIX_BYTES;
    *i -= 1;
    return true;
}

static ps_status split_number(const ps_gguf_part *p, const char *key, uint64_t *out, ps_err *err)
{
    const ps_gguf_kv *kv = ps_gguf_part_find(p, key);
    if (kv == NULL)
        return ps_gguf_part_fail(
            p, err, PS_EFORMAT, key, 0, "the key is missing in a part of a split model");
    if (!ps_gguf_get_u64(kv, out))
        return ps_gguf_part_fail(p, err, PS_EFORMAT, key, kv->offset, "%s has type %s, not a count",
            key, ps_gguf_type_name(kv->type));
    return PS_OK;
}

/* 1 where the file is not split. */
static ps_status split_count(const ps_gguf_part *p, uint64_t *out, ps_err *err)
{
    *out = 1;
    const ps_gguf_kv *kv = ps_gguf_part_find(p, "split.count");
    if (kv == NULL) return PS_OK;
    ps_status status = split_number(p, "split.count", out, err);
    if (status != PS_OK) return status;
    if (*out > PS_GGUF_MAX_PARTS)
        return ps_gguf_part_fail(p, err, PS_EFORMAT, "split.count", kv->offset,
            "%llu parts, allowed are at most %d", (unsigned long long)*out, PS_GGUF_MAX_PARTS);
    if (*out == 0) *out = 1; /* some writers' way to say so */
    return PS_OK;
}

/* Part i of n says that it is that. */
static ps_status check_part(const ps_gguf_part *p, uint64_t i, uint64_t n, ps_err *err)
{
    uint64_t count = 0, no = 0;
    ps_status status = split_number(p, "split.count", &count, err);
    if (status == PS_OK) status = split_number(p, "split.no", &no, err);
    if (status != PS_OK) return status;
    const char *wrong = count != n ? "split.count" : no != i ? "split.no" : NULL;
    if (wrong == NULL) return PS_OK;
    return ps_gguf_part_fail(p, err, PS_EFORMAT, wrong, ps_gguf_part_find(p, wrong)->offset,
        "it says that it is part %llu of %llu and is named as part %llu of %llu: do all parts "
        "belong to one model and keep their names?",
        (unsigned long long)no + 1, (unsigned long long)count, (unsigned long long)i + 1,
        (unsigned long long)n);
}

/* The opened file in parts[0] turned out to be part of n: move it to its place and open the others.
 */
static ps_status open_others(ps_gguf *g, uint64_t n, const ps_gguf_io *io, ps_err *err)
{
    char *path = NULL;
    size_t stem = 0;
    uint32_t i_opened = 0, n_named = 0;
    const ps_gguf_part *opened = &g->parts[0];
    if (opened->fd < 0)
        return ps_gguf_part_fail(opened, err, PS_EUNSUPPORTED, "split model in memory", 0,
            "one part of a split model cannot be read from memory");
    if (!split_name(opened->path, &stem, &i_opened, &n_named) || n_named != n)
        return ps_gguf_part_fail(opened, err, PS_EFORMAT, "split.count", 0,
            "it is one of %llu parts, which are found by their names: rename them to "
            "NAME-00001-of-%05llu.gguf and so on",
            (unsigned long long)n, (unsigned long long)n);

    ps_gguf_part *grown = ps_realloc(g->parts, n, sizeof *g->parts);
    if (grown == NULL) return ps_fail(err, PS_ENOMEM, "out of host memory opening a split model");
    g->parts = grown;
    g->n_parts = (uint32_t)n; /* the new ones are zeroed, which fini takes */
    if (i_opened != 0) {
        g->parts[i_opened] = g->parts[0];
        g->parts[0] = (ps_gguf_part){0};
    }
    path = ps_strdup(g->parts[i_opened].path);
    if (path == NULL) return ps_fail(err, PS_ENOMEM, "out of host memory opening a split model");
    ps_status status = PS_OK;
    for (uint32_t i = 0; i < n && status == PS_OK; i++) {
        for (uint32_t digit = 5, rest = i + 1; digit > 0; digit--, rest /= 10)
            path[stem + digit] = (char)('0' + rest % 10);
        if (i != i_opened) status = ps_gguf_part_open(&g->parts[i], path, io, err);
        if (status == PS_OK) status = check_part(&g->parts[i], i, n, err);
    }
    ps_free(path);
    return status;
}

/* ---- what spans parts ---- */

static ps_status merge_tensors(ps_gguf *g, ps_err *err)
{
    if (g->n_parts == 1) {
        g->tensors = g->parts[0].tensors;
        g->n_tensors = g->parts[0].n_tensors;
        return PS_OK;
    }
    const ps_gguf_part *first = &g->parts[0];
    uint64_t expected = 0, n = 0;
    for (uint32_t i = 0; i < g->n_parts; i++) n += g->parts[i].n_tensors;
    ps_status status = split_number(first, "split.tensors.count", &expected, err);
    if (status != PS_OK) return status;
    if (n != expected || n >= INT32_MAX)
        return ps_gguf_part_fail(first, err, PS_EFORMAT, "split.tensors.count",
            ps_gguf_part_find(first, "split.tensors.count")->offset,
            "it says %llu tensors, and the %u parts have %llu", (unsigned long long)expected,
            g->n_parts, (unsigned long long)n);
    g->merged = ps_alloc(n, sizeof *g->merged);
    if (g->merged == NULL)
        return ps_fail(
            err, PS_ENOMEM, "out of host memory for %llu tensors", (unsigned long long)n);
    for (uint32_t i = 0; i < g->n_parts; i++) {
        ps_gguf_part *p = &g->parts[i];
        for (uint64_t k = 0; k < p->n_tensors; k++) {
            g->merged[g->n_tensors] = p->tensors[k];
            g->merged[g->n_tensors++].i_file = i;
        }
        ps_free(p->tensors);
        p->tensors = NULL;
        p->n_tensors = 0;
    }
    g->tensors = g->merged;
    return PS_OK;
}

_Static_assert(offsetof(ps_gguf_kv, key) == 0 && offsetof(ps_gguf_tensor, name) == 0,
    "the map takes records that begin with their name");

static ps_status index_keys(ps_gguf_map *m, const ps_gguf_part *p, ps_err *err)
{
    uint64_t twice = 0;
    ps_status status = ps_gguf_map_init(m, p->kvs, sizeof *p->kvs, p->n_kv, &twice);
    if (status != PS_OK)
        return ps_fail(err, status, "out of host memory for an index of %s", p->path);
    if (twice == p->n_kv) return PS_OK;
    char field[128];
    ps_gguf_field(field, "kv", twice, "key", p->kvs[twice].key);
    return ps_gguf_part_fail(
        p, err, PS_EFORMAT, field, p->kvs[twice].offset, "the key occurs a second time");
}

static ps_status index_names(ps_gguf *g, ps_err *err)
{
    ps_status status = index_keys(&g->kv_map, &g->parts[0], err);
    for (uint32_t i = 1; i < g->n_parts && status == PS_OK; i++) {
        ps_gguf_map checked = {0};
        status = index_keys(&checked, &g->parts[i], err);
        ps_gguf_map_fini(&checked);
    }
    if (status != PS_OK) return status;
    uint64_t twice = 0;
    status = ps_gguf_map_init(&g->tensor_map, g->tensors, sizeof *g->tensors, g->n_tensors, &twice);
    if (status != PS_OK) return ps_fail(err, status, "out of host memory for an index of tensors");
    if (twice == g->n_tensors) return PS_OK;
    const ps_gguf_tensor *t = &g->tensors[twice];
    char field[128];
    ps_gguf_field(field, "tensor", twice, "name", t->name);
    return ps_gguf_part_fail(&g->parts[t->i_file], err, PS_EFORMAT, field,
        g->parts[t->i_file].i_directory, "a second tensor has this name");
}

/* ---- open and close ---- */

static ps_status create(ps_gguf **out, ps_err *err)
{
    ps_gguf *g = ps_alloc(1, sizeof *g);
    if (g != NULL) g->parts = ps_alloc(1, sizeof *g->parts);
    if (g == NULL || g->parts == NULL) {
        ps_free(g);
        return ps_fail(err, PS_ENOMEM, "out of host memory opening a GGUF file");
    }
    g->n_parts = 1;
    *out = g;
    return PS_OK;
}

/* The file given by the caller is in parts[0], or failed to get there. */
static ps_status finish_open(
    ps_gguf *g, ps_status status, const ps_gguf_io *io, ps_gguf **out, ps_err *err)
{
    uint64_t n_parts = 1;
    if (status == PS_OK) status = split_count(&g->parts[0], &n_parts, err);
    if (status == PS_OK && n_parts > 1) status = open_others(g, n_parts, io, err);
    if (status == PS_OK) status = merge_tensors(g, err);
    if (status == PS_OK) status = index_names(g, err);
    if (status != PS_OK) {
        ps_gguf_close(g);
        return status;
    }
    *out = g;
    return PS_OK;
}

ps_status ps_gguf_open_io(const char *path, const ps_gguf_io *io, ps_gguf **out, ps_err *err)
{
    ps_gguf *g = NULL;
    if (path == NULL) return ps_fail_field(err, PS_EREQUEST, "path", "no path is given");
    ps_status status = create(&g, err);
    if (status != PS_OK) return status;
    return finish_open(g, ps_gguf_part_open(&g->parts[0], path, io, err), io, out, err);
}

ps_status ps_gguf_open(const char *path, ps_gguf **out, ps_err *err)
{
    return ps_gguf_open_io(path, NULL, out, err);
}

ps_status ps_gguf_open_memory(
    const void *bytes, uint64_t n_bytes, const char *name, ps_gguf **out, ps_err *err)
{
    ps_gguf *g = NULL;
    ps_status status = create(&g, err);
    if (status != PS_OK) return status;
    status = ps_gguf_part_open_memory(&g->parts[0], bytes, n_bytes, name, err);
    return finish_open(g, status, NULL, out, err);
}

void ps_gguf_close(ps_gguf *g)
{
    if (g == NULL) return;
    ps_gguf_map_fini(&g->kv_map);
    ps_gguf_map_fini(&g->tensor_map);
    ps_free(g->merged);
    for (uint32_t i = 0; i < g->n_parts; i++) ps_gguf_part_fini(&g->parts[i]);
    ps_free(g->parts);
    ps_free(g);
}

/* ---- what was read ---- */

uint32_t ps_gguf_version(const ps_gguf *g)
{
    return g->parts[0].version;
}

uint64_t ps_gguf_kv_count(const ps_gguf *g)
{
    return g->parts[0].n_kv;
}

const ps_gguf_kv *ps_gguf_kv_at(const ps_gguf *g, uint64_t i)
{
    return i < g->parts[0].n_kv ? &g->parts[0].kvs[i] : NULL;
}

const ps_gguf_kv *ps_gguf_find(const ps_gguf *g, const char *key)
{
    return ps_gguf_map_find(&g->kv_map, key);
}

ps_status ps_gguf_fail_key(const ps_gguf *g, const char *key, ps_err *err, const char *fmt, ...)
{
    const ps_gguf_kv *kv = ps_gguf_find(g, key);
    va_list ap;
    va_start(ap, fmt);
    ps_gguf_part_fail_v(&g->parts[0], err, PS_EFORMAT, key, kv != NULL ? kv->offset : 0, fmt, ap);
    va_end(ap);
    return PS_EFORMAT;
}

uint64_t ps_gguf_tensor_count(const ps_gguf *g)
{
    return g->n_tensors;
}

const ps_gguf_tensor *ps_gguf_tensor_at(const ps_gguf *g, uint64_t i)
{
    return i < g->n_tensors ? &g->tensors[i] : NULL;
}

const ps_gguf_tensor *ps_gguf_tensor_find(const ps_gguf *g, const char *name)
{
    return ps_gguf_map_find(&g->tensor_map, name);
}

ps_status ps_gguf_check_fmt(const ps_gguf *g, const ps_gguf_tensor *t, ps_err *err)
{
    if (ps_fmt_get(t->fmt) != NULL) return PS_OK;
    return ps_gguf_part_fail_type(&g->parts[t->i_file], t->fmt, t->name, t->offset, err);
}

uint32_t ps_gguf_file_count(const ps_gguf *g)
{
    return g->n_parts;
}

const ps_gguf_part *ps_gguf_part_at(const ps_gguf *g, uint32_t i)
{
    return i < g->n_parts ? &g->parts[i] : NULL;
}

const char *ps_gguf_file_path(const ps_gguf *g, uint32_t i_file)
{
    const ps_gguf_part *p = ps_gguf_part_at(g, i_file);
    return p != NULL ? p->path : NULL;
}

uint64_t ps_gguf_file_bytes(const ps_gguf *g, uint32_t i_file)
{
    const ps_gguf_part *p = ps_gguf_part_at(g, i_file);
    return p != NULL ? p->file_bytes : 0;
}

uint64_t ps_gguf_meta_bytes(const ps_gguf *g, uint32_t i_file)
{
    const ps_gguf_part *p = ps_gguf_part_at(g, i_file);
    return p != NULL ? p->meta_bytes : 0;
}

uint64_t ps_gguf_alignment(const ps_gguf *g, uint32_t i_file)
{
    const ps_gguf_part *p = ps_gguf_part_at(g, i_file);
    return p != NULL ? p->alignment : 0;
}

ps_status ps_gguf_pread(
    const ps_gguf *g, uint32_t i_file, uint64_t offset, void *dst, uint64_t n, ps_err *err)
{
    const ps_gguf_part *p = ps_gguf_part_at(g, i_file);
    uint64_t end = 0;
    if (p == NULL || !ps_add_u64(offset, n, &end) || end > p->file_bytes)
        return ps_fail_field(err, PS_EREQUEST, "offset",
            "%llu bytes at %llu are not inside file %u of the model", (unsigned long long)n,
            (unsigned long long)offset, i_file);
    return ps_gguf_part_read(p, offset, dst, n, err);
}
