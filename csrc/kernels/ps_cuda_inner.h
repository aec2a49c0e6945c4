/* ps_cuda_inner - the two engines below the matmul and expert launchers: matrix times few vectors,
 * and tiles on the tensor cores. Both know plain matrices in up to three parts and experts behind
 * pointer tables.
 *
 * Not here: choosing between them (ps_cuda_paths.h), the kernels (ps_cuda_matvec.cu,
 * ps_cuda_gemm*.cu). Threads: functions are called on the engine's thread; structs travel to
 * kernels by value.
 */
#ifndef PS_CUDA_INNER_H
#define PS_CUDA_INNER_H

#include "kernels/ps_ops.h"

enum {
    PS_ROWS_PARTS,  /* a plain matrix, or up to three on the same inputs */
    PS_ROWS_EXPERT, /* one matrix an assignment */
    PS_ROWS_PAIR,   /* gate and up of an assignment, joined by the activation */
};

typedef struct ps_rows_part {
    const uint8_t *w;
    float *y;
    const float *bias;
    uint32_t n_rows, ldy;
    uint32_t first; /* task or tile of the launch where this part begins */
} ps_rows_part;

/* Where weights come from and results go; device addresses throughout. */
typedef struct ps_rows {
    uint32_t mode;
    uint32_t n_parts, add;
    ps_rows_part part[PS_MATMUL_PARTS];
    /* experts */
    const int32_t *ids;            /* [n_assign]: decode finds the expert of an assignment here */
    const int32_t *order, *starts; /* prefill finds the assignments of an expert here */
    const uint64_t *w0, *w1; /* tables of addresses; null entries are left out; w1 only for PAIR */
    const float *bias0, *bias1; /* [n_expert][n_rows] or null */
    float *out;                 /* [n_assign][n_rows] */
    uint32_t n_expert, n_rows, n_assign, act;
    uint32_t x_div;  /* assignment / x_div is its row of x */
    uint32_t n_here; /* experts with an address, about; 0: not known */
} ps_rows;

typedef struct ps_matvec_params {
    const float *x;
    uint64_t row_bytes;
    uint32_t n_tok, n_cols, ldx;
    uint32_t n_tasks;      /* pairs of rows, over all parts; of one expert */
    uint32_t first_assign; /* experts: of blockIdx.y == 0 */
    uint32_t x_aligned;    /* rows of x may be read as float4 */
    uint32_t w_aligned;    /* F32, F16, BF16: rows of weights may be read 16 bytes at a time */
    ps_rows rows;
} ps_matvec_params;

typedef struct ps_gemm_params {
    const uint16_t
        *x16; /* [n_x][ldx16], F16 or BF16 as the weights' format asks; zeros up to ldx16 */
    const float *scale; /* [n_x]: factor of each row's products */
    uint64_t row_bytes;
    uint32_t n_tok, n_cols, ldx16;
    uint32_t w_aligned; /* F16, BF16: rows of weights may be read 16 bytes at a time */
    uint32_t a_stages;  /* tiles of inputs in shared memory: 2 or 3 */
    uint32_t m_tiles;   /* tiles of inputs there can be, not all of which are launched */
    ps_rows rows;
} ps_gemm_params;

/* Fill in what follows from the format and launch. `n_tok` at a time: 8, 4 or 1
 * (ps_cuda_matvec_tok). */
ps_status ps_cuda_matvec(
    const ps_launch *launch, uint32_t fmt, uint32_t n_tok_at_once, ps_matvec_params *p);
/* Any format but F32; quantised ones from sm_80 on. */
ps_status ps_cuda_gemm(const ps_launch *launch, uint32_t fmt, ps_gemm_params *p);

/* x16 = x / scale, rounded: scale is 1 where F16 holds the row well, else a power of two; always 1
 * for BF16. */
typedef struct ps_to16_params {
    const float *x;
    uint16_t *x16;
    float *scale;
    uint32_t n_x, n_cols, ldx, ldx16, bf16;
    uint32_t aligned; /* rows may be read as float4 */
} ps_to16_params;
ps_status ps_cuda_to16(const ps_launch *launch, ps_to16_params *p);
/* Only the rows that an expert with an address takes; the others stay as they were. */
ps_status ps_cuda_to16_routed(const ps_launch *launch, ps_to16_params *p, const ps_rows *r);

/* Rows of blocks to 16 bits (F16, or BF16 for MXFP4), padded with zeros to ldw16. */
typedef struct ps_dequant_params {
    const uint8_t *w;
    uint16_t *w16;
    uint64_t row_bytes;
    uint32_t n_rows, n_cols, ldw16;
} ps_dequant_params;
ps_status ps_cuda_dequant(const ps_launch *launch, uint32_t fmt, ps_dequant_params *p);

#endif
