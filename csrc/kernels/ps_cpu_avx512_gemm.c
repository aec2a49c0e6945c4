/* ps_cpu_avx512_gemm - tiles for many tokens without AMX: integer dot products of VNNI for
 * quantised weights, float ones for the others. A panel of 32 rows is unpacked once, columns
 * interleaved, and meets four (floats: eight) inputs at a time.
 *
 * Not here: how rows are shared out (ps_cpu_matmul.c), few tokens (ps_cpu_avx512_gemv.c).
 * Threads: pure functions over the caller's memory.
 *
 * An element's sum runs over its columns in order, whatever the tile it lies in.
 */
#include "kernels/ps_cpu_avx512.h"
#include "kernels/ps_cpu_avx512_load.h"
#include "kernels/ps_cpu_quantize.h"

enum {
    ROWS = 32,
    /* Columns unpacked at a time: a panel of bytes with its scales, or of floats, stays in L1. */
    COLS_Q = 1024,
    COLS_F = 256,
    SUM_BYTES = ROWS * PS_GEMM_BLOCK_TOK * 4,
    /* A panel: bytes, then a scale and an offset for each 16 weights of a row. */
    PANEL_BYTES = ROWS * COLS_Q + 2 * ROWS * COLS_Q / 16 * 4,
};
_Static_assert(PANEL_BYTES >= ROWS * COLS_F * 4, "both kinds of panel use the same memory");

_Static_assert(
    SUM_BYTES + PANEL_BYTES <= PS_CPU_AVX512_GEMM_SCRATCH_BYTES, "what the header promises");

/* ---- inputs in 8 bits ---- */

/* 32 columns of 16 inputs: q[i][t] holds columns 4 i ... 4 i + 3 of input t. */
typedef struct xblock {
    int8_t q[8][16][4];
    float d[16], s32[16], s16[2][16];
} xblock;

static uint64_t bytes_q8(uint32_t n_cols)
{
    return ps_xq_cols(n_cols) / 32 * sizeof(xblock);
}

static void pack_q8(const float *const *x, uint32_t n, uint32_t n_cols, void *out)
{
    xblock *b = out;
    for (uint64_t at = 0; at < ps_xq_cols(n_cols); at += 32, b++)
        for (uint32_t t = 0; t < 16; t++) {
            int8_t q[32];
            const uint64_t left = t < n && at < n_cols ? n_cols - at : 0;
            const block_sums s = quantize_block(left > 0 ? x[t] + at : x[0], left, q);
            for (int i = 0; i < 8; i++) memcpy(b->q[i][t], q + 4 * i, 4);
            b->d[t] = s.d;
            b->s16[0][t] = s.d * s.half[0];
            b->s16[1][t] = s.d * s.half[1];
            b->s32[t] = s.d * (s.half[0] + s.half[1]);
        }
}

const ps_pack ps_cpu_avx512_pack_q8 = {bytes_q8, pack_q8};

/* ---- weights in 8 bits ---- */

typedef struct panel {
    uint8_t *u;            /* [COLS_Q / 4][ROWS][4] */
    float *scale, *offset; /* [blocks][ROWS]; blocks of 32 or 16 */
} panel;

/* 256 columns of 16 rows (missing ones are zero): u at its columns, scale at its blocks. */
INLINE void unpack_rows(
    ps_fmt fmt, const uint8_t *const *w, uint32_t n, uint8_t *u, float *scale, float *offset)
{
    const int n_blocks = has_16_blocks(fmt) ? 16 : 8;
    __m512i bytes[4][16], s[16], o[16];
    for (uint32_t r = 0; r < 16; r++) {
        group g = {{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                       _mm512_setzero_si512()},
            _mm512_setzero_ps(), _mm512_setzero_ps()};
        if (r < n) load_group(fmt, w[r], &g);
        for (int p = 0; p < 4; p++) bytes[p][r] = g.u[p];
        s[r] = _mm512_castps_si512(g.scale);
        o[r] = _mm512_castps_si512(_mm512_mul_ps(g.min, _mm512_set1_ps(min_factor(fmt))));
    }
    transpose16(s);
    transpose16(o);
    for (int b = 0; b < n_blocks; b++) {
        _mm512_storeu_si512(scale + b * ROWS, s[b]);
        _mm512_storeu_si512(offset + b * ROWS, o[b]);
    }
    for (int p = 0; p < 4; p++) {
        transpose16(bytes[p]);
        for (int i = 0; i < 16; i++)
            _mm512_storeu_si512(u + (size_t)(16 * p + i) * ROWS * 4, bytes[p][i]);
    }
}

