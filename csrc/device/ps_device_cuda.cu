/* ps_device_cuda - the device of NVIDIA GPUs, on the CUDA runtime. Accelerator streams are CUDA
 * streams, events CUDA events, graphs captured; CPU streams are the lanes that host and emu use. A
 * flag is set and awaited by a kernel of one thread on locked memory that both sides see: 6.7 us a
 * hand-off measured on an H200, 7.75 with stream memory operations.
 *
 * Not here: kernels of ops (kernels/), argument checks (ps_device), policy of any kind.
 * Threads: the engine's thread, whichever that is: each entry makes the device's context current
 * for its own duration, so that a thread that also uses another CUDA library finds its own current
 * afterwards. set_abort is for any thread.
 *
 * The context is the primary one, which other libraries of the process share. It is never reset. A
 * sticky error (an illegal address, say) makes every later call fail with PS_EFATAL; the process
 * lives.
 */
#include "device/ps_device_cuda.cuh"

#include "device/ps_cuda_resident.cuh"
#include "device/ps_host_locks.h"

#include <string.h>

enum {
    POLL_SLEEP_NS = 40, /* between two looks over the bus, which take a microsecond each */
    TIES = 3,           /* of which the tightest counts: the host may be interrupted in between */
};

static cudaStream_t native_stream(const ps_stream *s)
{
    return (cudaStream_t)s->native;
}

/* ---- flag kernels: <<<1, 1>>> ---- */

/* What came before in the stream is complete; the fence carries that to the CPU, the release orders
 * the flag behind. */
static __global__ void k_flag_set(uint32_t *flag, uint32_t value)
{
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

static __global__ void k_flag_wait(const uint32_t *flag, uint32_t value, const uint32_t *abort_word)
{
    uint32_t seen = 0, aborted = 0;
    for (;;) {
        /* The abort word first: the acquire behind it does not hold it up, so both loads share one
         * trip over the bus. */
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
                     : "=r"(aborted)
                     : "l"(abort_word)
                     : "memory");
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if (seen == value || aborted != 0) return;
        __nanosleep(POLL_SLEEP_NS);
    }
}

/* ---- errors ---- */

/* For what surfaces on a stream: names the last op that it can have been. */
static ps_status check_stream(cudaError_t rc, const char *what, const ps_stream *s, ps_err *err)
{
    if (rc == cudaSuccess) return PS_OK;
    cudaGetLastError();
    return ps_fail(err, ps_cuda_status(rc),
        "%s on the %s stream failed: %s (%s); the last op there was op %u of tick %u", what,
        ps_stream_role_name(s->role), cudaGetErrorString(rc), cudaGetErrorName(rc), s->last_cost.op,
        s->last_cost.tick);
}

/* ---- memory ---- */

static ps_status cuda_mem_info(
    ps_device *d, uint64_t *free_bytes, uint64_t *total_bytes, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    size_t n_free = 0, n_total = 0;
    bool entered = ps_cuda_enter(c);
    ps_status status =
        ps_cuda_check(cudaMemGetInfo(&n_free, &n_total), "asking for free device memory", err);
    ps_cuda_leave(c, entered);
    *free_bytes = n_free;
    *total_bytes = n_total;
    return status;
}

static ps_status cuda_alloc(ps_device *d, uint64_t n_bytes, ps_dptr *out, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    void *p = NULL;
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaMalloc(&p, n_bytes);
    ps_cuda_leave(c, entered);
    if (rc == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return ps_fail(err, PS_EDEVICE,
            "%s has no %llu bytes of device memory left; other processes may hold some",
            d->info.name, (unsigned long long)n_bytes);
    }
    ps_status status = ps_cuda_check(rc, "allocating device memory", err);
    if (status != PS_OK) return status;
    out->a = (uint64_t)(uintptr_t)p;
    ps_ranges_add(&c->base.memory, out->a, n_bytes, 0);
    return PS_OK;
}

/* Freeing during a capture would break it off and free nothing, so the thread's capture mode is
 * relaxed meanwhile. The capture itself was marked as failed by the checks above us. */
static bool enter_to_free(const ps_cuda_device *c, cudaStreamCaptureMode *mode)
{
    bool entered = ps_cuda_enter(c);
    *mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(mode);
    return entered;
}

static void leave_freed(const ps_cuda_device *c, bool entered, cudaStreamCaptureMode *mode)
{
    cudaThreadExchangeStreamCaptureMode(mode);
    cudaGetLastError(); /* on a lost device freeing fails; there is nobody to tell */
    ps_cuda_leave(c, entered);
}

