/* ps_cuda_matvec - decode: weights times up to 8 vectors, for plain matrices and for experts. Bound
 * by reading the weights once: floor = bytes / 4.3 TB/s on an H200 (measured copy bandwidth), e.g.
 * 4096 x 11520 F16 22 us, the 8 routed experts of a Qwen3-30B-A3B layer (21 MB Q4_0) 5 us; below
 * some 10 MB launch and latency rule, about 3 us.
 *
 * Not here: which calls come here (ps_cuda_paths.h).
 * Threads: launchers on the engine's thread.
 *
 * A warp takes tasks of two rows (PAIR: a gate row and its up row), so that inputs are fetched once
 * for both. Every lane sums its own columns in a fixed order and lanes are joined by a butterfly,
 * so a row's bits depend on nothing but its weights and inputs.
 *
 * Quantised weights: a warp streams segments of 1024 columns of its two rows through a private ring
 * in shared memory by asynchronous 16-byte copies (blocks of 18 or 34 bytes cannot be loaded as
 * such), three or four segments ahead; each lane then takes one run of 32 weights. Inputs are
 * rounded to 8 bits in runs of 32, once a block, while the first segments are on their way: 4
 * multiply-adds an instruction, and llama.cpp's bar on error is met by construction. Float weights:
 * each lane loads 16 bytes at a time; inputs stay float32.
 */
#include "kernels/ps_cuda_fmt.cuh"
#include "kernels/ps_cuda_inner.h"

enum { MATVEC_THREADS = PS_CUDA_MATVEC_WARPS * 32 };

/* ---- what both kernels share ---- */

typedef struct task_rows {
    const uint8_t *w0, *w1;
} task_rows;

PS_DEVICE uint32_t part_of(const ps_rows &r, uint32_t task)
{
    return (r.n_parts > 1 && task >= r.part[1].first) + (r.n_parts > 2 && task >= r.part[2].first);
}

/* An odd last row is computed twice and stored once. */
PS_DEVICE task_rows rows_of_task(
    const ps_matvec_params &p, const uint8_t *w0, const uint8_t *w1, uint32_t task)
{
    task_rows t;
    uint32_t row = 2 * task, n_rows = p.rows.n_rows;
    if (p.rows.mode == PS_ROWS_PAIR) {
        t.w0 = w0 + task * p.row_bytes;
        t.w1 = w1 + task * p.row_bytes;
        return t;
    }
    if (p.rows.mode == PS_ROWS_PARTS) {
        const ps_rows_part &part = p.rows.part[part_of(p.rows, task)];
        row = 2 * (task - part.first);
        n_rows = part.n_rows;
        w0 = part.w;
    }
    t.w0 = w0 + row * p.row_bytes;
    t.w1 = row + 1 < n_rows ? t.w0 + p.row_bytes : t.w0;
    return t;
}

/* The sums of rows 0 and 1 of a task for token t, which all lanes hold; lane 0 stores. */
PS_DEVICE void store_task(const ps_matvec_params &p, uint32_t task, uint32_t t, uint32_t expert,
    uint32_t assign, float s0, float s1)
{
    const ps_rows &r = p.rows;
    if (r.mode == PS_ROWS_PAIR) {
        const uint64_t b = (uint64_t)expert * r.n_rows + task;
        if (r.bias0 != NULL) s0 += r.bias0[b];
        if (r.bias1 != NULL) s1 += r.bias1[b];
        r.out[(uint64_t)assign * r.n_rows + task] = ps_activate(r.act, s0, s1);
        return;
    }
    const ps_rows_part *part = &r.part[r.mode == PS_ROWS_PARTS ? part_of(r, task) : 0];
    const bool plain = r.mode == PS_ROWS_PARTS;
    const uint32_t row = plain ? 2 * (task - part->first) : 2 * task;
    const bool both = row + 1 < (plain ? part->n_rows : r.n_rows);
    const float *bias = plain ? part->bias : r.bias0;
    float *y = plain ? part->y + (uint64_t)t * part->ldy : r.out + (uint64_t)assign * r.n_rows;
    if (bias != NULL) {
        bias += plain ? 0 : (uint64_t)expert * r.n_rows;
        s0 += bias[row];
        if (both) s1 += bias[row + 1];
    }
    y[row] = r.add ? y[row] + s0 : s0;
    if (both) y[row + 1] = r.add ? y[row + 1] + s1 : s1;
}

