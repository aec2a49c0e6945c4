/* ps_cuda_gather - routed experts from host memory into slots, and the tables that say where every
 * expert's matrices then are. Of experts that bus and CPU divide, the share that is the bus's.
 *
 * Not here: what is done with them (ps_cuda_moe.cu); copies that are known before the pass, which
 * are the copy engines' work.
 * Threads: the launcher on the engine's thread. The host never learns who was routed where.
 *
 * Bytes and floor: each expert that some token is routed to crosses the bus once. 8 images of 2.65
 * MB take 382 us at the 55.5 GB/s of a copy, 419 us at the 50.6 that kernels reach; what goes into
 * VRAM hides behind. No more of it may be under way than the bus needs: whatever the device sends
 * to the host meanwhile, and the flags that start the CPU on its share of the same layer, queue
 * behind the reads that wait for host memory. 2 us of 55 GB/s are 110 KB; all warps together have
 * GATHER_BLOCKS * GATHER_THREADS * GATHER_LOADS * 16 bytes = 192 KiB under way at most. (On an H200
 * 50.2 GB/s, and a small copy to the host takes 13 us meanwhile; four times as much under way: 50.2
 * GB/s and 40 us.) So the grid does not grow with the experts: all warps go through all images
 * together, piece by piece.
 */
#include "kernels/ps_cuda.cuh"
#include "kernels/ps_cuda_ops.h"

enum {
    GATHER_BLOCKS = 24,
    GATHER_THREADS = 256,
    GATHER_LOADS = 2, /* of 16 bytes, by each thread */
    GATHER_LOOK = 16, /* images between two looks at the abort word */
    GATHER_PIECE_BYTES = 32 * 16 * GATHER_LOADS,
};

typedef struct gather_params {
    ps_gather_experts_args a;
    const uint32_t *abort_word;
} gather_params;

/* Of an assignment; UINT32_MAX where a pass that is given up has left no expert's number. */
PS_DEVICE uint32_t expert_of(const ps_gather_experts_args &a, uint32_t i)
{
    const uint32_t e = ((const uint32_t *)a.ids.a)[i];
    return e < a.n_expert ? e : UINT32_MAX;
}

/* Where the image of an expert lies that is not resident; 0 of one that is, or is nowhere. */
PS_DEVICE uint64_t lies_at(const ps_gather_experts_args &a, uint32_t e)
{
    const uint64_t shared = a.shared.a != 0 ? ((const uint64_t *)a.shared.a)[e] : 0;
    return shared != 0 ? shared : ((const uint64_t *)a.mapped.a)[e];
}

/* Whether assignment i is the first of a shared expert. */
PS_DEVICE bool starts_shared(
    const ps_gather_experts_args &a, uint32_t n_assign, const uint32_t *first, uint32_t i)
{
    const uint32_t e = i < n_assign ? expert_of(a, i) : UINT32_MAX;
    return e != UINT32_MAX && first[e] == i && ((const uint64_t *)a.shared.a)[e] != 0;
}

/* Takes the first assignments away from shared experts that are the other side's. By one warp, 32
 * assignments at a time: how many begin a shared expert, and then the rank of each among those.
 */
PS_DEVICE void divide(const ps_gather_experts_args &a, uint32_t n_assign, uint32_t *first)
{
    const uint32_t lane = threadIdx.x;
    uint32_t n = 0, before = 0;
    for (uint32_t i0 = 0; i0 < n_assign; i0 += 32)
        n += (uint32_t)__popc(
            __ballot_sync(PS_FULL_WARP, starts_shared(a, n_assign, first, i0 + lane)));
    const uint32_t n_gpu = (uint32_t)PS_SHARE_OF(n, a.share);
    for (uint32_t i0 = 0; i0 < n_assign; i0 += 32) {
        const bool starts = starts_shared(a, n_assign, first, i0 + lane);
        const uint32_t all = __ballot_sync(PS_FULL_WARP, starts);
        const uint32_t rank = before + (uint32_t)__popc(all & ((1u << lane) - 1));
        __syncwarp(); /* a ballot orders no memory, and others read what is written now */
        if (starts && (rank < n_gpu) == (a.rest != 0)) first[expert_of(a, i0 + lane)] = n_assign;
        before += (uint32_t)__popc(all);
        __syncwarp();
    }
}

/* first[e]: the first assignment of expert e, n_assign for those without and for those of the other
 * side. Every block divides for itself: all come to the same. */
PS_DEVICE void find_first(const ps_gather_experts_args &a, uint32_t n_assign, uint32_t *first)
{
    for (uint32_t e = threadIdx.x; e < a.n_expert; e += GATHER_THREADS) first[e] = n_assign;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n_assign; i += GATHER_THREADS) {
        const uint32_t e = expert_of(a, i);
        if (e != UINT32_MAX) atomicMin(&first[e], i);
    }
    __syncthreads();
    if (a.shared.a == 0) return;
    if (threadIdx.x < 32) divide(a, n_assign, first);
    __syncthreads();
}

/* The tables, over the whole grid. They say where images will be: nobody reads those before the
 * kernel is done. */
