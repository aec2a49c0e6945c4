/* ps_cpu_avx512 - what the files of the avx512 variant call of each other. Plain C types only: the
 * registry includes it too.
 *
 * Not here: kernels.
 * Threads: see the files.
 */
#ifndef PS_CPU_AVX512_H
#define PS_CPU_AVX512_H

#include "kernels/ps_cpu_kernels.h"

/* ps_cpu_elem.h */
void ps_cpu_avx512_quantize(const float *x, uint32_t n_cols, ps_xq out);
void ps_cpu_avx512_act_row(
    uint32_t kind, const float *gate, const float *up, float *out, uint64_t n);
ps_status ps_cpu_avx512_norm(const ps_launch *launch, const void *args);
ps_status ps_cpu_avx512_act(const ps_launch *launch, const void *args);
ps_status ps_cpu_avx512_qkv_prep(const ps_launch *launch, const void *args);
ps_status ps_cpu_avx512_moe_combine(const ps_launch *launch, const void *args);
ps_status ps_cpu_avx512_add(const ps_launch *launch, const void *args);
ps_status ps_cpu_avx512_softcap(const ps_launch *launch, const void *args);

/* ps_cpu_attn.h */
ps_status ps_cpu_avx512_attn(const ps_launch *launch, const void *args);

/* ps_cpu_avx512_gemv.c */
void ps_cpu_avx512_gemv_f32(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_f16(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_bf16(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q4_0(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q4_1(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q5_0(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q5_1(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q8_0(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q2_k(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q3_k(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q4_k(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q5_k(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_q6_k(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_iq4_nl(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_iq4_xs(const ps_gemv *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemv_mxfp4(const ps_gemv *g, uint64_t row, uint64_t end);

/* ps_cpu_avx512_gemm.c */
enum { PS_CPU_AVX512_GEMM_SCRATCH_BYTES = 144 << 10 }; /* of one thread */
extern const ps_pack ps_cpu_avx512_pack_q8, ps_cpu_avx512_pack_f32;
void ps_cpu_avx512_gemm_f32(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_f16(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_bf16(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q4_0(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q4_1(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q5_0(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q5_1(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q8_0(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q2_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q3_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q4_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q5_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_q6_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_iq4_nl(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_iq4_xs(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_avx512_gemm_mxfp4(const ps_gemm *g, uint64_t row, uint64_t end);

#endif
