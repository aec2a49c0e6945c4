/* ps_device - the one interface to anything that stores weights and computes: `host` (CPU only),
 * `emu` (an emulated GPU: real threads, private tagged memory of hard capacity, virtual clock,
 * faults on demand) and `cuda`.
 *
 * Not here: what the ops are. `run` takes a launcher and its arguments by value, so device/ knows
 * no op, and nothing above device/ knows which device it drives.
 * Threads: one engine thread drives a device; the abort word alone may be set from any thread.
 *
 * Streams. A device has streams of four roles. COMPUTE, H2D and D2H belong to the accelerator (on
 * `host` they are plain in-order workers that nothing uses); CPU is a worker thread with a pool
 * behind it on every device: that is where units placed on the CPU compute. Everything enqueued on
 * one stream happens in order. Between accelerator streams order comes from events (record / wait);
 * between the CPU stream and an accelerator stream it comes from flags, which live in locked memory
 * and which both sides can set and wait for without the engine thread.
 */
#ifndef PS_DEVICE_H
#define PS_DEVICE_H

#include "base/ps_base.h"
#include "base/ps_thread.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A device address. The host can neither dereference it nor pass a host pointer for it by mistake;
 * only CUDA launchers and ps_cpu_ptr() unwrap it. On `emu` bit 62 is flipped, so that a slip traps.
 * On `host` it is the plain address. */
typedef struct ps_dptr {
    uint64_t a;
} ps_dptr;

static inline ps_dptr ps_dptr_add(ps_dptr p, uint64_t n_bytes)
{
    ps_dptr q = {p.a + n_bytes};
    return q;
}
static inline bool ps_dptr_is_null(ps_dptr p)
{
    return p.a == 0;
}
#define PS_EMU_TAG (1ull << 62)

typedef enum ps_stream_role {
    PS_STREAM_COMPUTE,
    PS_STREAM_H2D,
    PS_STREAM_D2H,
    PS_STREAM_CPU,
    PS_STREAM_COUNT
} ps_stream_role;
const char *ps_stream_role_name(ps_stream_role role); /* "compute", "h2d", "d2h", "cpu" */

typedef struct ps_device ps_device;
typedef struct ps_stream ps_stream; /* owned by the device; created with a role */
typedef struct ps_event ps_event;   /* one recorded point of one stream */
typedef struct ps_graph ps_graph;   /* a recorded sequence, launched as one */

typedef enum ps_device_kind { PS_DEVICE_HOST, PS_DEVICE_EMU, PS_DEVICE_CUDA } ps_device_kind;

typedef struct ps_device_info {
    ps_device_kind kind;
    char name[128];            /* "NVIDIA H200", "emulated GPU", the CPU's model name for host */
    int sm;                    /* 90 for compute capability 9.0; 0 where there is none */
    int n_sm;                  /* multiprocessors; 0 where there are none */
    uint64_t vram_total_bytes; /* capacity of the accelerator's memory; 0 on host */
    uint64_t
        baseline_bytes; /* taken before the first allocation: context, kernels, library handle */
    bool virtual_clock; /* elapsed() and stream times are simulated */
} ps_device_info;

/* What a launcher is called with. On CUDA: the stream. On CPU streams, and on all streams of host
 * and emu: the pool to work with, how to unwrap addresses, and a scratch area. */
typedef struct ps_launch {
    void *cuda_stream; /* cudaStream_t; NULL for CPU launchers */
    void *cublas; /* loaded library state of the CUDA device or NULL; kernels/ knows its type */
    const ps_device_info *info;
    ps_pool *pool; /* CPU launchers */
    uint64_t tag; /* CPU launchers: XORed onto every address (PS_EMU_TAG on emulated GPU streams) */
    void *scratch; /* CPU launchers: private to the stream, 64-byte aligned */
    uint64_t scratch_bytes;
    const void *cpu_ops; /* CPU launchers: the op table variant in force; kernels/ knows its type */
    const uint32_t
        *abort; /* read atomically: long ops look here between parts and return early when not 0 */
} ps_launch;

