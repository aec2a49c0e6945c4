/* ps_gguf_part - see ps_gguf_part.h. A cursor walks the metadata once, front to back; whatever it
 * needs is first checked against the file's size and then read into one growing buffer, so that
 * memory follows what the file really holds, not what it claims. Pointers into the buffer are made
 * at the end, when it no longer moves; until then entries keep byte positions.
 */
#include "format/ps_gguf_part.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "format/ps_utf8.h"

enum {
    MIN_KV_BYTES = 14,          /* length, a key of 1, type, a value of 1 */
    MIN_TENSOR_BYTES = 33,      /* length, a name of 1, n_dims, one dimension, type, offset */
    FIRST_READ_BYTES = 1 << 18, /* all metadata of a model with a small vocabulary */
    READ_BYTES = 1 << 30,       /* a call: Linux reads at most 2 GiB - 4 KiB at once */
};

/* ---- messages ---- */

ps_status ps_gguf_part_fail_v(const ps_gguf_part *p, ps_err *err, ps_status status,
    const char *field, uint64_t offset, const char *fmt, va_list ap)
{
    if (err == NULL || err->status != PS_OK) return status;
    char text[sizeof err->message];
    vsnprintf(text, sizeof text, fmt, ap);
    const char *slash = strrchr(p->path, '/');
    const char *name = slash != NULL && slash[1] != '\0' ? slash + 1 : p->path;
    const bool named = status == PS_EFORMAT && field != NULL;
    ps_fail_field(
        err, status, field, "%s: %s%s%s", name, named ? field : "", named ? ": " : "", text);
    err->offset = offset;
    snprintf(err->extra, sizeof err->extra, "%s", p->path);
    return status;
}

ps_status ps_gguf_part_fail(const ps_gguf_part *p, ps_err *err, ps_status status, const char *field,
    uint64_t offset, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    ps_gguf_part_fail_v(p, err, status, field, offset, fmt, ap);
    va_end(ap);
    return status;
}

void ps_gguf_field(char out[128], const char *what, uint64_t i, const char *sub, const char *name)
{
    const int n = snprintf(out, 128, "%s[%llu].%s", what, (unsigned long long)i, sub);
    if (name == NULL || n < 0 || n > 100) return;
    /* A name may be 64 KiB long and must not be cut inside a character. */
    const size_t keep = ps_utf8_cut(name, 128 - (size_t)n - sizeof " ()");
    snprintf(out + n, 128 - (size_t)n, " (%.*s)", (int)keep, name);
}

ps_status ps_gguf_part_fail_file(
    const ps_gguf_part *p, ps_err *err, int os_errno, const char *sentence)
{
    const bool first = err != NULL && err->status == PS_OK;
    char why[128];
    ps_gguf_part_fail(
        p, err, PS_EFILE, NULL, 0, "%s: %s", sentence, strerror_r(os_errno, why, sizeof why));
    if (first) err->os_errno = os_errno;
    return PS_EFILE;
}

static ps_status fail_memory(const ps_gguf_part *p, ps_err *err)
{
    return ps_gguf_part_fail(p, err, PS_ENOMEM, NULL, 0, "out of host memory for its metadata");
}

static ps_status fail_unsupported(const ps_gguf_part *p, ps_err *err, const char *what,
    uint64_t offset, const char *supported, const char *sentence)
{
    const bool first = err != NULL && err->status == PS_OK;
    ps_gguf_part_fail(p, err, PS_EUNSUPPORTED, what, offset, "%s", sentence);
    if (first) snprintf(err->extra, sizeof err->extra, "%s", supported);
    return PS_EUNSUPPORTED;
}

/* ---- the cursor ---- */

typedef struct cursor {
    ps_gguf_part *p;
    ps_err *err;
    uint64_t pos;                  /* next byte to take */
    uint64_t n_loaded;             /* bytes of p->meta that are there */
    uint64_t n_names, n_names_cap; /* of p->names */
    uint64_t n_kv_cap, n_tensors_cap;
    /* What is being read, for messages. */
    const char *what; /* "kv", "tensor"; NULL in the header, where sub alone is the field */
    uint64_t i;
    const char *sub;
    uint64_t i_name; /* position in p->names, UINT64_MAX while unknown */
} cursor;

