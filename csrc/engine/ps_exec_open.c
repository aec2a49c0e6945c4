/* ps_exec_open - the executor's memory, streams and weights: taken within the limits, given back,
 * or handed over. See ps_exec.h.
 */
#include "engine/ps_exec_priv.h"

#include <string.h>

#include "engine/ps_locked.h"
#include "engine/ps_upload.h"

/* ---- memory ---- */

static uint64_t limit_or_none(uint64_t limit)
{
    return limit != 0 ? limit : UINT64_MAX;
}

/* What is left of a limit; a limit of none stays so. */
static uint64_t room_below(uint64_t limit, uint64_t used)
{
    return limit == UINT64_MAX ? limit : limit > used ? limit - used : 0;
}

static ps_status check_limit(const char *name, const char *what, const char *advice,
    uint64_t needed, uint64_t limit, ps_err *err)
{
    if (needed <= limit) return PS_OK;
    if (err != NULL && err->status == PS_OK) err->needed = needed;
    return ps_fail(err, PS_ENOMEM,
        "the engine needs %llu bytes (%.1f MiB) of %s memory at least, and %s is %llu bytes; %s",
        (unsigned long long)needed, (double)needed / (1 << 20), what, name,
        (unsigned long long)limit, advice);
}

static const char *const LOCKED_ADVICE =
    "the rest of the weights does without, but activations, logits and a cache that the GPU reads "
    "over the bus do not: raise the limit or lower n_ctx";
static const char *const RAM_ADVICE =
    "weights that only cross the bus stay on disk, but what the CPU computes with does not: raise "
    "the limit or give more vram";

/* The plan's charge for the device's page tables holds for all that it knows of, and stays when a
 * limit lets us lock less. What grows later beyond that, for more rows of logits or more hand-offs,
 * is charged here; *n_charged is that, and stays too: drivers keep their tables. */
static ps_status charge_map(ps_exec *x, uint64_t n_bytes, uint64_t *n_charged, ps_err *err)
{
    uint64_t locked = x->stats.locked_bytes + x->weights.locked_bytes + n_bytes;
    locked += PS_LOCKED_EDGE_BYTES + 2ull * PS_LOCKED_PAGE_BYTES * x->weights.n_pieces;
    uint64_t needed = ps_locked_map_bytes(&x->plan->spec, locked), used = x->arena.used[PS_MEM_MAP];
    *n_charged = needed > used ? needed - used : 0;
    return *n_charged > 0 ? ps_arena_charge(&x->arena, PS_MEM_MAP, *n_charged, err) : PS_OK;
}

ps_status ps_exec_locked(ps_exec *x, uint64_t n_bytes, void **out, ps_err *err)
{
    uint64_t n_charged = 0;
    if (n_bytes == 0) return PS_OK;
    PS_TRY(check_limit("locked_limit", "page-locked", LOCKED_ADVICE,
        x->stats.locked_bytes + n_bytes, limit_or_none(x->options.locked_limit), err));
    PS_TRY(charge_map(x, n_bytes, &n_charged, err));
    ps_status status = ps_device_locked_alloc(x->device, n_bytes, out, err);
    if (status != PS_OK) {
        ps_arena_give(&x->arena, PS_MEM_MAP, n_charged);
        return status;
    }
    memset(*out, 0, n_bytes);
    x->stats.locked_bytes += n_bytes;
    return PS_OK;
}

static ps_dptr host_dptr(const void *p)
{
    return (ps_dptr){(uint64_t)(uintptr_t)p};
}

static ps_status take_spaces(ps_exec *x, ps_err *err)
{
    const ps_plan *p = x->plan;
    if (!p->spec.accelerator) return PS_OK;
    uint64_t map = p->bytes_by_kind[PS_MEM_MAP],
             carved = p->needed_bytes - p->bytes_by_kind[PS_MEM_GRAPH] - map;
    PS_TRY(ps_arena_init(&x->arena, x->device, carved, p->spec.budget_bytes, err));
    PS_TRY(ps_arena_charge(&x->arena, PS_MEM_MAP, map, err));
    for (size_t i = 0; i < PS_DEV_SPACE_COUNT; i++) {
        ps_dev_space row = ps_dev_spaces[i];
        uint64_t n_bytes =
            ps_div_up_u64(p->space_bytes[row.space], PS_ARENA_ALIGN) * PS_ARENA_ALIGN;
        if (n_bytes == 0) continue;
        PS_TRY(ps_arena_take(
            &x->arena, row.kind, p->dev_base[row.space], n_bytes, &x->bases.space[row.space], err));
    }
    return PS_OK;
}