PS_DEVICE void write_tables(
    const ps_gather_experts_args &a, uint32_t n_assign, const uint32_t *first)
{
    const uint64_t *resident = (const uint64_t *)a.resident.a;
    uint64_t *gate = (uint64_t *)a.gate_ptrs.a, *up = (uint64_t *)a.up_ptrs.a,
             *down = (uint64_t *)a.down_ptrs.a;
    for (uint32_t e = blockIdx.x * GATHER_THREADS + threadIdx.x; e < a.n_expert;
         e += gridDim.x * GATHER_THREADS) {
        uint64_t image = lies_at(a, e);
        if (image == 0)
            image = resident[e];
        else if (first[e] == n_assign)
            image = 0;
        else if (a.slots.a != 0)
            image = a.slots.a + first[e] * a.image_bytes;
        gate[e] = image != 0 ? image + a.gate_at : 0;
        up[e] = image != 0 ? image + a.up_at : 0;
        down[e] = image != 0 ? image + a.down_at : 0;
    }
}

/* At most GATHER_PIECE_BYTES, by a warp: whole lines of 128 bytes. */
PS_DEVICE void copy_piece(uint8_t *to, const uint8_t *from, uint64_t n_bytes)
{
    const uint32_t at = threadIdx.x % 32 * 16;
    uint4 v[GATHER_LOADS];
#pragma unroll
    for (uint32_t j = 0; j < GATHER_LOADS; j++)
        if (at + j * 512 < n_bytes) v[j] = ps_load_once(from + at + j * 512);
#pragma unroll
    for (uint32_t j = 0; j < GATHER_LOADS; j++)
        if (at + j * 512 < n_bytes) *(uint4 *)(to + at + j * 512) = v[j];
}

/* Every warp takes each n_warps-th piece, counted through all images to be copied; lane l looks
 * after assignments l, l + 32, ... The GPU reads one word of host memory for one warp after the
 * other, a microsecond each: so one warp of a block asks whether the pass is given up, once in many
 * images and without waiting for the answer before the end of one, and tells the others. */
PS_DEVICE void copy_images(
    const gather_params &p, uint32_t n_assign, const uint32_t *first, volatile uint32_t *aborted)
{
    const ps_gather_experts_args &a = p.a;
    const uint32_t lane = threadIdx.x % 32, n_warps = gridDim.x * (GATHER_THREADS / 32);
    const uint64_t n_pieces = (a.image_bytes + GATHER_PIECE_BYTES - 1) / GATHER_PIECE_BYTES;
    uint64_t piece = blockIdx.x * (GATHER_THREADS / 32) + threadIdx.x / 32;
    uint32_t n_images = 0;
    for (uint32_t i0 = 0; i0 < n_assign; i0 += 32) {
        uint64_t image = 0; /* of assignment i0 + lane, if it is to be copied */
        const uint32_t e = i0 + lane < n_assign ? expert_of(a, i0 + lane) : UINT32_MAX;
        if (e != UINT32_MAX && first[e] == i0 + lane) image = lies_at(a, e);
        for (uint32_t left = __ballot_sync(PS_FULL_WARP, image != 0); left != 0; left &= left - 1) {
            const uint32_t j = __ffs((int)left) - 1;
            const uint8_t *from = (const uint8_t *)__shfl_sync(PS_FULL_WARP, image, (int)j);
            uint8_t *to = (uint8_t *)a.slots.a + (i0 + j) * a.image_bytes;
            const bool asks = threadIdx.x == 0 && n_images++ % GATHER_LOOK == 0;
            const uint32_t word = asks ? ps_load_host_word(p.abort_word) : 0;
            for (; piece < n_pieces; piece += n_warps) {
                const uint64_t at = piece * GATHER_PIECE_BYTES;
                copy_piece(to + at, from + at, a.image_bytes - at);
            }
            piece -= n_pieces;
            if (word != 0) *aborted = 1;
            __syncwarp();
            if (*aborted != 0) return;
        }
    }
}

/* Shared memory: uint32 [n_expert]. Every block finds the first assignments for itself, with a
 * barrier behind which `aborted` is set too. */
static __global__ void __launch_bounds__(GATHER_THREADS)
    k_gather_experts(const __grid_constant__ gather_params p)
{
    PS_DYNAMIC_SMEM(smem);
    __shared__ uint32_t aborted;
    if (threadIdx.x == 0) aborted = 0;
    ps_dep_wait();
    const uint32_t n_assign = p.a.n_tok * p.a.k;
    find_first(p.a, n_assign, (uint32_t *)smem);
    write_tables(p.a, n_assign, (const uint32_t *)smem);
    if (p.a.slots.a != 0) copy_images(p, n_assign, (const uint32_t *)smem, &aborted);
}

ps_status ps_cuda_gather_experts(const ps_launch *launch, const void *args)
{
    gather_params p = {*(const ps_gather_experts_args *)args, launch->abort};
    const ps_status status = ps_op_check(PS_OP_GATHER_EXPERTS, &p.a, NULL);
    if (status != PS_OK) return status;
    const uint64_t smem_bytes = p.a.n_expert * 4ull;
    if (p.a.slots.a % 16 != 0) return PS_EINTERNAL;
    if (smem_bytes > ps_cuda_smem_bytes(launch->info->sm) ||
        (uint64_t)p.a.n_tok * p.a.k > INT32_MAX)
        return PS_EUNSUPPORTED;
    return ps_cuda_launch(launch, (const void *)k_gather_experts, dim3(GATHER_BLOCKS),
        GATHER_THREADS, smem_bytes, &p);
}
