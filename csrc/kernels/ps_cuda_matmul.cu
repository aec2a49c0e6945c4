/* ps_cuda_matmul - the matmul launcher: sends each format's parts down the path that
 * ps_cuda_paths.h names, and the plain float32 kernel for F32 weights in prefill.
 *
 * Not here: the other kernels.
 * Threads: the launcher on the engine's thread.
 */
#include "device/ps_cublas.h"
#include "kernels/ps_cuda.cuh"
#include "kernels/ps_cuda_inner.h"
#include "kernels/ps_cuda_ops.h"

/* ---- F32 weights: routers, mostly. 32 inputs by 32 rows a block, each thread 2 x 2; columns in
 * order, so a result does not depend on its tile. Floor: 2 * inputs * rows * columns / 67 TFLOP/s.
 * ---- */

enum { F32_TILE = 32, F32_PITCH = F32_TILE + 4, F32_THREADS = 256 };

typedef struct gemm_f32_params {
    const float *x, *w, *bias;
    float *y;
    uint32_t n_tok, n_cols, n_rows, ldx, ldy, add;
} gemm_f32_params;

/* 32 rows by 32 columns from (row0, c0) on; zeros outside. A thread takes four elements, coalesced.
 */
PS_DEVICE void load_f32(float (*tile)[F32_PITCH], const float *from, uint64_t ld, uint32_t row0,
    uint32_t n_rows, uint32_t c0, uint32_t n_cols)
{
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = threadIdx.x / 32 + 8 * i, c = threadIdx.x % 32;
        const bool in = row0 + row < n_rows && c0 + c < n_cols;
        tile[row][c] = in ? from[(row0 + row) * ld + c0 + c] : 0.0f;
    }
}

PS_DEVICE float dot4(float4 a, float4 b, float sum)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/* Grid: x over rows of weights, y over inputs. */
static __global__ void __launch_bounds__(F32_THREADS)
    k_gemm_f32(const __grid_constant__ gemm_f32_params p)
{
    __shared__ __align__(16) float xs[2][F32_TILE][F32_PITCH], ws[2][F32_TILE][F32_PITCH];
    ps_dep_wait();
    const uint32_t row0 = blockIdx.x * F32_TILE, tok0 = blockIdx.y * F32_TILE;
    const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[2][2] = {};
    load_f32(xs[0], p.x, p.ldx, tok0, p.n_tok, 0, p.n_cols);
    load_f32(ws[0], p.w, p.n_cols, row0, p.n_rows, 0, p.n_cols);
    __syncthreads();
    for (uint32_t c = 0, k = 0; c < p.n_cols; c += F32_TILE, k ^= 1) {
        if (c + F32_TILE < p.n_cols) {
            load_f32(xs[k ^ 1], p.x, p.ldx, tok0, p.n_tok, c + F32_TILE, p.n_cols);
            load_f32(ws[k ^ 1], p.w, p.n_cols, row0, p.n_rows, c + F32_TILE, p.n_cols);
        }
#pragma unroll
        for (int i = 0; i < F32_TILE; i += 4) {
            const float4 x0 = *(const float4 *)&xs[k][ty][i],
                         x1 = *(const float4 *)&xs[k][ty + 16][i];
            const float4 w0 = *(const float4 *)&ws[k][tx][i],
                         w1 = *(const float4 *)&ws[k][tx + 16][i];
            sum[0][0] = dot4(x0, w0, sum[0][0]), sum[0][1] = dot4(x0, w1, sum[0][1]);
            sum[1][0] = dot4(x1, w0, sum[1][0]), sum[1][1] = dot4(x1, w1, sum[1][1]);
        }
        __syncthreads();
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            const uint32_t t = tok0 + ty + 16 * i, row = row0 + tx + 16 * j;
            if (t >= p.n_tok || row >= p.n_rows) continue;
            float v = sum[i][j] + (p.bias != NULL ? p.bias[row] : 0.0f),
                  *y = p.y + (uint64_t)t * p.ldy + row;
            *y = p.add ? *y + v : v;
        }
}

