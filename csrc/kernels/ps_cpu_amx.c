/* ps_cpu_amx - tiles of bfloat16 products for many tokens, on CPUs with AMX: weights of any
 * quantised format are unpacked to bfloat16 panels in the L2 cache and multiplied there with inputs
 * in bfloat16. F16 weights, whose accuracy bfloat16 would spoil, go in two halves, w = high + low,
 * as do their inputs; the product of both low halves (2^-16 and less of the result) is left out.
 * The rest of the variant is AVX-512's.
 *
 * Not here: few tokens, F32 weights.
 * Threads: each thread configures and releases its own tiles within a call.
 *
 * Error: rounding inputs and weights to bfloat16 costs an NMSE of about 3e-6 each (8 bits of
 * mantissa); BF16 weights are exact. In two halves about 1e-10. An element's sum runs over its
 * columns in order, in pairs as TDPBF16PS adds them, whatever the tile it lies in; so bits do not
 * depend on which rows or tokens share a call.
 */
#include "kernels/ps_cpu_amx.h"
#include "kernels/ps_cpu_avx512_load.h"

#include <immintrin.h>

enum {
    TILE_BYTES = 1024, /* 16 rows of 64 bytes: 16 x 32 bfloat16, or 16 x 16 floats */
    STEP = 32,         /* columns of one tile */
    PANEL_ROWS =
        256, /* weights unpacked at a time: 256 x 512 x 2 bytes lie in L2 beside the sums */
    PANEL_COLS = 512, /* 32 inputs of so many columns stay in L1 */
    MAX_GROUPS = PS_GEMM_BLOCK_TOK / PS_GEMM_GROUP,
    /* Unpacked weights (two halves), then the sums of PANEL_ROWS x PS_GEMM_BLOCK_TOK. */
    PANEL_BYTES = PANEL_ROWS * PANEL_COLS * 2 * 2,
    SUM_BYTES = PANEL_ROWS * PS_GEMM_BLOCK_TOK * 4,
};

_Static_assert(PANEL_BYTES + SUM_BYTES == PS_CPU_AMX_SCRATCH_BYTES, "what the header promises");

/* ---- inputs ---- */

INLINE __m512i bf16_of(__m512 low, __m512 high)
{
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* What rounding to bfloat16 left over, again in bfloat16. */
INLINE __m512i bf16_rest(__m512 low, __m512 high, __m512i rounded)
{
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1));
    const __m512 l = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
    const __m512 h = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
    return bf16_of(_mm512_sub_ps(low, l), _mm512_sub_ps(high, h));
}

INLINE __m512 load_masked(const float *x, int64_t left)
{
    if (left >= 16) return _mm512_loadu_ps(x);
    return left <= 0 ? _mm512_setzero_ps()
                     : _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), x);
}

/* A tile holds 32 columns of 16 inputs: row i is columns 2 i and 2 i + 1 of each input. With
 * halves, each tile of high parts is followed by that of the low ones. */
INLINE void pack(const float *const *x, uint32_t n, uint32_t n_cols, char *out, bool halves)
{
    for (uint32_t c = 0; c < n_cols; c += STEP) {
        __m512i high[16], low[16];
        for (uint32_t t = 0; t < 16; t++) {
            const int64_t left = t < n ? (int64_t)n_cols - (int64_t)c : 0;
            const float *row = t < n ? x[t] + c : NULL;
            const __m512 a = load_masked(row, left), b = load_masked(row + 16, left - 16);
            high[t] = bf16_of(a, b);
            if (halves) low[t] = bf16_rest(a, b, high[t]);
        }
        transpose16(high);
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + 64 * i, high[i]);
        out += TILE_BYTES;
        if (!halves) continue;
        transpose16(low);
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + 64 * i, low[i]);
        out += TILE_BYTES;
    }
}

static uint64_t bytes_single(uint32_t n_cols)
{
    return ps_div_up_u64(n_cols, STEP) * TILE_BYTES;
}
static uint64_t bytes_halves(uint32_t n_cols)
{
    return 2 * bytes_single(n_cols);
}
static void pack_single(const float *const *x, uint32_t n, uint32_t n_cols, void *out)
{
    pack(x, n, n_cols, out, false);
}
static void pack_halves(const float *const *x, uint32_t n, uint32_t n_cols, void *out)
{
    pack(x, n, n_cols, out, true);
}

