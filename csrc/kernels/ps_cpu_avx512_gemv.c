/* ps_cpu_avx512_gemv - products of rows of weights with up to eight inputs, for decoding: integer
 * dot products of VNNI for quantised weights, float ones for the others. Made to read weights at
 * the speed of memory.
 *
 * Not here: how rows are shared out (ps_cpu_matmul.c), tiles for many tokens
 * (ps_cpu_avx512_gemm.c).
 * Threads: pure functions.
 *
 * With w = scale * u + factor * min (ps_cpu_avx512_load.h) and x = d * q,
 *     sum w x = sum over blocks of scale * d * (u . q) + factor * min * (d * sum q)
 * where u . q is exact in integers. The order of the sums depends on the row's length alone.
 */
#include "kernels/ps_cpu_avx512.h"
#include "kernels/ps_cpu_avx512_load.h"

#include <immintrin.h>
#include <string.h>

/* Lane i of pair p takes the scale of its block. */
INLINE __m512i scale_index(ps_fmt fmt, int p)
{
    const __m512i block = has_16_blocks(fmt)
                              ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                              : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_add_epi32(block, _mm512_set1_epi32(has_16_blocks(fmt) ? 4 * p : 2 * p));
}

/* One group with one input: `at` counts weights from the row's start; x is the base of a ps_xq of n
 * padded columns. */
INLINE void dot_group(
    ps_fmt fmt, const group *g, const uint8_t *x, uint64_t n, uint64_t at, __m512 *acc, __m512 *min)
{
    const float *d = (const float *)(x + n) + at / 32, *s32 = d + n / 32;
    const float *s16 = (const float *)(x + n) + n / 16 + at / 16;
    __m512 scale;
    if (has_16_blocks(fmt)) {
        const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        scale = _mm512_mul_ps(g->scale, _mm512_permutexvar_ps(twice, widen(_mm256_loadu_ps(d))));
        *min = _mm512_fmadd_ps(g->min, _mm512_loadu_ps(s16), *min);
    } else {
        scale = widen(_mm256_mul_ps(_mm512_castps512_ps256(g->scale), _mm256_loadu_ps(d)));
        *min = widen(_mm256_fmadd_ps(
            _mm512_castps512_ps256(g->min), _mm256_loadu_ps(s32), _mm512_castps512_ps256(*min)));
    }
    for (int p = 0; p < 4; p++) {
        const __m512i q = _mm512_loadu_si512(x + at + 64 * (uint64_t)p);
        const __m512 dot =
            _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), g->u[p], q));
        *acc = _mm512_fmadd_ps(_mm512_permutexvar_ps(scale_index(fmt, p), scale), dot, *acc);
    }
}

INLINE float finish(ps_fmt fmt, __m512 acc, __m512 min)
{
    const float m = has_16_blocks(fmt)
                        ? _mm512_reduce_add_ps(min)
                        : _mm512_reduce_add_ps(_mm512_zextps256_ps512(_mm512_castps512_ps256(min)));
    return _mm512_reduce_add_ps(acc) + min_factor(fmt) * m;
}

/* One row with n_x (a constant) inputs. */
INLINE void dot_row(ps_fmt fmt, size_t group_bytes, const uint8_t *w, const uint8_t *tail,
    uint64_t n_cols, const void *const *x, int n_x, float *out)
{
    const uint64_t n = (n_cols + 255) / 256 * 256, whole = n_cols / 256 * 256;
    __m512 acc[4], min[4];
    for (int t = 0; t < n_x; t++) acc[t] = min[t] = _mm512_setzero_ps();
    for (uint64_t at = 0; at < whole; at += 256, w += group_bytes) {
        group g;
        for (size_t ahead = 0; ahead < group_bytes; ahead += 64)
            _mm_prefetch((const char *)w + 1536 + ahead, _MM_HINT_T0);
        load_group(fmt, w, &g);
        for (int t = 0; t < n_x; t++) dot_group(fmt, &g, x[t], n, at, &acc[t], &min[t]);
    }
    if (whole < n_cols) {
        group g;
        load_group(fmt, tail, &g);
        for (int t = 0; t < n_x; t++) dot_group(fmt, &g, x[t], n, whole, &acc[t], &min[t]);
    }
    for (int t = 0; t < n_x; t++) out[t] = finish(fmt, acc[t], min[t]);
}

INLINE void store(const ps_gemv *g, uint64_t r, const float *out)
{
    const float bias = g->bias != NULL ? g->bias[r] : 0.0f;
    for (uint32_t t = 0; t < g->n_x; t++) {
        float *y = &g->y[t][r - g->row0];
        *y = g->add ? *y + (out[t] + bias) : out[t] + bias;
    }
}

INLINE void gemv_quantised(
    ps_fmt fmt, size_t block_bytes, const ps_gemv *g, uint64_t r, uint64_t end)
{
    const size_t group_bytes = group_bytes_of(fmt, block_bytes);
    const uint64_t tail_at = g->n_cols / 256 * group_bytes;
    for (; r < end; r++) {
        const uint8_t *w = g->w + r * g->row_bytes;
        /* The last blocks of a row that isn't a multiple of 256, with zeros behind: no read beyond
         * the row. */
        uint8_t tail[8 * 34];
        if (tail_at < g->row_bytes) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w + tail_at, g->row_bytes - tail_at);
        }
        float out[PS_CPU_GEMV_MAX_TOK];
        uint32_t t = 0;
        for (; t + 4 <= g->n_x; t += 4)
            dot_row(fmt, group_bytes, w, tail, g->n_cols, g->x + t, 4, out + t);
        if (t + 2 <= g->n_x) {
            dot_row(fmt, group_bytes, w, tail, g->n_cols, g->x + t, 2, out + t);
            t += 2;
        }
        if (t < g->n_x) dot_row(fmt, group_bytes, w, tail, g->n_cols, g->x + t, 1, out + t);
        store(g, r, out);
    }
}

