/* ps_quant - see ps_quant.h. One plain function a format and direction, written in the order of the
 * formula: which product is rounded first is part of the format's meaning, since files were made
 * and judged with that order.
 *
 * Bytes are read one by one, so blocks need no alignment. Nibbles: within a group the low halves of
 * all bytes come first, then the high halves.
 */
#include "format/ps_quant.h"

#include <math.h>
#include <string.h>

#ifdef __clang__
/* A fused multiply-add would round once where the format rounds twice. (gcc: off under -std=c11.)
 */
#pragma STDC FP_CONTRACT OFF
#endif

static const ps_fmt_info fmt_table[PS_FMT_COUNT] = {
    [PS_FMT_F32] = {"f32", 1, 4},
    [PS_FMT_F16] = {"f16", 1, 2},
    [PS_FMT_Q4_0] = {"q4_0", 32, 18},
    [PS_FMT_Q4_1] = {"q4_1", 32, 20},
    [PS_FMT_Q5_0] = {"q5_0", 32, 22},
    [PS_FMT_Q5_1] = {"q5_1", 32, 24},
    [PS_FMT_Q8_0] = {"q8_0", 32, 34},
    [PS_FMT_Q2_K] = {"q2_k", 256, 84},
    [PS_FMT_Q3_K] = {"q3_k", 256, 110},
    [PS_FMT_Q4_K] = {"q4_k", 256, 144},
    [PS_FMT_Q5_K] = {"q5_k", 256, 176},
    [PS_FMT_Q6_K] = {"q6_k", 256, 210},
    [PS_FMT_IQ4_NL] = {"iq4_nl", 32, 18},
    [PS_FMT_IQ4_XS] = {"iq4_xs", 256, 136},
    [PS_FMT_BF16] = {"bf16", 1, 2},
    [PS_FMT_MXFP4] = {"mxfp4", 32, 17},
};

const ps_fmt_info *ps_fmt_get(uint32_t fmt)
{
    if (fmt >= PS_FMT_COUNT || fmt_table[fmt].name == NULL) return NULL;
    return &fmt_table[fmt];
}

bool ps_fmt_find(const char *name, ps_fmt *out)
{
    for (uint32_t i = 0; i < PS_FMT_COUNT; i++) {
        const char *a = fmt_table[i].name, *b = name;
        if (a == NULL) continue;
        while (*a != 0 && *a == (*b >= 'A' && *b <= 'Z' ? *b + ('a' - 'A') : *b)) a++, b++;
        if (*a != 0 || *b != 0) continue;
        *out = (ps_fmt)i;
        return true;
    }
    return false;
}

bool ps_fmt_row_bytes(uint32_t fmt, uint64_t n, uint64_t *out)
{
    const ps_fmt_info *info = ps_fmt_get(fmt);
    if (info == NULL || n % info->block_elems != 0) return false;
    return ps_mul_u64(n / info->block_elems, info->block_bytes, out);
}

/* ---- 16-bit floats ---- */

static float bits_to_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static uint32_t f32_to_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

uint16_t ps_f32_to_f16(float f)
{
    uint32_t u = f32_to_bits(f), sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (mag >> 13 & 0x1ffu));
    if (mag >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* from 65536 on */
    if (mag < 0x38800000u) {
        /* Below 2^-14 the result counts units of 2^-24. Adding 0.5 moves that unit to the last bit
         * of a float's mantissa, so the hardware does the rounding; magnitudes below half a unit
         * become 0. */
        uint32_t r = f32_to_bits(bits_to_f32(mag) + 0.5f) - f32_to_bits(0.5f);
        return (uint16_t)(sign | r);
    }
    /* Rebias the exponent and round to even; a carry out of the mantissa correctly raises the
     * exponent, and turns 65520 and more into infinity. */
    uint32_t r = mag - (112u << 23) + 0xfffu + (mag >> 13 & 1u);
    return (uint16_t)(sign | r >> 13);
}

