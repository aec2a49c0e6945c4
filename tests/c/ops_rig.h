/* ops_rig - one call of one op, and the running of it on a device: host copies of every operand,
 * guard bytes around each one's device copy, pointer tables of experts, and the comparison of
 * results.
 *
 * Not here: which calls (ops_cases.h), what the right answer is (ops_eval.h, the reference table).
 * Threads: the test's thread. A CUDA test includes this as it is and opens "cuda" instead of
 * "host".
 */
#ifndef OPS_RIG_H
#define OPS_RIG_H

#include "ps_test.h"

#include "device/ps_device.h"
#include "kernels/ps_ops.h"

enum {
    OPS_MAX_BUFS = 24,
    OPS_GUARD_BYTES = 256, /* keeps the alignment that arenas give */
    OPS_NO_FIELD = UINT16_MAX,
};

typedef enum ops_content { OPS_F32, OPS_I32, OPS_CACHE, OPS_OPAQUE, OPS_PTRS } ops_content;

typedef struct ops_buf {
    uint16_t field;      /* offset of the ps_dptr in the arguments, or OPS_NO_FIELD */
    ops_content content; /* OPS_PTRS: host holds int64 byte offsets into buffer `target`, -1 for
                            null; `got` of an output, what ops_name_ptrs makes of it */
    uint8_t *host;       /* owns: initial bytes */
    uint8_t *got;        /* owns: bytes after the run */
    uint64_t n_bytes;
    uint32_t target;
    uint32_t row, ld, fmt; /* outputs: row length and stride in floats; format of a cache */
    bool is_out;
} ops_buf;

/* A second field that points into a buffer: in-place calls, gate and up side by side. */
typedef struct ops_alias {
    uint16_t field;
    uint32_t buf;
    uint64_t offset_bytes;
} ops_alias;

typedef struct ops_call {
    char name[128];
    ps_op_kind kind;
    ps_op_args args;
    uint32_t n_bufs, n_aliases;
    ops_buf buf[OPS_MAX_BUFS];
    ops_alias alias[4];
    double nmse;     /* how far from the reference a variant may be; the class says why */
    double nmse_cpu; /* the same on CPUs, which keep floats where GPUs take 16 bits; 0: as nmse */
} ops_call;

static inline uint64_t ops_seed(const char *name)
{
    return ps_hash64(name, strlen(name));
}

static inline uint32_t ops_add_buf(
    ops_call *c, uint16_t field, ops_content content, uint64_t n_bytes, bool is_out)
{
    ops_buf *b = &c->buf[c->n_bufs];
    *b = (ops_buf){.field = field, .content = content, .n_bytes = n_bytes, .is_out = is_out};
    b->host = ps_alloc(n_bytes, 1);
    b->got = ps_alloc(n_bytes, 1);
    if (b->host == NULL || b->got == NULL) {
        printf("out of memory in a test\n");
        exit(2);
    }
    return c->n_bufs++;
}

static inline void ops_add_alias(ops_call *c, uint16_t field, uint32_t buf, uint64_t offset_bytes)
{
    c->alias[c->n_aliases++] = (ops_alias){field, buf, offset_bytes};
}

static inline void ops_call_fini(ops_call *c)
{
    for (uint32_t i = 0; i < c->n_bufs; i++) {
        ps_free(c->buf[i].host);
        ps_free(c->buf[i].got);
    }
    c->n_bufs = c->n_aliases = 0;
}

static inline ops_buf *ops_find(ops_call *c, size_t field)
{
    for (uint32_t i = 0; i < c->n_bufs; i++)
        if (c->buf[i].field == field) return &c->buf[i];
    return NULL;
}

static inline void ops_set_field(ops_call *c, uint16_t field, ps_dptr p)
{
    if (field != OPS_NO_FIELD) memcpy((char *)&c->args + field, &p, sizeof p);
}

/* Points every field at `base[i]` for buffer i, and says what a pointer table holds there. */
static inline void ops_bind(ops_call *c, const ps_dptr *base)
{
    for (uint32_t i = 0; i < c->n_bufs; i++) ops_set_field(c, c->buf[i].field, base[i]);
    for (uint32_t i = 0; i < c->n_aliases; i++) {
        const ops_alias *a = &c->alias[i];
        ops_set_field(c, a->field, ps_dptr_add(base[a->buf], a->offset_bytes));
    }
}