/* ---- floats ---- */

INLINE __m512 load_floats(ps_fmt fmt, const uint8_t *w, uint64_t at)
{
    if (fmt == PS_FMT_F32) return _mm512_loadu_ps(w + 4 * at);
    const __m256i h = _mm256_loadu_si256((const __m256i *)(w + 2 * at));
    if (fmt == PS_FMT_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

INLINE __m512 load_floats_n(ps_fmt fmt, const uint8_t *w, uint64_t at, __mmask16 m)
{
    if (fmt == PS_FMT_F32) return _mm512_maskz_loadu_ps(m, w + 4 * at);
    const __m256i h = _mm256_maskz_loadu_epi16(m, w + 2 * at);
    if (fmt == PS_FMT_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Four sums an input, taken in turn, so that additions overlap. */
INLINE void float_row(
    ps_fmt fmt, const uint8_t *w, uint64_t n_cols, const void *const *x, int n_x, float *out)
{
    __m512 acc[4][4];
    for (int t = 0; t < n_x; t++)
        for (int i = 0; i < 4; i++) acc[t][i] = _mm512_setzero_ps();
    uint64_t at = 0;
    for (; at + 64 <= n_cols; at += 64) {
        _mm_prefetch((const char *)w + (fmt == PS_FMT_F32 ? 4 : 2) * at + 2048, _MM_HINT_T0);
        _mm_prefetch((const char *)w + (fmt == PS_FMT_F32 ? 4 : 2) * at + 2112, _MM_HINT_T0);
        for (int i = 0; i < 4; i++) {
            const __m512 v = load_floats(fmt, w, at + 16 * (uint64_t)i);
            for (int t = 0; t < n_x; t++)
                acc[t][i] = _mm512_fmadd_ps(
                    v, _mm512_loadu_ps((const float *)x[t] + at + 16 * i), acc[t][i]);
        }
    }
    for (; at < n_cols; at += 16) {
        const uint64_t n = n_cols - at;
        const __mmask16 m = (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1u);
        const __m512 v = load_floats_n(fmt, w, at, m);
        for (int t = 0; t < n_x; t++)
            acc[t][0] =
                _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(m, (const float *)x[t] + at), acc[t][0]);
    }
    for (int t = 0; t < n_x; t++)
        out[t] = _mm512_reduce_add_ps(_mm512_add_ps(
            _mm512_add_ps(acc[t][0], acc[t][1]), _mm512_add_ps(acc[t][2], acc[t][3])));
}

INLINE void gemv_float(ps_fmt fmt, const ps_gemv *g, uint64_t r, uint64_t end)
{
    for (; r < end; r++) {
        const uint8_t *w = g->w + r * g->row_bytes;
        float out[PS_CPU_GEMV_MAX_TOK];
        uint32_t t = 0;
        for (; t + 4 <= g->n_x; t += 4) float_row(fmt, w, g->n_cols, g->x + t, 4, out + t);
        for (; t < g->n_x; t++) float_row(fmt, w, g->n_cols, g->x + t, 1, out + t);
        store(g, r, out);
    }
}

/* ---- the kernels ---- */

#define QUANTISED(name, fmt, block_bytes)                                                          \
    void ps_cpu_avx512_gemv_##name(const ps_gemv *g, uint64_t row, uint64_t end)                   \
    {                                                                                              \
        gemv_quantised(fmt, block_bytes, g, row, end);                                             \
    }
QUANTISED(q4_0, PS_FMT_Q4_0, 18)
QUANTISED(q4_1, PS_FMT_Q4_1, 20)
QUANTISED(q5_0, PS_FMT_Q5_0, 22)
QUANTISED(q5_1, PS_FMT_Q5_1, 24)
QUANTISED(q8_0, PS_FMT_Q8_0, 34)
QUANTISED(q2_k, PS_FMT_Q2_K, 84)
QUANTISED(q3_k, PS_FMT_Q3_K, 110)
QUANTISED(q4_k, PS_FMT_Q4_K, 144)
QUANTISED(q5_k, PS_FMT_Q5_K, 176)
QUANTISED(q6_k, PS_FMT_Q6_K, 210)
QUANTISED(iq4_nl, PS_FMT_IQ4_NL, 18)
QUANTISED(iq4_xs, PS_FMT_IQ4_XS, 136)
QUANTISED(mxfp4, PS_FMT_MXFP4, 17)

void ps_cpu_avx512_gemv_f32(const ps_gemv *g, uint64_t row, uint64_t end)
{
    gemv_float(PS_FMT_F32, g, row, end);
}
void ps_cpu_avx512_gemv_f16(const ps_gemv *g, uint64_t row, uint64_t end)
{
    gemv_float(PS_FMT_F16, g, row, end);
}
void ps_cpu_avx512_gemv_bf16(const ps_gemv *g, uint64_t row, uint64_t end)
{
    gemv_float(PS_FMT_BF16, g, row, end);
}
