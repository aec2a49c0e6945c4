/* ps_upload - see ps_upload.h. */
#include "engine/ps_upload.h"

#include <pthread.h>
#include <stdatomic.h>

enum {
    PART_BYTES = 8 << 20, /* what one thread reads at a time, where there is room */
    MAX_PARTS = 16,       /* in one half of the staging buffer: as many as threads that can help */
    MIN_PARTS = 2,        /* where there is little room */
};

typedef struct part {
    uint32_t unit;
    uint64_t from, n_bytes;
} part;

typedef struct batch_read { /* one half being filled */
    const ps_model *model;
    const part *parts;
    uint32_t n;
    unsigned char *dst; /* part i at i * part_bytes */
    uint64_t part_bytes;
    _Atomic uint32_t next;
    _Atomic int status;
    ps_err err; /* of the first failure; guarded by lock */
    pthread_mutex_t lock;
} batch_read;

static void read_member(void *ctx, int i_thread, int n_threads)
{
    batch_read *b = ctx;
    (void)i_thread;
    (void)n_threads;
    for (;;) {
        uint32_t i = atomic_fetch_add(&b->next, 1);
        if (i >= b->n || atomic_load(&b->status) != PS_OK) return;
        ps_err err = {0};
        const part *p = &b->parts[i];
        ps_status status = ps_model_read_part(
            b->model, p->unit, p->from, p->n_bytes, b->dst + i * b->part_bytes, &err);
        if (status == PS_OK) continue;
        pthread_mutex_lock(&b->lock);
        if (atomic_load(&b->status) == PS_OK) {
            b->err = err;
            atomic_store(&b->status, (int)status);
        }
        pthread_mutex_unlock(&b->lock);
    }
}

static ps_status read_half(const ps_model *model, ps_pool *pool, const part *parts, uint32_t n,
    uint64_t part_bytes, unsigned char *dst, ps_err *err)
{
    batch_read b = {.model = model, .parts = parts, .n = n, .dst = dst, .part_bytes = part_bytes};
    pthread_mutex_init(&b.lock, NULL);
    if (pool != NULL)
        ps_pool_run(pool, read_member, &b);
    else
        read_member(&b, 0, 1);
    pthread_mutex_destroy(&b.lock);
    ps_status status = (ps_status)atomic_load(&b.status);
    if (status != PS_OK && err != NULL && err->status == PS_OK) *err = b.err;
    return status;
}

typedef struct uploader {
    const ps_plan *plan;
    ps_device *device;
    ps_dptr weights;
    ps_stream *stream[2];   /* one a half: a half may be refilled once its stream is empty */
    unsigned char *staging; /* two halves of max_parts parts */
    uint32_t max_parts;
    uint64_t part_bytes;
    uint64_t done_bytes, total_bytes;
} uploader;

/* The next parts, at most n of them; *unit and *from are the cursor. */
static uint32_t next_parts(const uploader *u, uint32_t *unit, uint64_t *from, part *out)
{
    const ps_plan *plan = u->plan;
    const ps_model *m = plan->model;
    uint32_t k = 0;
    while (k < u->max_parts && *unit < m->n_units) {
        uint64_t left =
            ps_plan_resident_at(plan, 0, *unit) == UINT64_MAX ? 0 : m->units[*unit].n_bytes - *from;
        if (left == 0) {
            (*unit)++;
            *from = 0;
            continue;
        }
        out[k] = (part){*unit, *from, ps_min_u64(left, u->part_bytes)};
        *from += out[k++].n_bytes;
    }
    return k;
}

static ps_status send_half(uploader *u, int half, const part *parts, uint32_t n, ps_err *err)
{
    for (uint32_t i = 0; i < n; i++) {
        ps_dptr dst =
            ps_dptr_add(u->weights, ps_plan_resident_at(u->plan, 0, parts[i].unit) + parts[i].from);
        const unsigned char *src = u->staging + ((uint64_t)half * u->max_parts + i) * u->part_bytes;
        ps_status status =
            ps_device_copy_in(u->device, u->stream[half], dst, src, parts[i].n_bytes, err);
        if (status != PS_OK) return status;
        u->done_bytes += parts[i].n_bytes;
    }
    return PS_OK;
}

