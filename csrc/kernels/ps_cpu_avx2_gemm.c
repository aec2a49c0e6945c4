/* ps_cpu_avx2_gemm - tiles for many tokens: 8-bit integer dot products for quantised weights, float
 * ones for the others. A panel of 16 rows is unpacked once, columns interleaved, and meets four
 * inputs at a time.
 *
 * Not here: how rows are shared out (ps_cpu_matmul.c), few tokens (ps_cpu_avx2_gemv.c).
 * Threads: pure functions over the caller's memory.
 *
 * An element's sum runs over its columns in order, whatever the tile it lies in.
 */
#include "kernels/ps_cpu_avx2.h"
#include "kernels/ps_cpu_avx2_load.h"
#include "kernels/ps_cpu_quantize.h"

enum {
    ROWS = 16,
    /* Columns unpacked at a time: a panel of bytes with its scales, or of floats, stays in L1. */
    COLS_Q = 1024,
    COLS_F = 256,
    SUM_BYTES = ROWS * PS_GEMM_BLOCK_TOK * 4,
    /* A panel: bytes, then a scale and an offset for each 16 weights of a row. */
    PANEL_BYTES = ROWS * COLS_Q + 2 * ROWS * COLS_Q / 16 * 4,
};
_Static_assert(PANEL_BYTES >= ROWS * COLS_F * 4, "both kinds of panel use the same memory");
_Static_assert(
    SUM_BYTES + PANEL_BYTES <= PS_CPU_AVX2_GEMM_SCRATCH_BYTES, "what the header promises");

INLINE void transpose8(__m256i r[8]) /* of 32-bit elements */
{
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m256i a = r[i], b = r[i + 4];
        r[i] = _mm256_permute2x128_si256(a, b, 0x20);
        r[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
    }
}

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

const ps_pack ps_cpu_avx2_pack_q8 = {bytes_q8, pack_q8};

/* ---- weights in 8 bits ---- */

typedef struct panel {
    uint8_t *u;            /* [COLS_Q / 4][ROWS][4] */
    float *scale, *offset; /* [blocks][ROWS]; blocks of 32 or 16 */
} panel;

/* 256 columns of 8 rows: u at its columns, scale and offset at its blocks. */
INLINE void unpack_rows(
    ps_fmt fmt, const uint8_t *const *w, uint8_t *u, float *scale, float *offset)
{
    const int n_blocks = has_16_blocks(fmt) ? 16 : 8;
    for (int r = 0; r < 8; r++) {
        scales s;
        load_scales(fmt, w[r], &s);
        for (int b = 0; b < n_blocks; b++) {
            scale[b * ROWS + r] = s.scale[b];
            offset[b * ROWS + r] = is_signed(fmt) ? 0.0f : min_factor(fmt) * s.min[b];
        }
    }
    for (int b = 0; b < 8; b++) {
        __m256i x[8];
        for (int r = 0; r < 8; r++) x[r] = load_block(fmt, w[r], b);
        transpose8(x);
        for (int i = 0; i < 8; i++)
            _mm256_storeu_si256((__m256i *)(u + (size_t)(8 * b + i) * ROWS * 4), x[i]);
    }
}

/* Columns [col, col_end) of rows [row, row_end), at most ROWS of them. */
INLINE void unpack_panel(ps_fmt fmt, size_t block_bytes, const ps_gemm *g, uint64_t row,
    uint64_t row_end, uint64_t col, uint64_t col_end, panel p)
{
    static const uint8_t nothing[8 * 34]; /* a row that is not there */
    const size_t group_bytes = group_bytes_of(fmt, block_bytes);
    const uint64_t n_blocks = has_16_blocks(fmt) ? 16 : 8;
    for (uint64_t half = 0; half < ROWS; half += 8)
        for (uint64_t at = col; at < col_end; at += 256) {
            const uint8_t *w[8];
            uint8_t tail[8][8 * 34];
            for (uint64_t r = 0; r < 8; r++) {
                const uint64_t i = row + half + r;
                w[r] = i < row_end ? g->w + i * g->row_bytes + at / 256 * group_bytes : nothing;
                if (at + 256 <= col_end || i >= row_end) continue;
                memset(tail[r], 0, sizeof tail[r]);
                memcpy(tail[r], w[r], (col_end - at) / 32 * block_bytes);
                w[r] = tail[r];
            }
            const uint64_t i = (at - col) / 256;
            unpack_rows(fmt, w, p.u + i * 64 * ROWS * 4 + half * 4,
                p.scale + i * n_blocks * ROWS + half, p.offset + i * n_blocks * ROWS + half);
        }
}

