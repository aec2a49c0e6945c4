/* ps_cpu_avx2_load - blocks of every quantised format brought to one form, 32 weights at a time:
 * bytes u in their natural order, a float scale for each 32 (or 16) of them and an offset:
 * w = scale * u + factor * min, where the factor belongs to the format. Bytes are unsigned and at
 * most 63, so that sums of two products with inputs fit 16 bits; formats that need eight bits are
 * signed and have no offset.
 *
 * Not here: products.
 * Threads: pure functions, inlined with a constant format.
 */
#ifndef PS_CPU_AVX2_LOAD_H
#define PS_CPU_AVX2_LOAD_H

#include "format/ps_quant.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Scales and offsets of 256 weights: 8 or 16 of each. */
typedef struct scales {
    float scale[16], min[16];
} scales;

/* ---- formats ---- */

INLINE bool has_16_blocks(ps_fmt fmt)
{
    return fmt == PS_FMT_Q2_K || fmt == PS_FMT_Q3_K || fmt == PS_FMT_Q6_K;
}

INLINE bool is_signed(ps_fmt fmt)
{
    return fmt == PS_FMT_Q8_0 || fmt == PS_FMT_IQ4_NL || fmt == PS_FMT_IQ4_XS;
}

INLINE float min_factor(ps_fmt fmt)
{
    switch (fmt) {
    case PS_FMT_Q4_0: return -8;
    case PS_FMT_Q5_0: return -16;
    case PS_FMT_Q4_1:
    case PS_FMT_Q5_1: return 1;
    case PS_FMT_Q3_K: return -4;
    case PS_FMT_Q6_K: return -32;
    case PS_FMT_MXFP4: return -12;
    case PS_FMT_Q8_0:
    case PS_FMT_IQ4_NL:
    case PS_FMT_IQ4_XS: return 0;
    default: return -1; /* Q2_K, Q4_K, Q5_K */
    }
}

/* Bytes of 32 weights of a format of 32-blocks. */
INLINE size_t block_step(ps_fmt fmt)
{
    switch (fmt) {
    case PS_FMT_Q4_1: return 20;
    case PS_FMT_Q5_0: return 22;
    case PS_FMT_Q5_1: return 24;
    case PS_FMT_Q8_0: return 34;
    case PS_FMT_MXFP4: return 17;
    default: return 18; /* Q4_0, IQ4_NL */
    }
}

/* Bytes of 256 weights of a format whose blocks have block_bytes. */
INLINE size_t group_bytes_of(ps_fmt fmt, size_t block_bytes)
{
    const bool k =
        has_16_blocks(fmt) || fmt == PS_FMT_Q4_K || fmt == PS_FMT_Q5_K || fmt == PS_FMT_IQ4_XS;
    return k ? block_bytes : 8 * block_bytes;
}

/* ---- helpers ---- */

INLINE __m256i load32(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

INLINE uint32_t u32_at(const uint8_t *p)
{
    uint32_t u;
    memcpy(&u, p, 4);
    return u;
}

INLINE float f16_at(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

/* Nibbles of 16 bytes: low halves, then high halves. */
INLINE __m256i nibbles(const uint8_t *p)
{
    const __m128i x = _mm_loadu_si128((const __m128i *)p);
    const __m256i both =
        _mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

/* `add` in each byte whose bit (bit i of 32 for byte i) is set. */
INLINE __m256i spread_bits(const uint8_t *p, char add)
{
    const __m256i which = _mm256_setr_epi64x(
        0x0000000000000000, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i byte = _mm256_shuffle_epi8(_mm256_set1_epi32((int)u32_at(p)), which);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit);
    return _mm256_and_si256(set, _mm256_set1_epi8(add));
}

/* `add` in each byte that has bit b set. */
INLINE __m256i where_bit(__m256i x, int b, char add)
{
    const __m256i bit = _mm256_set1_epi8((char)(1 << b));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit);
    return _mm256_and_si256(set, _mm256_set1_epi8(add));
}

INLINE __m256i lookup(__m128i levels, __m256i index)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), index);
}