uint16_t ps_f32_to_bf16(float f)
{
    uint32_t u = f32_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static uint16_t load_u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}
static void store_u16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}
static float load_f16(const uint8_t *p)
{
    return ps_f16_to_f32(load_u16(p));
}
static uint32_t load_u32(const uint8_t *p)
{
    return load_u16(p) | (uint32_t)load_u16(p + 2) << 16;
}

/* ---- blocks to floats: one function a format, for one block ---- */

static void dq_f32(const uint8_t *b, float *y)
{
    memcpy(y, b, 4);
}
static void dq_f16(const uint8_t *b, float *y)
{
    *y = load_f16(b);
}
static void dq_bf16(const uint8_t *b, float *y)
{
    *y = ps_bf16_to_f32(load_u16(b));
}

/* d f16, qs 16 bytes; w = d * (q - 8) */
static void dq_q4_0(const uint8_t *b, float *y)
{
    const float d = load_f16(b);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)((b[2 + i] & 15) - 8);
        y[i + 16] = d * (float)((b[2 + i] >> 4) - 8);
    }
}

/* d f16, m f16, qs 16 bytes; w = d * q + m */
static void dq_q4_1(const uint8_t *b, float *y)
{
    const float d = load_f16(b), m = load_f16(b + 2);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)(b[4 + i] & 15) + m;
        y[i + 16] = d * (float)(b[4 + i] >> 4) + m;
    }
}

/* d f16, fifth bits 4 bytes (bit i is weight i's), qs 16 bytes; w = d * (q - 16) */
static void dq_q5_0(const uint8_t *b, float *y)
{
    const float d = load_f16(b);
    const uint32_t qh = load_u32(b + 2);
    for (int i = 0; i < 32; i++) {
        int q = (b[6 + i % 16] >> (i / 16 * 4) & 15) | (int)(qh >> i & 1u) << 4;
        y[i] = d * (float)(q - 16);
    }
}

/* d f16, m f16, fifth bits, qs; w = d * q + m */
static void dq_q5_1(const uint8_t *b, float *y)
{
    const float d = load_f16(b), m = load_f16(b + 2);
    const uint32_t qh = load_u32(b + 4);
    for (int i = 0; i < 32; i++) {
        int q = (b[8 + i % 16] >> (i / 16 * 4) & 15) | (int)(qh >> i & 1u) << 4;
        y[i] = d * (float)q + m;
    }
}

/* d f16, 32 signed bytes */
static void dq_q8_0(const uint8_t *b, float *y)
{
    const float d = load_f16(b);
    for (int i = 0; i < 32; i++) y[i] = (float)(int8_t)b[2 + i] * d;
}

/* 16 bytes of (scale low, min high) nibbles, qs 64 bytes of 2-bit values, d f16, dmin f16. Groups
 * of 16 weights; w = (d * scale) * q - dmin * min. A run of 128 weights shares 32 bytes: bits 0-1
 * are its first 32 weights. */
static void dq_q2_k(const uint8_t *b, float *y)
{
    const uint8_t *qs = b + 16;
    const float d = load_f16(b + 80), dmin = load_f16(b + 82);
    for (int i = 0; i < 256; i++) {
        const int sc = b[i / 16];
        const int q = qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        const float dl = d * (float)(sc & 15), ml = dmin * (float)(sc >> 4);
        y[i] = dl * (float)q - ml;
    }
}

/* Third bits 32 bytes (bit i/32 of byte i%32; a clear bit subtracts 4), qs 64 bytes as q2_k, 12
 * bytes of sixteen 6-bit scales (four low bits: nibbles of bytes 0-7; two high bits: bytes 8-11), d
 * f16; w = (d * (scale - 32)) * q. */
