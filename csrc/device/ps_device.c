/* ps_device - see ps_device.h: opening by name, and the checks around each vtable entry that are
 * the same everywhere: arguments, roles, registered ranges, the rules of capture, faults on demand,
 * and that nothing runs on a lost device.
 *
 * Not here: how any device does its work.
 * Threads: one engine thread drives a device; set_abort alone is for any thread.
 */
#include "device/ps_device.h"

#include "device/ps_device_priv.h"

#include <stdlib.h>
#include <string.h>

/* A desktop of 2024: PCIe 4.0 x16, a card of the upper middle class, two channels of DDR5, an NVMe
 * drive. */
const ps_emu_profile ps_emu_profile_default = {
    .h2d_bytes_per_s = 25e9,
    .d2h_bytes_per_s = 25e9,
    .vram_bytes_per_s = 500e9,
    .gpu_flops = 60e12,
    .dram_bytes_per_s = 60e9,
    .cpu_flops = 800e9,
    .launch_ns = 3000,
    .copy_ns = 8000,
    .flag_ns = 5000,
    .disk_bytes_per_s = 3e9,
};

const char *ps_stream_role_name(ps_stream_role role)
{
    static const char *const names[PS_STREAM_COUNT] = {"compute", "h2d", "d2h", "cpu"};
    return (unsigned)role < PS_STREAM_COUNT ? names[role] : "unknown";
}

/* ---- open and close ---- */

static ps_status check_profile(ps_emu_profile *p, ps_err *err)
{
    static const ps_emu_profile zero;
    if (memcmp(p, &zero, sizeof zero) == 0) *p = ps_emu_profile_default;
    const double rates[] = {p->h2d_bytes_per_s, p->d2h_bytes_per_s, p->vram_bytes_per_s,
        p->gpu_flops, p->dram_bytes_per_s, p->cpu_flops, p->disk_bytes_per_s};
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++)
        if (!(rates[i] > 0))
            return ps_fail_field(
                err, PS_EREQUEST, "profile", "every rate of an emulated device must be above 0");
    return PS_OK;
}

/* "cuda" or "cuda:N". */
static bool parse_cuda(const char *kind, int *i_device)
{
    *i_device = 0;
    if (strncmp(kind, "cuda", 4) != 0) return false;
    if (kind[4] == '\0') return true;
    if (kind[4] != ':' || kind[5] < '0' || kind[5] > '9') return false;
    char *end = NULL;
    long n = strtol(kind + 5, &end, 10);
    *i_device = (int)n;
    return *end == '\0' && n >= 0 && n < 1024;
}

int ps_device_default_threads(const char *kind)
{
    int n = ps_cpu_count(), i_device;
    if (!parse_cuda(kind, &i_device) || n < 4) return n;
    return n < 8 ? n - 1 : n - 2;
}

ps_status ps_device_open(
    const char *kind, const ps_device_options *options, ps_device **out, ps_err *err)
{
    *out = NULL;
    ps_device_options o = {0};
    if (options != NULL) o = *options;
    if (o.threads < 0)
        return ps_fail_field(
            err, PS_EREQUEST, "threads", "threads must be at least 1, not %d", o.threads);
    if (o.threads == 0) o.threads = ps_device_default_threads(kind);
    if (o.emu_map_bytes_per_gib > 1 << 30)
        return ps_fail_field(err, PS_EREQUEST, "map_bytes_per_gib",
            "page tables are not larger than the memory they are of, with %llu bytes a GiB",
            (unsigned long long)o.emu_map_bytes_per_gib);
    if (o.n_faults < 0 || o.n_faults > PS_MAX_FAULTS)
        return ps_fail_field(
            err, PS_EREQUEST, "faults", "at most %d faults, not %d", PS_MAX_FAULTS, o.n_faults);
    ps_status status = check_profile(&o.emu_profile, err);
    if (status != PS_OK) return status;
    int i_device = 0;
    if (strcmp(kind, "host") == 0) return ps_device_host_open(&o, out, err);
    if (strcmp(kind, "emu") == 0) return ps_device_emu_open(&o, out, err);
    if (parse_cuda(kind, &i_device)) return ps_device_cuda_open(i_device, &o, out, err);
    return ps_fail_field(err, PS_EREQUEST, "device",
        "there is no device \"%.40s\"; known are host, emu, cuda and cuda:N", kind);
}