template <int NT>
PS_DEVICE void finish_task(const ps_matvec_params &p, uint32_t task, uint32_t expert,
    uint32_t assign, const float (&sum)[2][NT])
{
    float s0[NT], s1[NT];
#pragma unroll
    for (int t = 0; t < NT; t++) {
        s0[t] = ps_warp_sum(sum[0][t]);
        s1[t] = ps_warp_sum(sum[1][t]);
    }
#pragma unroll
    for (int t = 0; t < NT; t++) /* one lane a token, so that stores overlap */
        if (threadIdx.x % 32 == t && t < p.n_tok)
            store_task(p, task, t, expert, assign, s0[t], s1[t]);
}

/* The experts' matrices of this block; false where the expert is not on this side. */
PS_DEVICE bool find_expert(const ps_matvec_params &p, uint32_t assign, uint32_t *expert,
    const uint8_t **w0, const uint8_t **w1)
{
    const uint32_t e = (uint32_t)p.rows.ids[assign];
    *expert = e;
    *w0 = (const uint8_t *)p.rows.w0[e];
    *w1 = p.rows.mode == PS_ROWS_PAIR ? (const uint8_t *)p.rows.w1[e] : NULL;
    return *w0 != NULL && (p.rows.mode != PS_ROWS_PAIR || *w1 != NULL);
}

/* Weights of plain matrices are known before the kernel may read its inputs: ask the L2 for the
 * first of them. Only the L2: a slot may still be on its way from the host, which a register would
 * miss. */
PS_DEVICE void prefetch_task(const ps_matvec_params &p, uint32_t task)
{
    if (p.rows.mode != PS_ROWS_PARTS || task >= p.n_tasks) return;
    const task_rows t = rows_of_task(p, NULL, NULL, task);
    const uint64_t at = threadIdx.x % 32 * 128;
    if (at < p.row_bytes) {
        ps_prefetch_l2(t.w0 + at);
        ps_prefetch_l2(t.w1 + at);
    }
}

/* ---- quantised weights ---- */

/* Inputs in shared memory, runs of 32 columns side by side: the first 16 bytes of all, the second
 * 16 bytes of all, then scale and sums of all. A warp reads each without bank conflicts. */
typedef struct q8_smem {
    int4 *lo, *hi; /* [NT][n_runs] */
    int2 *meta;    /* bits of the scale; sums of the first and second 16 in its halves */
} q8_smem;

/* A thread rounds 8 columns, four threads a run. All lanes of a warp stay together for the
 * shuffles. */
