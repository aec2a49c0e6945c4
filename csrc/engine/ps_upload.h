/* ps_upload - brings resident weights into VRAM at open: threads read parts of units into one half
 * of a locked staging buffer while the other half is on the bus.
 *
 * Threads: the engine's thread, with the pool it is given.
 */
#ifndef PS_UPLOAD_H
#define PS_UPLOAD_H

#include "engine/ps_plan.h"

/* `weights` is where DEV_WEIGHTS begins. *file_bytes: read from disk. `progress` and `poll`-like
 * cancelling as for ps_model_load_images. */
ps_status ps_upload_weights(const ps_plan *plan, ps_device *device, ps_dptr weights, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, uint64_t *file_bytes, ps_err *err);

#endif
