/* ps_bounce - see ps_bounce.h. */
#include "engine/ps_bounce.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "format/ps_gguf_direct.h"

enum {
    PAGE_BYTES = PS_DIRECT_PAGE_BYTES,
    SLACK_BYTES = 2 * PAGE_BYTES, /* of a slot: what a file is read in begins and ends on pages */
    FLAG_STRIDE = 64,             /* one flag a cache line */
    MAX_SLOTS = 8,
    MAX_PAYLOAD_BYTES = 4 << 20, /* the bus likes no more */
    MIN_SLOTS = 2,
    SHARE_BYTES = 256 << 10, /* what is worth a thread of its own */
    MAX_THREADS = 6,         /* as many keep up with the bus */
    MIN_DISK_THREADS = 2,    /* a disk that is asked for two things at once never idles */
};

typedef struct slot {
    unsigned char *bytes; /* [payload_bytes + SLACK_BYTES], begins on a page */
    uint32_t *free, *full;
    uint32_t n_uses;
} slot;

struct ps_bounce {
    const ps_host_weights *weights; /* borrows */
    ps_device *device;              /* borrows */
    ps_stream *stream;              /* owns; fills */
    ps_pool *pool;                  /* owns; its thread 0 is the stream's */
    ps_gguf_direct *files;          /* owns; NULL where no unit is on disk */
    void *locked;                   /* owns; slots and flags */
    uint64_t locked_bytes, payload_bytes;
    uint32_t n_slots, next;
    slot slots[MAX_SLOTS];
    pthread_mutex_t lock; /* guards err */
    ps_err err;           /* of the first read that failed since the last sync */
    _Atomic bool failed;
};

/* ---- memory ---- */

static uint64_t ring_bytes(uint32_t n_slots, uint64_t payload_bytes)
{
    return PAGE_BYTES + n_slots * (payload_bytes + SLACK_BYTES) + MAX_SLOTS * 2 * FLAG_STRIDE;
}

/* Many small slots keep a pipeline full better than few large ones, but below a megabyte a copy is
 * mostly overhead. Of two slots one stands idle whenever a small piece follows a large one, which
 * costs more than the overhead of half the size. */
static void choose_sizes(ps_bounce *b, uint64_t room_bytes)
{
    for (b->n_slots = MAX_SLOTS; b->n_slots > MIN_SLOTS; b->n_slots /= 2)
        if (ring_bytes(b->n_slots, b->n_slots == MAX_SLOTS ? 1 << 20 : 64 << 10) <= room_bytes)
            break;
    b->payload_bytes = MAX_PAYLOAD_BYTES;
    while (b->payload_bytes > PAGE_BYTES && ring_bytes(b->n_slots, b->payload_bytes) > room_bytes)
        b->payload_bytes = b->payload_bytes / 2 / PAGE_BYTES * PAGE_BYTES;
}