static inline void ops_fill_ptrs(const ops_buf *b, const ps_dptr *base, uint8_t *out)
{
    for (uint64_t i = 0; i < b->n_bytes / 8; i++) {
        int64_t offset;
        memcpy(&offset, b->host + 8 * i, 8);
        ps_dptr p = offset < 0 ? (ps_dptr){0} : ps_dptr_add(base[b->target], (uint64_t)offset);
        memcpy(out + 8 * i, &p, 8);
    }
}

/* Addresses that a call has written, as what they mean: buffer and offset, -1 for null, -2 for
 * nothing of this call. So results of several devices compare. */
static inline void ops_name_ptrs(ops_call *c, const ps_dptr *base)
{
    for (uint32_t i = 0; i < c->n_bufs; i++) {
        if (!c->buf[i].is_out || c->buf[i].content != OPS_PTRS) continue;
        for (uint64_t at = 0; at < c->buf[i].n_bytes; at += 8) {
            ps_dptr p;
            memcpy(&p, c->buf[i].got + at, 8);
            int64_t name = ps_dptr_is_null(p) ? -1 : -2;
            for (uint32_t j = 0; j < c->n_bufs && name == -2; j++)
                if (p.a - base[j].a < c->buf[j].n_bytes)
                    name = (int64_t)j << 48 | (int64_t)(p.a - base[j].a);
            memcpy(c->buf[i].got + at, &name, 8);
        }
    }
}

/* ---- the reference, in this process ---- */

/* Copies every operand to `got` and points the fields there: for code that computes in this
 * process. */
static inline void ops_bind_host(ops_call *c)
{
    ps_dptr base[OPS_MAX_BUFS];
    for (uint32_t i = 0; i < c->n_bufs; i++)
        base[i] = (ps_dptr){(uint64_t)(uintptr_t)c->buf[i].got};
    for (uint32_t i = 0; i < c->n_bufs; i++) {
        if (c->buf[i].content == OPS_PTRS)
            ops_fill_ptrs(&c->buf[i], base, c->buf[i].got);
        else
            memcpy(c->buf[i].got, c->buf[i].host, c->buf[i].n_bytes);
    }
    ops_bind(c, base);
}

static inline void ops_name_host_ptrs(ops_call *c)
{
    ps_dptr base[OPS_MAX_BUFS];
    for (uint32_t i = 0; i < c->n_bufs; i++)
        base[i] = (ps_dptr){(uint64_t)(uintptr_t)c->buf[i].got};
    ops_name_ptrs(c, base);
}

/* Runs the reference launcher on one thread; results are left in `got`. */
static inline ps_status ops_run_ref(ops_call *c)
{
    ops_bind_host(c);
    const uint64_t scratch_bytes = 4 << 20;
    ps_launch launch = {.scratch = ps_alloc(scratch_bytes, 1), .scratch_bytes = scratch_bytes};
    ps_status status = ps_cpu_ops("ref")->op[c->kind](&launch, &c->args);
    ops_name_host_ptrs(c);
    ps_free(launch.scratch);
    return status;
}

/* ---- a device ---- */

typedef struct ops_rig {
    char name[64]; /* "host:avx2:2" */
    const ps_op_table *table;
    ps_device *device;
    ps_stream *stream;   /* the one whose ops have a pool: CPU on the host, else COMPUTE */
    ps_stream *in, *out; /* copies; every use ends with a sync, so no events are needed */
    uint8_t *staging;    /* locked */
    uint64_t staging_bytes;
} ops_rig;

static inline void ops_rig_close(ops_rig *r)
{
    if (r->device != NULL) {
        ps_device_locked_free(r->device, r->staging);
        ps_stream_destroy(r->device, r->stream);
        ps_stream_destroy(r->device, r->in);
        ps_stream_destroy(r->device, r->out);
        ps_device_close(r->device);
    }
    *r = (ops_rig){0};
}