/* Columns [col, col_end) of rows [row, row_end), at most ROWS of them. */
INLINE void unpack_panel(ps_fmt fmt, size_t block_bytes, const ps_gemm *g, uint64_t row,
    uint64_t row_end, uint64_t col, uint64_t col_end, panel p)
{
    const size_t group_bytes = group_bytes_of(fmt, block_bytes);
    const uint64_t n_blocks = has_16_blocks(fmt) ? 16 : 8;
    for (uint64_t half = 0; half < ROWS; half += 16) {
        const uint64_t n = row + half < row_end ? ps_min_u64(row_end - row - half, 16) : 0;
        for (uint64_t at = col; at < col_end; at += 256) {
            const uint8_t *w[16];
            uint8_t tail[16][8 * 34];
            const bool whole = at + 256 <= col_end;
            for (uint64_t r = 0; r < n; r++) {
                w[r] = g->w + (row + half + r) * g->row_bytes + at / 256 * group_bytes;
                if (whole) continue;
                memset(tail[r], 0, sizeof tail[r]);
                memcpy(tail[r], w[r], (col_end - at) / 32 * block_bytes);
                w[r] = tail[r];
            }
            const uint64_t i = (at - col) / 256;
            unpack_rows(fmt, w, (uint32_t)n, p.u + i * 64 * ROWS * 4 + half * 4,
                p.scale + i * n_blocks * ROWS + half, p.offset + i * n_blocks * ROWS + half);
        }
    }
}

/* ---- integer tiles ---- */

/* 32 rows by 4 inputs over n_blocks blocks of 32 columns. `sum`: [4][ROWS] floats. */
INLINE void tile_q8(bool of_16, panel p, const xblock *x, int t0, uint64_t n_blocks, float *sum)
{
    __m512 f[4][2];
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < 2; h++) f[t][h] = _mm512_loadu_ps(sum + t * ROWS + 16 * h);
    const int n_parts = of_16 ? 2 : 1, n_steps = 8 / n_parts;
    const uint8_t *u = p.u;
    const float *scale = p.scale, *offset = p.offset;
    for (uint64_t b = 0; b < n_blocks; b++)
        for (int part = 0; part < n_parts; part++, scale += ROWS, offset += ROWS) {
            __m512i dot[4][2];
            for (int t = 0; t < 4; t++) dot[t][0] = dot[t][1] = _mm512_setzero_si512();
            for (int i = part * n_steps; i < (part + 1) * n_steps; i++, u += ROWS * 4) {
                const __m512i u0 = _mm512_loadu_si512(u), u1 = _mm512_loadu_si512(u + 64);
                for (int t = 0; t < 4; t++) {
                    int32_t four;
                    memcpy(&four, x[b].q[i][t0 + t], 4);
                    const __m512i q = _mm512_set1_epi32(four);
                    dot[t][0] = _mm512_dpbusd_epi32(dot[t][0], u0, q);
                    dot[t][1] = _mm512_dpbusd_epi32(dot[t][1], u1, q);
                }
            }
            const float *s = of_16 ? x[b].s16[part] : x[b].s32;
            for (int h = 0; h < 2; h++) {
                const __m512 sc = _mm512_loadu_ps(scale + 16 * h);
                const __m512 off = _mm512_loadu_ps(offset + 16 * h);
                for (int t = 0; t < 4; t++) {
                    const __m512 both = _mm512_mul_ps(sc, _mm512_set1_ps(x[b].d[t0 + t]));
                    f[t][h] = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(dot[t][h]), f[t][h]);
                    f[t][h] = _mm512_fmadd_ps(off, _mm512_set1_ps(s[t0 + t]), f[t][h]);
                }
            }
        }
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(sum + t * ROWS + 16 * h, f[t][h]);
}

