/* ps_images - the host copies of units' bytes. Those of whole units are the model's, read once and
 * shared by every engine over it; those of parts are the engine's own, because each plan cuts units
 * elsewhere.
 *
 * Images are packed into chunks of anonymous memory, so that a device can page-lock a few large
 * ranges; no image straddles two chunks, so a copy of an image never crosses a registration.
 *
 * Each image counts its users. One without stays, for the next engine, until somebody who is short
 * of memory says what to keep.
 *
 * Threads: any; an image that somebody uses never moves or changes.
 */
#ifndef PS_IMAGES_H
#define PS_IMAGES_H

#include "engine/ps_model.h"

enum { PS_IMAGE_CHUNK_BYTES = 1 << 30 }; /* a larger image gets a chunk of its own */

typedef struct ps_images ps_images;

ps_status ps_images_create(uint32_t n_units, ps_images **out, ps_err *err);
void ps_images_destroy(ps_images *images); /* NULL allowed */

/* Makes the caller a user of those of `want` (one flag a unit that `images` was made for). Reads
 * what is not there yet, several at once on `pool` (may be NULL). `model` is where the units' bytes
 * are described: the one that `images` belong to, or one that a plan has cut. */
ps_status ps_images_fill(ps_images *images, const ps_model *model, const bool *want, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, ps_err *err);
void ps_images_release(ps_images *images, const bool *want); /* no user of these any more */
/* Drops what nobody uses and `want` does not name. */
void ps_images_keep(ps_images *images, const ps_model *model, const bool *want);

/* The first stretch of bytes [from, to) of a unit's image, padding before it left out. */
typedef struct ps_file_run {
    uint64_t from, n_bytes; /* in the image; no bytes: nothing but padding is left */
    bool plain;             /* lies in the file just so; else only ps_model_read_part has it */
    uint32_t i_file;        /* of plain ones, as the next */
    uint64_t offset;        /* absolute, in that file */
} ps_file_run;

ps_file_run ps_model_next_run(const ps_model *model, uint32_t unit, uint64_t from, uint64_t to);

/* For a user of the image. NULL where not loaded, or where there are no images at all. */
const void *ps_images_get(const ps_images *images, uint32_t unit);
/* A use that ends with ps_images_return; NULL where not loaded, and then there is nothing to
 * return.
 */
const void *ps_images_borrow(ps_images *images, uint32_t unit);
void ps_images_return(ps_images *images, uint32_t unit);
/* The chunk that an image lies in, for locking: only a user of one of its images may ask. */
void ps_images_chunk_of(ps_images *images, const void *image, void **base, uint64_t *n_bytes);
/* How many of these units, from the first on, one chunk holds, and its bytes. */
uint32_t ps_images_count_chunk(
    const ps_model *model, const uint32_t *units, uint32_t n, uint64_t *n_bytes);
/* Host memory of one image, and of all that there are. */
uint64_t ps_images_padded_bytes(const ps_model *model, uint32_t unit);
uint64_t ps_images_bytes(const ps_images *images);

#endif