/* `variant` NULL: the CUDA table. */
static inline ps_status ops_rig_open(
    ops_rig *r, const char *device, const char *variant, int threads, ps_err *err)
{
    const ps_cpu_bounds bounds = {.max_cols = 16384,
        .max_tok = 512,
        .max_rows = 4096,
        .max_ctx = 8192,
        .max_head_dim = 256,
        .n_head = 64,
        .threads = (uint32_t)threads};
    *r = (ops_rig){.table = variant != NULL ? ps_cpu_ops(variant) : ps_cuda_ops()};
    snprintf(
        r->name, sizeof r->name, "%s:%s:%d", device, variant != NULL ? variant : "cuda", threads);
    ps_device_options options = {.threads = threads,
        .cpu_ops = r->table,
        .cpu_scratch_bytes = ps_cpu_scratch_bytes(&bounds)};
    ps_status status = ps_device_open(device, &options, &r->device, err);
    if (status != PS_OK) return status;
    const bool on_host = r->device->info.kind == PS_DEVICE_HOST;
    status =
        ps_stream_create(r->device, on_host ? PS_STREAM_CPU : PS_STREAM_COMPUTE, &r->stream, err);
    if (status == PS_OK) status = ps_stream_create(r->device, PS_STREAM_H2D, &r->in, err);
    if (status == PS_OK) status = ps_stream_create(r->device, PS_STREAM_D2H, &r->out, err);
    r->staging_bytes = 256ull << 20; /* address space; pages are taken as they are touched */
    if (status == PS_OK)
        status = ps_device_locked_alloc(r->device, r->staging_bytes, (void **)&r->staging, err);
    if (status != PS_OK) ops_rig_close(r);
    return status;
}

static inline ps_status ops_rig_copy(
    ops_rig *r, ps_dptr dev, uint8_t *host, uint64_t n_bytes, bool in, ps_err *err)
{
    ps_status status = PS_OK;
    for (uint64_t at = 0; at < n_bytes && status == PS_OK; at += r->staging_bytes) {
        const uint64_t n = ps_min_u64(n_bytes - at, r->staging_bytes);
        if (in) memcpy(r->staging, host + at, n);
        const ps_dptr at_dev = ps_dptr_add(dev, at);
        status = in ? ps_device_copy_in(r->device, r->in, at_dev, r->staging, n, err)
                    : ps_device_copy_out(r->device, r->out, r->staging, at_dev, n, err);
        if (status == PS_OK) status = ps_device_sync(r->device, in ? r->in : r->out, err);
        if (!in && status == PS_OK) memcpy(host + at, r->staging, n);
    }
    return status;
}

/* Where the workspace goes for the ops that take one. */
static inline bool ops_ws_fields(ps_op_kind kind, size_t *ws, size_t *ws_bytes)
{
    switch (kind) {
    case PS_OP_MATMUL:
        *ws = offsetof(ps_matmul_args, ws), *ws_bytes = offsetof(ps_matmul_args, ws_bytes);
        return true;
    case PS_OP_ATTN:
        *ws = offsetof(ps_attn_args, ws), *ws_bytes = offsetof(ps_attn_args, ws_bytes);
        return true;
    case PS_OP_MOE_UP:
        *ws = offsetof(ps_moe_up_args, ws), *ws_bytes = offsetof(ps_moe_up_args, ws_bytes);
        return true;
    case PS_OP_MOE_DOWN:
        *ws = offsetof(ps_moe_down_args, ws), *ws_bytes = offsetof(ps_moe_down_args, ws_bytes);
        return true;
    default: return false;
    }
}

typedef struct ops_bound { /* a call's memory on a device */
    ps_dptr alloc[OPS_MAX_BUFS], base[OPS_MAX_BUFS], ws;
    uint64_t ws_bytes;
} ops_bound;

static inline void ops_rig_unbind(ops_rig *r, ops_bound *m)
{
    for (uint32_t i = 0; i < OPS_MAX_BUFS; i++)
        if (!ps_dptr_is_null(m->alloc[i])) ps_device_free(r->device, m->alloc[i]);
    if (!ps_dptr_is_null(m->ws)) ps_device_free(r->device, m->ws);
    *m = (ops_bound){0};
}