static ps_status launch_f32(
    const ps_launch *launch, const ps_matmul_args *a, const ps_matmul_part *part)
{
    gemm_f32_params p = {};
    p.x = ps_ptr<const float>(a->x), p.w = ps_ptr<const float>(part->w),
    p.bias = ps_ptr<const float>(part->bias);
    p.y = ps_ptr<float>(part->y);
    p.n_tok = a->n_tok, p.n_cols = a->n_cols, p.n_rows = part->n_rows;
    p.ldx = a->ldx, p.ldy = part->ldy, p.add = a->add;
    if (a->n_tok > 65535u * F32_TILE) return PS_EUNSUPPORTED;
    const dim3 grid(ps_div_up(p.n_rows, F32_TILE), ps_div_up(p.n_tok, F32_TILE));
    return ps_cuda_launch(launch, (const void *)k_gemm_f32, grid, F32_THREADS, 0, &p);
}

/* ---- parts ---- */

static void take_part(ps_rows *r, const ps_matmul_part *part)
{
    ps_rows_part *p = &r->part[r->n_parts++];
    p->w = ps_ptr<const uint8_t>(part->w);
    p->y = ps_ptr<float>(part->y);
    p->bias = ps_ptr<const float>(part->bias);
    p->n_rows = part->n_rows;
    p->ldy = part->ldy;
}

/* All parts of the format of part `first`, which is the first of them. */
static ps_rows parts_of(const ps_matmul_args *a, uint32_t first)
{
    ps_rows r = {};
    r.mode = PS_ROWS_PARTS;
    r.add = a->add;
    for (uint32_t i = first; i < a->n_parts; i++)
        if (a->part[i].fmt == a->part[first].fmt) take_part(&r, &a->part[i]);
    return r;
}

static bool is_first_of_format(const ps_matmul_args *a, uint32_t i)
{
    for (uint32_t j = 0; j < i; j++)
        if (a->part[j].fmt == a->part[i].fmt) return false;
    return true;
}

static ps_status run_matvec(const ps_launch *launch, const ps_matmul_args *a, uint32_t i)
{
    const uint32_t fmt = a->part[i].fmt;
    const uint32_t at_once = ps_cuda_matvec_tok(fmt, a->n_cols, a->n_tok, launch->info->sm);
    for (uint32_t t = 0; t < a->n_tok; t += at_once) {
        ps_matvec_params p = {};
        p.x = ps_ptr<const float>(a->x) + (uint64_t)t * a->ldx;
        p.n_tok = a->n_tok - t < at_once ? a->n_tok - t : at_once;
        p.n_cols = a->n_cols;
        p.ldx = a->ldx;
        p.x_aligned = ps_rows_aligned(a->x, a->ldx);
        p.rows = parts_of(a, i);
        for (uint32_t k = 0; k < p.rows.n_parts; k++)
            p.rows.part[k].y += (uint64_t)t * p.rows.part[k].ldy;
        const ps_status status = ps_cuda_matvec(launch, fmt, at_once, &p);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

/* ---- prefill on 16-bit inputs ---- */

typedef struct x16_call {
    const ps_launch *launch;
    const ps_matmul_args *a;
    ps_cuda_layout layout;
    uint16_t *x16, *w16;
    float *scale;
    uint32_t ld16;
} x16_call;

static ps_gemm_params gemm_params(const x16_call *c)
{
    ps_gemm_params p = {};
    p.x16 = c->x16;
    p.scale = c->scale;
    p.n_tok = c->a->n_tok;
    p.n_cols = c->a->n_cols;
    p.ldx16 = c->ld16;
    return p;
}

static ps_status run_own(const x16_call *c, uint32_t i)
{
    ps_gemm_params p = gemm_params(c);
    p.rows = parts_of(c->a, i);
    return ps_cuda_gemm(c->launch, c->a->part[i].fmt, &p);
}

/* Rows [row, row + n) of a part as 16-bit weights: at w, rows ldw elements apart, n_cols of them
 * counting. */
typedef struct strip16 {
    const uint16_t *w;
    uint32_t fmt, n_cols, ldw, n;
    float *y;
    const float *bias;
    uint32_t ldy;
} strip16;

static strip16 strip_of(const ps_matmul_part *part, uint32_t row, uint32_t n)
{
    strip16 s = {};
    s.fmt = ps_cuda_is_bf16(part->fmt) ? PS_FMT_BF16 : PS_FMT_F16;
    s.n = n;
    s.y = ps_ptr<float>(part->y) + row;
    s.bias = ps_dptr_is_null(part->bias) ? NULL : ps_ptr<const float>(part->bias) + row;
    s.ldy = part->ldy;
    return s;
}

/* ---- cuBLAS. It knows nothing of scales and biases: y becomes (bias + y) / scale before and is
 * multiplied by scale afterwards, exactly, because scales are powers of two. Most rows have scale 1
 * and are left alone. ---- */

typedef struct lib_params {
    float *y;
    const float *bias, *scale;
    uint32_t n_rows, n_tok, ldy, add;
} lib_params;

/* Grid: x over weight rows, y over inputs in strides. */
static __global__ void __launch_bounds__(256) k_before_lib(const __grid_constant__ lib_params p)
{
    ps_dep_wait();
    const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.n_rows) return;
    const float bias = p.bias != NULL ? p.bias[row] : 0.0f;
    for (uint32_t t = blockIdx.y; t < p.n_tok; t += gridDim.y) {
        const float scale = p.scale[t];
        float *y = p.y + (uint64_t)t * p.ldy + row;
        if (p.bias == NULL && scale == 1.0f) continue; /* then it is `add` alone */
        *y = (p.add ? *y + bias : bias) / scale;
    }
}

static __global__ void __launch_bounds__(256) k_after_lib(const __grid_constant__ lib_params p)
{
    ps_dep_wait();
    const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t t = blockIdx.y; t < p.n_tok; t += gridDim.y) {
        const float scale = p.scale[t];
        if (scale != 1.0f && row < p.n_rows) p.y[(uint64_t)t * p.ldy + row] *= scale;
    }
}

