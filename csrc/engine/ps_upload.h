/* ps_upload - brings the first tier's resident weights into VRAM at open: threads read parts of
 * units into one half of a locked staging buffer while the other half is on the bus. The buffer is
 * gone afterwards.
 *
 * Threads: the engine's thread, with the pool it is given.
 */
#ifndef PS_UPLOAD_H
#define PS_UPLOAD_H

#include "engine/ps_plan.h"

enum { PS_UPLOAD_MIN_BYTES = 32 << 10 }; /* the least that staging can do with */

/* Of locked memory, while there is room for it: what staging for this plan takes, 0 where it
 * uploads nothing. */
uint64_t ps_upload_staging_bytes(const ps_plan *plan);

/* `weights` is where DEV_WEIGHTS begins; staging takes at most room_bytes. *file_bytes: read from
 * disk. `progress` and `poll`-like cancelling as for ps_model_load_images. */
ps_status ps_upload_weights(const ps_plan *plan, ps_device *device, ps_dptr weights,
    uint64_t room_bytes, ps_pool *pool, ps_progress_fn progress, void *progress_ctx,
    uint64_t *file_bytes, ps_err *err);

#endif