void ps_device_configure(ps_device_base *b, const ps_device_options *options)
{
    b->hub = (ps_hub){.info = &b->device.info,
        .abort_word = &b->hub.own_abort,
        .cpu_ops = options->cpu_ops,
        .scratch_bytes = options->cpu_scratch_bytes,
        .cpu_threads = options->threads,
        .compute_threads = 1,
        .profile = options->emu_profile};
}

void ps_device_release_all(ps_device_base *b)
{
    ps_device *d = &b->device;
    b->lost = true;
    ps_hub_lose(&b->hub);
    d->v->set_abort(
        d, 1); /* ops that look at the word end early; nothing waits for a flag any more */
    while (b->streams != NULL) ps_stream_destroy(d, b->streams);
    while (b->graphs != NULL) ps_graph_destroy(d, b->graphs);
    while (b->events != NULL) ps_event_destroy(d, b->events);
    while (b->memory.n > 0) ps_device_free(d, (ps_dptr){b->memory.items[0].base});
    while (b->locked.n > 0) {
        void *p = (void *)(uintptr_t)b->locked.items[0].base;
        if (b->locked.items[0].note == PS_LOCKED_ALLOC)
            ps_device_locked_free(d, p);
        else
            ps_device_unlock(d, p);
    }
    ps_ranges_fini(&b->memory);
    ps_ranges_fini(&b->locked);
}

void ps_device_close(ps_device *d)
{
    if (d != NULL) d->v->close(d);
}

/* ---- shared checks ---- */

static ps_status check_alive(const ps_device_base *b, ps_err *err)
{
    if (!b->lost) return PS_OK;
    return ps_fail(
        err, PS_EFATAL, "the %s device failed earlier and must be closed", b->device.info.name);
}

/* Drivers refuse these while a thread captures; so do we, on every device. */
static ps_status check_not_capturing(const ps_device_base *b, ps_err *err)
{
    ps_check_bug(b->capture == 0, err);
    return PS_OK;
}

/* Counts one call of `kind` and fails the one that a fault was ordered for. */
static ps_status take_fault(ps_device_base *b, ps_fault_kind kind, ps_err *err)
{
    static const char *const names[PS_FAULT_COUNT] = {"allocation of device memory",
        "allocation of page-locked memory", "copy", "launch", "flag operation",
        "asynchronous operation"};
    bool fired = false, sticky = false;
    for (int i = 0; i < b->n_faults; i++) {
        ps_fault *f = &b->faults[i];
        if (f->kind != kind || f->after < 0) continue;
        if (f->after-- > 0) continue;
        fired = true;
        sticky = sticky || f->sticky;
    }
    if (!fired) return PS_OK;
    return ps_fail(err, sticky ? PS_EFATAL : PS_EDEVICE,
        "the emulated device %s this %s, as it was told to", sticky ? "was lost at" : "refused",
        names[kind]);
}

static ps_status check_dptr(const ps_device_base *b, ps_dptr p, uint64_t n_bytes, ps_err *err)
{
    if (n_bytes == 0) return ps_fail(err, PS_EINTERNAL, "a copy of 0 bytes");
    if (ps_ranges_find(&b->memory, p.a, n_bytes) != NULL) return PS_OK;
    return ps_fail(err, PS_EINTERNAL,
        "%llu bytes at device address 0x%llx lie in no one allocation of this device",
        (unsigned long long)n_bytes, (unsigned long long)p.a);
}

static ps_status check_locked(const ps_device_base *b, const void *p, uint64_t n_bytes, ps_err *err)
{
    if (ps_ranges_find(&b->locked, (uintptr_t)p, n_bytes) != NULL) return PS_OK;
    bool touches = ps_ranges_overlaps(&b->locked, (uintptr_t)p, n_bytes);
    return ps_fail(err, PS_EINTERNAL,
        touches ? "%llu bytes at %p straddle the end of a page-locked range"
                : "%llu bytes at %p are not page-locked memory of this device",
        (unsigned long long)n_bytes, p);
}

