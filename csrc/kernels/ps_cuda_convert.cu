/* ps_cuda_convert - what prefill needs before its products: inputs rounded to 16 bits, and rows of
 * blocks dequantised to 16 bits for cuBLAS.
 *
 * Not here: the products.
 * Threads: launchers on the engine's thread. Bound by memory: floors are bytes / 4.3 TB/s on an
 * H200.
 */
#include "kernels/ps_cuda_fmt.cuh"
#include "kernels/ps_cuda_inner.h"

/* ---- inputs ---- */

/* The power of two that a row is divided by. Rows whose largest value lies between 2^-6 and 2^15
 * stay as they are (what is lost below 2^-24 is nothing beside it), so that nearly all rows need no
 * factor afterwards; others are brought near 2^10. */
PS_DEVICE float row_scale(float max)
{
    if (max == 0.0f || (max >= 0.015625f && max < 32768.0f)) return 1.0f;
    const int exponent = (int)(__float_as_uint(max) >> 23) - 10;
    return __uint_as_float((uint32_t)(exponent > 1 ? exponent : 1) << 23);
}

/* A thread's share of a row: its largest value, and its columns to 16 bits. */
PS_DEVICE float max_of_share(
    const ps_to16_params &p, uint64_t row, uint32_t thread, uint32_t n_threads)
{
    const float *x = p.x + row * p.ldx;
    float max = 0.0f;
    if (p.aligned) {
#pragma unroll 4
        for (uint32_t c = thread; c < p.n_cols / 4; c += n_threads) {
            const float4 v = ((const float4 *)x)[c];
            max = fmaxf(max, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        }
        return max;
    }
    for (uint32_t c = thread; c < p.n_cols; c += n_threads) max = fmaxf(max, fabsf(x[c]));
    return max;
}

PS_DEVICE void write_share(
    const ps_to16_params &p, uint64_t row, uint32_t thread, uint32_t n_threads, float scale)
{
    const float *x = p.x + row * p.ldx;
    const float inverse = __uint_as_float((254u << 23) - __float_as_uint(scale));
    uint32_t *out = (uint32_t *)(p.x16 + row * p.ldx16); /* ldx16 is a multiple of 64 */
    if (thread == 0) p.scale[row] = scale;
    if (p.aligned) {
#pragma unroll 4
        for (uint32_t c = thread; c < p.ldx16 / 4; c += n_threads) {
            const float4 v = c < p.n_cols / 4 ? ((const float4 *)x)[c] : make_float4(0, 0, 0, 0);
            const uint32_t lo =
                p.bf16 ? ps_pack_bf16(v.x, v.y) : ps_pack_f16(v.x * inverse, v.y * inverse);
            const uint32_t hi =
                p.bf16 ? ps_pack_bf16(v.z, v.w) : ps_pack_f16(v.z * inverse, v.w * inverse);
            ((uint2 *)out)[c] = make_uint2(lo, hi);
        }
        return;
    }
    for (uint32_t c = thread; c < p.ldx16 / 2; c += n_threads) {
        const float lo = 2 * c < p.n_cols ? x[2 * c] * inverse : 0.0f;
        const float hi = 2 * c + 1 < p.n_cols ? x[2 * c + 1] * inverse : 0.0f;
        out[c] = p.bf16 ? ps_pack_bf16(lo, hi) : ps_pack_f16(lo, hi);
    }
}

/* Grid: rows. */
static __global__ void __launch_bounds__(256) k_to16(const __grid_constant__ ps_to16_params p)
{
    __shared__ float part[32];
    ps_dep_wait();
    float scale = 1.0f;
    if (!p.bf16)
        scale = row_scale(ps_block_max(max_of_share(p, blockIdx.x, threadIdx.x, blockDim.x), part));
    write_share(p, blockIdx.x, threadIdx.x, blockDim.x, scale);
}

ps_status ps_cuda_to16(const ps_launch *launch, ps_to16_params *p)
{
    return ps_cuda_launch(launch, (const void *)k_to16, dim3(p->n_x), 256, 0, p);
}

/* A layer whose experts stream runs in parts, each over all of the layer's assignments; rows that
 * belong to other parts must cost no more than a look. */
typedef struct routed_params {
    ps_to16_params to16;
    const int32_t *ids;
    const uint64_t *w0, *w1;
    uint32_t ids_a_row;
} routed_params;

/* Grid: rows, a warp each. */
enum { ROUTED_WARPS = 8 };
static __global__ void __launch_bounds__(ROUTED_WARPS * 32)
    k_to16_routed(const __grid_constant__ routed_params p)
{
    ps_dep_wait();
    const uint32_t lane = threadIdx.x % 32, row = blockIdx.x * ROUTED_WARPS + threadIdx.x / 32;
    if (row >= p.to16.n_x) return;
    bool taken = false;
    for (uint32_t i = lane; i < p.ids_a_row; i += 32) {
        const int32_t e = p.ids[(uint64_t)row * p.ids_a_row + i];
        taken |= p.w0[e] != 0 && p.w1[e] != 0;
    }
    if (!__any_sync(PS_FULL_WARP, taken)) return;
    float scale = 1.0f;
    if (!p.to16.bf16) scale = row_scale(ps_warp_max(max_of_share(p.to16, row, lane, 32)));
    write_share(p.to16, row, lane, 32, scale);
}

ps_status ps_cuda_to16_routed(const ps_launch *launch, ps_to16_params *p, const ps_rows *r)
{
    routed_params params = {*p, r->ids, r->w0, r->mode == PS_ROWS_PAIR ? r->w1 : r->w0, r->x_div};
    return ps_cuda_launch(launch, (const void *)k_to16_routed,
        dim3(ps_div_up(p->n_x, ROUTED_WARPS)), ROUTED_WARPS * 32, 0, &params);
}

/* ---- weights ---- */

/* Grid: x over runs of 16 columns, y over rows in strides. */
template <int F>
__global__ void __launch_bounds__(128) k_dequant(const __grid_constant__ ps_dequant_params p)
{
    constexpr uint32_t GROUPS = ps_block_elems<F>() / 16;
    ps_dep_wait();
    const uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x;
    if (unit * 16 >= p.ldw16) return;
    for (uint32_t row = blockIdx.y; row < p.n_rows; row += gridDim.y) {
        uint32_t v[8] = {};
        const uint8_t *block =
            p.w + row * p.row_bytes + (uint64_t)(unit / GROUPS) * ps_block_bytes<F>();
        if (unit * 16 < p.n_cols)
            ps_weights_16bit<F>(ps_unpack16<F, PS_GLOBAL>(block, unit % GROUPS), v);
        uint4 *to = (uint4 *)(p.w16 + (uint64_t)row * p.ldw16 + unit * 16);
        to[0] = make_uint4(v[0], v[1], v[2], v[3]);
        to[1] = make_uint4(v[4], v[5], v[6], v[7]);
    }
}

typedef struct fmt_kernel {
    uint32_t fmt;
    const void *kernel;
} fmt_kernel;

#define ROW(F)                                                                                     \
    {                                                                                              \
        F, (const void *)k_dequant<F>                                                              \
    }
static const fmt_kernel table[] = {ROW(PS_FMT_Q4_0), ROW(PS_FMT_Q4_1), ROW(PS_FMT_Q5_0),
    ROW(PS_FMT_Q5_1), ROW(PS_FMT_Q8_0), ROW(PS_FMT_Q2_K), ROW(PS_FMT_Q3_K), ROW(PS_FMT_Q4_K),
    ROW(PS_FMT_Q5_K), ROW(PS_FMT_Q6_K), ROW(PS_FMT_IQ4_NL), ROW(PS_FMT_IQ4_XS), ROW(PS_FMT_MXFP4)};
#undef ROW

static const void *dequant_kernel(uint32_t fmt)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].fmt == fmt) return table[i].kernel;
    return NULL;
}

ps_status ps_cuda_dequant(const ps_launch *launch, uint32_t fmt, ps_dequant_params *p)
{
    const void *kernel = dequant_kernel(fmt);
    if (kernel == NULL || !ps_fmt_row_bytes(fmt, p->n_cols, &p->row_bytes)) return PS_EINTERNAL;
    const dim3 grid(ps_div_up(p->ldw16, 16 * 128), p->n_rows < 65535 ? p->n_rows : 65535);
    return ps_cuda_launch(launch, kernel, grid, 128, 0, p);
}