template <int NT> PS_DEVICE void round_inputs(const ps_matvec_params &p, const float *x, q8_smem s)
{
    const uint32_t n_runs = p.n_cols / 32, n = NT * n_runs, part = threadIdx.x % 4;
    for (uint32_t warp_first = threadIdx.x / 32 * 8; warp_first < n;
         warp_first += MATVEC_THREADS / 4) {
        const uint32_t i = warp_first + threadIdx.x % 32 / 4, t = i / n_runs;
        float v[8] = {};
        if (i < n && t < p.n_tok) {
            const float *from = x + (uint64_t)t * p.ldx + (i - t * n_runs) * 32 + part * 8;
            if (p.x_aligned) {
                const float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
                v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
                v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
            } else {
#pragma unroll
                for (int c = 0; c < 8; c++) v[c] = from[c];
            }
        }
        float max = 0.0f;
#pragma unroll
        for (int c = 0; c < 8; c++) max = fmaxf(max, fabsf(v[c]));
        max = fmaxf(max, __shfl_xor_sync(PS_FULL_WARP, max, 1));
        max = fmaxf(max, __shfl_xor_sync(PS_FULL_WARP, max, 2));
        const float inverse = max > 1e-30f ? 127.0f / max : 0.0f; /* below: as good as zero */
        uint32_t words[2] = {0, 0};
        int sum = 0;
#pragma unroll
        for (int c = 0; c < 8; c++) {
            const int q = __float2int_rn(v[c] * inverse);
            sum += q;
            words[c / 4] |= (uint32_t)(q & 255) << (c % 4 * 8);
        }
        sum += __shfl_xor_sync(PS_FULL_WARP, sum, 1);
        const int other = __shfl_xor_sync(PS_FULL_WARP, sum, 2);
        if (i >= n) continue;
        *(uint2 *)((uint8_t *)((part < 2 ? s.lo : s.hi) + i) + part % 2 * 8) =
            make_uint2(words[0], words[1]);
        if (part == 0)
            s.meta[i] = make_int2(__float_as_int(inverse > 0.0f ? max / 127.0f : 0.0f),
                (sum & 0xffff) | (int)((uint32_t)other << 16));
    }
}

/* Sum of 32 weights times 32 rounded inputs, short of the inputs' scale. */
template <int F>
PS_DEVICE float dot32(const ps_w16 &a, const ps_w16 &b, int4 lo, int4 hi, int2 meta)
{
    const int sum_lo = (int)(int16_t)(meta.y & 0xffff), sum_hi = meta.y >> 16;
    int i = -ps_zero<F>() * sum_lo, j = -ps_zero<F>() * sum_hi;
    i = __dp4a((int)a.q[0], lo.x, i), i = __dp4a((int)a.q[1], lo.y, i);
    i = __dp4a((int)a.q[2], lo.z, i), i = __dp4a((int)a.q[3], lo.w, i);
    j = __dp4a((int)b.q[0], hi.x, j), j = __dp4a((int)b.q[1], hi.y, j);
    j = __dp4a((int)b.q[2], hi.z, j), j = __dp4a((int)b.q[3], hi.w, j);
    float v;
    if constexpr (ps_group_elems<F>() == 32) {
        v = a.d * (float)(i + j);
        if constexpr (ps_has_min<F>()) v = fmaf(a.m, (float)(sum_lo + sum_hi), v);
    } else {
        v = fmaf(a.d, (float)i, b.d * (float)j);
        if constexpr (ps_has_min<F>()) v = fmaf(a.m, (float)sum_lo, fmaf(b.m, (float)sum_hi, v));
    }
    return v;
}

/* A warp's place in its sequence of segments. */
typedef struct seg_cursor {
    uint32_t task, seg;
    task_rows rows;
} seg_cursor;

PS_DEVICE void advance(
    const ps_matvec_params &p, const uint8_t *w0, const uint8_t *w1, uint32_t n_segs, seg_cursor *c)
{
    if (++c->seg < n_segs) return;
    c->seg = 0;
    c->task += gridDim.x * PS_CUDA_MATVEC_WARPS;
    if (c->task < p.n_tasks) c->rows = rows_of_task(p, w0, w1, c->task);
}

/* Bytes [at, at + n) of a row into `slot`, whose first byte stands for the multiple of 16 at or
 * below. Bytes before `at` belong to the same allocation, which is 16-byte aligned; none behind it
 * are read. */
PS_DEVICE void copy_segment(uint8_t *slot, const uint8_t *at, uint32_t n)
{
    const uint32_t phase = (uint32_t)((uintptr_t)at & 15), n_bytes = phase + n;
    const uint8_t *from = at - phase;
    for (uint32_t i = threadIdx.x % 32 * 16; i < n_bytes; i += 512)
        ps_copy16(slot + i, from + i, n_bytes - i < 16 ? n_bytes - i : 16);
}

/* Grid: x over tasks (in strides), y over assignments of experts. Shared memory: the rings, then
 * the inputs. */
