/* ps_cuda - what all CUDA kernels share: the launch, reductions, and the activation functions.
 *
 * Not here: block formats (ps_cuda_fmt.cuh), single instructions (ps_cuda_ptx.cuh).
 * Threads: launchers run on the engine's thread, everything marked PS_DEVICE on the GPU.
 *
 * Every kernel takes one struct by value and is launched through ps_cuda_launch. Kernel bodies read
 * activations with plain loads only: with overlapping launches they may change during a kernel's
 * life, before its ps_dep_wait.
 */
#ifndef PS_CUDA_CUH
#define PS_CUDA_CUH

#include "device/ps_cuda_resident.cuh"
#include "kernels/ps_cuda_paths.h"
#include "kernels/ps_cuda_ptx.cuh"

#define PS_FULL_WARP 0xffffffffu

/* ---- host side ---- */

/* What CUDA answers to a launch: refused (the engine goes on) or the device is lost. */
static inline ps_status ps_cuda_status(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return PS_OK;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorMemoryAllocation:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorStreamCaptureInvalidated: return PS_EDEVICE;
    default: return PS_EFATAL;
    }
}

/* One kernel, its one argument by address. A refused launch leaves no error behind in the runtime.
 */
static inline ps_status ps_cuda_launch(const ps_launch *launch, const void *kernel, dim3 grid,
    unsigned threads, uint64_t smem_bytes, void *params)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = (size_t)smem_bytes;
    config.stream = (cudaStream_t)launch->cuda_stream;
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    if (launch->info->sm >= 90) {
        config.attrs = &overlap;
        config.numAttrs = 1;
    }
    cudaError_t e = cudaSuccess;
    if (smem_bytes > 48 << 10)
        e = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_bytes);
    void *args[] = {params};
    if (e == cudaSuccess) e = cudaLaunchKernelExC(&config, kernel, args);
    if (e != cudaSuccess) (void)cudaGetLastError();
    return ps_cuda_status(e);
}

static inline unsigned ps_div_up(uint64_t a, uint64_t b)
{
    return (unsigned)((a + b - 1) / b);
}
static inline unsigned ps_cuda_n_sm(const ps_launch *launch)
{
    return launch->info->n_sm > 0 ? (unsigned)launch->info->n_sm : 1;
}

template <typename T> static inline T *ps_ptr(ps_dptr p)
{
    return (T *)(uintptr_t)p.a;
}
/* Rows that float4 may read: base and stride. */
static inline bool ps_rows_aligned(ps_dptr p, uint64_t ld)
{
    return p.a % 16 == 0 && ld % 4 == 0;
}

/* ---- device side ---- */

PS_DEVICE float ps_warp_sum(float v)
{
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(PS_FULL_WARP, v, o);
    return v;
}
PS_DEVICE float ps_warp_max(float v)
{
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(PS_FULL_WARP, v, o));
    return v;
}

/* Over the block, the same value in every thread; `part` holds one float a warp. Up to 32 warps;
 * barriers inside. */
PS_DEVICE float ps_block_sum(float v, float *part)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = (blockDim.x + 31) / 32;
    v = ps_warp_sum(v);
    __syncthreads();
    if (lane == 0) part[warp] = v;
    __syncthreads();
    return ps_warp_sum(lane < n_warps ? part[lane] : 0.0f);
}
PS_DEVICE float ps_block_max(float v, float *part)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = (blockDim.x + 31) / 32;
    v = ps_warp_max(v);
    __syncthreads();
    if (lane == 0) part[warp] = v;
    __syncthreads();
    return ps_warp_max(lane < n_warps ? part[lane] : 0.0f);
}

PS_DEVICE float ps_activate(uint32_t kind, float gate, float up)
{
    switch (kind) {
    case PS_ACT_SILU: return gate / (1.0f + expf(-gate)) * up;
    case PS_ACT_GELU: {
        const float u = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return 0.5f * gate * (1.0f + tanhf(u)) * up;
    }
    case PS_ACT_RELU2: {
        const float r = fmaxf(up, 0.0f);
        return r * r;
    }
    default: {
        const float g = fminf(gate, 7.0f), u = fminf(fmaxf(up, -7.0f), 7.0f);
        return g / (1.0f + expf(-1.702f * g)) * (u + 1.0f);
    }
    }
}

#endif
