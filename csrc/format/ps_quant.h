/* ps_quant - the weight formats of GGUF: one table of block geometry, and for each format the plain
 * scalar code that turns a block into floats. This is the reference that every faster kernel is
 * held against.
 *
 * Not here: fast kernels (kernels/), files (ps_gguf).
 * Threads: pure functions over the caller's memory.
 */
#ifndef PS_QUANT_H
#define PS_QUANT_H

#include "base/ps_base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Values are GGUF's own type ids, so that a tensor directory needs no translation. */
typedef enum ps_fmt {
    PS_FMT_F32 = 0,
    PS_FMT_F16 = 1,
    PS_FMT_Q4_0 = 2,
    PS_FMT_Q4_1 = 3,
    PS_FMT_Q5_0 = 6,
    PS_FMT_Q5_1 = 7,
    PS_FMT_Q8_0 = 8,
    PS_FMT_Q2_K = 10,
    PS_FMT_Q3_K = 11,
    PS_FMT_Q4_K = 12,
    PS_FMT_Q5_K = 13,
    PS_FMT_Q6_K = 14,
    PS_FMT_IQ4_NL = 20,
    PS_FMT_IQ4_XS = 23,
    PS_FMT_BF16 = 30,
    PS_FMT_MXFP4 = 39,
    PS_FMT_COUNT = 40, /* table size; ids between that are missing above are unsupported */
} ps_fmt;

typedef struct ps_fmt_info {
    const char *name;     /* GGUF spelling in lower case: "q4_k"; NULL: unsupported id */
    uint16_t block_elems; /* weights in a block: 1, 32 or 256 */
    uint16_t block_bytes; /* bytes of a block */
} ps_fmt_info;

/* NULL where the id is not one of ours. */
const ps_fmt_info *ps_fmt_get(uint32_t fmt);
/* By name, any case ("Q4_K"); false where unknown. */
bool ps_fmt_find(const char *name, ps_fmt *out);
/* Bytes of a row of `n` weights; false where n is not a multiple of the block or the product
 * overflows. */
bool ps_fmt_row_bytes(uint32_t fmt, uint64_t n, uint64_t *out);

/* Scalar conversions. n is a multiple of block_elems. dst and src may not overlap. */
void ps_dequant_row(ps_fmt fmt, const void *src, float *dst, uint64_t n);
/* The other way, for synthetic models and tests: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0;
 * false otherwise. */
bool ps_quant_row(ps_fmt fmt, const float *src, void *dst, uint64_t n);

static inline float ps_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu, bits;
    if (exp == 31u)
        bits = sign | 0x7f800000u | man << 13;
    else if (exp != 0u)
        bits = sign | (exp + 112u) << 23 | man << 13;
    else { /* zero or subnormal: value = man * 2^-24, exact in float */
        union {
            float f;
            uint32_t u;
        } v = {.f = (float)man * 0x1.0p-24f};
        bits = sign | v.u;
    }
    union {
        uint32_t u;
        float f;
    } out = {.u = bits};
    return out.f;
}
uint16_t ps_f32_to_f16(float f); /* round to nearest even; overflow to infinity, NaN stays NaN */
static inline float ps_bf16_to_f32(uint16_t h)
{
    union {
        uint32_t u;
        float f;
    } out = {.u = (uint32_t)h << 16};
    return out.f;
}
uint16_t ps_f32_to_bf16(float f); /* round to nearest even; NaN stays NaN */

#ifdef __cplusplus
}
#endif
#endif