INLINE __m128i iq4_levels(void)
{
    return _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
}

/* Twice the E2M1 values, plus 12. */
INLINE __m128i mxfp4_levels(void)
{
    return _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
}

/* ---- bytes ---- */

/* Weights 32 b ... 32 b + 31 of the 256 at w. */
INLINE __m256i load_block(ps_fmt fmt, const uint8_t *w, int b)
{
    const __m256i nibble = _mm256_set1_epi8(15), pair = _mm256_set1_epi8(3);
    const uint8_t *p = w + block_step(fmt) * (size_t)b; /* formats of 32-blocks */
    switch (fmt) {
    case PS_FMT_Q4_0: return nibbles(p + 2);
    case PS_FMT_Q4_1: return nibbles(p + 4);
    case PS_FMT_Q5_0: return _mm256_or_si256(nibbles(p + 6), spread_bits(p + 2, 16));
    case PS_FMT_Q5_1: return _mm256_or_si256(nibbles(p + 8), spread_bits(p + 4, 16));
    case PS_FMT_Q8_0: return load32(p + 2);
    case PS_FMT_IQ4_NL: return lookup(iq4_levels(), nibbles(p + 2));
    case PS_FMT_MXFP4: return lookup(mxfp4_levels(), nibbles(p + 1));
    case PS_FMT_IQ4_XS: return lookup(iq4_levels(), nibbles(w + 8 + 16 * b));
    case PS_FMT_Q4_K:
    case PS_FMT_Q5_K: {
        const __m256i x = load32(w + (fmt == PS_FMT_Q5_K ? 48 : 16) + 32 * (b / 2));
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(x, b % 2 * 4), nibble);
        if (fmt == PS_FMT_Q4_K) return low;
        return _mm256_or_si256(low, where_bit(load32(w + 16), b, 16));
    }
    case PS_FMT_Q6_K: {
        const int run = b / 4, part = b % 4;
        const __m256i x = load32(w + 64 * run + 32 * (part % 2));
        const __m256i h = _mm256_srli_epi16(load32(w + 128 + 32 * run), 2 * part);
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(x, part / 2 * 4), nibble);
        return _mm256_or_si256(low, _mm256_slli_epi16(_mm256_and_si256(h, pair), 4));
    }
    default: { /* Q2_K, Q3_K */
        const uint8_t *qs = w + (fmt == PS_FMT_Q3_K ? 32 : 16) + 32 * (b / 4);
        const __m256i q = _mm256_and_si256(_mm256_srli_epi16(load32(qs), 2 * (b % 4)), pair);
        return fmt == PS_FMT_Q3_K ? _mm256_or_si256(q, where_bit(load32(w), b, 4)) : q;
    }
    }
}

/* ---- scales ---- */

INLINE void store_scaled(float *out, float by, __m256i whole)
{
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_set1_ps(by), _mm256_cvtepi32_ps(whole)));
}

INLINE __m256i widen_u8(uint64_t eight)
{
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)eight));
}

INLINE void scales_32(ps_fmt fmt, const uint8_t *w, scales *s)
{
    const size_t step = block_step(fmt);
    for (size_t b = 0; b < 8; b++) {
        if (fmt == PS_FMT_MXFP4) { /* 2^(e - 128), subnormal for e < 2 */
            const uint32_t e = w[step * b], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
            memcpy(&s->scale[b], &bits, 4);
        } else {
            s->scale[b] = f16_at(w + step * b);
        }
        const bool has_min = fmt == PS_FMT_Q4_1 || fmt == PS_FMT_Q5_1;
        s->min[b] = has_min ? f16_at(w + step * b + 2) : s->scale[b];
    }
}

