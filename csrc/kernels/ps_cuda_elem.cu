/* ps_cuda_elem - the ops that touch each element once or twice: embed, norm, act, add, move,
 * gather_rows, softcap, attn_merge, moe_combine.
 *
 * Not here: rope and the cache (ps_cuda_prep.cu).
 * Threads: launchers on the engine's thread.
 *
 * All are bound by memory in prefill and by launch latency in decode: floor 2.5 us a call in a
 * graph on an H200, and bytes / 4.3 TB/s beyond a few MB. Rows are read as float4 where base and
 * stride allow.
 */
#include "kernels/ps_cuda_fmt.cuh"
#include "kernels/ps_cuda_ops.h"

/* ---- embed: a thread takes 16 columns of one token's row (4 of F32, F16, BF16) ---- */

template <int F>
PS_DEVICE void embed_blocks(const ps_embed_args &a, const uint8_t *row, uint32_t unit, float *out)
{
    constexpr int PER_BLOCK = ps_block_elems<F>() / 16;
    const ps_w16 w = ps_unpack16<F, PS_GLOBAL>(
        row + (uint64_t)(unit / PER_BLOCK) * ps_block_bytes<F>(), unit % PER_BLOCK);
#pragma unroll
    for (int i = 0; i < 16; i++) out[16 * unit + i] = __fmul_rn(ps_weight<F>(w, i), a.scale);
}

template <int F> PS_DEVICE float embed_float(const uint8_t *row, uint32_t i)
{
    if constexpr (F == PS_FMT_F32) return ((const float *)row)[i];
    if constexpr (F == PS_FMT_F16) return ps_f16(((const uint16_t *)row)[i]);
    return __uint_as_float((uint32_t)((const uint16_t *)row)[i] << 16);
}

/* Grid: x over units of a row, y over tokens. */
template <int F> __global__ void k_embed(const __grid_constant__ ps_embed_args a)
{
    ps_dep_wait();
    const uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y;
    constexpr bool BLOCKS = F != PS_FMT_F32 && F != PS_FMT_F16 && F != PS_FMT_BF16;
    float *out = (float *)a.out.a + (uint64_t)t * a.n_cols;
    const uint64_t id = (uint64_t)((const int32_t *)a.ids.a)[t];
    if constexpr (BLOCKS) {
        const uint64_t row_bytes = (uint64_t)(a.n_cols / ps_block_elems<F>()) * ps_block_bytes<F>();
        if (unit * 16 < a.n_cols)
            embed_blocks<F>(a, (const uint8_t *)a.table.a + id * row_bytes, unit, out);
    } else {
        const uint64_t row_bytes = (uint64_t)a.n_cols * (F == PS_FMT_F32 ? 4 : 2);
        for (uint32_t i = unit * 4; i < unit * 4 + 4 && i < a.n_cols; i++)
            out[i] =
                __fmul_rn(embed_float<F>((const uint8_t *)a.table.a + id * row_bytes, i), a.scale);
    }
}

typedef struct fmt_kernel {
    uint32_t fmt;
    const void *kernel;
} fmt_kernel;

#define ROW(F)                                                                                     \
    {                                                                                              \
        F, (const void *)k_embed<F>                                                                \
    }
static const fmt_kernel table[] = {ROW(PS_FMT_F32), ROW(PS_FMT_F16), ROW(PS_FMT_BF16),
    ROW(PS_FMT_Q4_0), ROW(PS_FMT_Q4_1), ROW(PS_FMT_Q5_0), ROW(PS_FMT_Q5_1), ROW(PS_FMT_Q8_0),
    ROW(PS_FMT_Q2_K), ROW(PS_FMT_Q3_K), ROW(PS_FMT_Q4_K), ROW(PS_FMT_Q5_K), ROW(PS_FMT_Q6_K),
    ROW(PS_FMT_IQ4_NL), ROW(PS_FMT_IQ4_XS), ROW(PS_FMT_MXFP4)};
#undef ROW

static const void *embed_kernel(uint32_t fmt)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].fmt == fmt) return table[i].kernel;
    return NULL;
}

