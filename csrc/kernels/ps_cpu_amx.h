/* ps_cpu_amx - what the amx variant adds to avx512's. Plain C types only: the registry includes it
 * too.
 *
 * Not here: kernels.
 * Threads: see ps_cpu_amx.c.
 */
#ifndef PS_CPU_AMX_H
#define PS_CPU_AMX_H

#include "kernels/ps_cpu_kernels.h"

enum { PS_CPU_AMX_SCRATCH_BYTES = 1 << 20 }; /* of one thread's gemm */

extern const ps_pack ps_cpu_amx_pack_single; /* inputs in bfloat16 */
extern const ps_pack ps_cpu_amx_pack_halves; /* in two halves of bfloat16 */

void ps_cpu_amx_gemm_f16(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_bf16(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q4_0(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q4_1(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q5_0(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q5_1(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q8_0(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q2_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q3_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q4_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q5_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_q6_k(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_iq4_nl(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_iq4_xs(const ps_gemm *g, uint64_t row, uint64_t end);
void ps_cpu_amx_gemm_mxfp4(const ps_gemm *g, uint64_t row, uint64_t end);

#endif
