/* ps_images - the host copies of units' bytes, read once and shared by every engine over a model.
 *
 * Images are packed into chunks of anonymous memory, so that a device can page-lock a few large
 * ranges; no image straddles two chunks, so a copy of an image never crosses a registration.
 *
 * Threads: filling takes the lock; an image, once there, never moves or changes.
 */
#ifndef PS_IMAGES_H
#define PS_IMAGES_H

#include "engine/ps_model.h"

enum { PS_IMAGE_CHUNK_BYTES = 1 << 30 }; /* a larger image gets a chunk of its own */

typedef struct ps_images ps_images;

ps_status ps_images_create(uint32_t n_units, ps_images **out, ps_err *err);
void ps_images_destroy(ps_images *images); /* NULL allowed */

/* The chunks that exist now, for locking. */
uint32_t ps_images_chunk_count(const ps_images *images);
void ps_images_chunk(const ps_images *images, uint32_t i, void **base, uint64_t *n_bytes);

#endif
