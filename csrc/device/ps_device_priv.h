/* ps_device_priv - what the files of device/ share: the bodies of the opaque types and the state
 * that every device keeps, so that the checks of ps_device.c are the same for all three.
 *
 * Not here: anything for users of a device.
 * Threads: the engine's thread.
 */
#ifndef PS_DEVICE_PRIV_H
#define PS_DEVICE_PRIV_H

#include "device/ps_device.h"
#include "device/ps_lane.h"
#include "device/ps_ranges.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ps_stream {
    ps_stream *next; /* of the device's list */
    ps_stream_role role;
    uint32_t capture;  /* number of the capture that it takes part in; 0: none */
    int i_branch;      /* software capture: its branch; -1: not yet one */
    ps_cost last_cost; /* of the last op: what an error that surfaces late is reported with */
    ps_lane *lane;     /* owns; NULL where the stream is the GPU's own */
    void *native;      /* owns: the CUDA device's part */
};

typedef enum ps_event_side { PS_EVENT_NEVER, PS_EVENT_ACCEL, PS_EVENT_CPU } ps_event_side;

struct ps_event {
    ps_event *next;
    ps_event_side side; /* of the last record; NEVER: there was none */
    uint32_t capture;   /* number of the capture that the last record is part of; 0: none */
    ps_record *record;  /* software: the last one; owns a reference, or borrows from its graph */
    bool borrows;       /* the latter */
    ps_event_side mark_side; /* of the last mark; NEVER: there was none */
    ps_mark mark;            /* software: its time */
    void *native;            /* owns: the CUDA device's part */
};

struct ps_graph {
    ps_graph *next;
    ps_soft_graph *soft; /* owns; NULL on CUDA */
    void *native;        /* owns: the CUDA device's part */
};

typedef struct ps_soft_capture ps_soft_capture;

enum { PS_LOCKED_ALLOC = 1, PS_LOCKED_REGISTERED = 2 }; /* ps_range.note of locked ranges */

typedef struct ps_device_base {
    ps_device device; /* first: a ps_device * is a ps_device_base * */
    ps_ranges memory; /* device memory, by ps_dptr.a */
    ps_ranges locked; /* page-locked host memory */
    ps_stream *streams;
    ps_event *events;
    ps_graph *graphs;
    ps_hub hub;
    bool lost; /* a sticky error happened: everything but freeing and closing fails */
    int n_faults;
    ps_fault faults[PS_MAX_FAULTS]; /* `after` counts down; -1: fired */
    /* the capture in progress: */
    uint32_t capture; /* its number; 0: none */
    uint32_t n_captures;
    ps_stream *capture_origin; /* borrows */
    ps_err capture_failure;    /* what made it fail already */
    ps_soft_capture *soft;     /* owns; NULL on CUDA */
} ps_device_base;

static inline ps_device_base *ps_base_of(ps_device *d)
{
    return (ps_device_base *)d;
}

/* Opening; `options` is never NULL and its rates and counts are checked. */
ps_status ps_device_host_open(const ps_device_options *options, ps_device **out, ps_err *err);
ps_status ps_device_emu_open(const ps_device_options *options, ps_device **out, ps_err *err);
ps_status ps_device_cuda_open(
    int i_device, const ps_device_options *options, ps_device **out, ps_err *err);

/* The hub's configuration that follows from the options. */
void ps_device_configure(ps_device_base *base, const ps_device_options *options);
/* Destroys streams, graphs and events and frees memory through the vtable: the first half of every
 * close. */
void ps_device_release_all(ps_device_base *base);

/* ---- streams, events and graphs of host and emu, and the CPU streams of cuda (ps_soft.c,
 * ps_soft_graph.c) ---- */
ps_status ps_soft_stream_create(ps_device *d, ps_stream_role role, ps_stream **out, ps_err *err);
void ps_soft_stream_destroy(ps_device *d, ps_stream *s);
ps_status ps_soft_event_create(ps_device *d, ps_event **out, ps_err *err);
void ps_soft_event_destroy(ps_device *d, ps_event *e);
ps_status ps_soft_copy_in(
    ps_device *d, ps_stream *s, ps_dptr dst, const void *src, uint64_t n_bytes, ps_err *err);
ps_status ps_soft_copy_out(
    ps_device *d, ps_stream *s, void *dst, ps_dptr src, uint64_t n_bytes, ps_err *err);
ps_status ps_soft_run(ps_device *d, ps_stream *s, ps_launcher fn, const void *args,
    uint32_t args_bytes, const ps_cost *cost, ps_err *err);
ps_status ps_soft_record(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_soft_wait(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_soft_sync(ps_device *d, ps_stream *s, ps_err *err);
bool ps_soft_idle(ps_device *d, ps_stream *s);
ps_status ps_soft_elapsed(ps_device *d, ps_event *from, ps_event *to, uint64_t *ns, ps_err *err);
uint64_t ps_soft_stream_time_ns(ps_device *d, ps_stream *s);
ps_status ps_soft_mark(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_soft_mark_time(ps_device *d, ps_event *e, uint64_t *ns, ps_err *err);
ps_status ps_soft_tie_clocks(ps_device *d, uint64_t *now_ns, uint64_t *error_ns, ps_err *err);
ps_status ps_soft_flag_set(ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err);
ps_status ps_soft_flag_wait(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err);
void ps_soft_set_abort(ps_device *d, uint32_t value);
ps_status ps_soft_graph_begin(ps_device *d, ps_stream *s, ps_err *err);
ps_status ps_soft_graph_end(ps_device *d, ps_stream *s, ps_graph **out, ps_err *err);
ps_status ps_soft_graph_launch(ps_device *d, ps_stream *s, ps_graph *g, ps_err *err);
void ps_soft_graph_destroy(ps_device *d, ps_graph *g);

/* Part of capture: appends instead of pushing; a captured record of `e`; the record that `e` holds,
 * joining `s`. */
ps_status ps_soft_capture_append(
    ps_device_base *base, ps_stream *s, const ps_lane_op *op, ps_err *err);
ps_status ps_soft_capture_record(ps_device_base *base, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_soft_capture_wait(ps_device_base *base, ps_stream *s, ps_event *e, ps_err *err);

/* The entries of a vtable that host and emu have in common. */
#define PS_SOFT_VTABLE_ENTRIES                                                                     \
    .stream_create = ps_soft_stream_create, .stream_destroy = ps_soft_stream_destroy,              \
    .event_create = ps_soft_event_create, .event_destroy = ps_soft_event_destroy,                  \
    .copy_in = ps_soft_copy_in, .copy_out = ps_soft_copy_out, .run = ps_soft_run,                  \
    .record = ps_soft_record, .wait = ps_soft_wait, .sync = ps_soft_sync, .idle = ps_soft_idle,    \
    .elapsed = ps_soft_elapsed, .stream_time_ns = ps_soft_stream_time_ns, .mark = ps_soft_mark,    \
    .mark_time = ps_soft_mark_time, .tie_clocks = ps_soft_tie_clocks,                              \
    .flag_set = ps_soft_flag_set, .flag_wait = ps_soft_flag_wait,                                  \
    .graph_begin = ps_soft_graph_begin, .graph_end = ps_soft_graph_end,                            \
    .graph_launch = ps_soft_graph_launch, .graph_destroy = ps_soft_graph_destroy,                  \
    .set_abort = ps_soft_set_abort

#ifdef __cplusplus
}
#endif
#endif