static ps_status take_host(ps_exec *x, ps_err *err)
{
    const ps_plan *p = x->plan;
    PS_TRY(ps_exec_locked(x, p->space_bytes[PS_SPACE_HOST_ACT], &x->host_act, err));
    PS_TRY(ps_exec_locked(x, p->space_bytes[PS_SPACE_HOST_BATCH], &x->host_batch, err));
    PS_TRY(ps_exec_locked(x, p->space_bytes[PS_SPACE_DEV_CONST], &x->const_staging, err));
    x->host_kv_bytes = p->space_bytes[PS_SPACE_HOST_KV];
    if (x->host_kv_bytes > 0) x->host_kv = ps_alloc(x->host_kv_bytes, 1);
    x->host_const = ps_alloc(p->space_bytes[PS_SPACE_HOST_CONST] + 1, 1);
    if ((x->host_kv_bytes > 0 && x->host_kv == NULL) || x->host_const == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for a KV cache of %.1f MiB",
            (double)x->host_kv_bytes / (1 << 20));
    x->bases.space[PS_SPACE_HOST_ACT] = host_dptr(x->host_act);
    if (p->space_bytes[PS_SPACE_HOST_ACT_DEV] > 0)
        PS_TRY(ps_device_locked_dptr(
            x->device, x->host_act, &x->bases.space[PS_SPACE_HOST_ACT_DEV], err));
    x->bases.space[PS_SPACE_HOST_BATCH] = host_dptr(x->host_batch);
    x->bases.space[PS_SPACE_HOST_CONST] = host_dptr(x->host_const);
    x->bases.space[PS_SPACE_HOST_KV] = host_dptr(x->host_kv);
    if (p->kv_backed) {
        PS_TRY(ps_device_lock(x->device, x->host_kv, x->host_kv_bytes, err));
        x->host_kv_locked = true;
        x->stats.locked_bytes += x->host_kv_bytes;
        PS_TRY(ps_device_locked_dptr(
            x->device, x->host_kv, &x->bases.space[PS_SPACE_HOST_KV_DEV], err));
    }
    return ps_exec_reserve_logits(x, p->spec.logit_rows, err);
}

ps_status ps_exec_reserve_logits(ps_exec *x, uint32_t n_rows, ps_err *err)
{
    if (n_rows <= x->out_rows) return PS_OK;
    void *out = NULL;
    uint64_t row = (uint64_t)x->model->hp.n_vocab * sizeof(float);
    PS_TRY(ps_exec_locked(x, n_rows * row, &out, err));
    if (x->out != NULL) {
        ps_device_locked_free(x->device, x->out);
        x->stats.locked_bytes -= x->out_rows * row;
    }
    x->out = out;
    x->out_rows = n_rows;
    x->bases.space[PS_SPACE_OUT] = host_dptr(out);
    ps_exec_drop_lists(x); /* bound to the old address */
    return PS_OK;
}

uint32_t ps_exec_logit_rows(ps_exec *x, uint32_t n_rows)
{
    while (n_rows > x->out_rows && ps_exec_reserve_logits(x, n_rows, NULL) != PS_OK) n_rows /= 2;
    return n_rows > x->out_rows ? x->out_rows : n_rows;
}

/* ---- weights ---- */

/* What there is besides images, locked or not, before any list is lowered. */
static uint64_t fixed_ram_bytes(const ps_exec *x)
{
    const ps_plan *p = x->plan;
    return ps_locked_fixed_bytes(p) + p->space_bytes[PS_SPACE_HOST_CONST] +
           (p->kv_backed ? 0 : p->space_bytes[PS_SPACE_HOST_KV]);
}

