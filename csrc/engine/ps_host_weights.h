/* ps_host_weights - the host side of one executor's weights: which units have an image in memory,
 * where those images are page-locked, and which units stay on disk.
 *
 * A streamed unit is in one of three states:
 *
 *   locked   its image lies inside a piece that the device has page-locked: it is copied straight
 *            from there, and experts can be read there by kernels.
 *   bounced  its image is in ordinary memory: it goes through the bounce ring (ps_bounce).
 *   on disk  it has no image: the bounce ring is filled from the file.
 *
 * Images are locked in pieces that no image straddles; a piece begins and ends on pages of its own.
 * A piece that is refused is tried again at half the size, down to a megabyte; what is left then,
 * and what lies above the limit, is bounced. Units go to disk only for the limit of host memory:
 * those that fewest tokens need first, never one that the CPU looks at in any tier.
 *
 * Not here: memory other than weights (ps_exec), the ring itself.
 * Threads: the engine's thread; everything is constant during passes.
 */
#ifndef PS_HOST_WEIGHTS_H
#define PS_HOST_WEIGHTS_H

#include "engine/ps_images.h"
#include "engine/ps_plan.h"

typedef struct ps_host_weights {
    ps_model *model;     /* borrows, as the next two */
    const ps_plan *plan; /* may have parts of the model's units */
    ps_device *device;
    bool *in_memory;  /* owns; [n_units] units that have an image while we use it */
    bool *streamed;   /* owns; [n_units] units whose images the device copies, or reads, in some
                         tier */
    uint32_t *piece;  /* owns; [n_units] 1 + the piece that an image lies in; 0: in none */
    ps_images *parts; /* owns; images of the plan's parts; NULL where it cuts no unit */
    void **pieces;    /* owns; [n_pieces] what the device has locked */
    uint64_t *piece_bytes; /* owns; [n_pieces] */
    uint32_t n_pieces, cap_pieces;
    bool uses_images;     /* this executor counts among the users of the model's images */
    uint64_t image_bytes; /* of images in use, padded */
    uint64_t locked_bytes;
    uint64_t disk_bytes; /* of the units that stay on disk */
} ps_host_weights;

/* Decides which units get an image: all that the plan wants in host memory, or as many as `room`
 * bytes hold. *missing: bytes by which even those that must have one exceed the room. Experts that
 * bus and CPU divide, and nothing copies, are locked only where `locked_room` holds all that is. A
 * zeroed object is given; fini also after failure. */
ps_status ps_host_weights_init(ps_host_weights *w, ps_model *model, const ps_plan *plan,
    ps_device *device, uint64_t room_bytes, uint64_t locked_room_bytes, uint64_t *missing_bytes,
    ps_err *err);
void ps_host_weights_fini(ps_host_weights *w);

/* Reads the images; `drop` gives back those that nobody uses. */
ps_status ps_host_weights_load(ps_host_weights *w, bool drop, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, uint64_t *file_bytes, ps_err *err);

/* Does anything cross the bus from ordinary memory or disk if at most so many bytes get locked? */
bool ps_host_weights_needs_bounce(const ps_host_weights *w, uint64_t room_bytes);
/* Locks what it can within so many bytes. Refusals are no failure; a lost device is. */
ps_status ps_host_weights_lock(ps_host_weights *w, uint64_t room_bytes, ps_err *err);
/* Gives the last piece back, for something that needs the room more; false: there is none. */
bool ps_host_weights_unlock_one(ps_host_weights *w);
/* Is any unit streamed? */
bool ps_host_weights_streams(const ps_host_weights *w);
/* Is every streamed unit locked? */
bool ps_host_weights_all_locked(const ps_host_weights *w);

/* Where copies of a unit come from. */
typedef enum ps_source { PS_SOURCE_LOCKED, PS_SOURCE_BOUNCED, PS_SOURCE_DISK } ps_source;
/* Of each unit of the plan's model, [n_units]: a ps_source. A unit that was cut counts as the
 * slowest of its parts; one that is not copied as locked. */
void ps_host_weights_sources(const ps_host_weights *w, uint8_t *sources);

/* NULL: on disk. */
const void *ps_host_weights_image(const ps_host_weights *w, uint32_t unit);

#endif
