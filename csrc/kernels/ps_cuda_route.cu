/* ps_cuda_route - which experts each token takes, and the lists by expert. Deterministic: no
 * atomics, ties go to the lower index, lists ascend.
 *
 * Not here: the experts.
 * Threads: the launcher on the engine's thread.
 *
 * Up to ROUTE_ONE_BLOCK assignments one block does both (decode: one launch, bound by latency,
 * about 4 us); beyond, tokens are spread over the GPU first and one block sorts: 8192 assignments
 * take about 10 us.
 */
#include "kernels/ps_cuda.cuh"
#include "kernels/ps_cuda_ops.h"

enum { ROUTE_ONE_BLOCK = 512, ROUTE_WARPS = 16, ROUTE_TOK_WARPS = 4 };

/* ---- choosing: a warp a token; `logits` is a copy in shared memory that chosen experts leave ----
 */

/* The best remaining expert, the same in every lane. Not a number loses against everything, so that
 * an index in range comes out whatever the logits are. */
PS_DEVICE uint32_t best_expert(const float *logits, const uint8_t *taken, uint32_t n, uint32_t lane)
{
    float best = -INFINITY;
    uint32_t at = 0xffffffffu;
    for (uint32_t e = lane; e < n; e += 32) {
        const float v = logits[e];
        if (!taken[e] && (at == 0xffffffffu || v > best || (best != best && v == v)))
            best = v, at = e;
    }
    for (int o = 16; o > 0; o >>= 1) {
        const float v = __shfl_xor_sync(PS_FULL_WARP, best, o);
        const uint32_t e = __shfl_xor_sync(PS_FULL_WARP, at, o);
        const bool better = v > best || (best != best && v == v),
                   equal = v == best || (v != v && best != best);
        if (e != 0xffffffffu && (at == 0xffffffffu || better || (equal && e < at)))
            best = v, at = e;
    }
    return at;
}

PS_DEVICE void route_token(
    const ps_route_args &a, uint64_t t, float *logits, uint8_t *taken, uint32_t lane)
{
    const float *from = (const float *)a.logits.a + t * a.n_expert;
    int32_t *ids = (int32_t *)a.ids.a + t * a.k;
    float *weights = (float *)a.weights.a + t * a.k, max = -INFINITY, sum = 0.0f, chosen = 0.0f;
    for (uint32_t e = lane; e < a.n_expert; e += 32) {
        logits[e] = from[e];
        taken[e] = 0;
        max = fmaxf(max, logits[e]);
    }
    max = ps_warp_max(max);
    for (uint32_t e = lane; e < a.n_expert; e += 32) sum += expf(logits[e] - max);
    sum = ps_warp_sum(sum);
    __syncwarp();
    for (uint32_t r = 0; r < a.k; r++) {
        const uint32_t e = best_expert(logits, taken, a.n_expert, lane);
        const float p = expf(logits[e] - max);
        chosen += p;
        __syncwarp();
        if (lane == 0) {
            taken[e] = 1;
            ids[r] = (int32_t)e;
            weights[r] = p;
        }
        __syncwarp();
    }
    /* The lane that wrote the weights scales them. */
    for (uint32_t r = 0; lane == 0 && r < a.k; r++)
        weights[r] = weights[r] / (a.renorm ? chosen : sum);
}

static size_t token_smem_bytes(uint32_t n_expert)
{
    return (size_t)n_expert * 4 + (n_expert + 15) / 16 * 16;
}

/* Grid: tokens, ROUTE_TOK_WARPS a block. */
static __global__ void k_route_tokens(const __grid_constant__ ps_route_args a)
{
    PS_DYNAMIC_SMEM(smem);
    ps_dep_wait();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t t = (uint64_t)blockIdx.x * ROUTE_TOK_WARPS + warp;
    float *logits = (float *)smem + warp * a.n_expert;
    uint8_t *taken = smem + ROUTE_TOK_WARPS * a.n_expert * 4 + warp * ((a.n_expert + 15) / 16 * 16);
    if (t < a.n_tok) route_token(a, t, logits, taken, lane);
}

/* ---- sorting: a stable counting sort by one block. Each warp owns a run of assignments;
 * counts[w][e] becomes the place of the warp's first assignment of expert e. ---- */