ps_status ps_cuda_embed(const ps_launch *launch, const void *args)
{
    ps_embed_args a = *(const ps_embed_args *)args;
    const ps_status status = ps_op_check(PS_OP_EMBED, &a, NULL);
    const void *kernel = embed_kernel(a.fmt);
    if (status != PS_OK || kernel == NULL) return status != PS_OK ? status : PS_EINTERNAL;
    const uint32_t per_thread = ps_cuda_is_quant(a.fmt) ? 16 : 4;
    for (uint32_t first = 0; first < a.n_tok; first += 65535) { /* the grid's limit in y */
        ps_embed_args part = a;
        part.n_tok = a.n_tok - first < 65535 ? a.n_tok - first : 65535;
        part.ids = ps_dptr_add(a.ids, first * 4ull);
        part.out = ps_dptr_add(a.out, (uint64_t)first * a.n_cols * 4);
        const dim3 grid(ps_div_up(a.n_cols, per_thread * 128ull), part.n_tok);
        const ps_status s = ps_cuda_launch(launch, kernel, grid, 128, 0, &part);
        if (s != PS_OK) return s;
    }
    return PS_OK;
}

/* ---- norm: a block takes a token; what fits stays in registers between the passes ---- */

enum { NORM_THREADS = 256, NORM_KEEP = 8 /* float4 a thread: rows of up to 8192 */ };

typedef struct norm_params {
    ps_norm_args a;
    uint32_t aligned; /* every row may be read as float4 */
} norm_params;

PS_DEVICE float norm_value(
    const ps_norm_args &a, uint64_t i, uint32_t c, float centred, float scale)
{
    float v = centred * scale * ((const float *)a.w.a)[c];
    if (a.kind == PS_NORM_LAYER && a.b.a != 0) v += ((const float *)a.b.a)[c];
    return a.residual.a != 0 ? ((const float *)a.residual.a)[i] + v : v;
}

PS_DEVICE float4 norm_value4(
    const ps_norm_args &a, uint64_t row, uint32_t c, float4 x, float mean, float scale)
{
    float4 y;
    y.x = norm_value(a, row + c, c, x.x - mean, scale);
    y.y = norm_value(a, row + c + 1, c + 1, x.y - mean, scale);
    y.z = norm_value(a, row + c + 2, c + 2, x.z - mean, scale);
    y.w = norm_value(a, row + c + 3, c + 3, x.w - mean, scale);
    return y;
}

PS_DEVICE float sum4(float4 v)
{
    return (v.x + v.y) + (v.z + v.w);
}
PS_DEVICE float square4(float4 v, float mean)
{
    const float x = v.x - mean, y = v.y - mean, z = v.z - mean, w = v.w - mean;
    return (x * x + y * y) + (z * z + w * w);
}

/* n <= NORM_THREADS * NORM_KEEP * 4, rows aligned, n a multiple of 4. Grid: tokens. */
static __global__ void __launch_bounds__(NORM_THREADS)
    k_norm_kept(const __grid_constant__ norm_params p)
{
    __shared__ float part[32];
    const ps_norm_args &a = p.a;
    ps_dep_wait();
    const float *x = (const float *)a.x.a + (uint64_t)blockIdx.x * a.ldx;
    const uint64_t row = (uint64_t)blockIdx.x * a.ldo;
    const uint32_t tid = threadIdx.x, n4 = a.n / 4;
    float4 v[NORM_KEEP];
    float sum = 0.0f, square = 0.0f, mean = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_KEEP; i++) {
        const uint32_t c = tid + i * NORM_THREADS;
        v[i] = c < n4 ? ((const float4 *)x)[c] : make_float4(0, 0, 0, 0);
        sum += sum4(v[i]);
    }
    if (a.kind == PS_NORM_LAYER) mean = ps_block_sum(sum, part) / (float)a.n;
#pragma unroll
    for (int i = 0; i < NORM_KEEP; i++)
        if (tid + i * NORM_THREADS < n4) square += square4(v[i], mean);
    const float scale = 1.0f / sqrtf(ps_block_sum(square, part) / (float)a.n + a.eps);
#pragma unroll
    for (int i = 0; i < NORM_KEEP; i++) {
        const uint32_t c = tid + i * NORM_THREADS;
        if (c < n4)
            *(float4 *)((float *)a.out.a + row + 4 * c) =
                norm_value4(a, row, 4 * c, v[i], mean, scale);
    }
}

/* Any n, any stride. Grid: tokens. A thread reads and writes only its own elements, so in place is
 * safe. */
static __global__ void __launch_bounds__(NORM_THREADS)
    k_norm_any(const __grid_constant__ norm_params p)
{
    __shared__ float part[32];
    const ps_norm_args &a = p.a;
    ps_dep_wait();
    const float *x = (const float *)a.x.a + (uint64_t)blockIdx.x * a.ldx;
    const uint64_t row = (uint64_t)blockIdx.x * a.ldo;
    float sum = 0.0f, square = 0.0f, mean = 0.0f;
    if (a.kind == PS_NORM_LAYER) {
        for (uint32_t c = threadIdx.x; c < a.n; c += NORM_THREADS) sum += x[c];
        mean = ps_block_sum(sum, part) / (float)a.n;
    }
    for (uint32_t c = threadIdx.x; c < a.n; c += NORM_THREADS)
        square += (x[c] - mean) * (x[c] - mean);
    const float scale = 1.0f / sqrtf(ps_block_sum(square, part) / (float)a.n + a.eps);
    for (uint32_t c = threadIdx.x; c < a.n; c += NORM_THREADS)
        ((float *)a.out.a)[row + c] = norm_value(a, row + c, c, x[c] - mean, scale);
}