const ps_pack ps_cpu_amx_pack_single = {bytes_single, pack_single};
const ps_pack ps_cpu_amx_pack_halves = {bytes_halves, pack_halves};

/* ---- weights ---- */

/* 256 weights of one row, to eight tiles that are TILE_BYTES apart (this row's 64 bytes of each).
 */
INLINE void unpack_group(ps_fmt fmt, const uint8_t *w, char *out)
{
    group g;
    uint8_t u[256] __attribute__((aligned(64)));
    float scale[16] __attribute__((aligned(64))), offset[16] __attribute__((aligned(64)));
    load_group(fmt, w, &g);
    for (int p = 0; p < 4; p++) _mm512_store_si512(u + 64 * p, g.u[p]);
    _mm512_store_ps(scale, g.scale);
    _mm512_store_ps(offset, _mm512_mul_ps(g.min, _mm512_set1_ps(min_factor(fmt))));
    for (int b = 0; b < 8; b++) { /* 32 weights */
        const int s0 = has_16_blocks(fmt) ? 2 * b : b, s1 = has_16_blocks(fmt) ? 2 * b + 1 : b;
        const __m128i q0 = _mm_load_si128((const __m128i *)(u + 32 * b));
        const __m128i q1 = _mm_load_si128((const __m128i *)(u + 32 * b + 16));
        const __m512 f0 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q0));
        const __m512 f1 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q1));
        const __m512 w0 =
            _mm512_fmadd_ps(f0, _mm512_set1_ps(scale[s0]), _mm512_set1_ps(offset[s0]));
        const __m512 w1 =
            _mm512_fmadd_ps(f1, _mm512_set1_ps(scale[s1]), _mm512_set1_ps(offset[s1]));
        _mm512_store_si512(out + b * TILE_BYTES, bf16_of(w0, w1));
    }
}

/* Columns [col, col_end) of a row, zeros up to a whole tile. `out`: the row's 64 bytes of the first
 * tile. */
INLINE void unpack_quantised(
    ps_fmt fmt, size_t block_bytes, const uint8_t *w, uint64_t col, uint64_t col_end, char *out)
{
    const size_t group_bytes = group_bytes_of(fmt, block_bytes);
    w += col / 256 * group_bytes;
    for (; col + 256 <= col_end; col += 256, w += group_bytes, out += 8 * TILE_BYTES)
        unpack_group(fmt, w, out);
    if (col == col_end) return;
    /* Whole blocks of 32 are left, fewer than eight. */
    uint8_t tail[8 * 34];
    char tiles[8 * TILE_BYTES] __attribute__((aligned(64)));
    const uint64_t n = (col_end - col) / 32;
    memset(tail, 0, sizeof tail);
    memcpy(tail, w, n * block_bytes);
    unpack_group(fmt, tail, tiles);
    for (uint64_t b = 0; b < n; b++) memcpy(out + b * TILE_BYTES, tiles + b * TILE_BYTES, 64);
}

static void unpack_bf16(const uint8_t *w, uint64_t col, uint64_t col_end, char *out)
{
    for (; col < col_end; col += STEP, out += TILE_BYTES) {
        const uint64_t n = ps_min_u64(col_end - col, STEP);
        const __mmask32 m = n == STEP ? ~0u : (1u << n) - 1;
        _mm512_store_si512(out, _mm512_maskz_loadu_epi16(m, w + 2 * col));
    }
}

/* The tile of high parts is followed by that of the low ones. */
static void unpack_f16(const uint8_t *w, uint64_t col, uint64_t col_end, char *out)
{
    for (; col < col_end; col += STEP, out += 2 * TILE_BYTES) {
        const uint64_t n = ps_min_u64(col_end - col, STEP);
        const __mmask32 m = n == STEP ? ~0u : (1u << n) - 1;
        const __m512i h = _mm512_maskz_loadu_epi16(m, w + 2 * col);
        const __m512 a = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
        const __m512 b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
        const __m512i high = bf16_of(a, b);
        _mm512_store_si512(out, high);
        _mm512_store_si512(out + TILE_BYTES, bf16_rest(a, b, high));
    }
}