static ps_status check_accel(const ps_stream *s, ps_err *err)
{
    ps_check_bug(s != NULL && s->role != PS_STREAM_CPU, err);
    return PS_OK;
}

/* Every checked call ends here: a lost device is remembered, and so is a failure inside a capture,
 * for graph_end. */
static ps_status note(ps_device_base *b, const ps_stream *s, ps_status status, const ps_err *err)
{
    if (status == PS_OK) return PS_OK;
    if (s != NULL && s->capture != 0 && b->capture_failure.status == PS_OK) {
        b->capture_failure = *err;
        b->capture_failure.status = status;
    }
    if (status == PS_EFATAL && !b->lost) {
        b->lost = true;
        ps_hub_lose(&b->hub);
    }
    return status;
}

/* ---- memory ---- */

ps_status ps_device_mem_info(ps_device *d, uint64_t *free_bytes, uint64_t *total_bytes, ps_err *err)
{
    *free_bytes = *total_bytes = 0;
    ps_status status = check_alive(ps_base_of(d), err);
    if (status == PS_OK) status = d->v->mem_info(d, free_bytes, total_bytes, err);
    return note(ps_base_of(d), NULL, status, err);
}

ps_status ps_device_alloc(ps_device *d, uint64_t n_bytes, ps_dptr *out, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *out = (ps_dptr){0};
    ps_check_bug(n_bytes > 0, err);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_not_capturing(b, err);
    if (status == PS_OK) status = take_fault(b, PS_FAULT_ALLOC, err);
    if (status == PS_OK && !ps_ranges_reserve(&b->memory))
        status = ps_fail(err, PS_ENOMEM, "no memory for the list of device allocations");
    if (status == PS_OK) status = d->v->alloc(d, n_bytes, out, err);
    return note(b, NULL, status, err);
}

/* Freeing cannot fail, but a driver would break off a capture for it; so that emu and CUDA agree,
 * it fails here. */
static void forbid_in_capture(ps_device_base *b)
{
    if (b->capture != 0)
        ps_fail(&b->capture_failure, PS_EINTERNAL, "memory was freed or unlocked during a capture");
}

void ps_device_free(ps_device *d, ps_dptr p)
{
    if (ps_dptr_is_null(p)) return;
    forbid_in_capture(ps_base_of(d));
    d->v->free(d, p);
}

/* What new page-locked memory needs before any device is asked, however it comes to be. */
static ps_status begin_locking(ps_device_base *b, ps_err *err)
{
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_not_capturing(b, err);
    if (status == PS_OK) status = take_fault(b, PS_FAULT_LOCKED_ALLOC, err);
    if (status == PS_OK && !ps_ranges_reserve(&b->locked))
        status = ps_fail(err, PS_ENOMEM, "no memory for the list of page-locked ranges");
    return status;
}

/* False where p is not the beginning of a range that came to be in this way. */
static bool begin_unlocking(ps_device_base *b, void *p, uint64_t how)
{
    const ps_range *range = p != NULL ? ps_ranges_find(&b->locked, (uintptr_t)p, 1) : NULL;
    if (range == NULL || range->base != (uintptr_t)p || range->note != how) return false;
    forbid_in_capture(b);
    ps_hub_forget_flags(&b->hub, p, range->n_bytes);
    return true;
}

ps_status ps_device_locked_alloc(ps_device *d, uint64_t n_bytes, void **out, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *out = NULL;
    ps_check_bug(n_bytes > 0, err);
    ps_status status = begin_locking(b, err);
    if (status == PS_OK) status = d->v->locked_alloc(d, n_bytes, out, err);
    return note(b, NULL, status, err);
}

void ps_device_locked_free(ps_device *d, void *p)
{
    if (begin_unlocking(ps_base_of(d), p, PS_LOCKED_ALLOC)) d->v->locked_free(d, p);
}

ps_status ps_device_lock(ps_device *d, void *p, uint64_t n_bytes, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_check_bug(p != NULL && n_bytes > 0, err);
    ps_status status = begin_locking(b, err);
    if (status == PS_OK && ps_ranges_overlaps(&b->locked, (uintptr_t)p, n_bytes))
        status = ps_fail(err, PS_EINTERNAL, "a part of %llu bytes at %p is page-locked already",
            (unsigned long long)n_bytes, p);
    if (status == PS_OK) status = d->v->lock(d, p, n_bytes, err);
    return note(b, NULL, status, err);
}

