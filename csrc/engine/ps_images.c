/* ps_images - see ps_images.h; also ps_model_read_part, which is how any image comes to be. */
#include "engine/ps_images.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

typedef struct chunk {
    unsigned char *base; /* owns */
    uint64_t n_bytes;
    uint32_t n_images; /* in it; 0: about to be given back */
} chunk;

struct ps_images {
    pthread_mutex_t filling; /* one thread adds images at a time */
    pthread_mutex_t lock;    /* guards all below, but for looking at images that one uses */
    uint32_t n_units;
    _Atomic(unsigned char *)
        *image;      /* owns the array; [n_units] into chunks, NULL where not loaded */
    uint32_t *users; /* owns; [n_units] */
    chunk *chunks;   /* owns; [n_chunks] */
    uint32_t n_chunks;
    _Atomic uint64_t n_bytes; /* of the images, padded */
};

ps_status ps_images_create(uint32_t n_units, ps_images **out, ps_err *err)
{
    ps_images *im = ps_alloc(1, sizeof *im);
    void *slots = ps_alloc(n_units, sizeof *im->image);
    uint32_t *users = ps_alloc(n_units, sizeof *users);
    if (im == NULL || slots == NULL || users == NULL) {
        ps_free(im);
        ps_free(slots);
        ps_free(users);
        return ps_fail(err, PS_ENOMEM, "no host memory for the table of %u images", n_units);
    }
    pthread_mutex_init(&im->filling, NULL);
    pthread_mutex_init(&im->lock, NULL);
    im->n_units = n_units;
    im->image = slots;
    im->users = users;
    *out = im;
    return PS_OK;
}

void ps_images_destroy(ps_images *im)
{
    if (im == NULL) return;
    for (uint32_t i = 0; i < im->n_chunks; i++) ps_free(im->chunks[i].base);
    ps_free(im->chunks);
    ps_free((void *)im->image);
    ps_free(im->users);
    pthread_mutex_destroy(&im->filling);
    pthread_mutex_destroy(&im->lock);
    ps_free(im);
}

const void *ps_images_get(const ps_images *im, uint32_t unit)
{
    if (im == NULL || unit >= im->n_units) return NULL;
    return atomic_load_explicit(&im->image[unit], memory_order_acquire);
}

uint64_t ps_images_bytes(const ps_images *im)
{
    return im != NULL ? atomic_load(&im->n_bytes) : 0;
}

uint64_t ps_images_padded_bytes(const ps_model *model, uint32_t unit)
{
    return ps_div_up_u64(model->units[unit].n_bytes, PS_WEIGHT_ALIGN) * PS_WEIGHT_ALIGN;
}

/* ---- users ---- */

const void *ps_images_borrow(ps_images *im, uint32_t unit)
{
    if (im == NULL || unit >= im->n_units) return NULL;
    pthread_mutex_lock(&im->lock);
    const void *image = ps_images_get(im, unit);
    if (image != NULL) im->users[unit]++;
    pthread_mutex_unlock(&im->lock);
    return image;
}

void ps_images_return(ps_images *im, uint32_t unit)
{
    pthread_mutex_lock(&im->lock);
    im->users[unit]--;
    pthread_mutex_unlock(&im->lock);
}

void ps_images_release(ps_images *im, const bool *want)
{
    pthread_mutex_lock(&im->lock);
    for (uint32_t i = 0; i < im->n_units; i++) im->users[i] -= want[i];
    pthread_mutex_unlock(&im->lock);
}

static uint32_t find_chunk(const ps_images *im, const unsigned char *image)
{
    uint32_t i = 0;
    while (image < im->chunks[i].base || image >= im->chunks[i].base + im->chunks[i].n_bytes) i++;
    return i;
}

void ps_images_chunk_of(ps_images *im, const void *image, void **base, uint64_t *n_bytes)
{
    pthread_mutex_lock(&im->filling);
    const chunk *c = &im->chunks[find_chunk(im, image)];
    *base = c->base;
    *n_bytes = c->n_bytes;
    pthread_mutex_unlock(&im->filling);
}

