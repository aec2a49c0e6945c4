/* ps_lane - a stream made of a thread: operations run one after the other on a worker, with a
 * clock, a pool, scratch and the first failure kept until somebody syncs. Every stream of `host`
 * and `emu` is a lane, and so are the CPU streams of `cuda` and the branches of a software graph.
 *
 * Not here: argument checks (ps_device), capture and replay (ps_soft_graph), memory (the three
 * devices).
 * Threads: the engine's thread creates, enqueues, drains and destroys; ps_lane_exec runs on the
 * lane's worker.
 *
 * What a lane never does is leave others waiting: behind a failure, or while the abort word is set,
 * it skips ops and copies but still records its events and sets its flags.
 */
#ifndef PS_LANE_H
#define PS_LANE_H

#include "device/ps_device.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PS_LANE_CAP_JOBS = PS_CPU_QUEUE, /* operations ahead of the thread before enqueueing blocks */
    PS_HUB_CAP_FLAGS = 65536, /* distinct flag words of a device: some for each chunk and layer */
};

typedef struct ps_lane ps_lane;
typedef struct ps_soft_graph ps_soft_graph;

/* One record of one event. Waits hold the record and not the event, so recording the event again
 * cannot confuse them. */
typedef struct ps_record {
    uint32_t refs; /* atomic: the event, the recording operation, each wait; 0: free */
    uint32_t done; /* atomic; orders time_ns */
    uint64_t time_ns;
} ps_record;

/* When a stream got to a point: what traces are made of. Written by the lane, read after a sync. */
typedef struct ps_mark {
    uint32_t done; /* atomic; orders time_ns */
    uint64_t time_ns;
} ps_mark;

typedef struct ps_flag_entry {
    const uint32_t *flag;
    uint32_t i_cell;
} ps_flag_entry;

/* What the lanes of a device share. Filled by the device before the first lane, constant afterwards
 * but for what says otherwise. */
typedef struct ps_hub {
    const ps_device_info *info; /* borrows */
    const void *cpu_ops;        /* borrows */
    uint64_t scratch_bytes;     /* of each lane that runs ops */
    int cpu_threads;            /* pool of a CPU stream */
    int compute_threads;        /* pool of a compute stream; the others have one thread */
    uint64_t accel_tag;         /* XORed onto device addresses by everything but CPU streams */
    bool virtual_clock;         /* lanes charge `profile`; else their time is the real clock */
    bool poll_flags;            /* a GPU sets flags too, and it rings no bell */
    bool delays; /* random pauses, and destinations poisoned before a copy fills them */
    uint64_t seed;
    ps_emu_profile profile;
    uint64_t epoch_ns;    /* real clock at open: zero of stream times */
    uint32_t *abort_word; /* atomic; borrows; own_abort unless the device has a better place */
    uint32_t own_abort;
    uint32_t lost; /* atomic: as if aborted, for good */
    ps_bell bell;  /* rung when an event, a flag, a graph or the abort word changed */

    /* the engine's thread only: */
    uint64_t host_ns; /* virtual clock: the latest time that this thread has synced with. What it
                         enqueues from then on does not start before. */
    uint32_t n_lanes_made; /* seeds differ by it */
    ps_record **chunks;    /* owns [n_chunks][chunk_sizes[i]] */
    uint32_t *chunk_sizes; /* owns */
    uint32_t n_chunks, cap_chunks;
    uint32_t n_records, n_records_needed; /* made; the most that can be in use at once */
    uint32_t next_chunk, next_record;     /* where the search for a free one goes on */
    ps_flag_entry *flags;                 /* owns [PS_HUB_CAP_FLAGS], sorted by address */
    uint32_t
        *free_cells; /* owns [PS_HUB_CAP_FLAGS]; the first PS_HUB_CAP_FLAGS - n_flags are free */
    uint32_t n_flags;
    uint64_t *flag_times; /* owns [PS_HUB_CAP_FLAGS], atomic: when the setter's clock says the flag
                             was set */
} ps_hub;

