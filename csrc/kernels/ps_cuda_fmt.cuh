/* ps_cuda_fmt - the block formats on the GPU. One function takes 16 consecutive weights of a block
 * apart into small integers, a scale and an offset; everything else (8-bit dot products, 16-bit
 * tiles, plain floats) is made of that.
 *
 * Not here: F32, F16 and BF16, which have no blocks. The meaning of each block's bytes is told in
 * format/ps_quant.c. Threads: device code, any thread.
 */
#ifndef PS_CUDA_FMT_CUH
#define PS_CUDA_FMT_CUH

#include "kernels/ps_cuda.cuh"

/* Geometry, as in ps_quant.c's table (test_ops compares results of every format). */
template <int F> __host__ __device__ constexpr int ps_block_elems()
{
    return F == PS_FMT_Q2_K || F == PS_FMT_Q3_K || F == PS_FMT_Q4_K || F == PS_FMT_Q5_K ||
                   F == PS_FMT_Q6_K || F == PS_FMT_IQ4_XS
               ? 256
               : 32;
}
template <int F> __host__ __device__ constexpr int ps_block_bytes()
{
    return F == PS_FMT_Q4_0     ? 18
           : F == PS_FMT_Q4_1   ? 20
           : F == PS_FMT_Q5_0   ? 22
           : F == PS_FMT_Q5_1   ? 24
           : F == PS_FMT_Q8_0   ? 34
           : F == PS_FMT_Q2_K   ? 84
           : F == PS_FMT_Q3_K   ? 110
           : F == PS_FMT_Q4_K   ? 144
           : F == PS_FMT_Q5_K   ? 176
           : F == PS_FMT_Q6_K   ? 210
           : F == PS_FMT_IQ4_NL ? 18
           : F == PS_FMT_IQ4_XS ? 136
                                : 17; /* MXFP4 */
}
/* What blocks are aligned to when the first one lies at a multiple of 16. */
template <int F> __host__ __device__ constexpr int ps_block_align()
{
    return ps_block_bytes<F>() % 16 == 0  ? 16
           : ps_block_bytes<F>() % 8 == 0 ? 8
           : ps_block_bytes<F>() % 4 == 0 ? 4
           : ps_block_bytes<F>() % 2 == 0 ? 2
                                          : 1;
}
/* Weights that share a scale. */
template <int F> __host__ __device__ constexpr int ps_group_elems()
{
    return F == PS_FMT_Q2_K || F == PS_FMT_Q3_K || F == PS_FMT_Q6_K ? 16 : 32;
}
/* w = d * (q - zero) + m; m only where has_min. */
template <int F> __host__ __device__ constexpr int ps_zero()
{
    return F == PS_FMT_Q4_0   ? 8
           : F == PS_FMT_Q5_0 ? 16
           : F == PS_FMT_Q6_K ? 32
           : F == PS_FMT_Q3_K ? 4
                              : 0;
}
template <int F> __host__ __device__ constexpr bool ps_has_min()
{
    return F == PS_FMT_Q4_1 || F == PS_FMT_Q5_1 || F == PS_FMT_Q2_K || F == PS_FMT_Q4_K ||
           F == PS_FMT_Q5_K;
}
/* q may be negative. */
template <int F> __host__ __device__ constexpr bool ps_is_signed()
{
    return F == PS_FMT_Q8_0 || F == PS_FMT_IQ4_NL || F == PS_FMT_IQ4_XS || F == PS_FMT_MXFP4;
}

typedef struct ps_w16 {
    uint32_t q[4]; /* 16 bytes in order, each one weight's integer */
    float d, m;
} ps_w16;

/* ---- reading bytes ----
 * Blocks lie in shared memory, where up to 4 bytes behind them may be read, or in global memory,
 * where nothing else may be touched; the alignment is what ps_block_align promises. */
enum { PS_SMEM, PS_GLOBAL };

