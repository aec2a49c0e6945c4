/* ps_gguf_direct - reads a model's files past the page cache (O_DIRECT), so that weights which come
 * from disk in every pass push nothing else out of memory. A file that cannot be read so, for its
 * file system or for a read that it has refused, is read as ps_gguf_pread reads it.
 *
 * Not here: which bytes (ps_images), into what (ps_bounce).
 * Threads: any number may read at once.
 */
#ifndef PS_GGUF_DIRECT_H
#define PS_GGUF_DIRECT_H

#include "format/ps_gguf.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PS_DIRECT_PAGE_BYTES = 4096 }; /* no offset need be more aligned, and no memory */

typedef struct ps_gguf_direct ps_gguf_direct;

/* Opens the files of `g`, which it borrows, a second time. Those that refuse are no failure. */
ps_status ps_gguf_direct_open(const ps_gguf *g, ps_gguf_direct **out, ps_err *err);
void ps_gguf_direct_close(ps_gguf_direct *d); /* NULL allowed */

/* Are all files read past the page cache, so far? */
bool ps_gguf_direct_works(const ps_gguf_direct *d);
/* What offsets in this file must be multiples of: a power of two, up to a page; 1 where the file is
 * read through the page cache anyway. Constant. */
uint64_t ps_gguf_direct_align(const ps_gguf_direct *d, uint32_t i_file);
/* Copies n bytes at `offset`, a multiple of the file's alignment, to the beginning of a page,
 * complete or PS_EFILE. Whole multiples of the alignment bypass the page cache; bytes behind the
 * last one, such as a file's end, do not. */
ps_status ps_gguf_direct_read(
    const ps_gguf_direct *d, uint32_t i_file, uint64_t offset, void *dst, uint64_t n, ps_err *err);

#ifdef __cplusplus
}
#endif
#endif
