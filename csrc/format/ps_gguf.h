/* ps_gguf - reads GGUF files: metadata, the tensor directory, and where each tensor's bytes lie.
 * The file is hostile input: every count, length, offset, type and product is checked before use,
 * work is linear in the bytes of metadata, and no allocation is larger than the file's own size
 * justifies.
 *
 * Not here: what the keys mean (engine/model), what the bytes of a tensor mean (ps_quant), writing.
 * Threads: after open everything but ps_gguf_close is read-only and may be called from any thread
 * at once.
 *
 * Metadata is read once into private memory and checked there, so a file that changes later cannot
 * un-check it. Tensor data stays in the file: ps_gguf_pread copies from it, `data` points into a
 * read-only private mapping.
 *
 * Errors: PS_EFILE (os_errno set) for a missing file, a directory, no permission, a failed read;
 * PS_EFORMAT with field
 * ("magic", "kv[3].key", "general.alignment", "tensor[12].offset (blk.0.attn_q.weight)"), offset
 * (byte in the file) and extra (path) for wrong content; PS_EUNSUPPORTED with field and extra (what
 * is supported) for well-formed files of another version, byte order or tensor type; PS_ENOMEM.
 */
#ifndef PS_GGUF_H
#define PS_GGUF_H

#include "base/ps_base.h"
#include "format/ps_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PS_GGUF_MAX_DIMS = 4,
    PS_GGUF_MAX_KEY_BYTES = 65535,
    PS_GGUF_MAX_NAME_BYTES = 255,     /* the format says 64; writers exceed it */
    PS_GGUF_MAX_PARTS = 4096,         /* of a split file */
    PS_GGUF_MIN_ALIGNMENT = 8,        /* the format's own rule; powers of two only */
    PS_GGUF_MAX_ALIGNMENT = 16 << 20, /* above any page size that a file is laid out for */
    PS_GGUF_MAX_META_BYTES = 1 << 30, /* a file: 30 times the largest vocabularies in use */
};

/* Values are GGUF's. */
typedef enum ps_gguf_type {
    PS_GGUF_U8 = 0,
    PS_GGUF_I8 = 1,
    PS_GGUF_U16 = 2,
    PS_GGUF_I16 = 3,
    PS_GGUF_U32 = 4,
    PS_GGUF_I32 = 5,
    PS_GGUF_F32 = 6,
    PS_GGUF_BOOL = 7,
    PS_GGUF_STR = 8,
    PS_GGUF_ARR = 9,
    PS_GGUF_U64 = 10,
    PS_GGUF_I64 = 11,
    PS_GGUF_F64 = 12,
    PS_GGUF_TYPE_COUNT = 13,
} ps_gguf_type;

const char *ps_gguf_type_name(ps_gguf_type type); /* "u32", "str", "arr"; never NULL */

typedef struct ps_gguf ps_gguf;

/* Text inside the reader's memory: valid UTF-8, NOT terminated, may contain U+0000. Borrowed from
 * the reader. */
typedef struct ps_gguf_str {
    const char *s;
    uint64_t n_bytes;
} ps_gguf_str;

/* One metadata entry. Every pointer is borrowed from the reader. */
typedef struct ps_gguf_kv {
    const char *key;        /* terminated, UTF-8 without control characters */
    ps_gguf_type type;      /* PS_GGUF_ARR for arrays */
    ps_gguf_type elem_type; /* of an array's elements (never ARR); equal to type otherwise */
    uint64_t n;             /* elements of an array, may be 0; 1 otherwise */
    const uint8_t *data; /* the value's bytes, little-endian, UNALIGNED: an array's first element, a
                          * string's first byte; arrays of strings are length and bytes in turn */
    uint64_t n_bytes;    /* from data on */
    const uint32_t
        *i_str; /* arrays of strings: byte position in `data` of each length field, else NULL */
    uint64_t offset; /* of the value in the file, for messages */
} ps_gguf_kv;

typedef struct ps_gguf_tensor {
    const char *name; /* terminated, UTF-8 without control characters; borrowed */
    uint32_t fmt;     /* GGUF's type id: a ps_fmt where ps_fmt_get knows it */
    uint32_t n_dims;  /* 1..4 */
    uint64_t
        dims[PS_GGUF_MAX_DIMS]; /* dims[0] is the row length; all >= 1, those past n_dims are 1 */
    uint64_t n_elems, n_bytes;
    uint32_t i_file; /* part that holds it */
    uint64_t offset; /* absolute, in that part */
    const uint8_t
        *data; /* in the mapping, borrowed. A file cut short after open makes reading it SIGBUS: use
                * ps_gguf_pread for bulk data, where that is an error instead */
} ps_gguf_tensor;

/* Opens the file, or all parts of a split one (NAME-00001-of-00003.gguf, through any of its parts).
 * On success the caller owns *out until ps_gguf_close. */
ps_status ps_gguf_open(const char *path, ps_gguf **out, ps_err *err);
/* The same over the caller's bytes, which must stay as they are until close; a split file's parts
 * cannot be found from here, so PS_EUNSUPPORTED. `name` stands in for the path in messages. */
