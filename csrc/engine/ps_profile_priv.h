/* ps_profile_priv - what the files of the profiler share: which op calls there are
 * (ps_profile_calls.c), the memory they get and what is in it (ps_profile_mem.c), lanes that run
 * and time them (ps_profile_run.c), the bus and the latencies (ps_profile_bus.c).
 *
 * Not here: anything that other modules may call (ps_profile.h).
 */
#ifndef PS_PROFILE_PRIV_H
#define PS_PROFILE_PRIV_H

#include "engine/ps_profile.h"
#include "engine/ps_plan.h"
#include "engine/ps_simulate.h"

/* ---- op calls (ps_profile_calls.c) ---- */

typedef struct op_call {
    ps_op_kind op;
    ps_side side;
    ps_op_args
        args; /* shapes; addresses are references, of which only whether there is one counts */
    ps_work work;
    uint32_t
        fmts; /* of its weights: up to three ids, a byte each and 1 more than the id; 0: none */
} op_call;

typedef struct op_calls {
    op_call *items; /* owns; sorted by side, then so that neighbours need the same formats, and of
                       one op fewer tokens come first */
    uint32_t n, cap;
} op_calls;

/* The calls of one side that passes of this model consist of, each once: two that a cost model
 * can't tell apart are one. */
ps_status ps_profile_collect(const ps_model *model, ps_side side, int sm, uint32_t max_tok,
    uint32_t max_kv, op_calls *out, ps_err *err);
/* The same of one pass, every call as often as it comes and in that order, up to a few hundred. */
ps_status ps_profile_collect_pass(const ps_model *model, ps_side side, int sm, uint32_t n_tok,
    uint32_t max_kv, op_calls *out, ps_err *err);
/* As many formats of these calls' weights as memory holds blocks of at once, like op_call.fmts. */
uint32_t ps_profile_formats(const op_call *calls, uint32_t n);
/* An op on experts that uses one of them. */
op_call ps_profile_one_expert(const op_call *call);
/* Gathering k experts, all of them in host memory, for a token: a call of no pass that is
 * collected, since nothing streams there. False where the model has no experts. */
bool ps_profile_gather_call(const ps_model *model, uint32_t k, op_call *out);
/* The same call over a share of its output rows (heads, tokens): returns the share that it came to
 * be, which is 1 where it can't be cut at all. */
double ps_profile_cut(const op_call *call, double share, ps_op_args *out);
int32_t ps_profile_weight_fmt(ps_op_kind op, const ps_op_args *args, size_t offset);

/* ---- memory (ps_profile_mem.c) ---- */

enum { MAX_FMTS = 3, MAX_BOUND = 64 };
typedef enum area { AREA_WEIGHTS, AREA_IN, AREA_OUT, AREA_INTS, AREA_COUNT } area;

typedef struct segment { /* of the weights' area: blocks of one format, used round and round so that
                            no cache holds what the next call reads */
    uint32_t fmt;
    uint64_t at, n_bytes, next; /* in the area */
} segment;

typedef struct op_memory {
    ps_device *device; /* borrows; NULL: host memory that only CPUs see */
    ps_stream *h2d;    /* borrows; to fill device memory */
    void *staging;     /* borrows; locked */
    uint64_t staging_bytes;
    void *host;    /* owns: the areas, or where they lie on the device a mirror of AREA_INTS */
    ps_pool *pool; /* owns; fills host memory; NULL: the caller's thread does */
    uint8_t *locked_weights; /* borrows; AREA_WEIGHTS is locked memory, which kernels reach by its
                                device address; NULL: it is where the others are */
    ps_dptr dev;             /* owns: the areas */
    ps_dptr base[AREA_COUNT];
    uint64_t n_bytes[AREA_COUNT];
    uint64_t ints_used;
    uint64_t n_bound; /* calls so far: each has experts of its own, as layers do */
    uint32_t fmts;    /* what the segments hold, as in op_call */
    segment seg[MAX_FMTS];
    uint32_t n_seg;
    uint64_t rng;
} op_memory;

/* device NULL: host memory. All fields that are borrowed are set by the caller first. */
ps_status ps_profile_mem_init(op_memory *m, uint64_t n_bytes, ps_err *err);
void ps_profile_mem_fini(op_memory *m);
/* Makes the weights' area hold blocks of these formats. Nothing may be running on it. */
ps_status ps_profile_mem_fill(op_memory *m, uint32_t fmts, ps_err *err);
/* Gives `n` copies of a call addresses: other weights and other routes each, the same activations.
 * *n_bound: as many as there was room for; 0 where the call does not fit at all. Nothing may be
 * running on this memory. sm 0: no workspace is wanted. */
ps_status ps_profile_bind(op_memory *m, const op_call *call, const ps_op_args *cut, int sm,
    uint32_t n, ps_op_args *out, uint32_t *n_bound, ps_err *err);
/* Gives one copy of each of `n` calls addresses. which: [n] the calls that there was room for, in
 * their order; out: [n] the same, bound. */
ps_status ps_profile_bind_each(op_memory *m, const op_call *calls, uint32_t n, int sm,
    ps_op_args *out, uint32_t *which, uint32_t *n_bound, ps_err *err);
