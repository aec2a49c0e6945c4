/* ps_exec - see ps_exec.h. */
#include "engine/ps_exec.h"

#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "engine/ps_bind.h"
#include "engine/ps_images.h"
#include "engine/ps_upload.h"

#define TRY(call)                                                                                  \
    do {                                                                                           \
        ps_status try_status = (call);                                                             \
        if (try_status != PS_OK) return try_status;                                                \
    } while (0)

enum {
    CAP_BOUND = 24,   /* shapes of pass kept: decode of several KV lengths, and the last prompts */
    FLAG_STRIDE = 64, /* one flag a cache line: neither side's polling disturbs the other's words */
    GRAPH_MAX_TOK = PS_SMALL_PASS_TOK, /* longer passes hide their launches behind the work */
    GRAPH_AFTER_RUNS = 2,              /* record a shape once it has proved to come again */
    CONTROL_EVERY = 16,                /* runs, of which a trace leaves one unmarked */
    POLL_NS = 20 * 1000 * 1000,
    POLL_EVERY_TICKS = 64,
    LOOK_NS = 200 * 1000,
    LOOK_SHORT_NS = 20 * 1000,
};

struct ps_exec {
    ps_model *model; /* borrows, as the next two */
    const ps_plan *plan;
    ps_device *device;
    ps_exec_options options;
    ps_arena arena; /* owns */
    ps_bases bases;
    ps_stream *stream[PS_STREAM_COUNT]; /* owns */
    ps_event **events;                  /* owns; grown to what the lists need */
    uint32_t n_events;
    ps_event *fork, *join; /* owns; of graphs */
    unsigned char *flags;  /* owns, locked; FLAG_STRIDE bytes each */
    uint32_t n_flags;
    void *host_act, *host_batch, *const_staging, *out; /* own, locked */
    void *host_kv, *host_const;                        /* own */
    uint64_t host_kv_bytes;
    bool host_kv_locked;
    uint32_t out_rows;
    ps_images *parts;     /* owns; images of the plan's parts; NULL where it cuts no unit */
    void **locked_chunks; /* owns the list; chunks of images that this device has locked */
    uint32_t n_locked_chunks;
    ps_dptr *image_dev; /* owns; [n_units] device addresses of locked images; null: not streamed */
    ps_bound *bound[CAP_BOUND]; /* owns */
    uint32_t n_bound;
    const ps_bound *tables_of; /* list whose expert tables the CONST spaces hold now */
    bool tables_torn; /* what the staging holds may not have reached the device: a copy failed */
    _Atomic bool cancelled;
    bool lost;
    uint64_t next_poll_ns;
    ps_exec_stats stats;
    ps_trace *trace; /* owns; NULL before the first start */
    bool recording;  /* passes are traced */
    bool marking;    /* this pass is marked */
};

/* ---- memory ---- */

static ps_status locked(ps_exec *x, uint64_t n_bytes, void **out, ps_err *err)
{
    if (n_bytes == 0) return PS_OK;
    TRY(ps_device_locked_alloc(x->device, n_bytes, out, err));
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
    static const struct {
        ps_space space;
        ps_mem_kind kind;
    } rows[] = {{PS_SPACE_DEV_WEIGHTS, PS_MEM_WEIGHTS}, {PS_SPACE_DEV_RING, PS_MEM_RING},
        {PS_SPACE_DEV_KV, PS_MEM_KV}, {PS_SPACE_DEV_ACT, PS_MEM_ACT},
        {PS_SPACE_DEV_BATCH, PS_MEM_BATCH}, {PS_SPACE_DEV_CONST, PS_MEM_BATCH}};
    const ps_plan *p = x->plan;
    if (!p->spec.accelerator) return PS_OK;
    uint64_t carved = p->needed_bytes - p->bytes_by_kind[PS_MEM_GRAPH];
    TRY(ps_arena_init(&x->arena, x->device, carved, p->spec.budget_bytes, err));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint64_t n_bytes =
            ps_div_up_u64(p->space_bytes[rows[i].space], PS_ARENA_ALIGN) * PS_ARENA_ALIGN;
        if (n_bytes == 0) continue;
        TRY(ps_arena_take(&x->arena, rows[i].kind, p->dev_base[rows[i].space], n_bytes,
            &x->bases.space[rows[i].space], err));
    }
    return PS_OK;
}