/* ---- integer tiles ---- */

/* How many products() fit into 16 bits: n * 2 * (largest byte) * 127 <= 32767. */
INLINE int sums_in_16_bits(ps_fmt fmt)
{
    switch (fmt) {
    case PS_FMT_Q8_0:
    case PS_FMT_IQ4_NL:
    case PS_FMT_IQ4_XS: return 1;
    case PS_FMT_Q6_K: return 2;
    case PS_FMT_Q5_0:
    case PS_FMT_Q5_1:
    case PS_FMT_Q5_K:
    case PS_FMT_MXFP4: return 4;
    default: return 8;
    }
}

/* 8 rows (from `half`) by 4 inputs over n_blocks blocks of 32 columns. `sum`: [4][ROWS] floats. */
INLINE void tile_q8(
    ps_fmt fmt, panel p, size_t half, const xblock *x, int t0, uint64_t n_blocks, float *sum)
{
    const int n_parts = has_16_blocks(fmt) ? 2 : 1, n_steps = 8 / n_parts;
    const int run = sums_in_16_bits(fmt) < n_steps ? sums_in_16_bits(fmt) : n_steps;
    const uint8_t *u = p.u + 4 * half;
    const float *scale = p.scale + half, *offset = p.offset + half;
    __m256 f[4];
    for (int t = 0; t < 4; t++) f[t] = _mm256_loadu_ps(sum + t * ROWS + half);
    for (uint64_t b = 0; b < n_blocks; b++)
        for (int part = 0; part < n_parts; part++, scale += ROWS, offset += ROWS) {
            __m256i dot[4];
            for (int t = 0; t < 4; t++) dot[t] = _mm256_setzero_si256();
            for (int i = part * n_steps; i < (part + 1) * n_steps; i += run) {
                __m256i pairs[4];
                for (int k = 0; k < run; k++, u += ROWS * 4) {
                    const __m256i v = load32(u);
                    for (int t = 0; t < 4; t++) {
                        int32_t four;
                        memcpy(&four, x[b].q[i + k][t0 + t], 4);
                        const __m256i more = products(fmt, v, _mm256_set1_epi32(four));
                        pairs[t] = k == 0 ? more : _mm256_add_epi16(pairs[t], more);
                    }
                }
                for (int t = 0; t < 4; t++)
                    dot[t] =
                        _mm256_add_epi32(dot[t], _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(1)));
            }
            const float *s = n_parts == 2 ? x[b].s16[part] : x[b].s32;
            const __m256 sc = _mm256_loadu_ps(scale), off = _mm256_loadu_ps(offset);
            for (int t = 0; t < 4; t++) {
                const __m256 both = _mm256_mul_ps(sc, _mm256_set1_ps(x[b].d[t0 + t]));
                f[t] = _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(dot[t]), f[t]);
                if (!is_signed(fmt)) f[t] = _mm256_fmadd_ps(off, _mm256_set1_ps(s[t0 + t]), f[t]);
            }
        }
    for (int t = 0; t < 4; t++) _mm256_storeu_ps(sum + t * ROWS + half, f[t]);
}

/* Sums [n_x][ROWS] to y. */
static void finish(const ps_gemm *g, uint64_t row, uint64_t row_end, const float *sum)
{
    for (uint64_t t = 0; t < g->n_x; t++)
        for (uint64_t r = row; r < row_end; r++) {
            float *y = g->y[t] + (r - g->row0);
            const float v = sum[t * ROWS + (r - row)] + (g->bias != NULL ? g->bias[r] : 0.0f);
            *y = g->add ? *y + v : v;
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
                for (size_t half = 0; half < ROWS && row + half < row_end; half += 8)
                    tile_q8(fmt, p, half, x, (int)(t % 16), n_blocks, sum + t * ROWS);
            }
        }
        finish(g, row, row_end, sum);
    }
}

/* ---- floats ---- */

static uint64_t bytes_f32(uint32_t n_cols)
{
    return ((uint64_t)n_cols + 7) / 8 * 8 * 16 * sizeof(float);
}

