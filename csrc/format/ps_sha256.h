/* ps_sha256 - SHA-256 (FIPS 180-4), for identities that must not collide by accident or design.
 *
 * Not here: speed (about 200 MB/s; it hashes metadata, not weights), keyed hashes.
 * Threads: state is the caller's.
 */
#ifndef PS_SHA256_H
#define PS_SHA256_H

#include "base/ps_base.h"

typedef struct ps_sha256 {
    uint32_t h[8];
    uint64_t n_bytes;  /* fed so far */
    uint8_t block[64]; /* the last n_bytes % 64 of them */
} ps_sha256;

void ps_sha256_init(ps_sha256 *s);
void ps_sha256_feed(ps_sha256 *s, const void *data, uint64_t n_bytes);
void ps_sha256_fini(ps_sha256 *s, uint8_t out[32]); /* s is spent */

#endif
