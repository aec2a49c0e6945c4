/* ps_host_weights - see ps_host_weights.h. */
#include "engine/ps_host_weights.h"

#include <string.h>

#include "engine/ps_locked.h"

enum {
    PAGE_BYTES = PS_LOCKED_PAGE_BYTES,
    MIN_PIECE_BYTES = 1 << 20, /* a registration takes as long as copying so much */
};

/* ---- which units ---- */

/* Does only the bus look at its image? Of a cut unit's norms, of routers with their experts' biases
 * and of the token table the CPU may read something even where it computes none of the unit. */
static bool may_stay_on_disk(const ps_plan *p, uint32_t unit)
{
    const ps_unit *u = &p->model->units[unit];
    if (!p->homes[unit].host || (int32_t)unit == p->model->embed || u->kind == PS_UNIT_ROUTER ||
        u->kind == PS_UNIT_EMBED || u->n_rows == 0)
        return false;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
        ps_place_kind kind = ps_plan_place(p, t, unit).kind;
        if (kind != PS_PLACE_STREAM && kind != PS_PLACE_VRAM) return false;
    }
    return true;
}

/* The unit that fewest tokens need among those that may go and have not; the last of several: the
 * first ones are the first that a pass wants. UINT32_MAX: none. */
static uint32_t coldest(const ps_host_weights *w)
{
    const ps_plan *p = w->plan;
    uint32_t found = UINT32_MAX;
    for (uint32_t i = 0; i < p->model->n_units; i++)
        if (w->in_memory[i] && may_stay_on_disk(p, i) &&
            (found == UINT32_MAX || p->model->units[i].use <= p->model->units[found].use))
            found = i;
    return found;
}

/* What all streamed images take of locked memory: a page at either end may be lost. */
static uint64_t streamed_bytes(const ps_host_weights *w)
{
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < w->plan->model->n_units; i++)
        if (w->streamed[i]) n_bytes += ps_images_padded_bytes(w->plan->model, i) + 2 * PAGE_BYTES;
    return n_bytes;
}