void ps_device_unlock(ps_device *d, void *p)
{
    if (begin_unlocking(ps_base_of(d), p, PS_LOCKED_REGISTERED)) d->v->unlock(d, p);
}

ps_status ps_device_locked_dptr(ps_device *d, const void *locked, ps_dptr *out, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *out = (ps_dptr){0};
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_locked(b, locked, 1, err);
    if (status == PS_OK) status = d->v->locked_dptr(d, locked, out, err);
    return note(b, NULL, status, err);
}

/* ---- streams and events ---- */

ps_status ps_stream_create(ps_device *d, ps_stream_role role, ps_stream **out, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *out = NULL;
    ps_check_bug((unsigned)role < PS_STREAM_COUNT, err);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_not_capturing(b, err);
    if (status == PS_OK) status = d->v->stream_create(d, role, out, err);
    if (status == PS_OK) {
        (*out)->next = b->streams;
        b->streams = *out;
    }
    return note(b, NULL, status, err);
}

void ps_stream_destroy(ps_device *d, ps_stream *s)
{
    ps_device_base *b = ps_base_of(d);
    ps_stream **link = &b->streams;
    while (*link != NULL && *link != s) link = &(*link)->next;
    if (s == NULL || *link == NULL) return;
    if (s->capture != 0) {
        ps_fail(&b->capture_failure, PS_EINTERNAL, "a stream was destroyed during its capture");
        if (s == b->capture_origin) {
            ps_graph *g = NULL;
            ps_graph_end(d, s, &g, NULL);
        }
    }
    *link = s->next;
    d->v->stream_destroy(d, s);
}

ps_status ps_event_create(ps_device *d, ps_event **out, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *out = NULL;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = d->v->event_create(d, out, err);
    if (status == PS_OK) {
        (*out)->next = b->events;
        b->events = *out;
    }
    return note(b, NULL, status, err);
}

void ps_event_destroy(ps_device *d, ps_event *e)
{
    ps_event **link = &ps_base_of(d)->events;
    while (*link != NULL && *link != e) link = &(*link)->next;
    if (e == NULL || *link == NULL) return;
    *link = e->next;
    d->v->event_destroy(d, e);
}

/* ---- operations ---- */

ps_status ps_device_copy_in(
    ps_device *d, ps_stream *s, ps_dptr dst, const void *src, uint64_t n_bytes, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_accel(s, err);
    if (status == PS_OK) status = check_dptr(b, dst, n_bytes, err);
    if (status == PS_OK) status = check_locked(b, src, n_bytes, err);
    if (status == PS_OK) status = take_fault(b, PS_FAULT_COPY, err);
    if (status == PS_OK) status = d->v->copy_in(d, s, dst, src, n_bytes, err);
    return note(b, s, status, err);
}

ps_status ps_device_copy_out(
    ps_device *d, ps_stream *s, void *dst, ps_dptr src, uint64_t n_bytes, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_accel(s, err);
    if (status == PS_OK) status = check_dptr(b, src, n_bytes, err);
    if (status == PS_OK) status = check_locked(b, dst, n_bytes, err);
    if (status == PS_OK) status = take_fault(b, PS_FAULT_COPY, err);
    if (status == PS_OK) status = d->v->copy_out(d, s, dst, src, n_bytes, err);
    return note(b, s, status, err);
}

static ps_status check_run(
    const ps_stream *s, ps_launcher fn, const void *args, uint32_t args_bytes, ps_err *err)
{
    ps_check_bug(s != NULL && fn != NULL && (args != NULL || args_bytes == 0), err);
    ps_check_bug(args_bytes <= PS_RUN_ARGS_BYTES, err);
    return PS_OK;
}

ps_status ps_device_run(ps_device *d, ps_stream *s, ps_launcher fn, const void *args,
    uint32_t args_bytes, const ps_cost *cost, ps_err *err)
{
    static const ps_cost free_of_charge;
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    if (cost == NULL) cost = &free_of_charge;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_run(s, fn, args, args_bytes, err);
    if (status == PS_OK) status = take_fault(b, PS_FAULT_LAUNCH, err);
    if (status == PS_OK) {
        s->last_cost = *cost;
        status = d->v->run(d, s, fn, args, args_bytes, cost, err);
    }
    return note(b, s, status, err);
}

