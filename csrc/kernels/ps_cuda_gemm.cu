/* ps_cuda_gemm - prefill on the tensor cores: 16-bit inputs times weights of any format but F32,
 * for plain matrices and for experts (grouped: one launch for all of them). Sums in float32.
 *
 * Not here: rounding the inputs (ps_cuda_convert.cu), cuBLAS (ps_cuda_matmul.cu).
 * Threads: launchers on the engine's thread.
 *
 * A block makes a tile of 128 inputs by 64 weight rows (PAIR: 32 gate rows and their 32 up rows,
 * eight of each in turn, so that one thread holds both factors) in steps of 64 columns. Warps 4 x
 * 2; a warp's inputs are two groups of 16 rows, 64 apart, and groups beyond the tile's last input
 * are skipped, so that an expert with 20 tokens pays for 32 of the 128.
 *
 * Who takes how many inputs only the GPU knows. The grid is for the experts that are here at an
 * even share with some to spare; blocks go on to further tiles where there are more. (A block that
 * finds no tile still takes about a microsecond of its place: for all tiles that there might be,
 * these were two thirds of the time of a layer that streams in parts.)
 *
 * Pipeline, one barrier a step: inputs (and 16-bit weights) arrive by asynchronous copies one or
 * two steps ahead. Blocks of quantised weights arrive 256 columns at a time as raw bytes and are
 * unpacked to 16 bits one step ahead of their use, into the tile that the step before last has
 * left, so that unpacking and products overlap. Two blocks share an SM.
 *
 * Floor: 2 * inputs * rows * columns / 600 TFLOP/s (mma.sync on an H200), e.g. the experts of a
 * Qwen3-30B-A3B layer at 1024 tokens, 77 GFLOP: 0.13 ms.
 */
#include "kernels/ps_cuda_fmt.cuh"
#include "kernels/ps_cuda_inner.h"

enum {
    TM = 128,
    TN = 64,
    TK = 64,
    PITCH = TK + 8, /* 16-bit elements; 144 bytes spread the rows of an 8x8 matrix over all banks */
    THREADS = 256,
    A_ELEMS = TM * PITCH,
    B_ELEMS = TN * PITCH,
    RAW_COLS = 256,
    RAW_STEPS = RAW_COLS / TK,
};

template <int F> __host__ __device__ constexpr bool is_raw()
{
    return F != PS_FMT_F16 && F != PS_FMT_BF16;
}

/* 256 columns of a row in blocks, and a row's place in shared memory for them: copies begin at
 * multiples of 16, words behind the end may be read, and an odd number of 16 bytes spreads rows
 * over the banks. */
template <int F> __host__ __device__ constexpr int raw_bytes()
{
    return is_raw<F>() ? RAW_COLS / ps_block_elems<F>() * ps_block_bytes<F>() : 0;
}
template <int F> __host__ __device__ constexpr int raw_pitch()
{
    return is_raw<F>() ? ((raw_bytes<F>() + 15 + 4 + 15) / 16 | 1) * 16 : 0;
}

/* The tile in hand. */
typedef struct tile_rows {
    uint32_t valid; /* inputs in it, 1..TM */
    uint32_t expert, part;
    uint32_t n0; /* first weight row (PAIR: of gate and of up) */
} tile_rows;

typedef struct tile_smem {
    const uint8_t *w[TN]; /* weight rows, NULL past the last one */
    uint32_t x_row[TM], out_row[TM];
    float scale[TM];
} tile_smem;

PS_DEVICE bool is_here(const ps_rows &r, uint32_t expert)
{
    return r.w0[expert] != 0 && (r.mode != PS_ROWS_PAIR || r.w1[expert] != 0);
}

/* Which expert the m-th tile of inputs belongs to: tiles are counted over the experts that are
 * here. Every warp searches for itself. False where there are fewer tiles. */
