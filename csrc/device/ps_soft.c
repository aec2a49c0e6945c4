/* ps_soft - the vtable entries of streams that are lanes: all of host's and emu's, and cuda's CPU
 * streams. Each turns a checked call into one lane operation and pushes it, or appends it to the
 * capture that the stream takes part in.
 *
 * Not here: argument checks (ps_device), execution (ps_lane), capture (ps_soft_graph).
 * Threads: the engine's thread; set_abort from any.
 */
#include "device/ps_device_priv.h"

#include <string.h>

ps_status ps_soft_stream_create(ps_device *d, ps_stream_role role, ps_stream **out, ps_err *err)
{
    ps_hub *hub = &ps_base_of(d)->hub;
    ps_stream *s = ps_alloc(1, sizeof *s);
    if (s == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a stream");
    s->role = role;
    /* One for each queued operation, and one that the engine holds while it waits for room in the
     * queue. */
    ps_status status = ps_hub_need_records(hub, PS_LANE_CAP_JOBS + 1, err);
    if (status == PS_OK) {
        status = ps_lane_create(hub, role, PS_LANE_CAP_JOBS, true, &s->lane, err);
        if (status != PS_OK) ps_hub_need_records(hub, -(PS_LANE_CAP_JOBS + 1), NULL);
    }
    if (status != PS_OK) {
        ps_free(s);
        return status;
    }
    *out = s;
    return PS_OK;
}

void ps_soft_stream_destroy(ps_device *d, ps_stream *s)
{
    ps_lane_destroy(s->lane);
    ps_hub_need_records(&ps_base_of(d)->hub, -(PS_LANE_CAP_JOBS + 1), NULL);
    ps_free(s);
}

ps_status ps_soft_event_create(ps_device *d, ps_event **out, ps_err *err)
{
    ps_event *e = ps_alloc(1, sizeof *e);
    if (e == NULL) return ps_fail(err, PS_ENOMEM, "no memory for an event");
    ps_status status = ps_hub_need_records(&ps_base_of(d)->hub, 1, err);
    if (status != PS_OK) {
        ps_free(e);
        return status;
    }
    *out = e;
    return PS_OK;
}

void ps_soft_event_destroy(ps_device *d, ps_event *e)
{
    if (!e->borrows) ps_record_release(e->record);
    ps_hub_need_records(&ps_base_of(d)->hub, -1, NULL);
    ps_free(e);
}

static ps_status enqueue(ps_device *d, ps_stream *s, const ps_lane_op *op, ps_err *err)
{
    if (s->capture != 0) return ps_soft_capture_append(ps_base_of(d), s, op, err);
    ps_lane_push(s->lane, op);
    return PS_OK;
}

/* The host address behind a device address, on accelerator streams. */
static void *untag(const ps_device *d, ps_dptr p)
{
    const ps_device_base *b = (const ps_device_base *)d;
    return (void *)(uintptr_t)(p.a ^ b->hub.accel_tag);
}

ps_status ps_soft_copy_in(
    ps_device *d, ps_stream *s, ps_dptr dst, const void *src, uint64_t n_bytes, ps_err *err)
{
    ps_lane_op op;
    op.kind = PS_LANE_COPY;
    op.n_bytes = ps_lane_op_bytes(PS_LANE_COPY, 0);
    op.u.copy =
        (ps_lane_copy){.dst = untag(d, dst), .src = src, .n_bytes = n_bytes, .inbound = true};
    return enqueue(d, s, &op, err);
}

ps_status ps_soft_copy_out(
    ps_device *d, ps_stream *s, void *dst, ps_dptr src, uint64_t n_bytes, ps_err *err)
{
    ps_lane_op op;
    op.kind = PS_LANE_COPY;
    op.n_bytes = ps_lane_op_bytes(PS_LANE_COPY, 0);
    op.u.copy =
        (ps_lane_copy){.dst = dst, .src = untag(d, src), .n_bytes = n_bytes, .inbound = false};
    return enqueue(d, s, &op, err);
}

ps_status ps_soft_run(ps_device *d, ps_stream *s, ps_launcher fn, const void *args,
    uint32_t args_bytes, const ps_cost *cost, ps_err *err)
{
    ps_lane_op op;
    op.kind = PS_LANE_RUN;
    op.n_bytes = ps_lane_op_bytes(PS_LANE_RUN, args_bytes);
    op.u.run.fn = fn;
    op.u.run.cost = *cost;
    if (args_bytes > 0) memcpy(op.u.run.args, args, args_bytes);
    return enqueue(d, s, &op, err);
}

ps_status ps_soft_record(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    if (s->capture != 0) return ps_soft_capture_record(ps_base_of(d), s, e, err);
    ps_record *record =
        ps_hub_take_record(&ps_base_of(d)->hub, 2); /* the event's reference and the operation's */
    ps_check_bug(record != NULL, err);
    if (!e->borrows) ps_record_release(e->record);
    e->record = record;
    e->borrows = false;
    ps_lane_op op = {
        .kind = PS_LANE_RECORD, .n_bytes = ps_lane_op_bytes(PS_LANE_RECORD, 0), .u.record = record};
    ps_lane_push(s->lane, &op);
    return PS_OK;
}

ps_status ps_soft_wait(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    if (s->capture != 0) return ps_soft_capture_wait(ps_base_of(d), s, e, err);
    __atomic_fetch_add(
        &e->record->refs, 1, __ATOMIC_RELAXED); /* the event's own keeps it from being taken */
    ps_lane_op op = {
        .kind = PS_LANE_WAIT, .n_bytes = ps_lane_op_bytes(PS_LANE_WAIT, 0), .u.record = e->record};
    ps_lane_push(s->lane, &op);
    return PS_OK;
}

ps_status ps_soft_sync(ps_device *d, ps_stream *s, ps_err *err)
{
    (void)d;
    return ps_lane_sync(s->lane, err);
}

bool ps_soft_idle(ps_device *d, ps_stream *s)
{
    (void)d;
    return ps_worker_is_idle(s->lane->worker);
}

ps_status ps_soft_elapsed(ps_device *d, ps_event *from, ps_event *to, uint64_t *ns, ps_err *err)
{
    (void)d;
    if (!ps_record_is_done(from->record) || !ps_record_is_done(to->record))
        return ps_fail(err, PS_EINTERNAL, "elapsed time between events that are not complete");
    uint64_t begin = from->record->time_ns, end = to->record->time_ns;
    *ns = end > begin ? end - begin : 0;
    return PS_OK;
}

uint64_t ps_soft_stream_time_ns(ps_device *d, ps_stream *s)
{
    (void)d;
    return s->lane->time_ns;
}

/* ---- marks ---- */

ps_status ps_soft_mark(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    ps_lane_op op = {
        .kind = PS_LANE_MARK, .n_bytes = ps_lane_op_bytes(PS_LANE_MARK, 0), .u.mark = &e->mark};
    __atomic_store_n(&e->mark.done, 0, __ATOMIC_RELAXED);
    return enqueue(d, s, &op, err);
}

ps_status ps_soft_mark_time(ps_device *d, ps_event *e, uint64_t *ns, ps_err *err)
{
    (void)d;
    if (__atomic_load_n(&e->mark.done, __ATOMIC_ACQUIRE) == 0)
        return ps_fail(err, PS_EINTERNAL, "the time of a mark that no stream has got to");
    *ns = e->mark.time_ns;
    return PS_OK;
}

/* All lanes have the clock of their hub. */
ps_status ps_soft_tie_clocks(ps_device *d, uint64_t *now_ns, uint64_t *error_ns, ps_err *err)
{
    (void)err;
    const ps_hub *hub = &ps_base_of(d)->hub;
    *now_ns = hub->virtual_clock ? hub->host_ns : ps_hub_now_ns(hub);
    *error_ns = 0;
    return PS_OK;
}

static ps_status enqueue_flag(
    ps_device *d, ps_stream *s, ps_lane_op_kind kind, uint32_t *flag, uint32_t value, ps_err *err)
{
    uint64_t *time_ns = ps_hub_flag_time(&ps_base_of(d)->hub, flag);
    if (time_ns == NULL)
        return ps_fail(
            err, PS_EDEVICE, "more than %d flag words are in use on one device", PS_HUB_CAP_FLAGS);
    ps_lane_op op = {.kind = kind,
        .n_bytes = ps_lane_op_bytes(kind, 0),
        .u.flag = {.flag = flag, .time_ns = time_ns, .value = value}};
    return enqueue(d, s, &op, err);
}

ps_status ps_soft_flag_set(ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err)
{
    return enqueue_flag(d, s, PS_LANE_FLAG_SET, flag, value, err);
}

ps_status ps_soft_flag_wait(ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err)
{
    return enqueue_flag(d, s, PS_LANE_FLAG_WAIT, flag, value, err);
}

void ps_soft_set_abort(ps_device *d, uint32_t value)
{
    ps_hub_set_abort(&ps_base_of(d)->hub, value);
}