ps_status ps_device_record(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_check_bug(s != NULL && e != NULL, err);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = d->v->record(d, s, e, err);
    if (status == PS_OK) {
        e->side = s->role == PS_STREAM_CPU ? PS_EVENT_CPU : PS_EVENT_ACCEL;
        e->capture = s->capture;
    }
    return note(b, s, status, err);
}

/* The rules are CUDA's; that they are checked here makes emu refuse what CUDA would. */
static ps_status check_wait(
    const ps_device_base *b, const ps_stream *s, const ps_event *e, ps_err *err)
{
    if (e->side == PS_EVENT_NEVER)
        return ps_fail(err, PS_EINTERNAL, "a wait for an event that was never recorded");
    if ((e->side == PS_EVENT_CPU) != (s->role == PS_STREAM_CPU))
        return ps_fail(err, PS_EINTERNAL,
            "the %s stream cannot wait for an event of the %s; a flag can do that",
            ps_stream_role_name(s->role), e->side == PS_EVENT_CPU ? "CPU" : "accelerator");
    if (e->capture != 0 && e->capture != b->capture)
        return ps_fail(
            err, PS_EINTERNAL, "a wait for an event whose last record belongs to a graph");
    if (s->capture != 0 && e->capture != s->capture)
        return ps_fail(err, PS_EINTERNAL,
            "a captured stream cannot wait for an event recorded outside of the capture");
    return PS_OK;
}

ps_status ps_device_wait(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_check_bug(s != NULL && e != NULL, err);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_wait(b, s, e, err);
    bool joins = status == PS_OK && e->capture != 0 && s->capture == 0;
    if (joins) {
        s->capture = e->capture;
        s->i_branch = -1;
    }
    if (status == PS_OK) status = d->v->wait(d, s, e, err);
    note(b, s, status, err);
    if (joins && status != PS_OK) s->capture = 0;
    return status;
}

ps_status ps_device_sync(ps_device *d, ps_stream *s, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_check_bug(s != NULL, err);
    if (s->capture != 0)
        return note(b, s,
            ps_fail(err, PS_EINTERNAL, "a stream cannot be synchronised while it is captured"),
            err);
    ps_status lost = check_alive(b, err);
    /* The stream must be empty afterwards in any case: what it uses is about to be freed. */
    ps_status status = d->v->sync(d, s, err);
    if (lost != PS_OK) return lost;
    if (status == PS_OK) {
        ps_err cause = {0};
        status = take_fault(b, PS_FAULT_SYNC, &cause);
        if (status != PS_OK)
            ps_fail(err, status, "%s; the last op on the %s stream was op %u of tick %u",
                cause.message, ps_stream_role_name(s->role), s->last_cost.op, s->last_cost.tick);
    }
    return note(b, s, status, err);
}

bool ps_stream_idle(ps_device *d, ps_stream *s)
{
    return s == NULL || s->capture != 0 || d->v->idle(d, s);
}

ps_status ps_device_elapsed(ps_device *d, ps_event *from, ps_event *to, uint64_t *ns, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *ns = 0;
    ps_check_bug(from != NULL && to != NULL, err);
    ps_status status = check_alive(b, err);
    if (status != PS_OK) return status;
    ps_check_bug(from->side != PS_EVENT_NEVER && from->side == to->side, err);
    ps_check_bug(from->capture == 0 && to->capture == 0, err);
    return note(b, NULL, d->v->elapsed(d, from, to, ns, err), err);
}

uint64_t ps_stream_time_ns(ps_device *d, ps_stream *s)
{
    return s == NULL || s->capture != 0 ? 0 : d->v->stream_time_ns(d, s);
}

/* ---- marks ---- */

ps_status ps_device_mark(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_check_bug(s != NULL && e != NULL && e->side == PS_EVENT_NEVER, err);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = d->v->mark(d, s, e, err);
    if (status == PS_OK) e->mark_side = s->role == PS_STREAM_CPU ? PS_EVENT_CPU : PS_EVENT_ACCEL;
    return note(b, s, status, err);
}