template <int ALIGN, int SPACE> PS_DEVICE void ps_words4(const uint8_t *p, uint32_t w[4])
{
    if constexpr (ALIGN == 16) {
        const uint4 v = *(const uint4 *)p;
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else if constexpr (ALIGN == 8) {
        const uint2 v = *(const uint2 *)p, u = *(const uint2 *)(p + 8);
        w[0] = v.x, w[1] = v.y, w[2] = u.x, w[3] = u.y;
    } else if constexpr (ALIGN == 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = *(const uint32_t *)(p + 4 * i);
    } else if constexpr (SPACE == PS_SMEM) {
        const uint32_t shift = ((uintptr_t)p & 3) * 8;
        const uint32_t *at = (const uint32_t *)((uintptr_t)p & ~(uintptr_t)3);
        uint32_t lo = at[0];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t hi = at[i + 1];
            w[i] = __funnelshift_r(lo, hi, shift);
            lo = hi;
        }
    } else if constexpr (ALIGN == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = *(const uint16_t *)(p + 4 * i) | (uint32_t) * (const uint16_t *)(p + 4 * i + 2)
                                                        << 16;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = p[4 * i] | (uint32_t)p[4 * i + 1] << 8 | (uint32_t)p[4 * i + 2] << 16 |
                   (uint32_t)p[4 * i + 3] << 24;
    }
}

PS_DEVICE uint32_t ps_u16(const uint8_t *p) /* 2-byte aligned */
{
    return *(const uint16_t *)p;
}
PS_DEVICE float ps_f16_at(const uint8_t *p)
{
    return ps_f16(*(const uint16_t *)p);
}
PS_DEVICE uint32_t ps_u32_at2(const uint8_t *p)
{
    return ps_u16(p) | ps_u16(p + 2) << 16;
}

/* ---- bit work ---- */

/* Bit i of the low four becomes bit 4 of byte i. */
PS_DEVICE uint32_t ps_spread4(uint32_t bits)
{
    return ((bits & 15) * 0x00204081u & 0x01010101u) << 4;
}