ps_status ps_cuda_norm(const ps_launch *launch, const void *args)
{
    norm_params p = {*(const ps_norm_args *)args, 0};
    const ps_status status = ps_op_check(PS_OP_NORM, &p.a, NULL);
    if (status != PS_OK) return status;
    const bool kept = p.a.n % 4 == 0 && p.a.n <= NORM_THREADS * NORM_KEEP * 4 &&
                      ps_rows_aligned(p.a.x, p.a.ldx) && ps_rows_aligned(p.a.out, p.a.ldo);
    return ps_cuda_launch(launch, kept ? (const void *)k_norm_kept : (const void *)k_norm_any,
        dim3(p.a.n_tok), NORM_THREADS, 0, &p);
}

/* ---- act ---- */

typedef struct act_params {
    ps_act_args a;
    uint32_t width; /* elements a thread takes at once: 4 or 1 */
} act_params;

/* Grid: x over columns, y over tokens in strides. Elements are read before the same ones are
 * written. */
static __global__ void k_act(const __grid_constant__ act_params p)
{
    ps_dep_wait();
    const ps_act_args &a = p.a;
    const uint32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * p.width;
    if (c >= a.n) return;
    for (uint64_t t = blockIdx.y; t < a.n_tok; t += gridDim.y) {
        const float *up = (const float *)a.up.a + t * a.ldu + c;
        const float *gate = a.kind == PS_ACT_RELU2 ? up : (const float *)a.gate.a + t * a.ldg + c;
        float *out = (float *)a.out.a + t * a.ldo + c;
        if (p.width == 4) {
            const float4 g = *(const float4 *)gate, u = *(const float4 *)up;
            *(float4 *)out =
                make_float4(ps_activate(a.kind, g.x, u.x), ps_activate(a.kind, g.y, u.y),
                    ps_activate(a.kind, g.z, u.z), ps_activate(a.kind, g.w, u.w));
        } else {
            *out = ps_activate(a.kind, *gate, *up);
        }
    }
}

ps_status ps_cuda_act(const ps_launch *launch, const void *args)
{
    act_params p = {*(const ps_act_args *)args, 1};
    const ps_act_args *a = &p.a;
    const ps_status status = ps_op_check(PS_OP_ACT, a, NULL);
    if (status != PS_OK) return status;
    if (a->n % 4 == 0 && ps_rows_aligned(a->up, a->ldu) && ps_rows_aligned(a->out, a->ldo) &&
        (a->kind == PS_ACT_RELU2 || ps_rows_aligned(a->gate, a->ldg)))
        p.width = 4;
    const dim3 grid(ps_div_up(a->n, p.width * 128ull), a->n_tok < 4096 ? a->n_tok : 4096);
    return ps_cuda_launch(launch, (const void *)k_act, grid, 128, 0, &p);
}

/* ---- add, move, softcap: flat. What may be host memory that the CPU has just written is read past
 * the caches, which may hold what was there before. ---- */

enum { FLAT_THREADS = 256 };

static unsigned flat_blocks(const ps_launch *launch, uint64_t n_units)
{
    const uint64_t blocks = (n_units + FLAT_THREADS - 1) / FLAT_THREADS;
    return (unsigned)ps_min_u64(blocks, 8ull * ps_cuda_n_sm(launch));
}

typedef struct add_params {
    ps_add_args a;
    uint64_t n4; /* of n, in float4; the rest one by one */
} add_params;

static __global__ void k_add(const __grid_constant__ add_params p)
{
    ps_dep_wait();
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    const uint64_t first = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const float *x = (const float *)p.a.a.a, *y = (const float *)p.a.b.a;
    float *out = (float *)p.a.out.a;
    for (uint64_t i = first; i < p.n4; i += step) {
        const float4 u = ((const float4 *)x)[i], v = __ldcv((const float4 *)y + i);
        ((float4 *)out)[i] = make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w);
    }
    for (uint64_t i = p.n4 * 4 + first; i < p.a.n; i += step) out[i] = x[i] + __ldcv(y + i);
}

