/* ps_ops - the op table: one argument struct and one launcher per op, for the CPU (reference and
 * instruction-set variants) and for CUDA. Also what every user of an op needs to know without
 * running it: which memory it reads and writes, what it costs, how much workspace it wants. Those
 * are plain C, so that plans are made without any device.
 *
 * Not here: models, plans, where things live.
 * Threads: launchers are called by one thread a stream; everything else is pure.
 *
 * Conventions
 * - Activations are float32, row-major, one row a token: element (t, i) of x is x[t * ldx + i].
 * `ld` counts floats.
 * - Weights are GGUF blocks, row-major, rows of n_cols weights: y[t][r] = sum_c x[t][c] * W[r][c].
 * 1-D tensors (norm weights, biases, sinks, rope factors) are float32 always; the loader converts
 * them.
 * - Integers that change from pass to pass (token ids, positions, pages) are int32 arrays in device
 * memory, so that a recorded graph replays with new values. Sizes in the structs are those of the
 * recorded pass.
 * - Inputs and outputs do not overlap unless the op says "in place".
 * - Every op accumulates in float32 (or integers per block, then float32) and gives the same bits
 * for the same arguments on the same variant, whatever the number of threads. A row's result does
 * not depend on which other rows or tokens are in the call, except across the batch classes that a
 * variant documents.
 */
#ifndef PS_OPS_H
#define PS_OPS_H

#include "base/ps_base.h"
#include "device/ps_device.h"
#include "format/ps_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ps_op_kind {
    PS_OP_EMBED,          /* rows of a table by token id */
    PS_OP_NORM,           /* RMS or layer norm, with optional residual add behind it */
    PS_OP_MATMUL,         /* up to three weight matrices on the same input */
    PS_OP_QKV_PREP,       /* per-head norms, rope, store k and v in the cache */
    PS_OP_ATTN,           /* attention over the paged cache */
    PS_OP_ATTN_MERGE,     /* join two partial attentions */
    PS_OP_ACT,            /* activation, gated or not */
    PS_OP_ROUTE,          /* top-k experts of each token, and the lists by expert */
    PS_OP_GATHER_EXPERTS, /* which routed experts are this side's; on the GPU, their images into
                             slots */
    PS_OP_MOE_UP,         /* gate and up of the routed experts, with the activation */
    PS_OP_MOE_DOWN,       /* down of the routed experts, one row an assignment */
    PS_OP_MOE_COMBINE,    /* weighted sum of a token's assignments in rank order */
    PS_OP_ADD,            /* out = a + b */
    PS_OP_GATHER_ROWS,    /* rows by index */
    PS_OP_SOFTCAP,        /* cap * tanh(x / cap) */
    PS_OP_MOVE,           /* words from one place to another */
    PS_OP_COUNT
} ps_op_kind;

/* ---- EMBED: out[t][i] = scale * table[ids[t]][i]. Ids are checked by the caller. ---- */
typedef struct ps_embed_args {
    ps_dptr table; /* [n_vocab][n_cols] fmt */
    ps_dptr ids;   /* int32 [n_tok] */
    ps_dptr out;   /* f32 [n_tok][n_cols] */
    uint32_t fmt, n_tok, n_cols, n_vocab;
    float scale;
} ps_embed_args;

/* ---- NORM: out = residual + (x - mean) / sqrt(var + eps) * w + b; RMS: no mean, no b. ----
 * In place allowed: out == x, out == residual. */
typedef enum ps_norm_kind { PS_NORM_RMS, PS_NORM_LAYER } ps_norm_kind;
typedef struct ps_norm_args {
    ps_dptr x;        /* f32 [n_tok][ldx] */
    ps_dptr w, b;     /* f32 [n]; b may be null */
    ps_dptr residual; /* f32 [n_tok][ldo] or null */
    ps_dptr out;      /* f32 [n_tok][ldo] */
    uint32_t n_tok, n, ldx, ldo;
    uint32_t kind; /* ps_norm_kind */
    float eps;
} ps_norm_args;

/* ---- MATMUL: for each part p: y_p[t][r] (+)= bias_p[r] + sum_c x[t][c] * w_p[r][c] ----
 * Parts share x so that it is converted once. With `add` the result is added to what y holds. Rows
 * of x must be finite; 16-bit paths scale each row by a power of two, so |x| up to 1e6 and beyond
 * is exact enough. */