PS_DEVICE bool find_expert_tile(
    const ps_rows &r, uint32_t m, uint32_t *expert, uint32_t *first, uint32_t *valid)
{
    const uint32_t lane = threadIdx.x % 32;
    uint32_t before = 0;
    for (uint32_t e0 = 0; e0 < r.n_expert; e0 += 32) {
        const uint32_t e = e0 + lane;
        const bool here = e < r.n_expert && is_here(r, e);
        const uint32_t begin = here ? (uint32_t)r.starts[e] : 0;
        const uint32_t count = here ? (uint32_t)r.starts[e + 1] - begin : 0;
        const uint32_t tiles = (count + TM - 1) / TM;
        uint32_t sum = tiles; /* of this lane and those below */
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const uint32_t below = __shfl_up_sync(PS_FULL_WARP, sum, o);
            if ((int)lane >= o) sum += below;
        }
        const uint32_t found = __ballot_sync(PS_FULL_WARP, before + sum > m);
        if (found != 0) {
            const int owner = __ffs((int)found) - 1;
            const uint32_t skip = (m - before - (sum - tiles)) * TM; /* meaningful in the owner */
            *expert = e0 + owner;
            *first = __shfl_sync(PS_FULL_WARP, begin + skip, owner);
            *valid = __shfl_sync(PS_FULL_WARP, count - skip, owner);
            if (*valid > TM) *valid = TM;
            return true;
        }
        before += __shfl_sync(PS_FULL_WARP, sum, 31);
    }
    return false;
}

/* Fills `s` for the m-th tile of inputs; a barrier must follow. False: there is none. */
PS_DEVICE bool locate_tile(const ps_gemm_params &p, uint32_t m, tile_rows *t, tile_smem *s)
{
    const ps_rows &r = p.rows;
    const uint32_t tid = threadIdx.x;
    const bool plain = r.mode == PS_ROWS_PARTS;
    uint32_t first = m * TM;
    uint64_t w0 = 0, w1 = 0;
    uint32_t n_rows = r.n_rows;
    t->expert = t->part = 0;
    t->n0 = blockIdx.x * (r.mode == PS_ROWS_PAIR ? TN / 2 : TN);
    t->valid = TM;
    if (plain) {
        if (p.n_tok - first < TM) t->valid = p.n_tok - first;
        t->part = (r.n_parts > 1 && blockIdx.x >= r.part[1].first) +
                  (r.n_parts > 2 && blockIdx.x >= r.part[2].first);
        t->n0 = (blockIdx.x - r.part[t->part].first) * TN;
        w0 = (uint64_t)r.part[t->part].w;
        n_rows = r.part[t->part].n_rows;
    } else {
        if (!find_expert_tile(r, m, &t->expert, &first, &t->valid)) return false;
        w0 = r.w0[t->expert];
        w1 = r.mode == PS_ROWS_PAIR ? r.w1[t->expert] : w0;
    }
    if (tid < TM) {
        const bool in = tid < t->valid;
        const uint32_t row = !in ? 0 : plain ? first + tid : (uint32_t)r.order[first + tid];
        const uint32_t x_row = plain ? row : row / r.x_div;
        s->out_row[tid] = row;
        s->x_row[tid] = x_row;
        s->scale[tid] = in ? p.scale[x_row] : 0.0f;
    } else if (tid < TM + TN) {
        const uint32_t n = tid - TM;
        const bool pair = r.mode == PS_ROWS_PAIR;
        const uint32_t row = t->n0 + (pair ? n / 16 * 8 + n % 8 : n);
        const uint64_t w = pair && n / 8 % 2 ? w1 : w0;
        s->w[n] = row < n_rows ? (const uint8_t *)w + row * p.row_bytes : NULL;
    }
    return true;
}

/* ---- loads ---- */

/* 64 columns of the tile's inputs. A thread copies one 16-byte chunk of four rows. */
PS_DEVICE void load_inputs(
    const ps_gemm_params &p, const tile_smem *s, uint32_t valid, uint16_t *a, uint32_t step)
{
    const uint32_t chunk = threadIdx.x % 8 * 8;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = threadIdx.x / 8 + 32 * i;
        if (row < valid)
            ps_copy16(a + row * PITCH + chunk,
                p.x16 + (uint64_t)s->x_row[row] * p.ldx16 + step * TK + chunk, 16);
    }
}

