/* ps_locked - see ps_locked.h. */
#include "engine/ps_locked.h"

#include "engine/ps_bounce.h"
#include "engine/ps_upload.h"

/* ---- images ---- */

static bool copied_from_host(const ps_plan *p, uint32_t unit)
{
    if (ps_plan_comes_and_goes(p, unit)) return true;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        if (ps_plan_place(p, t, unit).kind == PS_PLACE_STREAM) return true;
    return false;
}

/* Do passes that gather divide it between the bus, over which the GPU reads it, and the CPU? */
static bool read_from_host(const ps_plan *p, uint32_t unit)
{
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        if (ps_plan_share(p, t, unit) > 0) return true;
    return false;
}

void ps_locked_units(const ps_plan *p, bool divided, bool *locked)
{
    const ps_model *m = p->model;
    for (uint32_t i = 0; i < m->n_units; i++) locked[i] = false;
    for (uint32_t i = 0; i < m->n_units; i++) {
        bool copied = copied_from_host(p, i);
        if ((copied && p->homes[i].host) || (!copied && divided && read_from_host(p, i)))
            locked[i] = true;
        /* Rows of a tied head are copied out of the image of the whole. */
        if (copied && !p->homes[i].host && m->units[i].of >= 0) locked[m->units[i].of] = true;
    }
}

/* Of the chunks that hold a locked image, if nothing but this plan's images is loaded. Those of
 * parts have chunks of their own. `units` is room for a list. */
static uint64_t chunk_bytes(const ps_plan *p, const bool *locked, bool parts, uint32_t *units)
{
    const ps_model *m = p->model;
    uint64_t sum = 0;
    uint32_t n = 0;
    for (uint32_t i = 0; i < m->n_units; i++)
        if (p->homes[i].host && (m->units[i].of >= 0) == parts) units[n++] = i;
    for (uint32_t i = 0, end; i < n; i = end) {
        uint64_t n_bytes = 0;
        bool any = false;
        end = i + ps_images_count_chunk(m, units + i, n - i, &n_bytes);
        for (uint32_t k = i; k < end; k++) any = any || locked[units[k]];
        if (any) sum += n_bytes + 2 * PS_LOCKED_PAGE_BYTES;
    }
    return sum;
}

/* Whole chunks, or piece by piece, where a page at either end may be lost: whichever is more. */
static uint64_t most_of_images(const ps_plan *p, const bool *locked, uint32_t *units)
{
    uint64_t by_piece = 0;
    for (uint32_t i = 0; i < p->model->n_units; i++)
        if (locked[i]) by_piece += ps_images_padded_bytes(p->model, i) + 2 * PS_LOCKED_PAGE_BYTES;
    if (by_piece == 0) return 0;
    return ps_max_u64(
        by_piece, chunk_bytes(p, locked, false, units) + chunk_bytes(p, locked, true, units));
}

static ps_status measure_images(const ps_plan *p, uint64_t *n_bytes, ps_err *err)
{
    uint32_t n_units = p->model->n_units;
    bool *locked = ps_alloc(n_units, sizeof *locked);
    uint32_t *units = ps_alloc(n_units, sizeof *units);
    ps_status status = PS_OK;
    if (locked != NULL && units != NULL) {
        ps_locked_units(p, true, locked);
        *n_bytes = most_of_images(p, locked, units);
    } else {
        status = ps_fail(err, PS_ENOMEM, "no host memory for a plan of %u units", n_units);
    }
    ps_free(locked);
    ps_free(units);
    return status;
}

/* ---- all ---- */

static uint64_t row_bytes(const ps_plan *p)
{
    return p->model->hp.n_vocab * (uint64_t)sizeof(float);
}

uint64_t ps_locked_fixed_bytes(const ps_plan *p)
{
    uint64_t n_bytes = p->space_bytes[PS_SPACE_HOST_ACT] + p->space_bytes[PS_SPACE_HOST_BATCH] +
                       p->space_bytes[PS_SPACE_DEV_CONST] + p->spec.logit_rows * row_bytes(p);
    if (p->kv_backed) n_bytes += p->space_bytes[PS_SPACE_HOST_KV];
    if (p->spec.accelerator) n_bytes += PS_LOCKED_FLAGS_BYTES + PS_BOUNCE_MIN_BYTES;
    return n_bytes;
}

/* The first step of more sequences than there are rows of logits makes room for all of theirs, and
 * then gives the old rows back. Prompts of which all logits are wanted ask for more, too, but do
 * with what there is. Staging of uploads is gone before images are locked. */
ps_status ps_locked_most(const ps_plan *p, uint64_t *image_bytes, uint64_t *n_bytes, ps_err *err)
{
    *image_bytes = 0;
    PS_TRY(measure_images(p, image_bytes, err));
    uint64_t images = *image_bytes > 0 ? *image_bytes + PS_BOUNCE_GOOD_BYTES : 0;
    uint64_t rows = p->spec.n_seq > p->spec.logit_rows ? p->spec.n_seq * row_bytes(p) : 0;
    *n_bytes = ps_locked_fixed_bytes(p) + rows + PS_LOCKED_EDGE_BYTES +
               ps_max_u64(images, ps_upload_staging_bytes(p));
    return PS_OK;
}

uint64_t ps_locked_map_bytes(const ps_plan_spec *spec, uint64_t n_bytes)
{
    const uint64_t gib_pages = (1 << 30) / PS_LOCKED_PAGE_BYTES, grain = PS_LOCKED_MAP_GRAIN_BYTES;
    uint64_t rate = spec->map_bytes_per_gib, pages = ps_div_up_u64(n_bytes, PS_LOCKED_PAGE_BYTES);
    if (!spec->accelerator || rate == 0) return 0;
    uint64_t tables = pages / gib_pages * rate + ps_div_up_u64(pages % gib_pages * rate, gib_pages);
    return ps_div_up_u64(tables, grain) * grain + PS_LOCKED_STREAMS_BYTES;
}
