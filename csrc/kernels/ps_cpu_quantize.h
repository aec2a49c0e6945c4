/* ps_cpu_quantize - 32 inputs in 8 bits with one float scale: the step that both ways of a matmul
 * share, so that both see the same inputs.
 *
 * Not here: where the bytes go (ps_xq rows for few tokens, groups for many).
 * Threads: pure functions, static in every file that includes this.
 */
#ifndef PS_CPU_QUANTIZE_H
#define PS_CPU_QUANTIZE_H

#include "kernels/ps_cpu_kernels.h"
#include "kernels/ps_cpu_vec.h"

#include <string.h>

typedef struct block_sums {
    float d;       /* x = d * q */
    float half[2]; /* sums of the first and the last 16 q: whole numbers */
} block_sums;

/* 32 floats, zeros from `left` on. */
static inline block_sums quantize_block(const float *x, uint64_t left, int8_t *q)
{
    float v[32];
    if (left < 32) {
        memset(v, 0, sizeof v);
        memcpy(v, x, left * sizeof *v);
        x = v;
    }
    vf max = vf_zero();
    for (int i = 0; i < 32; i += VF_N) max = vf_max(max, vf_abs(vf_load(x + i)));
    const float top = vf_max_of(max);
    /* Below the limit 127 / top would overflow; such a block is zero as far as any product can
     * tell. */
    block_sums s = {.d = top > 1e-36f ? top / 127.0f : 0.0f};
    const vf inv = vf_set(top > 1e-36f ? 127.0f / top : 0.0f);
    for (int h = 0; h < 2; h++) {
        vf sum = vf_zero();
        for (int i = 16 * h; i < 16 * h + 16; i += VF_N) {
            const vf r = vf_round(vf_mul(vf_load(x + i), inv));
            vf_store_i8(q + i, r);
            sum = vf_add(sum, r);
        }
        s.half[h] = vf_sum(sum);
    }
    return s;
}

#endif
