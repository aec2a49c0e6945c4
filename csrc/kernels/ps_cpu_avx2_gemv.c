/* ps_cpu_avx2_gemv - products of rows of weights with up to eight inputs, for decoding: 8-bit
 * integer dot products for quantised weights, float ones for the others.
 *
 * Not here: how rows are shared out (ps_cpu_matmul.c), tiles for many tokens (ps_cpu_avx2_gemm.c).
 * Threads: pure functions.
 *
 * With w = scale * u + factor * min (ps_cpu_avx2_load.h) and x = d * q,
 *     sum w x = sum over blocks of scale * d * (u . q) + factor * min * (d * sum q)
 * where u . q is exact in integers. The order of the sums depends on the row's length alone.
 */
#include "kernels/ps_cpu_avx2.h"
#include "kernels/ps_cpu_avx2_load.h"

INLINE float sum8(__m256 a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* ---- quantised weights ---- */

/* 256 weights with n_x (a constant) inputs. `at` counts weights from the row's start; x[t] is the
 * base of a ps_xq of n padded columns. */
INLINE void dot_group(ps_fmt fmt, const uint8_t *w, const void *const *x, int n_x, uint64_t n,
    uint64_t at, __m256 *acc, __m256 *min)
{
    scales s;
    float scale[4][16];
    load_scales(fmt, w, &s);
    for (int t = 0; t < n_x; t++) {
        const float *d = (const float *)((const uint8_t *)x[t] + n) + at / 32, *s32 = d + n / 32;
        const float *s16 = (const float *)((const uint8_t *)x[t] + n) + n / 16 + at / 16;
        const __m256 dx = _mm256_loadu_ps(d);
        if (has_16_blocks(fmt)) {
            const __m256i first = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
            const __m256i second = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
            _mm256_storeu_ps(scale[t],
                _mm256_mul_ps(_mm256_loadu_ps(s.scale), _mm256_permutevar8x32_ps(dx, first)));
            _mm256_storeu_ps(scale[t] + 8,
                _mm256_mul_ps(_mm256_loadu_ps(s.scale + 8), _mm256_permutevar8x32_ps(dx, second)));
            min[t] = _mm256_fmadd_ps(_mm256_loadu_ps(s.min), _mm256_loadu_ps(s16), min[t]);
            min[t] = _mm256_fmadd_ps(_mm256_loadu_ps(s.min + 8), _mm256_loadu_ps(s16 + 8), min[t]);
        } else {
            _mm256_storeu_ps(scale[t], _mm256_mul_ps(_mm256_loadu_ps(s.scale), dx));
            if (!is_signed(fmt))
                min[t] = _mm256_fmadd_ps(_mm256_loadu_ps(s.min), _mm256_loadu_ps(s32), min[t]);
        }
    }
    for (int b = 0; b < 8; b++) {
        const __m256i u = load_block(fmt, w, b);
        for (int t = 0; t < n_x; t++) {
            const __m256i q = load32((const uint8_t *)x[t] + at + 32 * (uint64_t)b);
            const __m256i dot = _mm256_madd_epi16(products(fmt, u, q), _mm256_set1_epi16(1));
            const __m256 by = has_16_blocks(fmt) ? _mm256_set_m128(_mm_set1_ps(scale[t][2 * b + 1]),
                                                       _mm_set1_ps(scale[t][2 * b]))
                                                 : _mm256_set1_ps(scale[t][b]);
            acc[t] = _mm256_fmadd_ps(by, _mm256_cvtepi32_ps(dot), acc[t]);
        }
    }
}

/* One row with n_x (a constant) inputs. `tail`: the blocks behind the last whole 256. */
INLINE void dot_row(ps_fmt fmt, size_t group_bytes, const uint8_t *w, const uint8_t *tail,
    uint64_t n_cols, const void *const *x, int n_x, float *out)
{
    const uint64_t n = (n_cols + 255) / 256 * 256, whole = n_cols / 256 * 256;
    __m256 acc[4], min[4];
    for (int t = 0; t < n_x; t++) acc[t] = min[t] = _mm256_setzero_ps();
    for (uint64_t at = 0; at < whole; at += 256, w += group_bytes) {
        for (size_t ahead = 0; ahead < group_bytes; ahead += 64)
            _mm_prefetch((const char *)w + 1536 + ahead, _MM_HINT_T0);
        dot_group(fmt, w, x, n_x, n, at, acc, min);
    }
    if (whole < n_cols) dot_group(fmt, tail, x, n_x, n, whole, acc, min);
    for (int t = 0; t < n_x; t++) out[t] = sum8(acc[t]) + min_factor(fmt) * sum8(min[t]);
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

INLINE __m256 load_floats(ps_fmt fmt, const uint8_t *w, uint64_t at)
{
    if (fmt == PS_FMT_F32) return _mm256_loadu_ps((const float *)w + at);
    const __m128i h = _mm_loadu_si128((const __m128i *)(w + 2 * at));
    if (fmt == PS_FMT_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* Four sums an input, taken in turn, so that additions overlap. */
INLINE void float_row(
    ps_fmt fmt, const uint8_t *w, uint64_t n_cols, const void *const *x, int n_x, float *out)
{
    const size_t size = fmt == PS_FMT_F32 ? 4 : 2;
    __m256 acc[2][4];
    for (int t = 0; t < n_x; t++)
        for (int i = 0; i < 4; i++) acc[t][i] = _mm256_setzero_ps();
    uint64_t at = 0;
    for (; at + 32 <= n_cols; at += 32) {
        _mm_prefetch((const char *)w + size * at + 2048, _MM_HINT_T0);
        if (size == 4) _mm_prefetch((const char *)w + size * at + 2112, _MM_HINT_T0);
        for (int i = 0; i < 4; i++) {
            const __m256 v = load_floats(fmt, w, at + 8 * (uint64_t)i);
            for (int t = 0; t < n_x; t++)
                acc[t][i] = _mm256_fmadd_ps(
                    v, _mm256_loadu_ps((const float *)x[t] + at + 8 * i), acc[t][i]);
        }
    }
    for (; at < n_cols; at += 8) {
        const uint64_t n = ps_min_u64(n_cols - at, 8);
        uint8_t edge[32] = {0};
        memcpy(edge, w + size * at, size * n);
        const __m256 v = load_floats(fmt, edge, 0);
        for (int t = 0; t < n_x; t++) {
            float in[8] = {0};
            memcpy(in, (const float *)x[t] + at, n * sizeof *in);
            acc[t][0] = _mm256_fmadd_ps(v, _mm256_loadu_ps(in), acc[t][0]);
        }
    }
    for (int t = 0; t < n_x; t++)
        out[t] = sum8(_mm256_add_ps(
            _mm256_add_ps(acc[t][0], acc[t][1]), _mm256_add_ps(acc[t][2], acc[t][3])));
}

INLINE void gemv_float(ps_fmt fmt, const ps_gemv *g, uint64_t r, uint64_t end)
{
    for (; r < end; r++) {
        const uint8_t *w = g->w + r * g->row_bytes;
        float out[PS_CPU_GEMV_MAX_TOK];
        uint32_t t = 0;
        for (; t + 2 <= g->n_x; t += 2) float_row(fmt, w, g->n_cols, g->x + t, 2, out + t);
        if (t < g->n_x) float_row(fmt, w, g->n_cols, g->x + t, 1, out + t);
        store(g, r, out);
    }
}

/* ---- the kernels ---- */

#define QUANTISED(name, fmt, block_bytes)                                                          \
    void ps_cpu_avx2_gemv_##name(const ps_gemv *g, uint64_t row, uint64_t end)                     \
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

void ps_cpu_avx2_gemv_f32(const ps_gemv *g, uint64_t row, uint64_t end)
{
    gemv_float(PS_FMT_F32, g, row, end);
}
void ps_cpu_avx2_gemv_f16(const ps_gemv *g, uint64_t row, uint64_t end)
{
    gemv_float(PS_FMT_F16, g, row, end);
}
void ps_cpu_avx2_gemv_bf16(const ps_gemv *g, uint64_t row, uint64_t end)
{
    gemv_float(PS_FMT_BF16, g, row, end);
}