/* What may be given to a bounce ring beside its least, which is fixed. */
static uint64_t bounce_extra(uint64_t locked_room, uint64_t ram_room)
{
    return ps_min_u64(
        PS_BOUNCE_GOOD_BYTES - PS_BOUNCE_MIN_BYTES, ps_min_u64(locked_room / 2, ram_room / 4));
}

/* Which units get an image. Where anything bounces, *bounce_bytes is set aside for the ring. */
static ps_status choose_images(ps_exec *x, uint64_t *bounce_bytes, ps_err *err)
{
    ps_host_weights *w = &x->weights;
    uint64_t ram_limit = limit_or_none(x->options.ram_limit), fixed = fixed_ram_bytes(x);
    uint64_t ram_room = room_below(ram_limit, fixed), missing = 0;
    uint64_t locked_room =
        room_below(limit_or_none(x->options.locked_limit), ps_locked_fixed_bytes(x->plan));
    PS_TRY(ps_host_weights_init(
        w, x->model, x->plan, x->device, ram_room, locked_room, &missing, err));
    *bounce_bytes = 0;
    if (ps_host_weights_needs_bounce(w, locked_room)) {
        uint64_t extra = bounce_extra(locked_room, ram_room), room = room_below(ram_room, extra);
        if (w->image_bytes > room) { /* a good ring is worth a few more units on disk */
            ps_host_weights_fini(w);
            PS_TRY(ps_host_weights_init(
                w, x->model, x->plan, x->device, room, locked_room, &missing, err));
            if (missing > 0) extra = room_below(ram_room, w->image_bytes);
        }
        *bounce_bytes = PS_BOUNCE_MIN_BYTES + extra;
    }
    return check_limit("ram_limit", "host", RAM_ADVICE, fixed + w->image_bytes, ram_limit, err);
}

static ps_status make_bounce(ps_exec *x, uint64_t n_bytes, ps_err *err)
{
    for (;; n_bytes /= 2) {
        ps_err why = {0};
        ps_status status = ps_bounce_create(&x->weights, x->device, n_bytes, &x->bounce, &why);
        if (status == PS_OK) break;
        /* Less of it may be had; or what images hold. */
        bool again = status == PS_EDEVICE && (n_bytes / 2 >= PS_BOUNCE_MIN_BYTES ||
                                                 ps_host_weights_unlock_one(&x->weights));
        if (!again) {
            if (err != NULL && err->status == PS_OK) *err = why;
            return status;
        }
        n_bytes = ps_max_u64(n_bytes, 2 * PS_BOUNCE_MIN_BYTES);
    }
    x->stats.locked_bytes += ps_bounce_bytes(x->bounce);
    return PS_OK;
}

/* Copies take only locked memory: lock images as far as the limit and the system allow; the others
 * bounce. Nothing is locked for a plan whose passes copy none. */
static ps_status lock_images(ps_exec *x, uint64_t bounce_bytes, ps_err *err)
{
    if (!ps_host_weights_streams(&x->weights)) return PS_OK;
    const ps_exec_options *o = &x->options;
    ps_host_weights *w = &x->weights;
    uint64_t reserved = PS_LOCKED_FLAGS_BYTES + ps_max_u64(bounce_bytes, PS_BOUNCE_MIN_BYTES);
    uint64_t room = room_below(limit_or_none(o->locked_limit), x->stats.locked_bytes + reserved);
    if (bounce_bytes > 0) PS_TRY(make_bounce(x, bounce_bytes, err));
    PS_TRY(ps_host_weights_lock(w, room, err));
    if (x->bounce != NULL || ps_host_weights_all_locked(w)) return PS_OK;
    /* The system has refused what the limits allow. */
    return make_bounce(x,
        PS_BOUNCE_MIN_BYTES +
            bounce_extra(room_below(room, w->locked_bytes),
                room_below(limit_or_none(o->ram_limit), fixed_ram_bytes(x) + w->image_bytes)),
        err);
}

