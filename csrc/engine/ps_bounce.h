/* ps_bounce - weights that cross the bus from where the device cannot copy them: from host memory
 * that is not page-locked, or from the file. They pass through a ring of locked slots, which a
 * thread fills while earlier slots are on the bus.
 *
 *     fill stream   [wait free 1] fill 1 [set full 1]  [wait free 2] fill 2 [set full 2] ...
 *     copy stream                 [wait full 1] copy 1 [set free 1]  [wait full 2] copy 2 ...
 *
 * The fill stream is a stream of the CPU's: a thread on every device, and the order between it and
 * the copy stream comes from flags, as between any CPU stream and the accelerator. So the engine's
 * thread waits for nothing within a pass, a cancelled pass releases both sides, and on the emulated
 * GPU the time is that of the virtual clock. Use n of a slot fills it when its flag `free` says
 * n - 1 and copies when `full` says n: the numbers go on from pass to pass. Such a copy cannot be
 * part of a graph.
 *
 * What is on disk is read straight into the slots, past the page cache where the file system allows
 * it (ps_gguf_direct). Bytes that do not lie in the file as they lie in the image, such as columns
 * of a cut unit, are read through it.
 *
 * Not here: which copies go this way (ps_bind), how large the ring may be (ps_exec).
 * Threads: the engine's thread; filling happens on the stream's own, helped by a pool.
 */
#ifndef PS_BOUNCE_H
#define PS_BOUNCE_H

#include "engine/ps_host_weights.h"

enum {
    PS_BOUNCE_MIN_BYTES = 32 << 10,  /* the smallest ring: two slots of a page */
    PS_BOUNCE_GOOD_BYTES = 33 << 20, /* eight slots of 4 MiB; a larger one gains nothing */
};

typedef struct ps_bounce ps_bounce;

/* How units on disk are read. */
typedef enum ps_disk_direct {
    PS_DISK_UNUSED, /* none is there */
    PS_DISK_CACHED, /* through the page cache: the file system, or a read, has refused otherwise */
    PS_DISK_DIRECT,
} ps_disk_direct;

/* A ring that takes at most so many bytes of locked memory. PS_EDEVICE where they are refused. */
ps_status ps_bounce_create(const ps_host_weights *weights, ps_device *device, uint64_t room_bytes,
    ps_bounce **out, ps_err *err);
void ps_bounce_destroy(ps_bounce *b);                     /* both streams are idle; NULL allowed */
uint64_t ps_bounce_bytes(const ps_bounce *b);             /* of locked memory; 0 for NULL */
uint64_t ps_bounce_piece_bytes(const ps_bounce *b);       /* at most, of one copy; 0 for NULL */
ps_disk_direct ps_bounce_disk_direct(const ps_bounce *b); /* NULL allowed */

/* Enqueues a copy of part of a unit's image, on `s` and on the stream that fills. */
ps_status ps_bounce_copy(ps_bounce *b, ps_stream *s, ps_dptr dst, uint32_t unit, uint64_t from,
    uint64_t n_bytes, ps_err *err);

/* Waits for the filling; the first read that failed. NULL allowed. */
ps_status ps_bounce_sync(ps_bounce *b, ps_err *err);
/* After a failed pass, once all streams are drained. NULL allowed. */
void ps_bounce_reset(ps_bounce *b);

#endif