template <int F, int NT>
__global__ void __launch_bounds__(MATVEC_THREADS, NT == 1   ? 3
                                                  : NT == 4 ? 2
                                                            : 1)
    k_matvec_q(const __grid_constant__ ps_matvec_params p)
{
    constexpr int ELEMS = ps_block_elems<F>(), BYTES = ps_block_bytes<F>(), RUNS = ELEMS / 32;
    constexpr int PITCH = PS_CUDA_SEG_PITCH(ELEMS, BYTES),
                  STAGES = PS_CUDA_SEG_STAGES(ELEMS, BYTES);
    constexpr uint32_t SEG_BYTES = PS_CUDA_SEG_COLS / ELEMS * BYTES;
    PS_DYNAMIC_SMEM(smem);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_runs = p.n_cols / 32;
    const uint32_t first = blockIdx.x * PS_CUDA_MATVEC_WARPS + warp;
    const uint32_t n_segs = (p.n_cols + PS_CUDA_SEG_COLS - 1) / PS_CUDA_SEG_COLS;
    const bool experts = p.rows.mode != PS_ROWS_PARTS;
    const uint32_t assign = p.first_assign + blockIdx.y;
    prefetch_task(p, first);
    ps_dep_wait();
    uint32_t expert = 0;
    const uint8_t *w0 = NULL, *w1 = NULL;
    if (experts && !find_expert(p, assign, &expert, &w0, &w1)) return;

    uint8_t *ring = smem + warp * (STAGES * 2 * PITCH);
    seg_cursor load = {first, 0, {NULL, NULL}};
    if (first < p.n_tasks) load.rows = rows_of_task(p, w0, w1, first);
    seg_cursor at = load;
    /* Copies segment `load` into slot i % STAGES and goes on; an empty group past the end keeps the
     * count. */
#define LOAD_NEXT(i)                                                                               \
    do {                                                                                           \
        if (load.task < p.n_tasks) {                                                               \
            const uint64_t from = (uint64_t)load.seg * SEG_BYTES;                                  \
            const uint32_t n =                                                                     \
                (uint32_t)(p.row_bytes - from < SEG_BYTES ? p.row_bytes - from : SEG_BYTES);       \
            uint8_t *slot = ring + (i) % STAGES * (2 * PITCH);                                     \
            copy_segment(slot, load.rows.w0 + from, n);                                            \
            copy_segment(slot + PITCH, load.rows.w1 + from, n);                                    \
            advance(p, w0, w1, n_segs, &load);                                                     \
        }                                                                                          \
        ps_copy_commit();                                                                          \
    } while (0)
    for (uint32_t i = 0; i < STAGES - 1; i++) LOAD_NEXT(i);

    q8_smem x;
    x.lo = (int4 *)(smem + PS_CUDA_MATVEC_WARPS * STAGES * 2 * PITCH);
    x.hi = x.lo + NT * n_runs;
    x.meta = (int2 *)(x.hi + NT * n_runs);
    round_inputs<NT>(p, p.x + (experts ? (uint64_t)(assign / p.rows.x_div) * p.ldx : 0), x);
    __syncthreads();

    float sum[2][NT] = {};
    for (uint32_t i = 0; at.task < p.n_tasks; i++) {
        ps_copy_wait<STAGES - 2>(); /* segment i of this lane's copies */
        __syncwarp();               /* and of the others'; slot i - 1 has been read by all */
        LOAD_NEXT(i + STAGES - 1);
        const uint32_t run = at.seg * (PS_CUDA_SEG_COLS / 32) + lane;
        if (run < n_runs) {
            const uint64_t from = (uint64_t)at.seg * SEG_BYTES;
            const uint8_t *slot = ring + i % STAGES * (2 * PITCH) + lane / RUNS * BYTES;
            const uint8_t *b0 = slot + (((uintptr_t)at.rows.w0 + from) & 15);
            const uint8_t *b1 = slot + PITCH + (((uintptr_t)at.rows.w1 + from) & 15);
            const int j = lane % RUNS * 2;
            const ps_w16 a0 = ps_unpack16<F, PS_SMEM>(b0, j),
                         a1 = ps_unpack16<F, PS_SMEM>(b0, j + 1);
            const ps_w16 c0 = ps_unpack16<F, PS_SMEM>(b1, j),
                         c1 = ps_unpack16<F, PS_SMEM>(b1, j + 1);
#pragma unroll
            for (int t = 0; t < NT; t++) {
                const int4 lo = x.lo[t * n_runs + run], hi = x.hi[t * n_runs + run];
                const int2 meta = x.meta[t * n_runs + run];
                const float d = __int_as_float(meta.x);
                sum[0][t] = fmaf(d, dot32<F>(a0, a1, lo, hi, meta), sum[0][t]);
                sum[1][t] = fmaf(d, dot32<F>(c0, c1, lo, hi, meta), sum[1][t]);
            }
        }
        const uint32_t task = at.task;
        advance(p, w0, w1, n_segs, &at);
        if (at.task == task) continue;
        finish_task<NT>(p, task, expert, assign, sum);
#pragma unroll
        for (int t = 0; t < NT; t++) sum[0][t] = sum[1][t] = 0.0f;
    }
#undef LOAD_NEXT
}