PS_DEVICE void sort_assignments(const ps_route_args &a, uint32_t *counts, uint32_t n_warps)
{
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_threads = n_warps * 32;
    const uint32_t n = a.n_tok * a.k, per_warp = (n + n_threads - 1) / n_threads * 32;
    const uint32_t first = warp * per_warp, end = first + per_warp < n ? first + per_warp : n;
    const int32_t *ids = (const int32_t *)a.ids.a;
    uint32_t *mine = counts + warp * a.n_expert;
    for (uint32_t i = threadIdx.x; i < n_warps * a.n_expert; i += n_threads) counts[i] = 0;
    __syncthreads();
    /* Lanes with the same expert find each other; the first of them counts for all. */
    for (uint32_t i = first; i < end; i += 32) {
        const uint32_t e = i + lane < end ? (uint32_t)ids[i + lane] : 0xffffffffu;
        const uint32_t same = __match_any_sync(PS_FULL_WARP, e);
        if (e != 0xffffffffu && (same & ((1u << lane) - 1)) == 0) mine[e] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    /* Places: experts in order, within one the warps in order. Warp 0 carries the running total. */
    if (warp == 0) {
        uint32_t before = 0;
        for (uint32_t e0 = 0; e0 < a.n_expert; e0 += 32) {
            const uint32_t e = e0 + lane;
            uint32_t total = 0;
            for (uint32_t w = 0; w < n_warps && e < a.n_expert; w++)
                total += counts[w * a.n_expert + e];
            uint32_t sum = total;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                const uint32_t below = __shfl_up_sync(PS_FULL_WARP, sum, o);
                if ((int)lane >= o) sum += below;
            }
            uint32_t place = before + sum - total;
            if (e < a.n_expert) ((int32_t *)a.starts.a)[e] = (int32_t)place;
            for (uint32_t w = 0; w < n_warps && e < a.n_expert; w++) {
                const uint32_t count = counts[w * a.n_expert + e];
                counts[w * a.n_expert + e] = place;
                place += count;
            }
            before += __shfl_sync(PS_FULL_WARP, sum, 31);
        }
        if (lane == 0) ((int32_t *)a.starts.a)[a.n_expert] = (int32_t)n;
    }
    __syncthreads();
    for (uint32_t i = first; i < end; i += 32) {
        const uint32_t e = i + lane < end ? (uint32_t)ids[i + lane] : 0xffffffffu;
        const uint32_t same = __match_any_sync(PS_FULL_WARP, e), below = same & ((1u << lane) - 1);
        if (e != 0xffffffffu) ((int32_t *)a.order.a)[mine[e] + __popc(below)] = (int32_t)(i + lane);
        __syncwarp();
        if (e != 0xffffffffu && below == 0) mine[e] += __popc(same);
        __syncwarp();
    }
}

/* One block. */
static __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    k_route_sort(const __grid_constant__ ps_route_args a)
{
    PS_DYNAMIC_SMEM(smem);
    ps_dep_wait();
    sort_assignments(a, (uint32_t *)smem, blockDim.x / 32);
}

static __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    k_route(const __grid_constant__ ps_route_args a)
{
    PS_DYNAMIC_SMEM(smem);
    ps_dep_wait();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    float *logits = (float *)smem + warp * a.n_expert;
    uint8_t *taken = smem + n_warps * a.n_expert * 4 + warp * ((a.n_expert + 15) / 16 * 16);
    for (uint64_t t = warp; t < a.n_tok; t += n_warps) route_token(a, t, logits, taken, lane);
    __syncthreads(); /* ids are written, and nobody needs the logits any more: counts take their
                        place */
    sort_assignments(a, (uint32_t *)smem, n_warps);
}

ps_status ps_cuda_route(const ps_launch *launch, const void *args)
{
    ps_route_args a = *(const ps_route_args *)args;
    const ps_status status = ps_op_check(PS_OP_ROUTE, &a, NULL);
    if (status != PS_OK) return status;
    const uint64_t smem_limit = ps_cuda_smem_bytes(launch->info->sm),
                   per_warp = token_smem_bytes(a.n_expert);
    const uint64_t n_assign = (uint64_t)a.n_tok * a.k;
    /* Fewer warps where there are thousands of experts, or little to sort. */
    const uint64_t fit = smem_limit / per_warp, useful = ps_max_u64(a.n_tok, (n_assign + 31) / 32);
    const uint32_t warps = (uint32_t)ps_min_u64(ps_min_u64(fit, useful), (uint64_t)ROUTE_WARPS);
    if (fit < (uint64_t)ROUTE_TOK_WARPS || n_assign > INT32_MAX) return PS_EUNSUPPORTED;
    if (n_assign <= ROUTE_ONE_BLOCK)
        return ps_cuda_launch(
            launch, (const void *)k_route, dim3(1), warps * 32, warps * per_warp, &a);
    const ps_status s = ps_cuda_launch(launch, (const void *)k_route_tokens,
        dim3(ps_div_up(a.n_tok, ROUTE_TOK_WARPS)), ROUTE_TOK_WARPS * 32, ROUTE_TOK_WARPS * per_warp,
        &a);
    if (s != PS_OK) return s;
    return ps_cuda_launch(
        launch, (const void *)k_route_sort, dim3(1), warps * 32, warps * a.n_expert * 4ull, &a);
}
