/* ps_cuda_attn - what prefill and decode have in common: tiles of keys and values in shared memory,
 * and a warp's work on one of them. See ps_cuda_attn.cu.
 *
 * Not here: which keys a block takes, joining what several did.
 * Threads: as kernels.
 */
#ifndef PS_CUDA_ATTN_CUH
#define PS_CUDA_ATTN_CUH

#include "kernels/ps_cuda.cuh"

enum { ATTN_WARPS = 4 };

#define LOG2_E 1.4426950408889634f
#define LN_2   0.6931471805599453f

typedef struct attn_params {
    ps_attn_args a;
    float *part, *part_ml; /* [n_tok][n_head][splits][head_dim] and [...][2]; decode with shares */
    uint32_t group;        /* query heads a KV head */
    uint32_t group_tiles;  /* tiles of rows that they take */
    uint32_t tile_tok;     /* prefill: tokens a tile */
    uint32_t splits, n_buffers;
    uint32_t page_shift;
    uint32_t by_page;    /* prefill: tiles lie in one page each, as F16 */
    uint32_t only_mixed; /* decode: only tokens of prefill tiles that mix sequences */
    uint32_t first_tok;  /* decode: token of blockIdx.z == 0 */
    uint64_t row_bytes;  /* of the cache */
} attn_params;

/* Keys a tile, per warp in decode; 16-bit elements between rows, 8 more than the row so that
 * ldmatrix meets no bank twice. In prefill as many as leave registers to wide heads, and two tiles
 * in the 99 KiB of smaller GPUs. */
template <int D> __host__ __device__ constexpr int prefill_keys()
{
    return D > 96 ? 32 : 64;
}
template <int D> __host__ __device__ constexpr int decode_keys()
{
    return D > 128 ? 16 : 32;
}
template <int D> __host__ __device__ constexpr int pitch()
{
    return D + 8;
}
/* Tiles of 16 rows a warp has in prefill. Two share every key and value that it reads from shared
 * memory, which would be busier than the tensor cores else; wide heads have no registers for two.
 */
template <int D> __host__ __device__ constexpr int prefill_tiles()
{
    return D > 128 ? 1 : 2;
}
template <int D> __host__ __device__ constexpr int prefill_rows()
{
    return 16 * prefill_tiles<D>() * ATTN_WARPS;
}
/* In decode. Wide heads keep their queries in shared memory: registers are full of sums; in prefill
 * all do. */
template <int D> __host__ __device__ constexpr bool q_in_smem()
{
    return D > 128;
}

PS_DEVICE int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}
PS_DEVICE int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}
PS_DEVICE int32_t warp_min(int32_t v)
{
    for (int o = 16; o > 0; o >>= 1) v = smaller(v, __shfl_xor_sync(PS_FULL_WARP, v, o));
    return v;
}
PS_DEVICE int32_t warp_max(int32_t v)
{
    for (int o = 16; o > 0; o >>= 1) v = larger(v, __shfl_xor_sync(PS_FULL_WARP, v, o));
    return v;
}

/* ---- keys and values ---- */

/* Eight values of a Q8_0 row as F16, rounded once. */
PS_DEVICE uint4 q8_chunk(const uint8_t *row, uint32_t chunk)
{
    const uint8_t *block = row + chunk / 4 * 34;
    const uint16_t *q = (const uint16_t *)(block + 2 + chunk % 4 * 8);
    const float d = ps_f16(*(const uint16_t *)block);
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t two = q[i];
        v[i] = ps_pack_f16(d * (float)(int8_t)(two & 255), d * (float)(int8_t)(two >> 8));
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
}

PS_DEVICE int32_t page_of(const attn_params &p, uint32_t seq, uint32_t pos)
{
    return (
        (const int32_t *)p.a.kv.table.a)[(uint64_t)seq * p.a.kv.max_pages + (pos >> p.page_shift)];
}

/* The row of a position in the cache; one of page 0 where its page is not here. */
PS_DEVICE uint64_t row_at(const attn_params &p, int32_t page, uint32_t kv_head, uint32_t pos)
{
    return (((uint64_t)(page < 0 ? 0 : page) * p.a.kv.n_kv_head + kv_head) << p.page_shift) +
           (pos & (p.a.kv.page_tok - 1));
}