/* Enqueues (CUDA) or performs (CPU) one op. `args` stays valid for the call only. Returns launch
 * errors at once; what fails later sticks to the stream and surfaces at the next sync. */
typedef ps_status (*ps_launcher)(const ps_launch *launch, const void *args);

/* CPU side of an op: the address behind a ps_dptr, for the stream it runs on. A tagged address on
 * the CPU stream or an untagged one on an emulated GPU stream becomes an address that traps. */
static inline void *ps_cpu_ptr(const ps_launch *launch, ps_dptr p)
{
    return p.a == 0 ? NULL : (void *)(uintptr_t)(p.a ^ launch->tag);
}

/* What the virtual clock charges for an op, and what errors and traces show. */
typedef struct ps_cost {
    uint64_t flops;
    uint64_t bytes; /* moved through the memory of the side that computes, or over the bus: */
    uint64_t
        bus_bytes; /* those of them that are host memory, which an accelerator reaches by address */
    uint64_t disk_bytes; /* read from files meanwhile */
    uint32_t op;         /* ps_op_kind, opaque here */
    uint32_t tick;       /* index in the tick list */
} ps_cost;

/* Rates that `emu` charges. All > 0. */
typedef struct ps_emu_profile {
    double h2d_bytes_per_s, d2h_bytes_per_s; /* each direction of the bus */
    double vram_bytes_per_s,
        gpu_flops; /* an op takes launch_ns + max(bytes / rate, flops / rate) */
    double dram_bytes_per_s, cpu_flops;   /* the same for the CPU stream */
    uint64_t launch_ns, copy_ns, flag_ns; /* fixed cost of an op, a copy, a hand-off by flag */
    double disk_bytes_per_s;              /* of the files that weights are read from in a pass */
} ps_emu_profile;
extern const ps_emu_profile ps_emu_profile_default;

typedef enum ps_fault_kind {
    PS_FAULT_ALLOC,        /* device memory */
    PS_FAULT_LOCKED_ALLOC, /* page-locked memory */
    PS_FAULT_COPY,
    PS_FAULT_LAUNCH,
    PS_FAULT_FLAG,
    PS_FAULT_SYNC, /* reports an asynchronous failure */
    PS_FAULT_COUNT
} ps_fault_kind;

typedef struct ps_fault {
    ps_fault_kind kind;
    int64_t after; /* the call behind `after` successful ones of this kind fails, once */
    bool sticky;   /* true: the device is lost from then on (PS_EFATAL) */
} ps_fault;

enum {
    PS_MAX_FAULTS = 8,
    PS_RUN_ARGS_BYTES = 384, /* largest argument struct that run takes */
    PS_CPU_QUEUE = 4096,     /* operations that a CPU stream holds; one more waits for room */
};

typedef struct ps_device_options {
    int threads;                /* of the CPU stream's pool; 0: ps_device_default_threads() */
    const void *cpu_ops;        /* handed to CPU launchers unread: the op table variant */
    uint64_t cpu_scratch_bytes; /* scratch of each CPU-executed stream */
    /* emu only */
    ps_emu_profile emu_profile;     /* all zero: the default */
    uint64_t emu_vram_bytes;        /* 0: 64 GiB of address space, committed as used */
    uint64_t emu_locked_bytes;      /* 0: unlimited */
    uint64_t emu_map_bytes_per_gib; /* device memory that each GiB of locked memory takes, by pages;
                                       at most 1 GiB */
    uint64_t emu_seed;
    bool emu_delays; /* random pauses before each operation, from the seed */
    int n_faults;
    ps_fault faults[PS_MAX_FAULTS];
} ps_device_options;

/* ---- the vtable: nothing optional; every entry has three implementations and a contract test ----
 */