ps_status ps_cuda_add(const ps_launch *launch, const void *args)
{
    add_params p = {*(const ps_add_args *)args, 0};
    const ps_status status = ps_op_check(PS_OP_ADD, &p.a, NULL);
    if (status != PS_OK || p.a.n == 0) return status;
    if ((p.a.a.a | p.a.b.a | p.a.out.a) % 16 == 0) p.n4 = p.a.n / 4;
    return ps_cuda_launch(launch, (const void *)k_add,
        dim3(flat_blocks(launch, p.n4 > 0 ? p.n4 : p.a.n)), FLAT_THREADS, 0, &p);
}

typedef struct move_params {
    ps_move_args a;
    uint64_t n4; /* of n, in uint4; the rest one by one */
} move_params;

static __global__ void k_move(const __grid_constant__ move_params p)
{
    ps_dep_wait();
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    const uint64_t first = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t *x = (const uint32_t *)p.a.x.a;
    uint32_t *out = (uint32_t *)p.a.out.a;
    for (uint64_t i = first; i < p.n4; i += step) ((uint4 *)out)[i] = __ldcv((const uint4 *)x + i);
    for (uint64_t i = p.n4 * 4 + first; i < p.a.n; i += step) out[i] = __ldcv(x + i);
}

ps_status ps_cuda_move(const ps_launch *launch, const void *args)
{
    move_params p = {*(const ps_move_args *)args, 0};
    const ps_status status = ps_op_check(PS_OP_MOVE, &p.a, NULL);
    if (status != PS_OK || p.a.n == 0) return status;
    if ((p.a.x.a | p.a.out.a) % 16 == 0) p.n4 = p.a.n / 4;
    return ps_cuda_launch(launch, (const void *)k_move,
        dim3(flat_blocks(launch, p.n4 > 0 ? p.n4 : p.a.n)), FLAT_THREADS, 0, &p);
}

static __global__ void k_softcap(const __grid_constant__ ps_softcap_args a)
{
    ps_dep_wait();
    float *x = (float *)a.x.a;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.n;
         i += (uint64_t)gridDim.x * blockDim.x)
        x[i] = a.cap * tanhf(x[i] / a.cap);
}

ps_status ps_cuda_softcap(const ps_launch *launch, const void *args)
{
    ps_softcap_args a = *(const ps_softcap_args *)args;
    const ps_status status = ps_op_check(PS_OP_SOFTCAP, &a, NULL);
    if (status != PS_OK || a.n == 0) return status;
    return ps_cuda_launch(
        launch, (const void *)k_softcap, dim3(flat_blocks(launch, a.n)), FLAT_THREADS, 0, &a);
}

/* ---- gather_rows. Grid: x over columns, y over rows in strides ---- */

static __global__ void k_gather_rows(const __grid_constant__ ps_gather_rows_args a)
{
    ps_dep_wait();
    const uint32_t c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.n) return;
    for (uint64_t r = blockIdx.y; r < a.n_rows; r += gridDim.y) {
        const uint64_t from = (uint64_t)((const int32_t *)a.rows.a)[r];
        ((float *)a.out.a)[r * a.n + c] = ((const float *)a.x.a)[from * a.n + c];
    }
}

ps_status ps_cuda_gather_rows(const ps_launch *launch, const void *args)
{
    ps_gather_rows_args a = *(const ps_gather_rows_args *)args;
    const ps_status status = ps_op_check(PS_OP_GATHER_ROWS, &a, NULL);
    if (status != PS_OK || a.n == 0 || a.n_rows == 0) return status;
    const dim3 grid(ps_div_up(a.n, FLAT_THREADS), a.n_rows < 4096 ? a.n_rows : 4096);
    return ps_cuda_launch(launch, (const void *)k_gather_rows, grid, FLAT_THREADS, 0, &a);
}

/* ---- attn_merge. A warp takes a (token, head); a part without keys has weight 0, and its maximum
 * of -inf must not meet another -inf in a difference. In place: a lane reads an element before it
 * writes the same one. The second part may be host memory that the CPU has just written: what a
 * lane wants of a usual head is asked for at once, so that it waits for the bus once. ---- */

enum { MERGE_LANE = 4 }; /* elements of a lane at a time: a head of 128 */