__attribute__((format(printf, 3, 4))) static ps_status fail_at(
    const cursor *c, uint64_t offset, const char *fmt, ...)
{
    char field[128];
    if (c->what == NULL)
        snprintf(field, sizeof field, "%s", c->sub);
    else
        ps_gguf_field(
            field, c->what, c->i, c->sub, c->i_name != UINT64_MAX ? c->p->names + c->i_name : NULL);
    va_list ap;
    va_start(ap, fmt);
    ps_gguf_part_fail_v(c->p, c->err, PS_EFORMAT, field, offset, fmt, ap);
    va_end(ap);
    return PS_EFORMAT;
}

/* Make the first `end` bytes of the file present; the caller checked `end` against its size. */
static ps_status load(cursor *c, uint64_t end)
{
    ps_gguf_part *p = c->p;
    uint64_t want = ps_max_u64(ps_max_u64(2 * c->n_loaded, FIRST_READ_BYTES), end);
    want = ps_min_u64(want, ps_min_u64(p->file_bytes, PS_GGUF_MAX_META_BYTES));
    uint8_t *grown = ps_realloc(p->meta_owned, want, 1);
    if (grown == NULL) return fail_memory(p, c->err);
    p->meta = p->meta_owned = grown;
    PS_TRY(ps_gguf_part_read(p, c->n_loaded, grown + c->n_loaded, want - c->n_loaded, c->err));
    c->n_loaded = want;
    return PS_OK;
}

/* After this [pos, pos + n) is inside the file and in memory. */
static ps_status need(cursor *c, uint64_t n)
{
    uint64_t end = 0;
    if (!ps_add_u64(c->pos, n, &end) || end > c->p->file_bytes)
        return fail_at(c, c->pos,
            "the file is cut short or damaged: %llu bytes are needed from byte %llu on, and the "
            "file has %llu",
            (unsigned long long)n, (unsigned long long)c->pos,
            (unsigned long long)c->p->file_bytes);
    if (end > PS_GGUF_MAX_META_BYTES)
        return fail_at(c, c->pos, "the metadata is larger than %d bytes", PS_GGUF_MAX_META_BYTES);
    return end <= c->n_loaded ? PS_OK : load(c, end);
}

static ps_status take(cursor *c, uint64_t n_bytes, uint64_t *out)
{
    PS_TRY(need(c, n_bytes));
    *out = 0;
    memcpy(out, c->p->meta + c->pos, n_bytes); /* both little-endian */
    c->pos += n_bytes;
    return PS_OK;
}

static uint64_t n_left(const cursor *c)
{
    return c->p->file_bytes - c->pos;
}

/* A count of things that take at least min_bytes each: what the rest of the file cannot hold is
 * refused at once. */
static ps_status take_count(cursor *c, uint64_t min_bytes, uint64_t *out)
{
    PS_TRY(take(c, 8, out));
    if (*out > n_left(c) / min_bytes)
        return fail_at(c, c->pos - 8,
            "a count of %llu, and the rest of the file has room for %llu at most",
            (unsigned long long)*out, (unsigned long long)(n_left(c) / min_bytes));
    return PS_OK;
}

/* A length and that many bytes of UTF-8; the cursor ends behind them. */
static ps_status take_text(cursor *c, bool printable, uint64_t *n_bytes)
{
    PS_TRY(take(c, 8, n_bytes));
    PS_TRY(need(c, *n_bytes));
    const uint64_t n_valid = ps_utf8_valid(c->p->meta + c->pos, *n_bytes, printable);
    if (n_valid < *n_bytes)
        return fail_at(c, c->pos + n_valid, "byte %llu of the text is %s",
            (unsigned long long)n_valid,
            printable ? "not valid UTF-8 or a control character" : "not valid UTF-8");
    c->pos += *n_bytes;
    return PS_OK;
}