/* Allocates and uploads every operand with guards of 0xA5 around, and sets the fields. */
static inline ps_status ops_rig_bind(ops_rig *r, ops_call *c, ops_bound *m, ps_err *err)
{
    *m = (ops_bound){0};
    ps_status status = PS_OK;
    for (uint32_t i = 0; i < c->n_bufs && status == PS_OK; i++) {
        status =
            ps_device_alloc(r->device, c->buf[i].n_bytes + 2 * OPS_GUARD_BYTES, &m->alloc[i], err);
        m->base[i] = ps_dptr_add(m->alloc[i], OPS_GUARD_BYTES);
    }
    for (uint32_t i = 0; i < c->n_bufs && status == PS_OK; i++) {
        const ops_buf *b = &c->buf[i];
        const uint64_t n = b->n_bytes + 2 * OPS_GUARD_BYTES;
        uint8_t *image = ps_alloc(n, 1);
        if (image == NULL) return ps_fail(err, PS_ENOMEM, "out of memory in a test");
        memset(image, 0xA5, n);
        if (b->content == OPS_PTRS)
            ops_fill_ptrs(b, m->base, image + OPS_GUARD_BYTES);
        else
            memcpy(image + OPS_GUARD_BYTES, b->host, b->n_bytes);
        status = ops_rig_copy(r, m->alloc[i], image, n, true, err);
        ps_free(image);
    }
    size_t ws, ws_bytes;
    ops_bind(c, m->base);
    if (status == PS_OK && ops_ws_fields(c->kind, &ws, &ws_bytes)) {
        m->ws_bytes = ps_op_workspace_bytes(c->kind, &c->args, r->device->info.sm);
        if (m->ws_bytes > 0) status = ps_device_alloc(r->device, m->ws_bytes, &m->ws, err);
        memcpy((char *)&c->args + ws, &m->ws, sizeof m->ws);
        memcpy((char *)&c->args + ws_bytes, &m->ws_bytes, sizeof m->ws_bytes);
    }
    return status;
}

static inline ps_status ops_rig_launch(ops_rig *r, const ops_call *c, ps_err *err)
{
    const ps_cost cost = ps_op_cost(c->kind, &c->args);
    return ps_device_run(r->device, r->stream, r->table->op[c->kind], &c->args,
        ps_op_args_bytes(c->kind), &cost, err);
}

/* Downloads into `got`; checks guards, and that what is not an output is as it was. */
static inline ps_status ops_rig_collect(ops_rig *r, ops_call *c, ops_bound *m, ps_err *err)
{
    ps_status status = PS_OK;
    for (uint32_t i = 0; i < c->n_bufs && status == PS_OK; i++) {
        ops_buf *b = &c->buf[i];
        const uint64_t n = b->n_bytes + 2 * OPS_GUARD_BYTES;
        uint8_t *image = ps_alloc(n, 1);
        if (image == NULL) return ps_fail(err, PS_ENOMEM, "out of memory in a test");
        status = ops_rig_copy(r, m->alloc[i], image, n, false, err);
        for (uint32_t g = 0; g < OPS_GUARD_BYTES && status == PS_OK; g++)
            if (image[g] != 0xA5 || image[n - 1 - g] != 0xA5) {
                ps_test_fail(
                    __FILE__, __LINE__, "guard of buffer %u overwritten by %s", i, r->name);
                break;
            }
        memcpy(b->got, image + OPS_GUARD_BYTES, b->n_bytes);
        if (!b->is_out && b->content != OPS_PTRS && memcmp(b->got, b->host, b->n_bytes) != 0)
            ps_test_fail(__FILE__, __LINE__, "input buffer %u changed by %s", i, r->name);
        ps_free(image);
    }
    ops_name_ptrs(c, m->base);
    return status;
}

/* The whole of it: results in `got`. */
static inline ps_status ops_run(ops_rig *r, ops_call *c, ps_err *err)
{
    ops_bound m;
    ps_status status = ops_rig_bind(r, c, &m, err);
    if (status == PS_OK) status = ops_rig_launch(r, c, err);
    if (status == PS_OK) status = ps_device_sync(r->device, r->stream, err);
    if (status == PS_OK) status = ops_rig_collect(r, c, &m, err);
    ops_rig_unbind(r, &m);
    return status;
}

/* ---- results ---- */

typedef struct ops_result { /* what an output held: a copy of `got` of every output */
    uint8_t *bytes[OPS_MAX_BUFS];
} ops_result;

static inline ops_result ops_keep(const ops_call *c)
{
    ops_result r = {0};
    for (uint32_t i = 0; i < c->n_bufs; i++) {
        if (!c->buf[i].is_out) continue;
        r.bytes[i] = ps_alloc(c->buf[i].n_bytes, 1);
        if (r.bytes[i] != NULL) memcpy(r.bytes[i], c->buf[i].got, c->buf[i].n_bytes);
    }
    return r;
}