ps_status ps_device_mark_time(ps_device *d, ps_event *e, uint64_t *ns, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *ns = 0;
    ps_check_bug(e != NULL && e->mark_side != PS_EVENT_NEVER, err);
    ps_status status = check_alive(b, err);
    if (status != PS_OK) return status;
    return note(b, NULL, d->v->mark_time(d, e, ns, err), err);
}

ps_status ps_device_tie_clocks(ps_device *d, uint64_t *now_ns, uint64_t *error_ns, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *now_ns = *error_ns = 0;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_not_capturing(b, err);
    if (status != PS_OK) return status;
    return note(b, NULL, d->v->tie_clocks(d, now_ns, error_ns, err), err);
}

/* ---- flags ---- */

static ps_status check_flag(
    ps_device_base *b, const ps_stream *s, const uint32_t *flag, ps_err *err)
{
    ps_check_bug(s != NULL && flag != NULL && (uintptr_t)flag % sizeof *flag == 0, err);
    ps_status status = check_locked(b, flag, sizeof *flag, err);
    if (status == PS_OK) status = take_fault(b, PS_FAULT_FLAG, err);
    return status;
}

ps_status ps_device_flag_set(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_flag(b, s, flag, err);
    if (status == PS_OK) status = d->v->flag_set(d, s, flag, value, err);
    return note(b, s, status, err);
}

ps_status ps_device_flag_wait(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_flag(b, s, flag, err);
    if (status == PS_OK) status = d->v->flag_wait(d, s, flag, value, err);
    return note(b, s, status, err);
}

/* ---- graphs ---- */

ps_status ps_graph_begin(ps_device *d, ps_stream *s, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_accel(s, err);
    if (status == PS_OK) status = check_not_capturing(b, err);
    if (status == PS_OK) status = d->v->graph_begin(d, s, err);
    if (status == PS_OK) {
        b->capture = s->capture = ++b->n_captures;
        b->capture_origin = s;
        b->capture_failure = (ps_err){0};
    }
    return note(b, NULL, status, err);
}

ps_status ps_graph_end(ps_device *d, ps_stream *s, ps_graph **out, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    *out = NULL;
    ps_check_bug(s != NULL && b->capture != 0 && s == b->capture_origin, err);
    /* Even after a failure the device must leave its capturing state. */
    ps_err late = {0};
    ps_graph *g = NULL;
    ps_status status = d->v->graph_end(d, s, &g, &late);
    for (ps_stream *t = b->streams; t != NULL; t = t->next) t->capture = 0;
    s->capture = 0;
    b->capture = 0;
    b->capture_origin = NULL;
    if (b->capture_failure.status != PS_OK) {
        if (g != NULL) d->v->graph_destroy(d, g);
        g = NULL;
        status = b->capture_failure.status;
        late = b->capture_failure;
    }
    if (status != PS_OK) return note(b, NULL, ps_fail(err, status, "%s", late.message), err);
    g->next = b->graphs;
    b->graphs = g;
    *out = g;
    return PS_OK;
}

ps_status ps_graph_launch(ps_device *d, ps_stream *s, ps_graph *g, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_err own = {0};
    if (err == NULL) err = &own;
    ps_check_bug(g != NULL, err);
    ps_status status = check_alive(b, err);
    if (status == PS_OK) status = check_accel(s, err);
    if (status == PS_OK && s->capture != 0)
        status = ps_fail(err, PS_EINTERNAL, "a graph cannot be launched into a capture");
    if (status == PS_OK) status = take_fault(b, PS_FAULT_LAUNCH, err);
    if (status == PS_OK) status = d->v->graph_launch(d, s, g, err);
    return note(b, s, status, err);
}

void ps_graph_destroy(ps_device *d, ps_graph *g)
{
    ps_graph **link = &ps_base_of(d)->graphs;
    while (*link != NULL && *link != g) link = &(*link)->next;
    if (g == NULL || *link == NULL) return;
    *link = g->next;
    d->v->graph_destroy(d, g);
}

void ps_device_set_abort(ps_device *d, uint32_t value)
{
    d->v->set_abort(d, value);
}