static void cuda_free(ps_device *d, ps_dptr p)
{
    ps_cuda_device *c = ps_cuda_of(d);
    cudaStreamCaptureMode mode;
    if (!ps_ranges_remove(&c->base.memory, p.a, NULL)) return;
    bool entered = enter_to_free(c, &mode);
    cudaFree((void *)(uintptr_t)p.a);
    leave_freed(c, entered, &mode);
}

static ps_status cuda_locked_alloc(ps_device *d, uint64_t n_bytes, void **out, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaHostAlloc(out, n_bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    ps_cuda_leave(c, entered);
    if (rc != cudaSuccess) {
        *out = NULL;
        cudaGetLastError();
        return ps_fail(err, ps_cuda_status(rc),
            "%llu bytes of page-locked memory were refused: %s (see `ulimit -l`)",
            (unsigned long long)n_bytes, cudaGetErrorString(rc));
    }
    memset(*out, 0, n_bytes);
    ps_ranges_add(&c->base.locked, (uint64_t)(uintptr_t)*out, n_bytes, PS_LOCKED_ALLOC);
    return PS_OK;
}

static void cuda_locked_free(ps_device *d, void *p)
{
    ps_cuda_device *c = ps_cuda_of(d);
    cudaStreamCaptureMode mode;
    if (!ps_ranges_remove(&c->base.locked, (uint64_t)(uintptr_t)p, NULL)) return;
    bool entered = enter_to_free(c, &mode);
    cudaFreeHost(p);
    leave_freed(c, entered, &mode);
}

/* Portable: other devices of the process may share the registration (ps_host_locks). */
static ps_status register_range(void *ctx, void *p, uint64_t n_bytes, ps_err *err)
{
    (void)ctx;
    cudaError_t rc =
        cudaHostRegister(p, n_bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (rc == cudaSuccess) return PS_OK;
    cudaGetLastError();
    return ps_fail(err, ps_cuda_status(rc),
        "page-locking %llu bytes was refused: %s (see `ulimit -l`)", (unsigned long long)n_bytes,
        cudaGetErrorString(rc));
}

static void unregister_range(void *ctx, void *p)
{
    (void)ctx;
    cudaHostUnregister(p);
}

static ps_status cuda_lock(ps_device *d, void *p, uint64_t n_bytes, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    ps_status status = ps_host_locks_take(p, n_bytes, register_range, NULL, err);
    ps_cuda_leave(c, entered);
    if (status == PS_OK)
        ps_ranges_add(&c->base.locked, (uint64_t)(uintptr_t)p, n_bytes, PS_LOCKED_REGISTERED);
    return status;
}

static void cuda_unlock(ps_device *d, void *p)
{
    ps_cuda_device *c = ps_cuda_of(d);
    cudaStreamCaptureMode mode;
    if (!ps_ranges_remove(&c->base.locked, (uint64_t)(uintptr_t)p, NULL)) return;
    bool entered = enter_to_free(c, &mode);
    ps_host_locks_give(p, unregister_range, NULL);
    leave_freed(c, entered, &mode);
}

static ps_status cuda_locked_dptr(ps_device *d, const void *locked, ps_dptr *out, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    uint64_t addr = (uint64_t)(uintptr_t)locked;
    out->a = addr;
    if (c->same_address) return PS_OK;
    const ps_range *range = ps_ranges_find(&c->base.locked, addr, 1);
    ps_check_bug(range != NULL, err);
    void *base = NULL;
    bool entered = ps_cuda_enter(c);
    ps_status status =
        ps_cuda_check(cudaHostGetDevicePointer(&base, (void *)(uintptr_t)range->base, 0),
            "asking for the device address of page-locked memory", err);
    ps_cuda_leave(c, entered);
    out->a = status == PS_OK ? (uint64_t)(uintptr_t)base + (addr - range->base) : 0;
    return status;
}

/* ---- streams and events ---- */

static ps_status cuda_stream_create(ps_device *d, ps_stream_role role, ps_stream **out, ps_err *err)
{
    if (role == PS_STREAM_CPU) return ps_soft_stream_create(d, role, out, err);
    ps_cuda_device *c = ps_cuda_of(d);
    ps_stream *s = (ps_stream *)ps_alloc(1, sizeof *s);
    if (s == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a stream");
    s->role = role;
    cudaStream_t native = NULL;
    bool entered = ps_cuda_enter(c);
    /* Non-blocking: no hidden order with the default stream, which other libraries may use. */
    ps_status status = ps_cuda_check(
        cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), "creating a stream", err);
    ps_cuda_leave(c, entered);
    if (status != PS_OK) {
        ps_free(s);
        return status;
    }
    s->native = native;
    *out = s;
    return PS_OK;
}

static void cuda_stream_destroy(ps_device *d, ps_stream *s)
{
    if (s->lane != NULL) {
        ps_soft_stream_destroy(d, s);
        return;
    }
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    /* What the stream uses may be freed next. */
    cudaStreamSynchronize(native_stream(s));
    cudaStreamDestroy(native_stream(s));
    cudaGetLastError();
    ps_cuda_leave(c, entered);
    ps_free(s);
}

/* Both kinds in one, since the stream that will record it is not known yet. */
static ps_status cuda_event_create(ps_device *d, ps_event **out, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    ps_status status = ps_soft_event_create(d, out, err);
    if (status != PS_OK) return status;
    cudaEvent_t native = NULL;
    bool entered = ps_cuda_enter(c);
    status = ps_cuda_check(
        cudaEventCreateWithFlags(&native, cudaEventDefault), "creating an event", err);
    ps_cuda_leave(c, entered);
    if (status != PS_OK) {
        ps_soft_event_destroy(d, *out);
        *out = NULL;
        return status;
    }
    (*out)->native = native;
    return PS_OK;
}

static void cuda_event_destroy(ps_device *d, ps_event *e)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaEventDestroy((cudaEvent_t)e->native);
    cudaGetLastError();
    ps_cuda_leave(c, entered);
    ps_soft_event_destroy(d, e);
}

static ps_status cuda_record(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_record(d, s, e, err);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    ps_status status = check_stream(
        cudaEventRecord((cudaEvent_t)e->native, native_stream(s)), "recording an event", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static ps_status cuda_wait(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_wait(d, s, e, err);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    ps_status status =
        check_stream(cudaStreamWaitEvent(native_stream(s), (cudaEvent_t)e->native, 0),
            "waiting for an event", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static ps_status cuda_sync(ps_device *d, ps_stream *s, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_sync(d, s, err);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    ps_status status = check_stream(cudaStreamSynchronize(native_stream(s)), "work", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static bool cuda_idle(ps_device *d, ps_stream *s)
{
    if (s->lane != NULL) return ps_soft_idle(d, s);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaStreamQuery(native_stream(s));
    if (rc != cudaSuccess) cudaGetLastError(); /* a failure is found again, and reported, by sync */
    ps_cuda_leave(c, entered);
    return rc != cudaErrorNotReady;
}

static ps_status elapsed_ns(cudaEvent_t from, cudaEvent_t to, uint64_t *ns, ps_err *err)
{
    float ms = 0;
    cudaError_t rc = cudaEventElapsedTime(&ms, from, to);
    if (rc == cudaErrorNotReady) {
        cudaGetLastError();
        return ps_fail(err, PS_EINTERNAL, "elapsed time between events that are not complete");
    }
    *ns = ms > 0 ? (uint64_t)((double)ms * 1e6) : 0;
    return ps_cuda_check(rc, "reading the time of an event", err);
}

static ps_status cuda_elapsed(ps_device *d, ps_event *from, ps_event *to, uint64_t *ns, ps_err *err)
{
    if (from->side == PS_EVENT_CPU) return ps_soft_elapsed(d, from, to, ns, err);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    ps_status status = elapsed_ns((cudaEvent_t)from->native, (cudaEvent_t)to->native, ns, err);
    ps_cuda_leave(c, entered);
    return status;
}

/* The GPU keeps no end time by itself, so this is when it was asked: after a sync, that end and a
 * few microseconds. */
static uint64_t cuda_stream_time_ns(ps_device *d, ps_stream *s)
{
    if (s->lane != NULL) return ps_soft_stream_time_ns(d, s);
    ps_cuda_device *c = ps_cuda_of(d);
    uint64_t ns = 0;
    cudaEvent_t now = NULL;
    bool entered = ps_cuda_enter(c);
    if (cudaEventCreateWithFlags(&now, cudaEventDefault) == cudaSuccess) {
        if (cudaEventRecord(now, native_stream(s)) == cudaSuccess &&
            cudaEventSynchronize(now) == cudaSuccess)
            elapsed_ns(c->epoch, now, &ns, NULL);
        cudaEventDestroy(now);
    }
    cudaGetLastError();
    ps_cuda_leave(c, entered);
    return ns;
}

/* ---- marks ---- */

/* "External": in a capture the event becomes a node that each launch records, instead of a point
 * that later work of the capture could wait for. */
static ps_status cuda_mark(ps_device *d, ps_stream *s, ps_event *e, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_mark(d, s, e, err);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaEventRecordWithFlags((cudaEvent_t)e->native, native_stream(s),
        s->capture != 0 ? cudaEventRecordExternal : cudaEventRecordDefault);
    ps_status status = check_stream(rc, "marking a time", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

/* From the tie and not from the epoch: CUDA tells times apart in a float of milliseconds, which
 * after a minute cannot hold microseconds. */
static ps_status cuda_mark_time(ps_device *d, ps_event *e, uint64_t *ns, ps_err *err)
{
    if (e->mark_side == PS_EVENT_CPU) return ps_soft_mark_time(d, e, ns, err);
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    ps_status status = elapsed_ns(c->tie[0], (cudaEvent_t)e->native, ns, err);
    ps_cuda_leave(c, entered);
    *ns += c->tie_ns;
    return status;
}

/* The event happens between two looks at the host's clock: in their middle, say we. */
static ps_status cuda_tie_clocks(ps_device *d, uint64_t *now_ns, uint64_t *error_ns, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    uint64_t best_ns = UINT64_MAX;
    cudaError_t rc = cudaSuccess;
    bool entered = ps_cuda_enter(c);
    for (int i = 0; i < TIES && rc == cudaSuccess; i++) {
        uint64_t before_ns = ps_hub_now_ns(&c->base.hub);
        rc = cudaEventRecord(c->tie[1], c->service);
        if (rc == cudaSuccess) rc = cudaEventSynchronize(c->tie[1]);
        uint64_t took_ns = ps_hub_now_ns(&c->base.hub) - before_ns;
        if (rc != cudaSuccess || took_ns >= best_ns) continue;
        cudaEvent_t tighter = c->tie[1];
        c->tie[1] = c->tie[0];
        c->tie[0] = tighter;
        c->tie_ns = before_ns + took_ns / 2;
        best_ns = took_ns;
    }
    ps_status status = ps_cuda_check(rc, "reading the device's clock", err);
    ps_cuda_leave(c, entered);
    if (status != PS_OK) return status;
    *error_ns = best_ns / 2;
    *now_ns = ps_hub_now_ns(&c->base.hub);
    return PS_OK;
}

/* ---- operations ---- */

static ps_status cuda_copy_in(
    ps_device *d, ps_stream *s, ps_dptr dst, const void *src, uint64_t n_bytes, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaMemcpyAsync(
        (void *)(uintptr_t)dst.a, src, n_bytes, cudaMemcpyHostToDevice, native_stream(s));
    ps_status status = check_stream(rc, "a copy to the device", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static ps_status cuda_copy_out(
    ps_device *d, ps_stream *s, void *dst, ps_dptr src, uint64_t n_bytes, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaMemcpyAsync(
        dst, (const void *)(uintptr_t)src.a, n_bytes, cudaMemcpyDeviceToHost, native_stream(s));
    ps_status status = check_stream(rc, "a copy from the device", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static ps_status cuda_run(ps_device *d, ps_stream *s, ps_launcher fn, const void *args,
    uint32_t args_bytes, const ps_cost *cost, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_run(d, s, fn, args, args_bytes, cost, err);
    ps_cuda_device *c = ps_cuda_of(d);
    ps_launch launch = {};
    launch.cuda_stream = s->native;
    launch.cublas = c->cublas;
    launch.info = &d->info;
    launch.abort = c->d_abort;
    bool entered = ps_cuda_enter(c);
    ps_status status = fn(&launch, args);
    /* A launcher may have returned without asking, or with a status of its own for the same error.
     */
    cudaError_t rc = cudaGetLastError();
    ps_cuda_leave(c, entered);
    if (rc != cudaSuccess)
        return ps_fail(err, ps_cuda_status(rc),
            "launching op %u of tick %u on the %s stream failed: %s (%s)", cost->op, cost->tick,
            ps_stream_role_name(s->role), cudaGetErrorString(rc), cudaGetErrorName(rc));
    if (status != PS_OK)
        return ps_fail(err, status, "op %u of tick %u was refused on the %s stream with %s",
            cost->op, cost->tick, ps_stream_role_name(s->role), ps_status_name(status));
    return PS_OK;
}

static ps_status cuda_flag_set(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_flag_set(d, s, flag, value, err);
    ps_cuda_device *c = ps_cuda_of(d);
    ps_dptr p;
    ps_status status = cuda_locked_dptr(d, flag, &p, err);
    if (status != PS_OK) return status;
    bool entered = ps_cuda_enter(c);
    k_flag_set<<<1, 1, 0, native_stream(s)>>>((uint32_t *)(uintptr_t)p.a, value);
    status = check_stream(cudaGetLastError(), "setting a flag", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static ps_status cuda_flag_wait(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err)
{
    if (s->lane != NULL) return ps_soft_flag_wait(d, s, flag, value, err);
    ps_cuda_device *c = ps_cuda_of(d);
    ps_dptr p;
    ps_status status = cuda_locked_dptr(d, flag, &p, err);
    if (status != PS_OK) return status;
    bool entered = ps_cuda_enter(c);
    k_flag_wait<<<1, 1, 0, native_stream(s)>>>((const uint32_t *)(uintptr_t)p.a, value, c->d_abort);
    status = check_stream(cudaGetLastError(), "waiting for a flag", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

/* ---- graphs ---- */

/* Thread-local: what other threads of the process do meanwhile is none of the capture's business.
 */
static ps_status cuda_graph_begin(ps_device *d, ps_stream *s, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaStreamBeginCapture(native_stream(s), cudaStreamCaptureModeThreadLocal);
    ps_status status = check_stream(rc, "beginning a capture", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

/* Uploaded and waited for, so that the first launch takes no memory and the caller can count what
 * the graph took. Not on the captured stream, where work may be waiting for what the caller does
 * next. */
static ps_status instantiate(
    const ps_cuda_device *c, cudaGraph_t captured, cudaGraphExec_t *exec, ps_err *err)
{
    ps_status status =
        ps_cuda_check(cudaGraphInstantiate(exec, captured, 0), "making a graph", err);
    if (status != PS_OK) return status;
    cudaError_t rc = cudaGraphUpload(*exec, c->service);
    if (rc == cudaSuccess) rc = cudaStreamSynchronize(c->service);
    status = ps_cuda_check(rc, "uploading a graph", err);
    if (status != PS_OK) cudaGraphExecDestroy(*exec);
    return status;
}

static ps_status cuda_graph_end(ps_device *d, ps_stream *s, ps_graph **out, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    ps_graph *g = (ps_graph *)ps_alloc(1, sizeof *g);
    cudaGraph_t captured = NULL;
    cudaGraphExec_t exec = NULL;
    bool entered = ps_cuda_enter(c);
    ps_status status =
        check_stream(cudaStreamEndCapture(native_stream(s), &captured), "ending a capture", s, err);
    if (status == PS_OK && g == NULL) status = ps_fail(err, PS_ENOMEM, "no memory for a graph");
    /* A capture that failed earlier is only ended; ps_device reports what it failed with. */
    if (status == PS_OK && c->base.capture_failure.status != PS_OK)
        status = c->base.capture_failure.status;
    if (status == PS_OK) status = instantiate(c, captured, &exec, err);
    if (captured != NULL) cudaGraphDestroy(captured);
    ps_cuda_leave(c, entered);
    if (status != PS_OK) {
        ps_free(g);
        return status;
    }
    g->native = exec;
    *out = g;
    return PS_OK;
}

static ps_status cuda_graph_launch(ps_device *d, ps_stream *s, ps_graph *g, ps_err *err)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaError_t rc = cudaGraphLaunch((cudaGraphExec_t)g->native, native_stream(s));
    ps_status status = check_stream(rc, "launching a graph", s, err);
    ps_cuda_leave(c, entered);
    return status;
}

static void cuda_graph_destroy(ps_device *d, ps_graph *g)
{
    ps_cuda_device *c = ps_cuda_of(d);
    bool entered = ps_cuda_enter(c);
    cudaGraphExecDestroy(
        (cudaGraphExec_t)g->native); /* the driver keeps it until a launch under way has ended */
    cudaGetLastError();
    ps_cuda_leave(c, entered);
    ps_free(g);
}

/* ---- the table ---- */

const ps_device_vtable ps_device_cuda_vtable = {
    ps_device_cuda_close,
    cuda_mem_info,
    cuda_alloc,
    cuda_free,
    cuda_locked_alloc,
    cuda_locked_free,
    cuda_lock,
    cuda_unlock,
    cuda_locked_dptr,
    cuda_stream_create,
    cuda_stream_destroy,
    cuda_event_create,
    cuda_event_destroy,
    cuda_copy_in,
    cuda_copy_out,
    cuda_run,
    cuda_record,
    cuda_wait,
    cuda_sync,
    cuda_idle,
    cuda_elapsed,
    cuda_stream_time_ns,
    cuda_mark,
    cuda_mark_time,
    cuda_tie_clocks,
    cuda_flag_set,
    cuda_flag_wait,
    cuda_graph_begin,
    cuda_graph_end,
    cuda_graph_launch,
    cuda_graph_destroy,
    ps_soft_set_abort,
};
