/* ps_cpu_variants - the tables of the faster variants: which kernel serves which format, and which
 * op stays with the reference because nothing would be gained. Compiled for every CPU: the SIMD
 * code is behind the function pointers.
 *
 * Not here: which of them this CPU runs (ps_cpu.c).
 * Threads: constant tables.
 */
#include "kernels/ps_cpu_kernels.h"

#ifdef PS_HAVE_AVX2
#include "kernels/ps_cpu_avx2.h"
#endif
#ifdef PS_HAVE_AVX512
#include "kernels/ps_cpu_avx512.h"
#endif
#ifdef PS_HAVE_AMX
#include "kernels/ps_cpu_amx.h"
#endif

/* Every quantised format, by its number and by its name in kernels. */
#define QUANTISED(X, prefix)                                                                       \
    X(prefix, PS_FMT_Q4_0, q4_0)                                                                   \
    X(prefix, PS_FMT_Q4_1, q4_1)                                                                   \
    X(prefix, PS_FMT_Q5_0, q5_0)                                                                   \
    X(prefix, PS_FMT_Q5_1, q5_1)                                                                   \
    X(prefix, PS_FMT_Q8_0, q8_0)                                                                   \
    X(prefix, PS_FMT_Q2_K, q2_k)                                                                   \
    X(prefix, PS_FMT_Q3_K, q3_k)                                                                   \
    X(prefix, PS_FMT_Q4_K, q4_k)                                                                   \
    X(prefix, PS_FMT_Q5_K, q5_k)                                                                   \
    X(prefix, PS_FMT_Q6_K, q6_k)                                                                   \
    X(prefix, PS_FMT_IQ4_NL, iq4_nl)                                                               \
    X(prefix, PS_FMT_IQ4_XS, iq4_xs)                                                               \
    X(prefix, PS_FMT_MXFP4, mxfp4)
#define FLOATS(X, prefix)                                                                          \
    X(prefix, PS_FMT_F32, f32)                                                                     \
    X(prefix, PS_FMT_F16, f16)                                                                     \
    X(prefix, PS_FMT_BF16, bf16)
#define ENTRY(prefix, fmt, name) [fmt] = prefix##name,
#define PACK(object, fmt, name)  [fmt] = &(object),