/* Sums [n_x][ROWS] to y. */
static void finish(const ps_gemm *g, uint64_t row, uint64_t row_end, const float *sum)
{
    for (uint64_t r = row; r < row_end; r += 16) {
        const uint64_t n = ps_min_u64(row_end - r, 16);
        const __mmask16 m = (__mmask16)((1u << n) - 1u);
        const __m512 bias =
            g->bias != NULL ? _mm512_maskz_loadu_ps(m, g->bias + r) : _mm512_setzero_ps();
        for (uint64_t t = 0; t < g->n_x; t++) {
            float *y = g->y[t] + (r - g->row0);
            __m512 v = _mm512_add_ps(_mm512_loadu_ps(sum + t * ROWS + (r - row)), bias);
            if (g->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(m, y), v);
            _mm512_mask_storeu_ps(y, m, v);
        }
    }
}

INLINE void gemm_q8(ps_fmt fmt, size_t block_bytes, const ps_gemm *g, uint64_t row, uint64_t end)
{
    float *sum = g->scratch;
    panel p = {.u = (uint8_t *)g->scratch + SUM_BYTES};
    p.scale = (float *)(p.u + ROWS * COLS_Q);
    p.offset = p.scale + ROWS * COLS_Q / 16;
    const uint64_t group_bytes = bytes_q8(g->n_cols);
    for (; row < end; row += ROWS) {
        const uint64_t row_end = ps_min_u64(row + ROWS, end);
        memset(sum, 0, ((uint64_t)g->n_x + 15) / 16 * 16 * ROWS * sizeof *sum);
        for (uint64_t col = 0; col < g->n_cols; col += COLS_Q) {
            const uint64_t col_end = ps_min_u64(col + COLS_Q, g->n_cols);
            unpack_panel(fmt, block_bytes, g, row, row_end, col, col_end, p);
            const uint64_t n_blocks = ps_div_up_u64(col_end - col, 32);
            for (uint64_t t = 0; t < g->n_x; t += 4) {
                const xblock *x =
                    (const xblock *)((const char *)g->x + t / 16 * group_bytes) + col / 32;
                tile_q8(has_16_blocks(fmt), p, x, (int)(t % 16), n_blocks, sum + t * ROWS);
            }
        }
        finish(g, row, row_end, sum);
    }
}

/* ---- floats ---- */

static uint64_t bytes_f32(uint32_t n_cols)
{
    return ((uint64_t)n_cols + 15) / 16 * 16 * 16 * sizeof(float);
}