ps_status ps_host_weights_init(ps_host_weights *w, ps_model *model, const ps_plan *plan,
    ps_device *device, uint64_t room_bytes, uint64_t locked_room_bytes, uint64_t *missing_bytes,
    ps_err *err)
{
    const ps_model *m = plan->model;
    *w = (ps_host_weights){.model = model, .plan = plan, .device = device};
    *missing_bytes = 0;
    w->in_memory = ps_alloc(m->n_units, sizeof *w->in_memory);
    w->streamed = ps_alloc(m->n_units, sizeof *w->streamed);
    w->piece = ps_alloc(m->n_units, sizeof *w->piece);
    if (w->in_memory == NULL || w->streamed == NULL || w->piece == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory to load a model");
    for (uint32_t i = 0; i < m->n_units; i++) {
        w->in_memory[i] = plan->homes[i].host;
        if (w->in_memory[i]) w->image_bytes += ps_images_padded_bytes(m, i);
    }
    ps_locked_units(plan, true, w->streamed);
    /* Copies must not bounce for experts that are divided but never copied: their layers can do
     * without, and they stay where only the CPU reads them. */
    if (streamed_bytes(w) > locked_room_bytes) ps_locked_units(plan, false, w->streamed);
    while (w->image_bytes > room_bytes) {
        uint32_t unit = coldest(w);
        if (unit == UINT32_MAX) {
            *missing_bytes = w->image_bytes - room_bytes;
            return PS_OK;
        }
        w->in_memory[unit] = false;
        w->image_bytes -= ps_images_padded_bytes(m, unit);
        w->disk_bytes += m->units[unit].n_bytes;
    }
    return PS_OK;
}

void ps_host_weights_fini(ps_host_weights *w)
{
    while (ps_host_weights_unlock_one(w)) {
    }
    if (w->uses_images) ps_images_release(w->model->images, w->in_memory);
    ps_images_destroy(w->parts);
    ps_free(w->in_memory);
    ps_free(w->streamed);
    ps_free(w->piece);
    ps_free(w->pieces);
    ps_free(w->piece_bytes);
    *w = (ps_host_weights){0};
}

const void *ps_host_weights_image(const ps_host_weights *w, uint32_t unit)
{
    if (!w->in_memory[unit]) return NULL;
    return unit < w->model->n_units ? ps_model_image(w->model, unit)
                                    : ps_images_get(w->parts, unit);
}

ps_status ps_host_weights_load(ps_host_weights *w, bool drop, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, uint64_t *file_bytes, ps_err *err)
{
    ps_images *images = w->model->images;
    uint32_t n_whole = w->model->n_units, n_units = w->plan->model->n_units;
    if (drop) ps_images_keep(images, w->model, w->in_memory);
    uint64_t n_read = 0;
    for (uint32_t i = 0; i < n_units; i++)
        if (w->in_memory[i] && ps_images_get(images, i) == NULL)
            n_read += w->plan->model->units[i].n_bytes;
    PS_TRY(ps_images_fill(images, w->model, w->in_memory, pool, progress, progress_ctx, err));
    w->uses_images = true;
    *file_bytes += n_read;
    if (n_units == n_whole) return PS_OK;
    bool *parts = ps_alloc(n_units, sizeof *parts);
    if (parts == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to load a model");
    memcpy(parts + n_whole, w->in_memory + n_whole, (n_units - n_whole) * sizeof *parts);
    ps_status status = ps_images_create(n_units, &w->parts, err);
    if (status == PS_OK)
        status = ps_images_fill(w->parts, w->plan->model, parts, pool, progress, progress_ctx, err);
    ps_free(parts);
    return status;
}

/* ---- locking ---- */

bool ps_host_weights_needs_bounce(const ps_host_weights *w, uint64_t room_bytes)
{
    for (uint32_t i = 0; i < w->plan->model->n_units; i++)
        if (w->streamed[i] && !w->in_memory[i]) return true;
    return streamed_bytes(w) > room_bytes;
}

bool ps_host_weights_streams(const ps_host_weights *w)
{
    for (uint32_t i = 0; i < w->plan->model->n_units; i++)
        if (w->streamed[i]) return true;
    return false;
}

bool ps_host_weights_all_locked(const ps_host_weights *w)
{
    for (uint32_t i = 0; i < w->plan->model->n_units; i++)
        if (w->streamed[i] && w->piece[i] == 0) return false;
    return true;
}

void ps_host_weights_sources(const ps_host_weights *w, uint8_t *sources)
{
    for (uint32_t i = 0; i < w->plan->model->n_units; i++) {
        ps_source source = !w->streamed[i]    ? PS_SOURCE_LOCKED
                           : !w->in_memory[i] ? PS_SOURCE_DISK
                           : w->piece[i] == 0 ? PS_SOURCE_BOUNCED
                                              : PS_SOURCE_LOCKED;
        uint8_t *whole = &sources[ps_plan_whole(w->plan, (int32_t)i)];
        sources[i] = (uint8_t)source;
        if (*whole < sources[i]) *whole = sources[i];
    }
}

typedef struct image {
    uintptr_t base;
    uint64_t n_bytes;
    uint32_t unit;
} image;

/* Streamed images by address; *n of them. The caller frees. */
static ps_status list_images(const ps_host_weights *w, image **out, uint32_t *n, ps_err *err)
{
    const ps_model *m = w->plan->model;
    image *list = ps_alloc((uint64_t)m->n_units + 1, sizeof *list);
    if (list == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to lock images");
    for (uint32_t i = 0; i < m->n_units; i++) {
        const void *base = w->streamed[i] ? ps_host_weights_image(w, i) : NULL;
        if (base == NULL) continue;
        image one = {(uintptr_t)base, ps_images_padded_bytes(m, i), i};
        uint32_t at = (*n)++;
        /* Units are in the order of their addresses but for a few that were read later. */
        for (; at > 0 && list[at - 1].base > one.base; at--) list[at] = list[at - 1];
        list[at] = one;
    }
    *out = list;
    return PS_OK;
}

static uintptr_t page_up(uintptr_t p)
{
    return (p + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

static ps_status grow_pieces(ps_host_weights *w, ps_err *err)
{
    if (w->n_pieces < w->cap_pieces) return PS_OK;
    uint32_t cap = w->cap_pieces * 2 + 8;
    void **pieces = ps_realloc(w->pieces, cap, sizeof *pieces);
    if (pieces != NULL) w->pieces = pieces;
    uint64_t *bytes = pieces != NULL ? ps_realloc(w->piece_bytes, cap, sizeof *bytes) : NULL;
    if (bytes == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to lock images");
    w->piece_bytes = bytes;
    w->cap_pieces = cap;
    return PS_OK;
}

/* Locks [base, base + n_bytes), in which these images lie. */
static ps_status lock_piece(ps_host_weights *w, uintptr_t base, uint64_t n_bytes,
    const image *images, uint32_t n, bool *refused, ps_err *err)
{
    PS_TRY(grow_pieces(w, err));
    ps_err why = {0};
    ps_status status = ps_device_lock(w->device, (void *)base, n_bytes, &why);
    *refused = status != PS_OK;
    if (status == PS_EFATAL) return ps_fail(err, status, "%s", why.message);
    if (*refused) return PS_OK;
    w->pieces[w->n_pieces] = (void *)base;
    w->piece_bytes[w->n_pieces++] = n_bytes;
    w->locked_bytes += n_bytes;
    for (uint32_t i = 0; i < n; i++) w->piece[images[i].unit] = w->n_pieces;
    return PS_OK;
}

/* Images from the first on that lie behind each other and take no more than so many bytes. */
static uint32_t count_run(const image *list, uint32_t n, uint64_t most)
{
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (list[i].base != list[0].base + n_bytes || n_bytes + list[i].n_bytes > most) return i;
        n_bytes += list[i].n_bytes;
    }
    return n;
}

static ps_status lock_runs(ps_host_weights *w, const image *list, uint32_t n, uint64_t room_bytes,
    uint64_t most, ps_err *err)
{
    uintptr_t free_from = 0; /* the first page that no piece has */
    for (uint32_t i = 0, run; i < n; i += run) {
        uint64_t room = room_bytes > w->locked_bytes ? room_bytes - w->locked_bytes : 0;
        run = list[i].base < free_from || w->piece[list[i].unit] != 0
                  ? 0
                  : count_run(list + i, n - i, ps_min_u64(room, most));
        if (run == 0) { /* too large, locked, or it begins on a page of the last piece */
            run = 1;
            continue;
        }
        const image *last = &list[i + run - 1];
        uint64_t n_bytes = last->base + last->n_bytes - list[i].base;
        bool refused = false;
        PS_TRY(lock_piece(w, list[i].base, n_bytes, &list[i], run, &refused, err));
        if (refused) {
            most = n_bytes / 2;
            run = 0;
            if (most < MIN_PIECE_BYTES) break;
        } else {
            free_from = page_up(last->base + last->n_bytes);
        }
    }
    return PS_OK;
}

/* The chunk that an image lies in, and how many images of the list do, from that one on. */
static uint32_t find_chunk(
    const ps_host_weights *w, const image *list, uint32_t n, void **base, uint64_t *n_bytes)
{
    uint32_t k = 1;
    ps_images_chunk_of(list->unit < w->model->n_units ? w->model->images : w->parts,
        (const void *)list->base, base, n_bytes);
    while (k < n && list[k].base - (uintptr_t)*base < *n_bytes) k++;
    return k;
}

/* Chunks may hold what this plan has no use for, since it was loaded for another engine; the plan
 * knows nothing of that, and has not charged for it. */
static bool chunks_are_as_planned(const ps_host_weights *w, const image *list, uint32_t n)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n;) {
        void *base = NULL;
        uint64_t n_bytes = 0;
        i += find_chunk(w, list + i, n - i, &base, &n_bytes);
        sum += n_bytes + 2 * PAGE_BYTES;
    }
    return sum <= w->plan->locked_image_bytes;
}

/* Whole chunks, whatever else lies in them: few registrations, and the same for every engine over a
 * model. *most: of the pieces to try after the first refusal. */
static ps_status lock_chunks(
    ps_host_weights *w, const image *list, uint32_t n, uint64_t *most, ps_err *err)
{
    for (uint32_t i = 0, k; i < n; i += k) {
        void *base = NULL;
        uint64_t n_bytes = 0;
        bool refused = false;
        k = find_chunk(w, list + i, n - i, &base, &n_bytes);
        PS_TRY(lock_piece(w, (uintptr_t)base, n_bytes, &list[i], k, &refused, err));
        if (!refused) continue;
        *most = n_bytes / 2;
        return PS_OK;
    }
    return PS_OK;
}

ps_status ps_host_weights_lock(ps_host_weights *w, uint64_t room_bytes, ps_err *err)
{
    image *list = NULL;
    uint32_t n = 0;
    uint64_t most = UINT64_MAX;
    PS_TRY(list_images(w, &list, &n, err));
    ps_status status = PS_OK;
    if (room_bytes == UINT64_MAX && chunks_are_as_planned(w, list, n))
        status = lock_chunks(w, list, n, &most, err);
    if (status == PS_OK) status = lock_runs(w, list, n, room_bytes, most, err);
    ps_free(list);
    return status;
}

bool ps_host_weights_unlock_one(ps_host_weights *w)
{
    if (w->n_pieces == 0) return false;
    for (uint32_t i = 0; i < w->plan->model->n_units; i++)
        if (w->piece[i] == w->n_pieces) w->piece[i] = 0;
    w->locked_bytes -= w->piece_bytes[--w->n_pieces];
    ps_device_unlock(w->device, w->pieces[w->n_pieces]);
    return true;
}