static ps_status take_host(ps_exec *x, ps_err *err)
{
    const ps_plan *p = x->plan;
    TRY(locked(x, p->space_bytes[PS_SPACE_HOST_ACT], &x->host_act, err));
    TRY(locked(x, p->space_bytes[PS_SPACE_HOST_BATCH], &x->host_batch, err));
    TRY(locked(x, p->space_bytes[PS_SPACE_DEV_CONST], &x->const_staging, err));
    x->host_kv_bytes = p->space_bytes[PS_SPACE_HOST_KV];
    if (x->host_kv_bytes > 0) x->host_kv = ps_alloc(x->host_kv_bytes, 1);
    x->host_const = ps_alloc(p->space_bytes[PS_SPACE_HOST_CONST] + 1, 1);
    if ((x->host_kv_bytes > 0 && x->host_kv == NULL) || x->host_const == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for a KV cache of %.1f MiB",
            (double)x->host_kv_bytes / (1 << 20));
    x->bases.space[PS_SPACE_HOST_ACT] = host_dptr(x->host_act);
    if (p->space_bytes[PS_SPACE_HOST_ACT_DEV] > 0)
        TRY(ps_device_locked_dptr(
            x->device, x->host_act, &x->bases.space[PS_SPACE_HOST_ACT_DEV], err));
    x->bases.space[PS_SPACE_HOST_BATCH] = host_dptr(x->host_batch);
    x->bases.space[PS_SPACE_HOST_CONST] = host_dptr(x->host_const);
    x->bases.space[PS_SPACE_HOST_KV] = host_dptr(x->host_kv);
    if (p->kv_backed) {
        TRY(ps_device_lock(x->device, x->host_kv, x->host_kv_bytes, err));
        x->host_kv_locked = true;
        x->stats.locked_bytes += x->host_kv_bytes;
        TRY(ps_device_locked_dptr(
            x->device, x->host_kv, &x->bases.space[PS_SPACE_HOST_KV_DEV], err));
    }
    return ps_exec_reserve_logits(x, p->spec.logit_rows, err);
}

static void drop_graphs(ps_exec *x, ps_bound *b)
{
    for (int marked = 0; marked < 2; marked++) {
        if (b->graph[marked] != NULL) ps_graph_destroy(x->device, b->graph[marked]);
        b->graph[marked] = NULL;
    }
}

ps_status ps_exec_reserve_logits(ps_exec *x, uint32_t n_rows, ps_err *err)
{
    if (n_rows <= x->out_rows) return PS_OK;
    void *out = NULL;
    uint64_t row = (uint64_t)x->model->hp.n_vocab * sizeof(float);
    TRY(locked(x, n_rows * row, &out, err));
    if (x->out != NULL) {
        ps_device_locked_free(x->device, x->out);
        x->stats.locked_bytes -= x->out_rows * row;
    }
    x->out = out;
    x->out_rows = n_rows;
    x->bases.space[PS_SPACE_OUT] = host_dptr(out);
    /* Lists bound to the old address are of no use any more. */
    for (uint32_t i = 0; i < x->n_bound; i++) {
        drop_graphs(x, x->bound[i]);
        ps_bound_destroy(x->bound[i]);
    }
    x->n_bound = 0;
    x->tables_of = NULL;
    return PS_OK;
}

