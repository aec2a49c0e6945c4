/* ps_images - the host copies of units' bytes. Those of whole units are the model's, read once and
 * shared by every engine over it; those of parts are the engine's own, because each plan cuts units
 * elsewhere.
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

/* Reads those of `want` (one flag a unit that `images` was made for) that are not there yet,
 * several at once on `pool` (may be NULL). See ps_model_load_images. */
ps_status ps_images_fill(ps_images *images, const ps_model *model, const bool *want, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, ps_err *err);
/* NULL where not loaded, or where there are no images at all. */
const void *ps_images_get(const ps_images *images, uint32_t unit);
uint64_t ps_images_bytes(const ps_images *images);

/* The chunks that exist now, for locking. */
uint32_t ps_images_chunk_count(const ps_images *images);
void ps_images_chunk(const ps_images *images, uint32_t i, void **base, uint64_t *n_bytes);

#endif