enum { PS_MATMUL_PARTS = 3 };
typedef struct ps_matmul_part {
    ps_dptr w;    /* [n_rows][n_cols] fmt */
    ps_dptr y;    /* f32 [n_tok][ldy] */
    ps_dptr bias; /* f32 [n_rows] or null */
    uint32_t fmt, n_rows, ldy;
} ps_matmul_part;
typedef struct ps_matmul_args {
    ps_dptr x;  /* f32 [n_tok][ldx] */
    ps_dptr ws; /* ps_op_workspace_bytes; CUDA only */
    uint64_t ws_bytes;
    uint32_t n_tok, n_cols, ldx;
    uint32_t n_parts; /* 1..3 */
    uint32_t add;     /* 0 or 1 */
    ps_matmul_part part[PS_MATMUL_PARTS];
} ps_matmul_args;

/* ---- the KV cache of one layer on one side, as kernels see it ----
 * k and v: [page][n_kv_head][page_tok][head_dim] in fmt (F16, or Q8_0 with head_dim a multiple of
 * 32). The token at position p of sequence s lies in page table[s * max_pages + p / page_tok] at
 * row p % page_tok. A negative entry: that page is not on this side; its tokens are skipped. */
typedef struct ps_kv_view {
    ps_dptr k, v;
    ps_dptr table; /* int32 [n_seq][max_pages] */
    uint32_t fmt, n_kv_head, head_dim, page_tok, max_pages, n_pages, n_seq;
} ps_kv_view;

/* ---- QKV_PREP: for each token: q, k = head norm (where weights are given), then rope, in place;
 * then k and v into the cache at the token's position. Rope rotates the first n_rot dims of each
 * head by angle pos * freq[i], cos and sin multiplied by mag: pairs (2i, 2i+1) if interleaved, (i,
 * i + n_rot/2) if neox. M-RoPE is neox with the position of pair i taken from section j: sections
 * give how many pairs use pos[0], pos[1], ... in turn. q may be null (only k and v are prepared);
 * kv with null k, v and table: nothing is stored. Pages that are not on this side are skipped. ----
 */
typedef enum ps_rope_kind {
    PS_ROPE_NONE,
    PS_ROPE_INTERLEAVED,
    PS_ROPE_NEOX,
    PS_ROPE_MROPE
} ps_rope_kind;
typedef struct ps_qkv_prep_args {
    ps_dptr q, k, v;        /* f32 [n_tok][ldq], [n_tok][ldk], [n_tok][ldv]; q and k in place */
    ps_dptr q_norm, k_norm; /* f32 [head_dim] or null (RMS) */
    ps_dptr freq;           /* f32 [n_rot / 2] */
    ps_dptr pos;      /* int32 [n_tok]: place in the sequence, and rope position unless M-RoPE */
    ps_dptr rope_pos; /* int32 [4][n_tok] for M-RoPE, else null */
    ps_dptr seq;      /* int32 [n_tok] */
    ps_kv_view kv;
    uint32_t n_tok, n_head, ldq, ldk, ldv, n_rot;
    uint32_t rope; /* ps_rope_kind */
    uint32_t sections[4];
    float mag, eps;
} ps_qkv_prep_args;

/* ---- ATTN: out[t][h] = sum_j softmax_j(scale * q[t][h] . k[j]) v[j] over positions j <= pos[t] of
 * seq[t], with pos[t] - j < window where window > 0; softcap > 0: scores become softcap *
 * tanh(score / softcap); sinks: one more score a head that joins the softmax's denominator and has
 * no value. Query head h reads KV head h / (n_head/n_kv_head). Where `ml` is given, (maximum, sum
 * of exponentials relative to it) of each token and head are written there, so that parts can be
 * merged; a part without any key writes (-inf, 0) and zeros. ---- */
