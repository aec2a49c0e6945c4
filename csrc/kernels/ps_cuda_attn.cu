/* ps_cuda_attn - attention over the paged cache: tiles of queries in prefill, split keys in decode;
 * both on the tensor cores with F16 products, float32 sums and the mask inside.
 *
 * Not here: merging parts that were computed on different sides (ps_cuda_elem.cu).
 * Threads: the launcher on the engine's thread.
 *
 * Query heads that share a KV head are rows of one tile, so that keys and values are read once for
 * all of them. A row is scaled by a power of two before it is rounded to F16. Softmax runs over
 * base 2 (scores carry log2 e), keys ascending.
 * - Prefill: a block takes 64 or 128 rows = so many / (heads a KV head) tokens of one KV head, four
 * warps of 16 or 32 rows; keys and values stream through double-buffered tiles; tiles beyond the
 * mask are not loaded. Tokens of a tile belong to one sequence; tiles where they do not are left to
 * the other kernel.
 * - Decode: a block takes one token, one KV head, up to 16 of its query heads and one share of the
 * keys; each of its four warps streams its own tiles; results are joined in the order of warps,
 * then (k_attn_join) of shares.
 *
 * Floors: decode reads 2 * keys * KV heads * head_dim * 2 bytes (Qwen3-30B-A3B at 1K: 2 MB a layer,
 * 0.5 us: latency rules); prefill 4 * queries * keys / 2 * heads * head_dim / 600 TFLOP/s, of which
 * an H200 reaches 290 behind 16K tokens, 220 behind 4K and 110 behind 1K (head_dim 128): mma.sync,
 * not wgmma.
 */
#include "kernels/ps_cuda_attn.cuh"
#include "kernels/ps_cuda_ops.h"

/* What turns a row's sums into its output, sink included; (max, sum) of the row to `ml` where
 * asked. */
PS_DEVICE float finish_row(
    const attn_params &p, uint64_t t, uint32_t h, float max, float sum, bool write_ml)
{
    float shrink = 1.0f;
    if (p.a.sinks.a != 0) {
        const float sink = ((const float *)p.a.sinks.a)[h] * LOG2_E, top = fmaxf(max, sink);
        shrink = exp2f(max - top);
        sum = sum * shrink + exp2f(sink - top);
        max = top;
    }
    if (write_ml && p.a.ml.a != 0) {
        float *ml = (float *)p.a.ml.a + (t * p.a.n_head + h) * 2;
        ml[0] = max * LN_2;
        ml[1] = sum;
    }
    return sum > 0.0f ? shrink / sum : 0.0f;
}

/* Whether the tokens of the tile that begins at t0 belong to different sequences. Collective. */
PS_DEVICE bool is_mixed(const attn_params &p, uint32_t t0)
{
    const int32_t *seq = (const int32_t *)p.a.seq.a;
    bool other = false;
    for (uint32_t i = threadIdx.x % 32; i < p.tile_tok && t0 + i < p.a.n_tok; i += 32)
        other |= seq[t0 + i] != seq[t0];
    return __any_sync(PS_FULL_WARP, other);
}

/* ---- prefill. Grid: x tiles of tokens (last ones first: they have most keys), y KV heads, z tiles
 * of a big group. Shared memory: n_buffers x (keys, values), then queries. ---- */

typedef struct span { /* positions of some tokens; high -1: there are none */
    int32_t low, high;
} span;

PS_DEVICE span span_of_warp(span s)
{
    return {warp_min(s.low), warp_max(s.high)};
}

/* Of the block's tokens. Collective. */
PS_DEVICE span span_of_block(const attn_params &p, uint32_t t0)
{
    const int32_t *pos = (const int32_t *)p.a.pos.a;
    span s = {INT32_MAX, -1};
    for (uint32_t i = threadIdx.x % 32; i < p.tile_tok && t0 + i < p.a.n_tok; i += 32)
        s = {smaller(s.low, pos[t0 + i]), larger(s.high, pos[t0 + i])};
    return span_of_warp(s);
}

typedef struct row_origin { /* of a row of the block */
    uint32_t token, head;
    bool in; /* there is such a row */
} row_origin;