/* A key or a tensor's name; a terminated copy goes to p->names, where c->i_name then points. */
static ps_status take_name(cursor *c, uint64_t most)
{
    ps_gguf_part *p = c->p;
    uint64_t n = 0;
    const uint64_t start = c->pos;
    PS_TRY(take(c, 8, &n));
    if (n == 0 || n > most)
        return fail_at(c, start, "its length is %llu, allowed are 1 to %llu bytes",
            (unsigned long long)n, (unsigned long long)most);
    c->pos = start;
    PS_TRY(take_text(c, true, &n));
    if (c->n_names_cap - c->n_names < n + 1) {
        const uint64_t cap = ps_max_u64(2 * c->n_names_cap, ps_max_u64(4096, 2 * (n + 1)));
        char *grown = ps_realloc(p->names, cap, 1);
        if (grown == NULL) return fail_memory(p, c->err);
        p->names = grown;
        c->n_names_cap = cap;
    }
    c->i_name = c->n_names;
    memcpy(p->names + c->n_names, p->meta + c->pos - n, n);
    p->names[c->n_names + n] = '\0';
    c->n_names += n + 1;
    return PS_OK;
}

/* ---- key-value entries ---- */

/* Bools have two values; any other byte would be a trap for a reader that copies it into a C bool.
 */
static ps_status check_bools(cursor *c, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        if (c->p->meta[c->pos + i] > 1)
            return fail_at(c, c->pos + i, "a boolean is %u, not 0 or 1", c->p->meta[c->pos + i]);
    return PS_OK;
}

static ps_status take_numbers(cursor *c, uint32_t type, uint64_t n)
{
    uint64_t n_bytes = 0;
    if (!ps_mul_u64(n, ps_gguf_type_bytes(type), &n_bytes) || n_bytes > n_left(c))
        return fail_at(c, c->pos, "%llu values of type %s need more bytes than the file has left",
            (unsigned long long)n, ps_gguf_type_name((ps_gguf_type)type));
    PS_TRY(need(c, n_bytes));
    if (type == PS_GGUF_BOOL) PS_TRY(check_bools(c, n_bytes));
    c->pos += n_bytes;
    return PS_OK;
}

static ps_status take_strings(cursor *c, ps_gguf_kv *kv)
{
    if (kv->n == 0) return PS_OK;
    if (kv->n > n_left(c) / 8) /* each takes at least its length field */
        return fail_at(c, c->pos - 8, "%llu strings cannot fit in the %llu bytes that are left",
            (unsigned long long)kv->n, (unsigned long long)n_left(c));
    const uint64_t start = c->pos;
    uint32_t *i_str = NULL;
    uint64_t cap = 0, n_bytes = 0;
    for (uint64_t i = 0; i < kv->n; i++) {
        if (i == cap) { /* grown as strings appear, since the count alone proves nothing */
            cap = ps_min_u64(kv->n, ps_max_u64(1024, 2 * cap));
            uint32_t *grown = ps_realloc(i_str, cap, sizeof *i_str);
            if (grown == NULL) return fail_memory(c->p, c->err);
            kv->i_str = i_str = grown; /* owned by the entry from here on, also on failure */
        }
        i_str[i] = (uint32_t)(c->pos - start); /* fits: metadata has at most 2^30 bytes */
        PS_TRY(take_text(c, false, &n_bytes));
    }
    return PS_OK;
}

