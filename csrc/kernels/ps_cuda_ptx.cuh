/* ps_cuda_ptx - the instructions that CUDA C++ has no name for, and 16-bit arithmetic on packed
 * pairs, each as one inline function with its substitute for GPUs that lack it.
 *
 * Not here: anything that knows a format, an op or a launch.
 * Threads: device code. "Collective" means that all 32 lanes of the warp call together.
 */
#ifndef PS_CUDA_PTX_CUH
#define PS_CUDA_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define PS_HAVE_SM80 1
#else
#define PS_HAVE_SM80 0
#endif

#define PS_DEVICE static __device__ __forceinline__

/* The block's dynamic shared memory, 16-byte aligned. */
#define PS_DYNAMIC_SMEM(name) extern __shared__ __align__(16) uint8_t name[]

/* ---- pairs of 16-bit floats in one word, the first in the low half ---- */

PS_DEVICE uint32_t ps_pack_f16(float lo, float hi)
{
    __half2 h = __floats2half2_rn(lo, hi);
    return *(uint32_t *)&h;
}
PS_DEVICE uint32_t ps_pack_bf16(float lo, float hi)
{
    __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
    return *(uint32_t *)&h;
}
PS_DEVICE float2 ps_unpack_f16(uint32_t v)
{
    return __half22float2(*(__half2 *)&v);
}
PS_DEVICE float2 ps_unpack_bf16(uint32_t v)
{
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
PS_DEVICE float ps_f16(uint16_t v)
{
    return __half2float(__ushort_as_half(v));
}
PS_DEVICE uint16_t ps_to_f16(float v)
{
    return __half_as_ushort(__float2half_rn(v));
}
PS_DEVICE uint32_t ps_fma_f16(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
PS_DEVICE uint32_t ps_mul_f16(uint32_t a, uint32_t b)
{
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
PS_DEVICE uint32_t ps_add_f16(uint32_t a, uint32_t b)
{
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
PS_DEVICE uint32_t ps_fma_bf16(uint32_t a, uint32_t b, uint32_t c)
{
#if PS_HAVE_SM80
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    const float2 x = ps_unpack_bf16(a), y = ps_unpack_bf16(b), z = ps_unpack_bf16(c);
    return ps_pack_bf16(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
#endif
}

/* ---- tensor cores: c += a b for a 16x16 and a 16x8 tile ----
 * Lane l, g = l / 4, t = l % 4: a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] =
 * A[g+8][2t+8..]; b0 = B[2t..][g], b1 = B[2t+8..][g]; c[0], c[1] = C[g][2t..], c[2], c[3] =
 * C[g+8][2t..]. Collective. */

PS_DEVICE void ps_mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
#if PS_HAVE_SM80
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

PS_DEVICE void ps_mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
#if PS_HAVE_SM80
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    /* Every lane collects the operands of its four sums from the lanes that hold them. */
    const int lane = threadIdx.x & 31, g = lane / 4, n = lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
        const uint32_t a_lo = a[2 * half], a_hi = a[2 * half + 1], b = half ? b1 : b0;
        for (int j = 0; j < 4; j++) {
            const float2 x = ps_unpack_bf16(__shfl_sync(0xffffffffu, a_lo, g * 4 + j));
            const float2 y = ps_unpack_bf16(__shfl_sync(0xffffffffu, a_hi, g * 4 + j));
            const float2 u = ps_unpack_bf16(__shfl_sync(0xffffffffu, b, n * 4 + j));
            const float2 v = ps_unpack_bf16(__shfl_sync(0xffffffffu, b, n * 4 + 4 + j));
            c[0] = fmaf(x.y, u.y, fmaf(x.x, u.x, c[0]));
            c[1] = fmaf(x.y, v.y, fmaf(x.x, v.x, c[1]));
            c[2] = fmaf(y.y, u.y, fmaf(y.x, u.x, c[2]));
            c[3] = fmaf(y.y, v.y, fmaf(y.x, v.x, c[3]));
        }
    }
#endif
}

/* 2^x, which is 0 where it would be no normal number. */
PS_DEVICE float ps_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Four 8x8 matrices of 16-bit elements from shared memory: lanes 8i..8i+7 give the addresses of
 * matrix i's rows (16 bytes, 16-byte aligned); r[i] holds elements (l / 4, 2 (l % 4)..) of matrix
 * i, or of its transpose. Collective. */
PS_DEVICE void ps_ldmatrix(uint32_t r[4], const void *row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
PS_DEVICE void ps_ldmatrix_t(uint32_t r[4], const void *row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* ---- copies from global to shared memory that do not pass through registers ----
 * 16 bytes, both sides 16-byte aligned; only the first n_bytes are read, the rest becomes zero. A
 * thread's copies are there for that thread after ps_copy_wait, for others after a barrier behind
 * it. */

typedef enum ps_copy_way {
    PS_PAST_L1,    /* what nobody reads again soon */
    PS_THROUGH_L1, /* what may be host memory: whole lines cross the bus at 50 GB/s, 32 bytes at a
                    * time, as they are asked for past L1, at 29 (H200) */
} ps_copy_way;

template <ps_copy_way WAY = PS_PAST_L1>
PS_DEVICE void ps_copy16(void *dst, const void *src, uint32_t n_bytes)
{
#if PS_HAVE_SM80
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(dst);
    if constexpr (WAY == PS_THROUGH_L1)
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(src), "r"(n_bytes)
            : "memory");
    else
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(src), "r"(n_bytes)
            : "memory");
#else
    if (n_bytes == 16) {
        *(uint4 *)dst = *(const uint4 *)src;
    } else {
        for (uint32_t i = 0; i < 16; i++)
            ((uint8_t *)dst)[i] = i < n_bytes ? ((const uint8_t *)src)[i] : 0;
    }
#endif
}
PS_DEVICE void ps_copy_commit(void)
{
#if PS_HAVE_SM80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/* Until at most N of this thread's committed groups are still under way. */
template <int N> PS_DEVICE void ps_copy_wait(void)
{
#if PS_HAVE_SM80
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* ---- global loads of what is read once: past the L1, 16 bytes, aligned ---- */
PS_DEVICE uint4 ps_load_once(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
PS_DEVICE void ps_prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* A word of host memory that the CPU may change meanwhile. */
PS_DEVICE uint32_t ps_load_host_word(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* ---- launches that overlap (sm_90): a kernel may start while the one before it on the stream
 * drains ---- Every kernel calls ps_dep_wait in every thread before it touches anything that
 * another kernel writes; nothing but prefetches into the L2 may come earlier. */
PS_DEVICE void ps_dep_wait(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
