/* ps_cpu_avx512_load - blocks of every quantised format brought to one form, 256 weights at a time:
 * unsigned bytes u in their natural order, a float scale for each 32 (or 16) of them and an offset:
 * w = scale * u + factor * min, where the factor belongs to the format.
 *
 * Not here: products.
 * Threads: pure functions, inlined with a constant format into the AVX-512 and AMX kernels.
 */
#ifndef PS_CPU_AVX512_LOAD_H
#define PS_CPU_AVX512_LOAD_H

#include "format/ps_quant.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* 256 weights. u[p] holds weights 64 p ... 64 p + 63; scale and min are for blocks of 32 (the lower
 * 8 floats) or 16. */
typedef struct group {
    __m512i u[4];
    __m512 scale, min;
} group;

/* ---- helpers ---- */

INLINE __m256 f16x8(const uint8_t *p, size_t stride)
{
    uint16_t h[8];
    for (int i = 0; i < 8; i++) memcpy(&h[i], p + (size_t)i * stride, 2);
    return _mm256_cvtph_ps(_mm_setr_epi16((short)h[0], (short)h[1], (short)h[2], (short)h[3],
        (short)h[4], (short)h[5], (short)h[6], (short)h[7]));
}

INLINE float f16_at(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

INLINE uint32_t u32_at(const uint8_t *p)
{
    uint32_t u;
    memcpy(&u, p, 4);
    return u;
}

INLINE __m512 widen(__m256 a)
{
    return _mm512_castps256_ps512(a);
}

/* Nibbles of two blocks of 16 bytes: low halves before high halves, block after block. */
INLINE __m512i nibbles2(const uint8_t *a, const uint8_t *b)
{
    const __m512i lane_shift = _mm512_setr_epi64(
        0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004, 0x0004000400040004);
    const __m512i first = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)a));
    const __m512i both =
        _mm512_mask_broadcast_i32x4(first, 0xff00, _mm_loadu_si128((const __m128i *)b));
    return _mm512_and_si512(_mm512_srlv_epi16(both, lane_shift), _mm512_set1_epi8(15));
}

/* 32 bytes twice, the second copy shifted right by `more` bits beyond the first's `bits`; callers
 * mask. */
INLINE __m512i shifted_twice(const uint8_t *p, int bits, int more)
{
    const __m512i shift = _mm512_inserti64x4(
        _mm512_set1_epi16((short)bits), _mm256_set1_epi16((short)(bits + more)), 1);
    return _mm512_srlv_epi16(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p)), shift);
}

/* ---- formats of 32-blocks ---- */

/* Levels of the non-linear formats, plus 128. */
INLINE __m512i iq4_lookup(__m512i nibbles)
{
    const __m128i levels = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141,
        (char)153, (char)166, (char)181, (char)197, (char)217, (char)241);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), nibbles);
}

/* Twice the E2M1 values, plus 12. */
INLINE __m512i mxfp4_lookup(__m512i nibbles)
{
    const __m128i levels = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), nibbles);
}

INLINE __m256 mxfp4_scales(const uint8_t *w) /* 2^(e - 128), subnormal for e < 2 */
{
    uint8_t e[8];
    for (int i = 0; i < 8; i++) e[i] = w[17 * i];
    uint64_t packed;
    memcpy(&packed, e, 8);
    const __m256i x = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)packed));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(x, _mm256_set1_epi32(1)), 23);
    const __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), x);
    const __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), x);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, tiny, is_tiny));
}

/* Fifth bits of a pair of blocks: bit j of word i is weight j of block i. */
INLINE __m512i add_fifth(__m512i u, const uint8_t *a, const uint8_t *b)
{
    const __mmask64 m = (__mmask64)((uint64_t)u32_at(a) | (uint64_t)u32_at(b) << 32);
    return _mm512_mask_add_epi8(u, m, u, _mm512_set1_epi8(16));
}