/* The low nibble of each byte, as an index into 16 signed bytes. */
PS_DEVICE uint32_t ps_lookup4(uint32_t nibbles, uint32_t t0, uint32_t t1, uint32_t t2, uint32_t t3)
{
    const uint32_t pairs = nibbles | nibbles >> 4;           /* bytes 0 and 2: two nibbles each */
    const uint32_t sel = __byte_perm(pairs, 0, 0x4420);      /* four nibbles in 16 bits */
    const uint32_t low = __byte_perm(t0, t1, sel & 0x7777);  /* entry n % 8 of the first half */
    const uint32_t high = __byte_perm(t2, t3, sel & 0x7777); /* and of the second */
    return __byte_perm(low, high, 0x3210u | (sel & 0x8888u) >> 1); /* byte i of low, or of high */
}
PS_DEVICE uint32_t ps_iq4_levels(uint32_t nibbles)
{
    return ps_lookup4(nibbles, 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
}
PS_DEVICE uint32_t ps_mxfp4_twice(uint32_t nibbles)
{
    return ps_lookup4(nibbles, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);
}

/* Scale and minimum of group g of Q4_K and Q5_K. */
PS_DEVICE void ps_scale_min_k4(const uint8_t *s, int g, int *scale, int *min)
{
    if (g < 4) {
        *scale = s[g] & 63;
        *min = s[g + 4] & 63;
    } else {
        *scale = (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        *min = s[g + 4] >> 4 | (s[g] >> 6) << 4;
    }
}

/* ---- weights 16 j .. 16 j + 15 of the block at b ---- */

template <int F, int SPACE> PS_DEVICE ps_w16 ps_unpack32(const uint8_t *b, int j)
{
    constexpr int ALIGN =
        ps_block_align<F>() > 4 ? 4 : ps_block_align<F>(); /* headers are 2 to 8 bytes */
    ps_w16 w;
    w.m = 0.0f;
    if constexpr (F == PS_FMT_Q4_0) {
        ps_words4<ALIGN, SPACE>(b + 2, w.q);
        w.d = ps_f16_at(b);
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = w.q[i] >> (4 * j) & 0x0f0f0f0fu;
    } else if constexpr (F == PS_FMT_Q4_1) {
        ps_words4<ALIGN, SPACE>(b + 4, w.q);
        w.d = ps_f16_at(b), w.m = ps_f16_at(b + 2);
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = w.q[i] >> (4 * j) & 0x0f0f0f0fu;
    } else if constexpr (F == PS_FMT_Q5_0) {
        ps_words4<ALIGN, SPACE>(b + 6, w.q);
        const uint32_t high = ps_u32_at2(b + 2) >> (16 * j);
        w.d = ps_f16_at(b);
#pragma unroll
        for (int i = 0; i < 4; i++)
            w.q[i] = (w.q[i] >> (4 * j) & 0x0f0f0f0fu) | ps_spread4(high >> (4 * i));
    } else if constexpr (F == PS_FMT_Q5_1) {
        ps_words4<ALIGN, SPACE>(b + 8, w.q);
        const uint32_t high = *(const uint32_t *)(b + 4) >> (16 * j);
        w.d = ps_f16_at(b), w.m = ps_f16_at(b + 2);
#pragma unroll
        for (int i = 0; i < 4; i++)
            w.q[i] = (w.q[i] >> (4 * j) & 0x0f0f0f0fu) | ps_spread4(high >> (4 * i));
    } else if constexpr (F == PS_FMT_Q8_0) {
        ps_words4<ALIGN, SPACE>(b + 2 + 16 * j, w.q);
        w.d = ps_f16_at(b);
    } else if constexpr (F == PS_FMT_IQ4_NL) {
        ps_words4<ALIGN, SPACE>(b + 2, w.q);
        w.d = ps_f16_at(b);
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = ps_iq4_levels(w.q[i] >> (4 * j) & 0x0f0f0f0fu);
    } else { /* MXFP4; 2^(e - 128), a subnormal for e < 2 */
        ps_words4<ALIGN, SPACE>(b + 1, w.q);
        const uint32_t e = b[0];
        w.d = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = ps_mxfp4_twice(w.q[i] >> (4 * j) & 0x0f0f0f0fu);
    }
    return w;
}

template <int F, int SPACE> PS_DEVICE ps_w16 ps_unpack256(const uint8_t *b, int j)
{
    constexpr int ALIGN = ps_block_align<F>(); /* all parts below keep it, up to 16 */
    const int run = j / 8, part = j % 8, second = j & 1;
    ps_w16 w;
    uint32_t high[4];
    w.m = 0.0f;
    if constexpr (F == PS_FMT_Q2_K) {
        ps_words4<ALIGN, SPACE>(b + 16 + run * 32 + second * 16, w.q);
        w.d = ps_f16_at(b + 80) * (float)(b[j] & 15);
        w.m = -(ps_f16_at(b + 82) * (float)(b[j] >> 4));
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = w.q[i] >> (part / 2 * 2) & 0x03030303u;
    } else if constexpr (F == PS_FMT_Q3_K) {
        ps_words4<ALIGN, SPACE>(b + 32 + run * 32 + second * 16, w.q);
        ps_words4<ALIGN, SPACE>(b + second * 16, high);
        const uint8_t *s = b + 96;
        const int scale = (s[j % 8] >> (j / 8 * 4) & 15) | (s[8 + j % 4] >> (j / 4 * 2) & 3) << 4;
        w.d = ps_f16_at(b + 108) * (float)(scale - 32);
#pragma unroll
        for (int i = 0; i < 4; i++)
            w.q[i] = (w.q[i] >> (part / 2 * 2) & 0x03030303u) | (high[i] >> (j / 2) & 0x01010101u)
                                                                    << 2;
    } else if constexpr (F == PS_FMT_Q4_K || F == PS_FMT_Q5_K) {
        const int g = j / 2;
        int scale, min;
        ps_scale_min_k4(b + 4, g, &scale, &min);
        w.d = ps_f16_at(b) * (float)scale;
        w.m = -(ps_f16_at(b + 2) * (float)min);
        ps_words4<ALIGN, SPACE>(b + (F == PS_FMT_Q4_K ? 16 : 48) + g / 2 * 32 + second * 16, w.q);
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = w.q[i] >> (g % 2 * 4) & 0x0f0f0f0fu;
        if constexpr (F == PS_FMT_Q5_K) {
            ps_words4<ALIGN, SPACE>(b + 16 + second * 16, high);
#pragma unroll
            for (int i = 0; i < 4; i++) w.q[i] |= (high[i] >> g & 0x01010101u) << 4;
        }
    } else if constexpr (F == PS_FMT_Q6_K) {
        ps_words4<ALIGN, SPACE>(b + run * 64 + part % 4 * 16, w.q);
        ps_words4<ALIGN, SPACE>(b + 128 + run * 32 + second * 16, high);
        w.d = ps_f16_at(b + 208) * (float)(int8_t)b[192 + j];
#pragma unroll
        for (int i = 0; i < 4; i++)
            w.q[i] = (w.q[i] >> (part / 4 * 4) & 0x0f0f0f0fu) |
                     (high[i] >> (part / 2 * 2) & 0x03030303u) << 4;
    } else { /* IQ4_XS */
        const int g = j / 2;
        const int scale = (b[4 + g / 2] >> (g % 2 * 4) & 15) | (int)(ps_u16(b + 2) >> (2 * g) & 3)
                                                                   << 4;
        w.d = ps_f16_at(b) * (float)(scale - 32);
        ps_words4<ALIGN, SPACE>(b + 8 + g * 16, w.q);
#pragma unroll
        for (int i = 0; i < 4; i++) w.q[i] = ps_iq4_levels(w.q[i] >> (4 * second) & 0x0f0f0f0fu);
    }
    return w;
}

template <int F, int SPACE> PS_DEVICE ps_w16 ps_unpack16(const uint8_t *block, int j)
{
    if constexpr (ps_block_elems<F>() == 32)
        return ps_unpack32<F, SPACE>(block, j);
    else
        return ps_unpack256<F, SPACE>(block, j);
}

/* ---- as floats, bit for bit what ps_dequant_row gives ---- */
template <int F> PS_DEVICE float ps_weight(const ps_w16 &w, int i)
{
    const uint32_t byte = w.q[i / 4] >> (i % 4 * 8);
    const int q = ps_is_signed<F>() ? (int)(int8_t)byte : (int)(byte & 255);
    const float v = __fmul_rn(w.d, (float)(q - ps_zero<F>()));
    return ps_has_min<F>() ? __fadd_rn(v, w.m) : v;
}

/* ---- as pairs of F16 (of BF16 for MXFP4), one rounding ----
 * A byte u under the exponent byte of 1024 reads as 1024 + u, so integers become floats without a
 * conversion. Scales of blocks are multiples of 2^-24, hence exact even where they are subnormal in
 * F16. */
template <int F> PS_DEVICE void ps_weights_16bit(const ps_w16 &w, uint32_t pairs[8])
{
    if constexpr (F == PS_FMT_MXFP4) { /* q + 16 is positive; the exponent byte of 128 has room for
                                          7 bits */
        const uint32_t d = ps_pack_bf16(w.d, w.d);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t u =
                (w.q[i] ^ 0x80808080u) - 0x70707070u; /* no byte borrows: all are >= 116 */
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t v = __byte_perm(u, 0x43434343u, h ? 0x4342 : 0x4140);
                const uint32_t q = ps_fma_bf16(v, 0x3f803f80u, 0xc310c310u); /* - 144 */
                pairs[2 * i + h] = ps_fma_bf16(q, d, 0x80008000u);           /* + -0 */
            }
        }
    } else {
        constexpr uint32_t zero = 0xe400u + (ps_is_signed<F>() ? 128 : ps_zero<F>());
        constexpr uint32_t minus = zero << 16 | zero; /* -(1024 + zero) */
        const uint32_t d = ps_pack_f16(w.d, w.d), m = ps_pack_f16(w.m, w.m);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t u = ps_is_signed<F>() ? w.q[i] ^ 0x80808080u : w.q[i];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t v = __byte_perm(u, 0x64646464u, h ? 0x4342 : 0x4140);
                const uint32_t q = ps_add_f16(v, minus);
                pairs[2 * i + h] = ps_has_min<F>() ? ps_fma_f16(q, d, m) : ps_mul_f16(q, d);
            }
        }
    }
}

#endif
