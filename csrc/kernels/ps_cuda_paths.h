/* ps_cuda_paths - which way a CUDA launcher goes for a call and how it lays out its workspace: the
 * one truth for the launchers, for ps_op_workspace_bytes and so for plans that are made where there
 * is no GPU.
 *
 * Not here: kernels, anything of the CUDA runtime. C11 and C++17.
 * Threads: pure functions.
 *
 * Batch classes (the only places where a row's bits may depend on how many tokens are in the call):
 * - decode, up to PS_CUDA_DECODE_TOK tokens: matrix times vectors, inputs of quantised weights
 * rounded to 8 bits in blocks of 32, inputs of float weights as they are;
 * - prefill: tensor cores with inputs rounded to 16 bits (F32 weights: plain float32), from
 * PS_CUDA_LIB_TOK tokens on through cuBLAS on dequantised rows where the library is there.
 */
#ifndef PS_CUDA_PATHS_H
#define PS_CUDA_PATHS_H

#include "kernels/ps_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PS_CUDA_DECODE_TOK = 8,
    PS_CUDA_LIB_TOK = 192,
    PS_CUDA_PAD_COLS = 64, /* rows of 16-bit inputs are padded with zeros to a multiple of this */
    PS_CUDA_LIB_BYTES = 8 << 20, /* cuBLAS's own workspace */
    PS_CUDA_DEQUANT_BYTES =
        32 << 20,            /* dequantised rows at a time: they stay in the L2 of big GPUs */
    PS_CUDA_SEG_COLS = 1024, /* columns that a warp of the quantised matvec takes at a time */
    PS_CUDA_MATVEC_WARPS = 8,
    PS_CUDA_ATTN_SPLIT_TOK = 128, /* keys that a block of split attention takes at a time */
    PS_CUDA_ATTN_MAX_SPLITS = 32,
};

/* A warp's buffer for one segment of one row: the segment, up to 15 bytes before it (copies start
 * at multiples of 16) and up to 4 behind it (blocks are read as whole words). */
#define PS_CUDA_SEG_PITCH(block_elems, block_bytes)                                                \
    ((PS_CUDA_SEG_COLS / (block_elems) * (block_bytes) + 32) & ~15)
/* Segments in flight, the one being computed included. */
#define PS_CUDA_SEG_STAGES(block_elems, block_bytes)                                               \
    (PS_CUDA_SEG_PITCH(block_elems, block_bytes) <= 640 ? 4 : 3)
/* One token's inputs in 8 bits: 32 bytes, a scale and two sums for each 32 columns. */
#define PS_CUDA_Q8_BYTES(n_cols) (((uint64_t)(n_cols) + 31) / 32 * 40)

static inline uint64_t ps_cuda_align(uint64_t n_bytes)
{
    return (n_bytes + 255) & ~(uint64_t)255;
}

/* Dynamic shared memory that one block may ask for. */
static inline uint64_t ps_cuda_smem_bytes(int sm)
{
    switch (sm) {
    case 75: return 64 << 10;
    case 80:
    case 87: return 163 << 10;
    case 90:
    case 100:
    case 103:
    case 110: return 227 << 10;
    default: return sm >= 80 ? 99 << 10 : 48 << 10;
    }
}

static inline bool ps_cuda_is_quant(uint32_t fmt)
{
    return fmt != PS_FMT_F32 && fmt != PS_FMT_F16 && fmt != PS_FMT_BF16;
}

/* Products in bfloat16: weights of that range, exactly represented there. All other formats go
 * through F16. */
static inline bool ps_cuda_is_bf16(uint32_t fmt)
{
    return fmt == PS_FMT_BF16 || fmt == PS_FMT_MXFP4;
}

static inline uint64_t ps_cuda_matvec_ring_bytes(uint32_t fmt)
{
    const ps_fmt_info *f = ps_fmt_get(fmt);
    const int stages = PS_CUDA_SEG_STAGES(f->block_elems, f->block_bytes);
    const int pitch = PS_CUDA_SEG_PITCH(f->block_elems, f->block_bytes);
    return (uint64_t)(PS_CUDA_MATVEC_WARPS * 2 * stages * pitch);
}