/* Row r of this lane: of tile r / 2 of its warp, lane / 4 or 8 more. */
template <int D>
PS_DEVICE row_origin origin_of(const attn_params &p, uint32_t t0, uint32_t h0, uint32_t r)
{
    const uint32_t n = prefill_rows<D>(), left = p.group - h0, heads = left < n ? left : n,
                   lane = threadIdx.x % 32,
                   row = threadIdx.x / 32 * 16 * prefill_tiles<D>() + r * 8 + lane / 4,
                   t = t0 + row / heads;
    return {t, blockIdx.y * p.group + h0 + row % heads, row / heads < p.tile_tok && t < p.a.n_tok};
}

/* The warp's queries into shared memory; the span of their tokens. Collective. */
template <int D, int M>
PS_DEVICE span take_queries(
    const attn_params &p, uint32_t t0, uint32_t h0, uint16_t *q_tile, query_rows<M> *rows)
{
    span s = {INT32_MAX, -1};
#pragma unroll
    for (uint32_t m = 0; m < M; m++) {
        const float *from[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            const row_origin o = origin_of<D>(p, t0, h0, 2 * m + i);
            const int32_t pos = o.in ? ((const int32_t *)p.a.pos.a)[o.token] : -1;
            rows->pos[2 * m + i] = pos;
            from[i] =
                o.in ? (const float *)p.a.q.a + (uint64_t)o.token * p.a.ldq + (uint64_t)o.head * D
                     : NULL;
            if (o.in) s = {smaller(s.low, pos), larger(s.high, pos)};
        }
        uint32_t q[D / 16][4];
        load_queries<D, M>(p, from, m, q, rows);
        park_queries<D>(q_tile + m * 16 * pitch<D>(), q);
    }
    __syncwarp();
    return span_of_warp(s);
}

template <int D, int M>
PS_DEVICE void write_rows(const attn_params &p, uint32_t t0, uint32_t h0, const query_rows<M> *rows,
    const float (&out)[M][D / 8][4])
{
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t r = 0; r < 2 * M; r++) {
        if (rows->pos[r] < 0) continue;
        const row_origin o = origin_of<D>(p, t0, h0, r);
        const float scale =
            finish_row(p, o.token, o.head, rows->max[r], rows->sum[r], lane % 4 == 0);
        float *y =
            (float *)p.a.out.a + (uint64_t)o.token * p.a.ldo + (uint64_t)o.head * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            y[n * 8] = out[r / 2][n][r % 2 * 2] * scale;
            y[n * 8 + 1] = out[r / 2][n][r % 2 * 2 + 1] * scale;
        }
    }
}

template <int D>
__global__ void __launch_bounds__(ATTN_WARPS * 32, 2)
    k_attn_prefill(const __grid_constant__ attn_params p)
{
    constexpr int KEYS = prefill_keys<D>(), TILE = 2 * KEYS * pitch<D>(), M = prefill_tiles<D>();
    PS_DYNAMIC_SMEM(smem);
    ps_dep_wait();
    const uint32_t kv_head = blockIdx.y, t0 = (gridDim.x - 1 - blockIdx.x) * p.tile_tok,
                   h0 = blockIdx.z * prefill_rows<D>();
    if (p.a.kv.n_seq > 1 && is_mixed(p, t0)) return;
    const uint32_t seq = (uint32_t)((const int32_t *)p.a.seq.a)[t0];
    const int32_t window = window_of(p);
    const span block = span_of_block(p, t0);
    const uint32_t end = (uint32_t)block.high + 1;
    const uint32_t begin =
        block.low >= window ? (uint32_t)(block.low - window + 1) / KEYS * KEYS : 0;

    uint16_t *tiles = (uint16_t *)smem,
             *q_tile = tiles + p.n_buffers * TILE + threadIdx.x / 32 * 16 * M * pitch<D>();
    int32_t page = p.by_page && begin < end ? page_of(p, seq, begin) : 0, page_ahead = 0;
    if (begin < end) load_tile<D, KEYS>(p, tiles, seq, kv_head, begin, end, page);
    query_rows<M> rows;
    const span warp = take_queries<D, M>(p, t0, h0, q_tile, &rows);
    float out[M][D / 8][4] = {};
    uint32_t buffer = 0;
    for (uint32_t first = begin; first < end; first += KEYS) {
        const uint32_t ahead = first + KEYS;
        if (p.by_page && ahead < end) page_ahead = page_of(p, seq, ahead);
        ps_copy_wait<0>();
        __syncthreads(); /* the tile is there for all, and nobody reads the one before any more */
        const uint16_t *tile = tiles + buffer * TILE;
        if (p.n_buffers == 2 && ahead < end) {
            buffer ^= 1;
            load_tile<D, KEYS>(p, tiles + buffer * TILE, seq, kv_head, ahead, end, page_ahead);
        }
        const bool some = (int32_t)first <= warp.high &&
                          (warp.low < window || (int32_t)(first + KEYS - 1) > warp.low - window);
        if (some) { /* the same in all lanes */
            const uint64_t present = p.by_page ? page_keys<KEYS>(page, first, end)
                                               : present_keys<KEYS>(p, seq, first, end);
            const bool open = present == page_keys<KEYS>(0, 0, KEYS) &&
                              (int32_t)(first + KEYS - 1) <= warp.low &&
                              warp.high - (int32_t)first < window;
            attend_tile<D, KEYS, M, true>(p, tile, NULL, q_tile, first, present, open, &rows, out);
        }
        if (p.n_buffers == 1 && ahead < end) {
            __syncthreads();
            load_tile<D, KEYS>(p, tiles, seq, kv_head, ahead, end, page_ahead);
        }
        page = page_ahead;
    }
    join_sums(&rows);
    write_rows<D, M>(p, t0, h0, &rows, out);
}