/* The launchers of a variant's products over its kernel set. */
#define LAUNCHERS(variant)                                                                         \
    static ps_status variant##_matmul(const ps_launch *launch, const void *args)                   \
    {                                                                                              \
        return ps_cpu_matmul(&variant##_kernels, launch, args);                                    \
    }                                                                                              \
    static ps_status variant##_moe_up(const ps_launch *launch, const void *args)                   \
    {                                                                                              \
        return ps_cpu_moe_up(&variant##_kernels, launch, args);                                    \
    }                                                                                              \
    static ps_status variant##_moe_down(const ps_launch *launch, const void *args)                 \
    {                                                                                              \
        return ps_cpu_moe_down(&variant##_kernels, launch, args);                                  \
    }

/* The whole table: products of `variant`, all else in the instruction set of `simd`. */
#define TABLE(variant, simd)                                                                       \
    const ps_op_table *ps_cpu_##variant##_table(void)                                              \
    {                                                                                              \
        static const ps_op_table table = {.name = #variant,                                        \
            .op = {[PS_OP_EMBED] = ps_cpu_ref_embed,                                               \
                [PS_OP_NORM] = ps_cpu_##simd##_norm,                                               \
                [PS_OP_MATMUL] = variant##_matmul,                                                 \
                [PS_OP_QKV_PREP] = ps_cpu_##simd##_qkv_prep,                                       \
                [PS_OP_ATTN] = ps_cpu_##simd##_attn,                                               \
                [PS_OP_ATTN_MERGE] = ps_cpu_ref_attn_merge,                                        \
                [PS_OP_ACT] = ps_cpu_##simd##_act,                                                 \
                [PS_OP_ROUTE] = ps_cpu_ref_route,                                                  \
                [PS_OP_GATHER_EXPERTS] = ps_cpu_ref_gather_experts,                                \
                [PS_OP_MOE_UP] = variant##_moe_up,                                                 \
                [PS_OP_MOE_DOWN] = variant##_moe_down,                                             \
                [PS_OP_MOE_COMBINE] = ps_cpu_##simd##_moe_combine,                                 \
                [PS_OP_ADD] = ps_cpu_##simd##_add,                                                 \
                [PS_OP_GATHER_ROWS] = ps_cpu_ref_gather_rows,                                      \
                [PS_OP_SOFTCAP] = ps_cpu_##simd##_softcap,                                         \
                [PS_OP_MOVE] = ps_cpu_ref_move}};                                                  \
        return &table;                                                                             \
    }

/* ---- avx2 ---- */

#ifdef PS_HAVE_AVX2
static const ps_cpu_kernels avx2_kernels = {
    .quantize = ps_cpu_avx2_quantize,
    .gemv = {FLOATS(ENTRY, ps_cpu_avx2_gemv_) QUANTISED(ENTRY, ps_cpu_avx2_gemv_)},
    .pack = {FLOATS(PACK, ps_cpu_avx2_pack_f32) QUANTISED(PACK, ps_cpu_avx2_pack_q8)},
    .gemm = {FLOATS(ENTRY, ps_cpu_avx2_gemm_) QUANTISED(ENTRY, ps_cpu_avx2_gemm_)},
    .gemm_rows = 16,
    .gemm_scratch_bytes = PS_CPU_AVX2_GEMM_SCRATCH_BYTES,
    .act = ps_cpu_avx2_act_row,
};
LAUNCHERS(avx2)
TABLE(avx2, avx2)
#else
const ps_op_table *ps_cpu_avx2_table(void)
{
    return NULL;
}
#endif

/* ---- avx512 ---- */

#ifdef PS_HAVE_AVX512
static const ps_cpu_kernels avx512_kernels = {
    .quantize = ps_cpu_avx512_quantize,
    .gemv = {FLOATS(ENTRY, ps_cpu_avx512_gemv_) QUANTISED(ENTRY, ps_cpu_avx512_gemv_)},
    .pack = {FLOATS(PACK, ps_cpu_avx512_pack_f32) QUANTISED(PACK, ps_cpu_avx512_pack_q8)},
    .gemm = {FLOATS(ENTRY, ps_cpu_avx512_gemm_) QUANTISED(ENTRY, ps_cpu_avx512_gemm_)},
    .gemm_rows = 32,
    .gemm_scratch_bytes = PS_CPU_AVX512_GEMM_SCRATCH_BYTES,
    .act = ps_cpu_avx512_act_row,
};
LAUNCHERS(avx512)
TABLE(avx512, avx512)
#else
const ps_op_table *ps_cpu_avx512_table(void)
{
    return NULL;
}
#endif

/* ---- amx ---- */

#if defined(PS_HAVE_AMX) && defined(PS_HAVE_AVX512)
static const ps_cpu_kernels amx_kernels = {
    .quantize = ps_cpu_avx512_quantize,
    .gemv = {FLOATS(ENTRY, ps_cpu_avx512_gemv_) QUANTISED(ENTRY, ps_cpu_avx512_gemv_)},
    .pack = {[PS_FMT_F32] = &ps_cpu_avx512_pack_f32,
        [PS_FMT_F16] = &ps_cpu_amx_pack_halves,
        [PS_FMT_BF16] = &ps_cpu_amx_pack_single,
        QUANTISED(PACK, ps_cpu_amx_pack_single)},
    .gemm = {[PS_FMT_F32] = ps_cpu_avx512_gemm_f32,
        [PS_FMT_F16] = ps_cpu_amx_gemm_f16,
        [PS_FMT_BF16] = ps_cpu_amx_gemm_bf16,
        QUANTISED(ENTRY, ps_cpu_amx_gemm_)},
    .gemm_rows = 16,
    .gemm_scratch_bytes = PS_CPU_AMX_SCRATCH_BYTES,
    .act = ps_cpu_avx512_act_row,
};
LAUNCHERS(amx)
TABLE(amx, avx512)
#else
const ps_op_table *ps_cpu_amx_table(void)
{
    return NULL;
}
#endif