typedef struct ps_attn_args {
    ps_dptr q;        /* f32 [n_tok][ldq], heads side by side */
    ps_dptr out;      /* f32 [n_tok][ldo] */
    ps_dptr ml;       /* f32 [n_tok][n_head][2] or null */
    ps_dptr sinks;    /* f32 [n_head] or null */
    ps_dptr pos, seq; /* int32 [n_tok] */
    ps_dptr ws;       /* ps_op_workspace_bytes; CUDA only */
    uint64_t ws_bytes;
    ps_kv_view kv;
    uint32_t n_tok, n_head, ldq, ldo;
    uint32_t max_kv;  /* no position in this call is >= max_kv; sizes grids and workspaces */
    uint32_t n_after; /* tokens of the pass behind these: what ps_op_cost takes off max_kv */
    uint32_t window;
    float scale, softcap;
} ps_attn_args;

/* ---- ATTN_MERGE: out = the attention over both parts. In place allowed: out == a. On a GPU b and
 * ml_b may be host memory, as for ADD. ---- */
typedef struct ps_attn_merge_args {
    ps_dptr a, b, out;  /* f32 [n_tok][n_head * head_dim] */
    ps_dptr ml_a, ml_b; /* f32 [n_tok][n_head][2] */
    uint32_t n_tok, n_head, head_dim;
} ps_attn_merge_args;

/* ---- ACT: gated: out = f(gate) * up; RELU2 has no gate: out = max(up, 0)^2. In place allowed: out
 * == gate or up. ---- */
typedef enum ps_act_kind {
    PS_ACT_SILU,       /* x / (1 + exp(-x)), gated */
    PS_ACT_GELU,       /* tanh form, gated */
    PS_ACT_RELU2,      /* no gate */
    PS_ACT_SWIGLU_OAI, /* g = min(gate, 7), u = clamp(up, -7, 7): g / (1 + exp(-1.702 g)) * (u + 1)
                        */
} ps_act_kind;
typedef struct ps_act_args {
    ps_dptr gate, up, out; /* f32 [n_tok][ldg], [n_tok][ldu], [n_tok][ldo] */
    uint32_t n_tok, n, ldg, ldu, ldo;
    uint32_t kind; /* ps_act_kind */
} ps_act_args;

/* ---- ROUTE: softmax over the experts' logits, the k best (lowest index wins ties) in falling
 * order, weights renormalised to sum 1 where `renorm`. order / starts: assignments (t * k + rank)
 * grouped by expert, ascending within a group: those of expert e are order[starts[e] .. starts[e +
 * 1]). ---- */
typedef struct ps_route_args {
    ps_dptr logits;  /* f32 [n_tok][n_expert] */
    ps_dptr ids;     /* int32 [n_tok][k] */
    ps_dptr weights; /* f32 [n_tok][k] */
    ps_dptr order;   /* int32 [n_tok * k] */
    ps_dptr starts;  /* int32 [n_expert + 1] */
    uint32_t n_tok, n_expert, k, renorm;
} ps_route_args;

/* ---- GATHER_EXPERTS: where this side finds the image of each expert e. That of one with
 * resident[e] given is there. The others have one only if somebody is routed to them: those with
 * mapped[e] given, and a share of those with shared[e] given. These are taken in the order of their
 * first assignments: of n routed ones the first PS_SHARE_OF(n, share) are the GPU's, or, with
 * `rest`, all others are the CPU's. So both sides come to the same division without a word between
 * them. With `slots`, a mapped or shared image is copied to slot i, i being the first assignment
 * with ids[i] == e; other slots are left untouched. Without, it stays where it lies. Then gate[e] =
 * image of e + gate_at, and up and down likewise, for the ops that follow; null where there is
 * none. All images of a call have the same size and layout. ---- */
enum { PS_SHARE_ONE = 1 << 16 }; /* shares are numbers of 65536ths, so that all devices agree */
/* Of n images, how many: of all ways to divide whole ones between sides whose rates are as share to
 * rest, the one that is done first. Rounding up makes the first side wait for (1 - f) / share, down
 * the other for f / (1 - share), f being the fraction of n * share. */
#define PS_SHARE_OF(n, share)                                                                      \
    ((share) >= PS_SHARE_ONE ? (uint64_t)(n) : ((uint64_t)(n) + 1) * (share) / PS_SHARE_ONE)