static ps_status upload_all(
    uploader *u, ps_pool *pool, ps_progress_fn progress, void *progress_ctx, ps_err *err)
{
    uint32_t unit = 0, n = 0;
    uint64_t from = 0;
    part parts[MAX_PARTS];
    ps_status status = PS_OK;
    for (int half = 0; (n = next_parts(u, &unit, &from, parts)) > 0; half = !half) {
        unsigned char *dst = u->staging + (uint64_t)half * u->max_parts * u->part_bytes;
        status = ps_device_sync(u->device, u->stream[half], err);
        if (status == PS_OK)
            status = read_half(u->plan->model, pool, parts, n, u->part_bytes, dst, err);
        if (status == PS_OK) status = send_half(u, half, parts, n, err);
        if (status != PS_OK) return status;
        if (progress != NULL && !progress(progress_ctx, u->done_bytes, u->total_bytes))
            return ps_fail(err, PS_ECANCELLED, "loading was interrupted");
    }
    for (int half = 0; half < 2; half++) {
        status = ps_device_sync(u->device, u->stream[half], err);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

static uint64_t resident_bytes(const ps_plan *plan)
{
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < plan->model->n_units; i++)
        if (ps_plan_resident_at(plan, 0, i) != UINT64_MAX) n_bytes += plan->model->units[i].n_bytes;
    return n_bytes;
}

static uint32_t count_parts(uint64_t total_bytes)
{
    return (uint32_t)ps_min_u64(MAX_PARTS, ps_div_up_u64(total_bytes, PART_BYTES) + 1);
}

uint64_t ps_upload_staging_bytes(const ps_plan *plan)
{
    uint64_t n_bytes = resident_bytes(plan);
    return n_bytes > 0 ? 2ull * count_parts(n_bytes) * PART_BYTES : 0;
}

static ps_status take_staging(uploader *u, uint64_t room_bytes, ps_err *err)
{
    void *staging = NULL;
    ps_status status;
    ps_err why;
    u->max_parts = count_parts(u->total_bytes);
    u->part_bytes = PART_BYTES;
    for (uint64_t room = room_bytes;; room /= 2) { /* half of it where the system has no more */
        if (2 * u->max_parts * u->part_bytes > room) {
            u->max_parts = MIN_PARTS;
            u->part_bytes = room / (2 * MIN_PARTS) / PS_WEIGHT_ALIGN * PS_WEIGHT_ALIGN;
            u->part_bytes = ps_min_u64(u->part_bytes, PART_BYTES);
        }
        ps_check_bug(u->part_bytes > 0, err);
        uint64_t n_bytes = 2 * u->max_parts * u->part_bytes;
        why = (ps_err){0};
        status = ps_device_locked_alloc(u->device, n_bytes, &staging, &why);
        u->staging = staging;
        if (status == PS_OK) return PS_OK;
        if (status != PS_EDEVICE || n_bytes / 2 < PS_UPLOAD_MIN_BYTES) break;
        room = n_bytes;
    }
    return ps_fail(err, status, "%s", why.message);
}

ps_status ps_upload_weights(const ps_plan *plan, ps_device *device, ps_dptr weights,
    uint64_t room_bytes, ps_pool *pool, ps_progress_fn progress, void *progress_ctx,
    uint64_t *file_bytes, ps_err *err)
{
    uploader u = {
        .plan = plan, .device = device, .weights = weights, .total_bytes = resident_bytes(plan)};
    const ps_model *m = plan->model;
    for (uint32_t i = 0; i < m->n_units; i++)
        if (ps_plan_resident_at(plan, 0, i) != UINT64_MAX && ps_model_image(m, i) == NULL)
            *file_bytes += m->units[i].n_bytes;
    if (u.total_bytes == 0) return PS_OK;
    ps_status status = take_staging(&u, room_bytes, err);
    for (int i = 0; i < 2 && status == PS_OK; i++)
        status = ps_stream_create(device, PS_STREAM_H2D, &u.stream[i], err);
    if (status == PS_OK) status = upload_all(&u, pool, progress, progress_ctx, err);
    for (int i = 0; i < 2; i++) {
        if (u.stream[i] == NULL) continue;
        if (status != PS_OK)
            ps_device_sync(device, u.stream[i], NULL); /* nothing may still read staging */
        ps_stream_destroy(device, u.stream[i]);
    }
    if (u.staging != NULL) ps_device_locked_free(device, u.staging);
    return status;
}