static void dq_q3_k(const uint8_t *b, float *y)
{
    const uint8_t *qs = b + 32, *scales = b + 96;
    const float d = load_f16(b + 108);
    for (int i = 0; i < 256; i++) {
        const int g = i / 16;
        const int sc = (scales[g % 8] >> (g / 8 * 4) & 15) | (scales[8 + g % 4] >> (g / 4 * 2) & 3)
                                                                 << 4;
        const int q = (qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) -
                      ((b[i % 32] >> (i / 32) & 1) != 0 ? 0 : 4);
        y[i] = d * (float)(sc - 32) * (float)q;
    }
}

/* Eight 6-bit scales and eight 6-bit minima in 12 bytes: the first four of each are the low six
 * bits of bytes 0-3 and 4-7; the last four have their low nibbles in bytes 8-11 (scale low, minimum
 * high) and their two high bits on top of bytes 0-3 and 4-7. */
static void scale_min_k4(const uint8_t *s, int g, int *sc, int *mn)
{
    if (g < 4) {
        *sc = s[g] & 63;
        *mn = s[g + 4] & 63;
    } else {
        *sc = (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        *mn = s[g + 4] >> 4 | (s[g] >> 6) << 4;
    }
}

/* d f16, dmin f16, 12 bytes of scales and minima, qs 128 bytes. Groups of 32; w = (d * scale) * q -
 * dmin * min. */
static void dq_q4_k(const uint8_t *b, float *y)
{
    const uint8_t *qs = b + 16;
    const float d = load_f16(b), dmin = load_f16(b + 2);
    for (int g = 0; g < 8; g++) {
        int sc, mn;
        scale_min_k4(b + 4, g, &sc, &mn);
        const float dl = d * (float)sc, ml = dmin * (float)mn;
        for (int i = 0; i < 32; i++) {
            const int q = qs[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
            y[g * 32 + i] = dl * (float)q - ml;
        }
    }
}

/* As q4_k with 32 bytes of fifth bits (bit g of byte i: weight i of group g) before qs. */
static void dq_q5_k(const uint8_t *b, float *y)
{
    const uint8_t *qh = b + 16, *qs = b + 48;
    const float d = load_f16(b), dmin = load_f16(b + 2);
    for (int g = 0; g < 8; g++) {
        int sc, mn;
        scale_min_k4(b + 4, g, &sc, &mn);
        const float dl = d * (float)sc, ml = dmin * (float)mn;
        for (int i = 0; i < 32; i++) {
            const int q = (qs[g / 2 * 32 + i] >> (g % 2 * 4) & 15) | (qh[i] >> g & 1) << 4;
            y[g * 32 + i] = dl * (float)q - ml;
        }
    }
}

/* Low nibbles 128 bytes (64 to a run of 128 weights), high bit pairs 64 bytes, 16 signed scales, d
 * f16. Groups of 16; w = (d * scale) * (q - 32). */
static void dq_q6_k(const uint8_t *b, float *y)
{
    const uint8_t *qh = b + 128, *scales = b + 192;
    const float d = load_f16(b + 208);
    for (int i = 0; i < 256; i++) {
        const int run = i / 128, r = i % 128;
        const int q = (b[run * 64 + r % 64] >> (r / 64 * 4) & 15) |
                      (qh[run * 32 + r % 32] >> (r / 32 * 2) & 3) << 4;
        y[i] = d * (float)(int8_t)scales[i / 16] * (float)(q - 32);
    }
}

/* The 16 levels of the non-linear 4-bit formats. */
static const int8_t iq4_levels[16] = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* d f16, qs 16 bytes; w = d * level[q] */
static void dq_iq4_nl(const uint8_t *b, float *y)
{
    const float d = load_f16(b);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)iq4_levels[b[2 + i] & 15];
        y[i + 16] = d * (float)iq4_levels[b[2 + i] >> 4];
    }
}

/* d f16, eight 6-bit scales (high pairs in 2 bytes, low nibbles in 4), qs 128 bytes in groups of 32
 * weights; w = (d * (scale - 32)) * level[q]. */
