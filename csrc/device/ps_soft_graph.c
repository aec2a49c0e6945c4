/* ps_soft_graph - capture and replay on lanes. A capture collects operations by stream ("branches",
 * the origin first); a stream joins when it waits for an event recorded in the capture, as on CUDA.
 * A replay runs the origin's operations on the lane that the graph was launched on and every other
 * branch on a lane of the graph's own, so that branches overlap, may hand flags to each other, and
 * do not queue behind other work of the stream they were captured from.
 *
 * Not here: the rules of capture that need no knowledge of branches (ps_device).
 * Threads: the engine's thread captures, launches and destroys; exec runs on the launching lane's
 * worker. A replay does not overlap itself: a second launch waits for the first.
 */
#include "device/ps_device_priv.h"

#include <string.h>

enum { MAX_BRANCHES = 8 };

typedef struct branch {
    ps_stream_role role;
    unsigned char *ops; /* owns [cap_bytes]; ps_lane_op after ps_lane_op, each of its n_bytes */
    uint64_t n_bytes, cap_bytes;
    uint32_t n_work;             /* operations other than records and waits */
    bool runs_ops;               /* has a RUN: its lane needs pool and scratch */
    uint32_t seen[MAX_BRANCHES]; /* capture: how much of each branch's work is ordered before this
                                    one's end */
    ps_lane *lane;               /* owns; of branches but the first, once captured */
} branch;

typedef struct captured_record {
    ps_record record; /* first: events hold a pointer to it */
    struct captured_record *next;
    uint32_t seen[MAX_BRANCHES]; /* the branch's, when it recorded */
} captured_record;

struct ps_soft_graph {
    ps_hub *hub; /* borrows */
    branch branches[MAX_BRANCHES];
    int n_branches;
    captured_record *records; /* owns */
    uint32_t busy;            /* atomic: a replay is under way */
    uint32_t n_pending;       /* atomic: launches not finished */
    uint32_t n_running;       /* atomic: branches of this replay not finished, beside the first */
};

struct ps_soft_capture {
    ps_soft_graph *graph; /* owns */
};

typedef struct branch_job {
    ps_soft_graph *graph;
    int i_branch;
} branch_job;

static void destroy_soft_graph(ps_soft_graph *g)
{
    if (g == NULL) return;
    for (int i = 0; i < g->n_branches; i++) {
        ps_lane_destroy(g->branches[i].lane);
        ps_free(g->branches[i].ops);
    }
    while (g->records != NULL) {
        captured_record *r = g->records;
        g->records = r->next;
        ps_free(r);
    }
    ps_free(g);
}

/* ---- capture ---- */

ps_status ps_soft_graph_begin(ps_device *d, ps_stream *s, ps_err *err)
{
    ps_device_base *b = ps_base_of(d);
    ps_soft_capture *capture = ps_alloc(1, sizeof *capture);
    ps_soft_graph *g = ps_alloc(1, sizeof *g);
    if (capture == NULL || g == NULL) {
        ps_free(capture);
        ps_free(g);
        return ps_fail(err, PS_ENOMEM, "no memory for a graph");
    }
    g->hub = &b->hub;
    g->branches[0].role = s->role;
    g->n_branches = 1;
    capture->graph = g;
    b->soft = capture;
    s->i_branch = 0;
    return PS_OK;
}

static ps_status append(branch *br, const ps_lane_op *op, ps_err *err)
{
    if (br->cap_bytes - br->n_bytes < op->n_bytes) {
        uint64_t cap = ps_max_u64(br->cap_bytes * 2, 4096);
        unsigned char *ops = ps_realloc(br->ops, cap, 1);
        if (ops == NULL) return ps_fail(err, PS_ENOMEM, "no memory for the operations of a graph");
        br->ops = ops;
        br->cap_bytes = cap;
    }
    memcpy(br->ops + br->n_bytes, op, op->n_bytes);
    br->n_bytes += op->n_bytes;
    return PS_OK;
}

ps_status ps_soft_capture_append(ps_device_base *b, ps_stream *s, const ps_lane_op *op, ps_err *err)
{
    branch *br = &b->soft->graph->branches[s->i_branch];
    ps_status status = append(br, op, err);
    if (status != PS_OK) return status;
    br->n_work++;
    br->seen[s->i_branch] = br->n_work;
    br->runs_ops = br->runs_ops || op->kind == PS_LANE_RUN;
    return PS_OK;
}

ps_status ps_soft_capture_record(ps_device_base *b, ps_stream *s, ps_event *e, ps_err *err)
{
    ps_soft_graph *g = b->soft->graph;
    branch *br = &g->branches[s->i_branch];
    captured_record *r = ps_alloc(1, sizeof *r);
    if (r == NULL) return ps_fail(err, PS_ENOMEM, "no memory for an event of a graph");
    ps_lane_op op = {.kind = PS_LANE_RECORD,
        .n_bytes = ps_lane_op_bytes(PS_LANE_RECORD, 0),
        .u.record = &r->record};
    ps_status status = append(br, &op, err);
    if (status != PS_OK) {
        ps_free(r);
        return status;
    }
    memcpy(r->seen, br->seen, sizeof r->seen);
    r->next = g->records;
    g->records = r;
    if (!e->borrows) ps_record_release(e->record);
    e->record = &r->record;
    e->borrows = true;
    return PS_OK;
}