static ps_status take_value(cursor *c, ps_gguf_kv *kv)
{
    uint64_t type = 0, n_bytes = 0;
    c->sub = "type";
    PS_TRY(take(c, 4, &type));
    if (type >= PS_GGUF_TYPE_COUNT)
        return fail_at(c, c->pos - 4, "value type %llu does not exist", (unsigned long long)type);
    kv->type = kv->elem_type = (ps_gguf_type)type;
    kv->n = 1;
    c->sub = "value";
    if (type == PS_GGUF_ARR) {
        c->sub = "elem_type";
        PS_TRY(take(c, 4, &type));
        if (type == PS_GGUF_ARR) return fail_at(c, c->pos - 4, "arrays of arrays are not allowed");
        if (type >= PS_GGUF_TYPE_COUNT)
            return fail_at(
                c, c->pos - 4, "element type %llu does not exist", (unsigned long long)type);
        kv->elem_type = (ps_gguf_type)type;
        c->sub = "count";
        PS_TRY(take(c, 8, &kv->n));
        c->sub = "value";
    } else if (type == PS_GGUF_STR) {
        kv->offset = c->pos;
        PS_TRY(take_text(c, false, &n_bytes));
        kv->n_bytes = n_bytes;
        kv->offset += 8; /* of the text, behind its length */
        return PS_OK;
    }
    kv->offset = c->pos;
    PS_TRY(type == PS_GGUF_STR ? take_strings(c, kv) : take_numbers(c, (uint32_t)type, kv->n));
    kv->n_bytes = c->pos - kv->offset;
    return PS_OK;
}

static ps_status take_kvs(cursor *c, uint64_t n)
{
    ps_gguf_part *p = c->p;
    c->what = "kv";
    for (uint64_t i = 0; i < n; i++) {
        if (i == c->n_kv_cap) {
            const uint64_t cap = ps_min_u64(n, ps_max_u64(64, 2 * c->n_kv_cap));
            ps_gguf_kv *grown = ps_realloc(p->kvs, cap, sizeof *p->kvs);
            if (grown == NULL) return fail_memory(p, c->err);
            p->kvs = grown;
            c->n_kv_cap = cap;
        }
        c->i = i;
        c->sub = "key";
        c->i_name = UINT64_MAX;
        PS_TRY(take_name(c, PS_GGUF_MAX_KEY_BYTES));
        p->n_kv = i + 1; /* now: fini frees what the entry gets, complete or not */
        p->kvs[i].key = (const char *)(uintptr_t)c->i_name;
        PS_TRY(take_value(c, &p->kvs[i]));
    }
    return PS_OK;
}

/* ---- the tensor directory ---- */

static void supported_types(char out[256])
{
    size_t n = 0;
    out[0] = '\0';
    for (uint32_t i = 0; i < PS_FMT_COUNT && n < 250; i++) {
        const ps_fmt_info *info = ps_fmt_get(i);
        if (info != NULL)
            n += (size_t)snprintf(out + n, 256 - n, "%s%s", n == 0 ? "" : ", ", info->name);
    }
}

ps_status ps_gguf_part_fail_type(
    const ps_gguf_part *p, uint32_t fmt, const char *name, uint64_t offset, ps_err *err)
{
    char what[64], supported[256], sentence[256];
    const ps_fmt_info *info = ps_gguf_tensor_type(fmt);
    if (info != NULL)
        snprintf(what, sizeof what, "tensor type %s", info->name);
    else
        snprintf(what, sizeof what, "tensor type %u", fmt);
    supported_types(supported);
    snprintf(sentence, sizeof sentence, "%.*s has %s, which is not supported",
        (int)ps_utf8_cut(name, 64), name, what);
    return fail_unsupported(p, err, what, offset, supported, sentence);
}

static void shape_text(const ps_gguf_tensor *t, char *out, size_t cap)
{
    size_t n = 0;
    for (uint32_t d = 0; d < t->n_dims && n < cap; d++)
        n += (size_t)snprintf(
            out + n, cap - n, "%s%llu", d == 0 ? "" : " x ", (unsigned long long)t->dims[d]);
}

