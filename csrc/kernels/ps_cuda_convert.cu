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

/* Grid: rows. A thread takes pairs of columns. */
static __global__ void __launch_bounds__(256) k_to16(const __grid_constant__ ps_to16_params p)
{
    __shared__ float part[32];
    ps_dep_wait();
    const float *x = p.x + (uint64_t)blockIdx.x * p.ldx;
    uint32_t *out = (uint32_t *)(p.x16 + (uint64_t)blockIdx.x * p.ldx16); /* ldx16 is even */
    float scale = 1.0f, inverse = 1.0f;
    if (!p.bf16) {
        float max = 0.0f;
        for (uint32_t c = threadIdx.x; c < p.n_cols; c += blockDim.x) max = fmaxf(max, fabsf(x[c]));
        scale = row_scale(ps_block_max(max, part));
        inverse = __uint_as_float((254u << 23) - __float_as_uint(scale));
    }
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
    for (uint32_t c = threadIdx.x; c < p.ldx16 / 2; c += blockDim.x) {
        const float lo = 2 * c < p.n_cols ? x[2 * c] * inverse : 0.0f;
        const float hi = 2 * c + 1 < p.n_cols ? x[2 * c + 1] * inverse : 0.0f;
        out[c] = p.bf16 ? ps_pack_bf16(lo, hi) : ps_pack_f16(lo, hi);
    }
}

ps_status ps_cuda_to16(const ps_launch *launch, uint32_t n_rows, ps_to16_params *p)
{
    return ps_cuda_launch(launch, (const void *)k_to16, dim3(n_rows), 256, 0, p);
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