/* Tokens that one launch of the matvec takes at once: 8, 4 or 1, and 0 where a single row of inputs
 * does not fit into shared memory. More tokens of the decode class are launched in groups. */
static inline uint32_t ps_cuda_matvec_tok(uint32_t fmt, uint32_t n_cols, uint32_t n_tok, int sm)
{
    const uint32_t want = n_tok > 4 ? 8 : n_tok > 1 ? 4 : 1;
    if (!ps_cuda_is_quant(fmt)) return want;
    const uint64_t smem = ps_cuda_smem_bytes(sm), ring = ps_cuda_matvec_ring_bytes(fmt);
    for (uint32_t n = want; n > 0; n = n == 8 ? 4 : n == 4 ? 1 : 0)
        if (ring + n * PS_CUDA_Q8_BYTES(n_cols) <= smem) return n;
    return 0;
}

typedef enum ps_cuda_path {
    PS_CUDA_MATVEC,
    PS_CUDA_GEMM_F32, /* plain float32 */
    PS_CUDA_GEMM,     /* own tensor-core kernel; quantised weights are unpacked inside */
    PS_CUDA_DEQUANT,  /* rows dequantised to 16 bits, then cuBLAS or the own kernel */
    PS_CUDA_LIB, /* 16-bit weights as they are: cuBLAS, or the own kernel where it is missing */
} ps_cuda_path;

static inline ps_cuda_path ps_cuda_matmul_path(
    uint32_t fmt, uint32_t n_cols, uint32_t n_tok, int sm)
{
    if (n_tok <= PS_CUDA_DECODE_TOK && ps_cuda_matvec_tok(fmt, n_cols, n_tok, sm) > 0)
        return PS_CUDA_MATVEC;
    if (fmt == PS_FMT_F32) return PS_CUDA_GEMM_F32;
    if (!ps_cuda_is_quant(fmt)) return PS_CUDA_LIB;
    /* Below sm_80 the staging of raw blocks does not fit beside the tiles. */
    return sm < 80 || n_tok >= PS_CUDA_LIB_TOK ? PS_CUDA_DEQUANT : PS_CUDA_GEMM;
}

static inline uint64_t ps_cuda_pad_cols(uint64_t n_cols)
{
    return (n_cols + PS_CUDA_PAD_COLS - 1) / PS_CUDA_PAD_COLS * PS_CUDA_PAD_COLS;
}

/* Byte offsets into the workspace. The 16-bit inputs lie at 0. */
typedef struct ps_cuda_layout {
    uint64_t scale;   /* f32 [rows of x]: what products are multiplied by */
    uint64_t dequant; /* 16-bit [dequant_rows][padded columns] */
    uint64_t dequant_rows;
    uint64_t lib; /* PS_CUDA_LIB_BYTES for cuBLAS, where a part may go there */
    uint64_t total;
} ps_cuda_layout;

static inline ps_cuda_layout ps_cuda_x16_layout(uint64_t n_rows, uint64_t n_cols)
{
    ps_cuda_layout l = {0, 0, 0, 0, 0};
    l.scale = ps_cuda_align(n_rows * ps_cuda_pad_cols(n_cols) * 2);
    l.dequant = l.total = l.scale + ps_cuda_align(n_rows * 4);
    return l;
}

static inline ps_cuda_layout ps_cuda_matmul_layout(const ps_matmul_args *a, int sm)
{
    ps_cuda_layout l = {0, 0, 0, 0, 0};
    const uint64_t row_bytes = ps_cuda_pad_cols(a->n_cols) * 2;
    bool x16 = false, lib = false;
    uint64_t rows = 0; /* of the largest part that is dequantised */
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const ps_cuda_path path = ps_cuda_matmul_path(a->part[i].fmt, a->n_cols, a->n_tok, sm);
        lib = lib || path == PS_CUDA_DEQUANT || path == PS_CUDA_LIB;
        x16 = x16 || lib || path == PS_CUDA_GEMM;
        if (path == PS_CUDA_DEQUANT) rows = ps_max_u64(rows, a->part[i].n_rows);
    }
    if (!x16) return l;
    l = ps_cuda_x16_layout(a->n_tok, a->n_cols);
    l.dequant_rows = ps_min_u64(rows, ps_max_u64(64, PS_CUDA_DEQUANT_BYTES / row_bytes));
    l.lib = l.total + ps_cuda_align(l.dequant_rows * row_bytes);
    l.total = l.lib + (lib ? PS_CUDA_LIB_BYTES : 0);
    return l;
}