/* Elements and bytes, every product checked. */
static ps_status size_tensor(cursor *c, ps_gguf_tensor *t)
{
    const ps_fmt_info *info = ps_gguf_tensor_type(t->fmt);
    if (info == NULL)
        return ps_gguf_part_fail_type(c->p, t->fmt, c->p->names + c->i_name, c->pos - 4, c->err);
    c->sub = "dims";
    if (t->dims[0] % info->block_elems != 0)
        return fail_at(c, c->pos - 4, "rows of %llu are not whole %s blocks of %u",
            (unsigned long long)t->dims[0], info->name, info->block_elems);
    t->n_elems = 1;
    uint64_t n_bytes = 0;
    bool fits = ps_mul_u64(t->dims[0] / info->block_elems, info->block_bytes, &n_bytes);
    for (int d = 0; d < PS_GGUF_MAX_DIMS; d++) {
        fits = fits && ps_mul_u64(t->n_elems, t->dims[d], &t->n_elems);
        if (d > 0) fits = fits && ps_mul_u64(n_bytes, t->dims[d], &n_bytes);
    }
    if (!fits || n_bytes > c->p->file_bytes) {
        char shape[96];
        shape_text(t, shape, sizeof shape);
        return fail_at(c, c->pos - 4, "%s weights are more than the whole file holds", shape);
    }
    t->n_bytes = n_bytes;
    return PS_OK;
}

static ps_status take_tensor(cursor *c, ps_gguf_tensor *t)
{
    uint64_t value = 0;
    c->sub = "name";
    c->i_name = UINT64_MAX;
    PS_TRY(take_name(c, PS_GGUF_MAX_NAME_BYTES));
    t->name = (const char *)(uintptr_t)c->i_name;
    c->sub = "n_dims";
    PS_TRY(take(c, 4, &value));
    if (value < 1 || value > PS_GGUF_MAX_DIMS)
        return fail_at(c, c->pos - 4, "%llu dimensions, allowed are 1 to %d",
            (unsigned long long)value, PS_GGUF_MAX_DIMS);
    t->n_dims = (uint32_t)value;
    c->sub = "dims";
    for (uint32_t d = 0; d < PS_GGUF_MAX_DIMS; d++) {
        t->dims[d] = 1;
        if (d >= t->n_dims) continue;
        PS_TRY(take(c, 8, &t->dims[d]));
        if (t->dims[d] == 0) return fail_at(c, c->pos - 8, "dimension %u is 0", d);
    }
    c->sub = "type";
    PS_TRY(take(c, 4, &value));
    t->fmt = (uint32_t)value;
    PS_TRY(size_tensor(c, t));
    c->sub = "offset";
    return take(c, 8, &t->offset);
}

static ps_status take_directory(cursor *c, uint64_t n)
{
    ps_gguf_part *p = c->p;
    c->what = "tensor";
    p->i_directory = c->pos;
    for (uint64_t i = 0; i < n; i++) {
        if (i == c->n_tensors_cap) {
            const uint64_t cap = ps_min_u64(n, ps_max_u64(64, 2 * c->n_tensors_cap));
            ps_gguf_tensor *grown = ps_realloc(p->tensors, cap, sizeof *p->tensors);
            if (grown == NULL) return fail_memory(p, c->err);
            p->tensors = grown;
            c->n_tensors_cap = cap;
        }
        c->i = i;
        PS_TRY(take_tensor(c, &p->tensors[i]));
        p->n_tensors = i + 1;
    }
    return PS_OK;
}

/* Where in the file tensor i's `offset` field is: its entry ends with it. The directory has been
 * checked. */
static uint64_t offset_field(const ps_gguf_part *p, uint64_t i)
{
    uint64_t at = p->i_directory;
    for (uint64_t k = 0;; k++) {
        at += 8 + strlen(p->tensors[k].name) + 4 + 8 * (uint64_t)p->tensors[k].n_dims + 4;
        if (k == i) return at;
        at += 8;
    }
}

__attribute__((format(printf, 4, 5))) static ps_status fail_offset(
    const ps_gguf_part *p, ps_err *err, uint64_t i, const char *fmt, ...)
{
    char field[128];
    ps_gguf_field(field, "tensor", i, "offset", p->tensors[i].name);
    va_list ap;
    va_start(ap, fmt);
    ps_gguf_part_fail_v(p, err, PS_EFORMAT, field, offset_field(p, i), fmt, ap);
    va_end(ap);
    return PS_EFORMAT;
}