typedef enum ps_lane_op_kind {
    PS_LANE_COPY,
    PS_LANE_RUN,
    PS_LANE_RECORD,
    PS_LANE_WAIT,
    PS_LANE_FLAG_SET,
    PS_LANE_FLAG_WAIT,
    PS_LANE_GRAPH,
    PS_LANE_MARK,
} ps_lane_op_kind;

typedef struct ps_lane_copy {
    void *dst;
    const void *src;
    uint64_t n_bytes;
    bool inbound; /* host to device: which rate and which message */
} ps_lane_copy;
typedef struct ps_lane_run {
    ps_launcher fn;
    ps_cost cost;
    unsigned char args[PS_RUN_ARGS_BYTES] __attribute__((aligned(16)));
} ps_lane_run;
typedef struct ps_lane_flag {
    uint32_t *flag;
    uint64_t *time_ns; /* the cell of this flag */
    uint32_t value;
} ps_lane_flag;

typedef struct ps_lane_op {
    uint32_t kind;    /* ps_lane_op_kind */
    uint32_t n_bytes; /* of this struct that are in use, a multiple of 16 */
    union {
        ps_lane_copy copy;
        ps_lane_run run;
        ps_record *record; /* RECORD and WAIT; one reference belongs to the operation */
        ps_lane_flag flag;
        ps_soft_graph *graph;
        ps_mark *mark; /* borrows */
    } u __attribute__((aligned(16)));
} ps_lane_op;

struct ps_lane {
    ps_hub *hub; /* borrows */
    ps_stream_role role;
    ps_worker *worker; /* owns */
    ps_pool *pool;     /* owns */
    void *scratch;     /* owns */
    /* the worker's while it runs, the engine's after a drain: */
    ps_launch launch;
    uint64_t time_ns;
    uint64_t rng;
    ps_err failure; /* the first one since the last sync */
};

/* The caller fills the configuration first. `abort_word` NULL: own_abort. */
ps_status ps_hub_init(ps_hub *hub, ps_err *err);
void ps_hub_fini(ps_hub *hub);                      /* no lane is left; a zeroed hub is allowed */
void ps_hub_set_abort(ps_hub *hub, uint32_t value); /* any thread */
void ps_hub_lose(ps_hub *hub);                      /* any thread */
bool ps_hub_released(const ps_hub *hub);            /* aborted or lost: nothing may be waited for */
uint64_t ps_hub_now_ns(const ps_hub *hub);

/* Room for `n` more records in use at once; give it back with a negative n. */
ps_status ps_hub_need_records(ps_hub *hub, int64_t n, ps_err *err);
/* A free record with `refs` references; NULL would be a bug in the count above. */
ps_record *ps_hub_take_record(ps_hub *hub, uint32_t refs);
void ps_record_release(ps_record *record); /* any thread; NULL allowed */
bool ps_record_is_done(const ps_record *record);

/* The time cell of a flag word; NULL when there are more than PS_HUB_CAP_FLAGS. */
uint64_t *ps_hub_flag_time(ps_hub *hub, const uint32_t *flag);
void ps_hub_forget_flags(
    ps_hub *hub, const void *base, uint64_t n_bytes); /* their memory goes away */

/* `runs_ops`: with pool and scratch. */
ps_status ps_lane_create(
    ps_hub *hub, ps_stream_role role, uint32_t cap_jobs, bool runs_ops, ps_lane **out, ps_err *err);
void ps_lane_destroy(ps_lane *lane); /* runs what is queued first; NULL allowed */
void ps_lane_push(ps_lane *lane, const ps_lane_op *op);
ps_status ps_lane_sync(
    ps_lane *lane, ps_err *err); /* drains, then hands out and clears the failure */
void ps_lane_exec(ps_lane *lane, const ps_lane_op *op);
void ps_lane_fail(ps_lane *lane, ps_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Sizes for ps_lane_op.n_bytes. */
uint32_t ps_lane_op_bytes(ps_lane_op_kind kind, uint32_t args_bytes);

/* Replays a graph on the lane that it was launched on (ps_soft_graph). */
void ps_soft_graph_exec(ps_lane *lane, ps_soft_graph *graph);

#ifdef __cplusplus
}
#endif
#endif
