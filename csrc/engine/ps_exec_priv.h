/* ps_exec_priv - what the two files of the executor share: the object itself, taken and given back
 * by ps_exec_open.c, and driven by ps_exec.c.
 */
#ifndef PS_EXEC_PRIV_H
#define PS_EXEC_PRIV_H

#include "engine/ps_exec.h"

#include <stdatomic.h>

#include "engine/ps_bind.h"
#include "engine/ps_bounce.h"
#include "engine/ps_host_weights.h"

enum {
    CAP_BOUND = 24,   /* shapes of pass kept: decode of several KV lengths, and the last prompts */
    FLAG_STRIDE = 64, /* one flag a cache line: neither side's polling disturbs the other's words */
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
    ps_host_weights weights; /* owns */
    ps_bounce *bounce;       /* owns; NULL where all that is streamed is locked */
    ps_dptr *image_dev; /* owns; [n_units] device addresses of experts' locked images, or null */
    bool *mapped;       /* owns; [n_units of the plan] those that have one; NULL: no ring */
    ps_bound *bound[CAP_BOUND]; /* owns */
    uint32_t n_bound;
    ps_residency held;         /* what of DEV_WEIGHTS can be relied on */
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

/* Zeroed locked memory, within the limit. NULL for no bytes. */
ps_status ps_exec_locked(ps_exec *x, uint64_t n_bytes, void **out, ps_err *err);
void ps_exec_free_locked(ps_exec *x, void *p); /* NULL allowed */
/* No list keeps its graphs: they hold addresses that are about to change. */
void ps_exec_drop_graphs(ps_exec *x);
/* No list is kept. */
void ps_exec_drop_lists(ps_exec *x);

#endif
