/* ps_cpu_kernels - between the CPU variants' drivers (ps_cpu_matmul.c, ps_cpu_moe.c: how a call is
 * divided, packed and joined; plain C, written once) and their kernels (one set of functions an
 * instruction set).
 *
 * Not here: kernels, drivers.
 * Threads: kernels are pure functions over the caller's memory; each thread passes its own outputs.
 *
 * Inputs. Quantised weights meet inputs of 8 bits with a float scale for each 32 (ps_xq). The error
 * of that rounding, 2 to 3e-5 of the result's energy, is what llama.cpp's has for the 32-blocks and
 * half of what it has for K-quants, whose inputs it scales by 256. Weights of 16 and 32 bits meet
 * float inputs, or pairs of bfloat16 (AMX).
 */
#ifndef PS_CPU_KERNELS_H
#define PS_CPU_KERNELS_H

#include "kernels/ps_cpu.h"

/* One row of inputs in 8 bits: x[c] = d[c / 32] * q[c], |q| <= 127. n is the row's length rounded
 * up to 256; what is beyond the row is zero. The arrays lie behind each other in one piece of
 * memory. */
typedef struct ps_xq {
    int8_t *q;        /* [n] */
    float *d;         /* [n / 32] */
    float *s32, *s16; /* [n / 32], [n / 16]: d times the sum of 32 or 16 values of q */
} ps_xq;

static inline uint64_t ps_xq_cols(uint32_t n_cols)
{
    return ((uint64_t)n_cols + 255) / 256 * 256;
}
static inline uint64_t ps_xq_bytes(uint32_t n_cols)
{
    return ps_xq_cols(n_cols) / 2 * 3;
}
static inline ps_xq ps_xq_at(void *base, uint32_t n_cols)
{
    const uint64_t n = ps_xq_cols(n_cols);
    ps_xq x = {.q = base};
    x.d = (float *)(x.q + n);
    x.s32 = x.d + n / 32;
    x.s16 = x.s32 + n / 32;
    return x;
}

/* ---- few tokens: one pass over rows of weights for up to PS_CPU_GEMV_MAX_TOK inputs ---- */

typedef struct ps_gemv {
    const uint8_t *w; /* [.][n_cols] of the kernel's format */
    uint64_t row_bytes;
    uint32_t n_cols, n_x;
    const void *x[PS_CPU_GEMV_MAX_TOK]; /* float rows, or bases of ps_xq, as the format wants */
    float *y[PS_CPU_GEMV_MAX_TOK];      /* row r's result goes to y[i][r - row0] */
    uint64_t row0;
    const float *bias; /* bias[r], or NULL */
    bool add;          /* to what y holds */
} ps_gemv;
typedef void (*ps_gemv_fn)(const ps_gemv *g, uint64_t row, uint64_t end);

/* ---- many tokens: inputs packed in groups of PS_GEMM_GROUP rows, then tiles ---- */

enum {
    PS_GEMM_GROUP = 16,
    PS_GEMM_BLOCK_TOK = 512, /* inputs packed at a time: weights are unpacked once for so many */
};

/* How a kernel wants a group of inputs packed. */
typedef struct ps_pack {
    uint64_t (*group_bytes)(uint32_t n_cols);
    /* x[0 .. n), 1 <= n <= PS_GEMM_GROUP; the rows that are missing count as zero. */
    void (*pack)(const float *const *x, uint32_t n, uint32_t n_cols, void *group);
} ps_pack;

typedef struct ps_gemm {
    const uint8_t *w;
    uint64_t row_bytes;
    uint32_t fmt, n_cols;
    const void *x;   /* packed groups, one behind the other */
    uint32_t n_x;    /* rows of inputs; the last group may be partly filled */
    float *const *y; /* [n_x]: row r's result goes to y[i][r - row0] */
    uint64_t row0;
    const float *bias;
    bool add;
    void *scratch; /* of this thread: the kernel set's gemm_scratch_bytes */
} ps_gemm;
typedef void (*ps_gemm_fn)(const ps_gemm *g, uint64_t row, uint64_t end);

/* ---- what a variant brings ---- */

typedef struct ps_cpu_kernels {
    void (*quantize)(const float *x, uint32_t n_cols, ps_xq out);
    /* By format; inputs are ps_xq unless the format's weights are of 16 or 32 bits. */
    ps_gemv_fn gemv[PS_FMT_COUNT];
    const ps_pack *pack[PS_FMT_COUNT];
    ps_gemm_fn gemm[PS_FMT_COUNT];
    uint32_t gemm_rows; /* work is handed to gemm in multiples of this many rows, where there are
                           that many */
    uint64_t gemm_scratch_bytes;
    /* out = f(gate) * up over n floats; PS_ACT_RELU2 has no gate. */
    void (*act)(uint32_t kind, const float *gate, const float *up, float *out, uint64_t n);
} ps_cpu_kernels;

static inline bool ps_fmt_is_float(uint32_t fmt)
{
    return fmt == PS_FMT_F32 || fmt == PS_FMT_F16 || fmt == PS_FMT_BF16;
}

/* The drivers. */
ps_status ps_cpu_matmul(const ps_cpu_kernels *k, const ps_launch *launch, const ps_matmul_args *a);
ps_status ps_cpu_moe_up(const ps_cpu_kernels *k, const ps_launch *launch, const ps_moe_up_args *a);
ps_status ps_cpu_moe_down(
    const ps_cpu_kernels *k, const ps_launch *launch, const ps_moe_down_args *a);

#endif
