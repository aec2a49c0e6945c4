/* ps_gguf_value - types and values of GGUF metadata: the tables, the typed getters and the digest.
 * Needs nothing of the reader but its entries, which were checked when the file was opened.
 *
 * Threads: pure functions.
 */
#include <string.h>

#include "format/ps_gguf_part.h"
#include "format/ps_sha256.h"

uint32_t ps_gguf_type_bytes(uint32_t type)
{
    static const uint8_t n_bytes[PS_GGUF_TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < PS_GGUF_TYPE_COUNT ? n_bytes[type] : 0;
}

const char *ps_gguf_type_name(ps_gguf_type type)
{
    static const char *const names[PS_GGUF_TYPE_COUNT] = {
        "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"};
    return (uint32_t)type < PS_GGUF_TYPE_COUNT ? names[type] : "unknown";
}

const ps_fmt_info *ps_gguf_tensor_type(uint32_t fmt)
{
    /* Types that files use and we do not run: their sizes are needed to check the directory. */
    static const struct {
        uint32_t fmt;
        ps_fmt_info info;
    } others[] = {
        {16, {"iq2_xxs", 256, 66}},
        {17, {"iq2_xs", 256, 74}},
        {18, {"iq3_xxs", 256, 98}},
        {19, {"iq1_s", 256, 50}},
        {21, {"iq3_s", 256, 110}},
        {22, {"iq2_s", 256, 82}},
        {24, {"i8", 1, 1}},
        {25, {"i16", 1, 2}},
        {26, {"i32", 1, 4}},
        {27, {"i64", 1, 8}},
        {28, {"f64", 1, 8}},
        {29, {"iq1_m", 256, 56}},
        {34, {"tq1_0", 256, 54}},
        {35, {"tq2_0", 256, 66}},
        {40, {"nvfp4", 64, 36}},
        {41, {"q1_0", 128, 18}},
    };
    const ps_fmt_info *info = ps_fmt_get(fmt);
    for (size_t i = 0; info == NULL && i < sizeof others / sizeof *others; i++)
        if (others[i].fmt == fmt) info = &others[i].info;
    return info;
}

const char *ps_gguf_tensor_type_name(uint32_t fmt)
{
    const ps_fmt_info *info = ps_gguf_tensor_type(fmt);
    return info != NULL ? info->name : NULL;
}

/* ---- numbers ---- */

static uint64_t load_bits(const uint8_t *data, uint32_t n_bytes)
{
    uint64_t bits = 0;
    memcpy(&bits, data, n_bytes); /* both little-endian */
    return bits;
}

static bool is_signed(ps_gguf_type type)
{
    return type == PS_GGUF_I8 || type == PS_GGUF_I16 || type == PS_GGUF_I32 || type == PS_GGUF_I64;
}

static bool is_integer(ps_gguf_type type)
{
    return is_signed(type) || type == PS_GGUF_U8 || type == PS_GGUF_U16 || type == PS_GGUF_U32 ||
           type == PS_GGUF_U64;
}

/* Any integer as sign and 64 bits: negative values in two's complement. */
static bool load_integer(ps_gguf_type type, const uint8_t *data, uint64_t *bits, bool *negative)
{
    if (!is_integer(type)) return false;
    const uint32_t n_bytes = ps_gguf_type_bytes(type);
    *bits = load_bits(data, n_bytes);
    *negative = is_signed(type) && (*bits >> (8 * n_bytes - 1) & 1) != 0;
    if (*negative && n_bytes < 8) *bits |= UINT64_MAX << (8 * n_bytes);
    return true;
}

static bool load_u64(ps_gguf_type type, const uint8_t *data, uint64_t *out)
{
    uint64_t bits = 0;
    bool negative = false;
    if (!load_integer(type, data, &bits, &negative) || negative) return false;
    *out = bits;
    return true;
}

static bool load_i64(ps_gguf_type type, const uint8_t *data, int64_t *out)
{
    uint64_t bits = 0;
    bool negative = false;
    if (!load_integer(type, data, &bits, &negative)) return false;
    if (!negative && bits > (uint64_t)INT64_MAX) return false;
    memcpy(out, &bits, sizeof bits);
    return true;
}

static bool load_f64(ps_gguf_type type, const uint8_t *data, double *out)
{
    if (type == PS_GGUF_F32) {
        float f;
        memcpy(&f, data, sizeof f);
        *out = (double)f;
        return true;
    }
    if (type == PS_GGUF_F64) {
        memcpy(out, data, sizeof *out);
        return true;
    }
    const int64_t most = (int64_t)1 << 53; /* up to here doubles hold every integer */
    int64_t value = 0;
    if (!load_i64(type, data, &value) || value > most || value < -most) return false;
    *out = (double)value;
    return true;
}

static bool load_bool(ps_gguf_type type, const uint8_t *data, bool *out)
{
    if (type != PS_GGUF_BOOL) return false;
    *out = data[0] != 0;
    return true;
}

/* ---- scalars ---- */

/* An array's type is ARR, which no loader takes. */
bool ps_gguf_get_u64(const ps_gguf_kv *kv, uint64_t *out)
{
    return kv != NULL && load_u64(kv->type, kv->data, out);
}

bool ps_gguf_get_i64(const ps_gguf_kv *kv, int64_t *out)
{
    return kv != NULL && load_i64(kv->type, kv->data, out);
}

bool ps_gguf_get_f64(const ps_gguf_kv *kv, double *out)
{
    return kv != NULL && load_f64(kv->type, kv->data, out);
}

bool ps_gguf_get_bool(const ps_gguf_kv *kv, bool *out)
{
    return kv != NULL && load_bool(kv->type, kv->data, out);
}

bool ps_gguf_get_str(const ps_gguf_kv *kv, ps_gguf_str *out)
{
    if (kv == NULL || kv->type != PS_GGUF_STR) return false;
    *out = (ps_gguf_str){.s = (const char *)kv->data, .n_bytes = kv->n_bytes};
    return true;
}

bool ps_gguf_str_eq(ps_gguf_str a, const char *b)
{
    return strlen(b) == a.n_bytes && memcmp(a.s, b, a.n_bytes) == 0;
}

/* ---- elements ---- */

/* Where element i's bytes are; NULL where there is no such element. */
static const uint8_t *element(const ps_gguf_kv *kv, uint64_t i)
{
    if (kv == NULL || kv->type != PS_GGUF_ARR || i >= kv->n) return NULL;
    if (kv->elem_type == PS_GGUF_STR) return kv->data + kv->i_str[i];
    return kv->data + i * ps_gguf_type_bytes(kv->elem_type);
}

bool ps_gguf_elem_u64(const ps_gguf_kv *kv, uint64_t i, uint64_t *out)
{
    const uint8_t *data = element(kv, i);
    return data != NULL && load_u64(kv->elem_type, data, out);
}

bool ps_gguf_elem_i64(const ps_gguf_kv *kv, uint64_t i, int64_t *out)
{
    const uint8_t *data = element(kv, i);
    return data != NULL && load_i64(kv->elem_type, data, out);
}

bool ps_gguf_elem_f64(const ps_gguf_kv *kv, uint64_t i, double *out)
{
    const uint8_t *data = element(kv, i);
    return data != NULL && load_f64(kv->elem_type, data, out);
}

bool ps_gguf_elem_bool(const ps_gguf_kv *kv, uint64_t i, bool *out)
{
    const uint8_t *data = element(kv, i);
    return data != NULL && load_bool(kv->elem_type, data, out);
}

bool ps_gguf_elem_str(const ps_gguf_kv *kv, uint64_t i, ps_gguf_str *out)
{
    const uint8_t *data = element(kv, i);
    if (data == NULL || kv->elem_type != PS_GGUF_STR) return false;
    *out = (ps_gguf_str){.s = (const char *)data + 8, .n_bytes = load_bits(data, 8)};
    return true;
}

/* ---- digest ---- */

static void feed_u64(ps_sha256 *s, uint64_t value)
{
    ps_sha256_feed(s, &value, sizeof value);
}

/* With its length, so that no two lists of texts feed the same bytes. */
static void feed_text(ps_sha256 *s, const char *text)
{
    feed_u64(s, strlen(text));
    ps_sha256_feed(s, text, strlen(text));
}

void ps_gguf_digest(const ps_gguf *g, uint8_t out[32])
{
    ps_sha256 s;
    ps_sha256_init(&s);
    feed_text(&s, "pipeshard GGUF metadata 1");
    const ps_gguf_kv *kv;
    for (uint64_t i = 0; (kv = ps_gguf_kv_at(g, i)) != NULL; i++) {
        if (strncmp(kv->key, "split.", 6) == 0) continue;
        feed_text(&s, kv->key);
        feed_u64(&s, kv->type);
        feed_u64(&s, kv->elem_type);
        feed_u64(&s, kv->n);
        feed_u64(&s, kv->n_bytes);
        ps_sha256_feed(&s, kv->data, kv->n_bytes);
    }
    const ps_gguf_tensor *t;
    for (uint64_t i = 0; (t = ps_gguf_tensor_at(g, i)) != NULL; i++) {
        feed_text(&s, t->name);
        feed_u64(&s, t->fmt);
        feed_u64(&s, t->n_dims);
        for (int d = 0; d < PS_GGUF_MAX_DIMS; d++) feed_u64(&s, t->dims[d]);
    }
    ps_sha256_fini(&s, out);
}