/* 64 columns of 16-bit weights; zeros past the last row and column. */
PS_DEVICE void load_weights(const ps_gemm_params &p, const tile_smem *s, uint16_t *b, uint32_t step)
{
    const uint32_t chunk = threadIdx.x % 8 * 8, column = step * TK + chunk;
    const uint32_t left = column < p.n_cols ? p.n_cols - column : 0, n = left < 8 ? left : 8;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t row = threadIdx.x / 8 + 32 * i;
        const uint16_t *w = (const uint16_t *)s->w[row];
        uint16_t *to = b + row * PITCH + chunk;
        if (p.w_aligned && w != NULL && n > 0) {
            ps_copy16(to, w + column, n * 2);
        } else {
            for (uint32_t c = 0; c < 8; c++)
                to[c] = w != NULL && c < n ? w[column + c] : (uint16_t)0;
        }
    }
}

/* 256 columns of blocks of all rows, as they are. */
template <int F>
PS_DEVICE void load_raw(const ps_gemm_params &p, const tile_smem *s, uint8_t *raw, uint32_t stage)
{
    constexpr uint32_t BYTES = raw_bytes<F>(), CHUNKS = (BYTES + 15 + 15) / 16;
    const uint64_t from = (uint64_t)stage * BYTES;
    const uint32_t n = p.row_bytes - from < BYTES ? (uint32_t)(p.row_bytes - from) : BYTES;
    for (uint32_t i = threadIdx.x; i < TN * CHUNKS; i += THREADS) {
        const uint32_t row = i / CHUNKS, at = i % CHUNKS * 16;
        const uint8_t *w = s->w[row];
        if (w == NULL) continue;
        w += from;
        const uint32_t phase = (uint32_t)((uintptr_t)w & 15), n_bytes = phase + n;
        if (at < n_bytes)
            ps_copy16(raw + row * raw_pitch<F>() + at, w - phase + at,
                n_bytes - at < 16 ? n_bytes - at : 16);
    }
}

/* 64 columns of raw blocks to 16 bits. A thread takes 16 weights of one row. */
template <int F>
PS_DEVICE void unpack_tile(
    const ps_gemm_params &p, const tile_smem *s, const uint8_t *raw, uint16_t *b, uint32_t step)
{
    constexpr uint32_t GROUPS = ps_block_elems<F>() / 16;
    const uint32_t row = threadIdx.x / 4, unit = threadIdx.x % 4, stage = step / RAW_STEPS;
    const uint32_t group = step % RAW_STEPS * 4 + unit;
    const uint8_t *w = s->w[row];
    uint32_t v[8] = {};
    if (w != NULL && step * TK + unit * 16 < p.n_cols) {
        const uint32_t phase = (uint32_t)((uintptr_t)(w + (uint64_t)stage * raw_bytes<F>()) & 15);
        const uint8_t *block =
            raw + row * raw_pitch<F>() + phase + group / GROUPS * ps_block_bytes<F>();
        ps_weights_16bit<F>(ps_unpack16<F, PS_SMEM>(block, group % GROUPS), v);
    }
    uint4 *to = (uint4 *)(b + row * PITCH + unit * 16);
    to[0] = make_uint4(v[0], v[1], v[2], v[3]);
    to[1] = make_uint4(v[4], v[5], v[6], v[7]);
}

/* ---- products ---- */

template <int F> PS_DEVICE void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    if constexpr (F == PS_FMT_BF16 || F == PS_FMT_MXFP4)
        ps_mma_bf16(c, a, b0, b1);
    else
        ps_mma_f16(c, a, b0, b1);
}

/* One step of the warp's 2 x 4 tiles of 16 x 8: input groups wm and wm + 4, weight rows 32 wn .. 32
 * wn + 31. */