/* How many of KEYS rows of one page from `first` on are before `end`. */
template <int KEYS> PS_DEVICE uint32_t rows_here(int32_t page, uint32_t first, uint32_t end)
{
    return page < 0 ? 0 : end - first < KEYS ? end - first : KEYS;
}

/* How far back a query sees. */
PS_DEVICE int32_t window_of(const attn_params &p)
{
    return p.a.window > 0 && p.a.window < INT32_MAX ? (int32_t)p.a.window : INT32_MAX;
}

/* Rows first .. first + KEYS - 1 of one side to shared memory, shared out over n_threads; zeros
 * from `end` on and where the page is not here, so that a weight of 0 never meets garbage. */
template <int D, int KEYS, ps_copy_way WAY = PS_PAST_L1>
PS_DEVICE void load_side(const attn_params &p, ps_dptr side, uint16_t *to, uint32_t seq,
    uint32_t kv_head, uint32_t first, uint32_t end, uint32_t thread, uint32_t n_threads)
{
    constexpr uint32_t CHUNKS = D / 8;
    const ps_kv_view &kv = p.a.kv;
    for (uint32_t i = thread; i < KEYS * CHUNKS; i += n_threads) {
        const uint32_t row = i / CHUNKS, chunk = i % CHUNKS, pos = first + row;
        const int32_t page = pos < end ? page_of(p, seq, pos) : -1;
        const uint64_t at = row_at(p, page, kv_head, pos);
        uint16_t *dst = to + row * pitch<D>() + chunk * 8;
        const uint8_t *src = (const uint8_t *)side.a + (page < 0 ? 0 : at * p.row_bytes);
        if (kv.fmt == PS_FMT_F16)
            ps_copy16<WAY>(dst, src + (page < 0 ? 0 : chunk * 16), page < 0 ? 0 : 16);
        else
            *(uint4 *)dst = page < 0 ? make_uint4(0, 0, 0, 0) : q8_chunk(src, chunk);
    }
}

/* The same of rows of one page as F16, of which so many count. */
template <int D, int KEYS>
PS_DEVICE void load_rows(uint16_t *to, const uint8_t *from, uint32_t n_rows)
{
    constexpr uint32_t CHUNKS = D / 8, N = ATTN_WARPS * 32;
    static_assert(KEYS * CHUNKS % N == 0, "each thread copies as much");
#pragma unroll
    for (uint32_t j = 0; j < KEYS * CHUNKS / N; j++) {
        const uint32_t i = j * N + threadIdx.x;
        ps_copy16(to + i / CHUNKS * pitch<D>() + i % CHUNKS * 8, from + i * 16,
            i < n_rows * CHUNKS ? 16 : 0);
    }
}

/* A block's tile of keys and values. page: where p.by_page, that of its keys; -1: not here. */
template <int D, int KEYS>
PS_DEVICE void load_tile(const attn_params &p, uint16_t *to, uint32_t seq, uint32_t kv_head,
    uint32_t first, uint32_t end, int32_t page)
{
    uint16_t *values = to + KEYS * pitch<D>();
    if (p.by_page) {
        const uint64_t at = row_at(p, page, kv_head, first);
        const uint32_t n_rows = rows_here<KEYS>(page, first, end);
        load_rows<D, KEYS>(to, (const uint8_t *)p.a.kv.k.a + at * (D * 2), n_rows);
        load_rows<D, KEYS>(values, (const uint8_t *)p.a.kv.v.a + at * (D * 2), n_rows);
    } else {
        const uint32_t n = ATTN_WARPS * 32;
        load_side<D, KEYS>(p, p.a.kv.k, to, seq, kv_head, first, end, threadIdx.x, n);
        load_side<D, KEYS>(p, p.a.kv.v, values, seq, kv_head, first, end, threadIdx.x, n);
    }
    ps_copy_commit();
}

/* Bit i: key first + i is before `end` and its page is here. Collective. */
template <int KEYS>
PS_DEVICE uint64_t present_keys(const attn_params &p, uint32_t seq, uint32_t first, uint32_t end)
{
    const uint32_t lane = threadIdx.x % 32;
    const bool lo = lane < KEYS && first + lane < end && page_of(p, seq, first + lane) >= 0;
    uint64_t bits = __ballot_sync(PS_FULL_WARP, lo);
    if constexpr (KEYS > 32) {
        const bool hi = first + 32 + lane < end && page_of(p, seq, first + 32 + lane) >= 0;
        bits |= (uint64_t)__ballot_sync(PS_FULL_WARP, hi) << 32;
    }
    return bits;
}