/* cuBLAS's own names of types and modes. */
enum {
    LIB_F32 = 0,
    LIB_F16 = 2,
    LIB_BF16 = 14,
    LIB_COMPUTE_F32 = 68,
    LIB_DEFAULT = -1,
    LIB_N = 0,
    LIB_T = 1
};

static ps_status run_lib(const x16_call *c, const strip16 *s)
{
    const ps_cublas *lib = (const ps_cublas *)c->launch->cublas;
    lib_params p = {s->y, s->bias, c->scale, s->n, c->a->n_tok, s->ldy, c->a->add};
    const bool bf16 = s->fmt == PS_FMT_BF16;
    const dim3 grid(ps_div_up(s->n, 256), p.n_tok < 1024 ? p.n_tok : 1024);
    const float one = 1.0f, beta = p.add || p.bias != NULL ? 1.0f : 0.0f;
    const int type = bf16 ? LIB_BF16 : LIB_F16;
    ps_status status = PS_OK;
    if (p.bias != NULL || (p.add && !bf16)) /* scales of BF16 inputs are 1 */
        status = ps_cuda_launch(c->launch, (const void *)k_before_lib, grid, 256, 0, &p);
    if (status != PS_OK) return status;
    /* Column-major: y^T [rows x inputs] = (w^T)^T x^T. */
    if (lib->set_stream(lib->handle, c->launch->cuda_stream) != 0 ||
        lib->set_workspace(lib->handle, ps_ptr<void>(ps_dptr_add(c->a->ws, c->layout.lib)),
            PS_CUDA_LIB_BYTES) != 0 ||
        lib->gemm_ex(lib->handle, LIB_T, LIB_N, (int)s->n, (int)p.n_tok, (int)s->n_cols, &one, s->w,
            type, (int)s->ldw, c->x16, type, (int)c->ld16, &beta, s->y, LIB_F32, (int)s->ldy,
            LIB_COMPUTE_F32, LIB_DEFAULT) != 0)
        return ps_cuda_status(cudaGetLastError()) == PS_EFATAL ? PS_EFATAL : PS_EDEVICE;
    if (bf16) return PS_OK;
    return ps_cuda_launch(c->launch, (const void *)k_after_lib, grid, 256, 0, &p);
}

static ps_status run_strip(const x16_call *c, const strip16 *s)
{
    if (c->launch->cublas != NULL) return run_lib(c, s);
    ps_gemm_params p = gemm_params(c);
    p.n_cols = s->ldw; /* what pads the rows is zero */
    p.rows.mode = PS_ROWS_PARTS;
    p.rows.add = c->a->add;
    p.rows.n_parts = 1;
    ps_rows_part *part = &p.rows.part[0];
    part->w = (const uint8_t *)s->w;
    part->y = s->y, part->bias = s->bias, part->n_rows = s->n, part->ldy = s->ldy;
    return ps_cuda_gemm(c->launch, s->fmt, &p);
}