/* ---- float weights ---- */

template <int F> __host__ __device__ constexpr int ps_elem_bytes()
{
    return F == PS_FMT_F32 ? 4 : 2;
}

/* The 16 bytes of v as 4 or 8 floats. */
template <int F> PS_DEVICE void widen(uint4 v, float *w)
{
    const uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (F == PS_FMT_F32) {
            w[i] = __uint_as_float(u[i]);
        } else {
            const float2 f = F == PS_FMT_F16 ? ps_unpack_f16(u[i]) : ps_unpack_bf16(u[i]);
            w[2 * i] = f.x, w[2 * i + 1] = f.y;
        }
    }
}

template <int F> PS_DEVICE float float_weight(const uint8_t *row, uint32_t c)
{
    if constexpr (F == PS_FMT_F32) return ((const float *)row)[c];
    const uint16_t v = ((const uint16_t *)row)[c];
    return F == PS_FMT_F16 ? ps_f16(v) : __uint_as_float((uint32_t)v << 16);
}

/* Two rows times NT vectors, 16 bytes of weights a lane at a time, several such loads in flight. */
template <int F, int NT>
PS_DEVICE void dot_rows_wide(
    const ps_matvec_params &p, const float *x, task_rows rows, float (&sum)[2][NT])
{
    constexpr int WIDTH = 16 / ps_elem_bytes<F>(), UNROLL = NT == 1 ? 4 : 2;
    const uint32_t lane = threadIdx.x % 32, n = p.n_cols / WIDTH;
    for (uint32_t first = 0; first < n; first += 32 * UNROLL) {
        uint4 v0[UNROLL], v1[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const uint32_t c = first + u * 32 + lane;
            v0[u] = c < n ? ps_load_once(rows.w0 + 16ull * c) : make_uint4(0, 0, 0, 0);
            v1[u] = c < n ? ps_load_once(rows.w1 + 16ull * c) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const uint32_t c = first + u * 32 + lane;
            float w0[WIDTH], w1[WIDTH];
            widen<F>(v0[u], w0);
            widen<F>(v1[u], w1);
            if (c >= n) continue;
#pragma unroll
            for (int t = 0; t < NT; t++) {
                if (t >= p.n_tok) break;
                const float *from = x + (uint64_t)t * p.ldx + c * WIDTH;
#pragma unroll
                for (int q = 0; q < WIDTH; q += 4) {
                    const float4 f = *(const float4 *)(from + q);
                    sum[0][t] = fmaf(w0[q], f.x, sum[0][t]),
                    sum[1][t] = fmaf(w1[q], f.x, sum[1][t]);
                    sum[0][t] = fmaf(w0[q + 1], f.y, sum[0][t]),
                    sum[1][t] = fmaf(w1[q + 1], f.y, sum[1][t]);
                    sum[0][t] = fmaf(w0[q + 2], f.z, sum[0][t]),
                    sum[1][t] = fmaf(w1[q + 2], f.z, sum[1][t]);
                    sum[0][t] = fmaf(w0[q + 3], f.w, sum[0][t]),
                    sum[1][t] = fmaf(w1[q + 3], f.w, sum[1][t]);
                }
            }
        }
    }
}