/* Copies take only locked memory: lock the chunks that hold streamed images. */
static ps_status lock_images(ps_exec *x, ps_err *err)
{
    const ps_images *im = x->model->images;
    if (x->plan->space_bytes[PS_SPACE_DEV_RING] == 0) return PS_OK;
    uint32_t n = ps_images_chunk_count(im), n_parts = ps_images_chunk_count(x->parts);
    x->locked_chunks = ps_alloc((uint64_t)n + n_parts + 1, sizeof *x->locked_chunks);
    if (x->locked_chunks == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to lock images");
    for (uint32_t i = 0; i < n + n_parts; i++) {
        void *base = NULL;
        uint64_t n_bytes = 0;
        ps_images_chunk(i < n ? im : x->parts, i < n ? i : i - n, &base, &n_bytes);
        TRY(ps_device_lock(x->device, base, n_bytes, err));
        x->locked_chunks[x->n_locked_chunks++] = base;
        x->stats.locked_bytes += n_bytes;
    }
    return PS_OK;
}

/* Experts may be read where they lie (ps_pass_maps_experts). */
static ps_status find_image_addresses(ps_exec *x, ps_err *err)
{
    const ps_model *m = x->model;
    if (x->n_locked_chunks == 0) return PS_OK;
    x->image_dev = ps_alloc(m->n_units, sizeof *x->image_dev);
    if (x->image_dev == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to map images");
    for (uint32_t i = 0; i < m->n_units; i++)
        if (m->units[i].kind == PS_UNIT_EXPERT && x->plan->homes[i].host)
            TRY(ps_device_locked_dptr(x->device, ps_model_image(m, i), &x->image_dev[i], err));
    x->bases.image_dev = x->image_dev;
    return PS_OK;
}

static ps_status load_weights(ps_exec *x, ps_pool *pool, ps_err *err)
{
    const ps_model *m = x->plan->model; /* with parts, where the plan has cut units */
    bool *want = ps_alloc(m->n_units, sizeof *want);
    if (want == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to load a model");
    for (uint32_t i = 0; i < m->n_units; i++) want[i] = x->plan->homes[i].host;
    uint64_t before = ps_model_image_bytes(x->model);
    ps_status status =
        ps_model_load_images(x->model, want, pool, x->options.progress, x->options.ctx, err);
    x->stats.disk_bytes += ps_model_image_bytes(x->model) - before;
    if (status == PS_OK && m != x->model) {
        memset(want, 0, x->model->n_units * sizeof *want);
        status = ps_images_create(m->n_units, &x->parts, err);
        x->bases.parts = x->parts;
        if (status == PS_OK)
            status =
                ps_images_fill(x->parts, m, want, pool, x->options.progress, x->options.ctx, err);
        x->stats.disk_bytes += ps_images_bytes(x->parts);
    }
    if (status == PS_OK)
        status = ps_upload_weights(x->plan, x->device, x->bases.space[PS_SPACE_DEV_WEIGHTS], pool,
            x->options.progress, x->options.ctx, &x->stats.disk_bytes, err);
    ps_free(want);
    return status;
}

/* Rope frequencies: the same on both sides, once and for all. */
static ps_status fill_const(ps_exec *x, ps_err *err)
{
    const ps_hparams *hp = &x->model->hp;
    for (uint32_t i = 0; i < hp->n_rope; i++) {
        float mag = 0.0f,
              *freq = (float *)(void *)((unsigned char *)x->host_const + x->plan->rope_offset[i]);
        TRY(ps_model_rope(x->model, i, x->plan->spec.n_ctx, freq, &mag, err));
        if (x->const_staging != NULL)
            memcpy((unsigned char *)x->const_staging + x->plan->rope_offset[i], freq,
                hp->n_rot / 2 * sizeof(float));
    }
    if (x->const_staging == NULL) return PS_OK;
    TRY(ps_device_copy_in(x->device, x->stream[PS_STREAM_H2D], x->bases.space[PS_SPACE_DEV_CONST],
        x->const_staging, x->plan->space_bytes[PS_SPACE_DEV_CONST], err));
    return ps_device_sync(x->device, x->stream[PS_STREAM_H2D], err);
}

static ps_status create(ps_exec *x, ps_err *err)
{
    ps_pool *pool = NULL;
    ps_status status = PS_OK;
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        TRY(ps_stream_create(x->device, (ps_stream_role)s, &x->stream[s], err));
    TRY(ps_event_create(x->device, &x->fork, err));
    TRY(ps_event_create(x->device, &x->join, err));
    TRY(take_spaces(x, err));
    TRY(take_host(x, err));
    TRY(fill_const(x, err));
    int n_threads = ps_cpu_count();
    TRY(ps_pool_create(n_threads < 16 ? n_threads : 16, &pool, err));
    status = load_weights(x, pool, err);
    ps_pool_destroy(pool);
    if (status == PS_OK) status = lock_images(x, err);
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

static void free_locked(ps_exec *x, void *p)
{
    if (p != NULL) ps_device_locked_free(x->device, p);
}

void ps_exec_destroy(ps_exec *x)
{
    if (x == NULL) return;
    for (uint32_t i = 0; i < x->n_bound; i++) {
        drop_graphs(x, x->bound[i]);
        ps_bound_destroy(x->bound[i]);
    }
    ps_trace_destroy(x->trace);
    for (uint32_t i = 0; i < x->n_events; i++) ps_event_destroy(x->device, x->events[i]);
    ps_free(x->events);
    if (x->fork != NULL) ps_event_destroy(x->device, x->fork);
    if (x->join != NULL) ps_event_destroy(x->device, x->join);
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (x->stream[s] != NULL) ps_stream_destroy(x->device, x->stream[s]);
    for (uint32_t i = 0; i < x->n_locked_chunks; i++)
        ps_device_unlock(x->device, x->locked_chunks[i]);
    ps_free(x->locked_chunks);
    ps_free(x->image_dev);
    ps_images_destroy(x->parts);
    free_locked(x, x->host_act);
    free_locked(x, x->host_batch);
    free_locked(x, x->const_staging);
    free_locked(x, x->out);
    free_locked(x, x->flags);
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
        TRY(ps_device_copy_in(x->device, s, at, x->out, n, err));
        return ps_device_sync(x->device, s, err);
    }
    TRY(ps_device_copy_out(x->device, s, x->out, at, n, err));
    TRY(ps_device_sync(x->device, s, err));
    memcpy(bytes, x->out, n);
    return PS_OK;
}

ps_status ps_exec_move_kv(
    ps_exec *x, bool in, ps_dptr ref, void *bytes, uint64_t n_bytes, ps_err *err)
{
    uint64_t staging_bytes = (uint64_t)x->out_rows * x->model->hp.n_vocab * sizeof(float);
    ps_dptr at = ps_bind_ref(x->model, &x->bases, ref);
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

/* ---- bound lists ---- */

static bool same_shape(const ps_pass_shape *a, const ps_pass_shape *b)
{
    return a->tier == b->tier && a->n_tok == b->n_tok && a->n_out == b->n_out &&
           a->max_kv == b->max_kv && a->staged == b->staged && a->seq == b->seq &&
           a->first == b->first && a->far == b->far;
}

static ps_status grow_events(ps_exec *x, uint32_t n, ps_err *err)
{
    if (n <= x->n_events) return PS_OK;
    ps_event **events = ps_realloc(x->events, n, sizeof(ps_event *));
    if (events == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for %u events", n);
    x->events = events;
    while (x->n_events < n) {
        TRY(ps_event_create(x->device, &x->events[x->n_events], err));
        x->n_events++;
    }
    return PS_OK;
}

static ps_status grow_flags(ps_exec *x, uint32_t n, ps_err *err)
{
    if (n <= x->n_flags) return PS_OK;
    void *flags = NULL;
    uint32_t cap = n * 2;
    TRY(locked(x, (uint64_t)cap * FLAG_STRIDE, &flags, err));
    if (x->flags != NULL) x->stats.locked_bytes -= (uint64_t)x->n_flags * FLAG_STRIDE;
    free_locked(x, x->flags);
    x->flags = flags;
    x->n_flags = cap;
    for (uint32_t i = 0; i < x->n_bound; i++) drop_graphs(x, x->bound[i]); /* with old addresses */
    return PS_OK;
}

static void evict(ps_exec *x)
{
    uint32_t oldest = 0;
    for (uint32_t i = 1; i < x->n_bound; i++)
        if (x->bound[i]->last_used < x->bound[oldest]->last_used) oldest = i;
    ps_bound *b = x->bound[oldest];
    if (x->tables_of == b) x->tables_of = NULL;
    drop_graphs(x, b);
    ps_bound_destroy(b);
    x->bound[oldest] = x->bound[--x->n_bound];
}

static ps_status get_bound(ps_exec *x, const ps_pass_shape *shape, ps_bound **out, ps_err *err)
{
    for (uint32_t i = 0; i < x->n_bound; i++)
        if (same_shape(&x->bound[i]->ticks->shape, shape)) {
            *out = x->bound[i];
            return PS_OK;
        }
    ps_ticks *ticks = NULL;
    TRY(ps_lower(x->plan, shape, &ticks, err));
    ps_status status = x->options.check ? ps_ticks_check(ticks, err) : PS_OK;
    if (status == PS_OK) status = grow_events(x, ticks->n_events, err);
    if (status == PS_OK) status = grow_flags(x, ticks->n_flags, err);
    if (status != PS_OK) {
        ps_ticks_destroy(ticks);
        return status;
    }
    ps_bound *b = NULL;
    TRY(ps_bind(x->model, &x->bases, ticks, &b, err));
    if (x->n_bound == CAP_BOUND) evict(x);
    x->bound[x->n_bound++] = b;
    *out = b;
    return PS_OK;
}

/* ---- a pass ---- */

static bool poll_now(ps_exec *x)
{
    if (atomic_load(&x->cancelled)) return false;
    if (x->options.poll == NULL) return true;
    uint64_t now = ps_clock_ns();
    if (now < x->next_poll_ns) return true;
    x->next_poll_ns = now + POLL_NS;
    return x->options.poll(x->options.ctx);
}

static void fill_batch(ps_exec *x, const ps_bound *b, const ps_batch *batch)
{
    const ps_batch_layout *l = &b->ticks->batch;
    unsigned char *to = x->host_batch;
    size_t n = batch->n_tok, word = sizeof(int32_t);
    memcpy(to + l->ids, batch->ids, n * word);
    memcpy(to + l->pos, batch->pos, n * word);
    memcpy(to + l->seq, batch->seq, n * word);
    if (batch->n_out > 0) memcpy(to + l->rows, batch->rows, batch->n_out * word);
    uint32_t n_seq = x->plan->spec.n_seq, max_pages = x->plan->max_pages;
    memcpy(to + l->table, batch->table, (size_t)n_seq * max_pages * word);
    size_t n_near = x->plan->n_windows * (size_t)n_seq * max_pages;
    if (!b->ticks->shape.staged && n_near > 0) {
        memcpy(to + l->near, batch->near_pages, n_near * word);
        memcpy(to + l->far, batch->far_pages, n_near * word);
    }
    if (b->ticks->shape.staged) {
        int32_t *stage = (int32_t *)(void *)(to + l->stage_table);
        for (uint32_t i = 0; i < n_seq * max_pages; i++) stage[i] = (int32_t)(i % max_pages);
    }
    if (x->model->hp.rope != PS_ROPE_MROPE) return;
    uint32_t chunk = x->plan->spec.chunk_tok; /* each chunk has its own [4][n] block */
    for (uint32_t first = 0; first < batch->n_tok; first += chunk) {
        uint32_t m = batch->n_tok - first < chunk ? batch->n_tok - first : chunk;
        for (uint32_t j = 0; j < 4; j++)
            memcpy(to + l->rope_pos + ((size_t)first * 4 + (size_t)j * m) * word,
                batch->rope_pos != NULL ? batch->rope_pos + (size_t)j * n + first
                                        : batch->pos + first,
                m * word);
    }
}

/* Brings the list's expert addresses into both CONST spaces, if they are not there already. */
static ps_status activate_tables(ps_exec *x, const ps_bound *b, ps_err *err)
{
    const ps_ticks *t = b->ticks;
    if (x->tables_of == b || t->n_table == 0) return PS_OK;
    uint64_t at = x->plan->tables_offset, n_bytes = t->n_table * sizeof(ps_dptr);
    ps_dptr *host = (ps_dptr *)(void *)((unsigned char *)x->host_const + at);
    for (uint32_t i = 0; i < t->n_table; i++)
        host[i] = ps_bind_ref(x->model, &x->bases, t->table[PS_SIDE_HOST][i]);
    if (x->const_staging != NULL) {
        bool changed = x->tables_torn;
        ps_dptr *dev = (ps_dptr *)(void *)((unsigned char *)x->const_staging + at);
        for (uint32_t i = 0; i < t->n_table; i++) {
            ps_dptr p = ps_bind_ref(x->model, &x->bases, t->table[PS_SIDE_DEV][i]);
            changed = changed || p.a != dev[i].a;
            dev[i] = p;
        }
        if (changed) {
            x->tables_of = NULL;
            x->tables_torn = true;
            TRY(ps_device_copy_in(x->device, x->stream[PS_STREAM_H2D],
                ps_dptr_add(x->bases.space[PS_SPACE_DEV_CONST], at), dev, n_bytes, err));
            TRY(ps_device_sync(x->device, x->stream[PS_STREAM_H2D], err));
            x->tables_torn = false;
        }
    }
    x->tables_of = b;
    return PS_OK;
}

static uint32_t *flag_at(const ps_exec *x, uint32_t i)
{
    return (uint32_t *)(void *)(x->flags + (size_t)i * FLAG_STRIDE);
}

static ps_status enqueue(ps_exec *x, const ps_bound *b, uint32_t i, ps_err *err)
{
    const ps_tick *k = &b->ticks->tick[i];
    ps_device *d = x->device;
    ps_stream *s = x->stream[k->stream];
    switch ((ps_tick_kind)k->kind) {
    case PS_TICK_COPY_IN:
        return ps_device_copy_in(d, s, k->dst, (const void *)(uintptr_t)k->src.a, k->n_bytes, err);
    case PS_TICK_COPY_OUT:
        return ps_device_copy_out(d, s, (void *)(uintptr_t)k->dst.a, k->src, k->n_bytes, err);
    case PS_TICK_RUN: {
        const ps_op_table *table =
            k->stream == PS_STREAM_CPU ? x->options.cpu_ops : x->options.dev_ops;
        return ps_device_run(d, s, table->op[k->op], b->ticks->args + k->index,
            ps_op_args_bytes((ps_op_kind)k->op), &b->cost[i], err);
    }
    case PS_TICK_RECORD: return ps_device_record(d, s, x->events[k->index], err);
    case PS_TICK_WAIT: return ps_device_wait(d, s, x->events[k->index], err);
    /* Each hand-off of a pass has a word of its own, cleared before the pass. */
    case PS_TICK_FLAG_SET: return ps_device_flag_set(d, s, flag_at(x, k->index), 1, err);
    case PS_TICK_FLAG_WAIT: return ps_device_flag_wait(d, s, flag_at(x, k->index), 1, err);
    }
    return ps_fail(err, PS_EINTERNAL, "tick %u is of no kind", i);
}

typedef enum part { PART_ALL, PART_CPU, PART_ACCELERATOR } part;

static ps_status enqueue_part(ps_exec *x, const ps_bound *b, part which, ps_err *err)
{
    const ps_tick *tick = b->ticks->tick;
    for (uint32_t i = 0; i < b->ticks->n_ticks; i++) {
        bool cpu = tick[i].stream == PS_STREAM_CPU;
        if ((which == PART_CPU && !cpu) || (which == PART_ACCELERATOR && cpu)) continue;
        ps_stream *s = x->stream[tick[i].stream];
        bool in_graph = which == PART_ACCELERATOR;
        if (x->marking) TRY(ps_trace_enter(x->trace, s, b->ticks, i, in_graph, err));
        TRY(enqueue(x, b, i, err));
        if (x->marking) TRY(ps_trace_leave(x->trace, s, b->ticks, i, err));
        if (i % POLL_EVERY_TICKS == 0 && !poll_now(x))
            return ps_fail(err, PS_ECANCELLED, "the pass was interrupted");
    }
    return PS_OK;
}

/* Records the accelerator's part. The copy streams join the capture through `fork` and must come
 * back through `join`. */
static ps_status record_graph(ps_exec *x, ps_bound *b, ps_err *err)
{
    ps_device *d = x->device;
    ps_stream *main_stream = x->stream[PS_STREAM_COMPUTE];
    static const ps_stream_role copies[] = {PS_STREAM_H2D, PS_STREAM_D2H};
    ps_graph *graph = NULL;
    TRY(ps_graph_begin(d, main_stream, err));
    ps_status status = ps_device_record(d, main_stream, x->fork, err);
    for (int i = 0; i < 2 && status == PS_OK; i++)
        if (b->n_ticks_on[copies[i]] > 0)
            status = ps_device_wait(d, x->stream[copies[i]], x->fork, err);
    if (status == PS_OK) status = enqueue_part(x, b, PART_ACCELERATOR, err);
    for (int i = 0; i < 2 && status == PS_OK; i++) {
        if (b->n_ticks_on[copies[i]] == 0) continue;
        status = ps_device_record(d, x->stream[copies[i]], x->join, err);
        if (status == PS_OK) status = ps_device_wait(d, main_stream, x->join, err);
    }
    ps_status ended = ps_graph_end(d, main_stream, &graph, err);
    if (status != PS_OK || ended != PS_OK) {
        if (graph != NULL) ps_graph_destroy(d, graph);
        return status != PS_OK ? status : ended;
    }
    b->graph[x->marking] = graph;
    return PS_OK;
}

static bool wants_graph(const ps_exec *x, const ps_bound *b)
{
    return x->options.graphs && b->graph[x->marking] == NULL && !b->graph_failed[x->marking] &&
           b->ticks->shape.n_tok <= GRAPH_MAX_TOK && b->n_runs >= GRAPH_AFTER_RUNS &&
           b->n_ticks_on[PS_STREAM_COMPUTE] > 0;
}

/* The driver's memory for a graph counts against the reserve that the plan made for it. */
static void try_graph(ps_exec *x, ps_bound *b)
{
    uint64_t before = 0, after = 0, total = 0;
    ps_err ignored = {0};
    if (ps_device_mem_info(x->device, &before, &total, &ignored) != PS_OK ||
        record_graph(x, b, &ignored) != PS_OK ||
        ps_device_mem_info(x->device, &after, &total, &ignored) != PS_OK) {
        b->graph_failed[x->marking] = true;
        return;
    }
    uint64_t used = before > after ? before - after : 0;
    if (ps_arena_charge(&x->arena, PS_MEM_GRAPH, used, &ignored) != PS_OK) {
        ps_graph_destroy(x->device, b->graph[x->marking]);
        b->graph[x->marking] = NULL;
        b->graph_failed[x->marking] = true;
    }
}

static ps_status enqueue_pass(ps_exec *x, ps_bound *b, ps_err *err)
{
    ps_graph *graph = b->graph[x->marking];
    if (graph == NULL) return enqueue_part(x, b, PART_ALL, err);
    x->stats.n_graph_launches++;
    /* The graph first: the CPU's part may be longer than its queue, and then pushing waits for work
     * that the graph feeds. */
    TRY(ps_graph_launch(x->device, x->stream[PS_STREAM_COMPUTE], graph, err));
    return enqueue_part(x, b, PART_CPU, err);
}

/* Looks now and then until one of two streams is empty. False: the caller wants to stop. */
static bool look_until_idle(ps_exec *x, ps_stream_role a, ps_stream_role b, long every_ns)
{
    while (!ps_stream_idle(x->device, x->stream[a]) && !ps_stream_idle(x->device, x->stream[b])) {
        if (!poll_now(x)) return false;
        nanosleep(&(struct timespec){.tv_nsec = every_ns}, NULL);
    }
    return true;
}

/* What may last is waited for by looking now and then, so that Ctrl-C is answered; what is known to
 * be short by blocking, which takes no time to notice the end. But blocking on a GPU's stream keeps
 * a CPU busy, and that one is missing to a pool that has a thread for every CPU: so the CPU's part
 * of a pass, which ends before the GPU's in all but the smallest, is always waited for by looking.
 * A GPU that fails never sets the flags that the CPU's part waits for: its stream is looked at too.
 */
static ps_status wait_for(ps_exec *x, const ps_bound *b, ps_err *err)
{
    bool is_short =
        b->ticks->shape.n_tok <= GRAPH_MAX_TOK && b->last_ns > 0 && b->last_ns < POLL_NS;
    bool done = true;
    if (!is_short)
        for (int s = 0; s < PS_STREAM_COUNT && done && x->options.poll != NULL; s++)
            done = b->n_ticks_on[s] == 0 ||
                   look_until_idle(x, (ps_stream_role)s, (ps_stream_role)s, LOOK_NS);
    else if (b->n_ticks_on[PS_STREAM_CPU] > 0 && b->n_ticks_on[PS_STREAM_COMPUTE] > 0)
        done = look_until_idle(x, PS_STREAM_CPU, PS_STREAM_COMPUTE, LOOK_SHORT_NS);
    if (!done) return ps_fail(err, PS_ECANCELLED, "the pass was interrupted");
    ps_status status = PS_OK;
    for (int s = 0; s < PS_STREAM_COUNT; s++) {
        ps_status one = ps_device_sync(x->device, x->stream[s], err);
        if (status == PS_OK) status = one;
    }
    if (status == PS_OK && atomic_load(&x->cancelled))
        return ps_fail(err, PS_ECANCELLED, "the pass was interrupted");
    return status;
}

/* Leaves the device idle and the flags clear, whatever state a failed pass left. */
static void drain(ps_exec *x)
{
    ps_device_set_abort(x->device, 1);
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        if (ps_device_sync(x->device, x->stream[s], NULL) == PS_EFATAL) x->lost = true;
    ps_device_set_abort(x->device, 0);
}

static void clear_flags(ps_exec *x, const ps_bound *b)
{
    for (uint32_t i = 0; i < b->ticks->n_flags; i++)
        __atomic_store_n(flag_at(x, i), 0, __ATOMIC_RELEASE);
}

/* What a pass must have before its first step, graph and marks included. */
static ps_status prepare(ps_exec *x, ps_bound *b, ps_err *err)
{
    bool again = b->ticks->shape.n_tok <= GRAPH_MAX_TOK;
    x->marking = x->recording && !(again && b->n_runs % CONTROL_EVERY == CONTROL_EVERY - 1);
    TRY(activate_tables(x, b, err));
    if (x->recording) TRY(ps_trace_tie(x->trace, err));
    if (x->marking) TRY(ps_trace_prepare(x->trace, b->ticks, err));
    if (wants_graph(x, b)) try_graph(x, b);
    return PS_OK;
}

static ps_status add_to_trace(ps_exec *x, const ps_bound *b, const ps_batch *batch,
    uint64_t begin_ns, uint64_t end_ns, ps_err *err)
{
    const ps_pass_shape *shape = &b->ticks->shape;
    ps_trace_pass pass = {.number = x->stats.n_passes,
        .begin_ns = begin_ns,
        .end_ns = end_ns,
        .wall_ns = b->last_ns,
        .tier = shape->tier,
        .n_tok = shape->n_tok,
        .n_out = shape->n_out,
        .seq = (uint32_t)batch->seq[0],
        .pos = (uint32_t)batch->pos[0],
        .one_sequence = batch->one_sequence,
        .graph = b->graph[x->marking] != NULL,
        .marked = x->marking};
    memcpy(pass.vram_bytes, x->arena.used, sizeof pass.vram_bytes);
    return ps_trace_add(x->trace, b, &pass, err);
}

ps_status ps_exec_pass(ps_exec *x, const ps_batch *batch, const float **logits, ps_err *err)
{
    ps_err own = {0};
    if (err == NULL) err = &own;
    if (x->lost)
        return ps_fail(err, PS_EFATAL, "the device was lost; close this engine and open another");
    ps_pass_shape shape = {.tier = ps_plan_tier(x->plan, batch->n_tok),
        .n_tok = batch->n_tok,
        .n_out = batch->n_out,
        .max_kv = batch->max_kv,
        .far = batch->far};
    if (batch->one_sequence && ps_pass_is_staged(x->plan, batch->n_tok)) {
        shape.staged = true;
        shape.far = 0;
        shape.seq = (uint32_t)batch->seq[0];
        shape.first = (uint32_t)batch->pos[0];
    }
    ps_bound *b = NULL;
    ps_status status = ps_exec_reserve_logits(x, batch->n_out, err);
    if (status == PS_OK) status = get_bound(x, &shape, &b, err);
    if (status == PS_OK) status = prepare(x, b, err);
    if (status == PS_OK) {
        uint64_t start = ps_exec_clock_ns(x), wall_start = ps_clock_ns(), end = 0;
        fill_batch(x, b, batch);
        clear_flags(x, b);
        status = enqueue_pass(x, b, err);
        if (status == PS_OK) status = wait_for(x, b, err);
        if (status == PS_OK) end = ps_exec_clock_ns(x); /* after a failure streams still run */
        b->last_ns = ps_clock_ns() - wall_start;
        if (status == PS_OK) x->stats.busy_ns += end - start;
        if (status == PS_OK && x->recording) status = add_to_trace(x, b, batch, start, end, err);
    }
    if (status != PS_OK) {
        if (status == PS_EFATAL) x->lost = true;
        drain(x);
        atomic_store(&x->cancelled, false);
        return status;
    }
    b->n_runs++;
    b->last_used = ++x->stats.n_passes;
    x->stats.h2d_bytes += b->h2d_bytes;
    x->stats.d2h_bytes += b->d2h_bytes;
    if (logits != NULL) *logits = x->out;
    return PS_OK;
}

/* ---- looking ---- */

ps_status ps_exec_trace_start(ps_exec *x, uint64_t cap_bytes, ps_err *err)
{
    if (x->trace == NULL) TRY(ps_trace_create(x->device, cap_bytes, &x->trace, err));
    x->recording = true;
    return PS_OK;
}
void ps_exec_trace_stop(ps_exec *x)
{
    x->recording = false;
}
ps_trace *ps_exec_trace(const ps_exec *x)
{
    return x->trace;
}

void ps_exec_cancel(ps_exec *x)
{
    atomic_store(&x->cancelled, true);
    ps_device_set_abort(x->device, 1);
}

bool ps_exec_is_lost(const ps_exec *x)
{
    return x->lost;
}
const ps_arena *ps_exec_arena(const ps_exec *x)
{
    return &x->arena;
}
const ps_plan *ps_exec_plan(const ps_exec *x)
{
    return x->plan;
}

ps_exec_stats ps_exec_get_stats(const ps_exec *x)
{
    ps_exec_stats s = x->stats;
    s.ram_bytes = ps_model_image_bytes(x->model) + ps_images_bytes(x->parts) + x->host_kv_bytes +
                  x->plan->space_bytes[PS_SPACE_HOST_CONST];
    return s;
}

uint64_t ps_exec_clock_ns(const ps_exec *x)
{
    if (!x->device->info.virtual_clock) return ps_clock_ns();
    uint64_t latest = 0, error = 0;
    ps_device_tie_clocks(x->device, &latest, &error, NULL); /* streams long gone count, too */
    for (int s = 0; s < PS_STREAM_COUNT; s++)
        latest = ps_max_u64(latest, ps_stream_time_ns(x->device, x->stream[s]));
    return latest;
}