/* Offsets relative to the data section become absolute ones inside the file. */
static ps_status place_tensors(ps_gguf_part *p, ps_err *err)
{
    uint64_t start = 0;
    if (p->n_tensors == 0) return PS_OK;
    ps_check_bug(ps_round_up_u64(p->meta_bytes, p->alignment, &start), err);
    for (uint64_t i = 0; i < p->n_tensors; i++) {
        ps_gguf_tensor *t = &p->tensors[i];
        const uint64_t relative = t->offset;
        uint64_t end = 0;
        if (relative % p->alignment != 0)
            return fail_offset(p, err, i, "%llu is not a multiple of the alignment %llu",
                (unsigned long long)relative, (unsigned long long)p->alignment);
        if (!ps_add_u64(start, relative, &t->offset) || !ps_add_u64(t->offset, t->n_bytes, &end) ||
            end > p->file_bytes)
            return fail_offset(p, err, i,
                "its %llu bytes at %llu of the data section reach beyond the file's %llu bytes; is "
                "the file cut short?",
                (unsigned long long)t->n_bytes, (unsigned long long)relative,
                (unsigned long long)p->file_bytes);
    }
    return PS_OK;
}

/* Heap sort: in place, no worst case that a file's author could ask for. */
static void sort_by_offset(const ps_gguf_tensor *t, uint32_t *order, uint64_t n)
{
    for (uint64_t start = n / 2, end = n; end > 1;) {
        uint32_t moved;
        if (start > 0) { /* build the heap */
            moved = order[--start];
        } else { /* take the largest off it */
            moved = order[--end];
            order[end] = order[0];
        }
        uint64_t hole = start;
        for (uint64_t child = 2 * hole + 1; child < end; child = 2 * hole + 1) {
            if (child + 1 < end && t[order[child + 1]].offset > t[order[child]].offset) child++;
            if (t[order[child]].offset <= t[moved].offset) break;
            order[hole] = order[child];
            hole = child;
        }
        order[hole] = moved;
    }
}

static ps_status check_overlaps(ps_gguf_part *p, ps_err *err)
{
    const ps_gguf_tensor *t = p->tensors;
    bool sorted = true;
    for (uint64_t i = 1; i < p->n_tensors; i++)
        sorted = sorted && t[i - 1].offset + t[i - 1].n_bytes <= t[i].offset;
    if (sorted) return PS_OK; /* what writers do */
    uint32_t *order = ps_alloc(p->n_tensors, sizeof *order);
    if (order == NULL) return fail_memory(p, err);
    for (uint64_t i = 0; i < p->n_tensors; i++) order[i] = (uint32_t)i;
    sort_by_offset(t, order, p->n_tensors);
    ps_status status = PS_OK;
    for (uint64_t k = 1; k < p->n_tensors && status == PS_OK; k++) {
        const uint32_t a = order[k - 1], b = order[k];
        if (t[a].offset + t[a].n_bytes > t[b].offset)
            status = fail_offset(p, err, ps_max_u64(a, b), "its bytes overlap those of %.*s",
                (int)ps_utf8_cut(t[a < b ? a : b].name, 64), t[a < b ? a : b].name);
    }
    ps_free(order);
    return status;
}

/* ---- the whole file ---- */

static ps_status take_header(cursor *c, uint64_t *n_tensors, uint64_t *n_kv)
{
    uint64_t magic = 0, version = 0;
    c->sub = "magic";
    if (c->p->file_bytes == 0) return fail_at(c, 0, "the file is empty");
    PS_TRY(take(c, 4, &magic));
    if (magic != 0x46554747u) /* "GGUF" */
        return fail_at(c, 0, "not a GGUF file, which begins with the letters GGUF");
    c->sub = "version";
    PS_TRY(take(c, 4, &version));
    if (version != 0 && (version & 0xffffu) == 0)
        return fail_unsupported(c->p, c->err, "big-endian GGUF", 4, "little-endian",
            "the file is big-endian; convert it to little-endian first");
    if (version == 0) return fail_at(c, 4, "version 0 does not exist");
    if (version != 2 && version != 3) {
        char what[64], sentence[160];
        snprintf(what, sizeof what, "GGUF version %llu", (unsigned long long)version);
        snprintf(sentence, sizeof sentence, "%s is not supported; %s", what,
            version == 1 ? "convert the model again with a current tool"
                         : "this release reads versions 2 and 3");
        return fail_unsupported(c->p, c->err, what, 4, "2, 3", sentence);
    }
    c->p->version = (uint32_t)version;
    c->sub = "n_tensors";
    PS_TRY(take_count(c, MIN_TENSOR_BYTES, n_tensors));
    c->sub = "n_kv";
    return take_count(c, MIN_KV_BYTES, n_kv);
}