/* [column][16 inputs] */
static void pack_f32(const float *const *x, uint32_t n, uint32_t n_cols, void *out)
{
    float *p = out;
    for (uint32_t c = 0; c < n_cols; c += 16, p += 16 * 16) {
        __m512i r[16];
        const uint32_t left = n_cols - c;
        const __mmask16 m = (__mmask16)(left >= 16 ? 0xffffu : (1u << left) - 1u);
        for (uint32_t t = 0; t < 16; t++)
            r[t] = t < n ? _mm512_maskz_loadu_epi32(m, x[t] + c) : _mm512_setzero_si512();
        transpose16(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(p + 16 * i, r[i]);
    }
}

const ps_pack ps_cpu_avx512_pack_f32 = {bytes_f32, pack_f32};

INLINE __m512 floats_at(ps_fmt fmt, const uint8_t *w, uint64_t at, __mmask16 m)
{
    if (fmt == PS_FMT_F32) return _mm512_maskz_loadu_ps(m, w + 4 * at);
    const __m256i h = _mm256_maskz_loadu_epi16(m, w + 2 * at);
    if (fmt == PS_FMT_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Columns [col, col_end) of rows [row, row_end) as [column][ROWS] floats. */
INLINE void unpack_floats(ps_fmt fmt, const ps_gemm *g, uint64_t row, uint64_t row_end,
    uint64_t col, uint64_t col_end, float *out)
{
    for (uint64_t c = col; c < col_end; c += 16) {
        const uint64_t left = col_end - c;
        const __mmask16 m = (__mmask16)(left >= 16 ? 0xffffu : (1u << left) - 1u);
        for (uint64_t half = 0; half < ROWS; half += 16) {
            __m512i v[16];
            for (uint64_t r = 0; r < 16; r++) {
                const uint64_t at = row + half + r;
                const uint8_t *w = g->w + at * g->row_bytes;
                v[r] = at < row_end ? _mm512_castps_si512(floats_at(fmt, w, c, m))
                                    : _mm512_setzero_si512();
            }
            transpose16(v);
            for (uint64_t i = 0; i < 16; i++)
                _mm512_storeu_si512(out + (c - col + i) * ROWS + half, v[i]);
        }
    }
}

/* 32 rows by 8 inputs. `x`: [column][16], of which 8 count; `sum`: [8][ROWS]. */
INLINE void tile_f32(const float *w, const float *x, uint64_t n_cols, float *sum)
{
    __m512 f[8][2];
    for (int t = 0; t < 8; t++)
        for (int h = 0; h < 2; h++) f[t][h] = _mm512_loadu_ps(sum + t * ROWS + 16 * h);
    for (uint64_t c = 0; c < n_cols; c++, w += ROWS, x += 16) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
        for (int t = 0; t < 8; t++) {
            const __m512 v = _mm512_set1_ps(x[t]);
            f[t][0] = _mm512_fmadd_ps(w0, v, f[t][0]);
            f[t][1] = _mm512_fmadd_ps(w1, v, f[t][1]);
        }
    }
    for (int t = 0; t < 8; t++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(sum + t * ROWS + 16 * h, f[t][h]);
}

INLINE void gemm_float(ps_fmt fmt, const ps_gemm *g, uint64_t row, uint64_t end)
{
    float *sum = g->scratch, *w = sum + SUM_BYTES / sizeof *sum;
    const uint64_t group_floats = bytes_f32(g->n_cols) / sizeof(float);
    for (; row < end; row += ROWS) {
        const uint64_t row_end = ps_min_u64(row + ROWS, end);
        memset(sum, 0, ((uint64_t)g->n_x + 15) / 16 * 16 * ROWS * sizeof *sum);
        for (uint64_t col = 0; col < g->n_cols; col += COLS_F) {
            const uint64_t col_end = ps_min_u64(col + COLS_F, g->n_cols);
            unpack_floats(fmt, g, row, row_end, col, col_end, w);
            for (uint64_t t = 0; t < g->n_x; t += 8) {
                const float *x = (const float *)g->x + t / 16 * group_floats + col * 16 + t % 16;
                tile_f32(w, x, col_end - col, sum + t * ROWS);
            }
        }
        finish(g, row, row_end, sum);
    }
}

/* ---- the kernels ---- */

#define QUANTISED(name, fmt, block_bytes)                                                          \
    void ps_cpu_avx512_gemm_##name(const ps_gemm *g, uint64_t row, uint64_t end)                   \
    {                                                                                              \
        gemm_q8(fmt, block_bytes, g, row, end);                                                    \
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

void ps_cpu_avx512_gemm_f32(const ps_gemm *g, uint64_t row, uint64_t end)
{
    gemm_float(PS_FMT_F32, g, row, end);
}
void ps_cpu_avx512_gemm_f16(const ps_gemm *g, uint64_t row, uint64_t end)
{
    gemm_float(PS_FMT_F16, g, row, end);
}
void ps_cpu_avx512_gemm_bf16(const ps_gemm *g, uint64_t row, uint64_t end)
{
    gemm_float(PS_FMT_BF16, g, row, end);
}
