/* ps_model - what a GGUF file means: hyper-parameters by architecture, and the weights divided into
 * units, the smallest pieces that are placed. Also the host images of units: the bytes that devices
 * copy and CPUs compute with.
 *
 * Not here: where units go (ps_plan), which ops run (ps_lower), tokens as text (Python).
 * Threads: a model is immutable after open and shareable; images are filled under a lock, once.
 *
 * A unit's image is one contiguous run of bytes: its weights in the order of its weight list, each
 * aligned to PS_WEIGHT_ALIGN, blocks exactly as in the file, except 1-D tensors, which are float32.
 * The same bytes lie in VRAM, in slots and in host memory, so that one copy moves a unit and every
 * kernel reads one layout.
 */
#ifndef PS_MODEL_H
#define PS_MODEL_H

#include "base/ps_base.h"
#include "format/ps_gguf.h"
#include "format/ps_quant.h"
#include "kernels/ps_ops.h"

enum {
    PS_WEIGHT_ALIGN = 256,
    PS_MAX_HEAD_DIM = 256,
    PS_MAX_EXPERTS_USED = 64,
};

typedef enum ps_unit_kind {
    PS_UNIT_EMBED,  /* token table, where it is not tied to the head */
    PS_UNIT_ATTN,   /* a layer's attention with its norms */
    PS_UNIT_FFN,    /* a layer's dense feed-forward with its norms */
    PS_UNIT_ROUTER, /* norm, router and expert biases of a layer with experts */
    PS_UNIT_EXPERT, /* one expert: gate, up, down */
    PS_UNIT_HEAD,   /* output norm and matrix; owns the token table where tied */
    PS_UNIT_KIND_COUNT
} ps_unit_kind;
const char *ps_unit_kind_name(ps_unit_kind kind); /* "embed", "attn", ... */

/* What a weight does in its unit. */
typedef enum ps_role {
    PS_W_TABLE,
    PS_W_NORM,
    PS_W_NORM_B,    /* before the block (or before the head) */
    PS_W_POST_NORM, /* behind the block, before the residual add */
    PS_W_QKV,
    PS_W_QKV_B, /* fused */
    PS_W_Q,
    PS_W_K,
    PS_W_V,
    PS_W_Q_B,
    PS_W_K_B,
    PS_W_V_B,
    PS_W_Q_NORM,
    PS_W_K_NORM,
    PS_W_SINKS,
    PS_W_O,
    PS_W_O_B,
    PS_W_GATE,
    PS_W_UP,
    PS_W_DOWN, /* of the dense block, or of one expert; UP holds gate and up where fused */
    PS_W_GATE_B,
    PS_W_UP_B,
    PS_W_DOWN_B, /* of the dense block, or [n_expert][n] in the router unit */
    PS_W_ROUTER,
    PS_W_ROUTER_B,
    PS_W_HEAD,
    PS_W_COUNT
} ps_role;

typedef struct ps_weight {
    ps_role role;
    uint32_t fmt;    /* in the image */
    uint32_t n_rows; /* 1 for 1-D tensors; n_expert for stacked biases */
    uint32_t n_cols;
    uint64_t row_bytes;      /* n_rows * row_bytes bytes in the image */
    uint64_t offset;         /* in the unit's image */
    uint32_t i_tensor;       /* in the file's directory */
    uint64_t tensor_skip;    /* bytes into the tensor's data (experts, parts) */
    uint64_t file_row_bytes; /* from a row to the next in the file; more than row_bytes where the
                                weight is some columns of the tensor */
    uint32_t file_fmt; /* in the file; differs from fmt for 1-D tensors that are not F32 there */
} ps_weight;

typedef struct ps_unit {
    char name[48]; /* "embed", "blk.3.attn", "blk.3.expert.17", "head" */
    ps_unit_kind kind;
    int32_t layer;                    /* -1 for embed and head */
    int32_t expert;                   /* -1 unless expert */
    uint32_t first_weight, n_weights; /* in model->weights */
    uint64_t n_bytes;                 /* of the image */
    uint32_t n_rows;   /* what a Split divides: KV-head groups, neurons, output rows; 1 for experts
                          and embed */
    uint32_t row_step; /* boundaries of a Split are multiples of this */
    uint32_t kv_bytes_per_tok; /* f16 cache; 0 unless attn */
    double use;                /* share of tokens that need it: 1, or n_expert_used / n_expert */
    /* Only in a model that a plan has cut (ps_cut). */
    int32_t of; /* unit that this one is a part of: rows first_row .. + n_rows; -1: whole */
    uint32_t first_row;
    uint32_t first_part, n_parts; /* where it is cut: units that take its place; 0 parts: whole.
                                     The first holds its norms and computes no rows (n_rows 0) */
} ps_unit;