/* Experts: F32 weights and GPUs before sm_80 go assignment by assignment whatever the batch. */
static inline bool ps_cuda_moe_is_decode(uint32_t fmt, uint32_t n_tok, int sm)
{
    return n_tok <= PS_CUDA_DECODE_TOK || fmt == PS_FMT_F32 || sm < 80;
}

/* gate and up in one format are computed side by side; otherwise each goes into the workspace
 * first. */
typedef struct ps_cuda_moe_up_layout {
    ps_cuda_layout x16;
    uint64_t gate, up; /* f32 [n_tok * k][n_ff], where the formats differ */
    uint64_t total;
} ps_cuda_moe_up_layout;

static inline ps_cuda_moe_up_layout ps_cuda_moe_up_plan(const ps_moe_up_args *a, int sm)
{
    ps_cuda_moe_up_layout l = {{0, 0, 0, 0, 0}, 0, 0, 0};
    if (!ps_cuda_moe_is_decode(a->fmt_gate, a->n_tok, sm) ||
        !ps_cuda_moe_is_decode(a->fmt_up, a->n_tok, sm))
        l.x16 = ps_cuda_x16_layout(a->n_tok, a->n_cols);
    l.total = l.x16.total;
    if (a->fmt_gate != a->fmt_up) {
        const uint64_t n_bytes = ps_cuda_align((uint64_t)a->n_tok * a->k * a->n_ff * 4);
        l.gate = l.total;
        l.up = l.gate + n_bytes;
        l.total = l.up + n_bytes;
    }
    return l;
}

static inline ps_cuda_layout ps_cuda_moe_down_plan(const ps_moe_down_args *a, int sm)
{
    ps_cuda_layout none = {0, 0, 0, 0, 0};
    if (ps_cuda_moe_is_decode(a->fmt, a->n_tok, sm)) return none;
    return ps_cuda_x16_layout((uint64_t)a->n_tok * a->k, a->n_ff);
}

/* Split attention: a block takes one token, one KV head, up to 16 of its query heads and one share
 * of the keys. The number of shares depends on what is fixed when a graph is recorded, never on the
 * length in hand or on n_tok. */
static inline uint32_t ps_cuda_attn_splits(const ps_attn_args *a)
{
    if (a->n_tok > PS_CUDA_DECODE_TOK) return 1; /* many sequences at once fill the GPU without */
    uint64_t keys = a->max_kv;
    if (a->window > 0 && a->window < keys) keys = a->window;
    const uint64_t by_keys = ps_div_up_u64(keys, PS_CUDA_ATTN_SPLIT_TOK);
    const uint64_t heads = (uint64_t)a->kv.n_kv_head *
                           ps_div_up_u64(a->kv.n_kv_head ? a->n_head / a->kv.n_kv_head : 1, 16);
    const uint64_t by_grid = ps_max_u64(1, 264 / ps_max_u64(1, heads));
    return (uint32_t)ps_min_u64(ps_min_u64(by_keys, by_grid), PS_CUDA_ATTN_MAX_SPLITS);
}

typedef struct ps_cuda_attn_layout {
    uint64_t ml; /* f32 [n_tok][n_head][splits][2]; partial outputs
                    [n_tok][n_head][splits][head_dim] lie at 0 */
    uint64_t total;
} ps_cuda_attn_layout;

static inline ps_cuda_attn_layout ps_cuda_attn_plan(const ps_attn_args *a)
{
    ps_cuda_attn_layout l = {0, 0};
    const uint64_t splits = ps_cuda_attn_splits(a);
    if (splits <= 1) return l;
    const uint64_t rows = (uint64_t)a->n_tok * a->n_head * splits;
    l.ml = ps_cuda_align(rows * a->kv.head_dim * 4);
    l.total = l.ml + ps_cuda_align(rows * 8);
    return l;
}

#ifdef __cplusplus
}
#endif
#endif