template <int F>
PS_DEVICE void multiply(const uint16_t *a, const uint16_t *b, uint32_t valid, float (&sum)[2][4][4])
{
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
    /* Rows that this lane names to ldmatrix: inputs as (rows 0-7, 8-15) x (columns 0-7, 8-15) with
     * columns slow, weights the other way round. */
    const uint16_t *a_row = a + (wm * 16 + lane % 16) * PITCH + lane / 16 * 8;
    const uint16_t *b_row = b + (wn * 32 + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < TK; k += 16) {
        uint32_t w[2][4];
        ps_ldmatrix(w[0], b_row + k);
        ps_ldmatrix(w[1], b_row + 16 * PITCH + k);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if ((wm + 4 * i) * 16 >= valid) continue; /* the same in all lanes */
            uint32_t x[4];
            ps_ldmatrix(x, a_row + i * 64 * PITCH + k);
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma<F>(sum[i][n], x, w[n / 2][n % 2 * 2], w[n / 2][n % 2 * 2 + 1]);
        }
    }
}

/* ---- results ---- */

/* Input row m of the tile, weight rows n and n + 1 of it. */
PS_DEVICE void store_plain(const ps_gemm_params &p, const tile_rows &t, const tile_smem *s,
    uint32_t m, uint32_t n, float v0, float v1)
{
    const ps_rows &r = p.rows;
    const bool plain = r.mode == PS_ROWS_PARTS;
    const ps_rows_part &part = r.part[t.part];
    const uint32_t row = t.n0 + n, n_rows = plain ? part.n_rows : r.n_rows;
    const float *bias = plain             ? part.bias
                        : r.bias0 != NULL ? r.bias0 + (uint64_t)t.expert * n_rows
                                          : NULL;
    float *y = plain ? part.y + (uint64_t)s->out_row[m] * part.ldy
                     : r.out + (uint64_t)s->out_row[m] * n_rows;
    v0 *= s->scale[m];
    v1 *= s->scale[m];
    if (row < n_rows) {
        if (bias != NULL) v0 += bias[row];
        y[row] = r.add ? y[row] + v0 : v0;
    }
    if (row + 1 < n_rows) {
        if (bias != NULL) v1 += bias[row + 1];
        y[row + 1] = r.add ? y[row + 1] + v1 : v1;
    }
}

/* Input row m of the tile, gate and up of row f. */
PS_DEVICE void store_pair(const ps_gemm_params &p, const tile_rows &t, const tile_smem *s,
    uint32_t m, uint32_t f, float gate, float up)
{
    const ps_rows &r = p.rows;
    if (f >= r.n_rows) return;
    const uint64_t b = (uint64_t)t.expert * r.n_rows + f;
    gate *= s->scale[m];
    up *= s->scale[m];
    if (r.bias0 != NULL) gate += r.bias0[b];
    if (r.bias1 != NULL) up += r.bias1[b];
    r.out[(uint64_t)s->out_row[m] * r.n_rows + f] = ps_activate(r.act, gate, up);
}

PS_DEVICE void store_tile(
    const ps_gemm_params &p, const tile_rows &t, const tile_smem *s, const float (&sum)[2][4][4])
{
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t m = (wm + 4 * i) * 16 + h * 8 + lane / 4, c = lane % 4 * 2;
            if (m >= t.valid) continue;
            if (p.rows.mode == PS_ROWS_PAIR) {
#pragma unroll
                for (int n = 0; n < 4; n += 2)
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        store_pair(p, t, s, m, t.n0 + (wn * 2 + n / 2) * 8 + c + k,
                            sum[i][n][2 * h + k], sum[i][n + 1][2 * h + k]);
            } else {
#pragma unroll
                for (int n = 0; n < 4; n++)
                    store_plain(
                        p, t, s, m, wn * 32 + n * 8 + c, sum[i][n][2 * h], sum[i][n][2 * h + 1]);
            }
        }
}