INLINE void load_32(ps_fmt fmt, const uint8_t *w, group *g)
{
    const size_t step = fmt == PS_FMT_Q4_0 || fmt == PS_FMT_IQ4_NL ? 18
                        : fmt == PS_FMT_Q4_1                       ? 20
                        : fmt == PS_FMT_Q5_0                       ? 22
                        : fmt == PS_FMT_Q5_1                       ? 24
                        : fmt == PS_FMT_Q8_0                       ? 34
                                                                   : 17;
    const size_t head = step - (fmt == PS_FMT_Q8_0 ? 32 : 16); /* bytes before the quants */
    for (size_t p = 0; p < 4; p++) {
        const uint8_t *a = w + 2 * p * step, *b = a + step;
        if (fmt == PS_FMT_Q8_0) {
            const __m512i q = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(a + 2))),
                _mm256_loadu_si256((const __m256i *)(b + 2)), 1);
            g->u[p] = _mm512_xor_si512(q, _mm512_set1_epi8((char)0x80));
            continue;
        }
        g->u[p] = nibbles2(a + head, b + head);
        if (fmt == PS_FMT_IQ4_NL) g->u[p] = iq4_lookup(g->u[p]);
        if (fmt == PS_FMT_MXFP4) g->u[p] = mxfp4_lookup(g->u[p]);
        if (fmt == PS_FMT_Q5_0) g->u[p] = add_fifth(g->u[p], a + 2, b + 2);
        if (fmt == PS_FMT_Q5_1) g->u[p] = add_fifth(g->u[p], a + 4, b + 4);
    }
    g->scale = widen(fmt == PS_FMT_MXFP4 ? mxfp4_scales(w) : f16x8(w, step));
    const bool has_min = fmt == PS_FMT_Q4_1 || fmt == PS_FMT_Q5_1;
    g->min = has_min ? widen(f16x8(w + 2, step)) : g->scale;
}

/* ---- K-quants of 32-blocks ---- */

/* The 12 bytes of scales and minima of Q4_K and Q5_K as eight bytes each. */
INLINE void scale_min_k4(const uint8_t *s, uint64_t *scale, uint64_t *min)
{
    const uint32_t a = u32_at(s), b = u32_at(s + 4), c = u32_at(s + 8);
    const uint32_t scale_high = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
    const uint32_t min_high = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    *scale = (a & 0x3f3f3f3f) | (uint64_t)scale_high << 32;
    *min = (b & 0x3f3f3f3f) | (uint64_t)min_high << 32;
}

INLINE __m256 u8x8(uint64_t v)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)v)));
}

INLINE void load_k4(ps_fmt fmt, const uint8_t *w, group *g)
{
    const uint8_t *qs = w + (fmt == PS_FMT_Q5_K ? 48 : 16);
    for (int p = 0; p < 4; p++) {
        g->u[p] = _mm512_and_si512(shifted_twice(qs + 32 * p, 0, 4), _mm512_set1_epi8(15));
        if (fmt == PS_FMT_Q5_K) {
            const __m512i high =
                _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(w + 16)));
            const __m512i bit = _mm512_inserti64x4(
                _mm512_set1_epi8((char)(1 << 2 * p)), _mm256_set1_epi8((char)(2 << 2 * p)), 1);
            const __mmask64 m = _mm512_test_epi8_mask(high, bit);
            g->u[p] = _mm512_mask_add_epi8(g->u[p], m, g->u[p], _mm512_set1_epi8(16));
        }
    }
    uint64_t scale, min;
    scale_min_k4(w + 4, &scale, &min);
    g->scale = widen(_mm256_mul_ps(_mm256_set1_ps(f16_at(w)), u8x8(scale)));
    g->min = widen(_mm256_mul_ps(_mm256_set1_ps(f16_at(w + 2)), u8x8(min)));
}

INLINE void load_iq4_xs(const uint8_t *w, group *g)
{
    const uint8_t *qs = w + 8;
    for (int p = 0; p < 4; p++) g->u[p] = iq4_lookup(nibbles2(qs + 32 * p, qs + 32 * p + 16));
    uint16_t high;
    memcpy(&high, w + 2, 2);
    const __m256i shift_low = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i shift_high = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32((int)u32_at(w + 4)), shift_low);
    const __m256i top = _mm256_srlv_epi32(_mm256_set1_epi32(high), shift_high);
    const __m256i sc = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
        _mm256_slli_epi32(_mm256_and_si256(top, _mm256_set1_epi32(3)), 4));
    const __m256 s = _mm256_cvtepi32_ps(_mm256_sub_epi32(sc, _mm256_set1_epi32(32)));
    g->scale = widen(_mm256_mul_ps(_mm256_set1_ps(f16_at(w)), s));
    g->min = g->scale;
}

/* ---- K-quants of 16-blocks ---- */