/* The same of keys that lie in one page. */
template <int KEYS> PS_DEVICE uint64_t page_keys(int32_t page, uint32_t first, uint32_t end)
{
    const uint32_t n = rows_here<KEYS>(page, first, end);
    return n == 64 ? ~0ull : (1ull << n) - 1;
}

/* ---- one warp: M tiles of 16 rows of queries ---- */

template <int M> struct query_rows { /* this lane's rows, two a tile: lane / 4 and 8 more */
    int32_t pos[2 * M];              /* -1: no row */
    float factor[2 * M]; /* from products to scores; to scores times log2 e where there is no
                            softcap */
    float max[2 * M],
        sum[2 * M]; /* of exponentials so far; `sum` is this lane's share of the row */
};

/* Rounds the lane's parts of its two rows of a tile; `row[i]` may be NULL. The four lanes of a row
 * hold all of it. */
template <int D, int M>
PS_DEVICE void load_queries(const attn_params &p, const float *const row[2], uint32_t tile,
    uint32_t q[D / 16][4], query_rows<M> *s)
{
    const uint32_t c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float max = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 8; k++)
            if (row[i] != NULL)
                max = fmaxf(max, fmaxf(fabsf(row[i][k * 8 + c]), fabsf(row[i][k * 8 + c + 1])));
        max = fmaxf(max, __shfl_xor_sync(PS_FULL_WARP, max, 1));
        max = fmaxf(max, __shfl_xor_sync(PS_FULL_WARP, max, 2));
        /* The power of two that brings the row's largest value to [16, 32). */
        const int exponent = (int)(__float_as_uint(max) >> 23) - 4;
        const uint32_t bits =
            max > 0.0f ? (uint32_t)(exponent > 1 ? exponent : 1) << 23 : 127u << 23;
        const float scale = __uint_as_float(bits), inverse = __uint_as_float((254u << 23) - bits);
        s->factor[2 * tile + i] =
            p.a.softcap > 0.0f ? scale * p.a.scale : scale * p.a.scale * LOG2_E;
        s->max[2 * tile + i] = -INFINITY;
        s->sum[2 * tile + i] = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const float *x = row[i] + k * 16 + c;
            q[k][i] = row[i] != NULL ? ps_pack_f16(x[0] * inverse, x[1] * inverse) : 0;
            q[k][i + 2] = row[i] != NULL ? ps_pack_f16(x[8] * inverse, x[9] * inverse) : 0;
        }
    }
}

/* The fragments as ldmatrix will find them again: 16 rows of pitch<D>(). */
template <int D> PS_DEVICE void park_queries(uint16_t *tile, const uint32_t q[D / 16][4])
{
    const uint32_t lane = threadIdx.x % 32, c = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            *(uint32_t *)(tile + (lane / 4 + i % 2 * 8) * pitch<D>() + k * 16 + i / 2 * 8 + c) =
                q[k][i];
}