static inline void ops_result_fini(ops_result *r)
{
    for (uint32_t i = 0; i < OPS_MAX_BUFS; i++) ps_free(r->bytes[i]);
    *r = (ops_result){0};
}

static inline void ops_check_same_bits(const ops_call *c, const ops_result *want, const char *what)
{
    for (uint32_t i = 0; i < c->n_bufs; i++)
        if (c->buf[i].is_out && memcmp(c->buf[i].got, want->bytes[i], c->buf[i].n_bytes) != 0)
            ps_test_fail(__FILE__, __LINE__, "bits of buffer %u differ: %s", i, what);
}

/* Row by row, so that a row of small numbers counts as much as one of big ones: the mean of the
 * rows' NMSE is at most `nmse`, and no element is off by more than 8 sigma of that, which a
 * misplaced or missing term always is. */
static inline void ops_check_close(const float *got, const float *want, uint64_t n_floats,
    uint64_t row, uint64_t ld, double nmse, const char *who)
{
    double total = 0, worst = 0;
    uint64_t n_rows = 0;
    for (uint64_t at = 0; at + row <= n_floats; at += ld, n_rows++) {
        double err = 0, ref = 1e-60, max = 0;
        for (uint64_t i = at; i < at + row; i++) {
            const double d = (double)got[i] - (double)want[i];
            if (got[i] == want[i]) continue; /* infinities too */
            err += d * d;
            max = fabs(d) <= max ? max : fabs(d); /* NaN stays */
        }
        for (uint64_t i = at; i < at + row; i++)
            if (isfinite(want[i])) ref += (double)want[i] * (double)want[i];
        total += err / ref;
        worst = max / sqrt(ref / (double)row) <= worst ? worst : max / sqrt(ref / (double)row);
        for (uint64_t i = at + row; i < at + ld && i < n_floats; i++)
            if (memcmp(&got[i], &want[i], sizeof(float)) != 0) {
                ps_test_fail(
                    __FILE__, __LINE__, "%s wrote between rows, at float %" PRIu64, who, i);
                return;
            }
    }
    total /= (double)(n_rows > 0 ? n_rows : 1);
    if (!(total <= nmse) || !(worst <= 8 * sqrt(nmse)))
        ps_test_fail(__FILE__, __LINE__, "%s: NMSE %.3g, worst %.3g of the RMS; bar %.3g", who,
            total, worst, nmse);
}

static inline void ops_check_cache(
    const ops_buf *b, const uint8_t *want, double nmse, const char *who)
{
    /* One rounding to the cache's format may fall the other way where the float before it differs
     * in its last bit. */
    nmse = fmax(nmse, b->fmt == PS_FMT_F16 ? 1e-7 : 1e-5);
    const ps_fmt_info *f = ps_fmt_get(b->fmt);
    const uint64_t n = b->n_bytes / f->block_bytes * f->block_elems;
    float *x = ps_alloc(n, sizeof *x), *y = ps_alloc(n, sizeof *y);
    if (x != NULL && y != NULL) {
        ps_dequant_row((ps_fmt)b->fmt, b->got, x, n);
        ps_dequant_row((ps_fmt)b->fmt, want, y, n);
        ops_check_close(x, y, n, b->row, b->row, nmse, who);
    }
    ps_free(x);
    ps_free(y);
}

/* Every output of the call against `want` (from the reference). */
static inline void ops_check_result(
    const ops_call *c, const ops_result *want, double nmse, const char *who)
{
    for (uint32_t i = 0; i < c->n_bufs; i++) {
        const ops_buf *b = &c->buf[i];
        if (!b->is_out) continue;
        if (b->content == OPS_F32)
            ops_check_close((const float *)b->got, (const float *)want->bytes[i], b->n_bytes / 4,
                b->row, b->ld, nmse, who);
        else if (b->content == OPS_CACHE)
            ops_check_cache(b, want->bytes[i], nmse, who);
        else if (memcmp(b->got, want->bytes[i], b->n_bytes) != 0)
            ps_test_fail(__FILE__, __LINE__, "%s: integers of buffer %u differ", who, i);
    }
}

#endif
