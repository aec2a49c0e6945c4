/* ps_profile - measures a machine for a model: how long the very ops take that its passes are made
 * of, on the accelerator and on the CPU, what the bus carries, what they cost each other, and what
 * takes time whatever its size. From the model's geometry alone: weights are random blocks.
 *
 * Not here: what follows from the times (cost models, in Python), where they are kept (Python).
 * Threads: one thread drives a measurement and the device, which does nothing else meanwhile.
 *
 * All times are the device's: on `emu` those of its virtual clock. Whatever fails, nothing that was
 * taken is kept and the device is idle.
 */
#ifndef PS_PROFILE_H
#define PS_PROFILE_H

#include "engine/ps_model.h"

typedef enum ps_sample_side {
    PS_SAMPLE_GPU,
    PS_SAMPLE_CPU,
    PS_SAMPLE_H2D,
    PS_SAMPLE_D2H,
    PS_SAMPLE_FIXED,
    PS_SAMPLE_SIDE_COUNT
} ps_sample_side;
const char *ps_sample_side_name(ps_sample_side side); /* "gpu", "cpu", "h2d", "d2h", "fixed" */

typedef enum ps_sample_load { /* what else ran */
    PS_LOAD_IDLE,
    PS_LOAD_H2D,
    PS_LOAD_D2H,
    PS_LOAD_CPU,
    PS_LOAD_GATHER, /* the accelerator, reading host memory */
    PS_LOAD_COUNT
} ps_sample_load;
const char *ps_sample_load_name(ps_sample_load kind); /* "idle", "h2d", "d2h", "cpu", "gather" */

/* One thing that was timed. `op`:
 *   gpu, cpu  ps_op_name of what ran back to back, so that on a GPU the gap behind it is included
 *   h2d, d2h  "copy", of several in a row; h2d also "gather": the op that gathers experts from
 *             locked memory, or in models without, one that reads its weights there; and attention
 *             and ops on experts by their names, with their cache or their weights there
 *   fixed     "flag": half of a round trip between GPU and CPU; "launch" and "copy": the engine's
 *             thread enqueues one; "pass": to start one and to wait for its end, beside its ops;
 *             "graph_node": what an op of one token takes beyond its sample because in a pass
 *             another op ran before it.
 * Ops of few tokens run in graphs, as in passes. What bus and CPU cost each other is measured with
 * both reading the same memory, as they do in passes; not on a virtual clock. */
typedef struct ps_sample {
    ps_sample_side side;
    const char *op; /* constant */
    int32_t fmt;    /* ps_fmt of weights or cache; -1: none */
    uint32_t n_tok; /* rows that the op works on */
    uint64_t flops, bytes;
    double seconds;   /* median */
    uint32_t threads; /* of the CPU that worked, as itself or as load; else 0 */
    ps_sample_load load;
    bool extrapolated; /* a part of it ran, in two sizes, and the line through them was followed */
} ps_sample;

typedef struct ps_profile {
    ps_sample *samples; /* owns */
    uint32_t n_samples, cap_samples;
} ps_profile;

typedef struct ps_profile_spec {
    const ps_op_table *cpu_ops, *dev_ops; /* borrows; as in ps_exec_options */
    uint32_t threads; /* of the CPU: all, a half and one are timed; 0: the default of the device */
    uint32_t max_tok; /* of passes; 0: 2048. No more than the device has CPU scratch for */
    uint32_t max_kv;  /* of attention; 0: 8192. Likewise */
    uint64_t device_bytes, host_bytes; /* most memory to take; 0: 256 MiB, and up to 4 GiB */
    uint64_t limit_ns; /* real time to stay within; 0: 11 s. What is left decides how much of each
                          op runs, so less time makes a rougher profile, not a smaller one */
    ps_progress_fn progress; /* of steps, about every 50 ms; false cancels; may be NULL */
    void *ctx;
} ps_profile_spec;

enum { PS_PROFILE_MAX_TOK = 2048, PS_PROFILE_MAX_KV = 16384 };

/* On `host` samples of the CPU alone. PS_EDEVICE where the device refuses something, PS_ENOMEM,
 * PS_ECANCELLED. `out` is overwritten; empty on failure. */
ps_status ps_profile_measure(const ps_model *model, ps_device *device, const ps_profile_spec *spec,
    ps_profile *out, ps_err *err);
void ps_profile_fini(ps_profile *profile); /* a zeroed one is allowed */

#endif