static void drop_image(ps_images *im, const ps_model *model, uint32_t unit)
{
    unsigned char *image = atomic_load(&im->image[unit]);
    uint64_t n_bytes = ps_images_padded_bytes(model, unit);
    uint32_t i = find_chunk(im, image);
    atomic_store(&im->image[unit], NULL);
    atomic_fetch_sub(&im->n_bytes, n_bytes);
    if (--im->chunks[i].n_images > 0) {
        ps_forget(image, n_bytes);
        return;
    }
    ps_free(im->chunks[i].base);
    im->chunks[i] = im->chunks[--im->n_chunks];
}

void ps_images_keep(ps_images *im, const ps_model *model, const bool *want)
{
    pthread_mutex_lock(&im->filling); /* whose chunks must stay where they are */
    pthread_mutex_lock(&im->lock);
    for (uint32_t i = 0; i < im->n_units; i++)
        if (im->users[i] == 0 && !want[i] && ps_images_get(im, i) != NULL) drop_image(im, model, i);
    pthread_mutex_unlock(&im->lock);
    pthread_mutex_unlock(&im->filling);
}

const void *ps_model_image(const ps_model *model, uint32_t unit)
{
    return ps_images_get(model->images, unit);
}

uint64_t ps_model_image_bytes(const ps_model *model)
{
    return ps_images_bytes(model->images);
}

/* A 1-D tensor in another format than float32 is small: converted whole, then the wanted bytes are
 * taken. */
static ps_status read_converted(const ps_model *model, const ps_weight *w, const ps_gguf_tensor *t,
    uint64_t from, uint64_t n_bytes, unsigned char *dst, ps_err *err)
{
    uint64_t n = (uint64_t)w->n_rows * w->n_cols, raw_bytes = 0;
    ps_status status = PS_ENOMEM;
    unsigned char *raw = NULL, *whole = ps_alloc(n, sizeof(float));
    if (ps_fmt_row_bytes(w->file_fmt, n, &raw_bytes)) raw = ps_alloc(raw_bytes, 1);
    if (raw != NULL && whole != NULL) {
        status =
            ps_gguf_pread(model->gguf, t->i_file, t->offset + w->tensor_skip, raw, raw_bytes, err);
        if (status == PS_OK) {
            ps_dequant_row((ps_fmt)w->file_fmt, raw, (float *)(void *)whole, n);
            memcpy(dst, whole + from, n_bytes);
        }
    } else {
        ps_fail(err, PS_ENOMEM, "no host memory to convert %s", t->name);
    }
    ps_free(raw);
    ps_free(whole);
    return status;
}

/* Bytes [from, to) of a weight whose rows are pieces of longer ones in the file. */
static ps_status read_columns(const ps_model *model, const ps_weight *w, const ps_gguf_tensor *t,
    uint64_t from, uint64_t to, unsigned char *dst, ps_err *err)
{
    for (uint64_t at = from; at < to;) {
        uint64_t row = at / w->row_bytes, skip = at % w->row_bytes,
                 n = ps_min_u64(w->row_bytes - skip, to - at);
        ps_status status = ps_gguf_pread(model->gguf, t->i_file,
            t->offset + w->tensor_skip + row * w->file_row_bytes + skip, dst, n, err);
        if (status != PS_OK) return status;
        dst += n;
        at += n;
    }
    return PS_OK;
}