static ps_status take_memory(ps_bounce *b, uint64_t room_bytes, ps_err *err)
{
    choose_sizes(b, room_bytes);
    b->locked_bytes = ring_bytes(b->n_slots, b->payload_bytes);
    PS_TRY(ps_device_locked_alloc(b->device, b->locked_bytes, &b->locked, err));
    uintptr_t at = ((uintptr_t)b->locked + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    for (uint32_t i = 0; i < b->n_slots; i++) {
        b->slots[i].bytes = (unsigned char *)at;
        at += b->payload_bytes + SLACK_BYTES;
    }
    for (uint32_t i = 0; i < b->n_slots; i++) {
        b->slots[i].free = (uint32_t *)at;
        b->slots[i].full = (uint32_t *)(at + FLAG_STRIDE);
        at += 2 * FLAG_STRIDE;
    }
    ps_bounce_reset(b);
    return PS_OK;
}

ps_status ps_bounce_create(const ps_host_weights *weights, ps_device *device, uint64_t room_bytes,
    ps_bounce **out, ps_err *err)
{
    *out = NULL;
    ps_bounce *b = ps_alloc(1, sizeof *b);
    if (b == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for a bounce ring");
    b->weights = weights;
    b->device = device;
    pthread_mutex_init(&b->lock, NULL);
    bool disk = weights->disk_bytes > 0;
    int n_threads = ps_cpu_count() / 2, least = disk ? MIN_DISK_THREADS : 1;
    n_threads = n_threads < least ? least : n_threads > MAX_THREADS ? MAX_THREADS : n_threads;
    ps_status status = take_memory(b, room_bytes, err);
    if (status == PS_OK && disk) status = ps_gguf_direct_open(weights->model->gguf, &b->files, err);
    if (status == PS_OK) status = ps_stream_create(device, PS_STREAM_CPU, &b->stream, err);
    if (status == PS_OK) status = ps_pool_create(n_threads, &b->pool, err);
    if (status != PS_OK)
        ps_bounce_destroy(b);
    else
        *out = b;
    return status;
}

void ps_bounce_destroy(ps_bounce *b)
{
    if (b == NULL) return;
    if (b->stream != NULL) ps_stream_destroy(b->device, b->stream);
    ps_pool_destroy(b->pool);
    ps_gguf_direct_close(b->files);
    if (b->locked != NULL) ps_device_locked_free(b->device, b->locked);
    pthread_mutex_destroy(&b->lock);
    ps_free(b);
}

uint64_t ps_bounce_bytes(const ps_bounce *b)
{
    return b != NULL ? b->locked_bytes : 0;
}

uint64_t ps_bounce_piece_bytes(const ps_bounce *b)
{
    return b != NULL ? b->payload_bytes : 0;
}

ps_disk_direct ps_bounce_disk_direct(const ps_bounce *b)
{
    if (b == NULL || b->files == NULL) return PS_DISK_UNUSED;
    return ps_gguf_direct_works(b->files) ? PS_DISK_DIRECT : PS_DISK_CACHED;
}

/* ---- filling, on the stream's thread ---- */

/* A slot holds what is copied from `skew` on: a file is read from a multiple of its alignment on,
 * and so begins a little early and ends a little late. */
typedef struct fill {
    ps_bounce *bounce;
    uint64_t from, n_bytes; /* of the unit's image */
    unsigned char *slot;
    uint64_t skew;
    uint64_t file_offset, read_bytes; /* what is read there; no bytes: not past the page cache */
    uint32_t unit, i_file;
} fill;

/* Bytes [from, to) of the slot. */
static ps_status read_share(const fill *f, uint64_t from, uint64_t to, ps_err *err)
{
    const ps_host_weights *w = f->bounce->weights;
    const ps_model *m = w->plan->model;
    uint64_t end = f->skew + f->n_bytes, lo = ps_min_u64(ps_max_u64(from, f->skew), end);
    uint64_t n_bytes = ps_max_u64(lo, ps_min_u64(to, end)) - lo, at = f->from + lo - f->skew;
    const unsigned char *image = ps_host_weights_image(w, f->unit);
    if (image != NULL) {
        memcpy(f->slot + lo, image + at, n_bytes);
        return PS_OK;
    }
    if (f->read_bytes == 0) return ps_model_read_part(m, f->unit, at, n_bytes, f->slot + lo, err);
    image = ps_images_borrow(m->images, f->unit); /* another engine may have it */
    if (image == NULL)
        return ps_gguf_direct_read(
            f->bounce->files, f->i_file, f->file_offset + from, f->slot + from, to - from, err);
    memcpy(f->slot + lo, image + at, n_bytes);
    ps_images_return(m->images, f->unit);
    return PS_OK;
}

static void fill_member(void *ctx, int i_thread, int n_threads)
{
    const fill *f = ctx;
    ps_bounce *b = f->bounce;
    uint64_t n_bytes = f->read_bytes > 0 ? f->read_bytes : f->n_bytes;
    uint64_t n = ps_min_u64((uint64_t)n_threads, ps_div_up_u64(n_bytes, SHARE_BYTES));
    uint64_t share = ps_div_up_u64(n_bytes, n * PAGE_BYTES) * PAGE_BYTES;
    uint64_t from = (uint64_t)i_thread * share, to = ps_min_u64(from + share, n_bytes);
    if (from >= to || atomic_load(&b->failed)) return;
    ps_err err = {0};
    if (read_share(f, from, to, &err) == PS_OK) return;
    pthread_mutex_lock(&b->lock);
    if (!atomic_exchange(&b->failed, true)) b->err = err;
    pthread_mutex_unlock(&b->lock);
}

static ps_status run_fill(const ps_launch *launch, const void *args)
{
    fill f;
    (void)launch;
    memcpy(&f, args, sizeof f);
    ps_pool_run(f.bounce->pool, fill_member, &f);
    return atomic_load(&f.bounce->failed) ? PS_EFILE : PS_OK;
}

/* ---- enqueueing ---- */

static ps_status bounce_piece(ps_bounce *b, ps_stream *s, ps_dptr dst, fill *f, ps_err *err)
{
    ps_device *d = b->device;
    slot *k = &b->slots[b->next];
    ps_cost cost = {
        .bytes = f->n_bytes, .disk_bytes = b->weights->in_memory[f->unit] ? 0 : f->n_bytes};
    uint32_t before = k->n_uses++;
    b->next = (b->next + 1) % b->n_slots;
    f->slot = k->bytes;
    PS_TRY(ps_device_flag_wait(d, b->stream, k->free, before, err));
    PS_TRY(ps_device_run(d, b->stream, run_fill, f, sizeof *f, &cost, err));
    PS_TRY(ps_device_flag_set(d, b->stream, k->full, k->n_uses, err));
    PS_TRY(ps_device_flag_wait(d, s, k->full, k->n_uses, err));
    PS_TRY(ps_device_copy_in(d, s, dst, k->bytes + f->skew, f->n_bytes, err));
    return ps_device_flag_set(d, s, k->free, k->n_uses, err);
}

static void choose_span(const ps_bounce *b, const ps_file_run *run, uint64_t done, fill *f)
{
    if (!run->plain) return;
    uint64_t at = run->offset + done, align = ps_gguf_direct_align(b->files, run->i_file);
    uint64_t end = ps_div_up_u64(at + f->n_bytes, align) * align;
    end = ps_min_u64(end, ps_gguf_file_bytes(b->weights->model->gguf, run->i_file));
    f->i_file = run->i_file;
    f->skew = at % align;
    f->file_offset = at - f->skew;
    f->read_bytes = end - f->file_offset;
}

/* Bytes that are read alike, in pieces that fit a slot. */
static ps_status bounce_run(
    ps_bounce *b, ps_stream *s, ps_dptr dst, uint32_t unit, const ps_file_run *run, ps_err *err)
{
    for (uint64_t done = 0, n; done < run->n_bytes; done += n) {
        n = ps_min_u64(b->payload_bytes, run->n_bytes - done);
        fill f = {.bounce = b, .unit = unit, .from = run->from + done, .n_bytes = n};
        choose_span(b, run, done, &f);
        PS_TRY(bounce_piece(b, s, ps_dptr_add(dst, done), &f, err));
    }
    return PS_OK;
}

ps_status ps_bounce_copy(ps_bounce *b, ps_stream *s, ps_dptr dst, uint32_t unit, uint64_t from,
    uint64_t n_bytes, ps_err *err)
{
    const ps_host_weights *w = b->weights;
    ps_file_run run = {.from = from, .n_bytes = n_bytes};
    if (w->in_memory[unit]) return bounce_run(b, s, dst, unit, &run, err);
    for (uint64_t at = from, to = from + n_bytes; at < to; at = run.from + run.n_bytes) {
        run = ps_model_next_run(w->plan->model, unit, at, to);
        PS_TRY(bounce_run(b, s, ps_dptr_add(dst, run.from - from), unit, &run, err));
    }
    return PS_OK;
}

ps_status ps_bounce_sync(ps_bounce *b, ps_err *err)
{
    if (b == NULL) return PS_OK;
    ps_err own = {0};
    ps_status status = ps_device_sync(b->device, b->stream, &own);
    if (atomic_load(&b->failed)) { /* says more than the stream knows */
        own = b->err;
        b->err = (ps_err){0};
        atomic_store(&b->failed, false);
        status = own.status;
    }
    if (status != PS_OK && err != NULL && err->status == PS_OK) *err = own;
    return status;
}

void ps_bounce_reset(ps_bounce *b)
{
    if (b == NULL) return;
    for (uint32_t i = 0; i < b->n_slots; i++) {
        __atomic_store_n(b->slots[i].free, b->slots[i].n_uses, __ATOMIC_RELEASE);
        __atomic_store_n(b->slots[i].full, b->slots[i].n_uses, __ATOMIC_RELEASE);
    }
}
