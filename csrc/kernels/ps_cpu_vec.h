/* ps_cpu_vec - a vector of floats as wide as the instruction set of the file that includes this: 16
 * with AVX-512, 8 with AVX2. What needs no more than this is written once and compiled for each.
 *
 * Not here: integer dot products; those differ too much between the sets.
 * Threads: pure functions. All static: every file has its own copy in its own instruction set.
 */
#ifndef PS_CPU_VEC_H
#define PS_CPU_VEC_H

#include <immintrin.h>
#include <stdint.h>

/* Variants include one source under two names: PS_CPU_NAME(x) is avx2_x or avx512_x. */
#define PS_CPU_PASTE2(a, b) a##b
#define PS_CPU_PASTE(a, b)  PS_CPU_PASTE2(a, b)

#ifdef __AVX512F__

#define PS_CPU_NAME(x) PS_CPU_PASTE(ps_cpu_avx512_, x)
enum { VF_N = 16 };
typedef __m512 vf;
typedef __mmask16 vm;

static inline vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
static inline void vf_store(float *p, vf a)
{
    _mm512_storeu_ps(p, a);
}
static inline vm vf_mask(uint32_t n)
{
    return (vm)((1u << n) - 1);
} /* the first n < 16 */
static inline vf vf_load_n(const float *p, uint32_t n)
{
    return _mm512_maskz_loadu_ps(vf_mask(n), p);
}
static inline void vf_store_n(float *p, vf a, uint32_t n)
{
    _mm512_mask_storeu_ps(p, vf_mask(n), a);
}
static inline vf vf_set(float x)
{
    return _mm512_set1_ps(x);
}
static inline vf vf_zero(void)
{
    return _mm512_setzero_ps();
}
static inline vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
static inline vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
} /* a * b + c */
static inline vf vf_fnma(vf a, vf b, vf c)
{
    return _mm512_fnmadd_ps(a, b, c);
} /* c - a * b */
static inline vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
static inline vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
static inline vf vf_abs(vf a)
{
    return _mm512_abs_ps(a);
}
static inline vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, 8);
} /* nearest even, no exceptions */
static inline float vf_sum(vf a)
{
    return _mm512_reduce_add_ps(a);
}
static inline float vf_max_of(vf a)
{
    return _mm512_reduce_max_ps(a);
}
static inline vf vf_scale2(vf a, vf n)
{
    return _mm512_scalef_ps(a, n);
} /* a * 2^n */
/* Lane i is the sum of v[i]: pairs of lanes, then of 128-bit lanes, added on the way of a
 * transpose. */