/* Random blocks of a format with finite values around 0. n_bytes: whole blocks. */
void ps_profile_random_blocks(uint32_t fmt, void *dst, uint64_t n_bytes, uint64_t *rng);

/* ---- lanes (ps_profile_run.c) ---- */

enum {
    MAX_CPU_LANES = 4,
    MAX_LANES = MAX_CPU_LANES + 1,
    COPY_PIECE = 4 << 20,
    PROFILE_FLAG_BYTES = 16 << 10
};

typedef struct run_lane { /* who runs ops */
    ps_device *device;
    bool owns_device;  /* a `host` device with as many threads */
    ps_stream *stream; /* owns, as the next two */
    ps_event *from, *to;
    const ps_op_table *ops;
    op_memory *mem;           /* borrows */
    int sm;                   /* for workspaces; 0: they want none */
    uint32_t threads;         /* 0: the accelerator */
    double rate[PS_OP_COUNT]; /* (FLOPs + bytes) a second of real time that this op came to last; 0:
                                 not known yet */
    /* What passes spend most of their memory traffic on, as a load for others and to be loaded. */
    const op_call *main_call; /* borrows; one token; NULL: none fits */
    uint64_t main_ns;
} run_lane;

typedef struct copy_lane {
    ps_stream *stream; /* owns, as the next two */
    ps_event *from, *to;
    unsigned char *host; /* owns, locked: [host_bytes] */
    uint64_t host_bytes;
    uint64_t at;       /* copies go through all of it in turn */
    ps_dptr piece;     /* in profiler.copy_area: [copy_piece] that only loads touch */
    uint64_t piece_ns; /* one of copy_piece, idle bus; 0: not known yet */
} copy_lane;

typedef struct profiler {
    const ps_model *model; /* borrows, as the next two */
    ps_device *device;
    const ps_profile_spec *spec;
    ps_profile *out;
    uint64_t deadline_ns;
    uint32_t n_done, n_steps;
    uint32_t max_tok, max_kv;
    bool virtual_clock, has_gpu;
    op_memory dev_mem, host_mem;
    op_memory shared_mem; /* borrows: host_mem, but that its weights are where copies come from */
    run_lane lanes[MAX_LANES]; /* the accelerator first, then CPUs, most threads first */
    uint32_t n_lanes, n_cpu_lanes;
    copy_lane copies[2]; /* in, out */
    uint64_t copy_bytes, copy_piece;
    ps_dptr copy_area;   /* owns */
    run_lane flags_lane; /* the CPU stream of the device itself, which shares flags with it; only
                            its device, stream and events are set */
    void *flags;         /* owns, locked */
    op_calls calls[PS_SIDE_COUNT];
    ps_op_args bound[MAX_BOUND],
        load_bound[MAX_BOUND]; /* calls being timed, and what runs beside */
} profiler;

typedef struct load { /* what runs beside */
    ps_sample_load kind;
    run_lane *lane; /* of PS_LOAD_CPU and PS_LOAD_GATHER: who runs its main_call */
} load;

ps_status ps_profile_lanes_open(profiler *p, ps_err *err);
void ps_profile_lanes_close(profiler *p);
/* Ends what runs, flags included, and empties every stream. */
void ps_profile_drain(profiler *p);
/* A step begins: shows progress. PS_ECANCELLED where somebody wants an end. */
ps_status ps_profile_step(profiler *p, ps_err *err);
uint64_t ps_profile_allowance_ns(const profiler *p); /* real time for the step in hand */
ps_status ps_profile_add(profiler *p, ps_sample s, ps_err *err);

/* Times a call on a lane. *fits: whether any part of it does; if not, there is no sample. */
ps_status ps_profile_time_call(profiler *p, run_lane *l, const op_call *call, load beside,
    ps_sample *out, bool *fits, ps_err *err);
/* What the call took as an idle sample of that side and so many threads says; 0: there is none. */
double ps_profile_seconds(
    const profiler *p, const op_call *call, ps_sample_side side, uint32_t threads);
/* One copy on that direction's stream, between its locked memory and `at`. */
ps_status ps_profile_copy(profiler *p, bool in, ps_dptr at, uint64_t n_bytes, ps_err *err);
/* Keeps `beside` busy for about `ns` from now on. */
ps_status ps_profile_start_load(profiler *p, load beside, uint64_t ns, ps_err *err);
/* Whether it still is; always on a virtual clock, where what runs beside costs nothing. */
bool ps_profile_is_loaded(const profiler *p, load beside);
ps_status ps_profile_end_load(profiler *p, load beside, ps_err *err);
uint64_t ps_profile_median(uint64_t *ns, uint32_t n); /* sorts */

/* ---- the bus and latencies (ps_profile_bus.c) ---- */

ps_status ps_profile_time_fixed(profiler *p, ps_err *err);
ps_status ps_profile_time_copies(profiler *p, ps_err *err);
ps_status ps_profile_time_contention(profiler *p, ps_err *err);
uint32_t ps_profile_bus_steps(const profiler *p);

#endif