INLINE void load_q6_k(const uint8_t *w, group *g)
{
    const __m512i up = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
    const __m512i nibble = _mm512_set1_epi8(15), pair = _mm512_set1_epi8(0x30);
    for (int run = 0; run < 2; run++) {
        const __m512i low = _mm512_loadu_si512(w + 64 * run);
        const uint8_t *qh = w + 128 + 32 * run;
        const __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)qh));
        const __m512i a = _mm512_and_si512(_mm512_sllv_epi16(high, up), pair);
        const __m512i b = _mm512_and_si512(shifted_twice(qh, 0, 2), pair);
        g->u[2 * run] = _mm512_or_si512(_mm512_and_si512(low, nibble), a);
        g->u[2 * run + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), nibble), b);
    }
    const __m512i sc = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(w + 192)));
    g->scale = _mm512_mul_ps(_mm512_set1_ps(f16_at(w + 208)), _mm512_cvtepi32_ps(sc));
    g->min = g->scale;
}

/* Two bits of each byte of 32, twice a run of 128 weights. */
INLINE void load_pairs(const uint8_t *qs, group *g)
{
    for (int p = 0; p < 4; p++)
        g->u[p] =
            _mm512_and_si512(shifted_twice(qs + 32 * (p / 2), p % 2 * 4, 2), _mm512_set1_epi8(3));
}

INLINE void load_q3_k(const uint8_t *w, group *g)
{
    load_pairs(w + 32, g);
    const __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)w));
    for (int p = 0; p < 4; p++) {
        const __m512i bit = _mm512_inserti64x4(
            _mm512_set1_epi8((char)(1 << 2 * p)), _mm256_set1_epi8((char)(2 << 2 * p)), 1);
        const __mmask64 m = _mm512_test_epi8_mask(high, bit);
        g->u[p] = _mm512_mask_add_epi8(g->u[p], m, g->u[p], _mm512_set1_epi8(4));
    }
    const uint32_t a = u32_at(w + 96), b = u32_at(w + 100), t = u32_at(w + 104);
    const __m128i packed = _mm_setr_epi32((int)((a & 0x0f0f0f0f) | (t & 0x03030303) << 4),
        (int)((b & 0x0f0f0f0f) | (t >> 2 & 0x03030303) << 4),
        (int)((a >> 4 & 0x0f0f0f0f) | (t >> 4 & 0x03030303) << 4),
        (int)((b >> 4 & 0x0f0f0f0f) | (t >> 6 & 0x03030303) << 4));
    const __m512i sc = _mm512_sub_epi32(_mm512_cvtepu8_epi32(packed), _mm512_set1_epi32(32));
    g->scale = _mm512_mul_ps(_mm512_set1_ps(f16_at(w + 108)), _mm512_cvtepi32_ps(sc));
    g->min = g->scale;
}

INLINE void load_q2_k(const uint8_t *w, group *g)
{
    load_pairs(w + 16, g);
    const __m512i sc = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w));
    const __m512 scale = _mm512_cvtepi32_ps(_mm512_and_si512(sc, _mm512_set1_epi32(15)));
    const __m512 min = _mm512_cvtepi32_ps(_mm512_srli_epi32(sc, 4));
    g->scale = _mm512_mul_ps(_mm512_set1_ps(f16_at(w + 80)), scale);
    g->min = _mm512_mul_ps(_mm512_set1_ps(f16_at(w + 82)), min);
}

/* ---- one form for all ---- */

INLINE bool has_16_blocks(ps_fmt fmt)
{
    return fmt == PS_FMT_Q2_K || fmt == PS_FMT_Q3_K || fmt == PS_FMT_Q6_K;
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
    case PS_FMT_IQ4_XS: return -128;
    default: return -1; /* Q2_K, Q4_K, Q5_K */
    }
}

INLINE void load_group(ps_fmt fmt, const uint8_t *w, group *g)
{
    switch (fmt) {
    case PS_FMT_Q4_K:
    case PS_FMT_Q5_K: load_k4(fmt, w, g); break;
    case PS_FMT_IQ4_XS: load_iq4_xs(w, g); break;
    case PS_FMT_Q6_K: load_q6_k(w, g); break;
    case PS_FMT_Q3_K: load_q3_k(w, g); break;
    case PS_FMT_Q2_K: load_q2_k(w, g); break;
    default: load_32(fmt, w, g); break;
    }
}

/* Rows become columns; elements of 32 bits. */
INLINE void transpose16(__m512i r[16]) /* of 32-bit elements */
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0x88);
            t[i + 4 + k] = _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    }
}

/* Bytes of 256 weights of a format whose blocks have block_bytes. */
INLINE size_t group_bytes_of(ps_fmt fmt, size_t block_bytes)
{
    const bool k =
        has_16_blocks(fmt) || fmt == PS_FMT_Q4_K || fmt == PS_FMT_Q5_K || fmt == PS_FMT_IQ4_XS;
    return k ? block_bytes : 8 * block_bytes;
}

#endif