INLINE void unpack_row(
    ps_fmt fmt, size_t block_bytes, const uint8_t *w, uint64_t col, uint64_t end, char *out)
{
    if (fmt == PS_FMT_BF16)
        unpack_bf16(w, col, end, out);
    else if (fmt == PS_FMT_F16)
        unpack_f16(w, col, end, out);
    else
        unpack_quantised(fmt, block_bytes, w, col, end, out);
}

/* ---- tiles ---- */

typedef struct tile_config {
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
} tile_config;

static void tiles_configure(void)
{
    tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.n_rows[i] = 16;
    _tile_loadconfig(&c);
}

/* Tiles 0 to 3 are sums of (weights 0, inputs 0), (0, 1), (1, 0), (1, 1); 4 and 5 weights, 6 and 7
 * inputs. */
#define PRODUCTS                                                                                   \
    _tile_dpbf16ps(0, 4, 6);                                                                       \
    _tile_dpbf16ps(1, 4, 7);                                                                       \
    _tile_dpbf16ps(2, 5, 6);                                                                       \
    _tile_dpbf16ps(3, 5, 7)

/* 32 rows by 32 inputs over n_steps tiles of columns; w1 and x1 may repeat w0 and x0 where there is
 * no second one. */
INLINE void tile_block(bool halves, const char *w0, const char *w1, const char *x0, const char *x1,
    uint64_t n_steps, char *sum, bool first)
{
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sum, 64);
        _tile_loadd(1, sum + TILE_BYTES, 64);
        _tile_loadd(2, sum + 2 * TILE_BYTES, 64);
        _tile_loadd(3, sum + 3 * TILE_BYTES, 64);
    }
    const uint64_t step = (halves ? 2 : 1) * TILE_BYTES;
    for (uint64_t i = 0; i < n_steps * step; i += step) {
        _tile_loadd(4, w0 + i, 64);
        _tile_loadd(5, w1 + i, 64);
        if (halves) {
            _tile_loadd(6, x0 + i + TILE_BYTES, 64);
            _tile_loadd(7, x1 + i + TILE_BYTES, 64);
            PRODUCTS; /* weights' high, inputs' low */
        }
        _tile_loadd(6, x0 + i, 64);
        _tile_loadd(7, x1 + i, 64);
        PRODUCTS;
        if (halves) {
            _tile_loadd(4, w0 + i + TILE_BYTES, 64);
            _tile_loadd(5, w1 + i + TILE_BYTES, 64);
            PRODUCTS; /* weights' low, inputs' high */
        }
    }
    _tile_stored(0, sum, 64);
    _tile_stored(1, sum + TILE_BYTES, 64);
    _tile_stored(2, sum + 2 * TILE_BYTES, 64);
    _tile_stored(3, sum + 3 * TILE_BYTES, 64);
}

/* ---- a call ---- */

typedef struct panel { /* rows [row, row_end) by inputs of all groups; counts of 16 */
    uint64_t row, row_end, n_row_groups, n_groups;
    char *w, *sum;
} panel;

/* The 2 x 2 tiles of sums of a pair of row groups and a pair of input groups. */
INLINE char *sums_at(const panel *p, uint64_t row_pair, uint64_t group_pair)
{
    return p->sum + (row_pair * ((p->n_groups + 1) / 2) + group_pair) * 4 * TILE_BYTES;
}

INLINE void multiply(const ps_gemm *g, const panel *p, uint64_t col, uint64_t col_end, bool halves)
{
    const uint64_t tile = (halves ? 2 : 1) * TILE_BYTES,
                   n_steps = ps_div_up_u64(col_end - col, STEP);
    const uint64_t group_bytes = ps_div_up_u64(g->n_cols, STEP) * tile;
    for (uint64_t x = 0; x < p->n_groups; x += 2) {
        const char *x0 = (const char *)g->x + x * group_bytes + col / STEP * tile;
        const char *x1 = x + 1 < p->n_groups ? x0 + group_bytes : x0;
        for (uint64_t r = 0; r < p->n_row_groups; r += 2) {
            const char *w0 = p->w + r * n_steps * tile;
            const char *w1 = r + 1 < p->n_row_groups ? w0 + n_steps * tile : w0;
            tile_block(halves, w0, w1, x0, x1, n_steps, sums_at(p, r / 2, x / 2), col == 0);
        }
    }
}