/* Q4_K and Q5_K: six bits each in 12 bytes. */
INLINE void scales_k4(const uint8_t *w, scales *s)
{
    const uint32_t a = u32_at(w + 4), b = u32_at(w + 8), c = u32_at(w + 12);
    const uint32_t scale_high = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
    const uint32_t min_high = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    store_scaled(s->scale, f16_at(w), widen_u8((a & 0x3f3f3f3f) | (uint64_t)scale_high << 32));
    store_scaled(s->min, f16_at(w + 2), widen_u8((b & 0x3f3f3f3f) | (uint64_t)min_high << 32));
}

INLINE void scales_iq4_xs(const uint8_t *w, scales *s)
{
    uint16_t high;
    memcpy(&high, w + 2, 2);
    const __m256i low = _mm256_srlv_epi32(
        _mm256_set1_epi32((int)u32_at(w + 4)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i top =
        _mm256_srlv_epi32(_mm256_set1_epi32(high), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const __m256i sc = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
        _mm256_slli_epi32(_mm256_and_si256(top, _mm256_set1_epi32(3)), 4));
    store_scaled(s->scale, f16_at(w), _mm256_sub_epi32(sc, _mm256_set1_epi32(32)));
}

INLINE void scales_q6_k(const uint8_t *w, scales *s)
{
    for (int h = 0; h < 2; h++) {
        const __m128i sc = _mm_loadl_epi64((const __m128i *)(w + 192 + 8 * h));
        store_scaled(s->scale + 8 * h, f16_at(w + 208), _mm256_cvtepi8_epi32(sc));
    }
    memcpy(s->min, s->scale, sizeof s->min);
}

INLINE void scales_q3_k(const uint8_t *w, scales *s)
{
    const uint32_t a = u32_at(w + 96), b = u32_at(w + 100), t = u32_at(w + 104);
    const uint32_t s0 = (a & 0x0f0f0f0f) | (t & 0x03030303) << 4;
    const uint32_t s1 = (b & 0x0f0f0f0f) | (t >> 2 & 0x03030303) << 4;
    const uint32_t s2 = (a >> 4 & 0x0f0f0f0f) | (t >> 4 & 0x03030303) << 4;
    const uint32_t s3 = (b >> 4 & 0x0f0f0f0f) | (t >> 6 & 0x03030303) << 4;
    const __m256i middle = _mm256_set1_epi32(32);
    const float d = f16_at(w + 108);
    store_scaled(s->scale, d, _mm256_sub_epi32(widen_u8(s0 | (uint64_t)s1 << 32), middle));
    store_scaled(s->scale + 8, d, _mm256_sub_epi32(widen_u8(s2 | (uint64_t)s3 << 32), middle));
    memcpy(s->min, s->scale, sizeof s->min);
}

INLINE void scales_q2_k(const uint8_t *w, scales *s)
{
    for (int h = 0; h < 2; h++) {
        uint64_t x;
        memcpy(&x, w + 8 * h, 8);
        store_scaled(s->scale + 8 * h, f16_at(w + 80), widen_u8(x & 0x0f0f0f0f0f0f0f0f));
        store_scaled(s->min + 8 * h, f16_at(w + 82), widen_u8(x >> 4 & 0x0f0f0f0f0f0f0f0f));
    }
}

INLINE void load_scales(ps_fmt fmt, const uint8_t *w, scales *s)
{
    switch (fmt) {
    case PS_FMT_Q4_K:
    case PS_FMT_Q5_K: scales_k4(w, s); break;
    case PS_FMT_IQ4_XS: scales_iq4_xs(w, s); break;
    case PS_FMT_Q6_K: scales_q6_k(w, s); break;
    case PS_FMT_Q3_K: scales_q3_k(w, s); break;
    case PS_FMT_Q2_K: scales_q2_k(w, s); break;
    default: scales_32(fmt, w, s); break;
    }
}

/* ---- products ---- */

/* Pairs of products of 32 weights and inputs, added in 16 bits; a saturating instruction whose
 * bound is never reached: 2 * 63 * 127, or 2 * 128 * 127 for signed bytes. */
INLINE __m256i products(ps_fmt fmt, __m256i u, __m256i q)
{
    if (!is_signed(fmt)) return _mm256_maddubs_epi16(u, q);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(q, u));
}

#endif