typedef struct ps_device_vtable {
    void (*close)(ps_device *d);
    ps_status (*mem_info)(ps_device *d, uint64_t *free_bytes, uint64_t *total_bytes, ps_err *err);

    ps_status (*alloc)(ps_device *d, uint64_t n_bytes, ps_dptr *out, ps_err *err);
    void (*free)(ps_device *d, ps_dptr p);
    ps_status (*locked_alloc)(ps_device *d, uint64_t n_bytes, void **out, ps_err *err);
    void (*locked_free)(ps_device *d, void *p);
    /* Page-lock memory that ps_alloc made (anonymous, never a file mapping). lock/unlock come in
     * pairs. */
    ps_status (*lock)(ps_device *d, void *p, uint64_t n_bytes, ps_err *err);
    void (*unlock)(ps_device *d, void *p);
    /* The address under which accelerator kernels read this locked memory. */
    ps_status (*locked_dptr)(ps_device *d, const void *locked, ps_dptr *out, ps_err *err);

    ps_status (*stream_create)(ps_device *d, ps_stream_role role, ps_stream **out, ps_err *err);
    void (*stream_destroy)(ps_device *d, ps_stream *s);
    ps_status (*event_create)(ps_device *d, ps_event **out, ps_err *err);
    void (*event_destroy)(ps_device *d, ps_event *e);

    /* Asynchronous. The host side must lie in one locked range. */
    ps_status (*copy_in)(
        ps_device *d, ps_stream *s, ps_dptr dst, const void *src, uint64_t n_bytes, ps_err *err);
    ps_status (*copy_out)(
        ps_device *d, ps_stream *s, void *dst, ps_dptr src, uint64_t n_bytes, ps_err *err);
    ps_status (*run)(ps_device *d, ps_stream *s, ps_launcher fn, const void *args,
        uint32_t args_bytes, const ps_cost *cost, ps_err *err);
    ps_status (*record)(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
    /* Binds to the last record made before this call; an event never recorded is an error. */
    ps_status (*wait)(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
    /* Blocks the caller until the stream is empty; returns the stream's first asynchronous failure.
     */
    ps_status (*sync)(ps_device *d, ps_stream *s, ps_err *err);
    /* Whether everything enqueued so far is done (or has failed): a look, never a wait. */
    bool (*idle)(ps_device *d, ps_stream *s);
    /* Both recorded and complete. Virtual time on emu. */
    ps_status (*elapsed)(ps_device *d, ps_event *from, ps_event *to, uint64_t *ns, ps_err *err);
    /* When the stream's last finished operation ended, on the device's own clock. Call after sync.
     */
    uint64_t (*stream_time_ns)(ps_device *d, ps_stream *s);

    /* Times for traces, apart from any order. mark stamps `e` when the stream gets there; in a
     * capture it becomes part of the graph, which stamps it anew in every replay and which it must
     * outlive. Nothing can wait for a mark: an event is one or the other. mark_time: once the
     * stream is in sync; on the clock that tie_clocks began, virtual on emu. */
    ps_status (*mark)(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
    ps_status (*mark_time)(ps_device *d, ps_event *e, uint64_t *ns, ps_err *err);
    /* Brings accelerator and CPU streams to one clock, where they have two: *now_ns is that clock
     * now, *error_ns by how much times of the two kinds may be apart. They drift: tie again after a
     * while. No stream may be busy. */
    ps_status (*tie_clocks)(ps_device *d, uint64_t *now_ns, uint64_t *error_ns, ps_err *err);

    /* `flag` is a 4-byte word of locked memory. wait ends when the word equals `value` or the abort
     * word is set. */
    ps_status (*flag_set)(ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err);
    ps_status (*flag_wait)(ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err);

    /* Between begin and end, what is enqueued on `s` and on accelerator streams that wait for its
     * events is recorded, not run. Every such stream must be joined back into `s` before end. CPU
     * streams are never captured. After a failed enqueue end must still be called: it returns the
     * failure and leaves *out NULL. */
    ps_status (*graph_begin)(ps_device *d, ps_stream *s, ps_err *err);
    ps_status (*graph_end)(ps_device *d, ps_stream *s, ps_graph **out, ps_err *err);
    ps_status (*graph_launch)(ps_device *d, ps_stream *s, ps_graph *g, ps_err *err);
    void (*graph_destroy)(ps_device *d, ps_graph *g);

    /* Sets or clears the abort word that launches and flag waits on every stream look at. Any
     * thread. */
    void (*set_abort)(ps_device *d, uint32_t value);
} ps_device_vtable;

struct ps_device {
    const ps_device_vtable *v;
    ps_device_info info;
};

/* `kind`: "host", "emu", "cuda" or "cuda:N". PS_EDEVICE with a sentence that says what to install
 * where there is no such device; ps_device_cuda_available() asks without failing and says why not.
 */
ps_status ps_device_open(
    const char *kind, const ps_device_options *options, ps_device **out, ps_err *err);
/* How many threads compute on the CPU where the caller leaves it open. Beside a GPU not one on each
 * CPU: the engine's thread and the driver's run too, and a thread of the pool that loses its CPU
 * keeps all others waiting. */
int ps_device_default_threads(const char *kind);
void ps_device_close(
    ps_device *d); /* frees streams, events, graphs and memory that are still there; NULL allowed */
bool ps_device_cuda_available(char *why, size_t cap_why);

/* ---- checked calls: what everyone above device/ uses. Same meaning as the vtable entries, with
 * the argument checks (null streams, zero sizes, roles) that are the same on every device. ---- */
ps_status ps_device_mem_info(
    ps_device *d, uint64_t *free_bytes, uint64_t *total_bytes, ps_err *err);
ps_status ps_device_alloc(ps_device *d, uint64_t n_bytes, ps_dptr *out, ps_err *err);
void ps_device_free(ps_device *d, ps_dptr p);
ps_status ps_device_locked_alloc(ps_device *d, uint64_t n_bytes, void **out, ps_err *err);
void ps_device_locked_free(ps_device *d, void *p);
ps_status ps_device_lock(ps_device *d, void *p, uint64_t n_bytes, ps_err *err);
void ps_device_unlock(ps_device *d, void *p);
ps_status ps_device_locked_dptr(ps_device *d, const void *locked, ps_dptr *out, ps_err *err);
ps_status ps_stream_create(ps_device *d, ps_stream_role role, ps_stream **out, ps_err *err);
void ps_stream_destroy(ps_device *d, ps_stream *s);
ps_status ps_event_create(ps_device *d, ps_event **out, ps_err *err);
void ps_event_destroy(ps_device *d, ps_event *e);
ps_status ps_device_copy_in(
    ps_device *d, ps_stream *s, ps_dptr dst, const void *src, uint64_t n_bytes, ps_err *err);
ps_status ps_device_copy_out(
    ps_device *d, ps_stream *s, void *dst, ps_dptr src, uint64_t n_bytes, ps_err *err);
ps_status ps_device_run(ps_device *d, ps_stream *s, ps_launcher fn, const void *args,
    uint32_t args_bytes, const ps_cost *cost, ps_err *err);
ps_status ps_device_record(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_device_wait(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_device_sync(ps_device *d, ps_stream *s, ps_err *err);
bool ps_stream_idle(ps_device *d, ps_stream *s);
ps_status ps_device_elapsed(ps_device *d, ps_event *from, ps_event *to, uint64_t *ns, ps_err *err);
uint64_t ps_stream_time_ns(ps_device *d, ps_stream *s);
ps_status ps_device_mark(ps_device *d, ps_stream *s, ps_event *e, ps_err *err);
ps_status ps_device_mark_time(ps_device *d, ps_event *e, uint64_t *ns, ps_err *err);
ps_status ps_device_tie_clocks(ps_device *d, uint64_t *now_ns, uint64_t *error_ns, ps_err *err);
ps_status ps_device_flag_set(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err);
ps_status ps_device_flag_wait(
    ps_device *d, ps_stream *s, uint32_t *flag, uint32_t value, ps_err *err);
ps_status ps_graph_begin(ps_device *d, ps_stream *s, ps_err *err);
ps_status ps_graph_end(ps_device *d, ps_stream *s, ps_graph **out, ps_err *err);
ps_status ps_graph_launch(ps_device *d, ps_stream *s, ps_graph *g, ps_err *err);
void ps_graph_destroy(ps_device *d, ps_graph *g);
void ps_device_set_abort(ps_device *d, uint32_t value);

#ifdef __cplusplus
}
#endif
#endif