/* Sums to y: a tile holds 16 weights' rows by 16 inputs. */
static void finish(const ps_gemm *g, const panel *p)
{
    for (uint64_t x = 0; x < g->n_x; x += 16)
        for (uint64_t r = p->row; r < p->row_end; r += 16) {
            const uint64_t rg = (r - p->row) / 16, xg = x / 16;
            const char *tile = sums_at(p, rg / 2, xg / 2) + (rg % 2 * 2 + xg % 2) * TILE_BYTES;
            const uint64_t n = ps_min_u64(p->row_end - r, 16), n_x = ps_min_u64(g->n_x - x, 16);
            const __mmask16 m = (__mmask16)((1u << n) - 1u); /* n <= 16 */
            __m512i t[16];
            for (int i = 0; i < 16; i++) t[i] = _mm512_load_si512(tile + 64 * i);
            transpose16(t);
            const __m512 bias =
                g->bias != NULL ? _mm512_maskz_loadu_ps(m, g->bias + r) : _mm512_setzero_ps();
            for (uint64_t i = 0; i < n_x; i++) {
                float *y = g->y[x + i] + (r - g->row0);
                __m512 v = _mm512_add_ps(_mm512_castsi512_ps(t[i]), bias);
                if (g->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(m, y), v);
                _mm512_mask_storeu_ps(y, m, v);
            }
        }
}

INLINE void gemm(ps_fmt fmt, size_t block_bytes, const ps_gemm *g, uint64_t row, uint64_t end)
{
    const bool halves = fmt == PS_FMT_F16;
    const uint64_t tile = (halves ? 2 : 1) * TILE_BYTES;
    panel p = {.n_groups = ps_div_up_u64(g->n_x, PS_GEMM_GROUP),
        .w = g->scratch,
        .sum = (char *)g->scratch + PANEL_BYTES};
    tiles_configure();
    for (; row < end; row = p.row_end) {
        p.row = row;
        p.row_end = ps_min_u64(row + PANEL_ROWS, end);
        p.n_row_groups = ps_div_up_u64(p.row_end - row, 16);
        for (uint64_t col = 0; col < g->n_cols; col += PANEL_COLS) {
            const uint64_t col_end = ps_min_u64(col + PANEL_COLS, g->n_cols);
            const uint64_t row_tiles = ps_div_up_u64(col_end - col, STEP) * tile; /* of 16 rows */
            for (uint64_t r = row; r < p.row_end; r++)
                unpack_row(fmt, block_bytes, g->w + r * g->row_bytes, col, col_end,
                    p.w + (r - row) / 16 * row_tiles + (r - row) % 16 * 64);
            multiply(g, &p, col, col_end, halves);
        }
        finish(g, &p);
    }
    _tile_release();
}

#define GEMM(name, fmt, block_bytes)                                                               \
    void ps_cpu_amx_gemm_##name(const ps_gemm *g, uint64_t row, uint64_t end)                      \
    {                                                                                              \
        gemm(fmt, block_bytes, g, row, end);                                                       \
    }
GEMM(f16, PS_FMT_F16, 2)
GEMM(bf16, PS_FMT_BF16, 2)
GEMM(q4_0, PS_FMT_Q4_0, 18)
GEMM(q4_1, PS_FMT_Q4_1, 20)
GEMM(q5_0, PS_FMT_Q5_0, 22)
GEMM(q5_1, PS_FMT_Q5_1, 24)
GEMM(q8_0, PS_FMT_Q8_0, 34)
GEMM(q2_k, PS_FMT_Q2_K, 84)
GEMM(q3_k, PS_FMT_Q3_K, 110)
GEMM(q4_k, PS_FMT_Q4_K, 144)
GEMM(q5_k, PS_FMT_Q5_K, 176)
GEMM(q6_k, PS_FMT_Q6_K, 210)
GEMM(iq4_nl, PS_FMT_IQ4_NL, 18)
GEMM(iq4_xs, PS_FMT_IQ4_XS, 136)
GEMM(mxfp4, PS_FMT_MXFP4, 17)