static __global__ void k_attn_merge(const __grid_constant__ ps_attn_merge_args a)
{
    ps_dep_wait();
    const uint64_t row = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= (uint64_t)a.n_tok * a.n_head) return;
    const uint32_t lane = threadIdx.x % 32;
    const float *ml_a = (const float *)a.ml_a.a + 2 * row,
                *of_a = (const float *)a.a.a + row * a.head_dim,
                *of_b = (const float *)a.b.a + row * a.head_dim;
    float *out = (float *)a.out.a + row * a.head_dim;
    const float2 ml_b = __ldcv((const float2 *)a.ml_b.a + row);
    for (uint32_t c = lane; c < a.head_dim; c += 32 * MERGE_LANE) {
        float v[MERGE_LANE];
#pragma unroll
        for (uint32_t i = 0; i < MERGE_LANE; i++)
            v[i] = c + 32 * i < a.head_dim ? __ldcv(of_b + c + 32 * i) : 0.0f;
        const float max = fmaxf(ml_a[0], ml_b.x);
        const float w_a = ml_a[1] > 0.0f ? ml_a[1] * expf(ml_a[0] - max) : 0.0f;
        const float w_b = ml_b.y > 0.0f ? ml_b.y * expf(ml_b.x - max) : 0.0f;
        const float sum = w_a + w_b;
#pragma unroll
        for (uint32_t i = 0; i < MERGE_LANE; i++) {
            const uint32_t at = c + 32 * i;
            if (at >= a.head_dim) continue;
            out[at] = sum > 0.0f ? (w_a * of_a[at] + w_b * v[i]) / sum : 0.0f;
        }
    }
}

ps_status ps_cuda_attn_merge(const ps_launch *launch, const void *args)
{
    ps_attn_merge_args a = *(const ps_attn_merge_args *)args;
    const ps_status status = ps_op_check(PS_OP_ATTN_MERGE, &a, NULL);
    if (status != PS_OK) return status;
    const dim3 grid(ps_div_up((uint64_t)a.n_tok * a.n_head, 4));
    return ps_cuda_launch(launch, (const void *)k_attn_merge, grid, 128, 0, &a);
}

/* ---- moe_combine. Grid: x over columns, y over tokens in strides; ranks are added in order. Which
 * rows they are is looked up once a block, by as many threads as there are ranks: one after the
 * other it would cost a token 8 times three dependent loads. Rows are read past the caches: those
 * of y_other may be host memory. ---- */

enum { COMBINE_THREADS = 128, COMBINE_UNROLL = 8 };

static __global__ void __launch_bounds__(COMBINE_THREADS)
    k_moe_combine(const __grid_constant__ ps_moe_combine_args a)
{
    __shared__ const float *rows[COMBINE_THREADS];
    __shared__ float weights[COMBINE_THREADS];
    ps_dep_wait();
    const uint32_t tid = threadIdx.x, c = blockIdx.x * COMBINE_THREADS + tid;
    const uint64_t *ptrs = (const uint64_t *)a.down_ptrs.a;
    for (uint64_t t = blockIdx.y; t < a.n_tok; t += gridDim.y) {
        float sum =
            c < a.n && a.residual.a != 0 ? ((const float *)a.residual.a)[t * a.n + c] : 0.0f;
        for (uint32_t first = 0; first < a.k; first += COMBINE_THREADS) {
            const uint32_t n = a.k - first < COMBINE_THREADS ? a.k - first : COMBINE_THREADS;
            __syncthreads();
            if (tid < n) {
                const uint64_t i = t * a.k + first + tid;
                const bool here = ptrs[((const int32_t *)a.ids.a)[i]] != 0 || a.y_other.a == 0;
                rows[tid] = (const float *)(here ? a.y.a : a.y_other.a) + i * a.n;
                weights[tid] = ((const float *)a.weights.a)[i];
            }
            __syncthreads();
            for (uint32_t r = 0; r < n && c < a.n; r += COMBINE_UNROLL) {
                float v[COMBINE_UNROLL];
#pragma unroll
                for (int u = 0; u < COMBINE_UNROLL; u++)
                    v[u] = r + u < n ? __ldcv(rows[r + u] + c) : 0.0f;
#pragma unroll
                for (int u = 0; u < COMBINE_UNROLL; u++)
                    if (r + u < n) sum = fmaf(weights[r + u], v[u], sum);
            }
        }
        if (c < a.n) ((float *)a.out.a)[t * a.n + c] = sum;
    }
}

ps_status ps_cuda_moe_combine(const ps_launch *launch, const void *args)
{
    ps_moe_combine_args a = *(const ps_moe_combine_args *)args;
    const ps_status status = ps_op_check(PS_OP_MOE_COMBINE, &a, NULL);
    if (status != PS_OK) return status;
    const dim3 grid(ps_div_up(a.n, COMBINE_THREADS), a.n_tok < 4096 ? a.n_tok : 4096);
    return ps_cuda_launch(launch, (const void *)k_moe_combine, grid, COMBINE_THREADS, 0, &a);
}