typedef struct ps_gather_experts_args {
    ps_dptr ids;              /* int32 [n_tok * k], from ROUTE */
    ps_dptr mapped, resident; /* ps_dptr [n_expert], of images: in host memory, under the address by
                                 which this side reaches it, and in the memory beside; or null */
    ps_dptr shared;           /* the same of host memory; or no table: nothing is shared */
    ps_dptr slots;            /* [n_tok * k][image_bytes] or null */
    ps_dptr gate_ptrs, up_ptrs, down_ptrs; /* ps_dptr [n_expert] each */
    uint64_t image_bytes;                  /* a multiple of 16 */
    uint64_t gate_at, up_at, down_at;      /* of the matrices in an image */
    uint32_t n_tok, k, n_expert;
    uint32_t share; /* the GPU's of the shared ones, at most PS_SHARE_ONE */
    uint32_t rest;  /* 0 or 1 */
} ps_gather_experts_args;

/* ---- MOE_UP: for each assignment a = (t, rank) whose expert e has addresses on this side:
 * out[a][f] = act(gate_e[f] . x[t] + gate_bias[e][f], up_e[f] . x[t] + up_bias[e][f]). Others are
 * left untouched. ---- */
typedef struct ps_moe_up_args {
    ps_dptr x;                  /* f32 [n_tok][ldx] */
    ps_dptr out;                /* f32 [n_tok * k][n_ff] */
    ps_dptr ids, order, starts; /* from ROUTE */
    ps_dptr gate_ptrs,
        up_ptrs; /* ps_dptr [n_expert]: [n_ff][n_cols] fmt each; null: not on this side */
    ps_dptr gate_bias, up_bias; /* f32 [n_expert][n_ff] or null */
    ps_dptr ws;                 /* ps_op_workspace_bytes; CUDA only */
    uint64_t ws_bytes;
    uint32_t n_tok, k, n_expert, n_cols, n_ff, ldx;
    uint32_t fmt_gate, fmt_up;
    uint32_t act;    /* ps_act_kind */
    uint32_t n_here; /* how many experts the tables name, for launches to go by; 0: not known */
} ps_moe_up_args;

/* ---- MOE_DOWN: y[a] = down_e . h[a] + bias[e] for each assignment whose expert is on this side.
 * ---- */
typedef struct ps_moe_down_args {
    ps_dptr h; /* f32 [n_tok * k][n_ff] */
    ps_dptr y; /* f32 [n_tok * k][n_rows] */
    ps_dptr ids, order, starts;
    ps_dptr down_ptrs; /* ps_dptr [n_expert]: [n_rows][n_ff] fmt */
    ps_dptr bias;      /* f32 [n_expert][n_rows] or null */
    ps_dptr ws;
    uint64_t ws_bytes;
    uint32_t n_tok, k, n_expert, n_ff, n_rows;
    uint32_t fmt;
    uint32_t n_here; /* as in MOE_UP */
} ps_moe_down_args;

/* ---- MOE_COMBINE: out[t] = residual[t] + sum over ranks in order of weights[t][r] * row, row =
 * y[a] where the expert has an address in down_ptrs, else y_other[a] (computed elsewhere; on a GPU
 * it may be host memory, as for ADD). In place allowed: out == residual. ---- */
typedef struct ps_moe_combine_args {
    ps_dptr y,
        y_other; /* f32 [n_tok * k][n]; y_other may be null where every expert is on this side */
    ps_dptr down_ptrs;    /* ps_dptr [n_expert] */
    ps_dptr ids, weights; /* from ROUTE */
    ps_dptr residual;     /* f32 [n_tok][n] or null */
    ps_dptr out;          /* f32 [n_tok][n] */
    uint32_t n_tok, k, n_expert, n;
} ps_moe_combine_args;

/* ---- ADD: out = a + b, n floats, in place allowed: out == a. On a GPU b may be host memory, under
 * the address by which kernels reach it, that the CPU wrote just before. ---- */
typedef struct ps_add_args {
    ps_dptr a, b, out;
    uint64_t n;
} ps_add_args;

/* ---- GATHER_ROWS: out[i] = x[rows[i]]. ---- */
typedef struct ps_gather_rows_args {
    ps_dptr x;    /* f32 [n_x][n] */
    ps_dptr rows; /* int32 [n_rows], each in [0, n_x) */
    ps_dptr out;  /* f32 [n_rows][n] */
    uint32_t n_rows, n, n_x;
} ps_gather_rows_args;

/* ---- SOFTCAP: x = cap * tanh(x / cap), in place. ---- */
typedef struct ps_softcap_args {
    ps_dptr x;
    uint64_t n;
    float cap;
} ps_softcap_args;