ps_status ps_soft_capture_wait(ps_device_base *b, ps_stream *s, ps_event *e, ps_err *err)
{
    ps_soft_graph *g = b->soft->graph;
    const captured_record *r = (const captured_record *)e->record;
    if (s->i_branch < 0) {
        if (g->n_branches == MAX_BRANCHES)
            return ps_fail(err, PS_EDEVICE, "a graph can span %d streams, not more", MAX_BRANCHES);
        s->i_branch = g->n_branches++;
        g->branches[s->i_branch].role = s->role;
    }
    branch *br = &g->branches[s->i_branch];
    ps_lane_op op = {
        .kind = PS_LANE_WAIT, .n_bytes = ps_lane_op_bytes(PS_LANE_WAIT, 0), .u.record = e->record};
    ps_status status = append(br, &op, err);
    if (status != PS_OK) return status;
    for (int i = 0; i < MAX_BRANCHES; i++)
        if (br->seen[i] < r->seen[i]) br->seen[i] = r->seen[i];
    return PS_OK;
}

static ps_status finish(ps_soft_graph *g, ps_err *err)
{
    const branch *origin = &g->branches[0];
    for (int i = 1; i < g->n_branches; i++) {
        branch *br = &g->branches[i];
        if (origin->seen[i] != br->n_work)
            return ps_fail(err, PS_EINTERNAL,
                "work captured on the %s stream was not joined back before the capture ended",
                ps_stream_role_name(br->role));
        ps_status status = ps_lane_create(g->hub, br->role, 2, br->runs_ops, &br->lane, err);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

ps_status ps_soft_graph_end(ps_device *d, ps_stream *s, ps_graph **out, ps_err *err)
{
    (void)s;
    ps_device_base *b = ps_base_of(d);
    ps_soft_graph *soft = b->soft->graph;
    ps_free(b->soft);
    b->soft = NULL;
    ps_graph *g = ps_alloc(1, sizeof *g);
    ps_status status =
        g != NULL ? finish(soft, err) : ps_fail(err, PS_ENOMEM, "no memory for a graph");
    if (status != PS_OK) {
        ps_free(g);
        destroy_soft_graph(soft);
        return status;
    }
    g->soft = soft;
    *out = g;
    return PS_OK;
}

/* ---- replay ---- */

ps_status ps_soft_graph_launch(ps_device *d, ps_stream *s, ps_graph *g, ps_err *err)
{
    (void)d;
    (void)err;
    __atomic_fetch_add(&g->soft->n_pending, 1, __ATOMIC_RELAXED);
    ps_lane_op op = {
        .kind = PS_LANE_GRAPH, .n_bytes = ps_lane_op_bytes(PS_LANE_GRAPH, 0), .u.graph = g->soft};
    ps_lane_push(s->lane, &op);
    return PS_OK;
}

/* Blocks until the word is 0. */
static void wait_zero(ps_hub *hub, const uint32_t *word)
{
    for (;;) {
        uint32_t seen = ps_bell_look(&hub->bell);
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) == 0) return;
        ps_bell_wait(&hub->bell, seen);
    }
}

void ps_soft_graph_destroy(ps_device *d, ps_graph *g)
{
    (void)d;
    wait_zero(g->soft->hub, &g->soft->n_pending);
    destroy_soft_graph(g->soft);
    ps_free(g);
}

static void exec_ops(ps_lane *lane, const branch *br)
{
    for (uint64_t at = 0; at < br->n_bytes;) {
        const ps_lane_op *op = (const ps_lane_op *)(const void *)(br->ops + at);
        ps_lane_exec(lane, op);
        at += op->n_bytes;
    }
}

static void exec_branch(void *arg)
{
    const branch_job *job = arg;
    ps_soft_graph *g = job->graph;
    exec_ops(g->branches[job->i_branch].lane, &g->branches[job->i_branch]);
    __atomic_fetch_sub(&g->n_running, 1, __ATOMIC_RELEASE);
    ps_bell_ring(&g->hub->bell);
}

void ps_soft_graph_exec(ps_lane *lane, ps_soft_graph *g)
{
    uint32_t idle = 0;
    while (!__atomic_compare_exchange_n(
        &g->busy, &idle, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        wait_zero(g->hub, &g->busy);
        idle = 0;
    }
    /* Nobody holds these now: every branch of the replay before has finished. */
    for (captured_record *r = g->records; r != NULL; r = r->next) {
        __atomic_store_n(&r->record.done, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&r->record.refs, UINT32_MAX / 2,
            __ATOMIC_RELAXED); /* the graph owns it, whoever releases */
    }
    __atomic_store_n(&g->n_running, (uint32_t)(g->n_branches - 1), __ATOMIC_RELAXED);
    for (int i = 1; i < g->n_branches; i++) {
        ps_lane *side = g->branches[i].lane;
        side->time_ns = lane->time_ns;
        side->failure = lane->failure; /* so that it skips what this lane would skip */
        branch_job job = {.graph = g, .i_branch = i};
        ps_worker_push(side->worker, exec_branch, &job, sizeof job);
    }
    exec_ops(lane, &g->branches[0]);
    wait_zero(g->hub, &g->n_running);
    for (int i = 1; i < g->n_branches; i++) {
        const ps_err *failure = &g->branches[i].lane->failure;
        if (failure->status != PS_OK) ps_lane_fail(lane, failure->status, "%s", failure->message);
    }
    __atomic_store_n(&g->busy, 0, __ATOMIC_RELEASE);
    __atomic_fetch_sub(&g->n_pending, 1, __ATOMIC_RELEASE);
    ps_bell_ring(&g->hub->bell);
}