/* ---- decode. Grid: x shares of keys, y KV heads x tiles of 16 query heads, z tokens.
 * Shared memory: per warp keys and values, later the warp's sums; then queries where they live
 * there. ---- */

/* The warps' sums, each laid where its keys were, to outputs or to a share's part, in the order of
 * warps. Collective. */
template <int D>
PS_DEVICE void join_warps(const attn_params &p, float *sums, const query_rows<1> &rows,
    const float (&out)[1][D / 8][4], uint32_t t, uint32_t head0, uint32_t heads, uint32_t split)
{
    constexpr uint32_t EACH = decode_keys<D>() * pitch<D>(); /* keys and values: as many floats */
    const uint32_t lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    float *mine = sums + threadIdx.x / 32 * EACH;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t r = lane / 4 + i * 8;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(mine + r * D + n * 8 + lane % 4 * 2) =
                make_float2(out[0][n][2 * i], out[0][n][2 * i + 1]);
        if (lane % 4 == 0) mine[16 * D + r] = rows.max[i], mine[16 * D + 16 + r] = rows.sum[i];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < heads * D; i += blockDim.x) {
        const uint32_t r = i / D, d = i % D, h = head0 + r;
        float max = -INFINITY, sum = 0.0f, value = 0.0f;
        for (uint32_t w = 0; w < n_warps; w++) max = fmaxf(max, sums[w * EACH + 16 * D + r]);
        const float base = max == -INFINITY ? 0.0f : max;
        for (uint32_t w = 0; w < n_warps; w++) {
            const float *theirs = sums + w * EACH;
            const float weight = exp2f(theirs[16 * D + r] - base);
            sum = fmaf(theirs[16 * D + 16 + r], weight, sum);
            value = fmaf(theirs[r * D + d], weight, value);
        }
        if (p.splits == 1) {
            ((float *)p.a.out.a)[(uint64_t)t * p.a.ldo + (uint64_t)h * D + d] =
                value * finish_row(p, t, h, max, sum, d == 0);
            continue;
        }
        const uint64_t at = ((uint64_t)t * p.a.n_head + h) * p.splits + split;
        p.part[at * D + d] = value;
        if (d == 0) p.part_ml[2 * at] = max, p.part_ml[2 * at + 1] = sum;
    }
}