static ps_status read_alignment(ps_gguf_part *p, ps_err *err)
{
    p->alignment = 32; /* the format's default */
    const ps_gguf_kv *kv = ps_gguf_part_find(p, "general.alignment");
    if (kv == NULL) return PS_OK;
    uint64_t value = 0;
    if (kv->type != PS_GGUF_U32 || !ps_gguf_get_u64(kv, &value))
        return ps_gguf_part_fail(p, err, PS_EFORMAT, kv->key, kv->offset, "its type is %s, not u32",
            ps_gguf_type_name(kv->type));
    if (value < PS_GGUF_MIN_ALIGNMENT || value > PS_GGUF_MAX_ALIGNMENT ||
        (value & (value - 1)) != 0)
        return ps_gguf_part_fail(p, err, PS_EFORMAT, kv->key, kv->offset,
            "an alignment of %llu, allowed are powers of two from %d to %d",
            (unsigned long long)value, PS_GGUF_MIN_ALIGNMENT, PS_GGUF_MAX_ALIGNMENT);
    p->alignment = value;
    return PS_OK;
}

/* Positions become pointers: nothing moves from here on. */
static void settle(ps_gguf_part *p)
{
    for (uint64_t i = 0; i < p->n_kv; i++) {
        p->kvs[i].key = p->names + (uintptr_t)p->kvs[i].key;
        p->kvs[i].data = p->meta + p->kvs[i].offset;
    }
    for (uint64_t i = 0; i < p->n_tensors; i++)
        p->tensors[i].name = p->names + (uintptr_t)p->tensors[i].name;
}

static ps_status parse(ps_gguf_part *p, uint64_t n_loaded, ps_err *err)
{
    cursor c = {.p = p, .err = err, .n_loaded = n_loaded, .i_name = UINT64_MAX};
    uint64_t n_tensors = 0, n_kv = 0;
    PS_TRY(take_header(&c, &n_tensors, &n_kv));
    PS_TRY(take_kvs(&c, n_kv));
    PS_TRY(take_directory(&c, n_tensors));
    p->meta_bytes = c.pos;
    if (p->meta_owned != NULL && n_loaded < c.n_loaded && c.n_loaded - c.pos > FIRST_READ_BYTES) {
        uint8_t *smaller = ps_realloc(p->meta_owned, p->meta_bytes, 1);
        if (smaller == NULL) return fail_memory(p, err);
        p->meta = p->meta_owned = smaller;
    }
    settle(p);
    PS_TRY(read_alignment(p, err));
    PS_TRY(place_tensors(p, err));
    return check_overlaps(p, err);
}

static int64_t read_file(void *ctx, int fd, void *dst, uint64_t n, uint64_t offset)
{
    (void)ctx;
    const ssize_t got = pread(fd, dst, ps_min_u64(n, READ_BYTES), (off_t)offset);
    return got >= 0 ? got : -(int64_t)errno;
}