/* All columns of a tile that has been located; leaves no copy under way. */
template <int F>
PS_DEVICE void make_tile(
    const ps_gemm_params &p, const tile_rows &t, const tile_smem &s, uint8_t *smem)
{
    uint16_t *a = (uint16_t *)smem, *b = a + p.a_stages * A_ELEMS;
    uint8_t *raw = (uint8_t *)(b + 2 * B_ELEMS); /* only with blocks */
    const uint32_t n_steps = (p.n_cols + TK - 1) / TK, ahead = p.a_stages - 1;
    float sum[2][4][4] = {};

    /* Group g of copies: inputs of step g, and what step g needs besides: 16-bit weights of step g,
     * or the raw blocks whose unpacking begins in step g. Past the end groups are empty, so that
     * waits can count. */
    if constexpr (is_raw<F>()) load_raw<F>(p, &s, raw, 0);
#define LOAD_GROUP(g)                                                                              \
    do {                                                                                           \
        const uint32_t group = (g);                                                                \
        if (group < n_steps) {                                                                     \
            load_inputs(p, &s, t.valid, a + group % p.a_stages * A_ELEMS, group);                  \
            if constexpr (!is_raw<F>())                                                            \
                load_weights(p, &s, b + group % p.a_stages * B_ELEMS, group);                      \
            if constexpr (is_raw<F>()) {                                                           \
                const uint32_t stage = (group + 1) / RAW_STEPS;                                    \
                if ((group + 1) % RAW_STEPS == 0 && group + 1 < n_steps)                           \
                    load_raw<F>(p, &s, raw + stage % 2 * (TN * raw_pitch<F>()), stage);            \
            }                                                                                      \
        }                                                                                          \
        ps_copy_commit();                                                                          \
    } while (0)
#define WAIT_GROUP()                                                                               \
    do {                                                                                           \
        if (ahead == 2)                                                                            \
            ps_copy_wait<1>();                                                                     \
        else                                                                                       \
            ps_copy_wait<0>();                                                                     \
        __syncthreads();                                                                           \
    } while (0)
    for (uint32_t g = 0; g < ahead; g++) LOAD_GROUP(g);
    if constexpr (is_raw<F>()) {
        WAIT_GROUP();
        unpack_tile<F>(p, &s, raw, b, 0);
    }
    for (uint32_t k = 0; k < n_steps; k++) {
        WAIT_GROUP(); /* group k is there; step k - 1 is done everywhere, and with it the tiles that
                         are refilled below */
        LOAD_GROUP(k + ahead);
        if constexpr (is_raw<F>()) {
            if (k + 1 < n_steps)
                unpack_tile<F>(p, &s, raw + (k + 1) / RAW_STEPS % 2 * (TN * raw_pitch<F>()),
                    b + (k + 1) % 2 * B_ELEMS, k + 1);
        }
        multiply<F>(a + k % p.a_stages * A_ELEMS, b + k % (is_raw<F>() ? 2 : p.a_stages) * B_ELEMS,
            t.valid, sum);
    }
#undef LOAD_GROUP
#undef WAIT_GROUP
    store_tile(p, t, &s, sum);
}

/* Grid: x over tiles of weight rows, y over tiles of inputs in strides. Shared memory: a_stages
 * tiles of inputs; 2 tiles of weights (a_stages for 16-bit ones); 2 stages of raw blocks. */
template <int F>
__global__ void __launch_bounds__(THREADS, 2) k_gemm(const __grid_constant__ ps_gemm_params p)
{
    PS_DYNAMIC_SMEM(smem);
    __shared__ tile_smem s;
    ps_dep_wait();
    tile_rows t;
    for (uint32_t m = blockIdx.y; m < p.m_tiles && locate_tile(p, m, &t, &s); m += gridDim.y) {
        __syncthreads();
        make_tile<F>(p, t, s, smem);
        __syncthreads(); /* nobody reads what the next tile overwrites */
    }
}

/* ---- the table ---- */