ps_status ps_gguf_open_memory(
    const void *bytes, uint64_t n_bytes, const char *name, ps_gguf **out, ps_err *err);
void ps_gguf_close(ps_gguf *g); /* NULL allowed */

/* How open and ps_gguf_pread read: pread(2) unless a test gives its own (short reads, failures).
 * Returns the bytes read (> 0), 0 at the end of the file, or -errno. */
typedef struct ps_gguf_io {
    int64_t (*pread)(void *ctx, int fd, void *dst, uint64_t n, uint64_t offset);
    void *ctx; /* borrowed until close */
} ps_gguf_io;
ps_status ps_gguf_open_io(const char *path, const ps_gguf_io *io, ps_gguf **out, ps_err *err);

/* ---- metadata: of the first part; the `split.*` keys of the others are checked and dropped ----
 */

uint32_t ps_gguf_version(const ps_gguf *g); /* 2 or 3 */
uint64_t ps_gguf_kv_count(const ps_gguf *g);
const ps_gguf_kv *ps_gguf_kv_at(
    const ps_gguf *g, uint64_t i); /* in file order; NULL past the end */
const ps_gguf_kv *ps_gguf_find(const ps_gguf *g, const char *key); /* NULL where there is none */

/* Scalars. False where the type is another or the value does not fit (`kv` may be NULL: false);
 * *out is then untouched. Integers of any width and sign convert where the value fits; f64 takes
 * f32, f64 and integers up to 2^53 either way (it holds those exactly), and may be infinite or NaN,
 * as the file says; booleans are only booleans. */
bool ps_gguf_get_u64(const ps_gguf_kv *kv, uint64_t *out);
bool ps_gguf_get_i64(const ps_gguf_kv *kv, int64_t *out);
bool ps_gguf_get_f64(const ps_gguf_kv *kv, double *out);
bool ps_gguf_get_bool(const ps_gguf_kv *kv, bool *out);
bool ps_gguf_get_str(const ps_gguf_kv *kv, ps_gguf_str *out);
bool ps_gguf_str_eq(ps_gguf_str a, const char *b);

/* Element i of an array, by the same rules; false also where kv is no array or i is past its end.
 * O(1). */
bool ps_gguf_elem_u64(const ps_gguf_kv *kv, uint64_t i, uint64_t *out);
bool ps_gguf_elem_i64(const ps_gguf_kv *kv, uint64_t i, int64_t *out);
bool ps_gguf_elem_f64(const ps_gguf_kv *kv, uint64_t i, double *out);
bool ps_gguf_elem_bool(const ps_gguf_kv *kv, uint64_t i, bool *out);
bool ps_gguf_elem_str(const ps_gguf_kv *kv, uint64_t i, ps_gguf_str *out);

/* PS_EFORMAT about one key, for those who know what it should hold: sets field to the key, offset
 * and extra to where its value is (0 where the key is missing) and the path. The message begins
 * with the file's name and the key. */
ps_status ps_gguf_fail_key(const ps_gguf *g, const char *key, ps_err *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* ---- tensors: of all parts, in file order; names are unique, bytes lie inside their file and
 * never overlap ---- */

uint64_t ps_gguf_tensor_count(const ps_gguf *g); /* 0 for files with metadata alone */
const ps_gguf_tensor *ps_gguf_tensor_at(const ps_gguf *g, uint64_t i); /* NULL past the end */
const ps_gguf_tensor *ps_gguf_tensor_find(
    const ps_gguf *g, const char *name); /* O(1); NULL where none */

/* Name of any tensor type id that files use, ours or not ("q4_k", "iq2_xxs", "i32"); NULL where
 * unknown. A directory with a type whose size is unknown is PS_EUNSUPPORTED at open; the known ones
 * that we do not run are not. */
const char *ps_gguf_tensor_type_name(uint32_t fmt);
/* PS_OK where ps_quant knows the tensor's type, else PS_EUNSUPPORTED with the list of those it
 * knows. */
ps_status ps_gguf_check_fmt(const ps_gguf *g, const ps_gguf_tensor *t, ps_err *err);

/* ---- files ---- */

uint32_t ps_gguf_file_count(const ps_gguf *g);
const char *ps_gguf_file_path(const ps_gguf *g, uint32_t i_file);
uint64_t ps_gguf_file_bytes(const ps_gguf *g, uint32_t i_file);
uint64_t ps_gguf_meta_bytes(const ps_gguf *g, uint32_t i_file); /* header, metadata, directory */
uint64_t ps_gguf_alignment(const ps_gguf *g, uint32_t i_file);

/* Copies n bytes at an absolute offset of a part, complete or PS_EFILE (PS_EREQUEST for a range
 * outside the file). Any number of threads at once. */
ps_status ps_gguf_pread(
    const ps_gguf *g, uint32_t i_file, uint64_t offset, void *dst, uint64_t n, ps_err *err);

/* SHA-256 over keys, types, values (without `split.*`) and each tensor's name, type and dims: the
 * same for one model whether split or not, wherever its data lies. Computed at each call (about 5
 * ms a megabyte). */
void ps_gguf_digest(const ps_gguf *g, uint8_t out[32]);

#ifdef __cplusplus
}
#endif
#endif