ps_status ps_model_read_part(
    const ps_model *model, uint32_t unit, uint64_t from, uint64_t n_bytes, void *dst, ps_err *err)
{
    const ps_unit *u = &model->units[unit];
    uint64_t to = from + n_bytes;
    ps_check_bug(to >= from && to <= u->n_bytes, err);
    const unsigned char *image = ps_images_borrow(model->images, unit);
    if (image != NULL) {
        memcpy(dst, image + from, n_bytes);
        ps_images_return(model->images, unit);
        return PS_OK;
    }
    for (uint32_t i = 0; i < u->n_weights; i++) {
        const ps_weight *w = &model->weights[u->first_weight + i];
        const ps_gguf_tensor *t = ps_gguf_tensor_at(model->gguf, w->i_tensor);
        uint64_t lo = ps_max_u64(from, w->offset),
                 hi = ps_min_u64(to, w->offset + w->n_rows * w->row_bytes);
        if (lo >= hi) continue; /* bytes between weights are padding: whatever dst holds */
        unsigned char *at = (unsigned char *)dst + (lo - from);
        ps_status status = PS_OK;
        if (w->fmt != w->file_fmt)
            status = read_converted(model, w, t, lo - w->offset, hi - lo, at, err);
        else if (w->file_row_bytes != w->row_bytes)
            status = read_columns(model, w, t, lo - w->offset, hi - w->offset, at, err);
        else
            status = ps_gguf_pread(model->gguf, t->i_file,
                t->offset + w->tensor_skip + (lo - w->offset), at, hi - lo, err);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

/* Bytes [lo, hi) of an image, which lie in one weight. */
static ps_file_run run_in(const ps_model *model, const ps_weight *w, uint64_t lo, uint64_t hi)
{
    const ps_gguf_tensor *t = ps_gguf_tensor_at(model->gguf, w->i_tensor);
    return (ps_file_run){.from = lo,
        .n_bytes = hi - lo,
        .plain = w->fmt == w->file_fmt && w->file_row_bytes == w->row_bytes,
        .i_file = t->i_file,
        .offset = t->offset + w->tensor_skip + (lo - w->offset)};
}

/* Does the second stand to the first in the file as it does in the image? */
static bool run_goes_on(const ps_file_run *run, const ps_file_run *next)
{
    if (run->plain != next->plain) return false;
    return !run->plain ||
           (run->i_file == next->i_file && next->offset - run->offset == next->from - run->from);
}

ps_file_run ps_model_next_run(const ps_model *model, uint32_t unit, uint64_t from, uint64_t to)
{
    const ps_unit *u = &model->units[unit];
    ps_file_run run = {.from = to};
    for (uint32_t i = 0; i < u->n_weights; i++) {
        const ps_weight *w = &model->weights[u->first_weight + i];
        uint64_t lo = ps_max_u64(from, w->offset),
                 hi = ps_min_u64(to, w->offset + w->n_rows * w->row_bytes);
        if (lo >= hi) continue;
        ps_file_run next = run_in(model, w, lo, hi);
        if (run.n_bytes == 0)
            run = next;
        else if (run_goes_on(&run, &next))
            run.n_bytes = hi - run.from;
        else
            break;
    }
    return run;
}

/* ---- filling ---- */

typedef struct fill {
    const ps_model *model;
    const uint32_t *units;     /* to read, [n] */
    unsigned char *const *dst; /* [n] */
    uint32_t n;
    _Atomic uint32_t next;
    _Atomic uint64_t done_bytes;
    uint64_t total_bytes;
    _Atomic int status; /* first failure */
    ps_err err;         /* of the thread that failed first; guarded by err_lock */
    pthread_mutex_t err_lock;
    ps_progress_fn progress;
    void *progress_ctx;
} fill;

static void fill_member(void *ctx, int i_thread, int n_threads)
{
    fill *f = ctx;
    (void)n_threads;
    for (;;) {
        uint32_t i = atomic_fetch_add(&f->next, 1);
        if (i >= f->n || atomic_load(&f->status) != PS_OK) return;
        ps_err err = {0};
        ps_status status = ps_model_read_part(
            f->model, f->units[i], 0, f->model->units[f->units[i]].n_bytes, f->dst[i], &err);
        uint64_t done = atomic_fetch_add(&f->done_bytes, f->model->units[f->units[i]].n_bytes);
        /* Only the caller's own thread reports: the callback may belong to an interpreter. */
        if (status == PS_OK && i_thread == 0 && f->progress != NULL &&
            !f->progress(f->progress_ctx, done, f->total_bytes))
            status = ps_fail(&err, PS_ECANCELLED, "loading was interrupted");
        if (status != PS_OK) {
            pthread_mutex_lock(&f->err_lock);
            if (atomic_load(&f->status) == PS_OK) {
                f->err = err;
                atomic_store(&f->status, (int)status);
            }
            pthread_mutex_unlock(&f->err_lock);
        }
    }
}

uint32_t ps_images_count_chunk(
    const ps_model *model, const uint32_t *units, uint32_t n, uint64_t *n_bytes)
{
    uint32_t end = 1;
    *n_bytes = ps_images_padded_bytes(model, units[0]);
    while (end < n && *n_bytes + ps_images_padded_bytes(model, units[end]) <= PS_IMAGE_CHUNK_BYTES)
        *n_bytes += ps_images_padded_bytes(model, units[end++]);
    return end;
}

/* Cuts the missing units into chunks and gives each its address. On failure no chunk of this call
 * is left. */
static ps_status place_chunks(ps_images *im, const ps_model *model, const uint32_t *units,
    uint32_t n, unsigned char **dst, ps_err *err)
{
    uint32_t n_before = im->n_chunks;
    for (uint32_t i = 0; i < n;) {
        uint64_t n_bytes = 0;
        uint32_t end = i + ps_images_count_chunk(model, units + i, n - i, &n_bytes);
        chunk *chunks = ps_realloc(im->chunks, im->n_chunks + 1, sizeof *chunks);
        if (chunks != NULL) im->chunks = chunks;
        unsigned char *base = chunks != NULL ? ps_alloc(n_bytes, 1) : NULL;
        if (base == NULL) {
            while (im->n_chunks > n_before) ps_free(im->chunks[--im->n_chunks].base);
            return ps_fail(err, PS_ENOMEM, "no host memory for %.1f MiB of weights",
                (double)n_bytes / (1 << 20));
        }
        im->chunks[im->n_chunks++] = (chunk){base, n_bytes, end - i};
        for (; i < end; i++) {
            dst[i] = base;
            base += ps_images_padded_bytes(model, units[i]);
        }
    }
    return PS_OK;
}

static void add_users(ps_images *im, const bool *want)
{
    pthread_mutex_lock(&im->lock);
    for (uint32_t i = 0; i < im->n_units; i++) im->users[i] += want[i];
    pthread_mutex_unlock(&im->lock);
}

static ps_status fill_locked(ps_images *im, const ps_model *model, const bool *want, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, ps_err *err)
{
    uint32_t *units = ps_alloc(model->n_units, sizeof *units), n = 0;
    unsigned char **dst = ps_alloc(model->n_units, sizeof *dst);
    uint32_t n_before = im->n_chunks;
    ps_status status = PS_OK;
    if (units == NULL || dst == NULL) {
        status = ps_fail(err, PS_ENOMEM, "no host memory to load %u units", model->n_units);
        goto done;
    }
    fill f = {.model = model,
        .units = units,
        .dst = dst,
        .progress = progress,
        .progress_ctx = progress_ctx};
    for (uint32_t i = 0; i < im->n_units; i++)
        if (want[i] && im->image[i] == NULL) {
            units[n++] = i;
            f.total_bytes += model->units[i].n_bytes;
        }
    f.n = n;
    if (n == 0 || (status = place_chunks(im, model, units, n, dst, err)) != PS_OK) goto done;
    pthread_mutex_init(&f.err_lock, NULL);
    if (pool != NULL)
        ps_pool_run(pool, fill_member, &f);
    else
        fill_member(&f, 0, 1);
    pthread_mutex_destroy(&f.err_lock);
    status = (ps_status)atomic_load(&f.status);
    if (status != PS_OK) {
        if (err != NULL && err->status == PS_OK) *err = f.err;
        while (im->n_chunks > n_before) ps_free(im->chunks[--im->n_chunks].base);
        goto done;
    }
    for (uint32_t i = 0; i < n; i++) {
        atomic_store_explicit(&im->image[units[i]], dst[i], memory_order_release);
        atomic_fetch_add(&im->n_bytes, ps_images_padded_bytes(model, units[i]));
    }
done:
    if (status == PS_OK) add_users(im, want);
    ps_free(units);
    ps_free(dst);
    return status;
}

ps_status ps_images_fill(ps_images *im, const ps_model *model, const bool *want, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, ps_err *err)
{
    pthread_mutex_lock(&im->filling);
    ps_status status = fill_locked(im, model, want, pool, progress, progress_ctx, err);
    pthread_mutex_unlock(&im->filling);
    return status;
}

ps_status ps_model_load_images(ps_model *model, const bool *want, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, ps_err *err)
{
    return ps_images_fill(model->images, model, want, pool, progress, progress_ctx, err);
}