typedef struct gemm_kernel {
    uint32_t fmt, raw_pitch;
    const void *kernel;
} gemm_kernel;

#define ROW(F)                                                                                     \
    {                                                                                              \
        F, (uint32_t)raw_pitch<F>(), (const void *)k_gemm<F>                                       \
    }
static const gemm_kernel table[] = {
    ROW(PS_FMT_F16),
    ROW(PS_FMT_BF16),
    ROW(PS_FMT_Q4_0),
    ROW(PS_FMT_Q4_1),
    ROW(PS_FMT_Q5_0),
    ROW(PS_FMT_Q5_1),
    ROW(PS_FMT_Q8_0),
    ROW(PS_FMT_Q2_K),
    ROW(PS_FMT_Q3_K),
    ROW(PS_FMT_Q4_K),
    ROW(PS_FMT_Q5_K),
    ROW(PS_FMT_Q6_K),
    ROW(PS_FMT_IQ4_NL),
    ROW(PS_FMT_IQ4_XS),
    ROW(PS_FMT_MXFP4),
};
#undef ROW

static const gemm_kernel *gemm_of(uint32_t fmt)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].fmt == fmt) return &table[i];
    return NULL;
}

static uint64_t gemm_smem_bytes(const gemm_kernel *g, uint32_t a_stages)
{
    const uint64_t b_tiles = g->raw_pitch > 0 ? 2 : a_stages;
    return a_stages * A_ELEMS * 2ull + b_tiles * B_ELEMS * 2 + 2ull * TN * g->raw_pitch;
}

/* Tiles of inputs to launch blocks for, of at most as many as there can be: of the experts that are
 * here a half more than an even share, and one each that is not full. */
static uint32_t expert_tiles(const ps_rows *r, uint32_t most)
{
    if (r->n_here == 0 || r->n_here >= r->n_expert) return most;
    const uint64_t even = ps_div_up((uint64_t)r->n_assign * r->n_here, (uint64_t)r->n_expert * TM);
    const uint64_t wanted = even + even / 2 + r->n_here;
    return wanted < most ? (uint32_t)wanted : most;
}

ps_status ps_cuda_gemm(const ps_launch *launch, uint32_t fmt, ps_gemm_params *p)
{
    const gemm_kernel *g = gemm_of(fmt);
    if (g == NULL || !ps_fmt_row_bytes(fmt, p->n_cols, &p->row_bytes)) return PS_EINTERNAL;
    const uint64_t smem_limit = ps_cuda_smem_bytes(launch->info->sm) - sizeof(tile_smem) - 64;
    p->a_stages = gemm_smem_bytes(g, 3) <= smem_limit ? 3 : 2;
    const uint64_t smem_bytes = gemm_smem_bytes(g, p->a_stages);
    if (smem_bytes > smem_limit) return PS_EINTERNAL;
    ps_rows *r = &p->rows;
    p->w_aligned = p->row_bytes % 16 == 0;
    uint32_t n_tiles = ps_div_up(r->n_rows, r->mode == PS_ROWS_PAIR ? TN / 2 : TN), launched;
    if (r->mode == PS_ROWS_PARTS) {
        n_tiles = 0;
        for (uint32_t i = 0; i < r->n_parts; i++) {
            r->part[i].first = n_tiles;
            n_tiles += ps_div_up(r->part[i].n_rows, TN);
            p->w_aligned = p->w_aligned && (uintptr_t)r->part[i].w % 16 == 0;
        }
        launched = p->m_tiles = ps_div_up(p->n_tok, TM);
    } else { /* every expert may end in a tile that is not full */
        p->m_tiles = r->n_assign / TM + (r->n_expert < r->n_assign ? r->n_expert : r->n_assign);
        launched = expert_tiles(r, p->m_tiles);
    }
    if (launched > 65535) return PS_EINTERNAL; /* 8 million inputs in a call */
    return ps_cuda_launch(launch, g->kernel, dim3(n_tiles, launched), THREADS, smem_bytes, p);
}