/* The same one element at a time: rows that are not multiples of 16 bytes, inputs of odd strides.
 */
template <int F, int NT>
PS_DEVICE void dot_rows_narrow(
    const ps_matvec_params &p, const float *x, task_rows rows, float (&sum)[2][NT])
{
    for (uint32_t c = threadIdx.x % 32; c < p.n_cols; c += 32) {
        const float w0 = float_weight<F>(rows.w0, c), w1 = float_weight<F>(rows.w1, c);
#pragma unroll
        for (int t = 0; t < NT; t++) {
            if (t >= p.n_tok) break;
            const float f = x[(uint64_t)t * p.ldx + c];
            sum[0][t] = fmaf(w0, f, sum[0][t]), sum[1][t] = fmaf(w1, f, sum[1][t]);
        }
    }
}

template <int F, int NT>
__global__ void __launch_bounds__(MATVEC_THREADS, NT == 8 ? 2 : 3)
    k_matvec_f(const __grid_constant__ ps_matvec_params p)
{
    const uint32_t first = blockIdx.x * PS_CUDA_MATVEC_WARPS + threadIdx.x / 32;
    const uint32_t assign = p.first_assign + blockIdx.y;
    prefetch_task(p, first);
    ps_dep_wait();
    uint32_t expert = 0;
    const uint8_t *w0 = NULL, *w1 = NULL;
    const float *x = p.x;
    if (p.rows.mode != PS_ROWS_PARTS) {
        if (!find_expert(p, assign, &expert, &w0, &w1)) return;
        x += (uint64_t)(assign / p.rows.x_div) * p.ldx;
    }
    for (uint32_t task = first; task < p.n_tasks; task += gridDim.x * PS_CUDA_MATVEC_WARPS) {
        const task_rows rows = rows_of_task(p, w0, w1, task);
        float sum[2][NT] = {};
        if (p.x_aligned && p.w_aligned)
            dot_rows_wide<F, NT>(p, x, rows, sum);
        else
            dot_rows_narrow<F, NT>(p, x, rows, sum);
        finish_task<NT>(p, task, expert, assign, sum);
    }
}

/* ---- the table ---- */

typedef struct matvec_kernels {
    uint32_t fmt;
    const void *at_once[3]; /* 1, 4 and 8 tokens */
} matvec_kernels;

#define BLOCKS(F)                                                                                  \
    {                                                                                              \
        F,                                                                                         \
        {                                                                                          \
            (const void *)k_matvec_q<F, 1>, (const void *)k_matvec_q<F, 4>,                        \
                (const void *)k_matvec_q<F, 8>                                                     \
        }                                                                                          \
    }
#define FLOATS(F)                                                                                  \
    {                                                                                              \
        F,                                                                                         \
        {                                                                                          \
            (const void *)k_matvec_f<F, 1>, (const void *)k_matvec_f<F, 4>,                        \
                (const void *)k_matvec_f<F, 8>                                                     \
        }                                                                                          \
    }