template <int D>
__global__ void __launch_bounds__(ATTN_WARPS * 32)
    k_attn_decode(const __grid_constant__ attn_params p)
{
    constexpr int KEYS = decode_keys<D>(), TILE = KEYS * pitch<D>();
    PS_DYNAMIC_SMEM(smem);
    ps_dep_wait();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    const uint32_t t = p.first_tok + blockIdx.z;
    const uint32_t kv_head = blockIdx.y / p.group_tiles, h0 = blockIdx.y % p.group_tiles * 16,
                   split = blockIdx.x;
    const uint32_t heads = p.group - h0 < 16 ? p.group - h0 : 16, head0 = kv_head * p.group + h0;
    if (p.only_mixed && !is_mixed(p, t / p.tile_tok * p.tile_tok)) return;
    const uint32_t seq = (uint32_t)((const int32_t *)p.a.seq.a)[t],
                   pos = (uint32_t)((const int32_t *)p.a.pos.a)[t];

    /* This share of the keys: by the length in hand, in whole rounds of the block's warps. */
    const uint32_t oldest = p.a.window > 0 && pos >= p.a.window ? pos - p.a.window + 1 : 0,
                   round = n_warps * KEYS;
    const uint32_t share =
        ((pos + 1 - oldest + p.splits - 1) / p.splits + round - 1) / round * round;
    const uint64_t begin = oldest + (uint64_t)split * share;
    const uint32_t end = (uint32_t)(begin + share < pos + 1 ? begin + share : pos + 1);
    if (begin >= end) { /* a sum of -1 says so */
        if (threadIdx.x < heads)
            p.part_ml[(((uint64_t)t * p.a.n_head + head0 + threadIdx.x) * p.splits + split) * 2 +
                      1] = -1.0f;
        return;
    }

    query_rows<1> rows;
    const float *from[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t r = lane / 4 + i * 8;
        rows.pos[i] = r < heads ? (int32_t)pos : -1;
        from[i] = r < heads
                      ? (const float *)p.a.q.a + (uint64_t)t * p.a.ldq + (uint64_t)(head0 + r) * D
                      : NULL;
    }
    uint16_t *keys = (uint16_t *)smem + warp * 2 * TILE,
             *q_tile = (uint16_t *)smem + n_warps * 2 * TILE;
    uint32_t q[D / 16][4];
    load_queries<D, 1>(p, from, 0, q, &rows);
    if constexpr (q_in_smem<D>()) {
        if (warp == 0) park_queries<D>(q_tile, q);
        __syncthreads();
    }
    float out[1][D / 8][4] = {};
    for (uint32_t first = (uint32_t)begin + warp * KEYS; first < end; first += round) {
        load_side<D, KEYS, PS_THROUGH_L1>(p, p.a.kv.k, keys, seq, kv_head, first, end, lane, 32);
        load_side<D, KEYS, PS_THROUGH_L1>(
            p, p.a.kv.v, keys + TILE, seq, kv_head, first, end, lane, 32);
        ps_copy_commit();
        const uint64_t present = present_keys<KEYS>(p, seq, first, end);
        ps_copy_wait<0>();
        __syncwarp();
        attend_tile<D, KEYS, 1, q_in_smem<D>()>(
            p, keys, q, q_tile, first, present, false, &rows, out);
        __syncwarp(); /* before the tile is overwritten */
    }
    join_sums(&rows);
    join_warps<D>(p, (float *)smem, rows, out, t, head0, heads, split);
}

/* Joins the shares, in order. A warp takes one head of one token; up to 32 shares. */
static __global__ void __launch_bounds__(128) k_attn_join(const __grid_constant__ attn_params p)
{
    __shared__ float weights[4][32];
    ps_dep_wait();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.a.kv.head_dim;
    const uint64_t row = (uint64_t)blockIdx.x * 4 + warp, t = row / p.a.n_head;
    const uint32_t h = (uint32_t)(row % p.a.n_head);
    if (t >= p.a.n_tok) return;
    const float *ml = p.part_ml + row * p.splits * 2;
    float sum = lane < p.splits ? ml[2 * lane + 1] : -1.0f;
    const uint32_t n =
        __popc(__ballot_sync(PS_FULL_WARP, sum >= 0.0f)); /* shares in use come first */
    const float own = lane < n ? ml[2 * lane] : -INFINITY, max = ps_warp_max(own);
    const float weight = own == -INFINITY ? 0.0f : exp2f(own - max);
    weights[warp][lane] = weight;
    sum = ps_warp_sum(lane < n ? sum * weight : 0.0f);
    __syncwarp();
    const float scale = finish_row(p, t, h, max, sum, lane == 0);
    const float *part = p.part + row * p.splits * d;
    float *y = (float *)p.a.out.a + t * p.a.ldo + (uint64_t)h * d;
    for (uint32_t c = lane; c < d; c += 32) {
        float value = 0.0f;
#pragma unroll 8
        for (uint32_t s = 0; s < n; s++)
            value = fmaf(part[(uint64_t)s * d + c], weights[warp][s], value);
        y[c] = value * scale;
    }
}

/* ---- the table ---- */

typedef struct attn_kernels {
    uint32_t head_dim;
    const void *prefill, *decode;
    uint32_t prefill_rows, prefill_keys;
    uint32_t prefill_buffer, prefill_q; /* bytes of keys and values, and of queries */
    uint32_t decode_warp, decode_q;
} attn_kernels;