static void dq_iq4_xs(const uint8_t *b, float *y)
{
    const uint8_t *qs = b + 8;
    const float d = load_f16(b);
    const unsigned high = load_u16(b + 2);
    for (int g = 0; g < 8; g++) {
        const int sc = (b[4 + g / 2] >> (g % 2 * 4) & 15) | (int)(high >> (2 * g) & 3u) << 4;
        const float dl = d * (float)(sc - 32);
        for (int i = 0; i < 16; i++) {
            y[g * 32 + i] = dl * (float)iq4_levels[qs[g * 16 + i] & 15];
            y[g * 32 + i + 16] = dl * (float)iq4_levels[qs[g * 16 + i] >> 4];
        }
    }
}

/* Exponent byte e, qs 16 bytes of E2M1 values; w = 2^(e - 127) * value. The table holds twice the
 * values, so that they are integers, and the scale is half: 2^(e - 128), a subnormal for e < 2. */
static void dq_mxfp4(const uint8_t *b, float *y)
{
    static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const uint32_t e = b[0];
    const float d = bits_to_f32(e < 2u ? 0x00200000u << e : (e - 1u) << 23);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)twice[b[1 + i] & 15];
        y[i + 16] = d * (float)twice[b[1 + i] >> 4];
    }
}

typedef void (*dequant_block_fn)(const uint8_t *block, float *y);

static const dequant_block_fn dequant_table[PS_FMT_COUNT] = {
    [PS_FMT_F32] = dq_f32,
    [PS_FMT_F16] = dq_f16,
    [PS_FMT_Q4_0] = dq_q4_0,
    [PS_FMT_Q4_1] = dq_q4_1,
    [PS_FMT_Q5_0] = dq_q5_0,
    [PS_FMT_Q5_1] = dq_q5_1,
    [PS_FMT_Q8_0] = dq_q8_0,
    [PS_FMT_Q2_K] = dq_q2_k,
    [PS_FMT_Q3_K] = dq_q3_k,
    [PS_FMT_Q4_K] = dq_q4_k,
    [PS_FMT_Q5_K] = dq_q5_k,
    [PS_FMT_Q6_K] = dq_q6_k,
    [PS_FMT_IQ4_NL] = dq_iq4_nl,
    [PS_FMT_IQ4_XS] = dq_iq4_xs,
    [PS_FMT_BF16] = dq_bf16,
    [PS_FMT_MXFP4] = dq_mxfp4,
};

void ps_dequant_row(ps_fmt fmt, const void *src, float *dst, uint64_t n)
{
    const ps_fmt_info *info = ps_fmt_get(fmt);
    if (info == NULL) return;
    const uint8_t *b = src;
    for (uint64_t i = 0; i < n; i += info->block_elems, b += info->block_bytes)
        dequant_table[fmt](b, dst + i);
}

/* ---- floats to blocks ---- */

/* Truncate towards zero into [0, top]; NaN gives 0, so that no input makes the conversion
 * undefined. */
static uint8_t to_level(float v, int top)
{
    if (!(v > 0.0f)) return 0;
    return (uint8_t)(v >= (float)top ? top : (int)v);
}

static void q_f32(const float *x, uint8_t *b)
{
    memcpy(b, x, 4);
}
static void q_f16(const float *x, uint8_t *b)
{
    store_u16(b, ps_f32_to_f16(*x));
}
static void q_bf16(const float *x, uint8_t *b)
{
    store_u16(b, ps_f32_to_bf16(*x));
}

/* The weight of the largest magnitude, with its sign (the first one of equals). */
static float signed_peak(const float *x)
{
    float peak = 0.0f;
    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > fabsf(peak)) peak = x[i];
    return peak;
}

static void range_of(const float *x, float *lo, float *hi)
{
    *lo = *hi = x[0];
    for (int i = 1; i < 32; i++) {
        if (x[i] < *lo) *lo = x[i];
        if (x[i] > *hi) *hi = x[i];
    }
}