/* score += queries keys. q: of one tile, where they are not in shared memory. */
template <int D, int KEYS, int M, bool Q_IN_SMEM>
PS_DEVICE void multiply_keys(const uint16_t *keys, const uint32_t q[D / 16][4],
    const uint16_t *q_tile, float (&score)[M][KEYS / 8][4])
{
    const uint32_t lane = threadIdx.x % 32;
    const uint16_t *k_row = keys + (lane / 16 * 8 + lane % 8) * pitch<D>() + lane / 8 % 2 * 8;
    const uint16_t *q_row = q_tile + lane % 16 * pitch<D>() + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            if constexpr (Q_IN_SMEM)
                ps_ldmatrix(a[m], q_row + m * 16 * pitch<D>() + d * 16);
            else
#pragma unroll
                for (int i = 0; i < 4; i++) a[m][i] = q[d][i];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            ps_ldmatrix(b, k_row + n * 16 * pitch<D>() + d * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                ps_mma_f16(score[m][2 * n], a[m], b[0], b[1]);
                ps_mma_f16(score[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* Without a branch, and right to 1e-7 of 1. */
PS_DEVICE float tanh_of(float x)
{
    return 1.0f - __fdividef(2.0f, ps_exp2(2.0f * LOG2_E * x) + 1.0f);
}

/* Products to scores. The branches are around whole loops: within, they would keep the compiler
 * from working on many scores at once. */
template <int KEYS, int M>
PS_DEVICE void score_products(const attn_params &p, uint32_t first, uint64_t present, bool open,
    const query_rows<M> *s, float (&score)[M][KEYS / 8][4])
{
    const uint32_t lane = threadIdx.x % 32;
    const int32_t window = window_of(p);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) score[m][n][c] *= s->factor[2 * m + c / 2];
    const float inverse_cap = 1.0f / p.a.softcap;
    if (p.a.softcap > 0.0f)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    score[m][n][c] = p.a.softcap * tanh_of(score[m][n][c] * inverse_cap) * LOG2_E;
    if (!open)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const uint32_t j = n * 8 + lane % 4 * 2 + c % 2;
                    const int32_t back = s->pos[2 * m + c / 2] - (int32_t)(first + j);
                    const bool sees = (present >> j & 1) && back >= 0 && back < window;
                    score[m][n][c] = sees ? score[m][n][c] : -INFINITY;
                }
}

/* Scores to weights, relative to the largest score so far; what was summed is made relative to
 * that, too. */
template <int D, int KEYS, int M>
PS_DEVICE void weigh(query_rows<M> *s, float (&score)[M][KEYS / 8][4], float (&out)[M][D / 8][4])
{
#pragma unroll
    for (int r = 0; r < 2 * M; r++) { /* of tile r / 2, the row lane / 4 or 8 more */
        float max = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            max = fmaxf(max, fmaxf(score[r / 2][n][r % 2 * 2], score[r / 2][n][r % 2 * 2 + 1]));
        max = fmaxf(max, __shfl_xor_sync(PS_FULL_WARP, max, 1));
        max = fmaxf(max, __shfl_xor_sync(PS_FULL_WARP, max, 2));
        max = fmaxf(max, s->max[r]);
        /* No key yet: weights stay 0 instead of not a number. */
        const float base = max == -INFINITY ? 0.0f : max, shrink = ps_exp2(s->max[r] - base);
        s->max[r] = max;
        float sum = s->sum[r] * shrink;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float *x = &score[r / 2][n][r % 2 * 2 + c];
                *x = ps_exp2(*x - base);
                sum += *x;
            }
        s->sum[r] = sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            out[r / 2][n][r % 2 * 2] *= shrink, out[r / 2][n][r % 2 * 2 + 1] *= shrink;
    }
}

/* One tile of keys and values: scores, mask, softmax so far, weighted values. `present` bit j: key
 * first + j counts; `open`: every key of the tile counts for every row. */
template <int D, int KEYS, int M, bool Q_IN_SMEM>
PS_DEVICE void attend_tile(const attn_params &p, const uint16_t *tile, const uint32_t q[D / 16][4],
    const uint16_t *q_tile, uint32_t first, uint64_t present, bool open, query_rows<M> *s,
    float (&out)[M][D / 8][4])
{
    const uint32_t lane = threadIdx.x % 32;
    float score[M][KEYS / 8][4] = {};
    multiply_keys<D, KEYS, M, Q_IN_SMEM>(tile, q, q_tile, score);
    score_products<KEYS, M>(p, first, present, open, s, score);
    weigh<D, KEYS, M>(s, score, out);
    const uint16_t *v_row =
        tile + (KEYS + lane % 16) * pitch<D>() + lane / 16 * 8; /* values lie behind keys */
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        /* The scores' places in the sums are the weights' places in the next product. */
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *x = &score[m][2 * k + i / 2][i % 2 * 2];
                a[m][i] = ps_pack_f16(x[0], x[1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            ps_ldmatrix_t(b, v_row + k * 16 * pitch<D>() + n * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                ps_mma_f16(out[m][2 * n], a[m], b[0], b[1]);
                ps_mma_f16(out[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* The lanes of a row join their shares of the sum. Collective. */
template <int M> PS_DEVICE void join_sums(query_rows<M> *s)
{
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        s->sum[i] += __shfl_xor_sync(PS_FULL_WARP, s->sum[i], 1);
        s->sum[i] += __shfl_xor_sync(PS_FULL_WARP, s->sum[i], 2);
    }
}

#endif