/* Only a name for its parts, which are loaded and computed in its place. */
static inline bool ps_unit_is_cut(const ps_unit *unit)
{
    return unit->n_parts > 0;
}

typedef struct ps_layer {
    int32_t attn, ffn, router, first_expert; /* unit indices; -1 where the layer has none */
    uint32_t window;                         /* sliding window in tokens; 0: none */
    uint32_t i_rope;                         /* which frequency table */
} ps_layer;

enum { PS_ROPE_TABLES = 2 }; /* global layers, windowed layers */

typedef struct ps_hparams {
    uint32_t n_vocab, n_ctx_train, n_layer, n_embd, n_head, n_kv_head, head_dim, n_ff;
    uint32_t n_expert, n_expert_used, n_ff_expert; /* 0 where dense */
    uint32_t n_rot, rope;                          /* ps_rope_kind */
    uint32_t rope_sections[4];
    uint32_t n_rope;    /* tables in use: 1 or 2 */
    uint32_t norm, act; /* ps_norm_kind, ps_act_kind */
    uint32_t ffn_gated, fused_gate_up, renorm_experts, tied;
    float eps, embed_scale, attn_scale, attn_softcap, logit_softcap;
} ps_hparams;

typedef struct ps_model ps_model;

struct ps_model {
    ps_gguf *gguf; /* owns */
    char arch[32];
    ps_hparams hp;
    uint32_t n_units, n_weights;
    ps_unit *units; /* owns; embed, then layer by layer attn, ffn | router, experts, then head */
    ps_weight *weights; /* owns */
    ps_layer *layers;   /* owns; [n_layer] */
    int32_t embed;      /* unit that holds the token table: the embed unit, or head where tied */
    int32_t head;
    uint64_t n_bytes;         /* of all images */
    uint8_t digest[32];       /* of the metadata and the tensor directory */
    struct ps_images *images; /* owns; host images filled so far; none of parts */
};

/* Opens a file (any part of a split one). Weights are not read yet. */
ps_status ps_model_open(const char *path, ps_model **out, ps_err *err);
void ps_model_close(ps_model *model); /* NULL allowed */

/* The weight with this role in a unit, or NULL. */
const ps_weight *ps_model_find(const ps_model *model, uint32_t unit, ps_role role);
/* "blk.3.attn" -> its index; -1 where unknown. */
int32_t ps_model_find_unit(const ps_model *model, const char *name);

/* Rope frequencies [n_rot / 2] of table i_rope for a context of n_ctx tokens, and the factor on cos
 * and sin. */
ps_status ps_model_rope(
    const ps_model *model, uint32_t i_rope, uint32_t n_ctx, float *freq, float *mag, ps_err *err);

/* Bytes [from, from + n_bytes) of a unit's image, from the host image where it is loaded, else from
 * the file. Any thread. */
ps_status ps_model_read_part(
    const ps_model *model, uint32_t unit, uint64_t from, uint64_t n_bytes, void *dst, ps_err *err);

/* Host images, shared by every engine over this model. Fills those in `want` (one flag a unit) that
 * are not there yet, several units at once on `pool` (may be NULL). *image stays valid until the
 * model closes. */
typedef bool (*ps_progress_fn)(
    void *ctx, uint64_t done_bytes, uint64_t total_bytes); /* false: stop */
ps_status ps_model_load_images(ps_model *model, const bool *want, ps_pool *pool,
    ps_progress_fn progress, void *progress_ctx, ps_err *err);
const void *ps_model_image(const ps_model *model, uint32_t unit); /* NULL where not loaded */
uint64_t ps_model_image_bytes(const ps_model *model);             /* host memory held by images */

/* Architectures that ps_model_open knows, for messages: "llama, qwen2, ...". */
const char *ps_model_architectures(void);

#endif