static void pack_levels(const uint8_t *q, uint8_t *qs, uint8_t *qh)
{
    for (int i = 0; i < 16; i++) qs[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
    if (qh == NULL) return;
    memset(qh, 0, 4);
    for (int i = 0; i < 32; i++) qh[i / 8] = (uint8_t)(qh[i / 8] | (q[i] >> 4) << (i % 8));
}

/* Symmetric: the weight of the largest magnitude becomes level 0, zero sits at `half`. */
static void levels_around_zero(const float *x, int half, uint8_t *d_out, uint8_t *q)
{
    const float d = signed_peak(x) / (float)-half, inv = d != 0.0f ? 1.0f / d : 0.0f;
    for (int i = 0; i < 32; i++) q[i] = to_level(x[i] * inv + ((float)half + 0.5f), 2 * half - 1);
    store_u16(d_out, ps_f32_to_f16(d));
}

/* Affine: the smallest weight becomes level 0, the largest becomes `top`. */
static void levels_in_range(const float *x, int top, uint8_t *d_out, uint8_t *q)
{
    float lo, hi;
    range_of(x, &lo, &hi);
    const float d = (hi - lo) / (float)top, inv = d != 0.0f ? 1.0f / d : 0.0f;
    for (int i = 0; i < 32; i++) q[i] = to_level((x[i] - lo) * inv + 0.5f, top);
    store_u16(d_out, ps_f32_to_f16(d));
    store_u16(d_out + 2, ps_f32_to_f16(lo));
}

static void q_q4_0(const float *x, uint8_t *b)
{
    uint8_t q[32];
    levels_around_zero(x, 8, b, q);
    pack_levels(q, b + 2, NULL);
}

static void q_q4_1(const float *x, uint8_t *b)
{
    uint8_t q[32];
    levels_in_range(x, 15, b, q);
    pack_levels(q, b + 4, NULL);
}

static void q_q5_0(const float *x, uint8_t *b)
{
    uint8_t q[32];
    levels_around_zero(x, 16, b, q);
    pack_levels(q, b + 6, b + 2);
}

static void q_q5_1(const float *x, uint8_t *b)
{
    uint8_t q[32];
    levels_in_range(x, 31, b, q);
    pack_levels(q, b + 8, b + 4);
}

static void q_q8_0(const float *x, uint8_t *b)
{
    const float d = fabsf(signed_peak(x)) / 127.0f, inv = d != 0.0f ? 1.0f / d : 0.0f;
    store_u16(b, ps_f32_to_f16(d));
    for (int i = 0; i < 32; i++) {
        const float v = x[i] * inv;
        const uint8_t mag = to_level(roundf(fabsf(v)), 127);
        b[2 + i] = (uint8_t)(v < 0.0f ? -(int)mag : mag);
    }
}

typedef void (*quant_block_fn)(const float *x, uint8_t *block);

static const quant_block_fn quant_table[PS_FMT_COUNT] = {
    [PS_FMT_F32] = q_f32,
    [PS_FMT_F16] = q_f16,
    [PS_FMT_Q4_0] = q_q4_0,
    [PS_FMT_Q4_1] = q_q4_1,
    [PS_FMT_Q5_0] = q_q5_0,
    [PS_FMT_Q5_1] = q_q5_1,
    [PS_FMT_Q8_0] = q_q8_0,
    [PS_FMT_BF16] = q_bf16,
};

bool ps_quant_row(ps_fmt fmt, const float *src, void *dst, uint64_t n)
{
    const ps_fmt_info *info = ps_fmt_get(fmt);
    if (info == NULL || quant_table[fmt] == NULL || n % info->block_elems != 0) return false;
    uint8_t *b = dst;
    for (uint64_t i = 0; i < n; i += info->block_elems, b += info->block_bytes)
        quant_table[fmt](src + i, b);
    return true;
}