static inline vf vf_sums(const vf v[VF_N])
{
    vf t[8], u[4];
    for (int i = 0; i < 8; i++)
        t[i] = vf_add(
            _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = vf_add(
            _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const vf w0 =
        vf_add(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xee));
    const vf w1 =
        vf_add(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xee));
    return vf_add(_mm512_shuffle_f32x4(w0, w1, 0x88), _mm512_shuffle_f32x4(w0, w1, 0xdd));
}
/* A square of VF_N rows becomes columns; rows lie ld_in and ld apart. */
static inline void vf_transpose(const float *in, uint32_t ld_in, float *out, uint32_t ld)
{
    vf t[16], r[16];
    for (uint32_t i = 0; i < 16; i += 2) {
        const vf a = vf_load(in + i * ld_in), b = vf_load(in + (i + 1) * ld_in);
        t[i] = _mm512_unpacklo_ps(a, b);
        t[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            t[i + k] = _mm512_shuffle_f32x4(r[i + k], r[i + 4 + k], 0x88);
            t[i + 4 + k] = _mm512_shuffle_f32x4(r[i + k], r[i + 4 + k], 0xdd);
        }
    for (uint32_t k = 0; k < 8; k++) {
        vf_store(out + k * ld, _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88));
        vf_store(out + (k + 8) * ld, _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd));
    }
}
static inline vf vf_less(vf a, vf b, vf x, vf y) /* a < b ? x : y */
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline vf vf_load_f16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(p));
}
static inline vf vf_load_bf16(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
static inline void vf_store_f16(void *p, vf a)
{
    _mm256_storeu_si256(p, _mm512_cvtps_ph(a, 8));
}
static inline vf vf_load_i8(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
static inline vf vf_swap_pairs(vf a)
{
    return _mm512_permute_ps(a, 0xb1);
} /* 1 0 3 2 ... */
/* Rounded to nearest even and narrowed; |a| <= 127. */
static inline void vf_store_i8(int8_t *p, vf a)
{
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

#else /* AVX2, FMA, F16C */

#define PS_CPU_NAME(x) PS_CPU_PASTE(ps_cpu_avx2_, x)
enum { VF_N = 8 };
typedef __m256 vf;
typedef __m256i vm;

static inline vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
static inline void vf_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a);
}
static inline vm vf_mask(uint32_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf vf_load_n(const float *p, uint32_t n)
{
    return _mm256_maskload_ps(p, vf_mask(n));
}
static inline void vf_store_n(float *p, vf a, uint32_t n)
{
    _mm256_maskstore_ps(p, vf_mask(n), a);
}
static inline vf vf_set(float x)
{
    return _mm256_set1_ps(x);
}
static inline vf vf_zero(void)
{
    return _mm256_setzero_ps();
}
static inline vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
static inline vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf vf_fnma(vf a, vf b, vf c)
{
    return _mm256_fnmadd_ps(a, b, c);
}
static inline vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
static inline vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
static inline vf vf_abs(vf a)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
static inline vf vf_round(vf a)
{
    return _mm256_round_ps(a, 8);
}
static inline float vf_sum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vf_max_of(vf a)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf vf_scale2(
    vf a, vf n) /* for n whole and -150 <= n <= 127: in two steps, so that subnormals round once */
{
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const vf p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256i rest = _mm256_add_epi32(_mm256_sub_epi32(whole, half), bias);
    return _mm256_mul_ps(_mm256_mul_ps(a, p), _mm256_castsi256_ps(_mm256_slli_epi32(rest, 23)));
}
static inline vf vf_sums(const vf v[VF_N])
{
    const vf a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const vf b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return vf_add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
static inline void vf_transpose(const float *in, uint32_t ld_in, float *out, uint32_t ld)
{
    vf t[8], r[8];
    for (uint32_t i = 0; i < 8; i += 2) {
        const vf a = vf_load(in + i * ld_in), b = vf_load(in + (i + 1) * ld_in);
        t[i] = _mm256_unpacklo_ps(a, b);
        t[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (uint32_t k = 0; k < 4; k++) {
        vf_store(out + k * ld, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
        vf_store(out + (k + 4) * ld, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
    }
}
static inline vf vf_less(vf a, vf b, vf x, vf y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline vf vf_load_f16(const void *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128(p));
}
static inline vf vf_load_bf16(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
static inline void vf_store_f16(void *p, vf a)
{
    _mm_storeu_si128(p, _mm256_cvtps_ph(a, 8));
}
static inline vf vf_load_i8(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
static inline vf vf_swap_pairs(vf a)
{
    return _mm256_permute_ps(a, 0xb1);
}
static inline void vf_store_i8(int8_t *p, vf a)
{
    const __m256i i = _mm256_cvtps_epi32(a);
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(w, w));
}

#endif

/* ---- the same for both ---- */

/* e^x by range reduction to |r| <= ln2 / 2 and a polynomial of degree 6: relative error below 3e-7
 * where the result is normal; 0 below -104, infinity above 88.8; NaN stays. */
static inline vf vf_exp(vf x)
{
    /* The bounds keep 2^n in range: e^-104 is below the least subnormal, e^89 is infinite. NaN
     * passes as the second operand of min and max. */
    const vf c = vf_max(vf_set(-104.0f), vf_min(vf_set(89.0f), x));
    const vf n = vf_round(vf_mul(c, vf_set(1.44269504f)));
    vf r =
        vf_fnma(n, vf_set(0.693359375f), c); /* ln2 in two parts: the first is exact in 10 bits */
    r = vf_fnma(n, vf_set(-2.12194440e-4f), r);
    vf p = vf_set(1.3981999507e-3f);
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set(1.0f));
    /* 2^128 is not a float: the last factor of 2 comes apart. */
    return vf_mul(vf_scale2(p, vf_sub(n, vf_set(1.0f))), vf_set(2.0f));
}

/* x / (1 + e^-ax) */
static inline vf vf_swish(vf x, float a)
{
    return vf_div(x, vf_add(vf_set(1.0f), vf_exp(vf_mul(x, vf_set(-a)))));
}

/* tanh: an odd polynomial below 0.625, where 1 - e^-2x would cancel, else by e^-2|x|. Relative
 * error below 4e-7. */
static inline vf vf_tanh(vf x)
{
    const vf a = vf_abs(x), z = vf_mul(x, x), e = vf_exp(vf_mul(a, vf_set(-2.0f)));
    const vf big = vf_div(vf_sub(vf_set(1.0f), e), vf_add(vf_set(1.0f), e));
    vf p = vf_set(-5.70498872745e-3f);
    p = vf_fma(p, z, vf_set(2.06390887954e-2f));
    p = vf_fma(p, z, vf_set(-5.37397155531e-2f));
    p = vf_fma(p, z, vf_set(1.33314422036e-1f));
    p = vf_fma(p, z, vf_set(-3.33332819422e-1f));
    const vf small = vf_fma(vf_mul(p, z), x, x);
    return vf_less(a, vf_set(0.625f), small, vf_less(x, vf_zero(), vf_sub(vf_zero(), big), big));
}

#endif