/* 8 columns of a row of floats, zeros from `left` on. */
INLINE __m256i row8(ps_fmt fmt, const uint8_t *w, uint64_t left)
{
    const size_t size = fmt == PS_FMT_F32 ? 4 : 2;
    uint8_t edge[32] = {0};
    if (left < 8) {
        memcpy(edge, w, size * left);
        w = edge;
    }
    if (fmt == PS_FMT_F32) return load32(w);
    const __m128i h = _mm_loadu_si128((const __m128i *)w);
    if (fmt == PS_FMT_F16) return _mm256_castps_si256(_mm256_cvtph_ps(h));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
}

/* [column][16 inputs] */
static void pack_f32(const float *const *x, uint32_t n, uint32_t n_cols, void *out)
{
    float *p = out;
    for (uint32_t c = 0; c < n_cols; c += 8, p += 8 * 16)
        for (uint32_t half = 0; half < 16; half += 8) {
            __m256i r[8];
            for (uint32_t t = 0; t < 8; t++)
                r[t] = half + t < n
                           ? row8(PS_FMT_F32, (const uint8_t *)(x[half + t] + c), n_cols - c)
                           : _mm256_setzero_si256();
            transpose8(r);
            for (uint32_t i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(p + 16 * i + half), r[i]);
        }
}

const ps_pack ps_cpu_avx2_pack_f32 = {bytes_f32, pack_f32};

/* Columns [col, col_end) of rows [row, row_end) as [column][ROWS] floats. */
INLINE void unpack_floats(ps_fmt fmt, const ps_gemm *g, uint64_t row, uint64_t row_end,
    uint64_t col, uint64_t col_end, float *out)
{
    const size_t size = fmt == PS_FMT_F32 ? 4 : 2;
    for (uint64_t c = col; c < col_end; c += 8)
        for (uint64_t half = 0; half < ROWS; half += 8) {
            __m256i v[8];
            for (uint64_t r = 0; r < 8; r++) {
                const uint64_t at = row + half + r;
                v[r] = at < row_end ? row8(fmt, g->w + at * g->row_bytes + size * c, col_end - c)
                                    : _mm256_setzero_si256();
            }
            transpose8(v);
            for (uint64_t i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(out + (c - col + i) * ROWS + half), v[i]);
        }
}

/* 16 rows by 4 inputs. `x`: [column][16], of which 4 count; `sum`: [4][ROWS]. */
INLINE void tile_f32(const float *w, const float *x, uint64_t n_cols, float *sum)
{
    __m256 f[4][2];
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < 2; h++) f[t][h] = _mm256_loadu_ps(sum + t * ROWS + 8 * h);
    for (uint64_t c = 0; c < n_cols; c++, w += ROWS, x += 16) {
        const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);
        for (int t = 0; t < 4; t++) {
            const __m256 v = _mm256_set1_ps(x[t]);
            f[t][0] = _mm256_fmadd_ps(w0, v, f[t][0]);
            f[t][1] = _mm256_fmadd_ps(w1, v, f[t][1]);
        }
    }
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < 2; h++) _mm256_storeu_ps(sum + t * ROWS + 8 * h, f[t][h]);
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
            for (uint64_t t = 0; t < g->n_x; t += 4) {
                const float *x = (const float *)g->x + t / 16 * group_floats + col * 16 + t % 16;
                tile_f32(w, x, col_end - col, sum + t * ROWS);
            }
        }
        finish(g, row, row_end, sum);
    }
}

/* ---- the kernels ---- */

#define QUANTISED(name, fmt, block_bytes)                                                          \
    void ps_cpu_avx2_gemm_##name(const ps_gemm *g, uint64_t row, uint64_t end)                     \
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

void ps_cpu_avx2_gemm_f32(const ps_gemm *g, uint64_t row, uint64_t end)
{
    gemm_float(PS_FMT_F32, g, row, end);
}
void ps_cpu_avx2_gemm_f16(const ps_gemm *g, uint64_t row, uint64_t end)
{
    gemm_float(PS_FMT_F16, g, row, end);
}
void ps_cpu_avx2_gemm_bf16(const ps_gemm *g, uint64_t row, uint64_t end)
{
    gemm_float(PS_FMT_BF16, g, row, end);
}
