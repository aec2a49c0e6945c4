/* ps_gguf_part - one file of a GGUF model: its metadata read into memory, checked and indexed.
 * ps_gguf.c puts the parts of a split model together.
 *
 * Not here: anything that spans parts (names unique across them, split counts).
 * Threads: loading belongs to one thread; a loaded part is read-only.
 */
#ifndef PS_GGUF_PART_H
#define PS_GGUF_PART_H

#include <stdarg.h>

#include "format/ps_gguf.h"

typedef struct ps_gguf_part {
    char *path;          /* owns */
    int fd;              /* owns; -1 for bytes of the caller */
    uint64_t file_bytes; /* when opened */
    const uint8_t *map;  /* owns the mapping of all of the file where fd >= 0, else borrows */
    ps_gguf_io io;       /* borrows ctx */

    uint8_t *meta_owned; /* owns; NULL for bytes of the caller */
    const uint8_t *meta; /* the file's first meta_bytes: what every check was made on */
    uint64_t meta_bytes;

    uint32_t version;
    uint64_t alignment;
    uint64_t i_directory; /* where the first tensor's entry starts */

    ps_gguf_kv *kvs;         /* owns, and each i_str */
    ps_gguf_tensor *tensors; /* owns */
    uint64_t n_kv, n_tensors;
    char *names; /* owns: keys and tensor names, each terminated */
} ps_gguf_part;

/* Opens, maps, reads and checks one file. On failure *p holds what ps_gguf_part_fini has to
 * release. */
ps_status ps_gguf_part_open(ps_gguf_part *p, const char *path, const ps_gguf_io *io, ps_err *err);
ps_status ps_gguf_part_open_memory(
    ps_gguf_part *p, const void *bytes, uint64_t n_bytes, const char *name, ps_err *err);
void ps_gguf_part_fini(ps_gguf_part *p); /* a zeroed part is allowed */

/* All of [offset, offset + n) of the file, or PS_EFILE. The caller checked the range. */
ps_status ps_gguf_part_read(
    const ps_gguf_part *p, uint64_t offset, void *dst, uint64_t n, ps_err *err);

/* One of an opened model's files; NULL past the last. */
const ps_gguf_part *ps_gguf_part_at(const ps_gguf *g, uint32_t i_file);

const ps_gguf_kv *ps_gguf_part_find(
    const ps_gguf_part *p, const char *key); /* linear: for a few keys at open */

/* Bytes of one element of a scalar type; 0 for STR, ARR and unknown ids. */
uint32_t ps_gguf_type_bytes(uint32_t type);
/* Block geometry of any tensor type id with a known size; NULL where unknown. */
const ps_fmt_info *ps_gguf_tensor_type(uint32_t fmt);

/* Fills *err for this file: "NAME: sentence", field, byte offset, path. */
ps_status ps_gguf_part_fail(const ps_gguf_part *p, ps_err *err, ps_status status, const char *field,
    uint64_t offset, const char *fmt, ...) __attribute__((format(printf, 6, 7)));
ps_status ps_gguf_part_fail_v(const ps_gguf_part *p, ps_err *err, ps_status status,
    const char *field, uint64_t offset, const char *fmt, va_list ap);
/* PS_EUNSUPPORTED for a tensor's type, with the list of those that we run. */
ps_status ps_gguf_part_fail_type(
    const ps_gguf_part *p, uint32_t fmt, const char *name, uint64_t offset, ps_err *err);
/* PS_EFILE for a call that the system has refused with this errno. */
ps_status ps_gguf_part_fail_file(
    const ps_gguf_part *p, ps_err *err, int os_errno, const char *sentence);
/* "tensor[12].offset (blk.0.attn_q.weight)": what = "tensor", name may be NULL; both cut to fit. */
void ps_gguf_field(char out[128], const char *what, uint64_t i, const char *sub, const char *name);

#endif
