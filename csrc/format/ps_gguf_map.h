/* ps_gguf_map - finds a record by its name in O(1) and finds names that occur twice, over an array
 * of records of any kind whose first member is the terminated name.
 *
 * Not here: growing; a map is built once over a complete array.
 * Threads: find may be called from any thread at once.
 *
 * The hash is SipHash-2-4 with a random key: a file made of colliding names would otherwise turn
 * the check for duplicates quadratic, and with 10 million names that is a hang.
 */
#ifndef PS_GGUF_MAP_H
#define PS_GGUF_MAP_H

#include "base/ps_base.h"

typedef struct ps_gguf_map {
    uint32_t *slots;  /* owns; record index + 1, 0 for empty; linear probing, at most half full */
    uint64_t n_slots; /* a power of two; 0 for a map of nothing */
    const char *base; /* borrows the records */
    uint64_t stride;  /* bytes a record */
    uint64_t key[2];
} ps_gguf_map;

/* PS_ENOMEM, or PS_OK with *i_twice at the first record whose name an earlier one has (n where none
 * has). Fini also after failure. n < 2^31. */
ps_status ps_gguf_map_init(
    ps_gguf_map *m, const void *records, uint64_t stride, uint64_t n, uint64_t *i_twice);
void ps_gguf_map_fini(ps_gguf_map *m);                                /* a zeroed map is allowed */
const void *ps_gguf_map_find(const ps_gguf_map *m, const char *name); /* NULL where there is none */

#endif