#define ROW(D)                                                                                     \
    {                                                                                              \
        D, (const void *)k_attn_prefill<D>, (const void *)k_attn_decode<D>, prefill_rows<D>(),     \
            prefill_keys<D>(), 2 * prefill_keys<D>() * pitch<D>() * 2,                             \
            prefill_rows<D>() * pitch<D>() * 2, 2 * decode_keys<D>() * pitch<D>() * 2,             \
            q_in_smem<D>() ? 16 * pitch<D>() * 2 : 0                                               \
    }
static const attn_kernels table[] = {ROW(32), ROW(64), ROW(80), ROW(96), ROW(128), ROW(256)};
#undef ROW

static const attn_kernels *kernels_of(uint32_t head_dim)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].head_dim == head_dim) return &table[i];
    return NULL;
}

static ps_status launch_decode(const ps_launch *launch, const attn_kernels *k, attn_params *p)
{
    const uint64_t smem_limit = ps_cuda_smem_bytes(launch->info->sm);
    const uint32_t warps = 4ull * k->decode_warp + k->decode_q <= smem_limit ? 4 : 2;
    const uint64_t smem_bytes = (uint64_t)warps * k->decode_warp + k->decode_q;
    p->group_tiles = ps_div_up(p->group, 16);
    for (p->first_tok = 0; p->first_tok < p->a.n_tok;
         p->first_tok += 65535) { /* the grid's limit in z */
        const uint32_t left = p->a.n_tok - p->first_tok;
        const dim3 grid(p->splits, p->a.kv.n_kv_head * p->group_tiles, left < 65535 ? left : 65535);
        const ps_status status = ps_cuda_launch(launch, k->decode, grid, warps * 32, smem_bytes, p);
        if (status != PS_OK) return status;
    }
    return PS_OK;
}

static ps_status attn_decode(const ps_launch *launch, const attn_kernels *k, attn_params *p)
{
    const ps_cuda_attn_layout l = ps_cuda_attn_plan(&p->a);
    p->splits = ps_cuda_attn_splits(&p->a);
    if (p->a.ws_bytes < l.total) return PS_EINTERNAL;
    p->part = ps_ptr<float>(p->a.ws);
    p->part_ml = ps_ptr<float>(ps_dptr_add(p->a.ws, l.ml));
    const ps_status status = launch_decode(launch, k, p);
    if (status != PS_OK || p->splits == 1) return status;
    const dim3 grid(ps_div_up((uint64_t)p->a.n_tok * p->a.n_head, 4));
    return ps_cuda_launch(launch, (const void *)k_attn_join, grid, 128, 0, p);
}

ps_status ps_cuda_attn(const ps_launch *launch, const void *args)
{
    attn_params p = {};
    p.a = *(const ps_attn_args *)args;
    const ps_attn_args *a = &p.a;
    const ps_status status = ps_op_check(PS_OP_ATTN, a, NULL);
    if (status != PS_OK) return status;
    const attn_kernels *k = kernels_of(a->kv.head_dim);
    const uint32_t page_tok = a->kv.page_tok;
    if (k == NULL || (page_tok & (page_tok - 1)) != 0) return PS_EUNSUPPORTED;
    while (page_tok >> p.page_shift > 1) p.page_shift++;
    if (!ps_fmt_row_bytes(a->kv.fmt, a->kv.head_dim, &p.row_bytes)) return PS_EINTERNAL;
    p.group = a->n_head / a->kv.n_kv_head;
    p.splits = 1;
    p.tile_tok = p.group < k->prefill_rows ? k->prefill_rows / p.group : 1;
    p.by_page = a->kv.fmt == PS_FMT_F16 && page_tok >= k->prefill_keys;
    const uint64_t smem_limit = ps_cuda_smem_bytes(launch->info->sm);
    p.n_buffers = 2ull * k->prefill_buffer + k->prefill_q <= smem_limit ? 2 : 1;
    const uint64_t smem_bytes = (uint64_t)p.n_buffers * k->prefill_buffer + k->prefill_q;
    if (a->n_tok <= PS_CUDA_DECODE_TOK || smem_bytes > smem_limit)
        return attn_decode(launch, k, &p);
    const dim3 grid(
        ps_div_up(a->n_tok, p.tile_tok), a->kv.n_kv_head, ps_div_up(p.group, k->prefill_rows));
    const ps_status s = ps_cuda_launch(launch, k->prefill, grid, ATTN_WARPS * 32, smem_bytes, &p);
    if (s != PS_OK || a->kv.n_seq == 1) return s;
    p.only_mixed = 1;
    return launch_decode(launch, k, &p);
}