static const matvec_kernels table[] = {
    FLOATS(PS_FMT_F32),
    FLOATS(PS_FMT_F16),
    FLOATS(PS_FMT_BF16),
    BLOCKS(PS_FMT_Q4_0),
    BLOCKS(PS_FMT_Q4_1),
    BLOCKS(PS_FMT_Q5_0),
    BLOCKS(PS_FMT_Q5_1),
    BLOCKS(PS_FMT_Q8_0),
    BLOCKS(PS_FMT_Q2_K),
    BLOCKS(PS_FMT_Q3_K),
    BLOCKS(PS_FMT_Q4_K),
    BLOCKS(PS_FMT_Q5_K),
    BLOCKS(PS_FMT_Q6_K),
    BLOCKS(PS_FMT_IQ4_NL),
    BLOCKS(PS_FMT_IQ4_XS),
    BLOCKS(PS_FMT_MXFP4),
};
#undef BLOCKS
#undef FLOATS

static const void *matvec_kernel(uint32_t fmt, uint32_t n_tok)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].fmt == fmt) return table[i].at_once[n_tok == 8 ? 2 : n_tok == 4 ? 1 : 0];
    return NULL;
}

/* Weights start where their blocks' alignment asks for it (16-byte bases of tensors give that). */
static bool weights_aligned(uint32_t fmt, const ps_rows *r)
{
    const uint64_t block = ps_fmt_get(fmt)->block_bytes,
                   align = block % 16 == 0 ? 16 : block & (0 - block);
    for (uint32_t i = 0; r->mode == PS_ROWS_PARTS && i < r->n_parts; i++)
        if ((uintptr_t)r->part[i].w % align != 0) return false;
    return true;
}

/* As many blocks as stay resident, so that the inputs are rounded once for many rows. */
static uint32_t resident_blocks(const ps_launch *launch, uint64_t smem_bytes)
{
    const uint64_t limit = ps_cuda_smem_bytes(launch->info->sm) + 1024;
    return (uint32_t)ps_max_u64(1, ps_min_u64(4, limit / (smem_bytes + 1024))) *
           ps_cuda_n_sm(launch);
}

ps_status ps_cuda_matvec(const ps_launch *launch, uint32_t fmt, uint32_t n_tok, ps_matvec_params *p)
{
    const void *kernel = matvec_kernel(fmt, n_tok);
    if (kernel == NULL || n_tok == 0 || !ps_fmt_row_bytes(fmt, p->n_cols, &p->row_bytes))
        return PS_EINTERNAL;
    if (!weights_aligned(fmt, &p->rows)) return PS_EINTERNAL;
    ps_rows *r = &p->rows;
    p->w_aligned = p->row_bytes % 16 == 0;
    p->n_tasks = r->mode == PS_ROWS_PAIR ? r->n_rows : (r->n_rows + 1) / 2;
    if (r->mode == PS_ROWS_PARTS) {
        p->n_tasks = 0;
        for (uint32_t i = 0; i < r->n_parts; i++) {
            r->part[i].first = p->n_tasks;
            p->n_tasks += (r->part[i].n_rows + 1) / 2;
            p->w_aligned = p->w_aligned && (uintptr_t)r->part[i].w % 16 == 0;
        }
    }
    uint64_t smem_bytes = 0;
    if (ps_cuda_is_quant(fmt))
        smem_bytes = ps_cuda_matvec_ring_bytes(fmt) + n_tok * PS_CUDA_Q8_BYTES(p->n_cols);
    const uint32_t blocks = ps_div_up(p->n_tasks, PS_CUDA_MATVEC_WARPS);
    if (r->mode == PS_ROWS_PARTS) {
        const uint32_t resident = resident_blocks(launch, smem_bytes);
        return ps_cuda_launch(launch, kernel, dim3(blocks < resident ? blocks : resident),
            MATVEC_THREADS, smem_bytes, p);
    }
    /* Two tasks a warp: the first segment of the second is under way while the first is computed.
     */
    for (p->first_assign = 0; p->first_assign < r->n_assign; p->first_assign += 65535) {
        const uint32_t left = r->n_assign - p->first_assign;
        const dim3 grid((blocks + 1) / 2, left < 65535 ? left : 65535);
        const ps_status status =
            ps_cuda_launch(launch, kernel, grid, MATVEC_THREADS, smem_bytes, p);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}