/* Experts may be read where they lie (ps_pass_maps_experts), those that are locked. */
static ps_status find_image_addresses(ps_exec *x, ps_err *err)
{
    const ps_model *m = x->model;
    if (x->plan->space_bytes[PS_SPACE_DEV_RING] == 0) return PS_OK;
    x->image_dev = ps_alloc(m->n_units, sizeof *x->image_dev);
    x->mapped = ps_alloc(x->plan->model->n_units, sizeof *x->mapped);
    if (x->image_dev == NULL || x->mapped == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory to map images");
    for (uint32_t i = 0; i < m->n_units; i++) {
        if (m->units[i].kind != PS_UNIT_EXPERT || x->weights.piece[i] == 0) continue;
        PS_TRY(ps_device_locked_dptr(x->device, ps_model_image(m, i), &x->image_dev[i], err));
        x->mapped[i] = true;
    }
    x->bases.image_dev = x->image_dev;
    return PS_OK;
}

static ps_status load_weights(ps_exec *x, ps_pool *pool, ps_err *err)
{
    const ps_exec_options *o = &x->options;
    PS_TRY(ps_host_weights_load(
        &x->weights, o->ram_limit != 0, pool, o->progress, o->ctx, &x->stats.disk_bytes, err));
    uint64_t room = ps_min_u64(
        room_below(limit_or_none(o->locked_limit), x->stats.locked_bytes + PS_LOCKED_FLAGS_BYTES),
        room_below(limit_or_none(o->ram_limit),
            fixed_ram_bytes(x) - PS_BOUNCE_MIN_BYTES + x->weights.image_bytes));
    return ps_upload_weights(x->plan, x->device, x->bases.space[PS_SPACE_DEV_WEIGHTS], room, pool,
        o->progress, o->ctx, &x->stats.disk_bytes, err);
}

/* Rope frequencies: the same on both sides, once and for all. */
static ps_status fill_const(ps_exec *x, ps_err *err)
{
    const ps_hparams *hp = &x->model->hp;
    for (uint32_t i = 0; i < hp->n_rope; i++) {
        float mag = 0.0f,
              *freq = (float *)(void *)((unsigned char *)x->host_const + x->plan->rope_offset[i]);
        PS_TRY(ps_model_rope(x->model, i, x->plan->spec.n_ctx, freq, &mag, err));
        if (x->const_staging != NULL)
            memcpy((unsigned char *)x->const_staging + x->plan->rope_offset[i], freq,
                hp->n_rot / 2 * sizeof(float));
    }
    if (x->const_staging == NULL) return PS_OK;
    PS_TRY(
        ps_device_copy_in(x->device, x->stream[PS_STREAM_H2D], x->bases.space[PS_SPACE_DEV_CONST],
            x->const_staging, x->plan->space_bytes[PS_SPACE_DEV_CONST], err));
    return ps_device_sync(x->device, x->stream[PS_STREAM_H2D], err);
}

static ps_status create(ps_exec *x, ps_err *err)
{
    ps_pool *pool = NULL;
    uint64_t bounce_bytes = 0;
    x->bases.weights = &x->weights;
    PS_TRY(check_limit("locked_limit", "page-locked", LOCKED_ADVICE, ps_locked_fixed_bytes(x->plan),
        limit_or_none(x->options.locked_limit), err));
    PS_TRY(choose_images(x, &bounce_bytes, err));
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        PS_TRY(ps_stream_create(x->device, (ps_stream_role)s, &x->stream[s], err));
    PS_TRY(ps_event_create(x->device, &x->fork, err));
    PS_TRY(ps_event_create(x->device, &x->join, err));
    PS_TRY(take_spaces(x, err));
    PS_TRY(take_host(x, err));
    PS_TRY(fill_const(x, err));
    int n_threads = ps_cpu_count();
    PS_TRY(ps_pool_create(n_threads < 16 ? n_threads : 16, &pool, err));
    ps_status status = load_weights(x, pool, err);
    ps_pool_destroy(pool);
    if (status == PS_OK) status = lock_images(x, bounce_bytes, err);
    return status == PS_OK ? find_image_addresses(x, err) : status;
}

ps_status ps_exec_create(ps_model *model, const ps_plan *plan, ps_device *device,
    const ps_exec_options *options, ps_exec **out, ps_err *err)
{
    *out = NULL;
    ps_exec *x = ps_alloc(1, sizeof *x);
    if (x == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for an executor");
    x->model = model;
    x->plan = plan;
    x->device = device;
    x->options = *options;
    ps_status status = create(x, err);
    if (status != PS_OK)
        ps_exec_destroy(x);
    else
        *out = x;
    return status;
}

void ps_exec_free_locked(ps_exec *x, void *p)
{
    if (p != NULL) ps_device_locked_free(x->device, p);
}

void ps_exec_destroy(ps_exec *x)
{
    if (x == NULL) return;
    ps_exec_drop_lists(x);
    ps_trace_destroy(x->trace);
    for (uint32_t i = 0; i < x->n_events; i++) ps_event_destroy(x->device, x->events[i]);
    ps_free(x->events);
    if (x->fork != NULL) ps_event_destroy(x->device, x->fork);
    if (x->join != NULL) ps_event_destroy(x->device, x->join);
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (x->stream[s] != NULL) ps_stream_destroy(x->device, x->stream[s]);
    ps_bounce_destroy(x->bounce);
    ps_host_weights_fini(&x->weights);
    ps_free(x->image_dev);
    ps_free(x->mapped);
    ps_exec_free_locked(x, x->host_act);
    ps_exec_free_locked(x, x->host_batch);
    ps_exec_free_locked(x, x->const_staging);
    ps_exec_free_locked(x, x->out);
    ps_exec_free_locked(x, x->flags);
    if (x->host_kv_locked) ps_device_unlock(x->device, x->host_kv);
    ps_free(x->host_kv);
    ps_free(x->host_const);
    ps_arena_fini(&x->arena);
    ps_free(x);
}

/* ---- taking over ---- */

void ps_exec_retire(ps_exec *x, ps_exec_past *past)
{
    *past = (ps_exec_past){0};
    if (x == NULL) return;
    *past = (ps_exec_past){.stats = x->stats, .trace = x->trace, .recording = x->recording};
    x->trace = NULL;
    ps_exec_destroy(x);
}

void ps_exec_inherit(ps_exec *x, ps_exec_past *past)
{
    ps_exec_stats *now = &x->stats;
    const ps_exec_stats *before = &past->stats;
    now->h2d_bytes += before->h2d_bytes;
    now->d2h_bytes += before->d2h_bytes;
    now->bounce_bytes += before->bounce_bytes;
    now->disk_bytes += before->disk_bytes;
    now->n_passes += before->n_passes;
    now->n_graph_launches += before->n_graph_launches;
    now->busy_ns += before->busy_ns;
    x->trace = past->trace;
    x->recording = past->recording;
    past->trace = NULL;
}

static ps_status move_dev(
    ps_exec *x, bool in, ps_dptr at, unsigned char *bytes, uint64_t n, ps_err *err)
{
    ps_stream *s = x->stream[in ? PS_STREAM_H2D : PS_STREAM_D2H];
    if (in) {
        memcpy(x->out, bytes, n);
        PS_TRY(ps_device_copy_in(x->device, s, at, x->out, n, err));
        return ps_device_sync(x->device, s, err);
    }
    PS_TRY(ps_device_copy_out(x->device, s, x->out, at, n, err));
    PS_TRY(ps_device_sync(x->device, s, err));
    memcpy(bytes, x->out, n);
    return PS_OK;
}

ps_status ps_exec_move_kv(
    ps_exec *x, bool in, ps_dptr ref, void *bytes, uint64_t n_bytes, ps_err *err)
{
    uint64_t staging_bytes = (uint64_t)x->out_rows * x->model->hp.n_vocab * sizeof(float);
    ps_dptr at = ps_bind_ref(&x->bases, ref);
    if (ps_ref_space(ref) == PS_SPACE_HOST_KV) {
        void *home = (void *)(uintptr_t)at.a;
        memcpy(in ? home : bytes, in ? bytes : home, n_bytes);
        return PS_OK;
    }
    ps_status status = PS_OK;
    for (uint64_t done = 0, n; done < n_bytes && status == PS_OK; done += n) {
        n = ps_min_u64(staging_bytes, n_bytes - done);
        status = move_dev(x, in, ps_dptr_add(at, done), (unsigned char *)bytes + done, n, err);
    }
    if (status == PS_EFATAL) x->lost = true;
    return status;
}