static ps_status open_file(ps_gguf_part *p, ps_err *err)
{
    /* Non-blocking, so that a FIFO does not hang the caller; regular files take no notice. */
    p->fd = open(p->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (p->fd < 0) return ps_gguf_part_fail_file(p, err, errno, "cannot be opened");
    struct stat st;
    if (fstat(p->fd, &st) != 0) return ps_gguf_part_fail_file(p, err, errno, "cannot be examined");
    if (S_ISDIR(st.st_mode)) return ps_gguf_part_fail_file(p, err, EISDIR, "not a model file");
    if (!S_ISREG(st.st_mode)) return ps_gguf_part_fail_file(p, err, EINVAL, "not a regular file");
    p->file_bytes = (uint64_t)st.st_size;
    return PS_OK;
}

static ps_status map_file(ps_gguf_part *p, ps_err *err)
{
    if (p->n_tensors == 0) return PS_OK;
    void *map = mmap(NULL, p->file_bytes, PROT_READ, MAP_PRIVATE, p->fd, 0);
    if (map == MAP_FAILED) {
        if (errno == ENOMEM)
            return ps_gguf_part_fail(p, err, PS_ENOMEM, NULL, 0, "no address space to map it");
        return ps_gguf_part_fail_file(p, err, errno, "cannot be mapped");
    }
    p->map = map;
    return PS_OK;
}

static void point_into_map(ps_gguf_part *p)
{
    for (uint64_t i = 0; i < p->n_tensors; i++) p->tensors[i].data = p->map + p->tensors[i].offset;
}

ps_status ps_gguf_part_open(ps_gguf_part *p, const char *path, const ps_gguf_io *io, ps_err *err)
{
    *p = (ps_gguf_part){.fd = -1, .io = {.pread = read_file}};
    if (io != NULL) p->io = *io;
    p->path = ps_strdup(path);
    if (p->path == NULL) return ps_fail(err, PS_ENOMEM, "out of host memory opening %s", path);
    PS_TRY(open_file(p, err));
    PS_TRY(parse(p, 0, err));
    PS_TRY(map_file(p, err));
    point_into_map(p);
    return PS_OK;
}

ps_status ps_gguf_part_open_memory(
    ps_gguf_part *p, const void *bytes, uint64_t n_bytes, const char *name, ps_err *err)
{
    *p = (ps_gguf_part){.fd = -1, .map = bytes, .meta = bytes, .file_bytes = n_bytes};
    p->path = ps_strdup(name);
    if (p->path == NULL) return ps_fail(err, PS_ENOMEM, "out of host memory opening %s", name);
    PS_TRY(parse(p, n_bytes, err));
    point_into_map(p);
    return PS_OK;
}

void ps_gguf_part_fini(ps_gguf_part *p)
{
    if (p->fd >= 0 && p->path != NULL) {
        if (p->map != NULL) munmap((void *)(uintptr_t)p->map, p->file_bytes);
        close(p->fd);
    }
    for (uint64_t i = 0; i < p->n_kv; i++) ps_free((void *)(uintptr_t)p->kvs[i].i_str);
    ps_free(p->kvs);
    ps_free(p->tensors);
    ps_free(p->names);
    ps_free(p->meta_owned);
    ps_free(p->path);
    *p = (ps_gguf_part){.fd = -1};
}

ps_status ps_gguf_part_read(
    const ps_gguf_part *p, uint64_t offset, void *dst, uint64_t n, ps_err *err)
{
    if (p->fd < 0) {
        memcpy(dst, p->map + offset, n);
        return PS_OK;
    }
    uint8_t *to = dst;
    while (n > 0) {
        const int64_t got = p->io.pread(p->io.ctx, p->fd, to, n, offset);
        if (got == -EINTR) continue;
        if (got < 0) return ps_gguf_part_fail_file(p, err, (int)-got, "cannot be read");
        if (got == 0)
            return ps_gguf_part_fail_file(p, err, EIO, "became shorter while it was read");
        ps_check_bug((uint64_t)got <= n, err);
        to += got, offset += (uint64_t)got, n -= (uint64_t)got;
    }
    return PS_OK;
}

const ps_gguf_kv *ps_gguf_part_find(const ps_gguf_part *p, const char *key)
{
    for (uint64_t i = 0; i < p->n_kv; i++)
        if (strcmp(p->kvs[i].key, key) == 0) return &p->kvs[i];
    return NULL;
}