/* ---- MOVE: out = x, n 32-bit words, bit by bit. On a GPU one of the two may be host memory, as
 * for ADD: this is how small things get from side to side without a copy engine, whose queue may be
 * full of weights. ---- */
typedef struct ps_move_args {
    ps_dptr x, out;
    uint64_t n;
} ps_move_args;

typedef union ps_op_args { /* as large as the largest */
    ps_embed_args embed;
    ps_norm_args norm;
    ps_matmul_args matmul;
    ps_qkv_prep_args qkv_prep;
    ps_attn_args attn;
    ps_attn_merge_args attn_merge;
    ps_act_args act;
    ps_route_args route;
    ps_gather_experts_args gather_experts;
    ps_moe_up_args moe_up;
    ps_moe_down_args moe_down;
    ps_moe_combine_args moe_combine;
    ps_add_args add;
    ps_gather_rows_args gather_rows;
    ps_softcap_args softcap;
    ps_move_args move;
} ps_op_args;

/* ---- about ops, without running them (ps_ops.c) ---- */
const char *ps_op_name(ps_op_kind kind); /* "matmul" */
uint32_t ps_op_args_bytes(ps_op_kind kind);

typedef enum ps_access { PS_READ = 1, PS_WRITE = 2, PS_READ_WRITE = 3 } ps_access;
typedef struct ps_operand {
    uint16_t offset;  /* of the ps_dptr field in the argument struct */
    uint16_t access;  /* ps_access */
    uint64_t n_bytes; /* touched from that address on; 0: the field is null in this call */
} ps_operand;
enum { PS_MAX_OPERANDS = 20 };
/* The ps_dptr fields of this call. Memory behind pointer tables (experts) is not listed: lowering
 * adds it. */
uint32_t ps_op_operands(ps_op_kind kind, const void *args, ps_operand out[PS_MAX_OPERANDS]);

/* Experts that n_tok tokens touch under uniform routing: E (1 - (1 - k/E)^n_tok). */
double ps_experts_touched(uint32_t n_expert, uint32_t k, uint32_t n_tok);

/* What the shapes say; addresses are not looked at, so that plans can ask before any memory exists.
 */
ps_cost ps_op_cost(ps_op_kind kind, const void *args);

/* Every launcher asks this first: shapes, strides, formats and required operands. PS_EINTERNAL,
 * because arguments come from our own lowering; the sentence names op and argument. Values in
 * device memory are the caller's to check. */
ps_status ps_op_check(ps_op_kind kind, const void *args, ps_err *err);

/* Bytes of workspace that the CUDA launcher wants for this call on compute capability `sm` (90
 * for 9.0); 0 for most. Addresses in args are not looked at. Launchers accept less only where this
 * says so. */
uint64_t ps_op_workspace_bytes(ps_op_kind kind, const void *args, int sm);

/* Scratch that a CPU-executed stream needs so that every CPU variant runs every op of a model
 * within these bounds. */
typedef struct ps_cpu_bounds {
    uint32_t max_cols; /* widest matmul input, n_ff included */
    uint32_t max_tok;  /* most tokens in one op call */
    uint32_t max_rows; /* most rows of x in one op call: max_tok * k for experts */
    uint32_t max_ctx;  /* longest attention */
    uint32_t max_head_dim;
    uint32_t n_head;
    uint32_t threads;
} ps_cpu_bounds;
uint64_t ps_cpu_scratch_bytes(const ps_cpu_bounds *bounds);

/* ---- tables ---- */
typedef struct ps_op_table {
    const char *name;            /* "ref", "avx2", "avx512", "amx", "cuda" */
    ps_launcher op[PS_OP_COUNT]; /* none is NULL */
} ps_op_table;

/* The variant of this name, or the best that the CPU has for NULL; NULL where unknown or not
 * supported here. */
const ps_op_table *ps_cpu_ops(const char *name);
/* All variants compiled in, best last; *supported says whether this CPU runs it. NULL past the end.
 */
const ps_op_table *ps_cpu_ops_at(uint32_t i, bool *supported);
/* NULL in builds without CUDA. */
const ps_op_table *ps_cuda_ops(void);

#ifdef __cplusplus
}
#endif
#endif