/* Strips of rows through the workspace: dequantised, multiplied, overwritten by the next. */
static ps_status run_dequant(const x16_call *c, const ps_matmul_part *part)
{
    uint64_t row_bytes = 0;
    if (!ps_fmt_row_bytes(part->fmt, c->a->n_cols, &row_bytes)) return PS_EINTERNAL;
    const uint32_t n_max = (uint32_t)c->layout.dequant_rows;
    for (uint32_t row = 0; row < part->n_rows; row += n_max) {
        const uint32_t n = part->n_rows - row < n_max ? part->n_rows - row : n_max;
        ps_dequant_params d = {};
        d.w = ps_ptr<const uint8_t>(part->w) + row * row_bytes;
        d.w16 = c->w16;
        d.n_rows = n, d.n_cols = c->a->n_cols, d.ldw16 = c->ld16;
        strip16 s = strip_of(part, row, n);
        s.w = c->w16, s.ldw = c->ld16, s.n_cols = c->a->n_cols;
        ps_status status = ps_cuda_dequant(c->launch, part->fmt, &d);
        if (status == PS_OK) status = run_strip(c, &s);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

/* Part i; the own kernel takes all parts of a format in one launch. */
static ps_status run_x16_part(const x16_call *c, uint32_t i)
{
    const ps_matmul_part *part = &c->a->part[i];
    const int sm = c->launch->info->sm;
    const ps_cuda_path path = ps_cuda_matmul_path(part->fmt, c->a->n_cols, c->a->n_tok, sm);
    const bool lib = c->launch->cublas != NULL;
    if (path == PS_CUDA_DEQUANT && (lib || sm < 80)) return run_dequant(c, part);
    if (path == PS_CUDA_LIB && lib) {
        strip16 s = strip_of(part, 0, part->n_rows);
        s.w = ps_ptr<const uint16_t>(part->w), s.ldw = s.n_cols = c->a->n_cols;
        return run_lib(c, &s);
    }
    return is_first_of_format(c->a, i) ? run_own(c, i) : PS_OK;
}

/* Parts whose products run in F16, or in BF16. */
static ps_status run_x16(const ps_launch *launch, const ps_matmul_args *a, bool bf16)
{
    x16_call c = {launch, a, ps_cuda_matmul_layout(a, launch->info->sm), NULL, NULL, NULL, 0};
    bool converted = false;
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const ps_cuda_path path =
            ps_cuda_matmul_path(a->part[i].fmt, a->n_cols, a->n_tok, launch->info->sm);
        if (path == PS_CUDA_MATVEC || path == PS_CUDA_GEMM_F32) continue;
        if (ps_cuda_is_bf16(a->part[i].fmt) != bf16) continue;
        if (a->ws_bytes < c.layout.total || a->ws.a == 0) return PS_EINTERNAL;
        ps_status status = PS_OK;
        if (!converted) {
            c.x16 = ps_ptr<uint16_t>(a->ws);
            c.w16 = ps_ptr<uint16_t>(ps_dptr_add(a->ws, c.layout.dequant));
            c.scale = ps_ptr<float>(ps_dptr_add(a->ws, c.layout.scale));
            c.ld16 = (uint32_t)ps_cuda_pad_cols(a->n_cols);
            ps_to16_params p = {ps_ptr<const float>(a->x), c.x16, c.scale, a->n_tok, a->n_cols,
                a->ldx, c.ld16, bf16, ps_rows_aligned(a->x, a->ldx) && a->n_cols % 4 == 0};
            status = ps_cuda_to16(launch, &p);
            converted = true;
        }
        if (status == PS_OK) status = run_x16_part(&c, i);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

ps_status ps_cuda_matmul(const ps_launch *launch, const void *args)
{
    const ps_matmul_args *a = (const ps_matmul_args *)args;
    ps_status status = ps_op_check(PS_OP_MATMUL, a, NULL);
    for (uint32_t i = 0; i < a->n_parts && status == PS_OK; i++) {
        const ps_cuda_path path =
            ps_cuda_matmul_path(a->part[i].fmt, a->n_cols, a->n_tok, launch->info->sm);
        if (path == PS_CUDA_MATVEC && is_first_of_format(a, i)) status = run_matvec(launch, a, i);
        if (path == PS_CUDA_GEMM_F32) status = launch_f32(launch, a, &a->part[i]);
    }
    if (status == PS_OK) status = run_x16(launch, a, false);
    if (status == PS_OK) status = run_x16(launch, a, true);
    return status;
}
